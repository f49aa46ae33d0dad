"""Learning curves: what training measured, by steps, sampled tokens and hours.

They come from ``train/metrics.jsonl`` and ``train/timings.jsonl`` of each trained cell in the
store. Seeds of one row are averaged step by step as far as all of them went, and a curve is
averaged over equal runs of steps, so that a long training is a picture and not a cloud.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pz_bench.scores import Metric
from pz_envs.errors import DataError

MOST_POINTS = 24

Training = Sequence[Mapping[str, float]]
"""One mapping a step: ``step``, ``reward``, and where known ``success``, ``sampled_tokens`` and
``seconds``."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One row's training on one environment, a mean over ``seeds`` seeds.

    ``values`` are success rates in 0..1 (``measure`` ``success``) or rewards an episode in the
    environment's units, each the mean over the steps up to its place in ``steps``. ``tokens``
    (sampled) and ``hours`` (wall clock) are cumulative; empty where they were not recorded.
    """

    row: str
    environment: str
    measure: str
    seeds: int
    steps: tuple[float, ...]
    tokens: tuple[float, ...]
    hours: tuple[float, ...]
    values: tuple[float, ...]


def read(folder: Path) -> list[dict[str, float]]:
    """Return the steps of a cell's training, empty where nothing was trained.

    Raises:
        DataError: a line that is not the last is broken.
    """
    steps = {int(line["step"]): line for line in _lines(folder / "train" / "metrics.jsonl")}
    for line in _lines(folder / "train" / "timings.jsonl"):
        if int(line["step"]) in steps:
            steps[int(line["step"])]["seconds"] = line.get("seconds", 0.0)
    return [steps[step] for step in sorted(steps)]


def curve(row: str, environment: str, metric: Metric, seeds: Sequence[Training]) -> Curve | None:
    """Return the curve of one row on one environment; None where no seed has one.

    Args:
        row: the row's label.
        environment: the column's name.
        metric: what the column shows; a success rate is drawn only where it is one.
        seeds: the trainings, one a seed; those without a step are left out.
    """
    trained = [seed for seed in seeds if seed]
    length = min((len(seed) for seed in trained), default=0)
    if length == 0:
        return None
    cut = [seed[:length] for seed in trained]
    known = all("success" in line for seed in cut for line in seed)
    measure = "success" if metric == "success" and known else "reward"
    values = _mean(cut, measure)
    if values is None:
        return None
    ends = np.unique(np.linspace(0, length, min(length, MOST_POINTS) + 1).round().astype(int))[1:]
    starts = np.concatenate([[0], ends[:-1]])
    binned = np.add.reduceat(values, starts) / (ends - starts)
    steps = _mean(cut, "step")
    tokens, seconds = (_mean(cut, name) for name in ("sampled_tokens", "seconds"))
    return Curve(
        row,
        environment,
        measure,
        len(trained),
        () if steps is None else _rounded(steps[ends - 1]),
        () if tokens is None else _rounded(np.cumsum(tokens)[ends - 1]),
        () if seconds is None else _rounded(np.cumsum(seconds)[ends - 1] / 3600),
        _rounded(binned),
    )


def _mean(seeds: Sequence[Training], name: str) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """Return [steps] means over seeds, None unless every step of every seed has the figure."""
    if not all(name in line for seed in seeds for line in seed):
        return None
    values = np.array([[line[name] for line in seed] for seed in seeds], dtype=np.float64)
    found: np.ndarray[Any, np.dtype[np.float64]] = values.mean(axis=0)
    return found if np.isfinite(found).all() else None


def _rounded(values: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, ...]:
    return tuple(round(float(value), 6) + 0.0 for value in values)


def _lines(path: Path) -> list[dict[str, float]]:
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"{path}: line {number} is broken ({error}). "
                f"To measure the cell again: rm -r {path.parent.parent}"
            ) from None
    return found
