"""The store: one folder a cell, where the files are the truth.

``RUNS/<id>/cell.json`` says what the cell is and how it stands, ``episodes.jsonl`` holds a line for
each finished episode, ``log.txt`` what the process said, ``train/`` the training run. Lines are
appended and synced one by one; a torn last line is dropped and its episode owed again. A finished
cell records the sha256 of its episodes. ``RUNS/suites/<name>.json`` lists the cells of a table in
order, those that could not be run among them, so that a report needs the store alone.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pz_agents.config import parse_settings
from pz_bench.cell import (
    CellResult,
    CellSpec,
    EpisodeRecord,
    Status,
    canonical,
    cell_id,
    code_version,
    from_line,
    to_line,
)
from pz_envs.errors import ConfigError, DataError, did_you_mean
from pz_envs.files import sha256_file, write_atomic

EPISODES = "episodes.jsonl"
CELL = "cell.json"


@dataclass(frozen=True, slots=True)
class CellFile:
    """What ``cell.json`` holds.

    ``identity`` are the parts that ``id`` is the hash of. ``sha256`` is that of ``episodes.jsonl``
    once the cell is done or failed. ``seconds`` sums the wall clock of all its processes. ``code``
    has ``code_version`` of those processes, in order, one a change.
    """

    id: str
    spec: CellSpec
    identity: Mapping[str, Any]
    status: Status = "partial"
    reason: str | None = None
    command: str | None = None
    sha256: str | None = None
    seconds: float = 0.0
    train_metrics: Mapping[str, Any] | None = None
    code: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SuiteCell:
    """A cell's place in a suite.

    ``added`` marks one that was run by hand beside the suite's matrix. ``reason`` and ``command``
    are set when it could not be run.
    """

    id: str
    spec: CellSpec
    added: bool = False
    reason: str | None = None
    command: str | None = None


class SuiteEntry(NamedTuple):
    """A cell of a suite by id; ``reason`` is set when it could not be run."""

    id: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class Suite:
    """The cells of one leaderboard, in order."""

    name: str
    title: str = ""
    cells: tuple[SuiteCell, ...] = ()


def cell_folder(runs: Path, identifier: str) -> Path:
    """Return the folder of a cell, there or not."""
    return runs / identifier


def create_cell(runs: Path, spec: CellSpec, identity: Mapping[str, Any]) -> Path:
    """Make the cell's folder if it is not there yet, and return it."""
    identifier = cell_id(identity)
    folder = cell_folder(runs, identifier)
    if not (folder / CELL).exists():
        write_cell(folder, CellFile(identifier, spec, identity))
    return folder


def write_cell(folder: Path, cell: CellFile) -> None:
    """Write ``cell.json`` at once or not at all."""
    values = {
        "id": cell.id,
        "spec": cell.spec.model_dump(mode="json"),
        "identity": cell.identity,
        "status": cell.status,
        "reason": cell.reason,
        "command": cell.command,
        "sha256": cell.sha256,
        "seconds": round(cell.seconds, 3),
        "train_metrics": cell.train_metrics,
        "code": cell.code,
    }
    write_atomic(folder / CELL, json.dumps(values, indent=2, sort_keys=True) + "\n")


def read_cell(folder: Path) -> CellFile:
    """Read ``cell.json``.

    Raises:
        DataError: it is missing or broken.
    """
    path = folder / CELL
    try:
        values = json.loads(path.read_bytes())
        spec = parse_settings(CellSpec, values.pop("spec"), str(path))
        return CellFile(spec=spec, **{**values, "code": tuple(values.get("code", ()))})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ConfigError) as error:
        raise DataError(
            f"{path} cannot be read ({error}). To measure it again: rm -r {folder}"
        ) from None


def read_status(folder: Path) -> Status:
    """Return how a cell stands, without checking the rest of its file.

    Raises:
        DataError: the file is missing or broken.
    """
    try:
        status: Status = json.loads((folder / CELL).read_bytes())["status"]
    except (OSError, ValueError, TypeError, KeyError):
        return read_cell(folder).status  # which says what is wrong with it
    return status


def begin_cell(folder: Path) -> None:
    """Note with which code the cell is measured from now on."""
    cell, code = read_cell(folder), code_version()
    if cell.code[-1:] != (code,):
        write_cell(folder, replace(cell, code=(*cell.code, code)))


