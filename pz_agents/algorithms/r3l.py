r"""R3L: reflect, retry, and learn from both attempts (reflect-then-retry reinforcement learning).

The program (``pz_agents.rollout.reflect_retry``) plays base attempts, reflects on each and plays
it again from the step that the reflection blames. Base attempts and retries of a task are one
group. With R the return and b the group's mean return, the advantage of an attempt is

    success_advantage if it succeeds,   alpha (R - b) if R > b,   R - b otherwise,

and only tokens from the pivot on are trained, in a retry and in the attempt that it repeats: what
comes before is the same in both. A retry is trained without the guidance it was sampled under, so
there is no importance ratio:

    L = mean(-A log pi) / (1 + tau) + beta mean(k2) + meta_weight mean_meta(-log pi)

Meta rows are reflections that led to an improved, successful retry, reflections that rightly found
nothing to improve, and those retries once more under their guidance. ``PRESETS`` holds what was
published: the paper's settings (the default), and those of two code bases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from pz_agents.algorithms import Algorithm, Credit, opmd
from pz_agents.algorithms.credit import (
    Advantages,
    baseline_advantages,
    reweighted,
    separate_means,
)
from pz_agents.algorithms.losses import Aggregation, Loss, Tokens
from pz_agents.algorithms.rows import TrainRow, rewards_of, rows_of, shared_turns
from pz_agents.rollout.reflect_retry import SCRIPTED, RetryOptions, pivot_of, reflect_retry
from pz_agents.sdk.types import Trajectory

EXPLORE = ("base", "retry", "fill")
META = ("reflection", "guided")


class Options(RetryOptions):
    """What can be changed about R3L."""

    success_advantage: float | None = 3.0
    """What every success earns; None: advantages are not reweighted."""

    alpha: float = pydantic.Field(default=3.0, ge=0)
    """Factor on positive advantages below success, when they are reweighted."""

    pivot_mask: bool = True
    """Train a retry, and the attempt it repeats, only from the pivot on."""

    negative_retries: bool = True
    """Train on retries with a negative advantage, though they were sampled under guidance."""

    meta: Literal["sft", "advantage", "off"] = "sft"
    """Meta rows: a mean of their own, weighed by `meta_weight`; as rows among the others with
    `success_advantage`; or none."""

    meta_weight: float = pydantic.Field(default=0.1, ge=0)
    """Weight of the mean over meta rows."""

    tau: float = pydantic.Field(default=0.0, ge=0)
    """The loss on attempts is divided by 1 + tau, as in OPMD."""

    beta: float = pydantic.Field(default=0.0, ge=0)
    """Weight of the k2 term to the starting weights."""

    aggregation: Aggregation = "seq_mean_token_mean"
    """How token losses become one number."""


_TRINITY: Mapping[str, Any] = {
    "alpha": 3.0,
    "tau": 1.0,
    "beta": 0.001,
    "aggregation": "token_mean",
    "meta": "advantage",
    "reflection_temperature": 1.0,
    "reflection_tokens": 4096,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "success_advantage": 3.0,
        "alpha": 3.0,
        "tau": 0.0,
        "beta": 0.0,
        "aggregation": "seq_mean_token_mean",
        "meta": "sft",
        "meta_weight": 0.1,
        "reflection_temperature": 0.7,
    },
    "trinity_fork": {**_TRINITY, "success_advantage": 3.0, "fill_groups": True},
    "trinity_release": {**_TRINITY, "success_advantage": 1.0, "fill_groups": False},
}
"""Published settings; each is an algorithm of its own name."""


def credit(trajectories: Sequence[Trajectory], options: Options) -> Credit:
    """Give attempts their group's reweighted advantage from the pivot on, meta rows theirs."""
    attempts = [item for item in trajectories if plain_kind(item) in EXPLORE]
    advantages = attempt_advantages(attempts, options)
    firsts = first_turns(attempts) if options.pivot_mask else [0] * len(attempts)
    rows = [
        row
        for item, first, value, used in zip(
            attempts, firsts, advantages.values, advantages.used, strict=True
        )
        if used and (options.negative_retries or value >= 0 or plain_kind(item) != "retry")
        for row in rows_of(item, float(value), first)
    ]
    meta = [] if options.meta == "off" else _meta_rows(trajectories, options)
    if options.meta == "sft":
        rows, meta = _with_own_mean(rows, meta, options)
    stats = {
        "groups": float(advantages.groups),
        "usable_groups": float(advantages.usable),
        "zero_advantage_groups": 1 - advantages.usable / max(advantages.groups, 1),
        "meta_rows": float(len(meta)),
        **retry_figures(trajectories),
    }
    return Credit([*rows, *meta], stats)


def attempt_advantages(attempts: Sequence[Trajectory], options: Options) -> Advantages:
    """Return the advantages of base attempts and retries, each task's one group."""
    rewards = rewards_of(attempts)
    groups = [item.group_id for item in attempts]
    advantages = baseline_advantages(rewards, groups)
    if options.success_advantage is None:
        return advantages
    succeeded = np.array([float(item.success) for item in attempts])
    return reweighted(
        advantages,
        np.where(np.isnan(rewards), np.nan, succeeded),
        groups,
        success_advantage=options.success_advantage,
        alpha=options.alpha,
    )


def first_turns(attempts: Sequence[Trajectory]) -> list[int]:
    """Return the first turn of each attempt that is trained.

    It is a retry's pivot, for the retry and for the attempt that it repeats, or as far as the two
    are the same, token for token, if that is less; 0 for an attempt without a finished retry.
    """
    by_key = {item.key: item for item in attempts}
    firsts = dict.fromkeys(by_key, 0)
    for item in attempts:
        base = by_key.get(repeats(item))
        if plain_kind(item) == "retry" and item.status == "ok" and base is not None:
            firsts[item.key] = firsts[base.key] = min(pivot_of(item), shared_turns(base, item))
    return [firsts[item.key] for item in attempts]


