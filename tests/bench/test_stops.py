"""``pz-bench run`` that SIGTERM ends: its exit status, what it leaves, the same command again."""

from __future__ import annotations

import csv
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from pz_bench import store

AGENT = """
import os
import time
from pathlib import Path

HELD = Path(__file__).with_name("held")


class Mine:
    def __init__(self):
        self.calls = 0

    def act(self, turns):
        # The third call never ends while there is a file `held`.
        self.calls += 1
        while self.calls >= 3 and HELD.exists():
            HELD.with_name(f"reached-{os.getpid()}").touch()
            time.sleep(0.02)
        return [f"<answer>{turn.seed % 97}</answer>" for turn in turns]
"""


def start(folder: Path, runs: Path) -> subprocess.Popen[str]:
    """Begin to measure two cells of 40 episodes, both at once."""
    words = ["-m", "pz_bench.cli", "run", "-a", f"{folder / 'mine.py'}:Mine", "--suite", "mine"]
    words += ["-e", "pz/Countdown-v0", "-n", "40", "--seeds", "0,1", "--jobs", "2"]
    words += ["--runs", str(runs), "--out", str(runs.with_name(f"{runs.name}-out"))]
    return subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def measured(runs: Path) -> list[Any]:
    """Return what two runs of the same cells agree on."""
    return [
        (result.id, result.status, [replace(each, seconds=0.0) for each in result.episodes])
        for result in store.load(runs)
    ]


def tables(runs: Path) -> dict[str, Any]:
    """Return the files of the leaderboard but for how long episodes took."""
    out = runs.with_name(f"{runs.name}-out")
    found: dict[str, Any] = {path.name: path.read_bytes() for path in out.iterdir()}
    rows = list(csv.DictReader(found["mine.csv"].decode().splitlines()))
    found["mine.csv"] = [row | {"seconds": ""} for row in rows]
    found["mine.json"] = re.sub(rb'"seconds": [0-9.]+', b"", found["mine.json"])
    return found


def test_sigterm_ends_all_cells_with_143_and_the_same_command_makes_the_same_tables(tmp_path):
    (tmp_path / "mine.py").write_text(AGENT)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = start(tmp_path, whole)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors

    (tmp_path / "held").touch()
    process = start(tmp_path, cut)
    try:
        give_up = time.monotonic() + 120
        while len(reached := list(tmp_path.glob("reached-*"))) < 2:
            assert time.monotonic() < give_up
            time.sleep(0.02)
        cells = [int(path.name.partition("-")[2]) for path in reached]
        assert process.pid not in cells
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "the same command goes on from here" in errors
    assert not any(map(is_alive, cells))
    assert [path.read_text() for path in cut.glob("*/lock")] == ["", ""]
    left = {result.id: result.episodes for result in store.load(cut)}
    assert [status for _, status, _ in measured(cut)] == ["partial", "partial"]
    assert all(0 < len(episodes) < 40 for episodes in left.values())

    (tmp_path / "held").unlink()
    process = start(tmp_path, cut)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert measured(cut) == measured(whole)
    for result in store.load(cut):
        played = {each.episode: each for each in result.episodes}
        assert [played[each.episode] for each in left[result.id]] == list(left[result.id])
    assert tables(cut) == tables(whole)
    assert {"mine.csv", "mine.json", "mine.md", "mine.html"} <= tables(cut).keys()
    assert store.verify(cut) == []