def finish_cell(
    folder: Path,
    status: Status,
    *,
    reason: str | None = None,
    seconds: float = 0.0,
    train_metrics: Mapping[str, Any] | None = None,
) -> CellFile:
    """Set how a cell ended, sealing its episodes, and add to its seconds."""
    cell = read_cell(folder)
    path = folder / EPISODES
    sealed = replace(
        cell,
        status=status,
        reason=reason,
        sha256=sha256_file(path) if path.exists() else None,
        seconds=cell.seconds + seconds,
        train_metrics=train_metrics or cell.train_metrics,
    )
    write_cell(folder, sealed)
    return sealed


def reopen_cell(folder: Path) -> None:
    """Make a failed cell, or one with failed episodes, owed again; good episodes are kept."""
    cell = read_cell(folder)
    kept = [to_line(episode) for episode in read_episodes(folder) if episode.status != "failed"]
    write_cell(folder, replace(cell, status="partial", reason=None, command=None, sha256=None))
    write_atomic(folder / EPISODES, "".join(kept))


class EpisodeLog:
    """The writer of one cell's ``episodes.jsonl``; ``numbers`` are the episodes already there.

    Opening it drops a torn last line. Each ``append`` is on disk when it returns.

    Raises:
        DataError: a line that is not the last is broken.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / EPISODES
        episodes, whole = _scan(path)
        self.numbers = {episode.episode for episode in episodes}
        self._file = open(path, "ab")  # noqa: SIM115  (closed by close)
        self._file.truncate(whole)

    def append(self, episode: EpisodeRecord) -> None:
        """Write one episode through to the disk; one that is there already is ignored."""
        if episode.episode in self.numbers:
            return
        self._file.write(to_line(episode).encode("ascii"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.numbers.add(episode.episode)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_episodes(folder: Path) -> tuple[EpisodeRecord, ...]:
    """Return a cell's episodes in order of their number; a torn last line is left out.

    Raises:
        DataError: a line that is not the last is broken; the message names file and line.
    """
    episodes, _ = _scan(folder / EPISODES)
    return tuple(episodes)


def read_result(folder: Path) -> CellResult:
    """Return what a cell's folder holds.

    Raises:
        DataError: a file in it is missing or broken.
    """
    cell = read_cell(folder)
    return CellResult(
        spec=cell.spec,
        status=cell.status,
        reason=cell.reason,
        command=cell.command,
        episodes=read_episodes(folder),
        versions=dict(cell.identity.get("versions", {})),
        seconds=cell.seconds,
        train_metrics=cell.train_metrics,
        id=cell.id,
        data=dict(cell.identity.get("data", {})),
    )


def load(runs: Path) -> list[CellResult]:
    """Return every cell of the store, in order of id."""
    return [read_result(folder) for folder in cell_folders(runs)]


def cell_folders(runs: Path) -> list[Path]:
    """Return the folder of every cell in the store, in order of id."""
    return sorted(path.parent for path in runs.glob(f"*/{CELL}"))


def verify(runs: Path) -> list[str]:
    """Return what is wrong with the store's files, each problem naming its file."""
    problems: list[str] = []
    for folder in cell_folders(runs):
        try:
            problems += _verify_cell(folder)
        except DataError as error:
            problems.append(str(error))
    for name in suite_names(runs):
        try:
            read_suite(runs, name)
        except DataError as error:
            problems.append(str(error))
    return problems


def suite_names(runs: Path) -> tuple[str, ...]:
    """Return the names of the store's suites."""
    return tuple(sorted(path.stem for path in (runs / "suites").glob("*.json")))


def read_suite(runs: Path, name: str) -> Suite:
    """Read one suite's list of cells.

    Raises:
        ConfigError: the store has no such suite.
        DataError: its file is broken.
    """
    path = _suite_path(runs, name)
    if not path.exists():
        known = suite_names(runs)
        raise ConfigError(
            f"No suite `{name}` in {runs}.{did_you_mean(name, known)} "
            f"There: {', '.join(known) or 'none yet; pz-bench run --matrix starts one'}"
        )
    try:
        values = json.loads(path.read_bytes())
        cells = tuple(
            SuiteCell(**(cell | {"spec": parse_settings(CellSpec, cell["spec"], str(path))}))
            for cell in values["cells"]
        )
        return Suite(values["name"], values["title"], cells)
    except (OSError, ValueError, TypeError, KeyError, ConfigError) as error:
        raise DataError(
            f"{path} cannot be read ({error}). To write it anew, run its matrix again."
        ) from None


