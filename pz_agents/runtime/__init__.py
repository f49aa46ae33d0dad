"""Objects in other processes, here or on a Ray cluster, behind one small interface.

A factory is named by its import path and given plain data; what it returns serves one call at a
time, or as many as are asked for, in a process of its own. Arguments and answers are plain data too
(None, booleans, numbers, strings, bytes, lists and dictionaries of them), so nothing is ever
unpickled here. A process that dies or answers too late costs the calls it had, which raise
``LostError``; ``restart`` puts another under the same address. ``local`` has child processes,
``ray`` the actors of a Ray cluster, and what runs in them cannot tell which.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pz_agents import errors as agent_errors
from pz_envs import errors
from pz_envs.errors import ConfigError, InfraError
from pz_envs.worker_child import load_factory

__all__ = [
    "Call",
    "Event",
    "Handle",
    "LostError",
    "Resources",
    "Runtime",
    "connect",
    "open_runtime",
    "ray_runtime",
]

CALL_SECONDS = 600.0
"""How long a call may take where nothing else is said."""


class LostError(InfraError):
    """A process died, or was killed because it took too long; its call can be made again."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What one process is given; only a cluster keeps count.

    cpus, gpus: how many, or a share of one.
    custom: amounts of resources that a cluster's nodes were started with, by name.
    place: which of the places that were reserved, for the first process that is spawned; the next
        one has the next place. None: wherever there is room.
    devices: GPUs of this machine as CUDA names them, one for each process that is spawned, which
        sees that alone. A cluster deals them out itself. None: every process sees all.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    custom: Mapping[str, float] = field(default_factory=dict)
    place: int | None = None
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Handle:
    """One spawned object. Any process of the runtime reaches it with ``connect(address)``."""

    name: str
    address: str


@dataclass(frozen=True, slots=True)
class Event:
    """The process of ``handle`` has ended without being asked to."""

    handle: Handle
    reason: str


class Call(Protocol):
    """A call under way."""

    def done(self) -> bool:
        """Return whether ``result`` would answer at once."""
        ...

    def result(self) -> Any:
        """Wait for the answer.

        Raises:
            LostError: the process died, or the call's time is over and the process was killed.
            PzError: what the object raised; anything else that it raised is an InfraError.
        """
        ...


class Runtime(Protocol):
    """Where objects live. Its methods belong to one thread; ``close`` ends every process."""

    def spawn(
        self,
        factory: str,
        n: int = 1,
        resources: Resources | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        concurrency: int = 1,
    ) -> list[Handle]:
        """Start ``n`` processes, each with one object; returns before they are ready.

        Args:
            factory: ``"package.module:name"``; also found on this process's import path.
            n: how many.
            resources: of each.
            kwargs: plain data for the factory; each also gets its ``number``, from 0.
            concurrency: calls that each object serves side by side, in threads; it must be made for
                that. The others wait.
        """
        ...

    def call(self, handle: Handle, method: str, *args: Any, timeout: float = CALL_SECONDS) -> Call:
        """Begin a call; those to one handle are taken up in the order they were begun.

        Args:
            handle: of the object.
            method: its name.
            *args: plain data, and what ``share`` returned, which arrives as the bytes.
            timeout: seconds from now after which the process is killed.
        """
        ...

    def busy(self, handle: Handle, timeout: float = CALL_SECONDS) -> Call:
        """Ask for how many seconds the oldest call that is being served has been; 0.0 without one.

        It is answered beside the calls, whatever hangs in them.

        Args:
            handle: of the object.
            timeout: seconds from now after which the process is killed.
        """
        ...

    def share(self, data: bytes) -> Any:
        """Store ``data`` once for any number of calls; forgotten with what is returned."""
        ...

    def kill(self, handle: Handle) -> None:
        """End a process at once; calls that it has are lost. Twice is fine."""
        ...

    def restart(self, handle: Handle) -> None:
        """End the process if it still runs and start a fresh one at the same address."""
        ...

    def watch(self) -> list[Event]:
        """Return the processes that ended by themselves since this was last asked."""
        ...

    def pid(self, handle: Handle) -> int:
        """Return the process's id, on the machine where it runs."""
        ...

    def reserve(self, count: int, each: Resources, own_gpus: float) -> None:
        """Hold ``count`` places until the runtime is closed; the first is on this machine.

        Args:
            count: how many places.
            each: what is held at each.
            own_gpus: how much of the first place's GPU is this process's, whose CUDA then sees that
                one alone.

        Raises:
            ConfigError: there is no room for them.
        """
        ...

    def host(self) -> str:
        """Return the address at which this runtime's processes reach this one."""
        ...

    def total(self) -> Resources:
        """Return what all machines have together."""
        ...

    def close(self) -> None:
        """End every process. Closing twice is fine."""
        ...


