"""Runs that are stopped from outside: SIGTERM, and SIGKILL at twenty points that a seed chose.

The signals are real. What must come out is the exit status, a checkpoint of the last whole step,
handlers as they were before, and, from the same command, the bytes of a run that nobody stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fleet_toy
import pytest
import torch

pytest.importorskip("trl", reason="needs pz-agents[train]")

from pz_agents import cli
from pz_agents.priorzero import run as unizero
from pz_agents.rollout import ExperienceStore
from pz_agents.runtime import open_runtime
from pz_agents.training import checkpoint
from pz_agents.training import run as training
from pz_agents.training.monitors import read_metrics
from pz_agents.training.settings import TrainSettings
from pz_envs.textenv import Outcome, TextEnv
from tests.support.house import House

pytestmark = pytest.mark.timeout(600)

POINTS = 20


class ParityEnv(TextEnv):
    """Pays 1 for a reply of an even number of characters, other than none."""

    family = "toy"

    def __init__(self, on_step: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._on_step = on_step or (lambda: None)

    def _start(self, seed, options):
        self._max_score, self._task_id = 1.0, f"parity-{seed % 7}"
        return Outcome(f"Go {seed % 7}.", 0.0)

    def _advance(self, command):
        self._on_step()
        reward = float(len(command) % 2 == 0)
        return Outcome("Done.", reward, reward, terminated=True, success=reward == 1)


def settings(model: Path | str, **changes: Any) -> dict[str, Any]:
    given = {
        "env": "pz/Countdown-v0",
        "model": str(model),
        "steps": 4,
        "groups_per_step": 2,
        "group_size": 2,
        "learning_rate": 1e-3,
        "max_new_tokens": 6,
        "max_turns": 1,
        "save_every": 2,
        **changes,
    }
    return TrainSettings(**given).model_dump(mode="json")


UNIZERO = {
    "algorithm": "unizero",
    "env": "pz/Detective-v0",
    "steps": 3,
    "slots": 2,
    "episodes_per_step": 2,
    "max_turns": 6,
    "network": {"embed": 32, "heads": 2, "buckets": 256, "dropout": 0.0, "layers": 1},
    "learner": {"batch_windows": 4, "precision": "fp32"},
    "replay": {"horizon": 4},
    "search": {"simulations": 4},
    "branching": 4,
    "eval_episodes": 0,
    "save_every": 50,
}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    # Drawing takes longer than the rest of so small a run.
    monkeypatch.setattr("pz_agents.training.run.plot_metrics", lambda metrics, path: [])
    monkeypatch.setattr("pz_agents.priorzero.run.plot_panels", lambda *given: [])
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def contents(folder: Path) -> dict[str, bytes]:
    """What a run left: its newest checkpoint, policy, metrics and store."""
    newest = checkpoint.newest(folder / "checkpoints")
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for top in (newest, folder / "policy", folder / "metrics.jsonl")
        for path in (top, *top.rglob("*"))
        if path.is_file()
    }
    # Equal values, but which of them are one object differs after a resume.
    found = {name: data for name, data in found.items() if not name.endswith("memory.pt")}
    if (folder / "experience.db").exists():
        copy = folder / "copy.db"
        with ExperienceStore(folder / "experience.db") as store:
            store.snapshot(copy)
        found["experience.db"] = copy.read_bytes()
        copy.unlink()
    return found


# SIGTERM.


def run_command(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], folder: Path) -> int:
    """Run ``pz-agents train`` in this process; returns the exit status."""
    file = folder.parent / f"{folder.name}.json"
    file.write_text(json.dumps(given))
    words = ["pz-agents", "train", "--config", str(file), "--out", str(folder)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


class Sender:
    """Sends this process a signal the first time that it is asked while ``when`` says so."""

    def __init__(self, number: int, when: Callable[[], bool]) -> None:
        self.number, self.when, self.sent = number, when, False
        self.turn = threading.Lock()  # environments step in threads

    def __call__(self) -> None:
        with self.turn:
            if not self.sent and self.when():
                self.sent = True
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "unizero"])
@pytest.mark.parametrize("place", ["while episodes are played", "after the second step"])
def test_sigterm_leaves_a_checkpoint_and_exits_143_and_the_same_command_goes_on(
    micro, tmp_path, monkeypatch, algorithm, place
):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    given = UNIZERO if algorithm == "unizero" else settings(micro, algorithm=algorithm, steps=3)
    given = given | {"save_every": 50}
    kind = unizero if algorithm == "unizero" else training

    def steps_done() -> int:
        return len(read_metrics(cut / "metrics.jsonl")) if cut.exists() else 0

    stop = Sender(signal.SIGTERM, lambda: steps_done() == 2)
    playing = place.startswith("while")

    def make_env(env_id: str, **kwargs: Any) -> TextEnv:
        if algorithm == "unizero":
            return House(breaks=lambda: stop() if playing else None)
        return ParityEnv(stop if playing else None)

    class Metrics(kind.MetricsLog):
        def write(self, *given: Any) -> None:
            super().write(*given)
            if not playing:
                stop()

    monkeypatch.setattr("pz_envs.catalog.make_env", make_env)
    monkeypatch.setattr(kind, "MetricsLog", Metrics)
    allowed = {"checkpoints/step_000003/manifest.json"} if algorithm == "unizero" else set()
    assert run_command(monkeypatch, given, straight) == 0
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run_command(monkeypatch, given, cut) == 143
    assert stop.sent
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert checkpoint.step_of(checkpoint.newest(cut / "checkpoints")) == 2
    assert run_command(monkeypatch, given, cut) == 0
    one, two = contents(straight), contents(cut)
    assert {name for name in one | two if one.get(name) != two.get(name)} <= allowed


def test_ctrl_c_still_exits_130(micro, tmp_path, monkeypatch):
    stop = Sender(signal.SIGINT, lambda: True)
    monkeypatch.setattr("pz_envs.catalog.make_env", lambda env_id, **kwargs: ParityEnv(stop))
    assert run_command(monkeypatch, settings(micro), tmp_path / "run") == 130


def test_a_server_that_is_told_to_end_exits_143():
    process = subprocess.Popen(
        [sys.executable, "-m", "pz_agents.cli", "serve", "--model", "scripted:hello"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert re.search(r"http://127\.0\.0\.1:\d+/v1", process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "Traceback" not in errors


# E18: SIGKILL at twenty points.


def killed(how: str, chosen: TrainSettings, folder: Path, points: int) -> list[list[str]]:
    """Run ``tests/support/kills.py`` and return the words of its lines."""
    words = [sys.executable, "-m", "kills", how, chosen.model_dump_json(), str(folder), str(points)]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_with_sigkill_at_any_of_twenty_points_resumes_to_the_same_bytes(
    micro, tmp_path
):
    lines = killed("everywhere", TrainSettings(**settings(micro)), tmp_path, POINTS)
    assert [(line[0], line[2]) for line in lines] == [("-9", "0")] * POINTS, lines
    assert {line[1] for line in lines} == {"0", "2", "4"}, "before, between and after checkpoints"
    expected = contents(tmp_path / "straight-0")
    assert len(expected) >= 10
    assert contents(tmp_path / "straight-1") == expected
    for point in range(POINTS):
        assert contents(tmp_path / f"point-{point}") == expected, lines[point]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_driver_of_ray_workers_killed_three_times_resumes_to_the_bytes_of_one_process(
    micro, tmp_path, monkeypatch
):
    pytest.importorskip("ray", reason="needs pz-agents[ray]")
    given = settings(micro, steps=6, save_every=1, resources={"worker": {"cpus": 0.1}})
    with contextlib.closing(open_runtime("ray", cpus=2)) as opened:
        address = opened.ray.get_runtime_context().gcs_address
        chosen = TrainSettings(**given | {"runtime": f"ray:{address}", "workers": 1})
        lines = killed("one_run", chosen, tmp_path, 3)
    assert [line[0] for line in lines] == ["-9"] * 3 + ["0"], lines
    saved = [int(line[1]) for line in lines]
    assert saved == sorted(saved)
    assert saved[-1] == 6
    monkeypatch.setattr("pz_envs.catalog.make_env", fleet_toy.make_env)
    training.train(TrainSettings(**given), tmp_path / "local")
    one = contents(tmp_path / "local")
    two = contents(tmp_path / "run")
    assert one.keys() == two.keys()
    ours = {name for name in one if one[name] != two[name]}
    assert {Path(name).name for name in ours} <= {"config.json", "manifest.json"}
