"""The experience store: finished episodes in one sqlite file, handed out in groups.

One process writes (a lock file says which). A lease and its acknowledgement are one transaction
each, so a group is trained once in the history that a resume continues: leases of a session that
died return when the store is opened, and ``rollback`` takes back what happened after a checkpoint.
The file survives ``kill -9``. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pz_agents.rollout.codec import decode, encode
from pz_agents.sdk.types import Trajectory
from pz_envs.errors import DataError, InfraError
from pz_envs.files import fsync_folder
from pz_envs.seeding import derive_seed

Policy = Literal["fifo", "latest", "uniform"]

_SCHEMA_VERSION = "1"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS groups(
  number INTEGER PRIMARY KEY AUTOINCREMENT, group_id TEXT UNIQUE NOT NULL,
  state TEXT NOT NULL CHECK(state IN ('new', 'leased', 'consumed')),
  lease_id TEXT, uses INTEGER NOT NULL DEFAULT 0, collected INTEGER NOT NULL, step INTEGER);
CREATE TABLE IF NOT EXISTS trajectories(
  number INTEGER PRIMARY KEY AUTOINCREMENT, traj_id TEXT UNIQUE NOT NULL,
  group_id TEXT NOT NULL REFERENCES groups(group_id) ON DELETE CASCADE,
  task_id TEXT NOT NULL, status TEXT NOT NULL, kind TEXT NOT NULL, version_min INTEGER,
  reward REAL, blob BLOB NOT NULL, created REAL NOT NULL);
CREATE INDEX IF NOT EXISTS trajectories_of_group ON trajectories(group_id);
CREATE INDEX IF NOT EXISTS groups_by_state ON groups(state);
CREATE TABLE IF NOT EXISTS meta(k TEXT PRIMARY KEY, v TEXT NOT NULL);
"""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """Groups that are being trained on; hand it to ``ack`` or ``release``.

    ``groups`` are in the order they are to be used, each with all of its trajectories.
    """

    id: str
    group_ids: tuple[str, ...]
    groups: tuple[tuple[Trajectory, ...], ...]


