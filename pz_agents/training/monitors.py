"""Where a run's metrics go: always ``metrics.jsonl``, tensorboard on request, a plot at the end.

One JSON object a step, flushed as it is written. A resumed run drops the lines of steps that it
takes again, and a last line that was torn; a value that is not finite is written as null and
named under ``nan``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pz_envs.errors import require
from pz_envs.files import write_atomic


class MetricsLog:
    """Writes ``folder/metrics.jsonl`` (and tensorboard events under ``folder/tensorboard``)."""

    def __init__(self, folder: Path, steps_done: int, *, tensorboard: bool = False) -> None:
        path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= steps_done]
        write_atomic(path, "".join(_line(line) for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed by close)
        self._board: Any = None
        if tensorboard:
            module = require("torch.utils.tensorboard", "pz-agents[train]")
            self._board = module.SummaryWriter(str(folder / "tensorboard"), purge_step=steps_done)

    def write(self, metrics: Mapping[str, float]) -> None:
        """Add one step; ``metrics`` has its number under ``step``."""
        nan = [name for name, value in metrics.items() if not math.isfinite(value)]
        values: dict[str, Any] = {
            name: None if name in nan else value for name, value in metrics.items()
        }
        self._file.write(_line({**values, "nan": nan} if nan else values))
        self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                if name != "step":
                    self._board.add_scalar(f"train/{name}", value, int(metrics["step"]))

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a metrics file in order; none when there is no file."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text("utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        lines.append(line)
    return lines


def plot(metrics: list[dict[str, Any]], path: Path) -> None:
    """Draw reward, success, entropy and usable groups over the steps as a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require("matplotlib", "pz-agents[train]")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    steps = [line["step"] for line in metrics]
    for axes, name in zip(
        figure.subplots(2, 2).flat, ("reward", "success", "entropy", "usable_groups"), strict=True
    ):
        values = [math.nan if line.get(name) is None else line[name] for line in metrics]
        axes.plot(steps, values, linewidth=0.8, alpha=0.4)
        axes.plot(steps, _smoothed(values), linewidth=1.6)
        axes.set_title(name)
        axes.set_xlabel("step")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _smoothed(values: list[float], weight: float = 0.9) -> list[float]:
    """Return the exponential moving average, without its bias at the start."""
    average, total, smoothed = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            average = weight * average + (1 - weight) * value
            total = weight * total + (1 - weight)
        smoothed.append(average / total if total else math.nan)
    return smoothed


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, allow_nan=False) + "\n"
