"""The search: many roots at once, over any model that can be stepped in batches.

The planner owns the tree and knows no environment: a model is asked, once a wave, about one new
leaf a root, each named by integer handles under which it may keep what it likes. A root's prior is
used as it is given; noise and mixing are ``priors``' business. Nothing here is random but ties by
LightZero's rule and Gumbel noise, and both come from generators that the caller gives.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pz_agents.config import Settings
from pz_agents.errors import ModelError
from pz_agents.search import tree as kernels
from pz_agents.search.tree import Floats, Integers
from pz_envs.errors import ConfigError

_RULES = {"puct": kernels.PUCT, "lightzero": kernels.LIGHTZERO, "gumbel": kernels.GUMBEL}


class SearchSettings(Settings):
    """How a search descends and how long."""

    simulations: int = Field(default=25, ge=1, le=100_000)
    """Descents a root; each ends at one new leaf, or at a node without actions."""
    rule: Literal["puct", "lightzero", "gumbel"] = "puct"
    """``puct``: q' + (c_init + log((N + c_base + 1) / c_base)) sqrt(N + 1) p / (1 + n), where N
    counts the visits of a node's actions and n those of one; q' is q scaled to 0..1 by the tree's
    lowest and highest value, an unvisited action's q the mean of its node's value and its visited
    siblings' q; ties go to the first. ``lightzero``: sqrt(N) instead and random ties, by which the
    first visit of every node ignores the prior. ``gumbel``: sequential halving at the root and the
    improved policy inside (Danihelka et al., 2022, as in mctx's ``gumbel_muzero_policy``)."""
    c_init: float = Field(default=1.25, ge=0.0)
    """Weight of the prior."""
    c_base: float = Field(default=19652.0, gt=0.0)
    """Visits after which the prior weighs visibly more."""
    value_floor: float = Field(default=0.01, gt=0.0)
    """The least range of values that is scaled to 0..1."""
    considered: int = Field(default=16, ge=1)
    """Gumbel: the most root actions that take part in sequential halving."""
    gumbel_scale: float = Field(default=1.0, ge=0.0)
    """Gumbel: factor of the root's noise; 0 when evaluating."""
    seconds: float | None = Field(default=None, gt=0.0)
    """Wall clock after which no wave begins; results then depend on the machine."""


@dataclass(frozen=True, slots=True, eq=False)
class Roots:
    """Where trees begin; the actions of all roots lie one after another.

    prior: [E] probabilities, each root's summing to 1; they are searched with unchanged.
    counts: [B] how many actions each root has; a root with none is not searched.
    values: [B] the model's values.
    """

    prior: Floats
    counts: Integers
    values: Floats

    @classmethod
    def join(cls, priors: Sequence[Floats], values: Sequence[float] | Floats) -> Roots:
        """Join the priors of single roots."""
        counts = np.array([len(prior) for prior in priors], np.int64)
        flat = np.concatenate([np.zeros(0), *priors])
        return cls(flat, counts, np.asarray(values, np.float64))


class Leaves(NamedTuple):
    """One wave's new leaves, at most one a tree, all [M]; valid until ``step`` returns.

    Handles number the nodes of all trees: tree b's root is b * nodes_per_tree, and every handle of
    a tree is below (b + 1) * nodes_per_tree. ``action`` counts in the parent's own list.
    """

    tree: Integers
    parent: Integers
    action: Integers
    node: Integers


class Expansion(NamedTuple):
    """What a model says of a wave's leaves.

    reward: [M] of the step into the leaf.
    discount: [M] of the leaf's value; 0 where the episode ended.
    value: [M] of the leaf.
    logits: [sum of counts] policy logits, finite, the leaves' lists one after another.
    counts: [M] how many actions each leaf has; 0 where nothing follows or is known; -1 likewise,
        and by PUCT (both rules) no descent comes here again.
    """

    reward: Floats
    discount: Floats
    value: Floats
    logits: Floats
    counts: Integers


_NOTHING = Expansion(np.zeros(0), np.zeros(0), np.zeros(0), np.zeros(0), np.zeros(0, np.int64))


class SearchModel(Protocol):
    """What can be searched over."""

    def step(self, leaves: Leaves) -> Expansion | None:
        """Take each leaf's action in its parent; remember what is needed under its handle.

        None ends the search without these leaves.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class SearchResult:
    """What the search found; root b's actions lie at ``slice(offsets[b], offsets[b + 1])``.

    offsets: [B + 1].
    prior: [E] as it was given and as the tree holds it.
    visits: [E] of each action.
    q: [E] each visited action's value, 0 where there was no visit.
    policy: [E] visits / sum (the prior where there was none); by ``gumbel`` the improved policy.
    chosen: [B] the action to play without sampling; -1 where there is none.
    values: [B] means over all descents.
    simulations: waves done.
    """

    offsets: Integers
    prior: Floats
    visits: Floats
    q: Floats
    policy: Floats
    chosen: Integers
    values: Floats
    simulations: int

    def at(self, root: int) -> slice:
        """Return where a root's actions lie in the flat arrays."""
        return slice(int(self.offsets[root]), int(self.offsets[root + 1]))


class Planner:
    """Searches; keeps its memory between searches, so use one a thread."""

    def __init__(self, settings: SearchSettings | None = None) -> None:
        self.settings = settings or SearchSettings()
        self._rule = _RULES[self.settings.rule]
        done = np.arange(self.settings.simulations + 1, dtype=np.float64)
        under_root = done if self._rule == kernels.LIGHTZERO else done + 1.0
        base = self.settings.c_base
        growth = np.log((done + base + 1.0) / base) + self.settings.c_init
        self._factor = growth * np.sqrt(under_root)
        self._considered = np.zeros((1, 1))
        if self._rule == kernels.GUMBEL:
            self._considered = halving_table(self.settings.considered, self.settings.simulations)
        self._nodes: NDArray[np.void] = np.zeros(0, kernels.NODE)
        self._trees: NDArray[np.void] = np.zeros(0, kernels.TREE)
        self._leaves = np.zeros((4, 0), np.int64)
        self._pool = np.zeros(0)
        self._child = np.zeros(0, np.int64)
        self._scores = np.zeros(0)

    @property
    def nodes_per_tree(self) -> int:
        """How many handles each tree has: its root and one a simulation."""
        return self.settings.simulations + 1

    def search(
        self,
        roots: Roots,
        model: SearchModel,
        generators: Sequence[np.random.Generator] | None = None,
    ) -> SearchResult:
        """Search from all roots.

        Args:
            roots: where to begin.
            model: is stepped once a wave, with a batch of leaves.
            generators: one a root; needed by ``lightzero`` and by ``gumbel`` with noise.

        Raises:
            ConfigError: generators are needed and there are not as many as roots.
            ModelError: priors, counts or a model's answer are not what they must be.
        """
        _check_roots(roots)
        n_trees, per_tree = len(roots.counts), self.nodes_per_tree
        perturbed = self._prepare(roots, generators)
        nodes, trees, leaves = self._nodes, self._trees, self._leaves
        rule, floor, factor = self._rule, self.settings.value_floor, self._factor
        kernels.plant(
            nodes, trees, per_tree, self._pool, self._child, roots.prior, roots.counts,
            roots.values,
        )  # fmt: skip
        simulations, seconds = self.settings.simulations, self.settings.seconds
        deadline = math.inf if seconds is None else time.monotonic() + seconds
        used, found, done = len(roots.prior), 0, 0
        said = _NOTHING
        while True:
            descend = done < simulations and time.monotonic() < deadline
            needed = used + len(said.logits)
            if needed > len(self._child):
                self._grow(needed)
            asked = found
            found = kernels.advance(
                nodes, trees, n_trees, per_tree, self._pool, self._child, used, asked, leaves,
                *said, rule, factor, floor, perturbed, self._considered, self._scores, descend,
            )  # fmt: skip
            if found < 0:
                raise _broken_answer(found, said, asked)
            used = needed
            if not descend:
                break
            said = _NOTHING
            if found > 0:
                answer = model.step(Leaves(*leaves[:, :found]))
                if answer is None:
                    break
                said = answer
                if not len(said.reward) == len(said.discount) == len(said.value) == found:
                    raise _broken_answer(kernels.MISMATCH, said, found)
                if len(said.counts) != found:
                    raise _broken_answer(kernels.MISMATCH, said, found)
            done += 1
        return self._conclude(roots, perturbed, done)

    def _prepare(self, roots: Roots, generators: Sequence[np.random.Generator] | None) -> Floats:
        """Make room, seed the trees, and return log prior + Gumbel noise of every root action."""
        n_trees, n_edges = len(roots.counts), len(roots.prior)
        if len(self._trees) < n_trees:
            self._nodes = np.zeros(n_trees * self.nodes_per_tree, kernels.NODE)
            self._trees = np.zeros(n_trees, kernels.TREE)
            self._leaves = np.zeros((4, n_trees), np.int64)
        if len(self._child) < n_edges:
            self._grow(n_edges)
        noisy = self._rule == kernels.GUMBEL and self.settings.gumbel_scale > 0.0
        if self._rule == kernels.LIGHTZERO or noisy:
            given = 0 if generators is None else len(generators)
            if generators is None or given != n_trees:
                raise ConfigError(
                    f"the rule {self.settings.rule} draws from one generator a root: {n_trees} "
                    f"needed, {given} given; pass search(..., generators=...)"
                )
            if self._rule == kernels.LIGHTZERO:
                for number, stream in enumerate(generators):
                    self._trees[number]["random"] = stream.integers(2**63)
        if self._rule != kernels.GUMBEL:
            return np.zeros(0)
        perturbed = np.log(np.maximum(roots.prior, 1e-300))
        if noisy and generators is not None:
            pairs = zip(roots.counts.tolist(), generators, strict=True)
            noise = [np.zeros(0), *(stream.gumbel(size=count) for count, stream in pairs)]
            perturbed += self.settings.gumbel_scale * np.concatenate(noise)
        return perturbed

    def _grow(self, needed: int) -> None:
        size = max(needed, 2 * len(self._child), 4096)
        pool, child = np.zeros(4 * size), np.zeros(size, np.int64)
        pool[: len(self._pool)], child[: len(self._child)] = self._pool, self._child
        self._pool, self._child, self._scores = pool, child, np.zeros(size)

    def _conclude(self, roots: Roots, perturbed: Floats, done: int) -> SearchResult:
        n_trees, n_edges = len(roots.counts), len(roots.prior)
        found, chosen = np.zeros((4, n_edges)), np.zeros(n_trees, np.int64)
        kernels.conclude(
            self._nodes, self.nodes_per_tree, self._pool, self._rule, perturbed, self._scores,
            found, chosen,
        )  # fmt: skip
        starts = self._nodes[: n_trees * self.nodes_per_tree : self.nodes_per_tree]
        return SearchResult(
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(roots.counts)]),
            prior=found[kernels.PRIOR],
            visits=found[kernels.VISITS],
            q=found[kernels.Q],
            policy=found[kernels.SHARE],
            chosen=chosen,
            values=starts["value_sum"] / starts["visits"],
            simulations=done,
        )


