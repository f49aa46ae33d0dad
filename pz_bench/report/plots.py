"""Plots of a leaderboard: scores with intervals, and score against sampled tokens.

The same leaderboard gives the same bytes: no dates, a fixed salt for SVG ids, matplotlib's own
font, and no global state. Colours follow rows, anchors are grey, and what is not ranked is hatched.
Every plot exists as one figure for files, and as one small figure a panel, whose ink takes the
page's text colour, for HTML.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from pz_bench.report import tables
from pz_bench.report.leaderboard import Environment, Leaderboard, Row

# Okabe and Ito's colours that keep their contrast on white and on black.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_ANCHORS = {"random": "#9aa3ad", "expert": "#717b87"}
_INK = "#1f2933"
_RULE = "#8a94a0"
_WIDTH = 4.6
_COST_HEIGHT = 2.9


@dataclass(frozen=True, slots=True)
class Panel:
    """One small plot as an ``<svg>`` element, and what it shows, for those who cannot see it."""

    svg: str
    alt: str


def files(board: Leaderboard) -> dict[str, bytes]:
    """Return file name -> bytes of every plot, as SVG and PNG."""
    found = {}
    with _style(board.suite, "path"):
        for name, figure in _figures(board):
            found[f"{board.suite}-{name}.svg"] = _svg(figure)
            found[f"{board.suite}-{name}.png"] = _png(figure)
    return found


def score_panel(board: Leaderboard, environment: Environment | None) -> Panel | None:
    """Return bars with intervals on one environment, or of the macro mean for None."""
    bars = _bars(board, environment)
    if not bars:
        return None
    svg = _inline(board, environment, _draw_bars, _bars_height(len(bars)))
    words = ", ".join(f"{bar.label} {tables.value(bar.value, bar.low, bar.high)}" for bar in bars)
    return Panel(svg, f"{_title(environment)}, percent: {words}")


def cost_panel(board: Leaderboard, environment: Environment) -> Panel | None:
    """Return score against sampled tokens on one environment; None when no row samples tokens."""
    points = _points(board, environment)
    if not points:
        return None
    svg = _inline(board, environment, _draw_cost, _COST_HEIGHT)
    words = ", ".join(
        f"{bar.label} {tables.percent(bar.value)} with {tables.amount(bar.tokens)} tokens"
        for bar in points
    )
    return Panel(svg, f"{_title(environment)} by sampled tokens: {words}")


@dataclass(frozen=True, slots=True)
class _Bar:
    label: str
    value: float
    low: float | None
    high: float | None
    ranked: bool
    anchor: bool
    tokens: float


def _bars(board: Leaderboard, environment: Environment | None) -> list[_Bar]:
    return [bar for row in board.rows if (bar := _bar(row, environment)) is not None]


def _bar(row: Row, environment: Environment | None) -> _Bar | None:
    if environment is None:
        if row.macro is None:
            return None
        macro = row.macro
        return _Bar(row.label, macro.mean, macro.low, macro.high, True, row.anchor, 0.0)
    score = row.score(environment.name)
    if score is None or score.value is None:
        return None
    ranked, tokens = score.status == "ranked", score.sampled_tokens or 0.0
    return _Bar(row.label, score.value, score.low, score.high, ranked, row.anchor, tokens)


def _points(board: Leaderboard, environment: Environment) -> list[_Bar]:
    return [bar for bar in _bars(board, environment) if bar.tokens > 0]


def _figures(board: Leaderboard) -> list[tuple[str, Figure]]:
    places: list[Environment | None] = [None, *board.environments]
    scored = [place for place in places if _bars(board, place)]
    sampled = [place for place in board.environments if _points(board, place)]
    found = []
    if scored:
        tallest = max(len(_bars(board, place)) for place in scored)
        found.append(("scores", _grid(board, scored, _draw_bars, _bars_height(tallest))))
    if sampled:
        found.append(("cost", _grid(board, sampled, _draw_cost, _COST_HEIGHT)))
    return found


def _grid(
    board: Leaderboard, places: Sequence[Environment | None], draw: Any, height: float
) -> Figure:
    """Return one figure with a panel a place, all of one size, placed without a layout engine."""
    columns = min(len(places), 2 if len(places) <= 8 else 4)
    lines = math.ceil(len(places) / columns)
    figure = Figure(figsize=(_WIDTH * columns, height * lines), facecolor="white")
    bars = draw is _draw_bars
    left, bottom = (_labels_width(board), 0.3) if bars else (0.45, 0.55)
    width, tall = _WIDTH - left - 0.12, height - bottom - 0.36
    for position, place in enumerate(places):
        across, down = position % columns, position // columns
        from_left = (across * _WIDTH + left) / (_WIDTH * columns)
        from_bottom = ((lines - 1 - down) * height + bottom) / (height * lines)
        size = (width / (_WIDTH * columns), tall / (height * lines))
        draw(figure.add_axes((from_left, from_bottom, *size)), board, place, _colours(board))
    return figure


def _labels_width(board: Leaderboard) -> float:
    """Return the inches that the longest row's name takes at the size it is drawn."""
    return min(2.4, 0.15 + 0.063 * max(len(row.label) for row in board.rows))


def _bars_height(bars: int) -> float:
    return 0.75 + 0.36 * bars


