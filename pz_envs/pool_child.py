"""The child side of ``pool``: some of a pool's environments, each on a thread of its own.

Environments mostly wait (for an engine's process, a socket, a lock), so a process can hold many
that step at the same time; the interpreter's lock is only held while Python itself works. Frames
are those of ``worker_child``: JSON and bytes, nothing is ever unpickled. The process ends when the
pool closes the socket and when the parent dies, however it dies.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from queue import SimpleQueue
from typing import Any

import gymnasium
import numpy as np

from pz_envs import errors
from pz_envs.textenv import Info, TextEnv, text_env
from pz_envs.worker_child import encode, load_factory, receive

_CLOSE_S = 8.0


def make(env: str, kwargs: dict[str, Any]) -> TextEnv:
    """Make a bare environment.

    Args:
        env: an id of the table, or ``"package.module:name"`` of what returns a ``TextEnv``.
        kwargs: as for ``gymnasium.make``.
    """
    if "/" in env:
        return text_env(gymnasium.make(f"pz_envs:{env}", **kwargs))
    made: TextEnv = load_factory(env)(**kwargs)
    return made


def to_wire(info: Info) -> Info:
    """Return ``info`` with the arrays under ``extra`` as what a frame can carry."""
    arrays = {
        key: {"$array": [value.dtype.str, list(value.shape), value.tobytes()]}
        for key, value in info["extra"].items()
        if isinstance(value, np.ndarray)
    }
    return {**info, "extra": {**info["extra"], **arrays}} if arrays else info


def from_wire(info: Info) -> Info:
    """Undo ``to_wire`` and what JSON does to the tuple of admissible commands."""
    commands = info["admissible_commands"]
    info["admissible_commands"] = None if commands is None else tuple(commands)
    for key, value in info["extra"].items():
        if isinstance(value, dict) and value.keys() == {"$array"}:
            dtype, shape, data = value["$array"]
            info["extra"][key] = np.frombuffer(data, dtype).reshape(shape).copy()
    return info


class _Seat:
    """One environment and the thread that it steps on."""

    def __init__(self, number: int, env: TextEnv, connection: _Outgoing) -> None:
        self.inbox: SimpleQueue[list[Any] | None] = SimpleQueue()
        self._number = number
        self._env = env
        self._connection = connection
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (request := self.inbox.get()) is not None:
            try:
                frame = encode([self._number, *self._served(*request)])
            except (TypeError, ValueError) as error:  # an info that is not plain data
                frame = encode([self._number, None, ["broken", "EnvError", str(error)]])
            with contextlib.suppress(OSError):  # a pool that is gone wants no answer
                self._connection.send(frame)
        self._env.close()

    def _served(self, action: str | None, seed: int | None, options: Any) -> tuple[Any, Any]:
        """Return how the step went (None without one), and the fresh episode (None without one).

        Args:
            action: what to step with; None only resets.
            seed: of the episode that begins after this request, if one does; None leaves an
                episode that ended as it is.
            options: of a reset that was asked for.
        """
        if action is None:
            return None, self._fresh(seed, options)
        try:
            observation, reward, terminated, truncated, info = self._env.step(action)
        except Exception as error:  # a process boundary: the pool reports the episode as failed
            step: list[Any] = ["failed", *_described(error)]
            over = True
        else:
            over = terminated or truncated
            step = ["step", observation, reward, terminated, truncated, to_wire(info)]
        return step, self._fresh(seed, None) if over and seed is not None else None

    def _fresh(self, seed: int | None, options: Any) -> list[Any]:
        for last in (False, True):
            try:
                observation, info = self._env.reset(seed=seed, options=options)
            except errors.InfraError as error:  # an engine that died starts anew once
                if last:
                    return ["broken", *_described(error)]
            except Exception as error:
                return ["broken", *_described(error)]
            else:
                return ["state", observation, to_wire(info)]
        raise AssertionError


class _Outgoing:
    """The socket, for many writers."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, frame: bytes) -> None:
        with self._lock:
            self._connection.sendall(frame)


def _described(error: Exception) -> tuple[str, str]:
    """Return the name of the pz error that ``error`` is, or ``EnvError``, and its message."""
    if isinstance(error, errors.PzError):
        return type(error).__name__, str(error)
    return "EnvError", f"{type(error).__name__}: {error}"


def _watch(parent: int) -> None:
    """End this process when its parent is gone; runs in a thread."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(descriptor: int, parent: int) -> None:
    """Make the environments that the first message asks for and serve them until the end.

    Args:
        descriptor: of an inherited socket.
        parent: the parent's process id.
    """
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    connection = socket.socket(fileno=descriptor)
    first = receive(connection)
    try:
        envs = [make(first["env"], first["kwargs"]) for _ in range(first["count"])]
    except Exception as error:  # the process boundary
        connection.sendall(encode(_described(error)))
        return
    connection.sendall(encode(None))
    outgoing = _Outgoing(connection)
    seats = [_Seat(number, env, outgoing) for number, env in enumerate(envs)]
    with contextlib.suppress(OSError):
        while True:
            for number, *request in receive(connection):
                seats[number].inbox.put(request)
    for seat in seats:
        seat.inbox.put(None)
    end = time.monotonic() + _CLOSE_S
    for seat in seats:
        seat.thread.join(max(0.0, end - time.monotonic()))
    if any(seat.thread.is_alive() for seat in seats):
        sys.stderr.flush()
        os._exit(1)  # an environment that hangs must not keep the process
