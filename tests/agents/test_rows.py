from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from pz_agents.algorithms.rows import rows_of, shared_turns
from pz_agents.sdk.types import Sample, Step, Trajectory

GOLDEN = Path(os.environ.get("PZ_DATA", "/nonexistent")).parent / "golden" / "trainer_losses.json"


def sample(prompt, tokens, version=0, log_probs=None):
    if log_probs is None:
        log_probs = [-0.1 * (number + 1) for number in range(len(tokens))]
    return Sample(
        np.array(prompt, np.int32),
        np.array(tokens, np.int32),
        np.array(log_probs, np.float32),
        version=version,
    )


def trajectory(*samples, key="t0", group_id="g0"):
    steps = tuple(Step("", "", 0.0, 0.0, True, False, sample=item) for item in samples)
    return Trajectory(
        key=key,
        env_id="pz/Toy-v0",
        env_seed=1,
        task_id="toy",
        group_id=group_id,
        attempt=0,
        steps=steps,
        final_observation="",
        reward=1.0,
        score=1.0,
        max_score=1.0,
        score_norm=1.0,
        success=True,
        terminated=True,
        truncated="",
    )


def test_turns_that_continue_each_other_share_one_row():
    first = sample([1, 2], [3, 4], version=5)
    second = sample([1, 2, 3, 4, 9, 9], [6], version=6)
    (row,) = rows_of(trajectory(first, second), 2.0)
    assert row.ids.tolist() == [1, 2, 3, 4, 9, 9, 6]
    assert row.mask.tolist() == [False, False, True, True, False, False, True]
    np.testing.assert_allclose(row.log_probs, [0, 0, -0.1, -0.2, 0, 0, -0.1], rtol=1e-6)
    assert row.versions.tolist() == [-1, -1, 5, 5, -1, -1, 6]
    assert row.turns.tolist() == [-1, -1, 0, 0, -1, -1, 1]
    assert row.advantages.tolist() == [0, 0, 2, 2, 0, 0, 2]
    assert (row.trajectory_id, row.group_id, row.prompt_length) == ("t0", "g0", 2)


def test_a_prompt_that_changes_one_early_token_begins_a_new_row():
    first = sample([1, 2], [3, 4])
    second = sample([1, 7, 3, 4, 9], [6])
    rows = rows_of(trajectory(first, second), 1.0)
    assert [row.ids.tolist() for row in rows] == [[1, 2, 3, 4], [1, 7, 3, 4, 9, 6]]
    assert rows[1].mask.tolist() == [False] * 5 + [True]
    assert rows[1].turns.tolist()[-1] == 1


def test_a_reply_retokenised_to_other_ids_begins_a_new_row_and_is_not_trained_twice():
    first = sample([1, 2], [30, 40])
    second = sample([1, 2, 31, 39, 9], [6])
    rows = rows_of(trajectory(first, second), 1.0)
    assert sum(int(row.mask.sum()) for row in rows) == 3
    assert not rows[1].mask[2:4].any()


def test_a_shortened_history_begins_a_new_row():
    first = sample([1, 2, 3, 4], [5, 6])
    second = sample([1, 2], [7])
    assert len(rows_of(trajectory(first, second), 1.0)) == 2


def test_a_history_cut_inside_the_reply_begins_a_new_row():
    first = sample([1], [5, 6, 7])
    second = sample([1, 5, 6], [8])
    rows = rows_of(trajectory(first, second), 1.0)
    assert [row.ids.tolist() for row in rows] == [[1, 5, 6, 7], [1, 5, 6, 8]]


def test_a_prompt_equal_to_the_whole_history_continues_the_row():
    first = sample([1], [5, 6])
    second = sample([1, 5, 6], [7])
    (row,) = rows_of(trajectory(first, second), 1.0)
    assert row.mask.tolist() == [False, True, True, True]


def test_forks_and_returns_keep_every_sampled_token_exactly_once():
    samples = [
        sample([1], [2]),
        sample([1, 2, 3], [4]),
        sample([9], [8, 8]),
        sample([9, 8, 8, 7], [6]),
        sample([1, 2, 3, 4, 5], [5]),
    ]
    rows = rows_of(trajectory(*samples), 1.0)
    assert [row.ids.tolist() for row in rows] == [
        [1, 2, 3, 4],
        [9, 8, 8, 7, 6],
        [1, 2, 3, 4, 5, 5],
    ]
    assert sum(int(row.mask.sum()) for row in rows) == 6
    assert [row.turns[row.mask].tolist() for row in rows] == [[0, 1], [2, 2, 3], [4]]


def test_steps_without_a_sample_and_empty_samples_are_passed_over():
    rows = rows_of(trajectory(None, sample([1], []), sample([1], [2]), None), 1.0)
    assert [row.ids.tolist() for row in rows] == [[1, 2]]
    assert rows[0].turns.tolist() == [-1, 2]
    assert rows_of(trajectory(), 1.0) == []


