"""The runtime of a Ray cluster: an actor an object. Nothing else in pz imports ray.

A Ray of our own begins with the first runtime, listens on the loopback alone, has no dashboard,
sends no usage statistics, and ends with the runtime that started it. Actors are named, so that any
process of the cluster reaches them; bytes that are shared lie in the object store. A cluster that
was joined is watched by its head (``cluster.py``). Ray Tune, which needs ray as well, is at the end
of this file.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pz_agents.interrupt import Terminated
from pz_agents.runtime import (
    CALL_SECONDS,
    Event,
    Handle,
    LostError,
    Resources,
    Served,
    answered,
    cluster,
)
from pz_envs.errors import ConfigError, require
from pz_envs.worker_child import load_factory

if TYPE_CHECKING:
    from pz_agents.tune import Draw, Trial

INSTALL = "pz-agents[ray]"

_STORE_BYTES = 200 << 20
_FREE_SECONDS = 30.0
_LOOK_SECONDS = 2.0
_PLACE_SECONDS = 120.0
_CUDA = "CUDA_VISIBLE_DEVICES"
_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Seconds after which Ray ends a process, as it stands, whose cluster's head is silent. We look
ourselves and stop in order; a step may take longer than Ray's minute."""


class Host:
    """What runs in an actor: the object, or why there is none.

    Args:
        factory: see ``Runtime.spawn``.
        kwargs: its arguments.
        path: where the driver finds modules; added behind this process's own.
    """

    def __init__(self, factory: str, kwargs: dict[str, Any], path: list[str]) -> None:
        sys.path += [entry for entry in path if entry not in sys.path]
        self._served = Served(factory, kwargs)

    def call(self, method: str, *args: Any) -> list[Any]:
        """Serve one call; the object store has put bytes where references were."""
        return self._served.call(method, args)

    def busy(self) -> list[Any]:
        """Answer ``Served.busy``."""
        return [True, self._served.busy()]

    def pid(self) -> int:
        """Return this process's id."""
        return os.getpid()

    def stay(self) -> None:
        """Never answer: the reference to this answer is ready when the actor has died."""
        while True:
            time.sleep(3600)


class Seat:
    """Keeps a GPU, or a share of one, for the driver, which is no actor itself."""

    def __init__(self, number: int) -> None:
        pass

    def devices(self) -> str:
        """Return the GPU's name for CUDA."""
        return os.environ.get(_CUDA, "")


