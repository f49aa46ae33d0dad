from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs pz-agents[train]")


from pz_agents.errors import ModelError
from pz_agents.models import load_model
from pz_agents.rollout import ExperienceStore
from pz_agents.training import checkpoint
from pz_agents.training.monitors import read_metrics
from pz_agents.training.run import TrainSettings, train
from pz_envs.errors import ConfigError, DataError
from pz_envs.textenv import Outcome, TextEnv

pytestmark = pytest.mark.timeout(280)


class ParityEnv(TextEnv):
    """Two turns; pays 1 for a reply of an even number of characters, other than none."""

    family = "toy"

    def __init__(self, on_step=None, **kwargs: Any) -> None:
        super().__init__()
        self._on_step = on_step

    def _start(self, seed, options):
        self._turns, self._total, self._max_score = 0, 0.0, 2.0
        self._task_id = f"parity-{seed % 7}"
        return Outcome(f"Go {seed % 7}.", 0.0)

    def _advance(self, command):
        if self._on_step is not None:
            self._on_step()
        reward = float(len(command) % 2 == 0)
        self._turns += 1
        self._total += reward
        return Outcome(
            "Again.", self._total, reward, terminated=self._turns == 2, success=self._total == 2
        )


@pytest.fixture(autouse=True)
def _toy_env_and_one_thread(monkeypatch):
    monkeypatch.setattr("pz_envs.catalog.make_env", lambda env_id, **kwargs: ParityEnv())
    # Drawing takes longer than the rest of so small a run.
    monkeypatch.setattr("pz_agents.training.run.plot_metrics", lambda metrics, path: [])
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def settings(model: Path | str, **changes: Any) -> TrainSettings:
    given = {
        "env": "pz/Countdown-v0",
        "model": str(model),
        "steps": 6,
        "groups_per_step": 2,
        "group_size": 4,
        "learning_rate": 1e-3,
        "max_new_tokens": 6,
        "max_turns": 4,
        "save_every": 2,
        **changes,
    }
    return TrainSettings(**given)


@pytest.fixture(scope="module")
def straight(micro, tmp_path_factory) -> Path:
    """A run that was never cut short."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pz_envs.catalog.make_env", lambda env_id, **kwargs: ParityEnv())
        train(settings(micro), folder)
    return folder


def same_run(left: Path, right: Path) -> None:
    """Weights, optimizer, counters, metrics and store are the same bytes."""
    newest = [checkpoint.newest(folder / "checkpoints") for folder in (left, right)]
    files = [
        sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        for folder in newest
    ]
    assert files[0] == files[1]
    assert {str(path) for path in files[0]} >= {
        "buffer/experience.db",
        "config.json",
        "manifest.json",
        "optimizer/state.pt",
        "policy/model.safetensors",
        "training_state.pt",
    }
    for name in files[0]:
        assert (newest[0] / name).read_bytes() == (newest[1] / name).read_bytes(), name
    for name in ("policy/model.safetensors", "metrics.jsonl"):
        assert (left / name).read_bytes() == (right / name).read_bytes(), name
    assert snapshot_of(left) == snapshot_of(right)


def snapshot_of(folder: Path) -> bytes:
    """The bytes of a copy of a run's store, consumed groups included."""
    copy = folder / "copy.db"
    with ExperienceStore(folder / "experience.db") as store:
        store.snapshot(copy)
    data = copy.read_bytes()
    copy.unlink()
    return data


class StopHereError(Exception):
    pass


def stop_at(step):
    def on_progress(number, steps, metrics):
        if number == step:
            raise StopHereError

    return on_progress


