"""Plots of a leaderboard: scores with intervals, and score against sampled tokens.

Bars are of the macro mean, of families and of environments; what is not ranked is hatched. Every
plot exists as one figure for files, and as one small figure a panel for HTML. A panel shows the
anchors and the best rows, a file's figure no more panels than can be read: the tables hold all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from pz_bench.report import line_plots, numbers, wording
from pz_bench.report.drawing import (
    INK,
    MOST_ROWS,
    Panel,
    colours,
    element,
    finish,
    png,
    style,
    svg,
    ticks,
)
from pz_bench.report.leaderboard import Environment, Leaderboard, Row

_WIDTH = 4.6
_COST_HEIGHT = 2.9
_MOST_PLACES = 12

Place = Environment | str | None
"""What a panel of bars is of: an environment, a family's name, or the macro mean."""


def files(board: Leaderboard) -> dict[str, bytes]:
    """Return file name -> bytes of every plot, as SVG and PNG."""
    found = {}
    with style(board.suite, "path"):
        for name, figure in (*_figures(board), *line_plots.figures(board)):
            found[f"{board.suite}-{name}.svg"] = svg(figure)
            found[f"{board.suite}-{name}.png"] = png(figure)
    return found


def score_panel(board: Leaderboard, environment: Place) -> Panel | None:
    """Return bars with intervals on one environment, one family, or of the macro mean for None."""
    bars = _best(_bars(board, environment))
    if not bars:
        return None
    drawn = _inline(board, environment, _draw_bars, _bars_height(len(bars)))
    words = ", ".join(f"{bar.label} {numbers.value(bar.value, bar.low, bar.high)}" for bar in bars)
    return Panel(drawn, f"{_title(board, environment)}, percent: {words}")


def family_panels(board: Leaderboard) -> list[Panel]:
    """Return bars with intervals of each family that has several environments."""
    found = (score_panel(board, family) for family in _families(board))
    return [panel for panel in found if panel is not None]


def profile_panel(board: Leaderboard) -> Panel | None:
    """Return performance profiles; None for a suite of one environment."""
    return line_plots.profile_panel(board)


def training_panels(board: Leaderboard) -> list[Panel]:
    """Return learning curves of each environment, by steps, tokens and hours."""
    return line_plots.training_panels(board)


def cost_panel(board: Leaderboard, environment: Environment) -> Panel | None:
    """Return score against sampled tokens on one environment; None when no row samples tokens."""
    points = _points(board, environment)
    if not points:
        return None
    drawn = _inline(board, environment, _draw_cost, _COST_HEIGHT)
    words = ", ".join(
        f"{bar.label} {numbers.percent(bar.value)} with {numbers.amount(bar.tokens)} tokens"
        for bar in points
    )
    return Panel(drawn, f"{_title(board, environment)} by sampled tokens: {words}")


@dataclass(frozen=True, slots=True)
class _Bar:
    label: str
    value: float
    low: float | None
    high: float | None
    ranked: bool
    anchor: bool
    tokens: float


def _families(board: Leaderboard) -> list[str]:
    return list(dict.fromkeys(each.family for row in board.rows for each in row.families))


def _bars(board: Leaderboard, environment: Place) -> list[_Bar]:
    return [bar for row in board.rows if (bar := _bar(row, environment)) is not None]


def _best(bars: Sequence[_Bar]) -> list[_Bar]:
    """Return the anchors and the ``MOST_ROWS`` best others, in the order given."""
    own = sorted((bar for bar in bars if not bar.anchor), key=lambda bar: (-bar.value, bar.label))
    kept = {bar.label for bar in own[:MOST_ROWS]}
    return [bar for bar in bars if bar.anchor or bar.label in kept]


def _bar(row: Row, environment: Place) -> _Bar | None:
    if environment is None:
        if row.macro is None:
            return None
        macro = row.macro
        return _Bar(row.label, macro.mean, macro.low, macro.high, True, row.anchor, 0.0)
    if isinstance(environment, str):
        for found in row.families:
            if found.family == environment:
                return _Bar(row.label, found.mean, found.low, found.high, True, row.anchor, 0.0)
        return None
    score = row.score(environment.name)
    if score is None or score.value is None:
        return None
    ranked, tokens = score.status == "ranked", score.sampled_tokens or 0.0
    return _Bar(row.label, score.value, score.low, score.high, ranked, row.anchor, tokens)


def _points(board: Leaderboard, environment: Environment) -> list[_Bar]:
    return _best([bar for bar in _bars(board, environment) if bar.tokens > 0])


