"""Where a run's figures go: always ``metrics.jsonl``, and one monitor on request.

One JSON object a step, flushed as it is written; it holds nothing that a clock decides, so that
runs that trained the same have the same bytes. What took how long is in ``timings.jsonl``. A
resumed run drops the lines of steps that it takes again, and a last line that was torn; a value
that is not finite is written as null and named under ``nan``. ``logs/metrics.jsonl`` is a link to
the one file. A monitor gets both, and its failures never end a run. Nothing is sent anywhere
unless its own settings say so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pz_envs.errors import require
from pz_envs.files import write_atomic

MonitorName = Literal["none", "tensorboard", "wandb", "trackio"]

_logger = logging.getLogger(__name__)


class MetricsLog:
    """Writes ``metrics.jsonl`` and ``timings.jsonl`` in a run's folder, and feeds the monitor.

    Args:
        folder: the run's.
        steps_done: lines of later steps are dropped.
        monitor: what gets the figures too.
        config: the run's settings, for monitors that show them.
        also: gives the other names under which the monitor shows a figure.

    Raises:
        ConfigError: the monitor's package is not installed.
    """

    def __init__(
        self,
        folder: Path,
        steps_done: int,
        *,
        monitor: MonitorName = "none",
        config: Mapping[str, Any] | None = None,
        also: Callable[[str], Sequence[str]] = lambda name: (),
    ) -> None:
        self._also = also
        self._monitor = _MONITORS[monitor](folder, steps_done, config or {})
        self._files = [
            _reopen(folder / name, steps_done) for name in ("metrics.jsonl", "timings.jsonl")
        ]
        _link(folder / "logs" / "metrics.jsonl")

    def write(self, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """Add one step; ``metrics`` has its number under ``step``."""
        step = int(metrics["step"])
        for file, values in zip(self._files, (metrics, {"step": step, **timings}), strict=True):
            file.write(_line(values))
            file.flush()
        figures = {**metrics, **timings}
        del figures["step"]
        figures |= {new: value for name, value in figures.items() for new in self._also(name)}
        self._guarded("log", figures, step)

    def sync(self) -> None:
        """Make what was written survive a power cut."""
        for file in self._files:
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files and the monitor."""
        for file in self._files:
            file.close()
        self._guarded("close")
        self._monitor = None

    def _guarded(self, method: str, *arguments: Any) -> None:
        if self._monitor is None:
            return
        try:
            getattr(self._monitor, method)(*arguments)
        except Exception:  # foreign code that may want the network: training goes on without it
            _logger.warning("the monitor failed and gets no more figures", exc_info=True)
            self._monitor = None


def _link(link: Path) -> None:
    """Make the figures be found among the logs too, where many scripts look for them."""
    link.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # a file system without links: then not
        link.unlink(missing_ok=True)  # in a copied run it may be a file, which would grow old
        link.symlink_to(Path("..") / link.name)


class _TensorBoard:
    """Events under ``folder/tensorboard``."""

    def __init__(self, folder: Path, steps_done: int, config: Mapping[str, Any]) -> None:
        require("tensorboard", "pz-agents[train]")
        module = require("torch.utils.tensorboard", "pz-agents[train]")
        self._writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=steps_done + 1)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(_tag(name), value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run named after the folder, under ``folder/wandb`` and offline unless WANDB_MODE says."""

    def __init__(self, folder: Path, steps_done: int, config: Mapping[str, Any]) -> None:
        wandb = require("wandb", "wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "pz"),
            name=folder.resolve().name,
            dir=str(folder),
            config=dict(config),
            mode=os.environ.get("WANDB_MODE", "offline"),
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log({_tag(name): value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """A run named after the folder, kept under ``folder/trackio`` unless TRACKIO_DIR is set."""

    def __init__(self, folder: Path, steps_done: int, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(folder.resolve() / "trackio"))
        self._trackio = require("trackio", "trackio")
        self._trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "pz"),
            name=folder.resolve().name,
            config=dict(config),
            resume="allow",
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        values = {_tag(name): value for name, value in figures.items()}
        self._trackio.log(values, step=step)

    def close(self) -> None:
        self._trackio.finish()


def _tag(name: str) -> str:
    """Return a figure's name in a monitor: under ``train/`` unless it names its own group."""
    return name if "/" in name else f"train/{name}"


_MONITORS: Mapping[str, Callable[[Path, int, Mapping[str, Any]], Any]] = {
    "none": lambda folder, steps_done, config: None,
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


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


def _reopen(path: Path, steps_done: int) -> Any:
    """Drop the lines of steps after ``steps_done`` and return the file, open at its end."""
    kept = [line for line in read_metrics(path) if line["step"] <= steps_done]
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
    return open(path, "a", encoding="utf-8")


def _line(values: Mapping[str, Any]) -> str:
    nan = [name for name, value in values.items() if not math.isfinite(value)]
    finite = {name: None if name in nan else value for name, value in values.items()}
    return json.dumps({**finite, "nan": nan} if nan else finite, allow_nan=False) + "\n"
