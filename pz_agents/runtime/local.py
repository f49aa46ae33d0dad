"""The runtime of one machine: a child process an object, reached through a unix socket.

Children are started by exec, never forked, and end with their parent, however it ends. The parent
listens before it starts a child, which inherits the socket: whoever connects waits for a child that
is still starting, and is told at once of one that died. Each handle has as many threads here as its
object serves calls at a time, and they make its calls in order. Frames are those of the environment
workers.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pz_agents.runtime import CALL_SECONDS, Event, Handle, LostError, Resources, answered
from pz_agents.runtime.local_child import BUSY
from pz_envs.worker_child import encode, receive

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from pz_agents.runtime.local_child import main; main(*map(int, sys.argv[2:4]), sys.argv[4])"
)
_WAITING = 1024


@dataclass(frozen=True, slots=True, eq=False)
class _Shared:
    """Bytes in a file that goes when nothing refers to this object any more."""

    path: str
    guard: Any


@dataclass(slots=True, eq=False)
class _Process:
    """A child and what it was started with."""

    handle: Handle
    first: bytes
    device: str
    child: subprocess.Popen[bytes]
    line: socket.socket
    lane: ThreadPoolExecutor
    side: ThreadPoolExecutor
    wanted: bool = True
    told: bool = False


class _Guard:
    """Something that a weak reference can watch."""


class LocalCall:
    """A call that a thread makes."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def done(self) -> bool:
        """See ``Call``."""
        return self._future.done()

    def result(self) -> Any:
        """See ``Call``."""
        try:
            return self._future.result()
        except CancelledError:
            raise LostError("the runtime was closed before this call was made") from None


class LocalRuntime:
    """Child processes of this one; see ``Runtime``.

    Args:
        cpus: how many to offer; None: those that this process may use.
    """

    def __init__(self, cpus: int | None = None) -> None:
        self._cpus = cpus or len(os.sched_getaffinity(0))
        # A unix socket's path holds about a hundred characters, so not below a test's own folder.
        self._folder = Path(tempfile.mkdtemp(prefix="pz-run-", dir=_quick_folder()))
        self._processes: dict[Handle, _Process] = {}
        self._numbers = itertools.count()
        self._end = weakref.finalize(self, _end, os.getpid(), self._processes, self._folder)

    def spawn(
        self,
        factory: str,
        n: int = 1,
        resources: Resources | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        concurrency: int = 1,
    ) -> list[Handle]:
        """Start ``n`` children; see ``Runtime``. Of ``resources``, only devices are dealt out."""
        handles = []
        devices = (resources or Resources()).devices or [""] * n
        for number in range(n):
            place = next(self._numbers)
            name = f"{factory.rpartition(':')[2].lower()}-{place}"
            handle = Handle(name, f"local:{self._folder / str(place)}")
            given = {**(kwargs or {}), "number": number}
            first = encode({"factory": factory, "kwargs": given, "concurrency": concurrency})
            # Threads begin with the first call that needs them.
            lane = ThreadPoolExecutor(concurrency, thread_name_prefix=f"pz-{name}")
            side = ThreadPoolExecutor(1, thread_name_prefix=f"pz-{name}-busy")
            started = _start(handle, first, devices[number])
            self._processes[handle] = _Process(handle, first, devices[number], *started, lane, side)
            handles.append(handle)
        return handles

    def call(
        self, handle: Handle, method: str, *args: Any, timeout: float = CALL_SECONDS
    ) -> LocalCall:
        """Begin a call; see ``Runtime``."""
        return self._call(self._processes[handle].lane, handle, method, args, timeout)

    def busy(self, handle: Handle, timeout: float = CALL_SECONDS) -> LocalCall:
        """Ask for the age of the oldest call; see ``Runtime``."""
        return self._call(self._processes[handle].side, handle, BUSY, (), timeout)

    def _call(
        self, lane: ThreadPoolExecutor, handle: Handle, method: str, args: Any, timeout: float
    ) -> LocalCall:
        child, until = self._processes[handle].child, time.monotonic() + timeout

        def make() -> Any:
            try:
                return _exchange(handle, method, args, until)
            except TimeoutError:
                child.kill()
                raise LostError(
                    f"{handle.name} did not answer `{method}` within {timeout:g} s and was killed"
                ) from None
            except OSError:
                raise LostError(f"{handle.name} {_ending(child)} during `{method}`") from None

        return LocalCall(lane.submit(make))

    def share(self, data: bytes) -> _Shared:
        """Store ``data`` in a file; see ``Runtime``."""
        descriptor, path = tempfile.mkstemp(prefix="shared-", dir=self._folder)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        guard = _Guard()
        weakref.finalize(guard, _remove, path)
        return _Shared(path, guard)

    def kill(self, handle: Handle) -> None:
        """End a child at once; see ``Runtime``."""
        process = self._processes[handle]
        process.wanted = False
        process.child.kill()
        process.child.wait()

    def restart(self, handle: Handle) -> None:
        """Start a child anew; see ``Runtime``."""
        process = self._processes[handle]
        self.kill(handle)
        process.line.close()
        process.child, process.line = _start(handle, process.first, process.device)
        process.wanted, process.told = True, False

    def watch(self) -> list[Event]:
        """Return whose children have ended; see ``Runtime``."""
        events = []
        for process in self._processes.values():
            if process.wanted and not process.told and process.child.poll() is not None:
                process.told = True
                events.append(Event(process.handle, _ending(process.child)))
        return events

    def pid(self, handle: Handle) -> int:
        """Return the child's process id."""
        return self._processes[handle].child.pid

    def reserve(self, count: int, each: Resources, own_gpus: float) -> None:
        """Hold nothing: all processes share this machine; see ``Runtime``."""

    def host(self) -> str:
        """Return the loopback's address; see ``Runtime``."""
        return "127.0.0.1"

    def total(self) -> Resources:
        """Return the cores that may be used; GPUs are not counted here."""
        return Resources(cpus=self._cpus)

    def close(self) -> None:
        """End every child."""
        self._end()


