"""Rollout programs: from tasks to the episodes an algorithm learns from.

A program knows no environment and no model; it decides which episodes are played for each task,
under which keys and in which groups, and yields them as they end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pz_agents.config import Settings
from pz_agents.rollout.episode import EpisodeSpec, Limits
from pz_agents.rollout.loop import run_episodes
from pz_agents.rollout.slots import MakeEnv
from pz_agents.sdk.protocols import Agent
from pz_agents.sdk.types import Trajectory
from pz_envs.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Task:
    """One instance to play; ``group_id`` is unique within a run and names the group's rollouts."""

    env_id: str
    env_seed: int
    group_id: str


@dataclass(frozen=True, slots=True)
class RolloutContext:
    """What every program needs; the fields mean what they mean in ``run_episodes``.

    ``group_size`` is the number of rollouts a task. ``options`` are the algorithm's own, for
    programs that have any.
    """

    agent: Agent
    make_env: MakeEnv
    limits: Limits
    seed: int
    concurrency: int = 16
    group_size: int = 8
    options: Settings | None = None


Program = Callable[[RolloutContext, Sequence[Task]], Iterator[Trajectory]]


def single(context: RolloutContext, tasks: Sequence[Task]) -> Iterator[Trajectory]:
    """Play ``group_size`` independent episodes of each task; keys are ``group_id/attempt``.

    Raises:
        ConfigError: ``group_size`` is below 1, or two tasks share a ``group_id``.
    """
    if context.group_size < 1:
        raise ConfigError(f"group_size must be at least 1; got {context.group_size}")
    specs = (
        EpisodeSpec(
            key=f"{task.group_id}/{attempt}",
            env_id=task.env_id,
            env_seed=task.env_seed,
            group_id=task.group_id,
            attempt=attempt,
        )
        for task in tasks
        for attempt in range(context.group_size)
    )
    return run_episodes(
        context.agent,
        specs,
        make_env=context.make_env,
        limits=context.limits,
        seed=context.seed,
        concurrency=context.concurrency,
    )
