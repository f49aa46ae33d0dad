"""The rollout loop: many live episodes, one agent, no barrier between episodes.

Every environment steps on its own thread; the agent is called, in the caller's thread, on whichever
turns are ready. Turns wait a moment for environments that are usually quick, so that with quick
environments the batches, and not only the random streams, are the same in every run; an agent that
answers at once gains nothing from batches and is asked without waiting. An episode
that breaks is yielded as ``failed`` and counted; it never stops the others, until failures are
so many that the run itself is broken. Every limit is finite.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeVar

from pz_agents.errors import AgentError, FailureBudgetError
from pz_agents.rollout.episode import EpisodeSpec, Limits, LiveEpisode
from pz_agents.rollout.slots import EnvSlot, Finished, MakeEnv
from pz_agents.sdk.protocols import Agent, EndsEpisodes, PlaysEpisodes, StartsEpisodes
from pz_agents.sdk.types import Action, Episode, Trajectory, Truncation, Turn
from pz_envs.errors import ConfigError, DataError, EnvError, InfraError, PzError

__all__ = ["EpisodeSpec", "Limits", "MakeEnv", "run_episodes"]

_CONSECUTIVE_FAILURES = 20
_FAILURE_WINDOW = 256

_QUICK_SECONDS = 0.05
_PATIENCE_SECONDS = 0.25
_LONGEST_LINGER = 0.05
_AT_ONCE_SECONDS = 0.002
_CLOSE_SECONDS = 5.0

_logger = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


def run_episodes(
    agent: Agent,
    specs: Iterable[EpisodeSpec],
    *,
    make_env: MakeEnv,
    limits: Limits,
    seed: int,
    concurrency: int = 16,
) -> Iterator[Trajectory]:
    """Play ``specs`` and yield each trajectory as its episode ends, failed ones too.

    ``specs`` is read lazily, at most ``concurrency`` ahead of what has been yielded. A turn's seed
    is ``derive_seed(seed, "turn", key, index)``, so neither concurrency nor scheduling changes
    what an agent draws. Closing the iterator closes every environment. An operation of an
    environment that still runs when its episode's time is over, and has run for at least a tenth
    of ``limits.seconds``, is abandoned and its episode fails. When ``act`` raises on a batch,
    each turn is asked again alone, so that only the culprit fails.

    Args:
        agent: plays; ``start`` and ``end`` are called where it has them. One that has
            ``play_episodes`` plays them that way.
        specs: the episodes.
        make_env: makes an environment; it is called from several threads, and asks for
            admissible commands if ``agent.needs_admissible_commands``.
        limits: when an episode is cut short.
        seed: of the run; only the agent's randomness depends on it.
        concurrency: most episodes alive at once.

    Raises:
        ConfigError: two specs share a key, or ``make_env`` raised it.
        DataError: ``make_env`` raised it.
        AgentError: ``act`` returned another number of actions than it was given turns.
        FailureBudgetError: 20 episodes more than ``concurrency`` failed in a row, or more than
            half of the last 256 did.
    """
    if concurrency < 1:
        raise ConfigError(f"concurrency must be at least 1; got {concurrency}")
    if isinstance(agent, PlaysEpisodes):
        yield from agent.play_episodes(
            specs, make_env=make_env, limits=limits, seed=seed, concurrency=concurrency
        )
        return
    rollout = _Rollout(agent, iter(specs), make_env, limits, seed, concurrency)
    try:
        yield from rollout.run()
    finally:
        rollout.close()


@dataclass(slots=True)
class _Pace:
    """How an environment id's steps have taken so far: steady until too many were slow."""

    steps: int = 0
    slow: int = 0

    def add(self, seconds: float) -> None:
        self.steps += 1
        self.slow += seconds > _QUICK_SECONDS

    @property
    def steady(self) -> bool:
        # One step in twenty may be slow; the allowance is for the first, when caches are cold.
        return self.slow * 20 <= self.steps + 40


