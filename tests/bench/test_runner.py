import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pz_bench import runner, store
from pz_bench.cell import CellSpec
from pz_bench.lock import FolderLock

AGENT = """
import os, time

class Mine:
    def __init__(self, seconds=0.0, die=False, mark=None):
        self.seconds, self.die, self.mark = seconds, die, mark

    def act(self, turns):
        if self.die:
            if self.mark is None or not os.path.exists(self.mark):
                if self.mark is not None:
                    open(self.mark, "w").close()
                print("about to die", flush=True)
                os.kill(os.getpid(), 9)
        time.sleep(self.seconds)
        return [f"<answer>{turn.seed % 97}</answer>" for turn in turns]

def breaks(observation, info):
    raise ValueError("no idea")
"""


@pytest.fixture
def agent(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(AGENT)
    return path


def spec(agent, name="Mine", **changes):
    values = {"algorithm": f"{agent}:{name}", "env": "pz/Countdown-v0", "episodes": 4}
    return CellSpec(**(values | changes))


def ignore(board, ended):
    pass


def run(runs, specs, **options):
    jobs = runner.plan(runs, specs, **options)
    runner.run_jobs(runs, jobs, workers=2, view=ignore)
    return jobs


def played(runs):
    """Everything that two runs of the same cells must agree on."""
    return [
        (result.id, [replace(episode, seconds=0.0) for episode in result.episodes])
        for result in store.load(runs)
    ]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(condition, seconds=30.0):
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "waited too long"
        time.sleep(0.02)


def start(runs, specs, workers=1):
    """Run cells in a process of their own, as a person would."""
    code = (
        "import sys, pathlib\n"
        "from pz_bench import runner\n"
        "from pz_bench.cell import CellSpec\n"
        "runs = pathlib.Path(sys.argv[1])\n"
        "jobs = runner.plan(runs, [CellSpec.model_validate_json(t) for t in sys.argv[3:]])\n"
        "runner.run_jobs(runs, jobs, workers=int(sys.argv[2]), view=lambda board, ended: None)\n"
    )
    texts = [each.model_dump_json() for each in specs]
    return subprocess.Popen([sys.executable, "-c", code, str(runs), str(workers), *texts])


def test_real_cells_are_measured_once_and_then_owed_no_more(tmp_path):
    runs = tmp_path / "runs"
    specs = [
        CellSpec(algorithm=name, env="pz/Countdown-v0", episodes=5, seed=seed)
        for name in ("random", "expert")
        for seed in (0, 1)
    ]
    assert [job.state for job in run(runs, specs)] == ["done"] * 4
    results = {(each.spec.algorithm, each.spec.seed): each for each in store.load(runs)}
    assert all(episode.success for episode in results["expert", 0].episodes)
    tasks = {tuple(e.task_id for e in result.episodes) for result in results.values()}
    assert len(tasks) == 1, "instances are shared by algorithms and seeds"
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    assert [job.state for job in run(runs, specs)] == ["done"] * 4
    assert before == {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    assert store.verify(runs) == []


def test_a_run_killed_in_the_middle_goes_on_to_the_same_episodes(tmp_path, agent):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    cell = spec(agent, episodes=40, agent_kwargs={"seconds": 0.15})
    run(whole, [cell])
    process = start(killed, [cell])
    lines = killed / cell.id / store.EPISODES
    wait_for(lambda: lines.exists() and lines.read_bytes().count(b"\n") >= 3)
    child = _writer(killed / cell.id)
    process.kill()
    process.wait()
    wait_for(lambda: not is_alive(child), 5.0)
    left = lines.read_bytes()
    assert left.count(b"\n") < 40
    with lines.open("ab") as file:
        file.write(b'{"episode": 39, "env_se')
    (job,) = run(killed, [cell])
    assert job.state == "done"
    assert played(killed) == played(whole)
    assert lines.read_bytes().startswith(left[: left.rfind(b"\n") + 1])
    assert store.verify(killed) == []


def _writer(folder):
    import json

    return json.loads((folder / "lock").read_text())["pid"]


def test_an_interrupted_run_saves_its_state_and_ends_its_children(tmp_path, agent):
    runs = tmp_path / "runs"
    cell = spec(agent, episodes=40, agent_kwargs={"seconds": 0.3})
    process = start(runs, [cell])
    lines = runs / cell.id / store.EPISODES
    wait_for(lambda: lines.exists() and lines.read_bytes().count(b"\n") >= 1)
    child = _writer(runs / cell.id)
    process.send_signal(signal.SIGINT)
    process.wait(15)
    assert not is_alive(child)
    (result,) = store.load(runs)
    assert result.status == "partial"
    assert 0 < len(result.episodes) < 40
    assert result.seconds > 0
    assert (runs / cell.id / "lock").read_text() == ""


def test_a_cell_that_crashes_twice_is_failed_with_the_end_of_its_log(tmp_path, agent):
    runs = tmp_path / "runs"
    crash = spec(agent, agent_kwargs={"die": True})
    crashed, fine = run(runs, [crash, spec(agent)])
    assert (crashed.state, fine.state) == ("failed", "done")
    assert "SIGKILL" in crashed.reason
    assert "about to die" in crashed.reason
    assert (runs / crash.id / "log.txt").read_text().count("about to die") == 2
    assert [job.state for job in runner.plan(runs, [crash])] == ["failed"]
    assert [job.state for job in runner.plan(runs, [crash], retry_failed=True)] == ["owed"]


def test_a_cell_that_crashes_once_is_tried_again(tmp_path, agent):
    mark = str(tmp_path / "mark")
    (job,) = run(tmp_path / "runs", [spec(agent, agent_kwargs={"die": True, "mark": mark})])
    assert (job.state, job.attempts) == ("done", 2)


def test_a_wrong_argument_fails_at_once_and_says_what_is_allowed(tmp_path, agent):
    (job,) = run(tmp_path / "runs", [spec(agent, agent_kwargs={"secnds": 1})])
    assert (job.state, job.attempts) == ("failed", 1)
    assert "Did you mean `seconds`" in job.reason


def test_a_cell_in_which_every_episode_fails_is_failed_and_keeps_them(tmp_path, agent):
    runs = tmp_path / "runs"
    (job,) = run(runs, [spec(agent, "breaks")])
    assert job.state == "failed"
    assert "no idea" in job.reason
    (result,) = store.load(runs)
    assert [episode.status for episode in result.episodes] == ["failed"] * 4
    agent.write_text(AGENT.replace('raise ValueError("no idea")', 'return "1"'))
    assert [job.state for job in run(runs, [spec(agent, "breaks")])] == ["done"]


def test_a_cell_whose_agent_was_edited_after_planning_is_not_measured_under_the_old_id(
    tmp_path, agent
):
    runs = tmp_path / "runs"
    jobs = runner.plan(runs, [spec(agent)])
    agent.write_text(AGENT + "\nx = 1\n")
    runner.run_jobs(runs, jobs, workers=1, view=ignore)
    assert jobs[0].state == "failed"
    assert "agent of this cell changed" in jobs[0].reason
    assert store.load(runs)[0].episodes == ()
    assert [job.state for job in run(runs, [spec(agent)])] == ["done"]


def test_retrying_measures_failed_episodes_again(tmp_path, agent):
    runs = tmp_path / "runs"
    switch = tmp_path / "works"
    agent.write_text(
        "import pathlib\n"
        "def flaky(observation, info):\n"
        f"    if not pathlib.Path({str(switch)!r}).exists(): raise ValueError('down')\n"
        "    return '1'\n"
    )
    cell = spec(agent, "flaky")
    assert [job.state for job in run(runs, [cell])] == ["failed"]
    switch.touch()
    assert [job.state for job in run(runs, [cell])] == ["failed"]
    assert [job.state for job in run(runs, [cell], retry_failed=True)] == ["done"]
    (result,) = store.load(runs)
    assert {episode.status for episode in result.episodes} == {"ok"}


def test_a_cell_that_another_process_measures_is_left_to_it(tmp_path, agent):
    runs = tmp_path / "runs"
    with FolderLock(runs / spec(agent).id):
        (job,) = run(runs, [spec(agent)])
    assert job.state == "locked"
    assert [job.state for job in run(runs, [spec(agent)])] == ["done"]


def test_a_game_without_its_story_is_not_run_and_the_command_is_given(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("PZ_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PZ_CACHE", str(tmp_path / "cache"))
    (job,) = runner.plan(tmp_path / "runs", [CellSpec(algorithm="random", env="pz/Detective-v0")])
    assert job.state == "not_run"
    assert job.reason.endswith("is not here.")
    assert job.command == "pz-envs data get jericho/detective.z5"


def test_the_longest_cells_go_first(agent):
    grpo = CellSpec(algorithm="grpo", env="pz/Countdown-v0", model="tiny", episodes=1)
    model = CellSpec(algorithm="zeroshot", env="pz/Countdown-v0", model="tiny", episodes=10)
    plain = CellSpec(algorithm="random", env="pz/Countdown-v0", episodes=10)
    ordered = sorted([plain, model, grpo], key=runner.expected_cost, reverse=True)
    assert ordered == [grpo, model, plain]


@pytest.mark.slow
def test_a_trained_cell_trains_then_plays_and_keeps_how_it_went(tmp_path):
    runs = tmp_path / "runs"
    cell = CellSpec(
        algorithm="grpo",
        env="pz/Countdown-v0",
        model="tiny",
        episodes=4,
        max_turns=1,
        env_kwargs={"numbers": [3], "max_number": 20},
        train={"preset": "tiny-countdown", "steps": 2, "groups_per_step": 2, "group_size": 2},
    )
    start_model = cell.model_copy(update={"algorithm": "zeroshot", "train": {}})
    trained, untrained = run(runs, [cell, start_model])
    assert (trained.state, untrained.state) == ("done", "done"), (trained.reason, untrained.reason)
    result = store.read_result(runs / cell.id)
    assert result.train_metrics["steps"] == 2
    assert result.train_metrics["last"]["step"] == 2
    assert all(episode.sampled_tokens > 0 for episode in result.episodes)
    assert store.verify(runs) == []
