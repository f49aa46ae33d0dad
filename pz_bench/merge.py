"""Two machines' stores become one: ``pz-bench merge OTHER_RUNS``.

A cell's id is the hash of all that can change its number, so equal ids are the same measurement.
A cell that only the other store has is copied; of two the fuller one is kept. Two that are done but
differ, other than in seconds, agents' notes or the commands listed beside a turn, stay as they are
here and are reported. Every cell is verified before it is copied, and appears whole or not at all.
Suites are united.
"""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from pz_bench import store
from pz_bench.cell import EpisodeRecord
from pz_bench.lock import NAME as LOCK
from pz_bench.lock import FolderLock, holder
from pz_bench.steps import COMMANDS
from pz_envs.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Merged:
    """What ``merge`` did: ids of cells copied, replaced by a fuller one, equal, and in conflict."""

    copied: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    equal: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()


def merge(runs: Path, other: Path) -> Merged:
    """Bring what the store ``other`` has into ``runs``; ``other`` is only read.

    Raises:
        ConfigError: ``other`` is no store, or is ``runs`` itself.
        DataError: a file of either store is broken; nothing was copied then.
        Locked: a cell to be replaced is being written.
    """
    if not other.is_dir() or not store.cell_folders(other):
        raise ConfigError(f"{other} holds no cells; merge needs another folder of runs")
    if runs.exists() and os.path.samefile(runs, other):
        raise ConfigError(f"{other} is this store; merge needs another folder of runs")
    problems = store.verify(other) + store.verify(runs)
    if problems:
        raise DataError("; ".join(problems))
    copied: list[str] = []
    replaced: list[str] = []
    equal: list[str] = []
    conflicts: list[str] = []
    for source in store.cell_folders(other):
        target = store.cell_folder(runs, source.name)
        if not (target / store.CELL).exists():
            _copy(source, target)
            copied.append(source.name)
            continue
        if store.read_cell(source).status == store.read_cell(target).status == "done":
            (equal if _same_numbers(source, target) else conflicts).append(source.name)
        elif _fullness(source) > _fullness(target):
            with FolderLock(target):
                _copy(source, target)
            replaced.append(source.name)
        else:
            equal.append(source.name)
    for name in store.suite_names(other):
        known = name in store.suite_names(runs)
        old = store.read_suite(runs, name) if known else None
        store.write_suite(runs, _united(old, store.read_suite(other, name)))
    return Merged(tuple(copied), tuple(replaced), tuple(equal), tuple(conflicts))


def _same_numbers(source: Path, target: Path) -> bool:
    """Return whether two cells agree in all but seconds and what is only there to be looked at."""
    theirs, ours = ([*map(_played, store.read_episodes(folder))] for folder in (source, target))
    return theirs == ours


def _played(episode: EpisodeRecord) -> EpisodeRecord:
    steps = tuple(
        {key: value for key, value in step.items() if key not in (COMMANDS, "notes")}
        for step in episode.steps
    )
    return replace(episode, seconds=0.0, steps=steps)


def _fullness(folder: Path) -> tuple[bool, int]:
    """Return whether the cell is done and how many episodes it has, to compare two of them."""
    return store.read_cell(folder).status == "done", len(store.read_episodes(folder))


def _copy(source: Path, target: Path) -> None:
    """Put a copy of the cell at ``target`` at once; what was there is moved out of the way first.

    Raises:
        DataError: a process is writing the source.
    """
    if holder(source) is not None:
        raise DataError(f"{source} is being written; merge again when its run has ended")
    mark = uuid.uuid4().hex[:8]
    fresh = target.with_name(f".{target.name}.{mark}.new")
    shutil.copytree(source, fresh, ignore=shutil.ignore_patterns(LOCK))
    old = target.with_name(f".{target.name}.{mark}.old")
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _united(old: store.Suite | None, new: store.Suite) -> store.Suite:
    """Return the suite with the cells of both, ours first; one not run here gives way."""
    if old is None:
        return new
    theirs = {cell.id: cell for cell in new.cells}
    ours = [theirs.get(cell.id, cell) if cell.reason is not None else cell for cell in old.cells]
    known = {cell.id for cell in ours}
    return store.Suite(
        old.name, old.title or new.title, (*ours, *(c for c in new.cells if c.id not in known))
    )
