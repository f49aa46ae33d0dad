"""The learner's settings in whole runs: adapters, plateaus, corrections, KL in the reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs pz-agents[train]")


from pz_agents.models import load_model
from pz_agents.training.monitors import read_metrics
from pz_agents.training.run import TrainSettings, train
from pz_envs.textenv import Outcome, TextEnv

pytestmark = pytest.mark.timeout(280)


class ParityEnv(TextEnv):
    """One turn; pays 1 for a reply of an even number of characters, other than none."""

    family = "toy"

    def _start(self, seed, options):
        self._max_score = 1.0
        self._task_id = f"parity-{seed % 7}"
        return Outcome(f"Go {seed % 7}.", 0.0)

    def _advance(self, command):
        reward = float(len(command) % 2 == 0)
        return Outcome("", reward, reward, terminated=True, success=reward == 1)


@pytest.fixture(autouse=True)
def _toy_env_and_one_thread(monkeypatch):
    monkeypatch.setattr("pz_envs.catalog.make_env", lambda env_id, **kwargs: ParityEnv())
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def settings(model: Path, **changes: Any) -> TrainSettings:
    given = {
        "env": "pz/Countdown-v0",
        "model": str(model),
        "steps": 4,
        "groups_per_step": 3,
        "group_size": 4,
        "learning_rate": 1e-2,
        "max_new_tokens": 6,
        "max_turns": 1,
        "save_every": 2,
        **changes,
    }
    return TrainSettings(**given)


class StopHereError(Exception):
    pass


def stop_after(last):
    def on_progress(step, steps, metrics):
        if step == last:
            raise StopHereError

    return on_progress


def scores(folder: Path) -> list[float]:
    """What the model thinks of a text."""
    candidate = np.arange(30, 50, dtype=np.int32)
    (found,) = load_model(str(folder)).score(np.arange(20, 30, dtype=np.int32), [candidate])
    return found.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"lora_rank": 4, "options": {"beta": 0.1}, "correction": "token_truncate"},
        {"schedule": "plateau", "plateau_patience": 1, "iterations": 2},
        {"precision": "bfloat16", "kl_reward": 0.1, "correction": "geo"},
        {"max_tokens_per_microbatch": 60, "correction": "seq_mask"},
    ],
)
def test_a_run_cut_short_and_called_again_equals_one_that_was_not(micro, tmp_path, changes):
    straight, halved = tmp_path / "straight", tmp_path / "halved"
    train(settings(micro, **changes), straight)
    with pytest.raises(StopHereError):
        train(settings(micro, **changes), halved, on_progress=stop_after(3))
    train(settings(micro, **changes), halved)
    name = "adapter_model.safetensors" if "lora_rank" in changes else "model.safetensors"
    weights = [folder / "policy" / name for folder in (straight, halved)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    lines = [(folder / "metrics.jsonl").read_text() for folder in (straight, halved)]
    assert lines[0] == lines[1]
    found = scores(straight / "policy")
    assert found == scores(halved / "policy")
    assert found != pytest.approx(scores(micro), abs=1e-3)


def test_the_model_that_plays_has_the_adapter_and_agrees_with_the_learner(micro, tmp_path):
    train(settings(micro, lora_rank=4, options={"beta": 0.1}), tmp_path)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["version"] for line in metrics] == sorted(line["version"] for line in metrics)
    assert metrics[-1]["version"] > 0
    assert all(line["engine_gap"] <= 1e-4 for line in metrics)
    assert max(line["kl"] for line in metrics if "kl" in line) > 0


def test_a_plateau_lowers_the_rate_of_a_run_that_does_not_improve(micro, tmp_path):
    still = settings(
        micro, schedule="plateau", plateau_patience=1, learning_rate=1e-12, steps=6, save_every=6
    )
    train(still, tmp_path)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    best, rate = -1.0, 1e-12
    for line in metrics:
        assert line["learning_rate"] == pytest.approx(rate)
        if line["reward"] <= best + 1e-4:
            rate /= 2
        best = max(best, line["reward"])
    assert rate < 1e-12


def test_kl_in_the_reward_changes_what_is_learned_and_not_the_reward_that_is_shown(micro, tmp_path):
    metrics = []
    for weight in (0.0, 10.0):
        folder = tmp_path / str(weight)
        train(settings(micro, kl_reward=weight, steps=2), folder)
        metrics.append(read_metrics(folder / "metrics.jsonl"))
    assert metrics[0][0]["reward"] == metrics[1][0]["reward"]
    norms = [lines[1]["grad_norm"] for lines in metrics]
    assert abs(norms[0] - norms[1]) > 0.01 * max(norms)
    assert [line["kl_weight"] for line in metrics[1]] == [10.0, 10.0]
    told = [line["kl"] for line in metrics[1]]
    assert abs(told[0]) < 1e-4 < abs(told[1])  # before the first update nothing has moved
    assert not {"kl", "kl_weight"} & set(metrics[0][0])
