"""What is said across rows: corrected p-values, who beats whom, rank intervals, aggregates.

Companion of ``stats``, which treats one row or one pair. Definitions follow Holm (1979), Agarwal et
al. 2021 ("Deep RL at the edge of the statistical precipice": IQM, performance profiles, probability
of improvement; equal to the rliable package on the same inputs) and the usual power formula. All
functions are pure; randomness comes from the replicates handed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special
from scipy import stats as scipy_stats

from pz_bench.stats import LEVEL, Difference, Floats, percentile_interval
from pz_envs.seeding import generator

ENOUGH_SEEDS = 5
"""Seeds with which an aggregate over seeds x tasks is no longer provisional."""

POWER = 0.8


class Standing(NamedTuple):
    """Where a row stands among its competitors.

    ``low`` and ``high`` are the 95 % interval of its rank (1 is best), ``group`` the number of its
    tie group: rows of one group cannot be told from the group's first row.
    """

    low: int
    high: int
    group: int


class Aggregate(NamedTuple):
    """An interquartile mean over seeds x tasks; ``provisional`` with fewer than five seeds."""

    iqm: float
    low: float
    high: float
    seeds: int
    provisional: bool


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p-values, in the order given.

    Adjusted p of the i-th smallest of m is the running maximum of (m - i + 1) p, at most 1. Equal
    to ``statsmodels.stats.multitest.multipletests(..., method="holm")``. Source: Holm 1979.
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    stepped = np.maximum.accumulate(factors * np.asarray(p_values, dtype=np.float64)[order])
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]


def probability_of_improvement(left: ArrayLike, right: ArrayLike) -> float:
    """Return P(X > Y) + P(X = Y) / 2 for one run of each on an instance drawn from the shared ones.

    The mean over instances of the Mann-Whitney statistic over pairs of seeds.

    Args:
        left: [S, I] seeds by instances, complete.
        right: [T, I] the same instances in the same order, complete.
    """
    above = np.asarray(left, dtype=np.float64)[:, None, :]
    below = np.asarray(right, dtype=np.float64)[None, :, :]
    return float(np.mean((above > below) + 0.5 * (above == below)))


def pass_at(outcomes: ArrayLike, k: int) -> float:
    """Return unbiased pass@k: the chance that one of k samples of an instance succeeds.

    Mean over instances of 1 - C(n - c, k) / C(n, k) with c successes in n samples, the estimator of
    Chen et al. 2021 (arXiv:2107.03374). With k = n it is the share of instances solved at all.

    Args:
        outcomes: [n, I] zeros and ones, samples (seeds) by instances, complete.
        k: samples that may be drawn, 1 to n.

    Raises:
        ValueError: k is not within 1 to n.
    """
    values = np.asarray(outcomes, dtype=np.float64)
    n = len(values)
    if not 1 <= k <= n:
        raise ValueError(f"pass@k of {n} samples needs k from 1 to {n}, got {k}")
    missed = n - values.sum(axis=0)
    return float(np.mean(1 - special.binom(missed, k) / special.binom(n, k)))


def detectable_difference(found: Difference, level: float = LEVEL) -> float | None:
    """Return the smallest true difference that such a comparison would find four times in five.

    (z of the level + z of the power) x standard error, the latter read off the width of the
    difference's interval; None without one.
    """
    if found.low is None or found.high is None:
        return None
    z = float(special.ndtri(0.5 + level / 2))
    return (z + float(special.ndtri(POWER))) * (found.high - found.low) / (2 * z)


def standings(replicates: Sequence[Floats]) -> list[Standing]:
    """Return the standing of each row from its bootstrap replicates, best mean first.

    Args:
        replicates: [rows] of [B] replicates of each row's mean, made on shared draws, so that
            replicate b of all rows saw the same instances.
    """
    values = np.stack(replicates)
    # Rank of row r in replicate b: 1 + rows strictly better; ties share the better rank.
    ranks = 1 + (values[None, :, :] > values[:, None, :] + 1e-12).sum(axis=1)
    lows = np.percentile(ranks, 50 * (1 - LEVEL), axis=1, method="lower")
    highs = np.percentile(ranks, 50 * (1 + LEVEL), axis=1, method="higher")
    groups = _groups(values)
    return [
        Standing(int(low), int(high), group)
        for low, high, group in zip(lows, highs, groups, strict=True)
    ]


def _groups(values: Floats) -> list[int]:
    """Return tie groups: a row opens a new one when its leader is better beyond the interval."""
    groups: list[int] = []
    leader = 0
    for row in range(len(values)):
        apart = percentile_interval(values[leader] - values[row]).low > 0
        if apart:
            leader = row
        groups.append(1 if row == 0 else groups[-1] + int(apart))
    return groups


def interquartile_mean(scores: ArrayLike) -> float:
    """Return the mean of the middle half of all values (25 % trimmed from each end)."""
    return float(scipy_stats.trim_mean(np.asarray(scores, dtype=np.float64), 0.25, axis=None))


def aggregate(tasks: Mapping[str, ArrayLike], resamples: int = 2_000) -> Aggregate:
    """Return the IQM over seeds x tasks with its stratified bootstrap interval.

    Args:
        tasks: environment -> [S] mean of each seed; tasks may differ in seeds.
        resamples: replicates; each draws seeds with replacement within every task.
    """
    columns = [np.asarray(values, dtype=np.float64) for values in tasks.values()]
    fewest = min(len(column) for column in columns)
    drawn = []
    for name, column in zip(tasks, columns, strict=True):
        random = generator("iqm", name, len(column), resamples)
        drawn.append(column[random.integers(0, len(column), (resamples, len(column)))])
    replicates = scipy_stats.trim_mean(np.concatenate(drawn, axis=1), 0.25, axis=1)
    low, high = percentile_interval(replicates)
    value = interquartile_mean(np.concatenate(columns))
    return Aggregate(value, low, high, fewest, fewest < ENOUGH_SEEDS)


def performance_profile(tasks: Mapping[str, ArrayLike], thresholds: ArrayLike) -> Floats:
    """Return the share of runs (seed x task) whose score is above each threshold: [T].

    The run-score distribution of Agarwal et al. 2021, section 4.2, each run counting once.
    """
    runs = np.concatenate([np.asarray(values, dtype=np.float64) for values in tasks.values()])
    limits = np.asarray(thresholds, dtype=np.float64)
    shares: Floats = (runs[None, :] > limits[:, None]).mean(axis=1)
    return shares