def _colours(board: Leaderboard) -> dict[str, str]:
    """Return label -> colour; a row keeps its colour when the ranks change."""
    own = sorted(row.label for row in board.rows if not row.anchor)
    colours = {label: _COLOURS[place % len(_COLOURS)] for place, label in enumerate(own)}
    return colours | {row.label: _ANCHORS[row.algorithm] for row in board.rows if row.anchor}


def _title(environment: Environment | None) -> str:
    if environment is None:
        return "Macro mean over families"
    return f"{environment.short}: {tables.metric_name(environment).lower()}"


def _draw_bars(
    axes: Any, board: Leaderboard, environment: Environment | None, colours: Mapping[str, str]
) -> None:
    bars = _bars(board, environment)
    places = range(len(bars))
    drawn = axes.barh(places, [100 * bar.value for bar in bars], height=0.62, linewidth=0.8)
    for bar, patch in zip(bars, drawn, strict=True):
        patch.set_edgecolor(colours[bar.label])
        patch.set_facecolor(colours[bar.label] if bar.ranked else "none")
        patch.set_hatch(None if bar.ranked else "////")
    axes.errorbar(
        [100 * bar.value for bar in bars],
        places,
        xerr=_sides(bars),
        fmt="none",
        ecolor=_INK,
        elinewidth=1.1,
        capsize=2.5,
    )
    for place, bar in enumerate(bars):
        axes.annotate(
            tables.percent(bar.value),
            (100 * (bar.value if bar.high is None else bar.high), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=_INK,
        )
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axes.set_ylim(len(bars) - 0.45, -0.55)
    axes.set_xlim(0, 116)
    axes.xaxis.set_major_locator(FixedLocator([0, 25, 50, 75, 100]))
    _finish(axes, _title(environment), grid="x")


def _draw_cost(
    axes: Any, board: Leaderboard, environment: Environment | None, colours: Mapping[str, str]
) -> None:
    assert environment is not None, "cost is drawn an environment at a time"
    points = _points(board, environment)
    tokens = [point.tokens for point in points]
    low, high = min(tokens) / 2.2, max(tokens) * 2.2
    for bar in _bars(board, environment):
        if bar.tokens > 0:
            continue
        axes.axhline(
            100 * bar.value, color=colours[bar.label], linewidth=1.2, linestyle=(0, (4, 3))
        )
        axes.annotate(
            bar.label,
            (0.01, 100 * bar.value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3 if bar.value < 0.9 else -9),
            textcoords="offset points",
            fontsize=8,
            color=_INK,
        )
    for point, height in zip(points, _apart([100 * each.value for each in points]), strict=True):
        colour = colours[point.label]
        axes.errorbar(
            point.tokens,
            100 * point.value,
            yerr=_sides([point]),
            ecolor=colour,
            elinewidth=1.2,
            capsize=3,
            marker="o",
            markersize=7,
            color=colour,
            markerfacecolor=colour if point.ranked else "none",
        )
        right = math.log(point.tokens / low) < 0.55 * math.log(high / low)
        axes.annotate(
            point.label,
            (point.tokens, height),
            xytext=(8 if right else -8, 2),
            textcoords="offset points",
            va="bottom",
            ha="left" if right else "right",
            fontsize=8.5,
            color=_INK,
        )
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(-4, 108)
    axes.xaxis.set_major_locator(FixedLocator(_ticks(low, high)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: tables.amount(number)))
    axes.yaxis.set_major_locator(FixedLocator([0, 25, 50, 75, 100]))
    axes.set_xlabel("sampled tokens an episode", fontsize=8.5, color=_INK)
    _finish(axes, f"{_title(environment)} by tokens", grid="y")


def _sides(bars: Sequence[_Bar]) -> list[list[float]]:
    """Return how far the intervals reach down and up, in percent; 0 where there is none."""
    return [
        [0.0 if bar.low is None else 100 * max(0.0, bar.value - bar.low) for bar in bars],
        [0.0 if bar.high is None else 100 * max(0.0, bar.high - bar.value) for bar in bars],
    ]


def _apart(heights: Sequence[float], least: float = 9.0) -> list[float]:
    """Return heights moved up just enough for the labels at them not to overlap."""
    moved = list(heights)
    order = sorted(range(len(moved)), key=lambda place: moved[place])
    for below, above in itertools.pairwise(order):
        moved[above] = max(moved[above], moved[below] + least)
    return moved


def _ticks(low: float, high: float) -> list[float]:
    """Return about three round numbers between the ends of a logarithmic axis."""
    tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [
            step * 10.0**ten for ten in tens for step in steps if low <= step * 10.0**ten <= high
        ]
        if len(ticks) >= 3:
            break
    return ticks


def _finish(axes: Any, title: str, grid: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=_INK)
    axes.grid(axis=grid, color=_RULE, alpha=0.3, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=8.5, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.patch.set_alpha(0)


@contextlib.contextmanager
def _style(salt: str, text: str) -> Iterator[None]:
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


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "pz-bench"})
    return buffer.getvalue()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _inline(board: Leaderboard, place: Environment | None, draw: Any, height: float) -> str:
    """Return a panel as an element of a page: its ink is the page's, its size the column's."""
    with _style(f"{board.suite} {_title(place)} {draw.__name__}", "none"):
        figure = _grid(board, [place], draw, height)
        figure.patch.set_alpha(0)
        text = _svg(figure).decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = text.replace("'DejaVu Sans'", "system-ui, sans-serif")
    return text.replace(_INK, "currentColor")
