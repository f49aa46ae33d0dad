"""One Java process for all ScienceWorld environments of a Python process.

It starts with the first simulator and ends two seconds after the last one, with the Python process
(its standard input is a pipe, and it leaves when that pipe breaks, also after ``kill -9``), or when
it fails. It listens on the loopback interface only, on a port that the system picks, behind a
random secret, and its heap is bounded. Identity hash codes are made constant, since the engine lets
them decide the order of its sets: without that, what an episode shows would depend on what Java did
before it.
"""

from __future__ import annotations

import importlib.util
import os
import select
import shutil
import subprocess
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from pz_envs.errors import ConfigError, InfraError, require
from pz_envs.scienceworld.gateway import Connection, Ref

EXTRA = "pz-envs[scienceworld]"
JAVA_INSTALL = "apt-get install default-jre-headless"

_OPTIONS = (
    "-XX:+IgnoreUnrecognizedVMOptions",
    "-XX:+UseSerialGC",
    "-XX:+ExitOnOutOfMemoryError",
    "-XX:-UsePerfData",
    "-XX:CompressedClassSpaceSize=64m",  # address space, which a worker's limit counts
    "-XX:ReservedCodeCacheSize=96m",
    "-XX:+UnlockExperimentalVMOptions",
    "-XX:hashCode=2",
)
_START_S = 120.0
_LINGER_S = 2.0  # an environment often follows another
_guard = threading.RLock()
_shared: Jvm | None = None
_hooked = False