class _Actor:
    """An actor and what it was started with."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self.start = start
        self.actor = start()
        self.life = self.actor.stay.remote()
        self.wanted = True


class RayCall:
    """A call to an actor; see ``Call``."""

    def __init__(self, owner: RayRuntime, handle: Handle, method: str, ref: Any, timeout: float):
        self._owner = owner
        self._handle = handle
        self._method = method
        self._ref = ref
        self._timeout = timeout
        self._until = time.monotonic() + timeout

    def done(self) -> bool:
        """See ``Call``."""
        self._owner.check_head()
        ready, _ = self._owner.ray.wait([self._ref], timeout=0)
        return bool(ready) or time.monotonic() > self._until

    def result(self) -> Any:
        """See ``Call``."""
        what = f"`{self._method}` of {self._handle.name}"
        try:
            self._owner.wait(self._ref, self._until)
            left = max(self._until - time.monotonic(), 0.0)
            reply = _get(self._owner.ray, self._ref, left, what)
        except LostError:
            self._owner.check_head(now=True)
            raise
        except TimeoutError:
            self._owner.end(self._handle)
            raise LostError(
                f"{self._handle.name} did not answer `{self._method}` within {self._timeout:g} s "
                "and was killed"
            ) from None
        return answered(reply, what)


class RayRuntime:
    """Actors on a Ray cluster; see ``Runtime``.

    Args:
        address: ``local`` starts a Ray of this process's own, unless it is connected to one; else
            that of a cluster, as ``ray.init`` takes it.
        cpus: of a Ray that is started here.

    Raises:
        ConfigError: ray is not installed, or the cluster does not answer.

    Once it is open, every method raises InfraError where the head of a cluster that was joined has
    been silent for a while; ``close`` is safe even then.
    """

    def __init__(self, address: str = "local", *, cpus: int | None = None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if address == "local":
            # Ray's own way to listen on 127.0.0.1 alone; it reads this when it is imported.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        with _patient(address != "local"):
            self.ray = require("ray", INSTALL)
            self._owns = not self.ray.is_initialized()
            if self._owns:
                _init(self.ray, address, cpus)
        self._head = (
            None
            if address == "local"
            else cluster.Head(str(self.ray.get_runtime_context().gcs_address))
        )
        self._space = f"pz-{uuid.uuid4().hex[:12]}"
        self._actors: dict[Handle, _Actor] = {}
        self._numbers = itertools.count()
        self._places: Any = None
        self._cuda_before: list[str | None] = []
        self._actor_class = self.ray.remote(
            concurrency_groups={"side": 1, "stay": 1}, max_restarts=0, max_task_retries=0
        )(_grouped(self.ray))

    def spawn(
        self,
        factory: str,
        n: int = 1,
        resources: Resources | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        concurrency: int = 1,
    ) -> list[Handle]:
        """Start ``n`` actors, which Ray places when there is room; see ``Runtime``."""
        self.check_head()
        asked = resources or Resources()
        path = [os.path.abspath(entry) for entry in sys.path]
        handles = []
        for number in range(n):
            name = f"{factory.rpartition(':')[2].lower()}-{next(self._numbers)}"
            handle = Handle(name, f"ray:{self._space}/{name}")
            given = {**(kwargs or {}), "number": number}
            strategy = None if asked.place is None else self._at(asked.place + number)

            def start(
                name: str = name, given: dict[str, Any] = given, strategy: Any = strategy
            ) -> Any:
                options = self._actor_class.options(
                    name=name,
                    namespace=self._space,
                    num_cpus=asked.cpus,
                    num_gpus=asked.gpus,
                    resources=dict(asked.custom) or None,
                    max_concurrency=concurrency,
                    scheduling_strategy=strategy,
                )
                return options.remote(factory, given, path)

            self._actors[handle] = _Actor(start)
            handles.append(handle)
        return handles

    def call(
        self, handle: Handle, method: str, *args: Any, timeout: float = CALL_SECONDS
    ) -> RayCall:
        """Begin a call; see ``Runtime``."""
        self.check_head()
        ref = self._actors[handle].actor.call.remote(method, *args)
        return RayCall(self, handle, method, ref, timeout)

    def busy(self, handle: Handle, timeout: float = CALL_SECONDS) -> RayCall:
        """Ask for the age of the oldest call; see ``Runtime``."""
        self.check_head()
        ref = self._actors[handle].actor.busy.remote()
        return RayCall(self, handle, "busy", ref, timeout)

    def share(self, data: bytes) -> Any:
        """Put ``data`` into the object store; see ``Runtime``."""
        # Where this machine's part of the cluster has gone too, Ray ends this process here.
        self.check_head(now=True)
        return self.ray.put(data)

    def kill(self, handle: Handle) -> None:
        """End an actor at once; see ``Runtime``."""
        self._actors[handle].wanted = False
        self.end(handle)

    def end(self, handle: Handle) -> None:
        """End an actor; ``watch`` tells of it unless ``kill`` asked for it."""
        self.ray.kill(self._actors[handle].actor, no_restart=True)

    def restart(self, handle: Handle) -> None:
        """Start an actor anew under its name; see ``Runtime``."""
        self.check_head(now=True)
        self.kill(handle)
        until = time.monotonic() + _FREE_SECONDS
        while True:
            try:
                self._actors[handle] = _Actor(self._actors[handle].start)
                return
            except ValueError:  # Ray forgets a dead actor's name a little later
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)

    def watch(self) -> list[Event]:
        """Return whose actors have ended; see ``Runtime``."""
        self.check_head()
        events = []
        for handle, actor in self._actors.items():
            if actor.wanted and self.ray.wait([actor.life], timeout=0)[0]:
                actor.wanted = False
                events.append(Event(handle, "died"))
        return events

    def check_head(self, *, now: bool = False) -> None:
        """Raise InfraError where the cluster is lost; ``now``: though it was well a moment ago."""
        if self._head is not None:
            self._head.check(now=now)

    def wait(self, ref: Any, until: float) -> None:
        """Look at the head, where there is one, while an answer is waited for."""
        while self._head is not None and time.monotonic() < until:
            self.check_head()
            if self.ray.wait([ref], timeout=_LOOK_SECONDS)[0]:
                return

    def pid(self, handle: Handle) -> int:
        """Return the process id of the actor, on its node."""
        return int(self.ray.get(self._actors[handle].actor.pid.remote(), timeout=CALL_SECONDS))

    def reserve(self, count: int, each: Resources, own_gpus: float) -> None:
        """Hold a placement group; see ``Runtime``."""
        amounts = {"CPU": each.cpus, "GPU": each.gpus, **each.custom}
        bundles = [{name: amount for name, amount in amounts.items() if amount}] * count
        # Every node has a resource of its own name.
        bundles[0] = {**bundles[0], f"node:{self.host()}": 0.001}
        self._places = self.ray.util.placement_group(bundles)
        if not self._places.wait(_PLACE_SECONDS):
            there = self.total()
            raise ConfigError(
                f"the cluster has no room for {count} places with {amounts} each, the first of "
                f"them on this machine; it has {there.cpus:g} CPUs and {there.gpus:g} GPUs in all. "
                "Ask for less in `resources`, or set fewer `engines` and `learner_ranks`"
            )
        if own_gpus:
            asked = Resources(cpus=0.0, gpus=own_gpus, place=0)
            (seat,) = self.spawn("pz_agents.runtime.ray:Seat", 1, asked)
            self._cuda_before = [os.environ.get(_CUDA)]
            os.environ[_CUDA] = self.call(seat, "devices").result()

    def _at(self, place: int) -> Any:
        """Return Ray's form of a place that is held."""
        strategies = require("ray.util.scheduling_strategies", INSTALL)
        return strategies.PlacementGroupSchedulingStrategy(
            self._places, placement_group_bundle_index=place
        )

    def host(self) -> str:
        """Return this node's address as the cluster knows it; see ``Runtime``."""
        return str(self.ray.util.get_node_ip_address())

    def total(self) -> Resources:
        """Return what the cluster's nodes have."""
        found = dict(self.ray.cluster_resources())
        return Resources(found.pop("CPU", 0.0), found.pop("GPU", 0.0), found)

    def close(self) -> None:
        """End every actor, and Ray if this runtime started it."""
        for handle, actor in self._actors.items():
            actor.wanted = False
            self.end(handle)
        self._actors.clear()
        if self._places is not None:
            self.ray.util.remove_placement_group(self._places)
            self._places = None
        for before in self._cuda_before:
            os.environ.pop(_CUDA, None)
            if before is not None:
                os.environ[_CUDA] = before
        self._cuda_before = []
        if self._owns:
            self._owns = False
            self.ray.shutdown()


