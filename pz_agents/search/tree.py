"""The compiled tree: flat arrays for many roots at once, one call a wave of simulations.

A tree's nodes lie in ``nodes_per_tree`` slots, its root first; the edges of all nodes lie one after
another in growing pool, so that no node has a limit on its actions. A node without actions is a
leaf for ever: passing it again backs its value up again, unless the model closed it. All kernels
stay in this one file, because numba's cache on disk knows of changes in a kernel's own file only.
Compiled at the first call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from pz_envs.errors import require

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Records = NDArray[np.void]

PUCT, LIGHTZERO, GUMBEL = 0, 1, 2
PRIOR, Q, VISITS, SHARE = 0, 1, 2, 3  # what a node has of each edge; SHARE is prior / (1 + visits)
MISMATCH, BAD_LOGITS = -(2**40), -(2**41)

NODE = np.dtype(
    [
        ("edges", np.int64),  # where its edges begin in the pool
        ("count", np.int64),  # how many actions it has
        ("parent", np.int64),  # -1 for a root
        ("action", np.int64),  # the parent's action that leads to it
        ("seen", np.int64),  # how many of its actions were visited
        ("closed", np.int64),  # how many of its actions lead to closed nodes only
        ("is_open", np.int64),  # its edges are in order (1), or only logits are there (0)
        ("reward", np.float64),
        ("discount", np.float64),
        ("value", np.float64),  # as the model gave it
        ("visits", np.float64),  # its own expansion counts as one
        ("value_sum", np.float64),
        ("q_sum", np.float64),  # over the actions visited
    ]
)
TREE = np.dtype(
    [("size", np.int64), ("random", np.uint64), ("low", np.float64), ("high", np.float64)]
)

_TIE = 1e-6
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

_Function = TypeVar("_Function", bound=Callable[..., object])


def _compiled(function: _Function) -> _Function:
    numba = require("numba", "pz-agents[search]")
    return cast(_Function, numba.njit(cache=True, error_model="numpy")(function))


def _compiled_finite(function: _Function) -> _Function:
    """Compile for numbers that are known to be finite, which lets minima and maxima be vectors."""
    numba = require("numba", "pz-agents[search]")
    options = {"cache": True, "error_model": "numpy", "fastmath": {"nnan", "nsz"}}
    return cast(_Function, numba.njit(**options)(function))


@_compiled
def _draw(tree: np.void, below: int) -> int:
    """Return a number below ``below`` from the tree's own splitmix64 stream."""
    tree["random"] += _GOLDEN
    bits = tree["random"]
    bits = (bits ^ (bits >> _SHIFTS[0])) * _MIX_1
    bits = (bits ^ (bits >> _SHIFTS[1])) * _MIX_2
    bits = bits ^ (bits >> _SHIFTS[2])
    return int(bits >> np.uint64(33)) % below


@_compiled
def _of(node: np.void, pool: Floats, what: int) -> Floats:
    """Return the node's PRIOR, Q, VISITS or SHARE of all its edges; a node's four lie together."""
    begin = 4 * node["edges"] + what * node["count"]
    return pool[begin : begin + node["count"]]


@_compiled_finite
def _highest(values: Floats) -> float:
    top: float = values[0]
    for number in range(len(values)):
        top = max(top, values[number])
    return top


@_compiled
def _open(node: np.void, pool: Floats, child: Integers) -> bool:
    """Put a node's edges in order when it is first descended from; False if its logits are not."""
    prior, share = _of(node, pool, PRIOR), _of(node, pool, SHARE)
    top = _highest(prior)
    total = 0.0
    for action in range(len(prior)):
        prior[action] = math.exp(prior[action] - top)
        total += prior[action]
    for action in range(len(prior)):
        prior[action] /= total
        share[action] = prior[action]
    _of(node, pool, Q)[:] = 0.0
    _of(node, pool, VISITS)[:] = 0.0
    child[node["edges"] : node["edges"] + node["count"]] = -1
    node["is_open"] = 1
    return math.isfinite(total)