class _Rollout:
    """The state of one ``run_episodes``."""

    def __init__(
        self,
        agent: Agent,
        specs: Iterator[EpisodeSpec],
        make_env: MakeEnv,
        limits: Limits,
        seed: int,
        concurrency: int,
    ) -> None:
        self._agent = agent
        self._specs = specs
        self._make_env = make_env
        self._limits = limits
        self._seed = seed
        self._concurrency = concurrency
        self._options = getattr(agent, "reset_options", None)
        self._outbox: SimpleQueue[Finished] = SimpleQueue()
        self._live: dict[EnvSlot, LiveEpisode] = {}
        self._idle: list[EnvSlot] = []
        self._keys: set[str] = set()
        self._order = itertools.count()
        self._paces: dict[str, _Pace] = {}
        self._first_ready = 0.0
        self._agent_seconds: float | None = None
        self._suspended = 0.0
        self._recent: deque[bool] = deque(maxlen=_FAILURE_WINDOW)
        # Quick failures may outrun the successes that are still under way.
        self._streak: deque[str] = deque(maxlen=_CONSECUTIVE_FAILURES + concurrency)

    def run(self) -> Iterator[Trajectory]:
        while self._fill():
            for finished in self._collect():
                yield from self._hand_over(self._receive(finished))
            yield from self._hand_over(self._abandon_overdue())
            self._fill()  # an episode that takes a free place belongs in the coming batch
            if self._ready() and self._wait_until() <= self._now():
                yield from self._hand_over(self._ask())

    def close(self) -> None:
        for live in self._live.values():
            if live.told and isinstance(self._agent, EndsEpisodes):
                with suppress(Exception):  # the caller has left; nobody is there to be told
                    self._agent.end(live.trajectory(self._now(), error="interrupted"))
        slots = [*self._idle, *self._live]
        for slot in slots:
            slot.retire()
        deadline = time.monotonic() + _CLOSE_SECONDS
        stuck = sum(not slot.join(deadline - time.monotonic()) for slot in slots)
        if stuck:
            _logger.warning("%d environments are still busy and close when they return", stuck)
        self._live.clear()
        self._idle.clear()

    # Time: the consumer's own work between two trajectories is nobody's wall clock.

    def _now(self) -> float:
        return time.monotonic() - self._suspended

    def _hand_over(self, trajectories: Iterable[Trajectory]) -> Iterator[Trajectory]:
        for trajectory in trajectories:
            paused = time.monotonic()
            yield trajectory
            self._suspended += time.monotonic() - paused
            self._check_budget(trajectory)

    def _check_budget(self, trajectory: Trajectory) -> None:
        failed = trajectory.status == "failed"
        self._recent.append(failed)
        if not failed:
            self._streak.clear()
            return
        self._streak.append(f"{trajectory.key}: {trajectory.error}")
        half = len(self._recent) == _FAILURE_WINDOW and sum(self._recent) * 2 > _FAILURE_WINDOW
        if half or len(self._streak) == self._streak.maxlen:
            what = f"more than half of the last {_FAILURE_WINDOW}" if half else len(self._streak)
            last = "\n  ".join(list(self._streak)[-5:])
            in_a_row = "" if half else " in a row"
            raise FailureBudgetError(
                f"{what} episodes{in_a_row} failed, so the run is broken. The last were:\n  {last}"
            )

    # Starting episodes.

    def _fill(self) -> bool:
        """Start episodes while there is room; returns whether any is alive."""
        while len(self._live) < self._concurrency:
            spec = next(self._specs, None)
            if spec is None:
                break
            if spec.key in self._keys:
                raise ConfigError(f"two episodes have the key {spec.key!r}; keys must be unique")
            self._keys.add(spec.key)
            slot = self._take_slot(spec.env_id)
            now = self._now()
            self._live[slot] = LiveEpisode(next(self._order), spec, slot, began=now, asked=now)
            slot.begin(spec.env_id, spec.env_seed, self._options, spec.resume)
        return bool(self._live)

    def _take_slot(self, env_id: str) -> EnvSlot:
        for number, slot in enumerate(self._idle):
            if slot.env_id == env_id:
                return self._idle.pop(number)
        return self._idle.pop() if self._idle else EnvSlot(self._make_env, self._outbox)

    # Waiting for environments.

    def _ready(self) -> list[LiveEpisode]:
        return [live for live in self._live.values() if live.turn is not None]

    def _overdue_at(self, live: LiveEpisode) -> float:
        seconds = self._limits.seconds
        return max(live.began + seconds, live.asked + seconds / 10)

    def _wait_until(self) -> float:
        """Return the moment until which it is right to wait for environments at work."""
        busy = [live for live in self._live.values() if live.turn is None]
        if not busy:
            return self._now()
        if len(busy) == len(self._live):
            return min(self._overdue_at(live) for live in busy)
        if self._agent_seconds is not None and self._agent_seconds < _AT_ONCE_SECONDS:
            return self._first_ready
        linger = self._first_ready + min((self._agent_seconds or 0.0) / 4, _LONGEST_LINGER)
        steady = [live for live in busy if self._pace(live.spec.env_id).steady]
        return max([linger, *(live.asked + _PATIENCE_SECONDS for live in steady)])

    def _collect(self) -> list[Finished]:
        """Return what has finished, in the order of the specs, after at most one wait."""
        finished: list[Finished] = []
        wait = max(self._wait_until() - self._now(), 0.0)
        with suppress(Empty):
            finished.append(self._outbox.get(timeout=wait) if wait else self._outbox.get_nowait())
            while True:
                finished.append(self._outbox.get_nowait())
        known = [item for item in finished if item.slot in self._live]
        return sorted(known, key=lambda item: self._live[item.slot].order)

    def _pace(self, env_id: str) -> _Pace:
        return self._paces.setdefault(env_id, _Pace())

    def _abandon_overdue(self) -> list[Trajectory]:
        now = self._now()
        ended = []
        for live in list(self._live.values()):
            if live.turn is None and now >= self._overdue_at(live):
                what = "step" if live.action is not None else "reset"
                error = EnvError(
                    f"{live.spec.env_id}: {what} did not return within {now - live.asked:.1f} s "
                    "and was abandoned"
                )
                del self._live[live.slot]
                live.slot.retire()
                ended.append(self._end(live, error=error))
        return ended

    # From an environment's answer to the next turn or the end.

    def _receive(self, finished: Finished) -> list[Trajectory]:
        live = self._live[finished.slot]
        if finished.error is not None:
            if finished.phase == "make" and isinstance(finished.error, ConfigError | DataError):
                raise finished.error
            return [self._release(live, error=finished.error)]
        if live.action is None:
            live.begin(*finished.value)
            self._open_turn(live)
            return []
        self._pace(live.spec.env_id).add(finished.seconds)
        observation, reward, terminated, cut, info = finished.value
        live.record(observation, reward, info)
        truncated: Truncation = ""
        if not terminated:
            truncated = live.limit_reached(self._limits, self._now()) or ("turns" if cut else "")
        if terminated or truncated:
            return [self._release(live, terminated, truncated)]
        self._open_turn(live)
        return []

    def _open_turn(self, live: LiveEpisode) -> None:
        if not self._ready():
            self._first_ready = self._now()
        live.open_turn(self._seed)

    # The agent.

    def _ask(self) -> list[Trajectory]:
        """Ask the agent about every ready turn; returns the episodes that this ends."""
        ready = sorted(self._ready(), key=lambda live: live.order)
        began = time.monotonic()
        ended = self._tell_starts([live for live in ready if not live.told])
        ready = [live for live in ready if live.slot in self._live]
        answers = _batched(self._act, [live.turn for live in ready if live.turn is not None])
        self._agent_seconds = time.monotonic() - began
        for live, answer in zip(ready, answers, strict=True):
            action = _as_action(answer)
            if isinstance(action, Exception):
                ended.append(self._release(live, error=action))
                continue
            live.turn, live.action = None, action
            live.asked = self._now()
            live.slot.step(action.text)
        return ended

    def _act(self, turns: Sequence[Turn]) -> Sequence[Action | str]:
        return self._agent.act(turns)

    def _tell_starts(self, lives: list[LiveEpisode]) -> list[Trajectory]:
        for live in lives:
            live.told = True
        agent = self._agent
        if not isinstance(agent, StartsEpisodes):
            return []

        def start(episodes: Sequence[Episode]) -> list[None]:
            agent.start(episodes)
            return [None] * len(episodes)

        answers = _batched(start, [live.episode for live in lives if live.episode is not None])
        return [
            self._release(live, error=answer)
            for live, answer in zip(lives, answers, strict=True)
            if answer is not None
        ]

    # Ends.

    def _release(
        self,
        live: LiveEpisode,
        terminated: bool = False,
        truncated: Truncation = "",
        error: Exception | None = None,
    ) -> Trajectory:
        """End an episode and free its slot."""
        del self._live[live.slot]
        self._idle.append(live.slot)
        return self._end(live, terminated, truncated, error)

    def _end(
        self,
        live: LiveEpisode,
        terminated: bool = False,
        truncated: Truncation = "",
        error: Exception | None = None,
    ) -> Trajectory:
        text = None
        if error is not None:
            text = f"{type(error).__name__}: {error}"
            told = None if isinstance(error, PzError) else error  # ours say what is needed
            _logger.warning("episode %s failed: %s", live.spec.key, text, exc_info=told)
        now = self._now()
        trajectory = live.trajectory(now, terminated=terminated, truncated=truncated, error=text)
        if live.told and isinstance(self._agent, EndsEpisodes):
            try:
                self._agent.end(trajectory)
            except InfraError:
                raise
            except Exception as problem:  # the agent's fault is this episode's alone
                _logger.warning("end() raised for %s", live.spec.key, exc_info=True)
                text = text or f"end() raised {type(problem).__name__}: {problem}"
                trajectory = live.trajectory(
                    now, terminated=terminated, truncated=truncated, error=text
                )
        return trajectory


def _as_action(answer: object) -> Action | Exception:
    """Return what the agent answered as an action, or why its episode fails."""
    if isinstance(answer, str):
        return Action(answer)
    if isinstance(answer, Exception):
        return answer
    if isinstance(answer, Action) and isinstance(answer.text, str):
        return answer
    return AgentError(f"act() must return Action or str; got {answer!r:.200}")


def _batched(
    call: Callable[[Sequence[_Item]], Sequence[_Answer]], items: Sequence[_Item]
) -> list[_Answer | Exception]:
    """Call with the whole batch or, when that raises, with each item alone; errors are answers."""
    if not items:
        return []
    try:
        answers = list(call(items))
    except InfraError:
        raise
    except Exception as error:  # an agent is foreign code: its fault is one episode's alone
        if len(items) == 1:
            return [error]
        return [answer for item in items for answer in _batched(call, [item])]
    if len(answers) != len(items):
        raise AgentError(
            f"act() was given {len(items)} turns and returned {len(answers)} actions; "
            "it must return one action a turn, in the turns' order"
        )
    return list(answers)
