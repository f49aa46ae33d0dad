"""From rewards to advantages: pure numpy, computed once over the whole batch before it is split.

A reward that is missing (NaN) takes part in no mean and no deviation and earns 0. A group whose
rewards are all equal, and a group of one, teach nothing: their advantages are 0 and ``used`` says
that they are to be left out of every denominator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Scale = Literal["group", "batch", "none", "leave_one_out"]
Baseline = Literal["mean", "log_mean_exp"]

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
    rewards: ArrayLike,
    groups: Sequence[str],
    *,
    scale: Scale = "group",
    epsilon: float = STD_EPSILON,
) -> Advantages:
    """Return A_i = (R_i - mean_g) / (std + epsilon) for rollouts in groups.

    Args:
        rewards: [N] floats; NaN where a reward is missing.
        groups: [N] the group each rollout belongs to, in any order.
        scale: divide by the deviation of the rollout's ``group`` (DeepSeekMath, eq. 3 in outcome
            supervision), by that of all rewards of the ``batch``, or by ``none`` (Dr. GRPO);
            ``leave_one_out`` is the reward against the mean of the group's others (RLOO).
        epsilon: added to a deviation.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    present = ~np.isnan(rewards)
    values = np.zeros_like(rewards)
    used = np.zeros_like(present)
    batch_deviation = _deviation(rewards[present])
    seen = usable = 0
    for members in members_of(rewards, groups):
        seen += 1
        group = rewards[members]
        if group.min() == group.max():
            continue
        usable += 1
        used[members] = True
        values[members] = group - group.mean()
        if scale == "group":
            values[members] /= _deviation(group) + epsilon
        elif scale == "batch":
            values[members] /= batch_deviation + epsilon
        elif scale == "leave_one_out":
            values[members] *= len(members) / (len(members) - 1)
    return Advantages(values, used, seen, usable)


def baseline_advantages(
    rewards: ArrayLike,
    groups: Sequence[str],
    *,
    baseline: Baseline = "mean",
    tau: float = 1.0,
    singletons: bool = False,
) -> Advantages:
    """Return A_i = R_i - b_g for rollouts in groups, without a division.

    Args:
        rewards: [N] floats; NaN where a reward is missing.
        groups: [N] the group each rollout belongs to, in any order.
        baseline: b is the group's mean or tau log mean exp(R / tau), which tends to the mean as
            tau grows and to the best reward as it falls (Trinity-RFT, arXiv 2505.17826, 2025).
        tau: above 0; only ``log_mean_exp`` has one.
        singletons: a group of one earns R (its b is 0) where it would earn 0.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    values = np.zeros_like(rewards)
    used = np.zeros(rewards.shape, np.bool_)
    seen = usable = 0
    for members in members_of(rewards, groups):
        seen += 1
        group = rewards[members]
        if len(members) == 1 and singletons:
            values[members] = group
        elif group.min() != group.max():
            values[members] = group - _baseline(group, baseline, tau)
        else:
            continue
        usable += 1
        used[members] = True
    return Advantages(values, used, seen, usable)


def reweighted(
    advantages: Advantages,
    rewards: ArrayLike,
    groups: Sequence[str],
    *,
    success_advantage: float,
    alpha: float,
    success_reward: float = 1.0,
) -> Advantages:
    """Return A' = success_advantage where R >= success_reward, alpha A where A > 0, else A.

    R3L's amplification of what went well; alpha never touches a success. A group in which all
    succeed is worth training on after this.

    Args:
        advantages: of the same rollouts, before.
        rewards: [N] floats; NaN where a reward is missing.
        groups: [N] the group each rollout belongs to.
        success_advantage: what every success earns, whatever its group did.
        alpha: factor on the advantages of partial successes.
        success_reward: the least reward that counts as success.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    values = np.where(advantages.values > 0, alpha * advantages.values, advantages.values)
    values[rewards >= success_reward] = success_advantage
    used = advantages.used | (values != 0)
    usable = sum(bool(used[members].any()) for members in members_of(rewards, groups))
    return Advantages(values, used, advantages.groups, usable)


def varied(rewards: ArrayLike, groups: Sequence[str]) -> NDArray[np.bool_]:
    """Return [N] bool, True for the rollouts of groups whose rewards are not all equal."""
    rewards = np.asarray(rewards, dtype=np.float64)
    found = np.zeros(rewards.shape, np.bool_)
    for members in members_of(rewards, groups):
        found[members] = rewards[members].min() != rewards[members].max()
    return found


def separate_means(
    sizes: ArrayLike, apart: NDArray[np.bool_], weight: float
) -> NDArray[np.float64]:
    """Return factors [N] that make one mean over all rows the sum of two means.

    With these on the rows' advantages, sum_i size_i f_i x_i / sum_i size_i is the mean of x over
    the rows that are not ``apart`` plus ``weight`` times its mean over those that are.

    Args:
        sizes: [N] what a row counts in the mean: its trained tokens, or 1.
        apart: [N] True for the rows with a mean of their own.
        weight: of that mean.
    """
    sizes = np.asarray(sizes, dtype=np.float64)
    total = sizes.sum()
    factors = np.zeros(sizes.shape)
    for rows, share in ((~apart, 1.0), (apart, weight)):
        if rows.any():
            factors[rows] = share * total / sizes[rows].sum()
    return factors


def overlong_penalty(lengths: ArrayLike, limit: int, cache: int) -> NDArray[np.float64]:
    """Return what DAPO adds to the rewards of long rollouts [N], between -1 and 0.

    0 up to ``limit - cache`` tokens, then falling in a straight line to -1 at ``limit``, and -1
    beyond (Yu et al., DAPO, 2025, eq. 13).
    """
    over = np.asarray(lengths, dtype=np.float64) - (limit - cache)
    return -np.clip(over / cache, 0.0, 1.0)


def members_of(rewards: ArrayLike, groups: Sequence[str]) -> Iterator[NDArray[np.intp]]:
    """Yield, group by group, the indices of its rollouts that have a reward, if there are any.

    Raises:
        ValueError: there are not as many rewards as group names.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    labels = np.asarray(groups, dtype=np.str_)
    if rewards.shape != labels.shape or rewards.ndim != 1:
        raise ValueError(f"{rewards.shape} rewards for {labels.shape} group names; need [N], [N]")
    present = ~np.isnan(rewards)
    for label in np.unique(labels):
        members = np.flatnonzero((labels == label) & present)
        if members.size:
            yield members


def _baseline(group: NDArray[np.float64], kind: Baseline, tau: float) -> float:
    if kind == "mean":
        return float(group.mean())
    best = group.max()
    return float(best + tau * np.log(np.mean(np.exp((group - best) / tau))))


def _deviation(values: NDArray[np.float64]) -> float:
    return float(np.std(values, ddof=1)) if values.size > 1 else 0.0