class RayRemote:
    """An actor at a ``ray:`` address; see ``Remote``."""

    def __init__(self, address: str) -> None:
        self._ray = require("ray", INSTALL)
        self._space, _, self._name = address.removeprefix("ray:").partition("/")

    def call(self, method: str, *args: Any, timeout: float = CALL_SECONDS) -> Any:
        """Call a method and wait; see ``Remote``."""
        what = f"`{method}` of {self._name}"
        try:
            actor = self._ray.get_actor(self._name, self._space)
        except ValueError:
            raise LostError(f"there is no actor {self._name}") from None
        try:
            reply = _get(self._ray, actor.call.remote(method, *args), timeout, what)
        except TimeoutError:
            message = f"{self._name} did not answer `{method}` within {timeout:g} s"
            raise LostError(message) from None
        return answered(reply, what)


def _grouped(ray: Any) -> type:
    """Return ``Host`` with those methods apart that must answer while a call is served."""

    class Actor(Host):
        pid = ray.method(concurrency_group="side")(Host.pid)
        busy = ray.method(concurrency_group="side")(Host.busy)
        stay = ray.method(concurrency_group="stay")(Host.stay)

    return Actor


def _get(ray: Any, ref: Any, timeout: float, what: str) -> Any:
    try:
        return ray.get(ref, timeout=timeout)
    except ray.exceptions.GetTimeoutError:
        raise TimeoutError from None
    except ray.exceptions.RayActorError as error:
        raise LostError(f"the actor died during {what}: {str(error).splitlines()[0]}") from None


