"""Intervals, differences and p-values for seeds x instances; pure functions on arrays.

Every cell of one environment plays the same instances, so the results of one row of a table are a
matrix: one line a seed, one column an instance. Seeds and instances are two crossed sources of
chance, and an interval that ignores either is too narrow: in simulation (``test_stats.py``),
resampling instances anew for every seed covers the truth 67 to 88 times in 100 instead of 95.
Everything here takes both into account. All randomness comes from fixed streams: the same numbers
give the same interval.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from pz_envs.seeding import generator

LEVEL = 0.95
RESAMPLES = 10_000
_EXACT_FLIPS = 13
_TIE = 1e-12

Floats = NDArray[np.float64]
Counts = NDArray[np.float32]


class Interval(NamedTuple):
    """The two ends of a confidence interval."""

    low: float
    high: float


class Difference(NamedTuple):
    """A paired difference of means; ``p`` is two-sided.

    ``low`` and ``high`` are None where nothing varied, so that nothing says how sure it is.
    """

    mean: float
    low: float | None
    high: float | None
    p: float


def wilson(successes: float, trials: float, level: float = LEVEL) -> Interval:
    """Return the Wilson score interval of a proportion.

    ``trials`` may be a fraction, as an effective number of trials is. Source: E. B. Wilson (1927),
    JASA 22; equal to ``scipy.stats.binomtest(...).proportion_ci(method="wilson")``.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not trials > 0 or not 0 <= successes <= trials * (1 + _TIE):
        raise ValueError(f"wilson needs 0 <= successes <= trials > 0, got {successes}/{trials}")
    z = float(special.ndtri(0.5 + level / 2))
    rate = min(1.0, successes / trials)
    centre = rate + z * z / (2 * trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low = 0.0 if rate == 0 else max(0.0, (centre - half) / scale)
    high = 1.0 if rate == 1 else min(1.0, (centre + half) / scale)
    return Interval(low, high)


def effective_trials(outcomes: ArrayLike) -> float:
    """Return how many independent trials the outcomes of shared instances are worth.

    The variance of the overall rate is estimated three ways: all outcomes independent, instances
    as clusters, seeds as clusters; the largest counts. The result is trials / design effect
    (Kish, Survey Sampling, 1965; Korn and Graubard 1998 put it into the binomial interval).
    Outcomes that are all equal cannot show how far seeds agree, so seeds count as copies then: the
    trials are the instances (or the seeds, of a single instance).

    Args:
        outcomes: [S, I] zeros and ones, seeds by instances; NaN where none is known.
    """
    values, known = _matrix(outcomes)
    trials = float(known.sum())
    rate = float(np.nansum(values)) / trials
    independent = rate * (1 - rate) / trials
    if independent <= 0:
        return float(units(values))
    residual = np.where(known, values - rate, 0.0)
    clustered = max(_cluster_variance(residual, axis) for axis in (0, 1)) / trials**2
    return trials * independent / max(independent, clustered)


def units(values: ArrayLike) -> int:
    """Return how many independent outcomes [S, I] values hold if seeds only repeat each other.

    The number of instances; of a single instance, the number of its values.
    """
    values, known = _matrix(values)
    return int(known.any(axis=0).sum() if values.shape[1] > 1 else known.sum())


def bootstrap_means(values: ArrayLike, stream: str = "", resamples: int = RESAMPLES) -> Floats:
    """Return bootstrap replicates of the mean over seeds and instances.

    Each replicate draws seeds with replacement, then instances with replacement, the drawn
    instances being the same for all drawn seeds, as the instances that were played are (Owen 2007,
    "The pigeonhole bootstrap", Annals of Applied Statistics 1). One seed: only instances vary; one
    instance: only seeds; one of each: every replicate is the value.

    Args:
        values: [S, I] seeds by instances; NaN where an episode is missing.
        stream: names the random stream; matrices of one shape and stream share their draws.
        resamples: how many replicates.

    Returns:
        [resamples] means.
    """
    values, known = _matrix(values)
    seeds, instances = _draws(*values.shape, stream, resamples)
    total = _weighted(np.where(known, values, 0.0), seeds, instances)
    if known.all():
        return total / values.size
    weight = _weighted(known.astype(np.float64), seeds, instances)
    return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)


def percentile_interval(replicates: ArrayLike, level: float = LEVEL) -> Interval:
    """Return the percentile interval of bootstrap replicates (linear interpolation, no NaN)."""
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(np.asarray(replicates, dtype=np.float64), [tail, 100 - tail])
    return Interval(float(low), float(high))


