"""The child side of ``workers``: one engine object, served over a socket.

Started as a script by ``workers.Worker``, never imported by users. It imports only the standard
library and whatever its engine needs: ``pz_envs`` itself is put in place as a bare package, because
the real one registers every id with Gymnasium, which costs an engine a quarter of a second.

Messages are frames of JSON, with ``bytes`` values carried beside it; nothing is ever unpickled.
The process ends with its parent, however the parent ends: a thread watches the socket and the
parent's process id, also while the engine hangs in native code.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import json
import os
import resource
import select
import shutil
import socket
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FRAME = struct.Struct("<II")
_BLOB = "$bytes"
_MARK = b'{"$bytes":'


def encode(message: Any) -> bytes:
    """Return the frame of a message of None, booleans, numbers, strings, bytes, lists and dicts.

    Tuples arrive as lists. A frame is two lengths (JSON, blobs), the JSON, and the blobs, each
    ``bytes`` value being an object ``{"$bytes": [offset, length]}`` in the JSON; that key is ours.
    """
    blobs: list[bytes] = []

    def outside(value: Any) -> dict[str, list[int]]:
        if not isinstance(value, bytes):
            raise TypeError(f"a worker message cannot carry a {type(value).__name__}")
        offset = sum(map(len, blobs))
        blobs.append(value)
        return {_BLOB: [offset, len(value)]}

    text = json.dumps(message, default=outside).encode("ascii")
    blob = b"".join(blobs)
    return _FRAME.pack(len(text), len(blob)) + text + blob


def receive(connection: socket.socket, deadline: Callable[[], float] | None = None) -> Any:
    """Read one message.

    Args:
        connection: a stream socket.
        deadline: returns the seconds that are left, set as timeout before every read.

    Raises:
        ConnectionError: the other side is gone.
        TimeoutError: the time is over.
    """
    text_length, blob_length = _FRAME.unpack(_read(connection, _FRAME.size, deadline))
    body = _read(connection, text_length + blob_length, deadline)
    text, blob = body[:text_length], body[text_length:]
    if _MARK not in text:
        return json.loads(text)

    def inside(value: dict[str, Any]) -> Any:
        if value.keys() != {_BLOB}:
            return value
        offset, length = value[_BLOB]
        return blob[offset : offset + length]

    return json.loads(text, object_hook=inside)


def _read(connection: socket.socket, size: int, deadline: Callable[[], float] | None) -> bytes:
    parts: list[bytes] = []
    while size:
        if deadline is not None:
            left = deadline()
            if left <= 0:
                raise TimeoutError
            connection.settimeout(left)
        part = connection.recv(min(size, 1 << 20))
        if not part:
            raise ConnectionResetError("the other side closed the connection")
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def load_factory(name: str) -> Callable[..., Any]:
    """Return the object that ``"package.module:name"`` means."""
    module, _, attribute = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


def _bare_package() -> None:
    """Put a ``pz_envs`` in place whose modules can be imported but whose ``__init__`` never ran."""
    spec = importlib.machinery.ModuleSpec("pz_envs", None, is_package=True)
    spec.submodule_search_locations = [str(Path(__file__).resolve().parent)]
    sys.modules["pz_envs"] = importlib.util.module_from_spec(spec)


def _watch(connection: socket.socket, parent: int, folder: str) -> None:
    """End this process when its parent closed the socket or died; runs in a thread."""
    poll = select.poll()
    poll.register(connection.fileno(), 0)
    while os.getppid() == parent and not poll.poll(1000):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _describe(error: BaseException) -> list[str]:
    """Return the name of the pz error that ``error`` is (or ``""``) and its message."""
    for kind in type(error).__mro__:
        if kind.__module__ == "pz_envs.errors":
            return [kind.__name__, str(error)]
    return ["", f"{type(error).__name__}: {error}"]


def serve(connection: socket.socket) -> None:
    """Build the engine that the first message names, then answer calls until the end."""
    engine: Any = None
    while True:
        request = receive(connection)
        try:
            if engine is None:
                sys.path[:] = request["path"]
                engine = load_factory(request["factory"])(**request["kwargs"])
                reply: list[Any] = [True, None]
            else:
                reply = [True, getattr(engine, request[0])(*request[1])]
            frame = encode(reply)
        except Exception as error:  # the process boundary: every failure travels to the parent
            frame = encode([False, _describe(error)])
        connection.sendall(frame)


def main(arguments: list[str]) -> None:
    """Serve on an inherited socket.

    Arguments: the socket's number, the parent's process id, the memory cap in MiB, and the
    temporary folder to remove at the end.
    """
    descriptor, parent, memory_mb = (int(argument) for argument in arguments[:3])
    folder = arguments[3]
    limit = memory_mb * 2**20
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = socket.socket(fileno=descriptor)
    threading.Thread(target=_watch, args=(connection, parent, folder), daemon=True).start()
    _bare_package()
    with contextlib.suppress(ConnectionError):
        serve(connection)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
