"""Command lists on disk, shared by every process, with the recent ones in memory.

One sqlite file in WAL mode: readers never wait, a writer killed in the middle leaves the last
complete list, and lists are JSON. A file that is not a sound database is renamed aside and a new
one begun. The cache is a convenience: when the disk refuses, it says so once and goes on in memory.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
from collections import OrderedDict
from pathlib import Path

from pz_envs.datasets import cache_dir

_LOG = logging.getLogger(__name__)
_WAIT_S = 5.0


class CommandCache:
    """Maps keys to tuples of strings; safe under threads, forks and concurrent processes.

    Args:
        path: the sqlite file; by default ``jericho/commands.sqlite`` in pz's cache folder.
        in_memory: how many lists are also kept in memory, the least recently used leave first.
    """

    def __init__(self, path: Path | str | None = None, *, in_memory: int = 20_000) -> None:
        self.path = Path(path) if path is not None else cache_dir() / "jericho/commands.sqlite"
        self._limit = in_memory
        self._recent: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._owner = 0
        self._disk = True

    def get(self, key: bytes) -> tuple[str, ...] | None:
        """Return the list kept under ``key``, or None."""
        with self._lock:
            found = self._recent.get(key)
            if found is not None:
                self._recent.move_to_end(key)
                return found
            row = self._ask("SELECT list FROM commands WHERE key = ?", (key,))
            if row is None:
                return None
            found = tuple(json.loads(row[0]))
            self._remember(key, found)
            return found

    def put(self, key: bytes, commands: tuple[str, ...]) -> None:
        """Keep a list; the first one kept under a key stays, so that all processes agree."""
        with self._lock:
            text = json.dumps(commands)
            self._ask("INSERT OR IGNORE INTO commands VALUES (?, ?)", (key, text))
            self._remember(key, commands)

    def close(self) -> None:
        """Close the file; the cache may be used again."""
        with self._lock:
            if self._connection is not None and self._owner == os.getpid():
                self._connection.close()
            self._connection = None

    def _remember(self, key: bytes, commands: tuple[str, ...]) -> None:
        self._recent[key] = commands
        self._recent.move_to_end(key)
        while len(self._recent) > self._limit:
            self._recent.popitem(last=False)

    def _ask(self, statement: str, values: tuple[object, ...]) -> tuple[str] | None:
        if not self._disk:
            return None
        for last_try in (False, True):
            try:
                row: tuple[str] | None = self._open().execute(statement, values).fetchone()
                return row
            except (sqlite3.OperationalError, OSError) as error:
                self._give_up(error)
                return None
            except sqlite3.DatabaseError as error:
                self._connection = None
                if last_try:
                    self._give_up(error)
                    return None
                self._set_aside(error)
        return None

    def _open(self) -> sqlite3.Connection:
        # A connection must not cross a fork; the child opens its own and forgets the parent's.
        if self._connection is None or self._owner != os.getpid():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(
                self.path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False
            )
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS commands"
                " (key BLOB PRIMARY KEY, list TEXT NOT NULL) WITHOUT ROWID"
            )
            self._connection, self._owner = connection, os.getpid()
        return self._connection

    def _set_aside(self, error: sqlite3.Error) -> None:
        """Rename the broken file; whoever else has it open keeps writing to the renamed one."""
        aside = self.path.with_name(f"{self.path.name}.corrupt-{os.getpid()}")
        _LOG.warning("%s is damaged (%s); renamed to %s, starting anew", self.path, error, aside)
        for suffix in ("", "-wal", "-shm"):
            source = self.path.with_name(self.path.name + suffix)
            try:
                source.replace(aside.with_name(aside.name + suffix))
            except FileNotFoundError:
                continue

    def _give_up(self, error: Exception) -> None:
        _LOG.warning("%s cannot be used (%s); lists are kept in memory only", self.path, error)
        self._disk = False
