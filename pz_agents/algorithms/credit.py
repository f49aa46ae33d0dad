"""From rewards to advantages: pure numpy, computed once over the whole batch before it is split.

A reward that is missing (NaN) takes part in no mean and no deviation and earns 0. A group whose
rewards are all equal, and a group of one, teach nothing: their advantages are 0 and ``used`` says
that they are to be left out of every denominator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Scale = Literal["group", "batch", "none"]

STD_EPSILON = 1e-4
"""Added to a standard deviation (ddof 1) before dividing by it; TRL's value."""


@dataclass(frozen=True, slots=True, eq=False)
class Advantages:
    """One advantage a rollout.

    values: [N]. used: [N] bool, False for missing rewards and for groups without variance.
    groups: number of groups with at least one reward. usable: of these, how many have variance.
    """

    values: NDArray[np.float64]
    used: NDArray[np.bool_]
    groups: int
    usable: int


def group_advantages(
    rewards: ArrayLike, groups: Sequence[str], *, scale: Scale = "group"
) -> Advantages:
    """Return A_i = (R_i - mean_g) / (std + 1e-4) for rollouts in groups.

    Args:
        rewards: [N] floats; NaN where a reward is missing.
        groups: [N] the group each rollout belongs to, in any order.
        scale: divide by the deviation of the rollout's ``group`` (DeepSeekMath, eq. 3 in outcome
            supervision), by that of all rewards of the ``batch``, or by ``none`` (Dr. GRPO).
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    labels = np.asarray(groups, dtype=np.str_)
    if rewards.shape != labels.shape or rewards.ndim != 1:
        raise ValueError(f"{rewards.shape} rewards for {labels.shape} group names; need [N], [N]")
    present = ~np.isnan(rewards)
    values = np.zeros_like(rewards)
    used = np.zeros_like(present)
    batch_deviation = _deviation(rewards[present])
    seen = usable = 0
    for label in np.unique(labels):
        members = np.flatnonzero((labels == label) & present)
        if not members.size:
            continue
        seen += 1
        group = rewards[members]
        if group.min() == group.max():
            continue
        usable += 1
        used[members] = True
        values[members] = group - group.mean()
        if scale == "group":
            values[members] /= _deviation(group) + STD_EPSILON
        elif scale == "batch":
            values[members] /= batch_deviation + STD_EPSILON
    return Advantages(values, used, seen, usable)


def _deviation(values: NDArray[np.float64]) -> float:
    return float(np.std(values, ddof=1)) if values.size > 1 else 0.0