@pytest.mark.parametrize("seed", range(20))
def test_random_histories_train_exactly_what_was_sampled(seed):
    rng = np.random.default_rng(seed)
    samples, history = [], rng.integers(0, 3, size=2).tolist()
    for _ in range(8):
        if rng.random() < 0.4:
            history = rng.integers(0, 3, size=rng.integers(1, 6)).tolist()
        tokens = rng.integers(0, 3, size=rng.integers(1, 4)).tolist()
        samples.append(sample(history, tokens))
        history = history + tokens + rng.integers(0, 3, size=rng.integers(0, 3)).tolist()
    rows = rows_of(trajectory(*samples), 1.0)
    for row in rows:
        assert not row.mask[0]
    trained = np.concatenate([row.ids[row.mask] for row in rows])
    placed = np.concatenate([row.log_probs[row.mask] for row in rows])
    assert trained.tolist() == [token for item in samples for token in item.token_ids.tolist()]
    np.testing.assert_array_equal(placed, np.concatenate([item.log_probs for item in samples]))


def test_a_sample_without_one_log_prob_a_token_is_refused_by_name():
    broken = sample([1], [2, 3], log_probs=[-0.5])
    with pytest.raises(ValueError, match=r"'t0', turn 0.*2 tokens, 1 log-probs"):
        rows_of(trajectory(broken), 1.0)
    with pytest.raises(ValueError, match="0 prompt ids"):
        rows_of(trajectory(sample([], [2])), 1.0)


@pytest.mark.skipif(not GOLDEN.is_file(), reason="needs the golden cases by PZ_DATA")
def test_the_mask_of_a_multi_turn_row_matches_the_golden_case():
    cases = json.loads(GOLDEN.read_text())["cases"]
    golden = next(item for item in cases if item["id"] == "multiturn_mask")
    history: list[int] = []
    samples = []
    for number, (role, length) in enumerate(golden["inputs"]["segments"]):
        tokens = [number] * length
        if role == "assistant":
            samples.append(sample(history, tokens))
        history = history + tokens
    (row,) = rows_of(trajectory(*samples), 1.0)
    assert row.mask.astype(int).tolist() == golden["expected"]["mask"]
    assert row.mask[1:].astype(int).tolist() == golden["expected"]["target_mask_shifted"]
    assert row.prompt_length == golden["expected"]["prompt_len"]


@pytest.mark.skipif(not GOLDEN.is_file(), reason="needs the golden cases by PZ_DATA")
def test_the_mask_from_a_pivot_on_matches_the_golden_case():
    cases = json.loads(GOLDEN.read_text())["cases"]
    golden = next(item for item in cases if item["id"] == "r3l_pivot_mask")
    history: list[int] = []
    samples = []
    for number, (role, length) in enumerate(golden["inputs"]["segments"]):
        tokens = [number] * length
        if role == "asst":
            samples.append(sample(history, tokens))
        history = history + tokens
    expected = golden["expected"]
    (whole,) = rows_of(trajectory(*samples), 1.0)
    assert whole.mask.astype(int).tolist() == expected["mask_all"]
    (row,) = rows_of(trajectory(*samples), 1.0, golden["params"]["pivot_turn"])
    assert row.turns.tolist() == expected["turn_id"]
    assert row.mask.astype(int).tolist() == expected["mask_pivot"]
    assert row.advantages.astype(int).tolist() == expected["mask_pivot"]
    np.testing.assert_array_equal(row.log_probs, whole.log_probs)


def test_turns_that_follow_each_other_without_a_word_between_them_are_told_apart():
    first, second = sample([1], [2, 3]), sample([1, 2, 3], [4])
    (row,) = rows_of(trajectory(first, second), 1.0, 1)
    assert row.mask.tolist() == [False, False, False, True]


def test_a_row_of_untrained_turns_alone_is_left_out():
    rows = rows_of(trajectory(sample([1], [2]), sample([9], [8])), 1.0, 1)
    assert [row.ids.tolist() for row in rows] == [[9, 8]]
    assert rows_of(trajectory(sample([1], [2])), 1.0, 5) == []


def test_shared_turns_end_at_the_first_difference_in_prompt_or_reply():
    first, second, third = sample([1], [2]), sample([1, 2, 3], [4]), sample([1, 2, 3, 4], [5])
    whole = trajectory(first, second, third)
    assert shared_turns(whole, whole) == 3
    assert shared_turns(whole, trajectory(first, second)) == 2
    assert shared_turns(whole, trajectory(first, sample([1, 2, 9], [4]), third)) == 1
    assert shared_turns(whole, trajectory(sample([1], [9]), second, third)) == 0
    assert shared_turns(trajectory(None, first), trajectory(None, first)) == 2
    assert shared_turns(trajectory(None), trajectory(first)) == 0
