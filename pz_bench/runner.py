"""The runner: which cells are owed, and a pool of child processes that measures them.

Every cell has its own process and its own folder, so a crash costs one cell and ``kill -9`` at any
moment costs at most the episode that was being written. A cell whose process crashes is tried once
more. Longest cells go first; a model that has to be built is built once, beside the cells that do
not need it. Children end with the runner, however it ends.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pz_agents.errors import ModelError
from pz_bench import store
from pz_bench.cell import CellSpec, cell_id, identity, is_trained
from pz_bench.cell_process import DONE, FAILED, LOCKED, PROGRESS
from pz_bench.lock import NAME as LOCK
from pz_bench.lock import FolderLock, Locked
from pz_envs.errors import ConfigError, did_you_mean

State = Literal["owed", "running", "done", "failed", "locked", "not_run"]

ATTEMPTS = 2
_GRACE_SECONDS = 30.0
_POLL_SECONDS = 0.1
_LOG_LINES = 15
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(slots=True)
class Job:
    """One cell of a run and where it stands; the runner moves ``state`` along.

    ``reason`` and ``command`` say why a cell could not be run or has failed; ``measured_seconds``
    is what a done cell took, 0 for the others. ``fresh``: what the store has of it goes when it is
    started, and not before.
    """

    spec: CellSpec
    id: str
    parts: Mapping[str, Any]
    state: State
    reason: str | None = None
    command: str | None = None
    measured_seconds: float = 0.0
    fresh: bool = False
    attempts: int = 0
    began: float = 0.0
    seconds: float = 0.0
    progress: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Board:
    """What a view of a run shows: every job, and how far the building of ``tiny`` is, if it is."""

    jobs: Sequence[Job]
    building: Mapping[str, Any] | None = None
    began: float = field(default_factory=time.monotonic)

    def counts(self) -> Counter[str]:
        """Return how many jobs are in each state."""
        return Counter(job.state for job in self.jobs)


View = Callable[[Board, Job | None], None]
"""Called a few times a second with None, and with each job that has just ended."""


def plan(runs: Path, specs: Sequence[CellSpec], *, retry_failed: bool = False) -> list[Job]:
    """Compare ``specs`` with the store.

    Args:
        runs: the store.
        specs: the cells wanted.
        retry_failed: owe failed cells, and failed episodes of done cells, again.

    Raises:
        ConfigError: a cell cannot exist (no such agent file, environment, model).
        DataError: a file of the store is broken.
    """
    reasons: dict[tuple[str, str, str | None], tuple[str, str | None] | None] = {}
    jobs = [_job(runs, spec, retry_failed) for spec in specs]
    for job in jobs:
        if job.state != "owed":
            continue
        place = (job.spec.algorithm, job.spec.env, job.spec.model)
        if place not in reasons:
            reasons[place] = unavailable(job.spec)
        if (why := reasons[place]) is not None:
            job.state, (job.reason, job.command) = "not_run", why
    return jobs


def _job(runs: Path, spec: CellSpec, retry_failed: bool) -> Job:
    parts = identity(spec)
    job = Job(spec, cell_id(parts), parts, "owed")
    folder = store.cell_folder(runs, job.id)
    if (folder / store.CELL).exists():
        cell = store.read_cell(folder)
        if cell.status in {"done", "failed"}:
            job.state, job.reason = ("done" if cell.status == "done" else "failed"), cell.reason
            job.measured_seconds = cell.seconds if cell.status == "done" else 0.0
            if retry_failed and _has_failures(folder, cell):
                job.state, job.reason = "owed", None
    return job


def _has_failures(folder: Path, cell: store.CellFile) -> bool:
    if cell.status == "failed":
        return True
    return any(episode.status == "failed" for episode in store.read_episodes(folder))


def renew(jobs: Sequence[Job], names: Sequence[str]) -> None:
    """Owe the named jobs again, from nothing. Their results stay until each is started.

    Args:
        jobs: the plan.
        names: cell ids, or ``all``.

    Raises:
        ConfigError: an id is not in the plan, or its cell cannot be run here.
    """
    known = {job.id: job for job in jobs}
    for name in names:
        if name != "all" and name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"--fresh {name}: no such cell in this run.{hint} See: pz-bench plan")
    for job in jobs if "all" in names else [known[name] for name in names]:
        if (why := unavailable(job.spec)) is None:
            job.state, job.reason, job.fresh = "owed", None, True
        elif job.id in names:
            command = f" Get it: {why[1]}" if why[1] else ""
            raise ConfigError(f"--fresh {job.id}: it cannot be run here. {why[0]}{command}")


def _empty(folder: Path) -> None:
    """Delete all in a cell's folder but its lock, which is still held."""
    (folder / store.CELL).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def unavailable(spec: CellSpec) -> tuple[str, str | None] | None:
    """Return why a cell cannot be run here and the command that would change it, else None."""
    from pz_envs.catalog import find, missing

    row = find(spec.env)
    if spec.algorithm == "expert" and not row.expert:
        return f"No expert is known for {row.id}.", None
    sentence = missing(row)
    if sentence is None:
        return None if spec.model is None else _absent_model(spec.model)
    reason, _, command = sentence.rpartition(": ")
    if not command.startswith(("pz-envs ", "pip ")):
        return sentence, None
    return reason.rpartition(". ")[0] + ".", command


