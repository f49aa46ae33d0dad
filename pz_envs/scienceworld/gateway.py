r"""A connection to a py4j gateway: its line protocol, with a time limit for every call.

py4j's own client repeats a call whose answer is missing, which would play a step twice, logs to the
root logger, and frees Java objects from the garbage collector; this one does none of that. A
request is lines that end with ``e``; an answer is one line, ``!y`` and a typed value or ``!x`` and
an error. Java objects are their ids, and whoever got one frees it with ``free``.
"""

from __future__ import annotations

import re
import socket
import time
from typing import Final

from pz_envs.errors import EnvError

Value = str | int | float | bool | None
"""What an argument or a result can be; a ``Ref`` too."""

_OBJECTS: Final = frozenset("rtlhag")  # reference, array, list, set, map, iterator
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_LETTERS = {"n": "\n", "r": "\r"}


class Ref(str):
    """The id of a Java object."""

    __slots__ = ()


class Long(int):
    """An integer for a Java ``long`` parameter."""

    __slots__ = ()


class Connection:
    """One authenticated socket to the gateway; for one thread at a time.

    Args:
        port: the gateway's port on the loopback interface.
        token: its secret.
        timeout_s: seconds that an answer may take.

    Raises:
        OSError: nobody listens, or the secret was refused (``ConnectionError``).
    """

    def __init__(self, port: int, token: str, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._left = b""
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._exchange(f"A\n{_escape(token)}\n") != "!yv":
            self.close()
            raise ConnectionRefusedError("the gateway refused the secret")

    def close(self) -> None:
        """Close the socket; closing twice is fine."""
        self._socket.close()

    def call(self, target: str, method: str, *arguments: Value | Ref) -> Value | Ref:
        """Call a method of an object (its ``Ref``) or of a class (``z:`` and its full name).

        Raises:
            EnvError: Java raised an exception; the message is its text.
            TimeoutError: no answer within ``timeout_s``.
            ConnectionError: the other side is gone.
        """
        parts = "".join(_argument(argument) for argument in arguments)
        return self._ask(f"c\n{target}\n{method}\n{parts}e\n", method)

    def make(self, class_name: str, *arguments: Value | Ref) -> Ref:
        """Construct an object; raises as ``call`` does."""
        parts = "".join(_argument(argument) for argument in arguments)
        made = self._ask(f"i\n{class_name}\n{parts}e\n", class_name)
        assert isinstance(made, Ref)
        return made

    def text(self, target: str, method: str, *arguments: Value | Ref) -> str:
        """Call a method that returns a string; null is the empty one."""
        answer = self.call(target, method, *arguments)
        return "" if answer is None else str(answer)

    def ref(self, target: str, method: str, *arguments: Value | Ref) -> Ref:
        """Call a method that returns an object, which the caller frees."""
        answer = self.call(target, method, *arguments)
        assert isinstance(answer, Ref)
        return answer

    def number(self, target: str, method: str, *arguments: Value | Ref) -> float:
        """Call a method that returns a number."""
        answer = self.call(target, method, *arguments)
        assert isinstance(answer, int | float)
        return answer

    def free(self, ref: Ref) -> None:
        """Let the other side forget an object."""
        self._exchange(f"m\nd\n{ref}\ne\n")

    def _ask(self, request: str, what: str) -> Value | Ref:
        answer = self._exchange(request)
        if answer.startswith("!y"):
            return _value(answer[2:])
        error = _value(answer[2:]) if answer.startswith("!x") and len(answer) > 2 else answer
        if isinstance(error, Ref):
            exception, error = error, self.text(error, "toString")
            self.free(exception)
        raise EnvError(f"the engine failed in `{what}`: {error}")

    def _exchange(self, request: str) -> str:
        """Send a request and return the line that answers it."""
        end = time.monotonic() + self.timeout_s
        self._socket.settimeout(self.timeout_s)
        self._socket.sendall(request.encode("utf-8"))
        parts = [self._left]
        while b"\n" not in parts[-1]:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            part = self._socket.recv(1 << 18)
            if not part:
                raise ConnectionResetError("the gateway closed the connection")
            parts.append(part)
        line, _, self._left = b"".join(parts).partition(b"\n")
        return line.decode("utf-8", "replace")


def _argument(value: Value | Ref) -> str:
    if value is None:
        return "n\n"
    if isinstance(value, Ref):
        return f"r{value}\n"
    if isinstance(value, str):
        return f"s{_escape(value)}\n"
    if isinstance(value, bool):
        return f"b{value}\n"
    if isinstance(value, float):
        return f"d{value!r}\n"
    return f"L{int(value)}\n" if isinstance(value, Long) else f"i{value}\n"


def _value(text: str) -> Value | Ref:
    kind, rest = text[:1], text[1:]
    if kind == "s":
        return _ESCAPED.sub(lambda match: _LETTERS.get(match[1], match[1]), rest)
    if kind in _OBJECTS:
        return Ref(rest)
    if kind in ("i", "L"):
        return int(rest)
    if kind == "d":
        return float(rest)
    if kind == "b":
        return rest.lower() == "true"
    if kind in ("v", "n", ""):
        return None
    raise EnvError(f"the gateway answered with a value of unknown type: {text[:80]!r}")


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")
