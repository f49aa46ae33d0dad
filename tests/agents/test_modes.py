"""An explorer and a trainer that share a folder, in one process and in two."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs pz-agents[train]")


from pz_agents.rollout import ExperienceStore
from pz_agents.training import checkpoint
from pz_agents.training.modes import explore, read_settings, train_both
from pz_agents.training.monitors import read_metrics
from pz_agents.training.player import Player, wilson
from pz_agents.training.run import train
from pz_agents.training.settings import TrainSettings, resolved
from pz_envs.errors import ConfigError, InfraError
from pz_envs.textenv import Outcome, TextEnv

pytestmark = pytest.mark.timeout(280)

GROUPS = 2


class ParityEnv(TextEnv):
    """Pays 1 for a reply of an even number of characters, other than none."""

    family = "toy"

    def _start(self, seed, options):
        self._max_score, self._task_id = 1.0, f"parity-{seed % 7}"
        return Outcome(f"Go {seed % 7}.", 0.0)

    def _advance(self, command):
        reward = float(len(command) % 2 == 0)
        return Outcome("Done.", reward, reward, terminated=True, success=reward == 1)


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
        "steps": 4,
        "groups_per_step": GROUPS,
        "group_size": 4,
        "learning_rate": 1e-3,
        "max_new_tokens": 6,
        "max_turns": 4,
        "save_every": 2,
        **changes,
    }
    return TrainSettings(**given)


def a_few_times(calls: int):
    """True so often, then False: long enough for an explorer to play what it may."""
    left = [calls]

    def goes_on() -> bool:
        left[0] -= 1
        return left[0] >= 0

    return goes_on


def explorer_beside(chosen: TrainSettings, folder: Path):
    """A ``wait`` that lets an explorer play what it may, in this process."""

    def wait(ready: int, needed: int) -> None:
        assert ready < needed == GROUPS
        assert explore(chosen, folder, goes_on=a_few_times(5)) > 0

    return wait


def uses_of(folder: Path) -> dict[str, list[int]]:
    """The steps that trained on each group."""
    uses: dict[str, list[int]] = {}
    with contextlib.closing(sqlite3.connect(folder / "experience.db")) as db:
        for name, step in db.execute("SELECT group_id, step FROM uses ORDER BY step"):
            uses.setdefault(name, []).append(step)
    return uses


def groups_a_step(folder: Path) -> dict[int, int]:
    """How many groups each step trained on."""
    return dict(sorted(Counter(itertools.chain(*uses_of(folder).values())).items()))


def weights(folder: Path) -> bytes:
    return (folder / "policy" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def in_turn(micro, tmp_path_factory) -> Path:
    """A run in one process, playing and training in turn."""
    folder = tmp_path_factory.mktemp("in-turn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pz_envs.catalog.make_env", lambda env_id, **kwargs: ParityEnv())
        patch.setattr("pz_agents.training.run.plot_metrics", lambda metrics, path: [])
        train(settings(micro), folder)
    return folder


def test_an_explorer_that_may_not_play_ahead_gives_the_run_of_one_process(micro, in_turn, tmp_path):
    chosen = settings(micro)
    train(chosen, tmp_path, wait=explorer_beside(chosen, tmp_path))
    assert weights(tmp_path) == weights(in_turn)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (in_turn / "metrics.jsonl").read_bytes()
    assert checkpoint.published(tmp_path / "weights").step == 4


@pytest.mark.parametrize(("staleness", "batches"), [(0, 1), (1, 2), (3, 4)])
def test_an_explorer_plays_no_further_ahead_than_it_may(micro, tmp_path, staleness, batches):
    chosen = settings(micro, max_staleness=staleness)
    seen = []
    played = explore(
        chosen,
        tmp_path,
        goes_on=a_few_times(7),
        on_batch=lambda batch, step: seen.append((batch, step)),
    )
    assert played == batches
    assert seen == [(number, 0) for number in range(1, batches + 1)]
    assert resolved(read_settings(tmp_path)) == resolved(chosen)
    # Started again, it knows where it was.
    assert explore(chosen, tmp_path, goes_on=a_few_times(2)) == 0


def test_one_step_ahead_each_step_trains_on_what_the_weights_before_played(micro, tmp_path):
    chosen = settings(micro, max_staleness=1)
    train(chosen, tmp_path, wait=explorer_beside(chosen, tmp_path))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    updates = [0, *[line["version"] for line in lines][1:]]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    # Two batches are played whenever none is left: the second is one step old when it is used.
    assert [line["staleness"] for line in lines] == [0, updates[1], 0, updates[3] - updates[2]]
    assert all(line["stale_groups"] == 0 for line in lines)
    assert all(len(steps) == 1 for steps in uses_of(tmp_path).values())


def test_groups_that_are_too_old_are_dropped_and_counted(micro, tmp_path):
    chosen = settings(micro, max_staleness=1, steps=3)
    assert explore(chosen, tmp_path, goes_on=a_few_times(4)) == 2
    with ExperienceStore(tmp_path / "experience.db", "explorer") as store:
        store.append(Player(chosen).play(9), 0, batch=9)
    train(chosen, tmp_path, wait=explorer_beside(chosen, tmp_path))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["stale_groups"] for line in lines] == [0, 0, GROUPS]
    assert max(line["staleness"] for line in lines) <= 1
    with ExperienceStore(tmp_path / "experience.db") as store:
        assert store.counts()["dropped"] == GROUPS
    used = uses_of(tmp_path)
    assert not any(name.startswith("batch000009") for name in used)
    assert groups_a_step(tmp_path) == dict.fromkeys((1, 2, 3), GROUPS)


class StopHereError(Exception):
    pass


def test_a_trainer_that_goes_on_loses_no_group_and_trains_on_none_twice(micro, tmp_path):
    chosen = settings(micro, max_staleness=1, steps=5)

    def on_progress(step, steps, metrics):
        if step == 3:
            raise StopHereError

    wait = explorer_beside(chosen, tmp_path)
    with pytest.raises(StopHereError):
        train(chosen, tmp_path, wait=wait, on_progress=on_progress)
    told = checkpoint.published(tmp_path / "weights")
    train(chosen, tmp_path, wait=wait)
    assert checkpoint.published(tmp_path / "weights").number > told.number
    used = uses_of(tmp_path)
    assert groups_a_step(tmp_path) == dict.fromkeys(range(1, 6), GROUPS)
    assert all(len(steps) == 1 for steps in used.values())
    with ExperienceStore(tmp_path / "experience.db") as store:
        counts = store.counts()
    assert counts["consumed"] == 5 * GROUPS
    assert counts["leased"] == 0
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_groups_are_used_twice_where_that_is_asked_for_and_a_resume_is_exact(micro, tmp_path):
    chosen = settings(micro, max_uses=2, max_staleness=1)

    def on_progress(step, steps, metrics):
        if step == 3:
            raise StopHereError

    train(chosen, tmp_path / "straight")
    with pytest.raises(StopHereError):
        train(chosen, tmp_path / "cut", on_progress=on_progress)
    train(chosen, tmp_path / "cut")
    assert weights(tmp_path / "cut") == weights(tmp_path / "straight")
    for name in ("straight", "cut"):
        used = uses_of(tmp_path / name)
        assert sorted(map(tuple, used.values())) == [(1, 2), (1, 2), (3, 4), (3, 4)]
        with ExperienceStore(tmp_path / name / "experience.db") as store:
            store.snapshot(tmp_path / f"{name}.db")
    straight, cut = ((tmp_path / f"{name}.db").read_bytes() for name in ("straight", "cut"))
    assert straight == cut


def test_a_store_that_was_damaged_goes_on_from_the_checkpoint_s_copy(micro, in_turn, tmp_path):
    def on_progress(step, steps, metrics):
        if step == 3:
            raise StopHereError

    with pytest.raises(StopHereError):
        train(settings(micro), tmp_path, on_progress=on_progress)
    (tmp_path / "experience.db").write_bytes(b"\xa5" * 9000)
    train(settings(micro), tmp_path)
    assert weights(tmp_path) == weights(in_turn)
    assert list(tmp_path.glob("experience.db.corrupt-*"))


def test_branching_off_another_run_goes_on_as_that_one_did(micro, in_turn, tmp_path):
    branch = tmp_path / "branch"
    source = in_turn / "checkpoints" / "step_000002"
    train(settings(micro), branch, resume=str(source))
    assert weights(branch) == weights(in_turn)
    assert (branch / "metrics.jsonl").read_bytes() == (in_turn / "metrics.jsonl").read_bytes()


def test_beginning_anew_is_possible_and_keeps_the_old_run(micro, in_turn, tmp_path):
    train(settings(micro, seed=1, steps=2), tmp_path)
    with pytest.raises(ConfigError, match="`seed` was 1"):
        train(settings(micro), tmp_path)
    train(settings(micro), tmp_path, resume="never")
    assert weights(tmp_path) == weights(in_turn)
    assert (tmp_path / "before-1" / "policy" / "model.safetensors").is_file()


def test_the_best_checkpoint_is_by_evaluation_where_there_is_one(micro, tmp_path):
    train(settings(micro, eval_episodes=6, keep_checkpoints=9), tmp_path)
    lines = {line["step"]: line for line in read_metrics(tmp_path / "metrics.jsonl")}
    assert ["eval_success" in lines[step] for step in (1, 2, 3, 4)] == [False, True, False, True]
    for path in checkpoint.steps_in(tmp_path / "checkpoints"):
        score = json.loads((path / "manifest.json").read_text())["score"]
        assert score == lines[checkpoint.step_of(path)]["eval_success"]


def test_without_evaluation_it_is_by_the_mean_reward_since_the_last(in_turn):
    lines = read_metrics(in_turn / "metrics.jsonl")
    for path in checkpoint.steps_in(in_turn / "checkpoints"):
        step = checkpoint.step_of(path)
        score = json.loads((path / "manifest.json").read_text())["score"]
        assert score == (lines[step - 2]["reward"] + lines[step - 1]["reward"]) / 2


def test_an_explorer_with_other_settings_is_refused_by_name(micro, in_turn):
    with pytest.raises(ConfigError, match="`group_size` was 4"):
        explore(settings(micro, group_size=3), in_turn)


def test_the_interval_of_a_share_is_wilsons():
    low, high = wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 1.0


PAIR = """
import importlib.util, os, signal, sys, time
from pathlib import Path
source, model, folder = sys.argv[1:]
folder = Path(folder)
spec = importlib.util.spec_from_file_location("toy", source)
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)
import pz_agents.training.trl_learner
import pz_envs.catalog
from pz_agents.training.modes import train_only
pz_envs.catalog.make_env = lambda env_id, **kwargs: toy.ParityEnv()
chosen = toy.settings(model)

