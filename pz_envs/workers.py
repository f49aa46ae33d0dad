"""Engines in child processes, so that one that hangs or crashes costs an episode and no more.

A ``Worker`` owns one engine object in a process of its own, in a temporary folder of its own, with
a time limit for every call and a cap on its memory. After a failure the next call starts a fresh
process, and ``restarts`` counts that. The process ends on ``close``, when the worker is
collected, and when the parent dies, even by ``kill -9``. A worker belongs to one thread at a time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pz_envs import errors
from pz_envs.errors import EnvError, InfraError
from pz_envs.worker_child import encode, receive

_CHILD = Path(__file__).with_name("worker_child.py")
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Worker:
    """One engine object in a child process.

    Args:
        factory: ``"package.module:name"`` of what builds the engine in the child.
        kwargs: its arguments; only what JSON and bytes can say.
        timeout_s: seconds that a call may take.
        start_timeout_s: seconds that starting the process and building the engine may take.
        memory_mb: address space of the child in MiB; beyond it, its allocations fail.
    """

    def __init__(
        self,
        factory: str,
        kwargs: Mapping[str, Any],
        *,
        timeout_s: float = 30.0,
        start_timeout_s: float = 60.0,
        memory_mb: int = 2048,
    ) -> None:
        self.factory = factory
        self.kwargs = dict(kwargs)
        self.timeout_s = timeout_s
        self.start_timeout_s = start_timeout_s
        self.memory_mb = memory_mb
        self.restarts = 0
        self._failed = False
        self._connection: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[Any, Worker] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The child's process id, or None while there is none."""
        return None if self._process is None else self._process.pid

    def call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        """Call a method of the engine; starts the child when there is none.

        Args:
            method: the method's name.
            *arguments: None, booleans, numbers, strings, bytes, and lists or dicts of them.
            timeout_s: seconds for this call instead of the worker's own.

        Raises:
            InfraError: the child died or took too long; it is gone, the next call starts another.
            EnvError: the engine raised an error of its own; the child lives on. Errors of pz's own
                tree arrive as what they are.
        """
        if self._connection is None:
            self._start()
        limit = self.timeout_s if timeout_s is None else timeout_s
        return self._exchange([method, arguments], limit, f"`{method}`")

    def close(self) -> None:
        """End the child; a later call would start another. Closing twice is fine."""
        if self._end is not None:
            self._end()
        self._connection = None
        self._process = None

    def _start(self) -> None:
        if self._failed:
            self.restarts += 1
            self._failed = False
        folder = tempfile.mkdtemp(prefix="pz-worker-")
        ours, theirs = socket.socketpair()
        environment = os.environ | dict.fromkeys(_ONE_THREAD, "1")
        descriptor = str(theirs.fileno())
        command = [sys.executable, "-P", str(_CHILD), descriptor, str(os.getpid())]
        try:
            with open(Path(folder) / "stderr", "wb") as log:
                process = subprocess.Popen(
                    [*command, str(self.memory_mb), folder],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    pass_fds=(theirs.fileno(),),
                    cwd=folder,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            shutil.rmtree(folder, ignore_errors=True)
            raise InfraError(f"could not start a process for {self.factory}: {error}") from error
        finally:
            theirs.close()
        self._connection = ours
        self._process = process
        self._end = weakref.finalize(self, _end, os.getpid(), process, ours, folder)
        path = [os.path.abspath(entry) for entry in sys.path]
        first = {"path": path, "factory": self.factory, "kwargs": self.kwargs}
        try:
            self._exchange(first, self.start_timeout_s, "start")
        except EnvError:
            self.close()
            raise

    def _exchange(self, request: Any, limit: float, what: str) -> Any:
        connection = self._connection
        assert connection is not None
        frame = encode(request)
        end = time.monotonic() + limit
        try:
            connection.settimeout(limit)
            connection.sendall(frame)
            done, value = receive(connection, lambda: end - time.monotonic())
        except TimeoutError:
            raise self._lost(f"did not answer {what} within {limit:g} s and was killed") from None
        except (ConnectionError, BrokenPipeError):
            raise self._lost(f"died during {what}") from None
        except BaseException:
            self.close()  # an interrupted exchange leaves an answer in the pipe
            self._failed = True
            raise
        if done:
            return value
        kind, message = value
        if not kind:
            raise EnvError(f"the engine {self.factory} failed in {what}: {message}")
        raise getattr(errors, kind)(message)

    def _lost(self, what: str) -> InfraError:
        """Clear away a child that failed; returns the error to raise."""
        process = self._process
        assert process is not None
        code: int | None = None
        if what.startswith("died"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=5)
        self.close()
        self._failed = True
        ending = f" ({_ending(code)})" if code is not None else ""
        return InfraError(
            f"the engine process of {self.factory} {what}{ending}. This episode is lost; "
            "reset() goes on with a fresh process"
        )


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _end(owner: int, process: subprocess.Popen[bytes], ours: socket.socket, folder: str) -> None:
    """Kill and reap a child; a forked copy of the owner must leave it alone."""
    ours.close()
    if os.getpid() != owner:
        return
    process.kill()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)
