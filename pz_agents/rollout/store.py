"""The experience store: finished episodes in one sqlite file, handed out in groups.

At most one process plays into the file and one trains from it (lock files say which); they may be
the same. A lease and its acknowledgement are one transaction each, so a group is trained as often
as it may be in the history that a resume continues: leases of a session that died return when the
trainer opens the store, and ``rollback`` takes back what happened after a checkpoint. The file
survives ``kill -9``. There is no clock in it and nothing is pickled: runs that played and trained
the same have the same ``snapshot``, byte for byte.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from pz_agents.rollout.codec import decode, encode
from pz_agents.sdk.types import Trajectory
from pz_envs.errors import DataError, InfraError
from pz_envs.files import fsync_folder
from pz_envs.seeding import derive_seed

Policy = Literal["fifo", "latest", "uniform", "priority"]
Role = Literal["both", "explorer", "trainer"]

_SCHEMA_VERSION = "2"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS groups(
  number INTEGER PRIMARY KEY, group_id TEXT UNIQUE NOT NULL,
  state TEXT NOT NULL CHECK(state IN ('new', 'leased', 'consumed', 'dropped')),
  lease_id TEXT, collected INTEGER NOT NULL, step INTEGER);
CREATE TABLE IF NOT EXISTS uses(
  group_id TEXT NOT NULL REFERENCES groups(group_id) ON DELETE CASCADE,
  step INTEGER NOT NULL, lease_id TEXT, PRIMARY KEY(group_id, step));
CREATE TABLE IF NOT EXISTS trajectories(
  number INTEGER PRIMARY KEY, traj_id TEXT UNIQUE NOT NULL,
  group_id TEXT NOT NULL REFERENCES groups(group_id) ON DELETE CASCADE,
  task_id TEXT NOT NULL, status TEXT NOT NULL, kind TEXT NOT NULL, version_min INTEGER,
  reward REAL, blob BLOB NOT NULL);
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

    Args:
        path: the file, made when it is not there.
        role: ``"explorer"`` appends, ``"trainer"`` leases, acknowledges and rolls back; each lets
            another process do the other. ``"both"`` keeps everyone else out.

    Raises:
        InfraError: another process has the store open in this role.
        DataError: the file is damaged (it is then moved to ``*.corrupt-<time>``, and opening again
            begins with an empty store) or was written by another version.
    """

    def __init__(self, path: Path | str, role: Role = "both") -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._role = role
        self._locks: list[int] = []
        try:
            self._locks.extend(_lock(self.path, name, role) for name in _names(role))
            with _opening(self.path):
                self._db = _open(self.path, role)
        except BaseException:
            self._unlock()
            raise

    def __enter__(self) -> ExperienceStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(
        self, trajectories: Iterable[Trajectory], step: int, *, batch: int | None = None
    ) -> None:
        """Add finished episodes, in one transaction.

        A trajectory without ``group_id`` is a group of its own. Give whole groups: a group can be
        leased as soon as it is here. Keys that are here already are left as they are. How long an
        episode took is not kept.

        Args:
            trajectories: the episodes.
            step: optimizer steps done by the weights that played them; see ``rollback``.
            batch: what ``batches`` says from now on.

        Raises:
            DataError: a group was leased or consumed already, or a trajectory cannot be stored.
        """
        rows = [(item, encode(replace(item, seconds=0.0))) for item in trajectories]
        with self._transaction() as db:
            for trajectory, blob in rows:
                key = trajectory.key
                if db.execute("SELECT 1 FROM trajectories WHERE traj_id = ?", (key,)).fetchone():
                    continue
                group_id = trajectory.group_id or key
                self._join_group(db, group_id, key, step)
                db.execute(
                    "INSERT INTO trajectories(traj_id, group_id, task_id, status, kind,"
                    " version_min, reward, blob) VALUES (?,?,?,?,?,?,?,?)",
                    (
                        key,
                        group_id,
                        trajectory.task_id,
                        trajectory.status,
                        trajectory.kind,
                        _version_min(trajectory),
                        trajectory.reward,
                        blob,
                    ),
                )
            if batch is not None:
                db.execute("INSERT OR REPLACE INTO meta VALUES ('batches', ?)", (str(batch),))

    @property
    def batches(self) -> int:
        """Return the number of the last batch that ``append`` was told of; 0 before any."""
        row = self._db.execute("SELECT v FROM meta WHERE k = 'batches'").fetchone()
        return int(row[0]) if row else 0

    def lease(
        self,
        n_groups: int,
        policy: Policy = "fifo",
        *,
        seed: int = 0,
        played: range | None = None,
    ) -> Lease:
        """Take up to ``n_groups`` new groups; fewer, or none, when there are no more.

        Args:
            n_groups: most groups to take.
            policy: oldest first, newest first, ``"uniform"`` at random, or by ``"priority"``: the
                step of the weights that played a group less twice its uses, highest first.
            seed: decides the uniform choice; pass the step number.
            played: take only groups played by weights of these steps.
        """
        if policy not in get_args(Policy):
            known = ", ".join(get_args(Policy))
            raise DataError(f"no lease policy {policy!r}; there are {known}")
        lease_id = uuid.uuid4().hex
        with self._transaction() as db:
            found = db.execute(
                "SELECT group_id, collected,"
                " (SELECT count(*) FROM uses WHERE uses.group_id = groups.group_id)"
                " FROM groups WHERE state = 'new' ORDER BY number"
            )
            rows = [row for row in found if played is None or row[1] in played]
            if policy == "latest":
                rows.reverse()
            elif policy == "uniform":
                rows.sort(key=lambda row: derive_seed(seed, "lease", row[0]))
            elif policy == "priority":
                rows.sort(key=lambda row: 2 * row[2] - row[1])
            names = [row[0] for row in rows[: max(n_groups, 0)]]
            db.executemany(
                "UPDATE groups SET state = 'leased', lease_id = ? WHERE group_id = ?",
                [(lease_id, name) for name in names],
            )
            groups = tuple(self._read(db, name) for name in names)
        return Lease(lease_id, tuple(names), groups)

    def drop_stale(self, played: range, step: int) -> int:
        """Drop new groups that weights of other steps than ``played`` played; return how many.

        Args:
            played: steps of weights whose episodes may still be trained on.
            step: the step that has no use for the others; see ``rollback``.
        """
        with self._transaction() as db:
            return db.execute(
                "UPDATE groups SET state = 'dropped', step = ?"
                " WHERE state = 'new' AND NOT (collected >= ? AND collected < ?)",
                (step, played.start, played.stop),
            ).rowcount

    def ack(self, lease: Lease, step: int, max_uses: int = 1) -> None:
        """Mark a lease's groups as used by optimizer step ``step``; twice is once.

        A group is consumed after ``max_uses`` uses and new again before.

        Raises:
            DataError: the lease is no longer held (it was released or rolled back).
        """
        with self._transaction() as db:
            db.execute(
                "INSERT INTO uses SELECT group_id, ?, lease_id FROM groups"
                " WHERE lease_id = ? AND state = 'leased'",
                (step, lease.id),
            )
            db.execute(
                "UPDATE groups SET lease_id = NULL, state = CASE WHEN"
                " (SELECT count(*) FROM uses WHERE uses.group_id = groups.group_id) >= ?"
                " THEN 'consumed' ELSE 'new' END WHERE lease_id = ? AND state = 'leased'",
                (max_uses, lease.id),
            )
            query = "SELECT count(*) FROM uses WHERE lease_id = ?"
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

        Groups that later steps used or dropped are new again; groups collected by weights of later
        steps are deleted, because those weights are not in the history that goes on from here.
        """
        with self._transaction() as db:
            _return_leases(db)
            db.execute("DELETE FROM groups WHERE collected > ?", (step,))
            db.execute(
                "UPDATE groups SET state = 'new', step = NULL"
                " WHERE group_id IN (SELECT group_id FROM uses WHERE step > ?) OR step > ?",
                (step, step),
            )
            db.execute("DELETE FROM uses WHERE step > ?", (step,))

    def counts(self) -> Mapping[str, int]:
        """Return the number of groups by state, and of all ``trajectories``."""
        counts = {"new": 0, "leased": 0, "consumed": 0, "dropped": 0}
        counts.update(self._db.execute("SELECT state, count(*) FROM groups GROUP BY state"))
        query = "SELECT count(*) FROM trajectories"
        counts["trajectories"] = self._db.execute(query).fetchone()[0]
        return counts

    def unspent(self) -> int:
        """Return the number of groups that are still to be used, those on a lease included."""
        query = "SELECT count(*) FROM groups WHERE state IN ('new', 'leased')"
        return int(self._db.execute(query).fetchone()[0])

    def trajectories(self) -> Iterator[Trajectory]:
        """Yield every trajectory in the order they were added."""
        for (blob,) in self._db.execute("SELECT blob FROM trajectories ORDER BY number"):
            yield decode(blob)

    def snapshot(self, path: Path | str, *, unspent: bool = False) -> None:
        """Write a store with this one's content to ``path``, all of it or nothing.

        The same content gives the same bytes, whatever was deleted or rolled back on the way.

        Args:
            path: of the copy.
            unspent: leave out groups that were consumed or dropped.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # What is on the disk must not be older than a copy that says what was done.
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as copy:
                copy.execute("PRAGMA journal_mode = OFF")
                copy.executescript(_SCHEMA)
                copy.execute("ATTACH DATABASE ? AS source", (str(self.path),))
                _copy_rows(copy, "WHERE state IN ('new', 'leased')" if unspent else "")
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(path.parent)

    def close(self) -> None:
        """Return what is still leased, close the file and give up the lock."""
        if not self._locks:
            return
        if self._role != "explorer":
            with self._transaction() as db:
                _return_leases(db)
        self._db.close()
        self._unlock()

    def _unlock(self) -> None:
        while self._locks:
            os.close(self._locks.pop())

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


