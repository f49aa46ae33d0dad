"""Leaderboards as files and on the terminal, from finished cells.

``build`` computes, ``write`` and ``render_terminal`` only lay out. The same cells give the same
bytes in every file: no date, no folder of this machine, one order, numbers rounded once.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pz_bench.report.leaderboard import Leaderboard, Row, build
from pz_bench.report.terminal import render_terminal
from pz_bench.scores import Score
from pz_envs.files import write_atomic

__all__ = ["Leaderboard", "build", "files", "render_terminal", "write"]

_ROW_COLUMNS = ("rank", "label", "algorithm", "model", "anchor", "trained", "tiny")


def write(board: Leaderboard, folder: Path) -> list[Path]:
    """Write every file of the leaderboard into ``folder`` and return their paths, in order."""
    written = []
    for name, content in files(board).items():
        write_atomic(folder / name, content)
        written.append(folder / name)
    return written


def files(board: Leaderboard) -> dict[str, bytes]:
    """Return file name -> bytes: Markdown, CSV, JSON, HTML and the plots."""
    from pz_bench.report import html, markdown, plots

    drawn = plots.files(board)
    pictures = [name for name in drawn if name.endswith(".svg")]
    texts = {
        "md": markdown.render(board, pictures),
        "csv": as_csv(board),
        "json": as_json(board),
        "html": html.render(board),
    }
    named = {f"{board.suite}.{kind}": text.encode("utf-8") for kind, text in texts.items()}
    return named | drawn


def as_json(board: Leaderboard) -> str:
    """Return all of the leaderboard as JSON, shares in 0..1."""
    return json.dumps(asdict(board), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def as_csv(board: Leaderboard) -> str:
    """Return one line for each row and environment, and one for each macro mean.

    Shares are in 0..1; what has no number is empty. The macro mean's environment is
    ``macro mean``.
    """
    own = [field.name for field in fields(Score)]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*_ROW_COLUMNS, *own], lineterminator="\n")
    writer.writeheader()
    for row in board.rows:
        head = {column: getattr(row, column) for column in _ROW_COLUMNS}
        writer.writerow(head | _macro_line(row))
        for score in row.scores:
            line = asdict(score)
            line["seeds"] = " ".join(map(str, score.seeds))
            line["pass_at"] = " ".join(f"{k}:{share}" for k, share in score.pass_at)
            writer.writerow(head | line)
    return buffer.getvalue()


def _macro_line(row: Row) -> dict[str, Any]:
    line: dict[str, Any] = {"environment": "macro mean", "reason": row.reason}
    if row.macro is None:
        return line | {"status": "unranked"}
    macro = row.macro
    return line | {
        "status": "ranked",
        "value": macro.mean,
        "low": macro.low,
        "high": macro.high,
        "interval": "bootstrap",
    }