@functools.cache
def _absent_model(model: str) -> tuple[str, str | None] | None:
    from pz_agents.models import is_hub_id, model_folder

    if not is_hub_id(model):
        return None
    try:
        model_folder(model)
    except ModelError as error:
        reason, _, command = str(error).rpartition(" Get it: ")
        return reason, command
    return None


def expected_cost(spec: CellSpec) -> float:
    """Return a cell's rough cost, only to order cells: trained, then model, then the rest."""
    turns = spec.episodes * spec.max_turns
    return turns * (1000.0 if is_trained(spec.algorithm) else 30.0 if spec.model else 1.0)


class Process(Protocol):
    """A running cell, here or on another machine."""

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        ...

    def terminate(self) -> None:
        """Ask it to save its state and end."""
        ...

    def wait(self, seconds: float) -> None:
        """Wait for its end, at most so long."""
        ...

    def kill(self) -> None:
        """End it with whatever it started, and clear up; it may have ended already."""
        ...


Launch = Callable[[Path, Sequence[str], Job | None], Process]
"""Starts a process in a folder, with more arguments; without a job, one that builds ``tiny``."""


def run_jobs(
    runs: Path,
    jobs: Sequence[Job],
    *,
    workers: int,
    view: View,
    launch: Launch | None = None,
    may_not: Callable[[Job], str | None] | None = None,
) -> Board:
    """Measure every job that is ``owed`` and return how all of them stand.

    Args:
        runs: the store.
        jobs: of the run.
        workers: most processes at once.
        view: shown what happens.
        launch: starts a process; None: on this machine.
        may_not: says why a job may not be started now; it stays owed with that reason.

    Raises:
        KeyboardInterrupt: after the children have saved their state and ended.
    """
    board = Board(jobs)
    pool = _Pool(runs, board, workers, view, launch or LocalProcess, may_not)
    try:
        pool.run()
    finally:
        pool.stop()
    return board


@dataclass(slots=True)
class _Child:
    """A running process: of a job, or, without one, of the building of ``tiny``."""

    process: Process
    folder: Path
    job: Job | None = None