def test_a_run_leaves_a_policy_that_loads_and_has_learned_something(straight, micro):
    policy, start = load_model(str(straight / "policy")), load_model(str(micro))
    moved = [
        (new - old).abs().max().item()
        for new, old in zip(policy.network.parameters(), start.network.parameters(), strict=True)
    ]
    assert max(moved) > 1e-3
    metrics = read_metrics(straight / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert (straight / "training_metrics.png").read_bytes()[:4] == b"\x89PNG"
    assert checkpoint.problems(straight / "policy") == []
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == [
        "step_000004",
        "step_000006",
    ]


def test_every_first_update_is_on_policy_and_the_sampler_agrees_with_the_learner(straight):
    for line in read_metrics(straight / "metrics.jsonl"):
        assert abs(line["ratio"] - 1.0) <= 1e-4
        assert line["engine_gap"] <= 1e-4
        assert line["clip_low"] == line["clip_high"] == 0.0


def test_new_weights_play_the_next_step_and_every_sample_says_which(straight):
    with ExperienceStore(straight / "experience.db") as store:
        versions: dict[str, set[int]] = {}
        for item in store.trajectories():
            step = item.key.split("/")[0]
            versions.setdefault(step, set()).update(s.sample.version for s in item.steps)
    metrics = read_metrics(straight / "metrics.jsonl")
    updates = np.cumsum([0] + [line["tokens"] > 0 for line in metrics]).tolist()
    assert [versions[name] for name in sorted(versions)] == [{n} for n in updates[:-1]]
    assert updates[-1] >= 3


@pytest.mark.parametrize("killed_at", [1, 4])
def test_a_run_cut_short_and_called_again_equals_one_that_was_not(
    straight, micro, tmp_path, killed_at
):
    with pytest.raises(StopHereError):
        train(settings(micro), tmp_path, on_progress=stop_at(killed_at))
    seen = []
    train(settings(micro), tmp_path, on_progress=lambda step, steps, metrics: seen.append(step))
    assert seen[-1] == 6
    assert seen[0] == killed_at // 2 * 2 + 1
    same_run(straight, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dapo", "opmd", "raft"])
def test_other_algorithms_learn_from_all_they_played_and_resume_exactly(micro, tmp_path, name):
    changes = {"algorithm": name, "steps": 4, "group_size": 2, "seed": 1}
    train(settings(micro, **changes), tmp_path / "straight")
    with pytest.raises(StopHereError):
        train(settings(micro, **changes), tmp_path / "cut", on_progress=stop_at(3))
    train(settings(micro, **changes), tmp_path / "cut")
    same_run(tmp_path / "straight", tmp_path / "cut")
    metrics = read_metrics(tmp_path / "cut" / "metrics.jsonl")
    assert sum(line["tokens"] for line in metrics) > 0
    with ExperienceStore(tmp_path / "cut" / "experience.db") as store:
        counts = store.counts()
        rejected = {item.reward for item in store.trajectories() if item.status == "rejected"}
    assert (counts["new"], counts["leased"]) == (0, 0)
    assert counts["consumed"] == sum(line["groups"] for line in metrics)
    assert rejected == ({0.0} if name == "raft" else set())
    if name == "dapo":
        assert all(line["usable_groups"] == 2 for line in metrics)
        assert counts["consumed"] > 2 * 4


@pytest.mark.slow
def test_the_reference_of_a_resumed_run_is_still_the_starting_weights(micro, tmp_path):
    changes = {"options": {"beta": 0.5}, "steps": 4, "iterations": 2}
    train(settings(micro, **changes), tmp_path / "straight")
    with pytest.raises(StopHereError):
        train(settings(micro, **changes), tmp_path / "cut", on_progress=stop_at(3))
    train(settings(micro, **changes), tmp_path / "cut")
    same_run(tmp_path / "straight", tmp_path / "cut")
    kl = [line["kl"] for line in read_metrics(tmp_path / "cut" / "metrics.jsonl")]
    assert kl[0] < kl[-1]


@pytest.mark.slow
def test_more_steps_go_on_from_a_finished_run(straight, micro, tmp_path):
    train(settings(micro, steps=4), tmp_path)
    train(settings(micro, steps=6), tmp_path)
    assert (tmp_path / "policy/model.safetensors").read_bytes() == (
        straight / "policy/model.safetensors"
    ).read_bytes()


def test_a_finished_run_returns_at_once(straight, micro, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is to be loaded")

    monkeypatch.setattr("pz_agents.models.load_model", refuse)
    before = (straight / "metrics.jsonl").stat().st_mtime_ns
    assert train(settings(micro), straight) == straight / "policy"
    assert (straight / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_lost_final_policy_is_made_again_from_the_last_checkpoint(straight, micro):
    weights = straight / "policy" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-4])
    train(settings(micro), straight)
    assert weights.read_bytes() == data


def test_going_on_with_another_learning_rate_is_refused_by_name(straight, micro):
    with pytest.raises(ConfigError, match=r"`learning_rate` was 0.001"):
        train(settings(micro, learning_rate=1e-2), straight)


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_result_is_the_same(
    straight, micro, tmp_path
):
    with pytest.raises(StopHereError):
        train(settings(micro), tmp_path, on_progress=stop_at(5))
    path = tmp_path / "checkpoints" / "step_000004" / "optimizer" / "state.pt"
    path.write_bytes(path.read_bytes()[:-1])
    train(settings(micro), tmp_path)
    same_run(straight, tmp_path)


def test_when_all_checkpoints_are_damaged_the_run_does_not_begin_again_silently(micro, tmp_path):
    train(settings(micro, steps=2), tmp_path)
    for folder in checkpoint.steps_in(tmp_path / "checkpoints"):
        (folder / "training_state.pt").unlink()
    with pytest.raises(DataError, match="is whole"):
        train(settings(micro, steps=4), tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_steps_leaves_a_checkpoint_and_the_same_call_goes_on(
    straight, micro, tmp_path, number
):
    def on_progress(step, steps, metrics):
        if step == 3:
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(settings(micro), tmp_path, on_progress=on_progress)
    assert signal.getsignal(number) is handler
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "checkpoints")) == 3
    train(settings(micro), tmp_path)
    same_run(straight, tmp_path)


def test_a_signal_while_episodes_are_played_leaves_a_checkpoint_of_the_last_step(
    straight, micro, tmp_path, monkeypatch
):
    steps_done = []
    sent = []

    def interrupt():
        if steps_done == [1, 2, 3] and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(
        "pz_envs.catalog.make_env", lambda env_id, **kwargs: ParityEnv(on_step=interrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        train(
            settings(micro),
            tmp_path,
            on_progress=lambda step, steps, metrics: steps_done.append(step),
        )
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "checkpoints")) == 3
    train(settings(micro), tmp_path)
    same_run(straight, tmp_path)


def test_failed_episodes_are_counted_and_do_not_end_the_run(micro, tmp_path, monkeypatch):
    calls = iter(range(10_000))

    def sometimes():
        if next(calls) % 7 == 0:
            raise RuntimeError("the engine broke")

    monkeypatch.setattr(
        "pz_envs.catalog.make_env", lambda env_id, **kwargs: ParityEnv(on_step=sometimes)
    )
    train(settings(micro, steps=3), tmp_path)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert len(metrics) == 3
    assert sum(line["failed"] for line in metrics) > 0


def test_a_model_without_weights_here_cannot_be_trained(tmp_path):
    with pytest.raises(ModelError, match="`scripted:a` cannot be trained"):
        train(settings("scripted:a"), tmp_path)


def test_a_run_that_never_saved_begins_anew_with_other_settings(straight, micro, tmp_path):
    with pytest.raises(ModelError, match="No model"):
        train(settings(tmp_path / "absent"), tmp_path)
    with pytest.raises(StopHereError):
        train(settings(micro, seed=5), tmp_path, on_progress=stop_at(1))
    train(settings(micro), tmp_path)
    same_run(straight, tmp_path)


def test_an_unknown_algorithm_or_option_names_the_nearest(micro, tmp_path):
    with pytest.raises(ConfigError, match="Did you mean `grpo`"):
        train(settings(micro, algorithm="grop"), tmp_path)
    with pytest.raises(ConfigError, match="Did you mean `pz/Countdown-v0`"):
        train(settings(micro, env="pz/Countdwn-v0"), tmp_path)
    with pytest.raises(ConfigError, match=r"unknown key `bta`.*`beta`"):
        train(settings(micro, options={"bta": 1.0}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_events_are_written_on_request(micro, tmp_path):
    pytest.importorskip("tensorboard")
    train(settings(micro, steps=2, monitor="tensorboard"), tmp_path)
    assert list((tmp_path / "tensorboard").glob("events.*"))


KILL_POINTS = (
    "while step 2 is played",
    "between store and metrics of step 3",
    "between metrics and checkpoint of step 4",
    "while checkpoint 4 is written",
    "between checkpoint 6 and the deletion of older ones",
)


def run_until_killed(model: str, folder: Path, point: str) -> None:
    """Train, and send this process SIGKILL at ``point``; for a child process alone."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    done = [0]
    catalog = importlib.import_module("pz_envs.catalog")
    training = importlib.import_module("pz_agents.training.run")
    catalog.make_env = lambda env_id, **kwargs: ParityEnv()
    if point.startswith("while step 2"):
        catalog.make_env = lambda env_id, **kwargs: ParityEnv(
            on_step=lambda: die() if done[0] == 1 else None
        )
    elif point.startswith("between store"):
        write = training.MetricsLog.write
        training.MetricsLog.write = lambda log, metrics, timings: (
            die() if metrics["step"] == 3 else write(log, metrics, timings)
        )
    elif point.startswith("between metrics"):
        save = checkpoint.save
        checkpoint.save = lambda *args: die() if args[1] == 4 else save(*args)
    elif point.startswith("while checkpoint"):
        hashed = checkpoint.sha256_file
        checkpoint.sha256_file = lambda path: die() if ".step_000004" in str(path) else hashed(path)
    elif point.startswith("between checkpoint"):
        best = checkpoint.best
        checkpoint.best = lambda path: (
            die() if checkpoint.step_of(checkpoint.steps_in(path)[0]) == 6 else best(path)
        )

    def on_progress(step: int, steps: int, metrics: Any) -> None:
        done[0] = step

    train(settings(model), folder, on_progress=on_progress)


@pytest.mark.slow
def test_a_run_killed_with_sigkill_again_and_again_ends_with_the_same_bytes(
    straight, micro, tmp_path
):
    # One process imports everything and forks for each attempt: imports take most of the time.
    script = textwrap.dedent(
        """
        import importlib.util, os, signal, sys
        from pathlib import Path
        source, model, folder, *points = sys.argv[1:]
        spec = importlib.util.spec_from_file_location("toy", source)
        toy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(toy)
        import pz_agents.training.trl_learner
        for point in points:
            if os.fork() == 0:
                signal.alarm(240)
                toy.run_until_killed(model, Path(folder), point)
                os._exit(0)
            status = os.wait()[1]
            newest = toy.checkpoint.newest(Path(folder) / "checkpoints")
            print(os.waitstatus_to_exitcode(status), newest.name if newest else "none", flush=True)
        """
    )
    command = [sys.executable, "-c", script, __file__, str(micro), str(tmp_path)]
    done = subprocess.run(
        [*command, *KILL_POINTS, "never"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.stdout.splitlines() == [
        "-9 none",
        "-9 step_000002",
        "-9 step_000002",
        "-9 step_000002",
        "-9 step_000006",
        "0 step_000006",
    ], done.stderr
    assert not list((tmp_path / "checkpoints").glob(".*"))
    same_run(straight, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0