@_compiled_finite
def _puct(
    node: np.void,
    tree: np.void,
    pool: Floats,
    factor: Floats,
    floor: float,
    scores: Floats,
    random_ties: bool,
) -> int:
    """Return the action with the highest score; see ``SearchSettings.rule``."""
    q, visits, share = _of(node, pool, Q), _of(node, pool, VISITS), _of(node, pool, SHARE)
    count, low = len(q), tree["low"]
    scale = 1.0 / max(tree["high"] - low, floor)
    unseen = (node["value"] + node["q_sum"]) / (1.0 + node["seen"])
    weight = factor[int(node["visits"]) - 1]
    for action in range(count):
        estimate = q[action] if visits[action] > 0.0 else unseen
        estimate = min(max((estimate - low) * scale, 0.0), 1.0)
        scores[action] = estimate + weight * share[action]
    highest = _highest(scores[:count])
    if not random_ties:
        best = 0
        while scores[best] != highest:
            best += 1
        return best
    ties = 0
    for action in range(count):
        ties += scores[action] >= highest - _TIE
    remaining = _draw(tree, ties)
    best = -1
    while remaining >= 0:
        best += 1
        remaining -= scores[best] >= highest - _TIE
    return best


@_compiled
def _completed(node: np.void, pool: Floats, scores: Floats) -> None:
    """Write sigma(completed q) of a node's actions into ``scores`` (mctx's ``qtransforms.py``).

    Unvisited actions get the mixed value (v + N sum_seen(p q) / sum_seen(p)) / (1 + N); the result
    is scaled to 0..1 and times 0.1 (50 + the most visits).
    """
    prior, q, visits = _of(node, pool, PRIOR), _of(node, pool, Q), _of(node, pool, VISITS)
    mass, weighted, total, most = 0.0, 0.0, 0.0, 0.0
    for action in range(len(q)):
        if visits[action] > 0.0:
            share = max(prior[action], 1e-300)
            mass += share
            weighted += share * q[action]
            total += visits[action]
            most = max(most, visits[action])
    mixed = node["value"]
    if mass > 0.0:
        mixed = (node["value"] + total * weighted / mass) / (1.0 + total)
    low, high = math.inf, -math.inf
    for action in range(len(q)):
        scores[action] = q[action] if visits[action] > 0.0 else mixed
        low, high = min(low, scores[action]), max(high, scores[action])
    scale = 0.1 * (50.0 + most) / max(high - low, 1e-8)
    for action in range(len(q)):
        scores[action] = (scores[action] - low) * scale


@_compiled
def _improve(node: np.void, pool: Floats, scores: Floats) -> None:
    """Turn sigma(completed q) in ``scores`` into the policy softmax(log prior + sigma)."""
    prior = _of(node, pool, PRIOR)
    top = _highest(scores[: len(prior)])
    total = 0.0
    for action in range(len(prior)):
        scores[action] = prior[action] * math.exp(scores[action] - top)
        total += scores[action]
    for action in range(len(prior)):
        scores[action] /= total


@_compiled
def _gumbel_inside(node: np.void, pool: Floats, scores: Floats) -> int:
    """Return the action whose share of visits lags most behind the improved policy."""
    _completed(node, pool, scores)
    _improve(node, pool, scores)
    visits, best, highest = _of(node, pool, VISITS), 0, -math.inf
    for action in range(len(visits)):
        lag = scores[action] - visits[action] / node["visits"]
        if lag > highest:
            best, highest = action, lag
    return best


@_compiled
def _gumbel_root(
    node: np.void, pool: Floats, perturbed: Floats, scores: Floats, considered: float
) -> int:
    """Return the best of the actions that were visited ``considered`` times."""
    _completed(node, pool, scores)
    visits, first, best, highest = _of(node, pool, VISITS), node["edges"], -1, -math.inf
    for action in range(len(visits)):
        score = perturbed[first + action] + scores[action]
        if visits[action] == considered and (best < 0 or score > highest):
            best, highest = action, score
    return max(best, 0)