def _init(ray: Any, address: str, cpus: int | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        options |= {
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": _STORE_BYTES,
        }
    else:
        noted = require("ray._private.utils", INSTALL).read_ray_address()
        cluster.check(_as_ray_says(ray, cluster.find(address, noted)))
    at_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        # Without an address Ray takes the same as we have found; with `auto` any that runs here.
        ray.init(address=None if address == "auto" else address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        what = "started" if address == "local" else f"joined at {address}"
        raise ConfigError(
            f"no Ray could be {what} ({error}). A cluster that demands a token needs "
            "RAY_AUTH_MODE=token here; the runtime `ray` starts a Ray of its own"
        ) from error
    finally:
        # Ray leaves a handler that exits at once, without a checkpoint.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, at_sigterm)


@contextlib.contextmanager
def _patient(wanted: bool) -> Iterator[None]:
    """Let Ray, as it is set up here, wait for a silent head as long as we do; and no other Ray."""
    if not wanted or _PATIENCE in os.environ:
        yield
        return
    os.environ[_PATIENCE] = "86400"
    try:
        yield
    finally:
        del os.environ[_PATIENCE]


def _as_ray_says(ray: Any, address: str) -> str:
    """Return the address that Ray will ask: this machine's for the loopback's."""
    host, _, port = address.rpartition(":")
    own = host in ("localhost", "127.0.0.1", "[::1]")
    return f"{ray.util.get_node_ip_address()}:{port}" if own else address


def search(
    trial: str,
    fixed: Mapping[str, Any],
    searched: Mapping[str, Draw],
    folder: Path,
    *,
    samples: int,
    runtime: str,
    concurrent: int,
    seed: int,
    stopped_by: Path,
) -> list[Trial]:
    """Run trials with Ray Tune, or go on with those in ``folder``; see ``pz_agents.tune``.

    Args:
        trial: import path of what runs one, given ``fixed``, the drawn values, the trial's name
            and a function that takes its figures.
        fixed: the same for all.
        searched: how values are drawn.
        folder: Ray Tune's own, to go on from.
        samples: trials, for each point of a grid.
        runtime: ``ray`` or ``ray:ADDRESS``.
        concurrent: most at once; 0: no limit but the cluster's.
        seed: of what is drawn.
        stopped_by: a file; when it is there the search ends, to be gone on with later.

    Raises:
        ConfigError: Ray Tune is not installed.
        InfraError: the cluster was lost.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    opened = RayRuntime(runtime.partition(":")[2] or "local")
    watch = cluster.Watch(opened.check_head, stopped_by)
    try:
        tune = require("ray.tune", INSTALL)
        if tune.Tuner.can_restore(str(folder)):
            tuner = tune.Tuner.restore(
                str(folder), _run_trial, resume_unfinished=True, restart_errored=True
            )
        else:
            drawn = {key: _domain(tune, draw) for key, draw in searched.items()}
            basic = require("ray.tune.search.basic_variant", INSTALL)
            tuner = tune.Tuner(
                _run_trial,
                param_space={"trial": trial, "fixed": dict(fixed), "drawn": drawn},
                tune_config=tune.TuneConfig(
                    num_samples=samples,
                    max_concurrent_trials=concurrent or None,
                    search_alg=basic.BasicVariantGenerator(random_state=seed),
                ),
                run_config=tune.RunConfig(
                    name=folder.name, storage_path=str(folder.parent), verbose=0
                ),
            )
        with _stopped_by_signals(), watch:
            results = tuner.fit()
        return [_ended(result) for result in results]
    except KeyboardInterrupt:
        if watch.lost is not None:
            raise watch.lost from None
        if watch.stopped:
            return []
        raise
    finally:
        opened.close()


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM end Tune as Ctrl-C does, with its state saved, and raise what came at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    terminated = False

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        signal.raise_signal(signal.SIGINT)

    at_ctrl_c = signal.getsignal(signal.SIGINT)
    at_sigterm = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
        # Tune puts its handler there and takes it away when a signal came.
        if signal.getsignal(signal.SIGINT) is at_ctrl_c:
            raise KeyboardInterrupt
    except KeyboardInterrupt as stopped:
        raise (Terminated if terminated else type(stopped)) from None
    finally:
        signal.signal(signal.SIGINT, at_ctrl_c)
        signal.signal(signal.SIGTERM, at_sigterm)


def _run_trial(config: Mapping[str, Any]) -> None:
    """What Ray Tune calls in a process of its own."""
    tune = require("ray.tune", INSTALL)
    name = tune.get_context().get_trial_id()
    run = load_factory(config["trial"])
    run(config["fixed"], config["drawn"], name, lambda figures: tune.report(dict(figures)))


def _domain(tune: Any, draw: Draw) -> Any:
    """Return Ray Tune's form of a range."""
    if draw.kind in ("choice", "grid"):
        make = tune.choice if draw.kind == "choice" else tune.grid_search
        return make(list(draw.arguments))
    return getattr(tune, draw.kind)(*draw.arguments)


def _ended(result: Any) -> Trial:
    from pz_agents.tune import Trial

    metrics = dict(result.metrics or {})
    drawn = dict(metrics.pop("config", None) or result.config)["drawn"]
    plain = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    error = None if result.error is None else str(result.error).strip().splitlines()[-1]
    return Trial(str(metrics.get("trial_id", Path(result.path).name)), drawn, plain, error)