def bootstrap_interval(
    values: ArrayLike, level: float = LEVEL, stream: str = "", resamples: int = RESAMPLES
) -> Interval:
    """Return the hierarchical bootstrap interval of the mean of ``values``: [S, I].

    The percentiles of the replicates, these stretched about the mean as Student's interval is wider
    than the normal one (``stretched_means``). With a single seed or two it is conditional on them:
    what would change with other seeds can only be seen in several.
    """
    return percentile_interval(stretched_means(values, stream, resamples, level), level)


def stretched_means(
    values: ArrayLike, stream: str = "", resamples: int = RESAMPLES, level: float = LEVEL
) -> Floats:
    """Return ``bootstrap_means``, their deviations from the mean stretched for few instances.

    With n instances a bootstrap's variance is (n - 1) / n of the unbiased one, and its percentiles
    are the normal distribution's where Student's belong: deviations are multiplied by
    sqrt(n / (n - 1)) t(n - 1) / z. The factors are those of the expanded percentile interval
    (Hesterberg 2015, The American Statistician 69), which moves the level instead and so ends at
    the smallest and largest value: with 3 instances it still covers 75 times in 100.
    """
    means = bootstrap_means(values, stream, resamples)
    n = units(values)
    if n < 2:
        return means
    tail = 0.5 + level / 2
    factor = math.sqrt(n / (n - 1)) * float(special.stdtrit(n - 1, tail) / special.ndtri(tail))
    centre = float(np.nanmean(np.asarray(values, dtype=np.float64)))
    stretched: Floats = centre + factor * (means - centre)
    return stretched


def combined_interval(parts: Sequence[tuple[float, float, Interval]]) -> Interval:
    """Return the interval of a weighted sum of independent means that have intervals of their own.

    The distances to each end are added in squares (Zou and Donner 2008, Statistics in Medicine 27),
    so that a part counts as its own interval says, even one whose values are all equal.

    Args:
        parts: (weight, mean, interval) of each, weights above 0.
    """
    mean = sum(weight * middle for weight, middle, _ in parts)
    below = sum((weight * (middle - ends.low)) ** 2 for weight, middle, ends in parts)
    above = sum((weight * (ends.high - middle)) ** 2 for weight, middle, ends in parts)
    return Interval(mean - math.sqrt(below), mean + math.sqrt(above))


def paired_difference(
    left: ArrayLike, right: ArrayLike, level: float = LEVEL, resamples: int = RESAMPLES
) -> Difference:
    """Return mean(left) - mean(right) on shared instances, with its interval and p-value.

    The interval is Student's around the difference; there is none where nothing varied. Its
    variance adds three mean squares: of the differences per instance, in which how hard an instance
    is cancels, and, where a side has several seeds, of what its seeds differ by beyond what their
    instances explain (together never below 0; seed 0 of one side has nothing to do with seed 0 of
    the other). Degrees of freedom are Satterthwaite's (1946, Biometrics Bulletin 2). A bootstrap of
    seeds and instances counts the residual up to three times (Owen 2007) and covers 97 to 100 %
    where seeds differ little. ``p`` is ``sign_flip_p`` of the differences per instance.

    Args:
        left: [S, I] seeds by instances, complete.
        right: [T, I] the same instances in the same order, complete.
        level: of the interval.
        resamples: random sign vectors of the p-value.

    Raises:
        ValueError: the instances differ in number, or a value is missing.
    """
    left, known_left = _matrix(left)
    right, known_right = _matrix(right)
    if left.shape[1] != right.shape[1] or not (known_left.all() and known_right.all()):
        raise ValueError(
            f"a paired difference needs complete values on the same instances, got shapes "
            f"{left.shape} and {right.shape}"
        )
    differences = left.mean(axis=0) - right.mean(axis=0)
    mean = float(differences.mean())
    half = _paired_half_width(left, right, level)
    p = sign_flip_p(differences, resamples)
    if half <= _TIE:
        return Difference(mean, None, None, p)
    return Difference(mean, mean - half, mean + half, p)


def _paired_half_width(left: Floats, right: Floats, level: float) -> float:
    instances = left.shape[1]
    variance, squares = 0.0, 0.0
    if instances > 1:
        differences = left.mean(axis=0) - right.mean(axis=0)
        variance = float(differences.var(ddof=1)) / instances
        squares = variance**2 / (instances - 1)
    sides = [_seed_variance(side) for side in (left, right) if len(side) > 1]
    extra = sum(side.beyond for side in sides)
    if extra > 0:
        variance += extra
        squares += sum(side.whole**2 / side.freedom for side in sides)
    if variance <= 0 or squares <= 0:
        return 0.0
    return float(special.stdtrit(variance**2 / squares, 0.5 + level / 2)) * math.sqrt(variance)


class _SeedVariance(NamedTuple):
    """Variance of a mean by its seeds: all of it, and what instances do not explain (signed)."""

    whole: float
    beyond: float
    freedom: int


