"""The child side of ``local``: one object, served over a unix socket to whoever connects.

Connections have a thread each; the object serves as many calls at a time as it was spawned for. The
process ends when its parent closes the socket between them, which its death does too, whatever the
object is doing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

from pz_agents.runtime import Served, described
from pz_envs.worker_child import encode, receive

BUSY = "$busy"
"""The method that asks for ``Served.busy``."""


def main(line: int, listening: int, folder: str) -> None:
    """Build the object that the parent names and serve it.

    Args:
        line: descriptor of the socket that the parent holds the other end of.
        listening: descriptor of the socket that callers connect to, and have perhaps already.
        folder: of the parent's sockets.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    parent, listener = socket.socket(fileno=line), socket.socket(fileno=listening)
    for each in (parent, listener):
        each.set_inheritable(False)  # or a child of this process would seem to be listening
    first = receive(parent)
    threading.Thread(target=_end_with_parent, args=(parent, folder), daemon=True).start()
    target = Served(first["factory"], first["kwargs"])
    turns = threading.Semaphore(first["concurrency"])
    while True:
        connection, _ = listener.accept()
        arguments = (connection, target, turns)
        threading.Thread(target=_answer, args=arguments, daemon=True).start()


def _answer(connection: socket.socket, target: Served, turns: threading.Semaphore) -> None:
    with connection:
        try:
            method, args = receive(connection)
            if method == BUSY:
                connection.sendall(encode([True, target.busy()]))
                return
            with turns:
                reply = target.call(method, _resolved(args))
            connection.sendall(_frame(reply))
        except OSError:
            return  # whoever asked has gone


def _resolved(args: list[Any]) -> list[Any]:
    """Put the bytes in the place of those arguments that name a shared file."""
    return [
        Path(a["$shared"]).read_bytes() if isinstance(a, dict) and a.keys() == {"$shared"} else a
        for a in args
    ]


def _frame(reply: list[Any]) -> bytes:
    try:
        return encode(reply)
    except (TypeError, ValueError) as error:
        return encode([False, described(error)])


def _end_with_parent(parent: socket.socket, folder: str) -> None:
    """Wait for the parent's end; the folder of its sockets and shared bytes goes as well."""
    with contextlib.suppress(OSError):
        parent.recv(1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
