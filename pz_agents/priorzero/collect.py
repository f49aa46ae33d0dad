"""Plays many episodes at once: all slots step, all are waited for, one search answers them all.

Slots move together, so what is searched in one batch, and with it every number, does not depend on
how quick an environment is. An episode whose environment breaks, or does not answer in time, is
reported as failed; its slot gets a new environment and the others go on.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from pz_agents.priorzero.actor import Actor, Choice, Position
from pz_agents.rollout.slots import EnvSlot, Finished, MakeEnv
from pz_agents.sdk.types import Ids
from pz_agents.worldmodel.replay import Segment
from pz_agents.worldmodel.texts import Texts
from pz_envs.errors import ConfigError, DataError
from pz_envs.seeding import generator

_CLOSE_SECONDS = 5.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Task:
    """An episode to play: ``key`` names its random streams, ``env_seed`` decides the instance."""

    key: str
    env_seed: int


@dataclass(frozen=True, slots=True, eq=False)
class Played:
    """What came of a task; a failed one has a reason in ``error`` and nothing else.

    reward: the gain in score over the episode.
    statistics: means over its turns of what the searches said.
    instruction: the task's rules.
    env_seed: of the task.
    prefixes: what the language model said its opinions behind, a turn each; None where it did not.
    """

    segment: Segment | None = None
    instruction: str = ""
    env_seed: int = 0
    prefixes: tuple[Ids | None, ...] = ()
    reward: float = 0.0
    score_norm: float = 0.0
    success: bool = False
    statistics: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def failed_priors(self) -> int:
        """How many turns the language model was asked about and gave no opinion on."""
        if self.segment is None or "llm_success" not in self.statistics:
            return 0
        return round((1.0 - self.statistics["llm_success"]) * len(self.segment.actions))


@dataclass(slots=True, eq=False)
class _Live:
    """An episode that is being played."""

    task: Task
    place: int
    position: Position | None = None
    choice: Choice | None = None
    score: float = 0.0
    positions: list[Position] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


class Playground:
    """Live environments in slots; kept between calls of ``play``.

    Args:
        env_id: what is played.
        make_env: makes an environment.
        slots: episodes at once.
        seconds: an operation of an environment that takes longer is a failure.
    """

    def __init__(
        self, env_id: str, make_env: MakeEnv, *, slots: int, seconds: float = 600.0
    ) -> None:
        self._env_id, self._make_env, self._seconds = env_id, make_env, seconds
        self._outbox: SimpleQueue[Finished] = SimpleQueue()
        self._slots = [EnvSlot(make_env, self._outbox) for _ in range(slots)]

    def close(self) -> None:
        """Close all environments."""
        for slot in self._slots:
            slot.retire()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for slot in self._slots:
            slot.join(deadline - time.monotonic())

    def play(
        self, actor: Actor, texts: Texts, tasks: Sequence[Task], *, max_turns: int, seed: int
    ) -> list[Played]:
        """Play each task once; the answers are in the tasks' order.

        Args:
            actor: chooses; has as many slots.
            texts: the actor's.
            tasks: what to play.
            max_turns: an episode of so many turns is cut off.
            seed: of the random streams, with each task's key and turn.

        Raises:
            AgentError: the environment does not list commands.
            ConfigError: the environment cannot be made as it is asked for.
            DataError: its data are missing.
        """
        played: list[Played] = [Played() for _ in tasks]
        waiting = deque(enumerate(tasks))
        live: dict[int, _Live] = {}
        while waiting or live:
            for number, slot in enumerate(self._slots):
                if number not in live and waiting:
                    place, task = waiting.popleft()
                    live[number] = _Live(task, place)
                    slot.begin(self._env_id, task.env_seed, None)
            answers = self._gather(live)
            for number in sorted(live):
                episode = live[number]
                over = self._take(actor, number, episode, answers[number], max_turns)
                if over is not None:
                    played[episode.place] = over
                    del live[number]
            ready = [each for _, each in sorted(live.items()) if each.position is not None]
            if not ready:
                continue
            positions = [each.position for each in ready if each.position is not None]
            streams = [generator(seed, each.task.key, len(each.choices)) for each in ready]
            choices = actor.choose(positions, streams)
            for each, position, choice in zip(ready, positions, choices, strict=True):
                each.choice = choice
                self._slots[position.slot].step(texts.string(choice.command))
        return played

    def _gather(self, live: Mapping[int, _Live]) -> dict[int, Finished | None]:
        """Wait for every live slot; None where there was no answer in time."""
        numbers = {id(self._slots[number]): number for number in live}
        answers: dict[int, Finished | None] = {}
        deadline = time.monotonic() + self._seconds
        while len(answers) < len(live):
            try:
                finished = self._outbox.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                break
            number = numbers.get(id(finished.slot))
            if number is not None:
                answers[number] = finished
        for number in live.keys() - answers.keys():
            # A thread cannot be killed: it is left alone and another slot takes its place.
            self._slots[number].retire()
            self._slots[number] = EnvSlot(self._make_env, self._outbox)
            answers[number] = None
        return answers

    def _take(
        self, actor: Actor, number: int, live: _Live, answer: Finished | None, max_turns: int
    ) -> Played | None:
        """Note what came of the last turn; returns the episode when it is over."""
        if answer is None or answer.error is not None:
            error = answer.error if answer else TimeoutError(f"no answer in {self._seconds:g} s")
            if isinstance(error, ConfigError | DataError):
                raise error
            _logger.warning("episode %s failed: %s", live.task.key, error)
            return Played(error=f"{type(error).__name__}: {error}")
        if live.position is None or live.choice is None:
            observation, info, _ = answer.value
            live.score = info["score"]
            live.position = actor.position(number, observation, info, None)
            return None
        observation, _, terminated, _, info = answer.value
        live.positions.append(live.position)
        live.choices.append(live.choice)
        live.rewards.append(float(info["score"] - live.score))
        live.score = info["score"]
        final = terminated and info["admissible_commands"] is None
        shown = {**info, "admissible_commands": ()} if final else info
        live.position = actor.position(number, observation, shown, live.choice.command)
        if not terminated and len(live.choices) < max_turns:
            return None
        return _finish(live, live.position.state, info, terminated)


def _finish(live: _Live, last: int, info: Mapping[str, Any], terminated: bool) -> Played:
    names = {name for each in live.choices for name in each.statistics}
    found = {
        name: [each.statistics[name] for each in live.choices if name in each.statistics]
        for name in sorted(names)
    }
    segment = Segment(
        observations=(*(each.state for each in live.positions), last),
        actions=tuple(each.command for each in live.choices),
        rewards=tuple(live.rewards),
        lists=tuple(each.commands for each in live.positions),
        visits=tuple(each.policy for each in live.choices),
        terminated=terminated,
    )
    return Played(
        segment=segment,
        instruction=live.positions[0].moment.instruction,
        env_seed=live.task.env_seed,
        prefixes=tuple(each.prefix_ids for each in live.choices),
        reward=sum(live.rewards),
        score_norm=info["score_norm"],
        success=info["success"],
        statistics={name: sum(values) / len(values) for name, values in found.items()},
    )


def figures_of(played: Sequence[Played]) -> dict[str, float]:
    """Return what is logged of a collection; means are over whole episodes."""
    whole = [each for each in played if each.segment is not None]
    rewards = [each.reward for each in whole]
    lengths = [float(len(each.segment.actions)) for each in whole if each.segment is not None]
    names = sorted({name for each in whole for name in each.statistics})
    figures = {
        f"collector_iter/{name}_mean": mean(
            [each.statistics[name] for each in whole if name in each.statistics]
        )
        for name in names
    }
    return figures | {
        "reward": mean(rewards),
        "success": mean([float(each.success) for each in whole]),
        "collector_iter/reward_mean": mean(rewards),
        "collector_iter/reward_max": max(rewards, default=0.0),
        "collector_iter/episode_length_mean": mean(lengths),
        "collector_iter/failed": float(len(played) - len(whole)),
    }


def mean(values: Sequence[float]) -> float:
    """Return the mean; 0 of nothing."""
    return math.fsum(values) / len(values) if values else 0.0