def retry_figures(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Return what base attempts, reflections and retries came to.

    ``reward``, ``success``, ``turns`` and ``truncated`` are of base attempts, the policy's own
    play. ``improve`` is the share of retries that earned more than what they repeat,
    ``improve_per_base`` counts the same over all base attempts. Means over nothing are 0.
    """
    kinds: dict[str, list[Trajectory]] = {name: [] for name in (*EXPLORE, *META)}
    for item in trajectories:
        kinds.setdefault(plain_kind(item), []).append(item)
    bases, retries, reflections = kinds["base"], kinds["retry"], kinds["reflection"]
    by_key = {item.key: item for item in bases}
    pairs = [(by_key[repeats(item)], item) for item in retries if repeats(item) in by_key]
    better = sum(retry.status == "ok" and retry.reward > base.reward for base, retry in pairs)
    tokens = {
        "base_tokens": sum(item.sampled_tokens for item in [*bases, *kinds["fill"]]),
        "retry_tokens": sum(_tokens_from(item, pivot_of(item)) for item in retries),
        "reflection_tokens": sum(item.sampled_tokens for item in reflections),
    }
    spent = sum(tokens.values())
    notes = [item.steps[0].notes for item in reflections]
    return {
        "reward": _mean([item.reward for item in bases]),
        "success": _mean([item.success for item in bases]),
        "turns": _mean([len(item.steps) for item in bases]),
        "truncated": _mean([item.truncated != "" for item in bases]),
        "retry_reward": _mean([item.reward for item in retries]),
        "retry_success": _mean([item.success for item in retries]),
        "retry_gain": _mean([retry.reward - base.reward for base, retry in pairs]),
        "improve": better / max(len(retries), 1),
        "improve_per_base": better / max(len(bases), 1),
        "base_attempts": float(len(bases)),
        "retries": float(len(retries)),
        "scripted_retries": float(sum(item.kind.startswith(SCRIPTED) for item in retries)),
        "pivot": _mean([pivot_of(item) for item in retries]),
        "replay_diverged": float(sum(_diverged(item) for item in retries)),
        "reflections": float(len(reflections)),
        "scripted_reflections": float(sum(item.kind.startswith(SCRIPTED) for item in reflections)),
        "reflection_failures": float(sum(bool(note["problem"]) for note in notes)),
        "reflection_perfect": float(sum(note["outcome"] == "success" for note in notes)),
        **{name: float(count) for name, count in tokens.items()},
        "sampled_tokens": float(spent),
        "tokens_per_retry": tokens["retry_tokens"] / max(len(retries), 1),
        "retry_token_share": (spent - tokens["base_tokens"]) / max(spent, 1),
    }


def loss(tokens: Tokens, options: Options) -> Loss:
    """Return OPMD's simple loss: no ratio, for retries were sampled under other prompts."""
    return opmd.loss(
        tokens,
        opmd.Options(tau=options.tau, beta=options.beta, aggregation=options.aggregation),
    )


def plain_kind(item: Trajectory) -> str:
    """Return a trajectory's kind, whoever reflected."""
    return item.kind.removeprefix(SCRIPTED)


def repeats(item: Trajectory) -> str:
    """Return the key of the base attempt that a retry repeats, or an empty string."""
    notes = (step.notes for step in item.steps)
    return next((str(note["retry_of"]) for note in notes if "retry_of" in note), "")


def _meta_rows(trajectories: Sequence[Trajectory], options: Options) -> list[TrainRow]:
    """Return the rows of what the program marked as worth imitating.

    Each is a group of its own with the reward 1, which the reweighting rule turns into
    ``success_advantage``.
    """
    advantage = 1.0
    if options.meta == "advantage" and options.success_advantage is not None:
        advantage = options.success_advantage
    return [
        row
        for item in trajectories
        if plain_kind(item) in META and item.status == "ok"
        for row in rows_of(item, advantage, pivot_of(item) if options.pivot_mask else 0)
    ]


def _with_own_mean(
    rows: list[TrainRow], meta: list[TrainRow], options: Options
) -> tuple[list[TrainRow], list[TrainRow]]:
    """Scale advantages so that the loss is the attempts' mean plus ``meta_weight`` times meta's.

    The meta term is not divided by 1 + tau.
    """
    if not meta:
        return rows, meta
    by_token = options.aggregation == "token_mean"
    both = [*rows, *meta]
    sizes: NDArray[np.float64] = np.array([row.mask.sum() if by_token else 1 for row in both])
    apart = np.arange(len(both)) >= len(rows)
    factors = separate_means(sizes, apart, options.meta_weight * (1 + options.tau))
    scaled = [
        replace(row, advantages=(row.advantages * factor).astype(np.float32))
        for row, factor in zip(both, factors, strict=True)
    ]
    return scaled[: len(rows)], scaled[len(rows) :]


def _tokens_from(item: Trajectory, first: int) -> int:
    return sum(len(step.sample.token_ids) for step in item.steps[first:] if step.sample is not None)


def _diverged(item: Trajectory) -> bool:
    first = pivot_of(item)
    return bool(item.steps) and first < int(item.steps[first].notes.get("planned", 0))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


R3L = Algorithm(
    program=reflect_retry, credit=credit, loss=loss, defaults=Options(**PRESETS["paper"])
)

R3L_TRINITY_FORK = R3L._replace(defaults=Options(**PRESETS["trinity_fork"]))

R3L_TRINITY_RELEASE = R3L._replace(defaults=Options(**PRESETS["trinity_release"]))