def halving_table(considered: int, simulations: int) -> Floats:
    """Return how often an action must have been visited to be considered next.

    Row m is for m actions that take part; column s for the (s + 1)-th simulation. Every round
    gives each surviving action the same number of visits and then halves the survivors, to no
    fewer than two (mctx's ``seq_halving.py``, after Karnin et al., 2013).

    Returns:
        [considered + 1, simulations]; row 0 is unused.
    """
    table = np.zeros((considered + 1, simulations))
    for taking_part in range(1, considered + 1):
        if taking_part == 1:
            table[1] = np.arange(simulations)
            continue
        rounds = math.ceil(math.log2(taking_part))
        visits = [0] * taking_part
        sequence: list[int] = []
        survivors = taking_part
        while len(sequence) < simulations:
            for _ in range(max(1, simulations // (rounds * survivors))):
                sequence += visits[:survivors]
                visits[:survivors] = [count + 1 for count in visits[:survivors]]
            survivors = max(2, survivors // 2)
        table[taking_part] = sequence[:simulations]
    return table


def _check_roots(roots: Roots) -> None:
    counts = roots.counts
    if len(roots.values) != len(counts) or int(counts.sum()) != len(roots.prior):
        raise ModelError(
            f"{len(counts)} roots with {int(counts.sum())} actions in all were given "
            f"{len(roots.values)} values and {len(roots.prior)} priors; see Roots"
        )
    if not np.isfinite(roots.values).all():
        raise ModelError(f"root values must be finite; got {roots.values}")
    if len(roots.prior) == 0:
        return
    filled = counts > 0
    starts = (np.cumsum(counts) - counts)[filled]
    sums = np.add.reduceat(roots.prior, starts)
    if not (roots.prior.min() >= 0.0 and np.abs(sums - 1.0).max() < 1e-6):
        worst = float(sums[np.argmax(np.abs(sums - 1.0))])
        raise ModelError(
            f"each root's prior must be probabilities that sum to 1; one sums to {worst:g}, and "
            f"the smallest is {roots.prior.min():g}"
        )


def _broken_answer(code: int, said: Expansion, leaves: int) -> ModelError:
    if code == kernels.MISMATCH:
        lengths = [len(said.reward), len(said.discount), len(said.value), len(said.counts)]
        return ModelError(
            f"the model was asked about {leaves} leaves and gave {lengths} rewards, discounts, "
            f"values and counts, with {len(said.logits)} logits for "
            f"{int(said.counts.sum())} actions"
        )
    if code == kernels.BAD_LOGITS:
        what = "a leaf logits"
    else:
        what = f"leaf {-code - 1} of {leaves} a reward, discount or value"
    return ModelError(
        f"the model gave {what} that is not finite; its weights have diverged, or a head is broken"
    )
