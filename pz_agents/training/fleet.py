"""A fleet: workers that play a run's batches in other processes, and engines they may share.

A batch is cut into one share of tasks a worker. A worker that dies or hangs is replaced and its
share is played again, as a new attempt, from the same seeds; only a whole share is handed back, so
that no episode is there twice. How a batch is cut, who plays what, and what died on the way change
nothing in the episodes, up to the rounding of batched matrix products. All of this runs in the
caller's thread: the fleet is looked after whenever the caller waits for it.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pz_agents.rollout.codec import decode
from pz_agents.runtime import Call, Handle, LostError, Runtime
from pz_agents.sdk.types import Trajectory
from pz_agents.training.placement import resources_of, take_places
from pz_agents.training.settings import TrainSettings
from pz_agents.training.worker import pack_files
from pz_envs.errors import InfraError

if TYPE_CHECKING:
    from torch import Tensor

    from pz_agents.training.broadcast import Broadcast

WORKER = "pz_agents.training.worker:RolloutWorker"
ENGINE = "pz_agents.training.worker:Engine"
ATTEMPTS = 3
"""How often a share is played before the run gives up on it."""
ENGINE_ATTEMPTS = 6
"""How often in a row an engine may die without an answer; each time it is given a second more."""

_ENGINE_SECONDS = 600.0
_CHECK_SECONDS = 2.0
_LOOK_SECONDS = 0.005

_logger = logging.getLogger(__name__)


def capacity(
    *, max_concurrent: int, running: int, staleness: int, version: int, batch: int, accepted: int
) -> int:
    """Return how many groups may be begun now (AReaL, Fu et al., 2025); never below 0.

    min(max_concurrent - running, (staleness + version + 1) * batch - (accepted + running))

    Args:
        max_concurrent: most groups under way at once.
        running: groups under way.
        staleness: batches that may be played before they are needed.
        version: steps done.
        batch: groups a step.
        accepted: groups played in the history so far. After a resume that is ``version * batch``
            and what is still stored unused; with less, the run would begin with a burst.
    """
    ahead = (staleness + version + 1) * batch - (accepted + running)
    return max(min(max_concurrent - running, ahead), 0)


@dataclass(slots=True)
class Share:
    """Tasks of one batch that one worker plays: ``places`` of them in it.

    ``step`` is the steps done by the weights that play it, ``attempt`` counts the times it was
    begun.
    """

    number: int
    places: tuple[int, ...]
    step: int = 0
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Played:
    """A share's episodes, by group and attempt, and the steps done by the weights that played."""

    share: Share
    trajectories: list[Trajectory]


@dataclass(slots=True)
class _Worker:
    handle: Handle
    version: int | None = None
    share: Share | None = None
    call: Call | None = None


@dataclass(slots=True)
class _Engine:
    """An engine: the weights it was sent, and the one call under way that tells how it is.

    That call brings weights (``receives``: through the group), or asks, now and then, for how long
    its oldest request has been served.
    """

    handle: Handle
    sent: _Weights | None = None
    check: Call | None = None
    receives: bool = False
    asked: float = 0.0
    failures: int = 0


@dataclass(slots=True, eq=False)
class _Weights:
    """Weights that play now; ``shared`` are their files, once somebody needs them."""

    save: Callable[[Path], None]
    version: int
    step: int
    shared: Any = None