# Nothing outlives a test that hangs.
signal.alarm(240)

def start(work):
    pid = os.fork()
    if pid == 0:
        signal.alarm(240)
        work()
        os._exit(0)
    return pid

def code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

trainer = start(lambda: train_only(chosen, folder))
explorer = start(lambda: toy.explore(chosen, folder))
for step in (1, 2):
    while len(toy.read_metrics(folder / "metrics.jsonl")) < step:
        time.sleep(0.002)
    os.kill(explorer, signal.SIGKILL)
    print(code(explorer), flush=True)
    explorer = start(lambda: toy.explore(chosen, folder))
print(code(trainer), code(explorer))
"""


@pytest.mark.slow
def test_two_processes_train_together_and_killed_explorers_change_nothing(micro, in_turn, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PAIR, __file__, str(micro), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.stdout.split() == ["-9", "-9", "0", "0"], done.stderr
    assert weights(tmp_path) == weights(in_turn)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (in_turn / "metrics.jsonl").read_bytes()
    with ExperienceStore(tmp_path / "experience.db") as store:
        counts = store.counts()
    assert (counts["consumed"], counts["new"], counts["dropped"]) == (4 * GROUPS, 0, 0)
    assert counts["trajectories"] == 4 * GROUPS * 4


@pytest.mark.slow
def test_both_starts_an_explorer_that_plays_ahead_and_ends_with_the_run(micro, tmp_path):
    # The child process plays the real environment.
    chosen = settings(micro, max_staleness=2, sampling="priority", steps=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        train_both(chosen, tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["staleness"] <= 2 for line in lines)
    assert all(len(steps) == 1 for steps in uses_of(tmp_path).values())
    # Nobody holds the store any more.
    ExperienceStore(tmp_path / "experience.db").close()


@pytest.mark.slow
def test_an_explorer_that_keeps_dying_ends_the_run_with_its_reason(micro, tmp_path, monkeypatch):
    monkeypatch.setattr("pz_agents.training.modes._CHILD", "import sys; sys.exit('no engine')")
    with pytest.raises(InfraError, match=r"3 times without a new group"):
        train_both(settings(micro, max_staleness=1), tmp_path)
    assert (tmp_path / "explorer.log").read_text().count("no engine") == 3
