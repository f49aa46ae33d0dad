"""What an agent is. Only ``act`` is required; the rest are capabilities that are looked up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pz_agents.sdk.types import Action, Episode, Trajectory, Turn

if TYPE_CHECKING:
    from pz_agents.rollout.episode import EpisodeSpec, Limits
    from pz_agents.rollout.slots import MakeEnv


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
class PlaysEpisodes(Protocol):
    """Capability: plays whole episodes its own way, several attempts at one instance for example.

    ``run_episodes`` hands over to it and yields what it yields: one trajectory a spec, in which
    all steps and tokens that it took are counted.
    """

    def play_episodes(
        self,
        specs: Iterable[EpisodeSpec],
        *,
        make_env: MakeEnv,
        limits: Limits,
        seed: int,
        concurrency: int,
    ) -> Iterator[Trajectory]:
        """Yield each episode as it ends; the arguments are those of ``run_episodes``."""
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