class Fleet:
    """Workers and engines of one run, on a runtime; ``close`` ends them, not the runtime.

    Args:
        settings: of the run: how many workers and engines, and what each is given.
        runtime: where they live.

    Attributes:
        runtime: the same.
        requested: number of the last batch that was asked for.
        replaced: how many workers and engines were replaced.
    """

    def __init__(self, settings: TrainSettings, runtime: Runtime) -> None:
        self._settings = settings
        self.runtime = self._runtime = runtime
        take_places(settings, runtime)
        self.requested = 0
        self.replaced = 0
        self._queue: deque[Share] = deque()
        self._weights: _Weights | None = None
        self._failure: InfraError | None = None
        self._broadcast: Broadcast | None = None
        if settings.weights == "group":
            from pz_agents.training.broadcast import Broadcast

            self._broadcast = Broadcast(runtime, _ENGINE_SECONDS)
        self._engines = [
            _Engine(handle)
            for handle in runtime.spawn(
                ENGINE,
                settings.engines,
                resources_of(settings, "engine", runtime),
                {"model": settings.model, "threads": settings.threads},
                # Every worker, new weights, and some that did not arrive.
                concurrency=max(settings.workers, 1) + 2,
            )
        ]
        given = {
            "settings": settings.model_dump(mode="json") | {"preset": ""},
            "engines": [engine.handle.address for engine in self._engines],
        }
        spawned = runtime.spawn(
            WORKER, max(settings.workers, 1), resources_of(settings, "worker", runtime), given
        )
        self._workers = [_Worker(handle) for handle in spawned]

    @property
    def handles(self) -> list[Handle]:
        """Return the workers, then the engines; a replacement keeps its predecessor's handle."""
        workers = [worker.handle for worker in self._workers]
        return workers + [engine.handle for engine in self._engines]

    @property
    def running(self) -> int:
        """Return how many groups were asked for and not handed back yet."""
        under_way = [worker.share for worker in self._workers if worker.share]
        return sum(len(share.places) for share in (*self._queue, *under_way))

    def publish(
        self,
        save: Callable[[Path], None],
        version: int,
        step: int,
        state: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Let what is begun from now on be played with new weights.

        With ``weights`` set to ``group``, they must stay as they are while the fleet is asked for
        anything: an engine that is started anew gets them as files.

        Args:
            save: writes a ``save_pretrained`` folder (of an adapter, where one is trained).
            version: of these weights.
            step: steps done by them.
            state: returns their ``state_dict``, any adapter added; to go through a group.

        What fails here is raised when episodes are next asked for: the step is whole by then.
        """
        self._failure = None
        try:
            self._begin(_Weights(save, version, step), state)
        except InfraError as error:
            self._failure = error

    def play(self, number: int) -> list[Trajectory]:
        """Play batch ``number`` and wait for all of it; sorted by group and attempt."""
        self.request(number)
        played: list[Trajectory] = []
        while self.running:
            for done in self.finished():
                played += done.trajectories
        return sorted(played, key=lambda item: (item.group_id, item.attempt))

    def request(self, number: int) -> None:
        """Ask for batch ``number``; workers that are free begin at once."""
        self._check()
        self.requested = number
        count, parts = self._settings.groups_per_step, len(self._workers)
        bounds = [count * part // parts for part in range(parts + 1)]
        for first, end in itertools.pairwise(bounds):
            if end > first:
                self._queue.append(Share(number, tuple(range(first, end))))
        self._assign()

    def finished(self, seconds: float = 0.2) -> list[Played]:
        """Return the shares that are done, after at most ``seconds``; looks after the fleet.

        Raises:
            InfraError: a share was lost three times, or an engine or the episodes keep failing.
        """
        self._check()
        until = time.monotonic() + seconds
        while True:
            self._look_after()
            done = [played for worker in self._workers for played in self._collected(worker)]
            self._assign()
            if done or time.monotonic() > until:
                return done
            time.sleep(_LOOK_SECONDS)

    def close(self) -> None:
        """End every worker and engine; what they were playing is lost."""
        self._leave()
        for handle in self.handles:
            self._runtime.kill(handle)

    def _begin(self, weights: _Weights, state: Callable[[], Mapping[str, Tensor]] | None) -> None:
        """Let weights play from now on."""
        if self._broadcast is None or state is None:
            self._files(weights)
        else:
            self._send(self._broadcast, weights, state())
        self._weights = weights
        for engine in self._engines:
            self._tend(engine)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _files(self, weights: _Weights) -> Any:
        """Return the files of weights, stored for everybody."""
        if weights.shared is None:
            weights.shared = self._runtime.share(pack_files(weights.save))
        return weights.shared

    def _send(self, broadcast: Broadcast, weights: _Weights, state: Mapping[str, Tensor]) -> None:
        """Send weights to all engines through the group; if that fails, they get files later."""
        # What was published is there no more: an engine that is started anew waits for this.
        self._weights = None
        while any(engine.check is not None for engine in self._engines):
            self._look_after()
            time.sleep(_LOOK_SECONDS)
        handles = [engine.handle for engine in self._engines]
        try:
            calls = broadcast.send(handles, state, weights.version)
        except LostError as error:
            _logger.warning("%s; they get files", error)
            return
        for engine, call in zip(self._engines, calls, strict=True):
            engine.sent, engine.check, engine.receives = weights, call, True

    def _assign(self) -> None:
        weights = self._weights
        for worker in self._workers:
            if worker.share is not None or not self._queue or weights is None:
                continue
            share = worker.share = self._queue.popleft()
            share.step = weights.step
            share.attempt += 1
            fresh = worker.version != weights.version and not self._engines
            worker.call = self._runtime.call(
                worker.handle,
                "play",
                share.number,
                list(share.places),
                weights.version,
                weights.shared if fresh else None,
                timeout=self._settings.worker_seconds,
            )
            worker.version = weights.version

    def _collected(self, worker: _Worker) -> list[Played]:
        share, call = worker.share, worker.call
        if share is None or call is None or not call.done():
            return []
        worker.share = worker.call = None
        try:
            blobs = call.result()
        except LostError as error:
            if share.attempt >= ATTEMPTS:
                raise InfraError(
                    f"batch {share.number}, tasks {share.places[0]} to {share.places[-1]}: lost "
                    f"{ATTEMPTS} times, the last time because {error}"
                ) from error
            _logger.warning("%s; another plays its share again", error)
            self._queue.appendleft(share)
            self._replace(worker.handle)
            worker.version = None
            return []
        return [Played(share, [decode(blob) for blob in blobs])]

    def _look_after(self) -> None:
        """Replace what has died and bring new engines into step."""
        dead = {event.handle: event.reason for event in self._runtime.watch()}
        for worker in self._workers:
            # A worker with a share is replaced when its call fails.
            if worker.handle in dead and worker.share is None:
                _logger.warning("%s %s; it is replaced", worker.handle.name, dead[worker.handle])
                self._replace(worker.handle)
                worker.version = None
        for engine in self._engines:
            if engine.handle in dead:
                self._restore(engine, f"{engine.handle.name} {dead[engine.handle]}")
            else:
                self._tend(engine)

    def _tend(self, engine: _Engine) -> None:
        """Hear how an engine is, and begin what it needs next; one thing at a time."""
        if engine.check is not None and engine.check.done():
            self._checked(engine, engine.check)
        if engine.check is not None:
            return
        weights = self._weights
        if weights is not None and engine.sent is not weights:
            files = self._files(weights)
            engine.sent = weights
            engine.check = self._runtime.call(
                engine.handle, "load", files, weights.version, timeout=_ENGINE_SECONDS
            )
        elif time.monotonic() - engine.asked > _CHECK_SECONDS:
            engine.asked = time.monotonic()
            engine.check = self._runtime.busy(engine.handle, _ENGINE_SECONDS)

    def _checked(self, engine: _Engine, check: Call) -> None:
        received, engine.receives, engine.check = engine.receives, False, None
        try:
            told = check.result()
        except LostError as error:
            self._restore(engine, str(error))
            return
        except InfraError as error:
            if not received:
                raise
            _logger.warning("%s; %s gets files", error, engine.handle.name)
            self._leave()
            engine.sent = None
            return
        # Of new weights it tells the version.
        if isinstance(told, float) and told > _ENGINE_SECONDS:
            name = engine.handle.name
            self._restore(engine, f"{name} did not answer a request within {_ENGINE_SECONDS:g} s")
        else:
            engine.failures = 0

    def _restore(self, engine: _Engine, reason: str) -> None:
        """Put another engine in the place of a dead or hung one, and bring it into step."""
        engine.failures += 1
        if engine.failures >= ENGINE_ATTEMPTS:
            raise InfraError(f"an engine died {ENGINE_ATTEMPTS} times without an answer: {reason}")
        _logger.warning("%s; it is replaced", reason)
        # A cluster takes a while to notice that a node has gone.
        time.sleep(engine.failures - 1)
        self._replace(engine.handle)
        # Whatever it was asked before fails now and is of no interest.
        engine.sent = engine.check = None
        engine.receives = False
        self._leave()
        self._tend(engine)

    def _leave(self) -> None:
        """Leave the group, in which somebody is missing."""
        if self._broadcast is not None:
            self._broadcast.close()

    def _replace(self, handle: Handle) -> None:
        self.replaced += 1
        self._runtime.restart(handle)