def list_suite(runs: Path, name: str) -> list[SuiteEntry]:
    """Return which cells a suite lists, without checking what each of them measures.

    Raises:
        ConfigError: the store has no such suite.
        DataError: its file is broken.
    """
    try:
        cells = json.loads(_suite_path(runs, name).read_bytes())["cells"]
        return [SuiteEntry(cell["id"], cell["reason"]) for cell in cells]
    except (OSError, ValueError, TypeError, KeyError):
        return [SuiteEntry(cell.id, cell.reason) for cell in read_suite(runs, name).cells]


def write_suite(runs: Path, suite: Suite) -> None:
    """Write a suite's list of cells."""
    cells = [
        {
            "id": cell.id,
            "spec": cell.spec.model_dump(mode="json"),
            "added": cell.added,
            "reason": cell.reason,
            "command": cell.command,
        }
        for cell in suite.cells
    ]
    values = {"name": suite.name, "title": suite.title, "cells": cells}
    write_atomic(_suite_path(runs, suite.name), json.dumps(values, indent=1, sort_keys=True) + "\n")


def merge_suite(old: Suite | None, new: Suite) -> Suite:
    """Return ``new`` with what stays of ``old``.

    Cells added by hand join the list and replace those of the same slot; a matrix replaces its own
    cells and keeps those that were added.
    """
    if old is None:
        return new
    taken = {cell.spec.slot for cell in new.cells}
    by_hand = all(cell.added for cell in new.cells)
    kept = [c for c in old.cells if c.spec.slot not in taken and (by_hand or c.added)]
    cells = (*kept, *new.cells) if by_hand else (*new.cells, *kept)
    return Suite(new.name, new.title or old.title, cells)


def load_suite(runs: Path, name: str) -> list[CellResult]:
    """Return the results of a suite's cells, in its order; those never begun are ``partial``.

    Of each turn only its score is kept: the texts of ten thousand cells would fill the memory.

    Raises:
        ConfigError: the store has no such suite.
        DataError: a file of the suite or of its cells is broken.
    """
    return [_suite_result(runs, cell) for cell in read_suite(runs, name).cells]


def _suite_result(runs: Path, cell: SuiteCell) -> CellResult:
    folder = cell_folder(runs, cell.id)
    if (folder / CELL).exists():
        result = read_result(folder)
        if result.status == "done" or cell.reason is None:
            return replace(result, episodes=tuple(map(_without_texts, result.episodes)))
    status: Status = "partial" if cell.reason is None else "not_run"
    return CellResult(cell.spec, status, cell.reason, cell.command, id=cell.id)


def _without_texts(episode: EpisodeRecord) -> EpisodeRecord:
    steps = tuple(_step_of(step["score"]) for step in episode.steps)
    return replace(episode, steps=steps, final_observation="")


@functools.lru_cache(maxsize=4096)
def _step_of(score: float) -> dict[str, float]:
    """Return a step that holds its score alone; episodes share it."""
    return {"score": score}


def _suite_path(runs: Path, name: str) -> Path:
    if not name or Path(name).name != name or name.startswith("."):
        raise ConfigError(f"`{name}` cannot name a suite: letters, digits, - and _ only")
    return runs / "suites" / f"{name}.json"


def _scan(path: Path) -> tuple[list[EpisodeRecord], int]:
    """Return the whole records, sorted, first of each number, and the length of the whole lines."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    found: dict[int, EpisodeRecord] = {}
    position = 0
    lines = data.split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            episode = from_line(line)
        except DataError as error:
            if number == len(lines) and data.endswith(b"\n"):
                break
            raise DataError(
                f"{path}: line {number} is broken ({error}). "
                f"To measure the cell again: rm -r {path.parent}"
            ) from None
        found.setdefault(episode.episode, episode)
        position += len(line) + 1
    return sorted(found.values(), key=lambda episode: episode.episode), position


def _verify_cell(folder: Path) -> list[str]:
    cell = read_cell(folder)
    again = f"To measure the cell again: rm -r {folder}"
    if cell.id != folder.name or cell_id(json.loads(canonical(cell.identity))) != cell.id:
        return [f"{folder / CELL} was changed: its id is not the hash of its identity. {again}"]
    path = folder / EPISODES
    numbers = {episode.episode for episode in read_episodes(folder)}
    if cell.status not in {"done", "failed"}:
        return []
    found = sha256_file(path) if path.exists() else None
    if found != cell.sha256:
        recorded = (cell.sha256 or "none")[:12]
        return [f"{path}: sha256 is {(found or 'none')[:12]}, recorded was {recorded}. {again}"]
    owed = set(range(cell.spec.episodes)) - numbers
    if cell.status == "done" and owed:
        return [f"{path}: {len(owed)} of {cell.spec.episodes} episodes are missing. {again}"]
    return []
