"""Engines: processes of a runtime that sample replies and try them in games of their own.

A rollout's states are shared out in turn; an engine that dies or hangs is started anew, gets the
weights, and plays its share again from the same seeds. How many engines there are changes nothing
in what is played, up to the rounding of batched matrix products.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pz_agents.errors import EngineMissing
from pz_agents.hybrid.settings import HybridSettings
from pz_agents.hybrid.trials import State, Trials
from pz_agents.models import load_model, vllm
from pz_agents.rollout.codec import decode, encode
from pz_agents.runtime import Call, Handle, LostError, Resources, Runtime, open_runtime
from pz_agents.sdk.types import Trajectory
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
        if weights is not None:
            load_files(self._model, weights, version)
            self._version = version
        if self._version != version:
            raise InfraError(f"weights {version} are to play; this engine has {self._version}")
        return [encode(each) for each in self._trials.play([State.of(each) for each in states])]


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
        runtime: where they live; None: the settings'.

    Raises:
        ConfigError: the runtime does not start, or has fewer devices than the settings ask for.
        EngineMissing: vLLM is demanded and not installed.
    """

    def __init__(
        self, settings: HybridSettings, source: str, runtime: Runtime | None = None
    ) -> None:
        model = engine_model(settings, source)
        self._seconds = settings.engine_seconds
        self._own = runtime is None
        self._runtime = runtime or open_runtime(settings.runtime)
        self.replaced = 0
        self._weights: Any = None
        self._version = -1
        self._order: dict[str, int] = {}
        self._seats: list[_Seat] = []
        try:
            spawned = self._runtime.spawn(
                ENGINE,
                settings.vllm_num_engines,
                share_of(settings, self._runtime.total()),
                {"settings": settings.model_dump(mode="json"), "model": model},
            )
        except BaseException:
            self.close()
            raise
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
        """End every engine, and the runtime where it was opened here."""
        if self._own:
            self._runtime.close()
            return
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
        return f"vllm:{source}"
    if settings.vllm_required:
        raise EngineMissing(f"vllm_required, and vLLM is not installed. Install it: {vllm.INSTALL}")
    _logger.warning("vLLM is not installed; transformers samples in the engines instead")
    return source


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