def _seed_variance(values: Floats) -> _SeedVariance:
    """Return how much the seeds of one side [S, I], S > 1, make its mean vary."""
    seeds, instances = values.shape
    means = values.mean(axis=1)
    whole = float(means.var(ddof=1)) / seeds
    residual = values - means[:, None] - values.mean(axis=0)[None, :] + values.mean()
    freedom = (seeds - 1) * max(1, instances - 1)
    explained = float(np.square(residual).sum()) / freedom / values.size
    return _SeedVariance(whole, whole - explained, seeds - 1)


def sign_flip_p(differences: ArrayLike, resamples: int = RESAMPLES) -> float:
    """Return the two-sided sign-flip permutation p-value of mean(differences) = 0.

    Exact over all sign vectors up to 13 instances, otherwise (1 + hits) / (1 + draws), which is
    never 0 (Phipson and Smyth 2010). Equal to ``scipy.stats.permutation_test`` with
    ``permutation_type="samples"``. It asks about instances, given the seeds that were run.

    Args:
        differences: [I] differences, one an instance, each a mean over seeds.
        resamples: how many random sign vectors when they are not all tried.
    """
    values = np.asarray(differences, dtype=np.float64)
    observed = abs(values.sum()) - _TIE * max(1.0, float(np.abs(values).sum()))
    if len(values) <= _EXACT_FLIPS:
        return float(np.mean(np.abs(_all_signs(len(values)) @ values) >= observed))
    hits = np.count_nonzero(np.abs(_random_signs(len(values), resamples) @ values) >= observed)
    return float(1 + hits) / (1 + resamples)


def macro_replicates(
    families: Mapping[str, Mapping[str, ArrayLike]], resamples: int = RESAMPLES
) -> Floats:
    """Return [resamples] stretched replicates of the mean over families of each family's mean.

    A family with 57 games counts as much as one with a single environment. Families and
    environments are the suite and are not resampled; seeds and instances are, independently in
    each environment, on the stream named by it. Rows with as many seeds and the same instances
    share their draws, so that replicate *b* of one can be compared with replicate *b* of another.
    """
    replicates = [
        np.mean(
            [stretched_means(values, name, resamples) for name, values in environments.items()],
            axis=0,
        )
        for environments in families.values()
    ]
    total: Floats = np.mean(replicates, axis=0)
    return total


def stack(rows: Sequence[Mapping[int, float]]) -> Floats:
    """Return [S, I] of one mapping instance -> value a seed, NaN where a seed lacks one.

    Columns are in order of the instance's key, whatever the order of the mappings.
    """
    instances = sorted(set().union(*rows))
    return np.array([[row.get(key, np.nan) for key in instances] for row in rows], dtype=np.float64)


def _matrix(values: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2:
        raise ValueError(f"expected seeds x instances, got an array of shape {matrix.shape}")
    known = ~np.isnan(matrix)
    if not known.any():
        raise ValueError(f"expected at least one value, got an array of shape {matrix.shape}")
    return matrix, known


def _cluster_variance(residual: Floats, axis: int) -> float:
    """Return the variance of the total when the sums along ``axis`` are the independent units.

    residual: [S, I] deviations from the overall mean; one unit says nothing of variance: 0.
    """
    sums = residual.sum(axis=axis)
    if len(sums) < 2:
        return 0.0
    return float(np.square(sums).sum()) * len(sums) / (len(sums) - 1)


def _weighted(values: Floats, seeds: Counts, instances: Counts) -> Floats:
    """Return [B] sums of values [S, I] weighted by draws of seeds [B, S] and instances [B, I]."""
    total: Floats = np.einsum("bi,bi->b", seeds @ values, instances)
    return total


# A leaderboard asks row by row for the same environments' draws: 64 hold those of a large suite.
@functools.lru_cache(maxsize=64)
def _draws(seeds: int, instances: int, stream: str, resamples: int) -> tuple[Counts, Counts]:
    """Return how often each seed [B, S] and each instance [B, I] is drawn in each replicate."""
    random = generator("bootstrap", stream, seeds, instances, resamples)
    return _counts(random, seeds, resamples), _counts(random, instances, resamples)


def _counts(random: np.random.Generator, size: int, resamples: int) -> Counts:
    drawn = random.integers(0, size, (resamples, size)) + np.arange(resamples)[:, None] * size
    counted = np.bincount(drawn.ravel(), minlength=resamples * size)
    return counted.reshape(resamples, size).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _all_signs(size: int) -> Floats:
    return np.array(list(itertools.product((1.0, -1.0), repeat=size)), dtype=np.float64)


@functools.lru_cache(maxsize=2)
def _random_signs(size: int, resamples: int) -> Floats:
    return generator("sign flips", size, resamples).choice([-1.0, 1.0], (resamples, size))
