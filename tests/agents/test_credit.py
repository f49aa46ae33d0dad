from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from pz_agents.algorithms.credit import group_advantages

GOLDEN = Path(os.environ.get("PZ_DATA", "/nonexistent")).parent / "golden" / "trainer_losses.json"
needs_golden = pytest.mark.skipif(not GOLDEN.is_file(), reason="needs the golden cases by PZ_DATA")


def case(name):
    return next(c for c in json.loads(GOLDEN.read_text())["cases"] if c["id"] == name)


def flatten(rewards):
    values = [np.nan if value is None else value for row in rewards for value in row]
    return values, [f"g{number}" for number, row in enumerate(rewards) for _ in row]


@needs_golden
@pytest.mark.parametrize(
    ("scale", "name"),
    [
        ("group", "grpo_trl_ddof1_eps1e4"),
        ("none", "dr_grpo"),
        ("batch", "batch_std_ddof1_eps1e4"),
    ],
)
def test_group_advantages_match_the_golden_case(scale, name):
    golden = case("group_advantage")
    rewards, groups = flatten(golden["inputs"]["rewards"])
    result = group_advantages(rewards, groups, scale=scale)
    expected = np.ravel(golden["expected_f64"][name])
    np.testing.assert_allclose(result.values, expected, atol=1e-6, rtol=0)
    zero = golden["expected_f64"]["zero_variance_group"]
    assert [not used for used in result.used.reshape(3, 4).any(1)] == zero
    assert (result.groups, result.usable) == (3, 2)


@needs_golden
def test_a_missing_reward_is_left_out_as_in_the_golden_case():
    golden = case("group_advantage_unscorable")
    rewards, groups = flatten(golden["inputs"]["rewards"])
    result = group_advantages(rewards, groups)
    expected = np.ravel(golden["expected_f64"]["adv"])
    np.testing.assert_allclose(result.values, expected, atol=1e-6, rtol=0)
    assert result.used.tolist() == [True, False, True, True]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_of_one_earns_nothing_and_is_not_used(scale):
    result = group_advantages([5.0, 0.0, 1.0], ["alone", "pair", "pair"], scale=scale)
    assert result.values[0] == 0.0
    assert result.used.tolist() == [False, True, True]
    assert (result.groups, result.usable) == (2, 1)


def test_a_group_whose_rewards_are_all_missing_is_not_counted():
    result = group_advantages([np.nan, np.nan, 0.0, 1.0], ["a", "a", "b", "b"])
    assert not result.used[:2].any()
    assert (result.groups, result.usable) == (1, 1)


def test_order_of_rollouts_does_not_matter():
    rng = np.random.default_rng(0)
    rewards, groups = rng.normal(size=24), np.repeat(["a", "b", "c"], 8)
    order = rng.permutation(24)
    straight = group_advantages(rewards, list(groups))
    shuffled = group_advantages(rewards[order], list(groups[order]))
    np.testing.assert_allclose(shuffled.values, straight.values[order], atol=1e-12)


def test_repeating_one_group_leaves_the_others_as_they_were():
    once = group_advantages([0.0, 1.0, 0.2, 0.9], ["a", "a", "b", "b"])
    twice = group_advantages([0.0, 1.0, 0.2, 0.9, 0.0, 1.0], ["a", "a", "b", "b", "c", "c"])
    np.testing.assert_array_equal(twice.values[:4], once.values)


def test_no_rollouts_at_all_give_nothing():
    result = group_advantages([], [])
    assert result.values.size == 0
    assert (result.groups, result.usable) == (0, 0)


def test_unequal_lengths_are_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"\(2,\) rewards for \(1,\)"):
        group_advantages([0.0, 1.0], ["a"])