@_compiled
def _back_up(nodes: Records, tree: np.void, at: int, pool: Floats, value: float) -> None:
    """Add a leaf's value to it and to every node above, discounted and with rewards."""
    node = nodes[at]
    node["visits"] += 1.0
    node["value_sum"] += value
    while node["parent"] >= 0:
        parent, action = nodes[node["parent"]], node["action"]
        prior, share = _of(parent, pool, PRIOR), _of(parent, pool, SHARE)
        q, visits = _of(parent, pool, Q), _of(parent, pool, VISITS)
        value = node["reward"] + node["discount"] * value
        estimate = node["reward"] + node["discount"] * (node["value_sum"] / node["visits"])
        if visits[action] == 0.0:
            parent["seen"] += 1
        parent["q_sum"] += estimate - q[action]  # an unvisited action's is 0
        q[action] = estimate
        visits[action] += 1.0
        share[action] = prior[action] / (1.0 + visits[action])
        tree["low"] = min(tree["low"], estimate)
        tree["high"] = max(tree["high"], estimate)
        parent["visits"] += 1.0
        parent["value_sum"] += value
        node = parent


@_compiled
def _close(nodes: Records, at: int, pool: Floats) -> None:
    """Keep PUCT from a node, and from those above that have no other actions left."""
    node = nodes[at]
    while node["parent"] >= 0:
        parent = nodes[node["parent"]]
        _of(parent, pool, SHARE)[node["action"]] = -math.inf
        parent["closed"] += 1
        if parent["closed"] < parent["count"]:
            break
        node = parent


@_compiled
def plant(
    nodes: Records,
    trees: Records,
    per_tree: int,
    pool: Floats,
    child: Integers,
    prior: Floats,
    counts: Integers,
    values: Floats,
) -> None:
    """Begin all trees with their roots."""
    used = 0
    for number in range(len(counts)):
        tree, root = trees[number], nodes[number * per_tree]
        tree["size"], tree["low"], tree["high"] = 1, values[number], values[number]
        root["edges"], root["count"], root["parent"], root["action"] = used, counts[number], -1, -1
        root["seen"], root["closed"], root["is_open"], root["q_sum"] = 0, 0, 1, 0.0
        root["reward"], root["discount"], root["value"] = 0.0, 1.0, values[number]
        root["visits"], root["value_sum"] = 1.0, values[number]
        _of(root, pool, PRIOR)[:] = prior[used : used + counts[number]]
        _of(root, pool, SHARE)[:] = prior[used : used + counts[number]]
        _of(root, pool, Q)[:] = 0.0
        _of(root, pool, VISITS)[:] = 0.0
        used += counts[number]
    child[:used] = -1


