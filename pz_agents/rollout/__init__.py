"""Rollouts: the episode loop, programs that plan episodes, and the experience store."""

from pz_agents.rollout.episode import EpisodeSpec, Limits
from pz_agents.rollout.loop import run_episodes
from pz_agents.rollout.programs import Program, RolloutContext, Task, single
from pz_agents.rollout.store import ExperienceStore, Lease

__all__ = [
    "EpisodeSpec",
    "ExperienceStore",
    "Lease",
    "Limits",
    "Program",
    "RolloutContext",
    "Task",
    "run_episodes",
    "single",
]
