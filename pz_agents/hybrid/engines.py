"""Engines: processes of a runtime that sample replies and try them in games of their own.

A rollout's states are shared out in turn; an engine that dies or hangs is started anew, gets the
weights, and plays its share again from the same seeds. How many engines there are changes nothing
in what is played, up to the rounding of batched matrix products.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pz_agents.hybrid.settings import HybridSettings, require_vllm
from pz_agents.hybrid.trials import State, Trials
from pz_agents.models import load_model, vllm
from pz_agents.rollout.codec import decode, encode
from pz_agents.runtime import Call, Handle, LostError, Resources, Runtime
from pz_agents.sdk.types import Trajectory
from pz_agents.training.placement import local_devices, resources_of, take_places
from pz_agents.training.worker import load_files, one_thread, pack_files
from pz_envs.errors import ConfigError, InfraError

ENGINE = "pz_agents.hybrid.engines:Engine"
ATTEMPTS = 3
"""How often a share is begun before the run gives up on it."""

_logger = logging.getLogger(__name__)


class Engine:
    """What runs in an engine's process.

    Args:
        settings: of the run, as plain values.
        model: see ``load_model``.
        number: of the engine.
    """

    def __init__(self, settings: dict[str, Any], model: str, number: int) -> None:
        given = HybridSettings.model_validate({**settings, "preset": ""})
        one_thread(given.threads)
        self._model = load_model(model)
        self._trials = Trials(given, self._model)
        self._version = -1
        # Of a model that can, the memory is the learner's while nothing is sampled.
        self._sleeper: Any = None
        if given.colocate_all and hasattr(self._model, "sleep"):
            self._sleeper = self._model
            self._sleeper.sleep()

    def play(
        self, states: list[dict[str, Any]], version: int, weights: bytes | None
    ) -> list[bytes]:
        """Return the encoded episodes of states, played with weights of ``version``.

        Args:
            states: as ``State.plain`` made them.
            version: of the weights.
            weights: those weights; None: they are here.

        Raises:
            InfraError: the weights that are here are of another version.
        """
        with self._awake():
            if weights is not None:
                load_files(self._model, weights, version)
                self._version = version
            if self._version != version:
                raise InfraError(f"weights {version} are to play; this engine has {self._version}")
            played = self._trials.play([State.of(each) for each in states])
        return [encode(each) for each in played]

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        if self._sleeper is not None:
            self._sleeper.wake()
        try:
            yield
        finally:
            if self._sleeper is not None:
                self._sleeper.sleep()


@dataclass(slots=True, eq=False)
class _Seat:
    """An engine, what it plays, and the version of its weights."""

    handle: Handle
    states: Sequence[State] = ()
    call: Call | None = None
    version: int = -1
    attempts: int = 0


class Engines:
    """The engines of a run.

    Args:
        settings: of the run.
        source: the model that they begin with.
        runtime: where they live.
        each: what ``place`` found for each of them there.

    Raises:
        EngineMissing: vLLM is demanded and not installed.
    """

    def __init__(
        self, settings: HybridSettings, source: str, runtime: Runtime, each: Resources
    ) -> None:
        model = engine_model(settings, source)
        self._seconds = settings.engine_seconds
        self._runtime = runtime
        self.replaced = 0
        self._weights: Any = None
        self._version = -1
        self._order: dict[str, int] = {}
        spawned = runtime.spawn(
            ENGINE,
            settings.vllm_num_engines,
            each,
            {"settings": settings.model_dump(mode="json"), "model": model},
        )
        self._seats = [_Seat(handle) for handle in spawned]

    def publish(self, save: Callable[[Path], None], version: int) -> None:
        """Let what is begun from now on be played with these weights.

        Args:
            save: writes a ``save_pretrained`` folder (of an adapter, where one is trained).
            version: of the weights.
        """
        if version != self._version:
            self._weights, self._version = self._runtime.share(pack_files(save)), version

    def begin(self, states: Sequence[State]) -> None:
        """Begin to play states; ``finish`` waits for them."""
        self._order = {state.key: place for place, state in enumerate(states)}
        count = len(self._seats)
        for number, seat in enumerate(self._seats):
            seat.states, seat.attempts = states[number::count], 0
            self._begin(seat)

    def finish(self) -> list[Trajectory]:
        """Return the episodes of what was begun, in the order of its states.

        Raises:
            InfraError: an engine was lost three times over one share.
        """
        played = [each for seat in self._seats for each in self._finished(seat)]
        return sorted(played, key=lambda item: (self._order[item.group_id], item.attempt))

    def close(self) -> None:
        """End every engine."""
        for seat in self._seats:
            self._runtime.kill(seat.handle)

    def _begin(self, seat: _Seat) -> None:
        seat.call = None
        if not seat.states:
            return
        seat.attempts += 1
        seat.call = self._runtime.call(
            seat.handle,
            "play",
            [state.plain() for state in seat.states],
            self._version,
            self._weights if seat.version != self._version else None,
            timeout=self._seconds,
        )
        seat.version = self._version

    def _finished(self, seat: _Seat) -> list[Trajectory]:
        while seat.call is not None:
            try:
                return [decode(blob) for blob in seat.call.result()]
            except LostError as error:
                if seat.attempts >= ATTEMPTS:
                    raise InfraError(
                        f"{seat.handle.name} was lost {ATTEMPTS} times over one share of a "
                        f"rollout, the last time because {error}"
                    ) from error
                _logger.warning("%s; another plays its share again", error)
            self.replaced += 1
            self._runtime.restart(seat.handle)
            seat.version = -1
            self._begin(seat)
        return []


def engine_model(settings: HybridSettings, source: str) -> str:
    """Return what engines load: ``source`` by vLLM where it is installed, else as it is.

    Raises:
        EngineMissing: vLLM is demanded and not installed.
    """
    if vllm.available():
        usual = float(vllm.EngineSettings.model_fields["memory"].default)
        return f"vllm:{source}?memory={usual / 2}" if settings.colocate_all else f"vllm:{source}"
    if settings.vllm_required:
        require_vllm()
    _logger.warning("vLLM is not installed; transformers samples in the engines instead")
    return source


def place(settings: HybridSettings, runtime: Runtime) -> Resources:
    """Take this process's place on a cluster, before it uses a GPU; returns what engines are given.

    Raises:
        ConfigError: there are fewer devices than learner and engines take.
    """
    total = runtime.total()
    if settings.runtime == "local":
        total = replace(total, gpus=len(local_devices()))
    share = share_of(settings, total)
    # The learner is no actor and takes no cores of a cluster.
    given = {"engine": {"cpus": share.cpus, "gpus": share.gpus}, "rank": {"cpus": 0.0}}
    changes = {
        "engines": settings.vllm_num_engines,
        # On a cluster: hold a seat for the learner.
        "learner_ranks": 1 if settings.runtime == "local" and not settings.colocate_all else 0,
        "colocate_all": settings.colocate_all,
        "runtime": settings.runtime,
        "resources": given,
    }
    placed = settings.training().model_copy(update=changes)
    take_places(placed, runtime)
    return resources_of(placed, "engine", runtime)


def share_of(settings: HybridSettings, total: Resources) -> Resources:
    """Return what each engine is given of a runtime that has ``total``.

    Raises:
        ConfigError: there are fewer devices than learner and engines take.
    """
    kind, there = ("GPUs", total.gpus) if total.gpus else ("cores", total.cpus)
    if settings.nodes > there:
        raise ConfigError(
            f"{settings.vllm_num_engines} engines and the learner take {settings.nodes} {kind}, "
            f"and runtime {settings.runtime} has {there:g}; set vllm_num_engines to "
            f"{max(int(there) - (not settings.colocate_all), 0)}"
            + ("" if settings.colocate_all else ", or colocate_all")
        )
    share = 0.5 if settings.colocate_all else 1.0
    return Resources(cpus=1.0, gpus=share) if total.gpus else Resources(cpus=share)
