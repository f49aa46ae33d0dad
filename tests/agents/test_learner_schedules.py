"""The course of the learning rate."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from pz_agents.training.schedules import Schedule, fraction

GOLDEN = Path(os.environ.get("PZ_DATA", "/nonexistent")).parent / "golden" / "trainer_losses.json"
needs_golden = pytest.mark.skipif(not GOLDEN.is_file(), reason="needs the golden cases by PZ_DATA")


@pytest.fixture(scope="module")
def golden():
    return {case["id"]: case for case in json.loads(GOLDEN.read_text())["cases"]}


@needs_golden
def test_the_cosine_schedule_matches_the_golden_case(golden):
    case = golden["lr_cosine_warmup"]
    params = case["params"]
    found = [
        fraction("cosine", step, params["warmup"], params["total"])
        for step in case["inputs"]["steps"]
    ]
    np.testing.assert_allclose(found, case["expected_f64"]["lr_over_1e6"], atol=1e-6)


@needs_golden
def test_a_plateau_ends_where_the_golden_case_says(golden):
    case = golden["early_stopping"]
    schedule = Schedule("plateau", 0, 100, case["params"]["patience"])
    rates = []
    for metric in case["inputs"]["metric"]:
        schedule.observe(-metric)
        rates.append(schedule.rate(10))
    assert rates.index(0.5) == case["expected"]["stop_at_eval"]
    assert schedule.state()["best"] == -case["expected"]["best"]


def test_a_plateau_halves_again_and_again_down_to_a_hundredth_and_resumes():
    straight = Schedule("plateau", 4, 100, 2)
    assert [straight.rate(updates) for updates in (0, 3, 4, 50)] == [0.2, 0.8, 1.0, 1.0]
    rewards = [0.1, 0.2, 0.2, 0.1, 0.3, 0.3, 0.3, float("nan"), 0.3, 0.3, *[0.0] * 30]
    half = Schedule("plateau", 4, 100, 2)
    for reward in rewards[:6]:
        half.observe(reward)
    resumed = Schedule("plateau", 4, 100, 2)
    resumed.load_state(half.state())
    rates = []
    for number, reward in enumerate(rewards):
        straight.observe(reward)
        if number >= 6:
            resumed.observe(reward)
        rates.append(straight.rate(50))
    assert rates[:10] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]
    assert rates[-1] == resumed.rate(50) == 0.01
    assert resumed.state() == straight.state()


def test_rewards_do_not_move_the_other_schedules():
    schedule = Schedule("linear", 0, 4, 1)
    for _ in range(5):
        schedule.observe(0.0)
    assert [schedule.rate(updates) for updates in range(4)] == [1.0, 0.75, 0.5, 0.25]
