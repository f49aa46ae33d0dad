"""What every plot of a leaderboard shares: ink, colours, axes, and bytes that do not change.

No dates, a fixed salt for SVG ids, matplotlib's own font and defaults, no global state. Colours
follow rows, anchors are grey.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from pz_bench.report.leaderboard import Leaderboard

MOST_ROWS = 12
"""Rows drawn in one panel, anchors apart; the best are, the tables hold all."""

# Okabe and Ito's colours that keep their contrast on white and on black.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_ANCHORS = {"random": "#9aa3ad", "expert": "#717b87"}
INK = "#1f2933"
RULE = "#8a94a0"
_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))


@dataclass(frozen=True, slots=True)
class Panel:
    """One small plot as an ``<svg>`` element, and what it shows, for those who cannot see it."""

    svg: str
    alt: str


def colours(board: Leaderboard) -> dict[str, str]:
    """Return label -> colour; a row keeps its colour when the ranks change."""
    own = sorted(row.label for row in board.rows if not row.anchor)
    found = {label: _COLOURS[place % len(_COLOURS)] for place, label in enumerate(own)}
    return found | {row.label: _ANCHORS[row.algorithm] for row in board.rows if row.anchor}


def dashes(board: Leaderboard) -> dict[str, Any]:
    """Return label -> line style, so that rows that share a colour can be told apart."""
    own = sorted(row.label for row in board.rows)
    return {label: _DASHES[place // len(_COLOURS) % 3] for place, label in enumerate(own)}


def ticks(low: float, high: float) -> list[float]:
    """Return about three round numbers between the ends of a logarithmic axis."""
    tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        found = [
            step * 10.0**ten for ten in tens for step in steps if low <= step * 10.0**ten <= high
        ]
        if len(found) >= 3:
            break
    return found


def finish(axes: Any, title: str, grid: str) -> None:
    """Give axes a title, a quiet grid along ``grid``, and no frame."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.grid(axis=grid, color=RULE, alpha=0.3, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8.5, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.patch.set_alpha(0)


@contextlib.contextmanager
def style(salt: str, text: str) -> Iterator[None]:
    """Draw with matplotlib's own defaults, whatever this machine's configuration says."""
    defaults = {key: each for key, each in matplotlib.rcParamsDefault.items() if key != "backend"}
    own = {
        "svg.hashsalt": salt,
        "svg.fonttype": text,
        "font.family": "DejaVu Sans",
        "hatch.linewidth": 0.8,
    }
    with matplotlib.rc_context(defaults | own):
        yield


def svg(figure: Figure) -> bytes:
    """Return the figure as SVG, without date and version."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "pz-bench"})
    return buffer.getvalue()


def png(figure: Figure) -> bytes:
    """Return the figure as PNG, without date and version."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def element(figure: Figure) -> str:
    """Return a figure as an element of a page: its ink is the page's, its size the column's.

    To be called inside ``style``.
    """
    figure.patch.set_alpha(0)
    text = svg(figure).decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = text.replace("'DejaVu Sans'", "system-ui, sans-serif")
    return text.replace(INK, "currentColor")