def _copy_rows(copy: sqlite3.Connection, which: str) -> None:
    """Copy the attached ``source`` into ``copy``, in order; a lease does not outlive its session.

    Args:
        copy: an empty store.
        which: the WHERE clause that chooses the groups.
    """
    copy.execute("BEGIN")
    copy.execute(
        "INSERT INTO main.groups SELECT number, group_id,"
        " CASE state WHEN 'leased' THEN 'new' ELSE state END, NULL, collected, step"
        f" FROM source.groups {which} ORDER BY number"
    )
    kept = "WHERE group_id IN (SELECT group_id FROM main.groups)"
    copy.execute(
        f"INSERT INTO main.uses SELECT group_id, step, NULL FROM source.uses {kept}"
        " ORDER BY step, group_id"
    )
    copy.execute(
        f"INSERT INTO main.trajectories SELECT * FROM source.trajectories {kept} ORDER BY number"
    )
    copy.execute("INSERT INTO main.meta SELECT * FROM source.meta ORDER BY k")
    copy.execute("COMMIT")


def _version_min(trajectory: Trajectory) -> int | None:
    versions = [step.sample.version for step in trajectory.steps if step.sample is not None]
    return min(versions, default=None)


def check_free(path: Path, role: Role) -> None:
    """Say whether the store could be opened as ``role`` now; nothing is made or changed.

    Raises:
        InfraError: another process has the store open in this role.
    """
    for name in _names(role):
        if _lock_file(path, name).exists():
            os.close(_lock(path, name, role))


