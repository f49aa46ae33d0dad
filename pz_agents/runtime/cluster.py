"""Where a Ray cluster is and whether its head answers, found out without joining it.

Ray itself takes minutes to say that nobody is there, and ``auto`` of its own joins whatever Ray
runs on this machine, also one that another command started for itself alone and takes along when
it ends. Here ``auto`` is the cluster that ``RAY_ADDRESS`` names, else the one that was last started
with ``ray start`` on this machine. A head is asked over TCP whether it speaks HTTP/2, as every
server of Ray's protocol does from the first byte on.
"""

from __future__ import annotations

import _thread
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pz_envs.errors import ConfigError, InfraError

ANSWER_SECONDS = 5.0
"""How long a head may take to answer."""
LOST_SECONDS = 20.0
"""How long a head may be silent before the cluster is lost; Ray's own limit is a minute, after
which its processes end, the one that joined among them."""

_EACH_SECONDS = 2.0
_RETRY_SECONDS = 0.5
_END_SECONDS = 10.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_SETTINGS = 4
_ADVICE = (
    "Start a cluster (ray start --head), name one (RAY_ADDRESS, or ray:HOST:PORT), or use the "
    "runtime `ray`, which starts a Ray of its own"
)

_logger = logging.getLogger(__name__)


def find(address: str, started: str | None) -> str:
    """Return ``HOST:PORT`` of the cluster that ``address`` names.

    Args:
        address: as the user gave it; ``auto`` is looked up.
        started: what ``ray start`` noted on this machine; None: nothing.

    Raises:
        ConfigError: ``auto`` finds nothing, or an address has no host or port.
    """
    found, source = address, f"`ray:{address}`"
    if address == "auto":
        found, source = os.environ.get("RAY_ADDRESS", ""), "RAY_ADDRESS"
        if not found:
            found, source = started or "", "what `ray start` noted on this machine"
        if not found:
            raise ConfigError(
                "`ray:auto` finds no cluster: RAY_ADDRESS is not set, and `ray start` was not "
                f"called on this machine. {_ADVICE}"
            )
    host, port = _parts(found)
    if not host or not port:
        raise ConfigError(f"{source} says `{found}`, which is not HOST:PORT. {_ADVICE}")
    return found


def check(address: str) -> None:
    """Make sure that the head of a cluster answers.

    Raises:
        ConfigError: it does not.
    """
    problem = silence(address, ANSWER_SECONDS)
    if problem:
        raise ConfigError(f"no Ray answers at {address} ({problem}). {_ADVICE}")


def silence(address: str, seconds: float) -> str:
    """Return why the head at ``HOST:PORT`` does not answer; empty: it does."""
    host, port = _parts(address)
    try:
        with socket.create_connection((host, port), seconds) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return ""  # whoever does not begin with a handshake is not answered
            connection.sendall(_PREFACE)
            connection.settimeout(seconds)
            frame = connection.recv(4)
            # Three bytes of length, then the kind; a server's first frame is its settings.
            return "" if frame[3:] == bytes((_SETTINGS,)) else "something else listens there"
    except TimeoutError:
        return f"silent for {seconds:g} s"
    except OSError as error:
        return error.strerror or str(error)


class Head:
    """Watches the head of a cluster that was joined.

    Args:
        address: ``HOST:PORT``.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._asked = time.monotonic()
        self._lost = ""

    def check(self, *, now: bool = False) -> None:
        """Ask the head, at most every two seconds; wait a while where it is silent.

        Args:
            now: ask, however short ago it answered.

        Raises:
            InfraError: it stays silent.
        """
        if self._lost:
            raise InfraError(self._lost)
        if not now and time.monotonic() - self._asked < _EACH_SECONDS:
            return
        until = time.monotonic() + LOST_SECONDS
        while problem := silence(self._address, _EACH_SECONDS):
            if time.monotonic() > until:
                self._lost = (
                    f"the Ray cluster at {self._address} is lost: its head has not answered for "
                    f"{LOST_SECONDS:g} s ({problem}). The same command goes on when a cluster is "
                    "there again"
                )
                raise InfraError(self._lost)
            time.sleep(_RETRY_SECONDS)
        self._asked = time.monotonic()


class Watch:
    """Ends what the main thread waits for, as Ctrl-C would, where a cluster or a file says so.

    Where the cluster is lost and the main thread hangs in Ray all the same, the process ends with
    status 1, as Ray itself would end it: what is to be kept must be on disk.

    Args:
        check_head: raises InfraError where the cluster is lost.
        file: ends it when it is there.

    Attributes:
        lost: what ``check_head`` raised.
        stopped: whether the file was there.
    """

    def __init__(self, check_head: Callable[[], None], file: Path) -> None:
        self._check_head = check_head
        self._file = file
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.lost: InfraError | None = None
        self.stopped = False

    def __enter__(self) -> Watch:
        if threading.current_thread() is threading.main_thread():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_RETRY_SECONDS):
            try:
                self._check_head()
            except InfraError as error:
                self.lost = error
            self.stopped = self._file.exists()
            if self.lost or self.stopped:
                _thread.interrupt_main(signal.SIGINT)
                break
        if self.lost and not self._over.wait(_END_SECONDS):
            _logger.error("%s", self.lost)
            os._exit(1)


def _parts(address: str) -> tuple[str, int]:
    """Return host and port; an empty host or 0 where there is none."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    return host.strip("[]"), int(port) if port.isdecimal() else 0
