"""A matrix killed twice, once with SIGKILL: nothing lost, nothing left running, the same tables.

The agent stops in the middle of a run until a gate is opened, so what is killed is never done, on
however slow a machine.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

AGENT = """
import os, pathlib, time

class Gated:
    needs_admissible_commands = True

    def __init__(self):
        self.answered = 0

    def act(self, turns):
        while self.answered >= 150 and not pathlib.Path(os.environ["GATE"]).exists():
            time.sleep(0.02)
        self.answered += len(turns)
        return [self.choose(turn) for turn in turns]

    def choose(self, turn):
        commands = turn.info["admissible_commands"]
        return commands[turn.seed % len(commands)]
"""
MATRIX = """
name: small
title: Killed twice
seeds: [0, 1]
defaults: {episodes: 100, max_turns: 8}
rows:
  - {algorithms: ["./mine.py:Gated", random], environments: [pz/NumberLine-v0]}
"""
EPISODES = 100
RUN = ("run", "--matrix", "./small.yaml", "-j", "4")
PATIENCE = 120.0


def start(folder: Path, *words: str, **environment: str) -> subprocess.Popen[bytes]:
    """Run ``pz-bench`` as a person would, in a folder and a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pz_bench.cli", *words],
        cwd=folder,
        env={**os.environ, "GATE": str(folder / "open"), **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, error.decode()


def wait_for(condition) -> None:
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up, "waited too long"
        time.sleep(0.02)


def made(folder: Path) -> Path:
    folder.mkdir()
    (folder / "mine.py").write_text(AGENT)
    (folder / "small.yaml").write_text(MATRIX)
    return folder


def gated(folder: Path) -> list[Path]:
    """Return the folders of the cells that wait at the gate."""
    cells = sorted(folder.glob("runs/*/cell.json"))
    return [
        each.parent
        for each in cells
        if "Gated" in json.loads(each.read_text())["spec"]["algorithm"]
    ]


def lines(cell: Path) -> int:
    path = cell / "episodes.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def text_of(cell: Path) -> bytes:
    return (cell / "episodes.jsonl").read_bytes()


def writer(cell: Path) -> int | None:
    """Return the process that a cell's lock names, None when it is free."""
    text = (cell / "lock").read_text() if (cell / "lock").exists() else ""
    return int(json.loads(text)["pid"]) if text else None


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def tables(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "leaderboards").iterdir())}


def kill_in_the_middle(folder: Path, blow: signal.Signals) -> list[Path]:
    """Run the matrix until each waiting cell has more episodes, then end it; returns the cells."""
    had = {cell: lines(cell) for cell in gated(folder)}
    process = start(folder, *RUN)
    wait_for(lambda: len(gated(folder)) == 2)
    cells = gated(folder)
    wait_for(lambda: all(lines(cell) >= had.get(cell, 0) + 10 for cell in cells))
    wait_for(lambda: all(map(writer, cells)))
    writers = [writer(cell) for cell in cells]
    process.send_signal(blow)
    process.communicate(timeout=PATIENCE)
    wait_for(lambda: not any(map(is_alive, writers)))
    left = writers if blow == signal.SIGKILL else [None, None]
    assert [writer(cell) for cell in cells] == left, "only who was killed leaves a lock behind"
    assert all(lines(cell) < EPISODES for cell in cells)
    assert not (folder / "leaderboards").exists()
    return cells


def test_killed_twice_and_rebuilt_elsewhere_the_tables_are_the_same_bytes(tmp_path):
    here = made(tmp_path / "killed")
    first = {cell: text_of(cell) for cell in kill_in_the_middle(here, signal.SIGKILL)}
    second = {cell: text_of(cell) for cell in kill_in_the_middle(here, signal.SIGINT)}
    (here / "open").touch()
    finish(start(here, *RUN))
    for cell, text in first.items():
        assert second[cell].startswith(text)
        assert text_of(cell).startswith(second[cell])
        assert lines(cell) == EPISODES
    found = tables(here)

    whole = made(tmp_path / "whole")
    (whole / "open").touch()
    finish(start(whole, *RUN))
    # The other forms have the episodes' wall clock beside the scores.
    assert tables(whole)["small.md"] == found["small.md"]

    other = tmp_path / "other"
    other.mkdir()
    (here / "runs").rename(other / "runs")
    shutil.rmtree(here)
    nothing = {name: str(other / name.lower()) for name in ("HOME", "PZ_CACHE", "PZ_DATA")}
    finish(start(other, "report", **nothing))
    assert tables(other) == found
    assert {"small.md", "small.csv", "small.json", "small.html"} <= found.keys()