def _names(role: Role) -> tuple[str, ...]:
    return ("explorer", "trainer") if role == "both" else (role,)


def _lock_file(path: Path, name: str) -> Path:
    return path.with_name(f"{path.name}.{name}.lock")


def _lock(path: Path, name: str, role: Role) -> int:
    """Take the lock that this process, while it lives, is the store's ``name``."""
    does = "that plays and trains" if role == "both" else f"as its {role}"
    return take_lock(_lock_file(path, name), path, does)


def take_lock(file: Path, what: Path, does: str) -> int:
    """Take the lock ``file`` for as long as this process lives; a dead holder is no obstacle.

    Args:
        file: made when it is not there; says who holds it.
        what: what the lock is of, for the error.
        does: what this process does with it, for the error of the next.

    Returns:
        The descriptor to close when the lock is to be given up.

    Raises:
        InfraError: another process holds the lock.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(descriptor, 200).decode(errors="replace") or "an unknown process"
        os.close(descriptor)
        raise InfraError(
            f"{what} is open in {holder}; stop that one first, or use another place"
        ) from error
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename} {does}".encode())
    return descriptor


@contextlib.contextmanager
def _opening(path: Path) -> Iterator[None]:
    """Let one process at a time create or check the file."""
    with open(path.with_name(f"{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open(path: Path, role: Role) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=30.0, isolation_level=None)
    try:
        problems = [row[0] for row in db.execute("PRAGMA integrity_check(3)")]
        if problems != ["ok"]:
            raise sqlite3.DatabaseError("; ".join(problems))
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA foreign_keys = ON")
        written = _schema_version(db)
        if written == _SCHEMA_VERSION:
            db.executescript(_SCHEMA)
            if role != "explorer":
                _return_leases(db)
    except sqlite3.OperationalError as error:
        db.close()
        raise InfraError(f"cannot open {path}: {error}; check the folder and the disk") from error
    except sqlite3.DatabaseError as error:
        db.close()
        raise DataError(_set_aside(path, role, error)) from error
    if written != _SCHEMA_VERSION:
        db.close()
        raise DataError(
            f"{path} has schema version {written}; this program writes {_SCHEMA_VERSION}. "
            "Use the program that wrote it, or another file"
        )
    return db


def _schema_version(db: sqlite3.Connection) -> str:
    """Return the version that the file was written with; an empty file gets ours."""
    db.execute("CREATE TABLE IF NOT EXISTS meta(k TEXT PRIMARY KEY, v TEXT NOT NULL)")
    db.execute("INSERT OR IGNORE INTO meta VALUES ('schema_version', ?)", (_SCHEMA_VERSION,))
    return str(db.execute("SELECT v FROM meta WHERE k = 'schema_version'").fetchone()[0])


def _set_aside(path: Path, role: Role, error: Exception) -> str:
    """Rename a damaged store and its journals; returns the sentence that reports it."""
    if role != "both":
        other = "trainer" if role == "explorer" else "explorer"
        try:
            os.close(_lock(path, other, role))
        except InfraError as held:
            return f"{path} is damaged ({error}) and in use: {held}"
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
