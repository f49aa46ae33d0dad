"""Statistics against hand-computed values, scipy, and the truth in simulations."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from pz_bench import stats

FEW = [3, 5, 8, 20, 64]
"""Instances with which small suites are played."""


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (1, 1), (3, 10), (127, 128), (50, 384)])
def test_wilson_equals_scipy(successes, trials, level):
    expected = scipy.stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
    assert stats.wilson(successes, trials, level) == pytest.approx(tuple(expected), abs=1e-12)


def test_wilson_by_hand():
    # at one half the interval is 1/2 ± z / (2 sqrt(n + z²)) = .5 ± 1.959964 / (2 sqrt(7.841459))
    low, high = stats.wilson(2, 4)
    assert (low, high) == pytest.approx((0.150039, 0.849961), abs=1e-6)


@given(st.integers(0, 60), st.integers(1, 60))
def test_wilson_holds_the_rate_and_stays_between_zero_and_one(successes, trials):
    successes = min(successes, trials)
    low, high = stats.wilson(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_impossible_counts(successes, trials):
    with pytest.raises(ValueError, match="wilson needs"):
        stats.wilson(successes, trials)


def test_identical_seeds_are_worth_their_instances_only():
    once = np.array([[1.0, 0, 1, 0, 1, 1, 0, 0]])
    assert stats.effective_trials(once) == pytest.approx(8 * 7 / 8)
    # three copies: variance of the mean of 8 clusters, p = 1/2: trials = .25 / (.25 / 7) = 7
    assert stats.effective_trials(np.repeat(once, 3, axis=0)) == pytest.approx(7.0)


@pytest.mark.parametrize(("shape", "trials"), [((3, 8), 8), ((1, 8), 8), ((3, 1), 3), ((1, 1), 1)])
def test_equal_outcomes_are_worth_their_instances_as_seeds_may_be_copies(shape, trials):
    assert stats.effective_trials(np.ones(shape)) == trials
    assert stats.effective_trials(np.zeros(shape)) == trials


def test_missing_outcomes_are_no_trials():
    outcomes = np.ones((2, 4))
    outcomes[1, 3] = np.nan
    assert stats.effective_trials(outcomes) == 4
    outcomes[0, 3] = np.nan
    assert stats.effective_trials(outcomes) == 3


def test_one_seed_is_the_ordinary_bootstrap_of_scipy():
    values = np.random.default_rng(3).gamma(2.0, size=60)
    own = stats.bootstrap_interval(values[None, :])
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(0)
    )
    width = own.high - own.low
    assert own.low == pytest.approx(theirs.confidence_interval.low, abs=0.04 * width)
    assert own.high == pytest.approx(theirs.confidence_interval.high, abs=0.04 * width)


def test_replicates_have_the_crossed_design_s_variance():
    # Seeds and instances only: m = a_s + b_i, so the bootstrap variance of the mean is
    # var(a)/S + var(b)/I with variances over n (Owen 2007), exactly.
    seeds, instances = np.array([0.0, 1.0, 5.0]), np.arange(12.0)
    replicates = stats.bootstrap_means(seeds[:, None] + instances[None, :])
    expected = seeds.var() / 3 + instances.var() / 12
    assert replicates.var() == pytest.approx(expected, rel=0.05)
    assert replicates.mean() == pytest.approx(2.0 + 5.5, abs=0.1)


def test_the_same_values_give_the_same_interval_and_another_stream_another():
    values = np.random.default_rng(0).random((3, 20))
    first = stats.bootstrap_interval(values, stream="pz/Zork1-v0")
    stats._draws.cache_clear()
    assert stats.bootstrap_interval(values, stream="pz/Zork1-v0") == first
    assert stats.bootstrap_interval(values, stream="pz/Pentari-v0") != first


def test_a_single_value_has_an_interval_of_no_width():
    assert stats.bootstrap_interval([[0.25]]) == (0.25, 0.25)


def test_one_instance_varies_by_seeds():
    low, high = stats.bootstrap_interval([[0.0], [1.0], [0.5]])
    assert low < 0.5 < high


def test_missing_episodes_are_left_out_of_the_mean():
    values = np.array([[1.0, np.nan], [1.0, 1.0]])
    assert stats.bootstrap_interval(values) == (1.0, 1.0)


@pytest.mark.parametrize("values", [[1.0, 2.0], [[]], [[np.nan]]])
def test_shapes_that_are_no_seeds_by_instances_are_refused(values):
    with pytest.raises(ValueError, match="expected"):
        stats.bootstrap_means(values)


@pytest.mark.parametrize("size", [3, 8, 11])
def test_few_instances_get_scipy_s_exact_sign_flip_p(size):
    differences = np.random.default_rng(size).normal(0.4, 1, size)
    theirs = scipy.stats.permutation_test(
        (differences, np.zeros(size)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=True,
    )
    assert stats.sign_flip_p(differences) == pytest.approx(theirs.pvalue)


def test_many_instances_get_scipy_s_random_sign_flip_p():
    differences = np.random.default_rng(1).normal(0.25, 1, 50)
    theirs = scipy.stats.permutation_test(
        (differences, np.zeros(50)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=50_000,
        vectorized=True,
        rng=np.random.default_rng(2),
    )
    assert stats.sign_flip_p(differences) == pytest.approx(theirs.pvalue, abs=0.012)


def test_sign_flips_by_hand():
    # 1, 1, 1: of 8 sign vectors only +++ and --- reach |3|
    assert stats.sign_flip_p([1, 1, 1]) == 0.25
    assert stats.sign_flip_p([0, 0, 0, 0]) == 1.0
    assert stats.sign_flip_p(np.ones(200)) == 1 / 10_001


def test_pairing_cancels_how_hard_an_instance_is():
    random = np.random.default_rng(0)
    hard = random.normal(0, 5, (1, 100))
    left = hard + 1 + random.normal(0, 0.2, (3, 100))
    right = hard + random.normal(0, 0.2, (2, 100))
    found = stats.paired_difference(left, right)
    assert found.mean == pytest.approx((left.mean(0) - right.mean(0)).mean())
    assert 0.8 < found.low < found.mean < found.high < 1.2
    assert found.p < 0.001


def test_a_row_against_itself_differs_by_nothing():
    values = np.random.default_rng(0).random((1, 30))
    assert stats.paired_difference(values, values) == (0.0, None, None, 1.0)


def test_equal_differences_have_no_interval_but_a_p():
    left, right = np.full((1, 4), 0.3), np.array([[0.1, 0.1, 0.1, 0.1]])
    assert stats.paired_difference(left, right) == (pytest.approx(0.2), None, None, 0.125)


@pytest.mark.parametrize("right", [np.ones((2, 3)), np.full((2, 4), np.nan)])
def test_a_difference_needs_the_same_complete_instances(right):
    with pytest.raises(ValueError, match=r"paired|expected"):
        stats.paired_difference(np.ones((2, 4)), right)


def test_a_family_of_many_games_counts_once():
    families = {
        "countdown": {"a": np.full((2, 4), 0.9)},
        "jericho": {"b": np.full((2, 3), 0.1), "c": np.full((1, 5), 0.2), "d": np.zeros((2, 2))},
    }
    found = stats.macro_replicates(families, 50)
    assert found == pytest.approx(np.full(50, 0.5))  # (.9 + (.1 + .2 + 0) / 3) / 2


def test_macro_interval_adds_the_environments_variances():
    random = np.random.default_rng(0)
    values = {name: random.random((1, 40)) for name in "abc"}
    families = {"x": {"a": values["a"]}, "y": {"b": values["b"], "c": values["c"]}}
    found = stats.percentile_interval(stats.macro_replicates(families))
    variance = (
        values["a"].var() / 40 / 4 + values["b"].var() / 40 / 16 + values["c"].var() / 40 / 16
    )
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.06)


def test_stacked_rows_follow_the_instances_not_the_order():
    stacked = stats.stack([{7: 0.7, 2: 0.2}, {2: 0.3, 9: 0.9}])
    np.testing.assert_array_equal(stacked, [[0.2, 0.7, np.nan], [0.3, np.nan, 0.9]])


def test_replicates_are_stretched_by_what_student_adds_to_the_normal():
    values = np.array([[0.0, 1.0, 5.0]])
    plain, stretched = stats.bootstrap_means(values), stats.stretched_means(values)
    # t(2) at .975 is 4.302653, z is 1.959964: (3/2)^.5 * 4.302653 / 1.959964 = 2.688647
    np.testing.assert_allclose(stretched - 2, 2.688647 * (plain - 2), rtol=1e-5)


def test_combined_intervals_add_in_squares():
    parts = [(0.5, 0.4, stats.Interval(0.1, 0.8)), (0.5, 0.6, stats.Interval(0.2, 0.9))]
    low, high = stats.combined_interval(parts)
    assert low == pytest.approx(0.5 - 0.5 * np.hypot(0.3, 0.4))
    assert high == pytest.approx(0.5 + 0.5 * np.hypot(0.4, 0.3))
    alone = stats.Interval(0.1, 0.8)
    assert stats.combined_interval([(1.0, 0.4, alone)]) == pytest.approx(alone)


@pytest.mark.parametrize("instances", FEW)
def test_wilson_covers_the_truth_when_seeds_agree(instances):
    # Exact: the chance of each count of successes, over an even grid of true rates.
    rates = np.linspace(0.0005, 0.9995, 1000)
    covered = np.zeros(1000)
    for successes in range(instances + 1):
        outcomes = np.repeat([np.arange(instances) < successes], 3, axis=0).astype(float)
        trials = stats.effective_trials(outcomes)
        low, high = stats.wilson(outcomes.mean() * trials, trials)
        chance = scipy.stats.binom.pmf(successes, instances, rates)
        covered += chance * ((low <= rates) & (rates <= high))
    assert 0.94 <= covered.mean() <= 0.97


@pytest.mark.parametrize("instances", FEW)
def test_bootstrap_intervals_of_few_instances_cover_the_truth(instances):
    random = np.random.default_rng(19)
    hits = 0
    for trial in range(500):
        values = np.repeat(random.normal(0, 0.3, (1, instances)), 3, axis=0)
        low, high = stats.bootstrap_interval(values, stream=str(trial % 4), resamples=1000)
        hits += low <= 0 <= high
    assert 0.91 <= hits / 500 <= 0.98


def test_the_interval_of_a_macro_mean_covers_the_truth():
    # Four environments of 5 instances: two of successes, one of points, one always solved.
    random = np.random.default_rng(23)
    truth = (0.8 + 0.5 + 0.4 + 1.0) / 4
    hits = 0
    for _ in range(500):
        parts = []
        for rate in (0.8, 0.5, 1.0):
            outcomes = (random.random((3, 5)) < rate).astype(float)
            trials = stats.effective_trials(outcomes)
            mean = float(outcomes.mean())
            parts.append((0.25, mean, stats.wilson(mean * trials, trials)))
        points = np.repeat(random.normal(0.4, 0.1, (1, 5)), 3, axis=0)
        ends = stats.bootstrap_interval(points, resamples=500)
        low, high = stats.combined_interval([*parts, (0.25, float(points.mean()), ends)])
        hits += low <= truth <= high
    assert 0.94 <= hits / 500 <= 1


COVERED = [(1, 40, 0.0), (3, 40, 0.05), (3, 128, 0.03), (5, 128, 0.05), (10, 64, 0.1)]


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "instances", "seed_spread"), COVERED)
def test_bootstrap_intervals_cover_the_truth(seeds, instances, seed_spread):
    random = np.random.default_rng(11)
    hits = 0
    for trial in range(600):
        values = (
            random.normal(0, seed_spread, (seeds, 1))
            + random.normal(0, 0.3, (1, instances))
            + random.normal(0, 0.3, (seeds, instances))
        )
        low, high = stats.bootstrap_interval(values, stream=str(trial % 4), resamples=1000)
        hits += low <= 0 <= high
    assert 0.92 <= hits / 600 <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "instances"), [(1, 64), (3, 64), (5, 200)])
@pytest.mark.parametrize("difficulty", [0.0, 1.5, 3.0])
def test_wilson_with_effective_trials_covers_the_truth(seeds, instances, difficulty):
    random = np.random.default_rng(13)
    chance = 1 / (1 + np.exp(-random.normal(-1, difficulty, (4000, instances))))
    truth = np.mean(1 / (1 + np.exp(-random.normal(-1, difficulty, 1_000_000))))
    hits = 0
    for each in chance:
        outcomes = (random.random((seeds, instances)) < each).astype(float)
        trials = stats.effective_trials(outcomes)
        low, high = stats.wilson(outcomes.mean() * trials, trials)
        hits += low <= truth <= high
    assert 0.92 <= hits / len(chance) <= 0.97


def normal_world(random, seeds, instances, spread):
    """Hard instances shared by both sides, whose seeds differ by ``spread``; the truth is 0.1."""
    hard = random.normal(0, 0.4, (1, instances))
    left, right = (
        hard + random.normal(0, spread, (seeds, 1)) + random.normal(0, 0.3, (seeds, instances))
        for _ in range(2)
    )
    return left + 0.1, right


def binary_world(random, seeds, instances, spread):
    """The same with successes and failures, both sides alike; the truth is 0."""
    hard = random.normal(-1, 1.5, (1, instances))
    return tuple(
        (
            random.random((seeds, instances))
            < scipy.special.expit(hard + random.normal(0, spread, (seeds, 1)))
        ).astype(float)
        for _ in range(2)
    )


PAIRED = [
    (normal_world, 0.1, 1, 64, 0.0),
    (normal_world, 0.1, 3, 64, 0.05),
    (normal_world, 0.1, 3, 256, 0.05),
    (normal_world, 0.1, 5, 16, 0.05),
    (normal_world, 0.1, 10, 64, 0.02),
    (binary_world, 0.0, 3, 64, 0.25),
    (binary_world, 0.0, 5, 128, 0.5),
]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "truth", "seeds", "instances", "spread"), PAIRED)
def test_paired_intervals_cover_the_truth(world, truth, seeds, instances, spread):
    random = np.random.default_rng(17)
    worlds, hits = 4000, 0
    for _ in range(worlds):
        left, right = world(random, seeds, instances, spread)
        found = stats.paired_difference(left, right, resamples=1)
        hits += found.low <= truth <= found.high
    assert 0.92 <= hits / worlds <= 0.97


def test_one_seed_a_side_is_the_paired_t_interval_of_scipy():
    random = np.random.default_rng(5)
    left, right = random.random((1, 30)), random.random((1, 30))
    found = stats.paired_difference(left, right)
    theirs = scipy.stats.ttest_rel(left[0], right[0]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))


def test_one_instance_is_the_welch_interval_over_seeds_of_scipy():
    random = np.random.default_rng(6)
    left, right = random.random((5, 1)), random.random((4, 1))
    found = stats.paired_difference(left, right)
    theirs = scipy.stats.ttest_ind(left[:, 0], right[:, 0], equal_var=False)
    interval = theirs.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_one_value_a_side_has_a_difference_without_an_interval():
    assert stats.paired_difference([[0.5]], [[0.25]])[:3] == (0.25, None, None)
