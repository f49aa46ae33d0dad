"""``pz-bench watch``: how a store's cells stand, from its files alone.

It needs no contact with the run: any process that can read the folder can watch, on this machine or
over a shared disk, and a run is never slowed by it. A finished cell is read once, a running one
only when its files have grown.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pz_bench import store
from pz_bench.cell_process import PROGRESS
from pz_bench.lock import holder
from pz_bench.narrow import Fitted
from pz_envs.errors import DataError

_TAIL_BYTES = 16_384
_STYLES = {"running": "bold", "done": "green", "failed": "red", "not_run": "yellow"}
_ORDER = ("running", "failed", "owed", "done", "not_run")
_COLUMNS = ("state", "cell", "progress", "left", "score %", "success %", "training")
_LESS = ("training", "success %", "left", "score %")
_METRICS = ("score", "success", "reward", "loss", "kl")


@dataclass(frozen=True, slots=True)
class CellView:
    """One cell as its files show it.

    ``phase``, ``at`` and ``to`` say how far a running cell is; ``eta_seconds`` is what is left of
    the phase at the speed so far. ``score`` is the mean normalised score and ``success`` the
    success rate of the episodes so far, None before the first. ``metrics`` is the last line of its
    training metrics.
    """

    id: str
    title: str
    state: str
    phase: str
    at: int
    to: int
    eta_seconds: float | None
    score: float | None
    success: float | None
    metrics: Mapping[str, Any]


def look(runs: Path, suite: str | None = None) -> list[CellView]:
    """Return every cell of a suite, or of all suites, each once, in their order.

    Raises:
        ConfigError: the store has no such suite.
        DataError: a suite's file is broken.
    """
    names = store.suite_names(runs) if suite is None else (suite,)
    cells = {cell.id: cell for name in names for cell in store.read_suite(runs, name).cells}
    return [_cell(runs, cell) for cell in cells.values()]


def state(runs: Path, cell: store.SuiteCell | store.SuiteEntry) -> str:
    """Return how a suite's cell stands, ``running`` when a process is writing it now."""
    folder = store.cell_folder(runs, cell.id)
    if not (folder / store.CELL).exists():
        return "owed" if cell.reason is None else "not_run"
    found = store.read_status(folder)
    if found != "partial":
        return found
    return "owed" if holder(folder) is None else "running"


def to_json(cells: Sequence[CellView]) -> str:
    """Return one frame as JSON: counts by state, and the cells."""
    counts = Counter(cell.state for cell in cells)
    values = {"counts": counts, "cells": [asdict(cell) for cell in cells]}
    return json.dumps(values, indent=1, ensure_ascii=False, sort_keys=True)


def frame(cells: Sequence[CellView], lines: int) -> Group:
    """Return one frame for a terminal: the counts, then at most ``lines`` cells, running first."""
    counts = Counter(cell.state for cell in cells)
    parts = [f"{counts[name]} {name.replace('_', ' ')}" for name in _ORDER if counts[name]]
    head = f"{len(cells)} cells: {', '.join(parts) or 'none yet'}"
    ordered = sorted(cells, key=lambda cell: _ORDER.index(cell.state))
    rows = [_texts(cell) for cell in ordered[:lines]]

    def build(kept: Sequence[int], width: int | None) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for place in kept:
            cell = _COLUMNS[place] == "cell"
            table.add_column(_COLUMNS[place], no_wrap=not cell, max_width=width if cell else None)
        for row in rows:
            table.add_row(*(row[place] for place in kept))
        return table

    table = Fitted(_COLUMNS, tuple(_COLUMNS.index(name) for name in _LESS), build)
    more = len(ordered) - lines
    return Group(Text(head, style="bold"), table, *([Text(f"and {more} more")] if more > 0 else []))


def _texts(cell: CellView) -> tuple[Text, ...]:
    """Return a cell's line, a text a column."""
    return (
        Text(cell.state.replace("_", " "), style=_STYLES.get(cell.state, "")),
        Text(cell.title),
        Text(f"{cell.phase} {cell.at}/{cell.to}".strip()),
        Text(_left(cell.eta_seconds)),
        Text("" if cell.score is None else f"{100 * cell.score:.1f}"),
        Text("" if cell.success is None else f"{100 * cell.success:.1f}"),
        Text(_training(cell.metrics)),
    )


def _cell(runs: Path, cell: store.SuiteCell) -> CellView:
    folder = store.cell_folder(runs, cell.id)
    found = state(runs, cell)
    progress = _progress(folder) if found == "running" else {}
    played, score, success = _played(folder)
    at, to = int(progress.get("done", played)), int(progress.get("total", cell.spec.episodes))
    since, seconds = int(progress.get("from", 0)), float(progress.get("seconds", 0.0))
    left = seconds * (to - at) / (at - since) if at > since and seconds > 0 else None
    phase = str(progress.get("phase", ""))
    metrics = _last_line(folder / "train" / "metrics.jsonl")
    return CellView(cell.id, cell.spec.title, found, phase, at, to, left, score, success, metrics)


def _progress(folder: Path) -> Mapping[str, Any]:
    try:
        values = json.loads((folder / PROGRESS).read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _played(folder: Path) -> tuple[int, float | None, float | None]:
    path = folder / store.EPISODES
    try:
        size = path.stat().st_size
    except OSError:
        return 0, None, None
    return _summary(path, size)


@functools.lru_cache(maxsize=20_000)
def _summary(path: Path, size: int) -> tuple[int, float | None, float | None]:
    """Return (episodes, mean normalised score, success rate) of a log of ``size`` bytes."""
    try:
        episodes = store.read_episodes(path.parent)
    except DataError:
        return 0, None, None
    if not episodes:
        return 0, None, None
    good = [each for each in episodes if each.status == "ok"]
    score = sum(each.score_norm for each in good) / len(episodes)
    return len(episodes), score, sum(each.success for each in good) / len(episodes)


def _last_line(path: Path) -> Mapping[str, Any]:
    """Return the last whole line of a file of JSON lines, empty without one."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
        values = json.loads(lines[-1]) if lines else {}
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _training(metrics: Mapping[str, Any]) -> str:
    shown = [name for name in _METRICS if isinstance(metrics.get(name), int | float)]
    return ", ".join(f"{name} {metrics[name]:.3g}" for name in shown)


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes}:{rest:02}"