class Remote(Protocol):
    """An object of the runtime as another process sees it."""

    def call(self, method: str, *args: Any, timeout: float = CALL_SECONDS) -> Any:
        """Call a method and wait; a call that takes too long is given up and nothing is killed.

        Raises:
            LostError: nobody answers at the address, or not in time.
        """
        ...


def open_runtime(name: str, *, cpus: int | None = None) -> Runtime:
    """Return a runtime by its name.

    Args:
        name: ``local``; ``ray`` for a Ray of this process's own on this machine; ``ray:ADDRESS``
            for a cluster that is there (``ray:auto`` finds the one on this machine).
        cpus: how many this machine is to offer; None: as many as it has.

    Raises:
        ConfigError: there is no such runtime, or ray is not installed or does not start.
    """
    kind, _, address = name.partition(":")
    if name == "local":
        from pz_agents.runtime.local import LocalRuntime

        return LocalRuntime(cpus=cpus)
    if kind == "ray" and (address or name == "ray"):
        from pz_agents.runtime.ray import RayRuntime

        return RayRuntime(address or "local", cpus=cpus)
    raise ConfigError(f"no runtime `{name}`; there are local, ray and ray:ADDRESS (ray:auto)")


def ray_runtime(where: str) -> str:
    """Return the runtime that an option ``--ray`` names: ``local``, ``auto`` or an address."""
    return "ray" if where == "local" else f"ray:{where}"


def connect(address: str) -> Remote:
    """Return the object at a ``Handle``'s address, from any process of its runtime."""
    if address.startswith("ray:"):
        from pz_agents.runtime.ray import RayRemote

        return RayRemote(address)
    from pz_agents.runtime.local import LocalRemote

    return LocalRemote(address)


class Served:
    """The object of a process, or why there is none, and since when it serves each of its calls.

    Args:
        factory: see ``Runtime.spawn``.
        kwargs: its arguments.
    """

    def __init__(self, factory: str, kwargs: Mapping[str, Any]) -> None:
        self._target: Any = None
        self._failure: list[str] | None = None
        self._begun: dict[object, float] = {}
        try:
            self._target = load_factory(factory)(**kwargs)
        except Exception as error:  # the process boundary: whoever calls is told
            self._failure = described(error)

    def call(self, method: str, args: Any) -> list[Any]:
        """Serve a call: ``[True, answer]``, or ``[False, [kind, message]]``; see ``answered``."""
        if self._failure:
            return [False, self._failure]
        this = object()
        self._begun[this] = time.monotonic()
        try:
            return [True, getattr(self._target, method)(*args)]
        except Exception as error:  # the process boundary: every failure travels to the caller
            return [False, described(error)]
        finally:
            del self._begun[this]

    def busy(self) -> float:
        """Return for how many seconds the oldest call has been served; 0.0 without one."""
        now = time.monotonic()
        return max((now - begun for begun in tuple(self._begun.values())), default=0.0)


def described(error: BaseException) -> list[str]:
    """Return the name of the pz error that ``error`` is, or an empty one, and its message."""
    for kind in type(error).__mro__:
        if kind is not errors.PzError and _error_class(kind.__name__) is kind:
            return [kind.__name__, str(error)]
    return ["", f"{type(error).__name__}: {error}"]


def answered(reply: Any, what: str) -> Any:
    """Return the answer in what ``Served.call`` returned, or raise the error in it."""
    done, value = reply
    if done:
        return value
    kind, message = value
    if kind:
        raise _error_class(kind)(message)
    raise InfraError(f"{what} failed: {message}")


def _error_class(name: str) -> Any:
    found = {"LostError": LostError}.get(name)
    return found or getattr(agent_errors, name, None) or getattr(errors, name, None)