class Jvm:
    """A running Java process with the engine in it.

    ``lock`` is held for every call, because the engine keeps state that all its simulators share;
    ``turn`` is the simulator that this state belongs to (a weak reference) or None.

    Args:
        heap_mb: the heap's largest size in MiB.

    Raises:
        ConfigError: Java, py4j or scienceworld is not installed.
        InfraError: Java did not start.
    """

    def __init__(self, heap_mb: int) -> None:
        self.heap_mb = heap_mb
        self.lock = threading.RLock()
        self.turn: weakref.ref[Any] | None = None
        self.users = 0
        self.leases = 0
        self.dead = False
        jar = engine_jar()
        command = [java_path(), f"-Xmx{heap_mb}m", *_OPTIONS, "-classpath"]
        command += [os.pathsep.join((_py4j_jar(), str(jar))), "py4j.GatewayServer"]
        try:
            self._process = subprocess.Popen(
                [*command, "--die-on-broken-pipe", "--enable-auth", "0"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=jar.parent,
                env=os.environ | {"MALLOC_ARENA_MAX": "1"},  # arenas are address space too
                start_new_session=True,
            )
        except OSError as error:
            raise InfraError(f"could not start {command[0]}: {error}") from error
        self._end = weakref.finalize(self, _kill, os.getpid(), self._process)
        try:
            self._port, self._token = _port_and_token(self._process)
            connection = self.connect(_START_S)
            self.random, self.random_field = _shared_random(connection)
            self.scratch_random = connection.make("java.util.Random")
            self.counter = _singleton(connection, "util.UniqueIdentifier$")
            self.simplifier = _singleton(
                connection, "main.scala.scienceworld.runtime.SimplifierProcessor$"
            )
            connection.close()
        except OSError as error:
            self.kill()
            raise InfraError(f"Java started and does not answer ({error!r})") from error
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """The Java process's id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the process is gone, also when nobody has noticed yet."""
        return self.dead or self._process.poll() is not None

    def connect(self, timeout_s: float) -> Connection:
        """Open a connection whose calls may take ``timeout_s``; raises ``OSError``."""
        return Connection(self._port, self._token, timeout_s)

    def kill(self) -> None:
        """End the process and reap it; killing twice is fine."""
        self.dead = True
        self._end()

    def lost(self, what: str) -> InfraError:
        """Kill the process after a failure; returns the error to raise."""
        global _shared
        with _guard:
            code = self._process.poll()
            self.kill()
            if _shared is self:
                _shared = None
        ending = "" if code is None else f" (exit code {code})"
        return InfraError(
            f"the ScienceWorld engine {what}{ending}. Every episode in this process is lost with "
            "it; reset() goes on with a fresh Java process"
        )

    def forget(self) -> None:
        """Drop a forked copy of the process's handles; the process belongs to the parent."""
        self.dead = True
        self._end.detach()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def lease(heap_mb: int) -> Jvm:
    """Return the shared process, started when there is none; give it back with ``release``.

    Raises:
        ConfigError: something is not installed, or the process runs with another heap size.
        InfraError: Java did not start.
    """
    global _shared, _hooked
    with _guard:
        if not _hooked:
            os.register_at_fork(after_in_child=_after_fork)
            _hooked = True
        unused = _shared is not None and not _shared.users and _shared.heap_mb != heap_mb
        if _shared is not None and (unused or _shared.ended):
            _shared.kill()
            _shared = None
        if _shared is None:
            _shared = Jvm(heap_mb)
        elif _shared.heap_mb != heap_mb:
            raise ConfigError(
                f"heap_mb={heap_mb}: this process's Java runs with heap_mb={_shared.heap_mb}, and "
                "all ScienceWorld environments share it; use one size, or close the others first"
            )
        _shared.users += 1
        _shared.leases += 1
        return _shared


def release(jvm: Jvm) -> None:
    """Give a leased process back; unused for two seconds, it ends."""
    with _guard:
        jvm.users -= 1
        if jvm.users == 0 and not jvm.dead:
            timer = threading.Timer(_LINGER_S, _end_if_unused, (jvm, jvm.leases))
            timer.daemon = True
            timer.start()


def _end_if_unused(jvm: Jvm, leases: int) -> None:
    """End a process that nobody leased since it was given back."""
    global _shared
    with _guard:
        if jvm.leases == leases:
            jvm.kill()
            if _shared is jvm:
                _shared = None


def java_path() -> str:
    """Return the ``java`` program: that of ``JAVA_HOME``, else the first on the path.

    Raises:
        ConfigError: there is none.
    """
    home = os.environ.get("JAVA_HOME")
    found = shutil.which(str(Path(home) / "bin" / "java")) if home else None
    found = found or shutil.which("java")
    if found is None:
        raise ConfigError(
            f"ScienceWorld needs Java, and there is no `java`. Get it: {JAVA_INSTALL}"
        )
    return found


def engine_jar() -> Path:
    """Return the engine's jar, inside the installed ``scienceworld`` package.

    Raises:
        ConfigError: the package is not installed, or has no jar.
    """
    spec = importlib.util.find_spec("scienceworld")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        jar = Path(folder) / "scienceworld.jar"
        if jar.is_file():
            return jar
    raise ConfigError(f"`scienceworld` is not installed. Install it: pip install '{EXTRA}'")


def missing_engine() -> str | None:
    """Return None when ScienceWorld can be played here, else what is missing and how to get it."""
    try:
        engine_jar()
        if importlib.util.find_spec("py4j") is None:
            return f"`py4j` is not installed. Install it: pip install '{EXTRA}'"
        java_path()
    except ConfigError as error:
        return str(error)
    return None


def _py4j_jar() -> str:
    jar: str = require("py4j.java_gateway", EXTRA).find_jar_path()
    if not jar:
        raise ConfigError(f"py4j has no jar. Install it again: pip install '{EXTRA}'")
    return os.path.abspath(jar)


def _port_and_token(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Read what the gateway prints first, then stop listening: the engine prints a great deal."""
    assert process.stdout is not None
    ready = select.poll()
    ready.register(process.stdout, select.POLLIN)
    end = time.monotonic() + _START_S
    said = b""
    while time.monotonic() < end:
        if not ready.poll(1000):
            continue
        part = os.read(process.stdout.fileno(), 4096)
        said += part
        lines = said.split(b"\n")
        ports = [number for number, line in enumerate(lines[:-2]) if line.strip().isdigit()]
        if ports:
            process.stdout.close()  # Java ignores the broken pipe, and never fills it
            return int(lines[ports[0]]), lines[ports[0] + 1].decode().strip()
        if not part:
            break
    text = said.decode("utf-8", "replace").strip()[-500:]
    raise InfraError(f"Java did not start within {_START_S:g} s or ended; it said: {text!r}")


def _singleton(connection: Connection, name: str) -> Ref:
    """Return a Scala ``object``."""
    kind = connection.ref("z:java.lang.Class", "forName", name)
    field = connection.ref(kind, "getField", "MODULE$")
    return connection.ref(field, "get", None)


def _shared_random(connection: Connection) -> tuple[Ref, Ref]:
    """Return Scala's global generator, and the field that holds what it draws from."""
    module = _singleton(connection, "scala.util.Random$")
    kind = connection.ref("z:java.lang.Class", "forName", "scala.util.Random")
    field = connection.ref(kind, "getDeclaredField", "self")
    connection.call(field, "setAccessible", True)
    return module, field


def _kill(owner: int, process: subprocess.Popen[bytes]) -> None:
    """Kill and reap; a forked copy of the owner must leave the process alone."""
    if os.getpid() != owner:
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _after_fork() -> None:
    """In a forked child: the parent's process is not ours, and holding its pipe would keep it."""
    global _shared, _guard
    _guard = threading.RLock()
    if _shared is not None:
        _shared.forget()
        _shared = None
