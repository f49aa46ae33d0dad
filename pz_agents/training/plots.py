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

DETAILS = (
    *("reward", "success", "return", "turns"),
    *("loss", "value_loss", "kl", "kl_weight", "approx_kl"),
    *("ratio", "clip_low", "clip_high", "value_clip"),
    *("entropy", "explained_variance", "grad_norm", "critic_grad_norm"),
    *("learning_rate", "critic_learning_rate", "sampled_tokens", "truncated"),
)
"""What the detailed plot shows, as far as a run has it."""

PPO = ("loss", "value_loss", "reward", "advantage_std", "entropy", "explained_variance")
"""What is plotted of a run with a critic."""

_ORDER_1 = ("loss", "ratio", "approx_kl", "kl")
_ROUNDING = 1e-3
"""Where these differ by less, what is seen would be rounding: the axis spans at least this."""

_logger = logging.getLogger(__name__)


def plot_metrics(metrics: Sequence[Mapping[str, Any]], path: Path) -> list[Path]:
    """Draw reward, success, entropy and usable groups over the steps, and the details beside.

    ``PATH_detailed.png`` has every curve of ``DETAILS`` that the run has, and a run with a critic
    gets ``ppo_metrics_with_entropy.png`` too.

    Args:
        metrics: lines of ``metrics.jsonl``.
        path: of the files, without suffix.

    Returns:
        The files that were written; none without matplotlib.
    """
    if not _installed():
        return []
    files = _write(_curves(metrics, PANELS, 2), path)
    known = {name for line in metrics for name, value in line.items() if value is not None}
    details = [name for name in DETAILS if name in known]
    if details:
        path = path.with_name(f"{path.name}_detailed")
        files += _write(_curves(metrics, details, 4), path, svg=False)
    if "value_loss" in known:
        path = path.with_name("ppo_metrics_with_entropy")
        files += _write(_curves(metrics, PPO, 3), path, svg=False)
    return files


def plot_panels(
    metrics: Sequence[Mapping[str, Any]], path: Path, names: Sequence[str]
) -> list[Path]:
    """Draw those of the metrics ``names`` that the run has, two a row; see ``plot_metrics``."""
    known = {name for line in metrics for name, value in line.items() if value is not None}
    shown = [name for name in names if name in known]
    return _write(_curves(metrics, shown, 2), path) if shown and _installed() else []


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


def _curves(metrics: Sequence[Mapping[str, Any]], names: Sequence[str], columns: int) -> Any:
    """Return a figure with a panel a metric: its values, and their moving average."""
    from matplotlib.ticker import MaxNLocator

    figure, grid = _figure(math.ceil(len(names) / columns), columns)
    steps = [line["step"] for line in metrics]
    for axes in grid[len(names) :]:
        axes.remove()
    for axes, name in zip(grid, names, strict=False):
        values = [math.nan if line.get(name) is None else line[name] for line in metrics]
        axes.plot(steps, values, linewidth=0.8, alpha=0.4)
        axes.plot(steps, _smoothed(values), linewidth=1.6)
        # Long labels would reach into the panel beside.
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        found = [value for value in values if math.isfinite(value)]
        if name in _ORDER_1 and found and max(found) - min(found) < _ROUNDING:
            middle = (max(found) + min(found)) / 2
            axes.set_ylim(middle - _ROUNDING, middle + _ROUNDING)
            axes.ticklabel_format(axis="y", useOffset=False, style="plain")
        policy = name == "loss" and any("value_loss" in line for line in metrics)
        axes.set_title("loss (policy)" if policy else name)
        axes.set_xlabel("step")
    told = "thin: each step; thick: moving average"
    figure.text(0.98, 0.995, told, ha="right", va="top", fontsize=8)
    return figure


def _figure(rows: int, columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(9, 4 * columns), 3 * rows))
    FigureCanvasAgg(figure)
    # Half the time of a layout that measures every label.
    bottom = 0.5 / (3 * rows)
    figure.subplots_adjust(0.07, bottom, 0.98, 1 - bottom, 0.3, 0.5)
    return figure, list(figure.subplots(rows, columns).flat)


def _write(figure: Any, path: Path, *, svg: bool = True) -> list[Path]:
    import matplotlib

    files = [path.with_suffix(".png")]
    figure.savefig(files[0], dpi=110, metadata={"Software": None})
    if svg:
        files.append(path.with_suffix(".svg"))
        with matplotlib.rc_context({"svg.hashsalt": "pz"}):
            figure.savefig(files[1], metadata={"Date": None})
    return files


def _smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Return the exponential moving average, without its bias at the start."""
    average, total, smoothed = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            average = weight * average + (1 - weight) * value
            total = weight * total + (1 - weight)
        smoothed.append(average / total if total else math.nan)
    return smoothed
