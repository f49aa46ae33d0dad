"""The agent SDK: what an agent sees, says and is, how it is loaded and how it is checked."""

from pz_agents.sdk.check import check_agent
from pz_agents.sdk.loading import BUILT_IN, agent_names, load_agent, needs_model
from pz_agents.sdk.protocols import (
    Agent,
    AgentFunction,
    EndsEpisodes,
    Learner,
    PlaysEpisodes,
    StartsEpisodes,
)
from pz_agents.sdk.types import Action, Episode, Sample, Step, Trajectory, Turn

__all__ = [
    "BUILT_IN",
    "Action",
    "Agent",
    "AgentFunction",
    "EndsEpisodes",
    "Episode",
    "Learner",
    "PlaysEpisodes",
    "Sample",
    "StartsEpisodes",
    "Step",
    "Trajectory",
    "Turn",
    "agent_names",
    "check_agent",
    "load_agent",
    "needs_model",
]