@_compiled
def _attach(
    nodes: Records,
    trees: Records,
    per_tree: int,
    pool: Floats,
    child: Integers,
    used: int,
    leaves: Integers,
    reward: Floats,
    discount: Floats,
    value: Floats,
    logits: Floats,
    counts: Integers,
) -> int:
    """Give the leaves what the model said of them and back their values up.

    Returns 0, MISMATCH where counts and logits are at odds, or -1 - i where leaf i was given a
    number that is not finite.
    """
    total = 0
    for number in range(len(counts)):
        total += max(counts[number], 0)
        if counts[number] < -1:
            return MISMATCH
    if total != len(logits):
        return MISMATCH
    taken = 0
    for number in range(len(counts)):
        at = leaves[number]
        node = nodes[at]
        node["edges"], node["count"] = used, max(counts[number], 0)
        node["reward"], node["discount"] = reward[number], discount[number]
        node["value"], node["visits"], node["value_sum"] = value[number], 0.0, 0.0
        node["seen"], node["closed"], node["is_open"], node["q_sum"] = 0, 0, 0, 0.0
        if not math.isfinite(reward[number] + discount[number] + value[number]):
            return -1 - number
        prior = _of(node, pool, PRIOR)
        for action in range(len(prior)):
            prior[action] = logits[taken + action]
        taken += node["count"]
        used += node["count"]
        _back_up(nodes, trees[at // per_tree], at, pool, value[number])
        if counts[number] < 0:
            _close(nodes, at, pool)
    return 0


@_compiled
def advance(
    nodes: Records,
    trees: Records,
    n_trees: int,
    per_tree: int,
    pool: Floats,
    child: Integers,
    used: int,
    found: int,
    leaves: Integers,
    reward: Floats,
    discount: Floats,
    value: Floats,
    logits: Floats,
    counts: Integers,
    rule: int,
    factor: Floats,
    floor: float,
    perturbed: Floats,
    considered: Floats,
    scores: Floats,
    descend: bool,
) -> int:
    """Take in what the model said of the last wave's leaves, then descend every tree to a new one.

    leaves: [4, B] rows of tree, parent, action and new node; ``found`` of them are the last wave's.
    Where a descent ends at a node without actions, its value is backed up at once and the tree has
    no new leaf. Returns how many new leaves there are, BAD_LOGITS, or ``_attach``'s complaint.
    """
    problem = _attach(
        nodes,
        trees,
        per_tree,
        pool,
        child,
        used,
        leaves[3, :found],
        reward,
        discount,
        value,
        logits,
        counts,
    )
    if problem < 0 or not descend:
        return problem
    found = 0
    for number in range(n_trees):
        at = number * per_tree
        tree = trees[number]
        if nodes[at]["closed"] == nodes[at]["count"]:
            continue
        while nodes[at]["count"] > 0:
            node = nodes[at]
            if node["is_open"] == 0 and not _open(node, pool, child):
                return BAD_LOGITS
            if rule != GUMBEL:
                action = _puct(node, tree, pool, factor, floor, scores, rule == LIGHTZERO)
            elif node["parent"] < 0:
                row = min(len(considered) - 1, node["count"])
                due = considered[row, int(node["visits"]) - 1]
                action = _gumbel_root(node, pool, perturbed, scores, due)
            else:
                action = _gumbel_inside(node, pool, scores)
            edge = node["edges"] + action
            if child[edge] < 0:
                new = number * per_tree + tree["size"]
                tree["size"] += 1
                child[edge] = new
                nodes[new]["parent"], nodes[new]["action"] = at, action
                leaves[0, found], leaves[1, found] = number, at
                leaves[2, found], leaves[3, found] = action, new
                found += 1
                at = -1
                break
            at = child[edge]
        if at >= 0:
            _back_up(nodes, tree, at, pool, nodes[at]["value"])
    return found


@_compiled
def conclude(
    nodes: Records,
    per_tree: int,
    pool: Floats,
    rule: int,
    perturbed: Floats,
    scores: Floats,
    found: Floats,
    chosen: Integers,
) -> None:
    """Write every root's prior, q, visits and policy, and its action (-1 where there is none).

    The action has the most visits, ties going to the higher q and then to the higher prior; by the
    Gumbel rule it is the best by perturbed score among those with the most visits.
    found: [4, E] rows of PRIOR, Q, VISITS and, in place of SHARE, the policy.
    """
    for number in range(len(chosen)):
        root = nodes[number * per_tree]
        first, count = root["edges"], root["count"]
        prior, q, visits = _of(root, pool, PRIOR), _of(root, pool, Q), _of(root, pool, VISITS)
        best = 0
        for action in range(count):
            edge = first + action
            found[PRIOR, edge], found[Q, edge] = prior[action], q[action]
            found[VISITS, edge] = visits[action]
            done = root["visits"] - 1.0
            found[SHARE, edge] = visits[action] / done if done > 0.0 else prior[action]
            if visits[action] < visits[best]:
                continue
            ahead = visits[action] > visits[best] or q[action] > q[best]
            if ahead or (q[action] == q[best] and prior[action] > prior[best]):
                best = action
        chosen[number] = best if count > 0 else -1
        if rule == GUMBEL and count > 0:
            chosen[number] = _gumbel_root(root, pool, perturbed, scores, visits[best])
            _completed(root, pool, scores)
            _improve(root, pool, scores)
            found[SHARE, first : first + count] = scores[:count]