def _figures(board: Leaderboard) -> list[tuple[str, Figure]]:
    places: list[Place] = [None, *_families(board)]
    if len(board.environments) <= _MOST_PLACES:
        places += board.environments
    scored = [place for place in places if _bars(board, place)]
    sampled = [place for place in board.environments if _points(board, place)][:_MOST_PLACES]
    found = []
    if scored:
        tallest = max(len(_best(_bars(board, place))) for place in scored)
        found.append(("scores", _grid(board, scored, _draw_bars, _bars_height(tallest))))
    if sampled:
        found.append(("cost", _grid(board, sampled, _draw_cost, _COST_HEIGHT)))
    return found


def _grid(board: Leaderboard, places: Sequence[Place], draw: Any, height: float) -> Figure:
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
        draw(figure.add_axes((from_left, from_bottom, *size)), board, place, colours(board))
    return figure


def _labels_width(board: Leaderboard) -> float:
    """Return the inches that the longest row's name takes at the size it is drawn."""
    return min(2.4, 0.15 + 0.063 * max(len(row.label) for row in board.rows))


def _bars_height(bars: int) -> float:
    return 0.75 + 0.36 * bars


def _title(board: Leaderboard, environment: Place) -> str:
    if environment is None:
        return "Macro mean over families"
    if isinstance(environment, str):
        titles = {each.family: each.family_title for each in board.environments}
        return f"{titles[environment]}: mean"
    return f"{environment.short}: {wording.metric_name(environment).lower()}"


def _draw_bars(axes: Any, board: Leaderboard, environment: Place, ink: Mapping[str, str]) -> None:
    every = _bars(board, environment)
    bars = _best(every)
    places = range(len(bars))
    drawn = axes.barh(places, [100 * bar.value for bar in bars], height=0.62, linewidth=0.8)
    for bar, patch in zip(bars, drawn, strict=True):
        patch.set_edgecolor(ink[bar.label])
        patch.set_facecolor(ink[bar.label] if bar.ranked else "none")
        patch.set_hatch(None if bar.ranked else "////")
    axes.errorbar(
        [100 * bar.value for bar in bars],
        places,
        xerr=_sides(bars),
        fmt="none",
        ecolor=INK,
        elinewidth=1.1,
        capsize=2.5,
    )
    for place, bar in enumerate(bars):
        axes.annotate(
            numbers.percent(bar.value),
            (100 * (bar.value if bar.high is None else bar.high), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=INK,
        )
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axes.set_ylim(len(bars) - 0.45, -0.55)
    axes.set_xlim(0, 116)
    axes.xaxis.set_major_locator(FixedLocator([0, 25, 50, 75, 100]))
    if len(bars) < len(every):
        axes.text(
            1.0,
            0.01,
            f"the best {len(bars)} of {len(every)}; all are in the table",
            transform=axes.transAxes,
            ha="right",
            fontsize=8,
            color=INK,
        )
    finish(axes, _title(board, environment), grid="x")


def _draw_cost(axes: Any, board: Leaderboard, environment: Place, ink: Mapping[str, str]) -> None:
    assert isinstance(environment, Environment), "cost is drawn an environment at a time"
    points = _points(board, environment)
    tokens = [point.tokens for point in points]
    low, high = min(tokens) / 2.2, max(tokens) * 2.2
    for bar in _best(_bars(board, environment)):
        if bar.tokens > 0:
            continue
        axes.axhline(100 * bar.value, color=ink[bar.label], linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            bar.label,
            (0.01, 100 * bar.value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3 if bar.value < 0.9 else -9),
            textcoords="offset points",
            fontsize=8,
            color=INK,
        )
    for point, height in zip(points, _apart([100 * each.value for each in points]), strict=True):
        colour = ink[point.label]
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
            color=INK,
        )
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(-4, 108)
    axes.xaxis.set_major_locator(FixedLocator(ticks(low, high)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: numbers.amount(number)))
    axes.yaxis.set_major_locator(FixedLocator([0, 25, 50, 75, 100]))
    axes.set_xlabel("sampled tokens an episode", fontsize=8.5, color=INK)
    finish(axes, f"{_title(board, environment)} by tokens", grid="y")


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


def _inline(board: Leaderboard, place: Place, draw: Any, height: float) -> str:
    """Return a panel as an element of a page."""
    with style(f"{board.suite} {_title(board, place)} {draw.__name__}", "none"):
        return element(_grid(board, [place], draw, height))
