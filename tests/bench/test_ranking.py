"""Corrections, ranks and aggregates against rliable, scipy and simulated truths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import rliable.metrics
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from pz_bench import ranking, stats


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.5))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values, alpha):
    # the procedure as Holm states it: from the smallest on, stop at the first above its bound
    rejected = set()
    for step, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] * (len(p_values) - step) > alpha:
            break
        rejected.add(index)
    adjusted = ranking.holm(p_values)
    assert {index for index, value in enumerate(adjusted) if value <= alpha} == rejected


def test_holm_by_hand():
    assert ranking.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert ranking.holm([]) == []


def test_probability_of_improvement_equals_rliable_where_an_instance_is_a_task():
    random = np.random.default_rng(0)
    left, right = random.integers(0, 4, (5, 9)) / 3.0, random.integers(0, 4, (7, 9)) / 3.0
    expected = rliable.metrics.probability_of_improvement(left, right)
    assert ranking.probability_of_improvement(left, right) == pytest.approx(expected)
    against_itself = ranking.probability_of_improvement(left, left)
    assert against_itself == pytest.approx(0.5)


def test_pass_at_k_is_the_share_of_draws_with_a_success():
    outcomes = np.random.default_rng(8).integers(0, 2, (5, 7))
    for k in range(1, 6):
        draws = itertools.combinations(range(5), k)
        expected = np.mean([outcomes[list(draw)].max(axis=0).mean() for draw in draws])
        assert ranking.pass_at(outcomes, k) == pytest.approx(expected)


@pytest.mark.parametrize("k", [0, 6])
def test_pass_at_k_needs_k_samples(k):
    with pytest.raises(ValueError, match=r"k from 1 to 5, got"):
        ranking.pass_at(np.zeros((5, 2)), k)


def test_interquartile_mean_equals_rliable_and_scipy():
    scores = np.random.default_rng(1).gamma(2.0, size=(6, 11))
    expected = rliable.metrics.aggregate_iqm(scores)
    assert ranking.interquartile_mean(scores) == pytest.approx(float(expected))


def test_a_performance_profile_is_the_share_of_runs_above_each_threshold():
    tasks = {"a": [0.1, 0.5, 0.9], "b": [0.5, 0.6]}
    found = ranking.performance_profile(tasks, [0.0, 0.5, 0.55, 1.0])
    assert found == pytest.approx([1.0, 2 / 5, 2 / 5, 0.0])


def test_an_aggregates_interval_agrees_with_a_bootstrap_of_rliables_metric():
    random = np.random.default_rng(3)
    scores = random.random((6, 8))
    own = ranking.aggregate({str(task): scores[:, task] for task in range(8)}, resamples=4_000)
    drawn = [
        rliable.metrics.aggregate_iqm(
            np.take_along_axis(scores, random.integers(0, 6, scores.shape), axis=0)
        )
        for _ in range(4_000)
    ]
    assert own.iqm == pytest.approx(float(rliable.metrics.aggregate_iqm(scores)))
    expected = np.percentile(drawn, [2.5, 97.5])
    assert (own.low, own.high) == pytest.approx(tuple(expected), abs=0.01)
    assert not own.provisional


def test_an_aggregate_of_few_seeds_is_provisional():
    assert ranking.aggregate({"a": [0.1, 0.2, 0.3], "b": [0.5] * 6}).provisional


def test_a_detectable_difference_is_found_four_times_in_five():
    random = np.random.default_rng(4)
    instances, spread = 60, 0.4
    half = 1.96 * spread / np.sqrt(instances)
    true = ranking.detectable_difference(stats.Difference(0.0, -half, half, 1.0))
    samples = random.normal(true, spread, (4_000, instances))
    p_values = scipy_stats.ttest_1samp(samples, 0.0, axis=1).pvalue
    assert np.mean(p_values < 0.05) == pytest.approx(0.8, abs=0.03)


def replicates(*means, spread=0.01):
    random = np.random.default_rng(5)
    return [mean + spread * random.standard_normal(2_000) for mean in means]


def test_rows_far_apart_have_sure_ranks_and_own_groups():
    found = ranking.standings(replicates(0.9, 0.5, 0.1))
    assert found == [(1, 1, 1), (2, 2, 2), (3, 3, 3)]


def test_rows_that_cannot_be_told_apart_share_a_group_and_an_interval():
    found = ranking.standings(replicates(0.500, 0.499, 0.1))
    assert [each.group for each in found] == [1, 1, 2]
    assert found[0][:2] == found[1][:2] == (1, 2)


def test_a_chain_of_small_steps_does_not_stretch_a_group():
    # each is within reach of the one above, the third is not within reach of the first
    found = ranking.standings(replicates(0.50, 0.48, 0.45, spread=0.012))
    assert [each.group for each in found] == [1, 1, 2]


def test_rank_intervals_hold_the_true_rank_about_as_often_as_they_say():
    random = np.random.default_rng(6)
    truths, hits, rows = np.array([0.6, 0.5, 0.4]), 0, 3
    repeats = 60
    for repeat in range(repeats):
        hard = random.normal(0, 0.2, 40)
        replicated = []
        means = []
        for truth in truths:
            values = np.clip(truth + hard + random.normal(0, 0.3, (3, 40)), 0, 1)
            means.append(values.mean())
            replicated.append(stats.bootstrap_means(values, f"rank {repeat}", 300))
        order = np.argsort(means)[::-1]
        found = ranking.standings([replicated[row] for row in order])
        hits += sum(
            each.low <= 1 + int(row) <= each.high for each, row in zip(found, order, strict=True)
        )
    assert hits / (repeats * rows) > 0.9
