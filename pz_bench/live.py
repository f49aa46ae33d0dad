"""How a run looks while it runs: a live table on a terminal, one line an event elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pz_bench.runner import Board, Job, View

_RECENT = 6
_STYLES = {"done": "green", "failed": "red", "not_run": "yellow", "locked": "yellow"}


@contextmanager
def view(console: Console) -> Iterator[View]:
    """Yield a view that suits ``console``; a live one is gone when the block ends."""
    if not console.is_terminal:
        yield lambda board, ended: _say(console, board, ended)
        return
    recent: deque[Job] = deque(maxlen=_RECENT)
    with Live(console=console, refresh_per_second=4, transient=True) as live:

        def show(board: Board, ended: Job | None) -> None:
            if ended is not None:
                recent.append(ended)
            live.update(table(board, list(recent)))

        yield show


def table(board: Board, recent: list[Job]) -> Group:
    """Return the live view: a head line, the running cells with bars, and what ended last."""
    rows = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    if board.building is not None:
        rows.add_row("the model tiny, once", *_bar(board.building))
    for job in board.jobs:
        if job.state == "running":
            rows.add_row(escape(job.spec.title), *_bar(job.progress), f"{job.seconds:.0f} s")
    lines = [Text(line(job), style=_STYLES.get(job.state, "")) for job in recent]
    return Group(Text(head(board), style="bold"), rows, *lines)


def _bar(progress: Mapping[str, Any]) -> tuple[str, ProgressBar, str]:
    done, total = progress.get("done", 0), progress.get("total", 0)
    bar = ProgressBar(total=total or 1, completed=done, width=20)
    return str(progress.get("phase", "starting")), bar, f"{done}/{total}"


def head(board: Board) -> str:
    """Return where the whole run stands, in one line."""
    counts = board.counts()
    names = ("done", "running", "owed", "failed", "locked", "not_run")
    parts = [f"{counts[name]} {name.replace('_', ' ')}" for name in names if counts[name]]
    return f"{len(board.jobs)} cells: {', '.join(parts)}  ({time.monotonic() - board.began:.0f} s)"


def line(job: Job) -> str:
    """Return one line on a job that has ended."""
    reason = "" if job.reason is None else f": {job.reason}"
    return f"{job.state.replace('_', ' '):7} {job.spec.title} ({job.seconds:.1f} s){reason}"


def _say(console: Console, board: Board, ended: Job | None) -> None:
    if ended is not None:
        counts = board.counts()
        settled = len(board.jobs) - counts["owed"] - counts["running"]
        text = f"[{settled}/{len(board.jobs)}] {line(ended)}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
