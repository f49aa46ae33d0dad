"""``pz-bench compare A B``: two rows of a table on the instances both played.

A side is named by a row's label (``grpo · tiny``), by its player's name where only one row has it,
or by the first letters of a cell's id. Nothing is measured: differences are paired on shared
instances, p-values are sign-flip permutation tests, corrected by Holm's method over the
environments that the two sides share.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from pz_bench import ranking, scores, store
from pz_bench.cell import CellResult
from pz_bench.report import grouping, numbers, tables
from pz_envs import catalog
from pz_envs.errors import ConfigError, did_you_mean

_LEAST_LETTERS = 4


@dataclass(frozen=True, slots=True)
class Line:
    """Left minus right on one environment, in units of its metric (0..1).

    ``short`` is what the tables call the environment. ``left`` and ``right`` are means over all
    that each side played; the difference is over shared instances. See ``scores.Comparison`` for
    the other fields.
    """

    environment: str
    short: str
    metric: scores.Metric
    left: float
    right: float
    difference: float
    low: float | None
    high: float | None
    p: float
    p_holm: float
    improvement: float
    detectable: float | None
    instances: int
    left_seeds: int
    right_seeds: int


@dataclass(frozen=True, slots=True)
class Compared:
    """Two sides by their labels, one line an environment, and environments only one side has."""

    left: str
    right: str
    lines: tuple[Line, ...]
    not_shared: tuple[str, ...]


def compare(runs: Path, left: str, right: str, suite: str | None = None) -> Compared:
    """Compare two sides of a suite, or of the whole store.

    Raises:
        ConfigError: a name means no row or several, or the sides share no instance.
        DataError: a file of the store is broken.
    """
    cells = _cells(runs, suite)
    (left_label, ours), (right_label, theirs) = (_side(cells, name) for name in (left, right))
    mine = grouping.grouped(_played(runs, ours), grouping.column)
    others = grouping.grouped(_played(runs, theirs), grouping.column)
    ids = Counter(group[0].spec.env for group in {**mine, **others}.values())
    found = [
        line
        for name, cells in mine.items()
        if name in others
        and (line := _line(name, ids[cells[0].spec.env] == 1, cells, others[name])) is not None
    ]
    if not found:
        raise ConfigError(
            f"`{left_label}` and `{right_label}` have played no instance in common; "
            "see what there is: pz-bench ls"
        )
    corrected = ranking.holm([line.p for line in found])
    lines = tuple(
        replace(line, p_holm=scores.rounded(p)) for line, p in zip(found, corrected, strict=True)
    )
    shared = {line.environment for line in lines}
    return Compared(left_label, right_label, lines, tuple(sorted({*mine, *others} - shared)))


def to_json(found: Compared) -> str:
    """Return the comparison as JSON, shares in 0..1."""
    return json.dumps(asdict(found), indent=1, ensure_ascii=False, allow_nan=False)


def table(found: Compared, columns: int = 11) -> tables.Table:
    """Return the comparison as a table of its first ``columns``, in percent and points."""
    heads: tuple[str, ...] = (
        "Environment",
        "A",
        "B",
        "A − B",
        "95 % interval",
        "p",
        "p (Holm)",
        "P(A > B)",
    )
    heads += ("Detectable", "Instances", "Seeds")
    return tables.Table(
        tuple(tables.Header(head) for head in heads[:columns]),
        tuple(
            tuple(tables.Cell(text, kind="value") for text in _texts(line)[:columns])
            for line in found.lines
        ),
    )


def _texts(line: Line) -> tuple[str, ...]:
    return (
        line.short,
        numbers.percent(line.left),
        numbers.percent(line.right),
        numbers.signed(line.difference),
        numbers.span(line.low, line.high),
        numbers.p_value(line.p),
        numbers.p_value(line.p_holm),
        numbers.percent(line.improvement),
        numbers.ABSENT if line.detectable is None else numbers.percent(line.detectable),
        str(line.instances),
        f"{line.left_seeds} and {line.right_seeds}",
    )


def _cells(runs: Path, suite: str | None) -> list[CellResult]:
    """Return the cells that have been begun, without their episodes."""
    if suite is None:
        folders = store.cell_folders(runs)
    else:
        listed = (store.cell_folder(runs, cell.id) for cell in store.read_suite(runs, suite).cells)
        folders = [folder for folder in listed if (folder / store.CELL).exists()]
    if not folders:
        raise ConfigError(f"{runs} holds no cell to compare; pz-bench run --matrix starts some")
    cells = (store.read_cell(folder) for folder in folders)
    return [CellResult(cell.spec, cell.status, id=cell.id) for cell in cells]


def _side(cells: Sequence[CellResult], name: str) -> tuple[str, list[CellResult]]:
    """Return the label and the cells of what ``name`` names."""
    rows = dict(grouping.labelled(cells))
    if name in rows:
        return name, rows[name]
    if len(name) >= _LEAST_LETTERS and (begin := [c for c in cells if c.id.startswith(name)]):
        if len(begin) > 1:
            raise ConfigError(f"{len(begin)} cells begin with `{name}`; give more of the id")
        return f"{begin[0].spec.title} ({begin[0].id})", begin
    played_by = [label for label, row in rows.items() if row[0].spec.player == name]
    if len(played_by) == 1:
        return played_by[0], rows[played_by[0]]
    if played_by:
        raise ConfigError(f"`{name}` is several rows; name one: {'; '.join(sorted(played_by))}")
    hint = did_you_mean(name, rows)
    raise ConfigError(
        f"No row, player or cell `{name}`.{hint} Rows: {'; '.join(sorted(rows))}; "
        "cells: pz-bench ls"
    )


def _played(runs: Path, cells: Sequence[CellResult]) -> list[CellResult]:
    """Return the cells with their episodes, one a place in the table."""
    read = [store.read_result(store.cell_folder(runs, cell.id)) for cell in cells]
    kept, _ = grouping.one_per_slot(read)
    return kept


def _line(
    name: str, only_one: bool, left: Sequence[CellResult], right: Sequence[CellResult]
) -> Line | None:
    metric = catalog.find(left[0].spec.env).metric
    found = scores.compare(left, right, metric)
    if found is None:
        return None
    difference = found.difference
    return Line(
        environment=name,
        short=grouping.short_name(left[0], only_one),
        metric=metric,
        left=scores.rounded(float(np.nanmean(scores.matrix(left, metric)))),
        right=scores.rounded(float(np.nanmean(scores.matrix(right, metric)))),
        difference=scores.rounded(difference.mean),
        low=scores.rounded_or_none(difference.low),
        high=scores.rounded_or_none(difference.high),
        p=scores.rounded(difference.p),
        p_holm=1.0,
        improvement=scores.rounded(found.improvement),
        detectable=scores.rounded_or_none(ranking.detectable_difference(difference)),
        instances=found.instances,
        left_seeds=sum(bool(cell.episodes) for cell in left),
        right_seeds=sum(bool(cell.episodes) for cell in right),
    )
