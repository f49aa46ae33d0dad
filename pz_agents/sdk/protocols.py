"""What an agent is. Only ``act`` is required; the rest are capabilities that are looked up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pz_agents.sdk.types import Action, Episode, Trajectory, Turn


@runtime_checkable
class Agent(Protocol):
    """Plays: one action for each turn, batched over live episodes, in the turns' order.

    Optional class attributes:
        needs_admissible_commands: True asks for environments that list them in ``info``.
        reset_options: options for ``env.reset`` (the expert uses ``{"expert": True}``).
    """

    def act(self, turns: Sequence[Turn]) -> Sequence[Action | str]:
        """Return one action a turn; a plain string is an action without a sample."""
        ...


@runtime_checkable
class StartsEpisodes(Protocol):
    """Capability: told when episodes begin."""

    def start(self, episodes: Sequence[Episode]) -> None:
        """Prepare for ``episodes``."""
        ...


@runtime_checkable
class EndsEpisodes(Protocol):
    """Capability: told when an episode is over."""

    def end(self, trajectory: Trajectory) -> None:
        """Forget the episode with ``trajectory.key``."""
        ...


@runtime_checkable
class Learner(Protocol):
    """Capability: learns from finished episodes and can be saved."""

    def update(self, trajectories: Sequence[Trajectory]) -> Mapping[str, float]:
        """Learn from ``trajectories``; returns metrics."""
        ...

    def save(self, folder: Path) -> None:
        """Write everything needed to go on."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from ``save``."""
        ...


AgentFunction = Callable[[str, Mapping[str, Any]], str]
"""The simplest agent: ``agent(observation, info) -> reply``."""
