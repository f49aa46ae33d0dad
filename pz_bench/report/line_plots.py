"""Performance profiles and learning curves of a leaderboard.

A profile shows, for each score, the share of runs (seed x environment) above it: Agarwal et al.
2021. With fewer than five seeds it is marked provisional. Learning curves are of what training
measured, by steps, sampled tokens and hours; what was not recorded is not drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from pz_bench.ranking import ENOUGH_SEEDS
from pz_bench.report import numbers
from pz_bench.report.curves import Curve
from pz_bench.report.drawing import (
    INK,
    MOST_ROWS,
    Panel,
    colours,
    dashes,
    element,
    finish,
    style,
)
from pz_bench.report.leaderboard import Leaderboard, Row

_WIDTH, _HEIGHT = 4.6, 2.9
_LEFT, _BOTTOM, _TOP = 0.55, 0.55, 0.36
_LEGEND_LINE = 0.19
_MOST_PLACES = 12
_AXES = {"steps": "training steps", "tokens": "sampled tokens", "hours": "hours"}


def figures(board: Leaderboard) -> list[tuple[str, Figure]]:
    """Return (name, figure) of the profiles and of the learning curves, where there are any."""
    found = []
    if _profiled(board):
        found.append(("profiles", _profile_figure(board)))
    places = _places(board)
    if places:
        panels = [(place, axis) for place in places for axis in _AXES]
        found.append(("training", _training_figure(board, panels)))
    return found


def profile_panel(board: Leaderboard) -> Panel | None:
    """Return the performance profiles; None where no row is complete over several environments."""
    rows = _profiled(board)
    if not rows:
        return None
    with style(f"{board.suite} profiles", "none"):
        drawn = element(_profile_figure(board))
    words = ", ".join(row.label for row in rows)
    return Panel(drawn, f"{_profile_title(rows)}: share of runs above each score of {words}")


def training_panels(board: Leaderboard) -> list[Panel]:
    """Return a learning curve an environment and axis, for those with any."""
    found = []
    for place in _places(board):
        for axis in _AXES:
            shown = _curves(board, place, axis)
            if shown:
                with style(f"{board.suite} {place} {axis}", "none"):
                    drawn = element(_training_figure(board, [(place, axis)]))
                words = ", ".join(each.row for each in shown)
                found.append(Panel(drawn, f"{_training_title(board, place)} by {axis}: {words}"))
    return found


def _profiled(board: Leaderboard) -> list[Row]:
    """Return the anchors and the best rows that have a profile."""
    rows = [row for row in board.rows if row.profile is not None]
    kept = [row.label for row in rows if not row.anchor][:MOST_ROWS]
    return [row for row in rows if row.anchor or row.label in kept]


def _profile_title(rows: Sequence[Row]) -> str:
    few = any(row.aggregate is not None and row.aggregate.provisional for row in rows)
    return f"Profiles (provisional: under {ENOUGH_SEEDS} seeds)" if few else "Performance profiles"


def _profile_figure(board: Leaderboard) -> Figure:
    rows = _profiled(board)
    figure, (axes,) = _sheet(1, 1, len(rows))
    ink, line = colours(board), dashes(board)
    for row in rows:
        shares = [100 * share for share in row.profile or ()]
        axes.step(
            [100 * each for each in board.thresholds],
            shares,
            where="post",
            color=ink[row.label],
            linestyle=line[row.label],
            linewidth=1.6,
            label=row.label,
        )
    axes.set_xlim(0, 100)
    axes.set_ylim(-2, 102)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator([0, 25, 50, 75, 100]))
    axes.set_xlabel("score, percent", fontsize=8.5, color=INK)
    axes.set_ylabel("runs above it, percent", fontsize=8.5, color=INK)
    finish(axes, _profile_title(rows), grid="both")
    _legend(figure, axes)
    return figure


def _places(board: Leaderboard) -> list[str]:
    """Return the environments that have curves, the first dozen."""
    return list(dict.fromkeys(each.environment for each in board.curves))[:_MOST_PLACES]


def _curves(board: Leaderboard, place: str, axis: str) -> list[Curve]:
    """Return the curves with the best ends on one environment, where the axis was recorded."""
    own = [each for each in board.curves if each.environment == place and any(getattr(each, axis))]
    best = sorted(own, key=lambda each: (-each.values[-1], each.row))[:MOST_ROWS]
    return [each for each in own if each in best]


def _training_title(board: Leaderboard, place: str) -> str:
    short = next(each.short for each in board.environments if each.name == place)
    measures = {each.measure for each in board.curves if each.environment == place}
    return f"{short}: {'success' if measures == {'success'} else 'reward'} in training"


def _training_figure(board: Leaderboard, panels: Sequence[tuple[str, str]]) -> Figure:
    across = min(len(panels), len(_AXES))
    most = max(len(_curves(board, place, "steps")) for place, _ in panels)
    figure, every = _sheet(across, -(-len(panels) // across), most)
    ink, line = colours(board), dashes(board)
    for axes, (place, axis) in zip(every, panels, strict=True):
        shown = _curves(board, place, axis)
        shares = all(each.measure == "success" for each in shown)
        for each in shown:
            axes.plot(
                getattr(each, axis),
                [100 * value if shares else value for value in each.values],
                color=ink[each.row],
                linestyle=line[each.row],
                linewidth=1.6,
                label=f"{each.row}, {each.seeds} seed{'s' if each.seeds > 1 else ''}",
            )
        if not shown:
            axes.set_axis_off()
            continue
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: numbers.amount(value, 3)))
        axes.set_xlabel(_AXES[axis], fontsize=8.5, color=INK)
        axes.set_ylabel("percent" if shares else "reward an episode", fontsize=8.5, color=INK)
        finish(axes, _training_title(board, place), grid="both")
        _legend(figure, axes)
    return figure


def _sheet(across: int, down: int, labels: int) -> tuple[Figure, list[Any]]:
    """Return a figure with axes of one size, each with room under it for ``labels`` lines."""
    below = _BOTTOM + _LEGEND_LINE * labels
    height = _HEIGHT + _LEGEND_LINE * labels
    figure = Figure(figsize=(_WIDTH * across, height * down), facecolor="white")
    size = (
        (_WIDTH - _LEFT - 0.15) / (_WIDTH * across),
        (height - below - _TOP) / (height * down),
    )
    axes = []
    for line in range(down):
        for column in range(across):
            left = (column * _WIDTH + _LEFT) / (_WIDTH * across)
            bottom = ((down - 1 - line) * height + below) / (height * down)
            axes.append(figure.add_axes((left, bottom, *size)))
    return figure, axes


def _legend(figure: Figure, axes: Any) -> None:
    """Write the names under the axes, below the label of the axis."""
    place = axes.get_position()
    inches = figure.get_size_inches()
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(0.0, -0.42 / (place.height * inches[1])),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        borderaxespad=0.0,
        handlelength=2.4,
        labelspacing=0.3,
    )
