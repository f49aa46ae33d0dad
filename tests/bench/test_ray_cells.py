"""Cells through a runtime: the same files as on one machine, and a run that goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from pz_agents.runtime import Resources, open_runtime, ray_runtime
from pz_bench import runner, store
from pz_bench.cell import CellSpec
from pz_bench.ray_cells import Launcher, resources

AGENT = """
import os, time

class Mine:
    def __init__(self, seconds=0.0, die=False):
        self.seconds, self.die = seconds, die

    def act(self, turns):
        if self.die:
            print("about to die", flush=True)
            os.kill(os.getpid(), 9)
        time.sleep(self.seconds)
        return [f"<answer>{turn.seed % 97}</answer>" for turn in turns]
"""


@pytest.fixture
def agent(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(AGENT)
    return path


def spec(agent, **changes):
    values = {"algorithm": f"{agent}:Mine", "env": "pz/Countdown-v0", "episodes": 4}
    return CellSpec(**(values | changes))


def ignore(board, ended):
    pass


def played(runs):
    return [
        (result.id, [replace(episode, seconds=0.0) for episode in result.episodes])
        for result in store.load(runs)
    ]


def run(runs, specs, launch=None):
    jobs = runner.plan(runs, specs)
    runner.run_jobs(runs, jobs, workers=2, view=ignore, launch=launch)
    return jobs


def wait_for(condition, seconds=90.0):
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "waited too long"
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["local", "ray"])
def test_cells_in_actors_leave_the_files_of_cells_in_processes(tmp_path, agent, name):
    if name == "ray":
        pytest.importorskip("ray", reason="needs pz-agents[ray]")
    good = [spec(agent, seed=seed) for seed in (0, 1)]
    crash = spec(agent, agent_kwargs={"die": True})
    run(tmp_path / "here", good)
    with contextlib.closing(open_runtime(name, cpus=2)) as runtime:
        jobs = run(tmp_path / "there", [*good, crash], Launcher(runtime))
    assert [job.state for job in jobs] == ["done", "done", "failed"]
    assert jobs[2].attempts == 2
    assert "SIGKILL" in jobs[2].reason
    assert "about to die" in jobs[2].reason
    there = [cell for cell in played(tmp_path / "there") if cell[0] != crash.id]
    assert there == played(tmp_path / "here")
    assert store.verify(tmp_path / "there") == []
    names = [
        {path.name for path in (tmp_path / place / good[0].id).iterdir()}
        for place in ("here", "there")
    ]
    assert names[0] == names[1]


@pytest.mark.slow
def test_the_command_is_interrupted_on_ray_and_goes_on_without_it(tmp_path, agent):
    pytest.importorskip("ray", reason="needs pz-agents[ray]")
    cell = spec(agent, episodes=60, agent_kwargs={"seconds": 0.3})
    runs = tmp_path / "runs"
    command = [sys.executable, "-c", "import sys; from pz_bench.cli import main; sys.exit(main())"]
    options = ["run", "--agent", cell.algorithm, "--env", cell.env, "--episodes", "60"]
    options += ["--set", "rows.0.agent_kwargs.seconds=0.3"]
    options += ["--runs", str(runs), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, *options, "--ray", "local"], env={**os.environ, "COLUMNS": "120"}
    )
    try:
        wait_for(
            lambda: any(f.read_bytes().count(b"\n") > 2 for f in runs.glob("*/episodes.jsonl"))
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 130
    finally:
        process.kill()
        process.wait()
    (result,) = store.load(runs)
    assert result.status == "partial"
    assert 0 < len(result.episodes) < 60
    folder = runs / result.id
    assert (folder / "lock").read_text() == ""
    (job,) = run(runs, [result.spec], None)
    assert job.state == "done"
    before = result.episodes
    (result,) = store.load(runs)
    # Episodes are played several at once: those that were done need not be the first ones.
    done = {each.episode for each in before}
    assert [each for each in result.episodes if each.episode in done] == list(before)
    assert len(result.episodes) == 60


def test_a_cell_asks_for_the_gpus_that_there_are(agent):
    big = CellSpec(algorithm="zeroshot", env="pz/Countdown-v0", model="Org/Model-7B", episodes=1)
    assert resources(big, Resources(cpus=8, gpus=4)).gpus >= 1
    assert resources(big, Resources(cpus=8)) == Resources(cpus=1.0, gpus=0.0)
    assert resources(spec(agent), Resources(cpus=8, gpus=4)) == Resources(cpus=1.0)


def test_the_option_names_a_runtime():
    assert [ray_runtime(text) for text in ("local", "auto", "10.0.0.1:6379")] == [
        "ray",
        "ray:auto",
        "ray:10.0.0.1:6379",
    ]
