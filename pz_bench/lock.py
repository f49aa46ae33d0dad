"""One writer a folder: a lock file with process id, host and heartbeat.

The file is never deleted, only rewritten under a short ``flock``, so taking over a stale lock has
no race. A lock is stale when its process is gone from this host, or when it is another host's and
its heartbeat is old. A writer that was taken for dead learns so from ``check`` and must stop.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from pz_envs.errors import InfraError

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
NAME = "lock"


class Locked(InfraError):
    """Another process is writing here."""


class FolderLock:
    """Holds a folder for writing while the ``with`` block lasts.

    Args:
        folder: what to hold.
        wait_seconds: how long to wait for another holder to finish or die.

    Raises:
        Locked: another process still holds it; the message names it.
    """

    def __init__(self, folder: Path, *, wait_seconds: float = 0.0) -> None:
        self._path = folder / NAME
        self._wait_seconds = wait_seconds
        self._mine = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": _process_start(os.getpid()),
            "token": uuid.uuid4().hex,
        }
        self._lost = False
        self._closing = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lock-heartbeat", daemon=True)

    def __enter__(self) -> FolderLock:
        give_up = time.monotonic() + self._wait_seconds
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while (other := self._exchange(self._take)) is not None:
            if time.monotonic() >= give_up:
                raise Locked(
                    f"{self._path.parent} is being written by process {other['pid']} on "
                    f"{other['host']}; wait for it, or stop it"
                )
            time.sleep(0.2)
        self._heart.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._heart.join()
        self._exchange(lambda other: (None, "" if self._is_mine(other) else None))

    def check(self) -> None:
        """Raise InfraError when another process has taken the lock over."""
        if self._lost:
            raise InfraError(f"{self._path} was taken over by another process; this one stops")

    def _take(self, other: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, str | None]:
        if other and not _is_stale(other):
            return other, None
        return None, self._stamped()

    def _beat(self) -> None:
        while not self._closing.wait(HEARTBEAT_SECONDS) and not self._lost:
            with contextlib.suppress(OSError):  # a full disk must not stop the measuring
                self._exchange(self._renew)

    def _renew(self, other: Mapping[str, Any]) -> tuple[None, str | None]:
        self._lost = not self._is_mine(other)
        return None, None if self._lost else self._stamped()

    def _is_mine(self, other: Mapping[str, Any]) -> bool:
        return bool(other.get("token") == self._mine["token"])

    def _stamped(self) -> str:
        return json.dumps(self._mine | {"heartbeat": time.time()})

    def _exchange(
        self, decide: Callable[[Mapping[str, Any]], tuple[Mapping[str, Any] | None, str | None]]
    ) -> Mapping[str, Any] | None:
        """Give ``decide`` the lock's content; write the text it returns, if any, in its place."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            answer, text = decide(_parse(os.read(descriptor, 4096)))
            if text is not None:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, text.encode(), 0)
            return answer
        finally:
            os.close(descriptor)


def holder(folder: Path) -> Mapping[str, Any] | None:
    """Return who is writing in ``folder`` (pid, host, heartbeat), None when nobody is."""
    try:
        other = _parse((folder / NAME).read_bytes())
    except OSError:
        return None
    return other if other and not _is_stale(other) else None


def _is_stale(other: Mapping[str, Any]) -> bool:
    if other["host"] == socket.gethostname():
        return bool(_process_start(other["pid"]) != other["started"])
    return time.time() - float(other["heartbeat"]) > STALE_SECONDS


def _process_start(pid: int) -> int:
    """Return when the process started, -1 when there is none, 0 when the system does not say."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return -1
    except PermissionError:
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return -1 if fields[0] == "Z" else int(fields[19])


def _parse(data: bytes) -> Mapping[str, Any]:
    """Return a lock's content, empty when it is free or unreadable."""
    try:
        values = json.loads(data)
    except ValueError:
        return {}
    known = {"pid", "host", "started", "token", "heartbeat"}
    return values if isinstance(values, dict) and known <= set(values) else {}