class ExperienceStore:
    """Trajectories by group, in the sqlite file ``path``; use it from one thread.

    Raises:
        InfraError: another process has the store open.
        DataError: the file is damaged (it is then moved to ``*.corrupt-<time>``, and opening again
            begins with an empty store) or was written by another version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path.with_name(self.path.name + ".lock"))
        try:
            self._db = _open(self.path)
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> ExperienceStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, trajectories: Iterable[Trajectory], step: int) -> None:
        """Add finished episodes, in one transaction.

        A trajectory without ``group_id`` is a group of its own. Give whole groups: a group can be
        leased as soon as it is here. Keys that are here already are left as they are.

        Args:
            trajectories: the episodes.
            step: optimizer steps done by the weights that played them; see ``rollback``.

        Raises:
            DataError: a group was leased or consumed already, or a trajectory cannot be stored.
        """
        rows = [(trajectory, encode(trajectory)) for trajectory in trajectories]
        with self._transaction() as db:
            for trajectory, blob in rows:
                key = trajectory.key
                if db.execute("SELECT 1 FROM trajectories WHERE traj_id = ?", (key,)).fetchone():
                    continue
                group_id = trajectory.group_id or key
                self._join_group(db, group_id, key, step)
                db.execute(
                    "INSERT INTO trajectories(traj_id, group_id, task_id, status, kind,"
                    " version_min, reward, blob, created) VALUES (?,?,?,?,?,?,?,?,?)",
                    (
                        key,
                        group_id,
                        trajectory.task_id,
                        trajectory.status,
                        trajectory.kind,
                        _version_min(trajectory),
                        trajectory.reward,
                        blob,
                        time.time(),
                    ),
                )

    def lease(self, n_groups: int, policy: Policy = "fifo", *, seed: int = 0) -> Lease:
        """Take up to ``n_groups`` new groups; fewer, or none, when there are no more.

        Args:
            n_groups: most groups to take.
            policy: oldest first, newest first, or ``"uniform"`` at random.
            seed: decides the uniform choice; pass the step number.
        """
        lease_id = uuid.uuid4().hex
        with self._transaction() as db:
            found = db.execute("SELECT group_id FROM groups WHERE state = 'new' ORDER BY number")
            names = [row[0] for row in found]
            if policy == "latest":
                names.reverse()
            elif policy == "uniform":
                names.sort(key=lambda name: derive_seed(seed, "lease", name))
            elif policy != "fifo":
                raise DataError(f"no lease policy {policy!r}; there are fifo, latest, uniform")
            names = names[: max(n_groups, 0)]
            db.executemany(
                "UPDATE groups SET state = 'leased', lease_id = ? WHERE group_id = ?",
                [(lease_id, name) for name in names],
            )
            groups = tuple(self._read(db, name) for name in names)
        return Lease(lease_id, tuple(names), groups)

    def ack(self, lease: Lease, step: int) -> None:
        """Mark a lease's groups as consumed by optimizer step ``step``; twice is once.

        Raises:
            DataError: the lease is no longer held (it was released or rolled back).
        """
        with self._transaction() as db:
            db.execute(
                "UPDATE groups SET state = 'consumed', step = ?, uses = uses + 1"
                " WHERE lease_id = ? AND state = 'leased'",
                (step, lease.id),
            )
            query = "SELECT count(*) FROM groups WHERE lease_id = ? AND state = 'consumed'"
            held = db.execute(query, (lease.id,)).fetchone()[0]
            if held != len(lease.group_ids):
                raise DataError(
                    f"{self.path}: step {step} acknowledges {len(lease.group_ids)} groups of which "
                    f"{held} are on this lease; it was released or rolled back. Lease anew."
                )

    def release(self, lease: Lease) -> None:
        """Give a lease's groups back untrained; after ``ack`` this does nothing."""
        with self._transaction() as db:
            _return_leases(db, lease.id)

    def rollback(self, step: int) -> None:
        """Return to how things were right after optimizer step ``step``.

        Groups consumed by later steps are new again; groups collected by weights of later steps
        are deleted, because those weights are not in the history that goes on from here.
        """
        with self._transaction() as db:
            _return_leases(db)
            db.execute("DELETE FROM groups WHERE collected > ?", (step,))
            db.execute(
                "UPDATE groups SET state = 'new', lease_id = NULL, step = NULL,"
                " uses = max(uses - 1, 0) WHERE state = 'consumed' AND step > ?",
                (step,),
            )

    def counts(self) -> Mapping[str, int]:
        """Return the number of groups by state, and of all ``trajectories``."""
        counts = {"new": 0, "leased": 0, "consumed": 0}
        counts.update(self._db.execute("SELECT state, count(*) FROM groups GROUP BY state"))
        query = "SELECT count(*) FROM trajectories"
        counts["trajectories"] = self._db.execute(query).fetchone()[0]
        return counts

    def trajectories(self) -> Iterator[Trajectory]:
        """Yield every trajectory in the order they were added."""
        for (blob,) in self._db.execute("SELECT blob FROM trajectories ORDER BY number"):
            yield decode(blob)

    def snapshot(self, path: Path | str) -> None:
        """Write a complete copy of the store to ``path``, all of it or nothing."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with contextlib.closing(sqlite3.connect(temporary)) as copy:
                self._db.backup(copy)
                copy.execute("PRAGMA journal_mode = DELETE")
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(path.parent)

    def close(self) -> None:
        """Return what is still leased, close the file and give up the lock."""
        if self._lock < 0:
            return
        with self._transaction() as db:
            _return_leases(db)
        self._db.close()
        os.close(self._lock)
        self._lock = -1

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _join_group(self, db: sqlite3.Connection, group_id: str, key: str, step: int) -> None:
        row = db.execute("SELECT state FROM groups WHERE group_id = ?", (group_id,)).fetchone()
        if row is None:
            db.execute(
                "INSERT INTO groups(group_id, state, collected) VALUES (?, 'new', ?)",
                (group_id, step),
            )
        elif row[0] != "new":
            raise DataError(
                f"{self.path}: {key} comes too late for group {group_id}, which is {row[0]}; "
                "append a group's trajectories together"
            )

    def _read(self, db: sqlite3.Connection, group_id: str) -> tuple[Trajectory, ...]:
        query = "SELECT blob FROM trajectories WHERE group_id = ? ORDER BY number"
        return tuple(decode(blob) for (blob,) in db.execute(query, (group_id,)))


def _return_leases(db: sqlite3.Connection, lease_id: str | None = None) -> None:
    """Make leased groups new again: those of one lease, or all."""
    db.execute(
        "UPDATE groups SET state = 'new', lease_id = NULL"
        " WHERE state = 'leased' AND lease_id = coalesce(?, lease_id)",
        (lease_id,),
    )


def _version_min(trajectory: Trajectory) -> int | None:
    versions = [step.sample.version for step in trajectory.steps if step.sample is not None]
    return min(versions, default=None)


def _lock(path: Path) -> int:
    """Take the lock that this process, while it lives, is the one writer."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(descriptor, 200).decode(errors="replace") or "an unknown process"
        os.close(descriptor)
        raise InfraError(
            f"{path.with_suffix('')} is open in {holder}; stop that one first, or use another file"
        ) from error
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode())
    return descriptor


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=30.0, isolation_level=None)
    try:
        problems = [row[0] for row in db.execute("PRAGMA integrity_check(3)")]
        if problems != ["ok"]:
            raise sqlite3.DatabaseError("; ".join(problems))
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA foreign_keys = ON")
        db.executescript(_SCHEMA)
        db.execute("INSERT OR IGNORE INTO meta VALUES ('schema_version', ?)", (_SCHEMA_VERSION,))
        written = db.execute("SELECT v FROM meta WHERE k = 'schema_version'").fetchone()[0]
        if written == _SCHEMA_VERSION:
            _return_leases(db)
    except sqlite3.OperationalError as error:
        db.close()
        raise InfraError(f"cannot open {path}: {error}; check the folder and the disk") from error
    except sqlite3.DatabaseError as error:
        db.close()
        raise DataError(_set_aside(path, error)) from error
    if written != _SCHEMA_VERSION:
        db.close()
        raise DataError(
            f"{path} has schema version {written}; this program writes {_SCHEMA_VERSION}. "
            "Use the program that wrote it, or another file"
        )
    return db


def _set_aside(path: Path, error: Exception) -> str:
    """Rename a damaged store and its journals; returns the sentence that reports it."""
    aside = path.with_name(f"{path.name}.corrupt-{time.strftime('%Y%m%dT%H%M%S')}")
    for suffix in ("", "-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    message = (
        f"{path} is damaged ({error}) and was moved to {aside}. Copy a snapshot back to {path}, "
        "or run again to begin with an empty store"
    )
    _logger.error(message)
    return message