class _Pool:
    """The children of one run."""

    def __init__(
        self,
        runs: Path,
        board: Board,
        workers: int,
        view: View,
        launch: Launch,
        may_not: Callable[[Job], str | None] | None,
    ) -> None:
        self._launch = launch
        self._may_not = may_not or (lambda job: None)
        self._runs = runs
        self._board = board
        self._workers = max(workers, 1)
        self._view = view
        self._children: list[_Child] = []
        owed = [job for job in board.jobs if job.state == "owed"]
        self._queue = sorted(owed, key=lambda job: -expected_cost(job.spec))
        self._must_build = any(job.spec.model == "tiny" for job in owed) and not _tiny_is_built()

    def run(self) -> None:
        while self._queue or self._children:
            self._start_more()
            for child in list(self._children):
                self._look_at(child)
            builder = self._builder()
            self._board.building = None if builder is None else _read_progress(builder.folder)
            self._view(self._board, None)
            if self._children:
                time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """End the children: first asked to save, then killed with whatever they started."""
        for child in self._children:
            child.process.terminate()
        give_up = time.monotonic() + _GRACE_SECONDS
        for child in self._children:
            with contextlib.suppress(KeyboardInterrupt):
                child.process.wait(max(give_up - time.monotonic(), 0.0))
            child.process.kill()
        self._children.clear()

    def _start_more(self) -> None:
        while len(self._children) < self._workers:
            if self._must_build:
                self._must_build = False
                folder = self._runs / "models" / "tiny"
                self._children.append(_Child(self._launch(folder, ["--build-tiny"], None), folder))
                continue
            waiting = "tiny" if self._builder() is not None else ""
            ready = next((job for job in self._queue if job.spec.model != waiting), None)
            if ready is None:
                return
            self._queue.remove(ready)
            ready.reason = self._may_not(ready)
            if ready.reason is None:
                self._start(ready)

    def _builder(self) -> _Child | None:
        return next((child for child in self._children if child.job is None), None)

    def _start(self, job: Job) -> None:
        folder = store.cell_folder(self._runs, job.id)
        if job.fresh and folder.exists():
            try:
                with FolderLock(folder):
                    _empty(folder)
            except Locked:
                job.state, job.reason = "locked", "another process is measuring it"
                self._view(self._board, job)
                return
        job.fresh = False
        store.create_cell(self._runs, job.spec, job.parts)
        if store.read_cell(folder).status != "partial":
            store.reopen_cell(folder)
        job.state, job.began, job.attempts = "running", time.monotonic(), job.attempts + 1
        self._children.append(_Child(self._launch(folder, [], job), folder, job))

    def _look_at(self, child: _Child) -> None:
        code = child.process.poll()
        if child.job is not None:
            child.job.progress = _read_progress(child.folder)
            child.job.seconds = time.monotonic() - child.job.began
        if code is None:
            return
        self._children.remove(child)
        child.process.kill()
        if child.job is not None:
            self._settle(child.job, child.folder, code)

    def _settle(self, job: Job, folder: Path, code: int) -> None:
        """Decide a job's next state from how its process ended."""
        if code == LOCKED:
            job.state, job.reason = "locked", "another process is measuring it"
        elif code in (DONE, FAILED):
            cell = store.read_cell(folder)
            job.state = "done" if cell.status == "done" else "failed"
            job.reason = cell.reason
        elif job.attempts < ATTEMPTS:
            job.state = "owed"
            self._queue.append(job)
            return
        else:
            log = folder / "log.txt"
            job.state = "failed"
            job.reason = f"its process ended {_ending(code)}, twice. {log} ends: {_tail(log)}"
            store.finish_cell(folder, "failed", reason=job.reason)
        self._view(self._board, job)


def _tiny_is_built() -> bool:
    from pz_agents.models.recipe import recipe_folder

    return recipe_folder().is_dir()


class LocalProcess:
    """A process of this machine, in a group of its own, tied to this one by its standard input."""

    def __init__(self, folder: Path, arguments: Sequence[str], job: Job | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = open(folder / "log.txt", "ab")  # noqa: SIM115  (closed when it has ended)
        self._process = subprocess.Popen(
            cell_command(str(folder), arguments),
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env=cell_environment(),
            start_new_session=True,
        )

    def poll(self) -> int | None:
        """See ``Process``."""
        return self._process.poll()

    def terminate(self) -> None:
        """See ``Process``."""
        self._process.terminate()

    def wait(self, seconds: float) -> None:
        """See ``Process``."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def kill(self) -> None:
        """See ``Process``."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._log.close()


def cell_command(folder: str, arguments: Sequence[str]) -> list[str]:
    """Return the command line of a cell's process."""
    module = ["-m", "pz_bench.cell_process", folder, "--with-parent"]
    return [sys.executable, *module, *arguments]


def cell_environment() -> dict[str, str]:
    """Return the environment of a cell's process: one thread, where nothing else was said."""
    return {**dict.fromkeys(_ONE_THREAD, "1"), **os.environ}


def _read_progress(folder: Path) -> Mapping[str, Any]:
    try:
        values = json.loads((folder / PROGRESS).read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _ending(code: int) -> str:
    if code >= 0:
        return f"with code {code}"
    with contextlib.suppress(ValueError):
        return f"by {signal.Signals(-code).name}"
    return f"by signal {-code}"


def _tail(path: Path) -> str:
    try:
        lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    except OSError:
        return "(no log)"
    return "\n".join(lines[-_LOG_LINES:]) or "(empty)"
