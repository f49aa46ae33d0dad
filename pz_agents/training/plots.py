"""Curves of a run as PNG and SVG, where matplotlib is installed.

The same numbers give the same bytes. Without matplotlib a run ends all the same.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PANELS = ("reward", "success", "entropy", "usable_groups")
"""What the plot of a training run shows, by the names of the metrics."""

_logger = logging.getLogger(__name__)


def plot_metrics(metrics: Sequence[Mapping[str, Any]], path: Path) -> list[Path]:
    """Draw reward, success, entropy and usable groups over the steps.

    Args:
        metrics: lines of ``metrics.jsonl``.
        path: of the files, without suffix.

    Returns:
        The files that were written; none without matplotlib.
    """
    if not _installed():
        return []
    figure, grid = _figure(2, 2)
    steps = [line["step"] for line in metrics]
    for axes, name in zip(grid, PANELS, strict=True):
        values = [math.nan if line.get(name) is None else line[name] for line in metrics]
        axes.plot(steps, values, linewidth=0.8, alpha=0.4)
        axes.plot(steps, _smoothed(values), linewidth=1.6)
        axes.set_title(name)
        axes.set_xlabel("step")
    return _write(figure, path)


def plot_bench(rows: Sequence[Mapping[str, float]], path: Path) -> list[Path]:
    """Draw success with its interval, and the score, of each checkpoint; see ``plot_metrics``."""
    if not _installed():
        return []
    figure, (left, right) = _figure(1, 2)
    steps = [row["step"] for row in rows]
    left.fill_between(steps, [row["low"] for row in rows], [row["high"] for row in rows], alpha=0.2)
    left.plot(steps, [row["success"] for row in rows], marker=".")
    right.plot(steps, [row["score_norm"] for row in rows], marker=".")
    for axes, name in ((left, "success"), (right, "score_norm")):
        axes.set_title(name)
        axes.set_xlabel("step")
    return _write(figure, path)


def _installed() -> bool:
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        _logger.warning("no plots: matplotlib is not installed (pip install 'pz-agents[train]')")
    return found


def _figure(rows: int, columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3 * rows))
    FigureCanvasAgg(figure)
    # Half the time of a layout that measures every label.
    bottom = 0.5 / (3 * rows)
    figure.subplots_adjust(0.07, bottom, 0.98, 1 - bottom, 0.2, 0.5)
    return figure, list(figure.subplots(rows, columns).flat)


def _write(figure: Any, path: Path) -> list[Path]:
    import matplotlib

    png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
    figure.savefig(png, dpi=110, metadata={"Software": None})
    with matplotlib.rc_context({"svg.hashsalt": "pz"}):
        figure.savefig(svg, metadata={"Date": None})
    return [png, svg]


def _smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Return the exponential moving average, without its bias at the start."""
    average, total, smoothed = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            average = weight * average + (1 - weight) * value
            total = weight * total + (1 - weight)
        smoothed.append(average / total if total else math.nan)
    return smoothed