class LocalRemote:
    """An object at a ``local:`` address; see ``Remote``."""

    def __init__(self, address: str) -> None:
        self._handle = Handle("the process", address)

    def call(self, method: str, *args: Any, timeout: float = CALL_SECONDS) -> Any:
        """Call a method and wait; see ``Remote``."""
        where = self._handle.address
        try:
            return _exchange(self._handle, method, args, time.monotonic() + timeout)
        except TimeoutError:
            message = f"{where} did not answer `{method}` within {timeout:g} s"
            raise LostError(message) from None
        except OSError as error:
            raise LostError(f"nobody answers at {where}: {error}") from None


def _exchange(handle: Handle, method: str, args: Any, until: float) -> Any:
    """Send one call and return its answer.

    Args:
        handle: of the object.
        method: its name.
        args: of the call.
        until: the moment, by the monotonic clock, when time is over.

    Raises:
        OSError: nobody is there, or not in time (TimeoutError).
    """
    sent = [{"$shared": a.path} if isinstance(a, _Shared) else a for a in args]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(max(until - time.monotonic(), 0.001))
        connection.connect(handle.address.removeprefix("local:"))
        connection.sendall(encode([method, sent]))
        reply = receive(connection, lambda: until - time.monotonic())
    return answered(reply, f"`{method}` of {handle.name}")


def _start(
    handle: Handle, first: bytes, device: str
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a child and return it with the socket whose end tells it that its parent has gone.

    Args:
        handle: of its object.
        first: what it is told first.
        device: the GPU that it sees; empty: all.
    """
    path = handle.address.removeprefix("local:")
    places = json.dumps([os.path.abspath(entry) for entry in sys.path])
    ours, theirs = socket.socketpair()
    # The child alone keeps the listener open, so that whoever waits is told of its death.
    with theirs, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.new")
        listener.listen(_WAITING)
        os.rename(f"{path}.new", path)
        passed = (theirs.fileno(), listener.fileno())
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD, places, *map(str, passed), os.path.dirname(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=passed,
            env={
                **dict.fromkeys(_ONE_THREAD, "1"),
                **os.environ,
                **({"CUDA_VISIBLE_DEVICES": device} if device else {}),
            },
            start_new_session=True,
        )
    with contextlib.suppress(BrokenPipeError):
        ours.sendall(first)
    return child, ours


def _ending(child: subprocess.Popen[bytes]) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = child.wait(timeout=5)
        return f"died ({f'signal {-code}' if code < 0 else f'exit code {code}'})"
    return "closed the connection"


def _quick_folder() -> str | None:
    """Return a folder in memory where there is one, for sockets and shared bytes."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _end(owner: int, processes: dict[Handle, _Process], folder: Path) -> None:
    """Kill and reap every child; a forked copy of the owner must leave them alone."""
    if os.getpid() != owner:
        return
    for process in processes.values():
        process.wanted = False
        process.child.kill()
    for process in processes.values():
        process.child.wait()
        process.line.close()
        for lane in (process.lane, process.side):
            lane.shutdown(wait=False, cancel_futures=True)
    shutil.rmtree(folder, ignore_errors=True)
