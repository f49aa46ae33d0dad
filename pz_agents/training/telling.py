"""What a run tells: the console's line of a step, its log, a warning that it learns nothing.

Nothing here prints; ``metrics.jsonl`` is written by ``monitors.py``.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path

STEPS = logging.getLogger(f"{__name__}.steps")
"""Gets a line a step; only the log file shows it."""

_LOOK_BACK = 5
_FEWEST_GROUPS = 32
_HARDLY_ANY = 0.1
_SOLVED = 0.9

_logger = logging.getLogger(__name__)


def step_line(metrics: Mapping[str, float]) -> str:
    """Return the figures of a step as one line for the console."""
    speed = metrics["sampled_tokens"] / max(metrics["seconds"], 1e-9)
    parts = _critic_parts(metrics) if "value_loss" in metrics else _group_parts(metrics)
    parts.append(f"{speed:.0f} tok/s")
    if "eval_success" in metrics:
        parts.append(f"eval {metrics['eval_success']:.3f}")
    return " ".join(parts)


def _group_parts(metrics: Mapping[str, float]) -> list[str]:
    parts = [
        f"reward {metrics['reward']:.3f} success {metrics['success']:.3f}",
        f"usable {metrics['usable_groups']:.0f}/{metrics['groups']:.0f}",
    ]
    if metrics["stale_groups"]:
        parts.append(f"stale {metrics['stale_groups']:.0f}")
    return [*parts, f"loss {metrics['loss']:z.4f} entropy {metrics['entropy']:.3f}"]


def _critic_parts(metrics: Mapping[str, float]) -> list[str]:
    """Policy loss, value loss, reward, advantage, entropy and learning rate."""
    return [
        f"PL {metrics['loss']:z.4f} VL {metrics['value_loss']:.4f} R {metrics['reward']:z.3f}",
        f"A {metrics['advantage']:z.3f} E {metrics['entropy']:.3f}",
        f"LR {metrics['learning_rate']:.2e} |",
    ]


def epoch_text(metrics: Mapping[str, float], step: int, steps: int) -> str:
    """Return ``Epoch 1/3 | ``: in which epoch the step began, and in which the last will begin.

    Empty where no data set is trained on.
    """
    if "epoch" not in metrics:
        return ""
    share = metrics["epoch"] / step

    def epoch(number: int) -> int:
        return math.floor(share * (number - 1) + 1e-9) + 1

    return f"Epoch {epoch(step)}/{epoch(steps)} | "


class UsableGroups:
    """Says once, plainly, that hardly any group of attempts has rewards that differ.

    The others teach nothing: every attempt at the task earned the same.
    """

    def __init__(self) -> None:
        self._last: deque[Mapping[str, float]] = deque(maxlen=_LOOK_BACK)
        self._told = False

    def observe(self, figures: Mapping[str, float]) -> None:
        """Take note of a step's figures."""
        self._last.append(figures)
        groups = sum(each["groups"] for each in self._last)
        usable = sum(each["usable_groups"] for each in self._last)
        if self._told or groups < _FEWEST_GROUPS or usable >= _HARDLY_ANY * groups:
            return
        self._told = True
        success = sum(each["success"] for each in self._last) / len(self._last)
        hint = (
            "nearly all attempts succeed: take harder tasks, or end the run"
            if success >= _SOLVED
            else "the tasks are too hard for this model: take easier ones (`env_kwargs`; for tiny "
            "the preset tiny-countdown), more attempts (`group_size`), or a better model"
        )
        _logger.warning(
            "hardly anything is learned: in only %.0f of the last %.0f groups did one attempt earn "
            "more than another (usable %.0f/%.0f). At success %.3f %s",
            usable,
            groups,
            usable,
            groups,
            success,
            hint,
        )


@contextlib.contextmanager
def log_to(folder: Path) -> Iterator[None]:
    """Write a line a step, and every warning, to ``training_TIME.log`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    name = time.strftime("training_%Y%m%d-%H%M%S.log")
    handler = logging.FileHandler(folder / name, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger("pz_agents"), STEPS]
    # Steps go to the file alone; the console has its own line.
    STEPS.propagate = False
    STEPS.setLevel(logging.INFO)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


def figures_text(figures: Mapping[str, float]) -> str:
    """Return every figure with its name."""
    return " ".join(f"{name} {value:.6g}" for name, value in figures.items() if name != "step")
