"""The agents that need no language model: a random player and the environment's own expert.

Their place in a table is the floor and the ceiling that every other agent is read against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pz_agents.errors import AgentError
from pz_agents.sdk.types import Action, Turn
from pz_envs.seeding import generator

_VERBS = ("look", "inventory", "wait", "north", "south", "east", "west", "up", "down")


class RandomAgent:
    """Plays uniformly at random, each turn from the stream named by ``turn.seed``.

    It chooses among ``info["admissible_commands"]``; where there are none it asks the environment
    for a ``random_action`` (Countdown: a random legal expression), and where that gives none it
    takes one of a few verbs that text games know.
    """

    needs_admissible_commands: ClassVar[bool] = True

    def act(self, turns: Sequence[Turn]) -> list[Action]:
        """Return a random action a turn."""
        return [Action(self._choose(turn)) for turn in turns]

    def _choose(self, turn: Turn) -> str:
        rng = generator(turn.seed)
        commands = turn.info["admissible_commands"]
        if not commands:
            env = turn.episode.env
            action = None if env is None else env.random_action(rng)
            if action is not None:
                return action
            commands = _VERBS
        return str(commands[int(rng.integers(len(commands)))])


class ExpertAgent:
    """Plays what the environment's expert says (a walkthrough, a solver).

    Where the expert has nothing to say in the middle of an episode, because the game left its path,
    the reply is empty: every environment counts that as invalid and leaves its engine alone,
    so that the episode ends at the limit on invalid actions, with the score it has.
    """

    reset_options: ClassVar[Mapping[str, Any]] = {"expert": True}

    def act(self, turns: Sequence[Turn]) -> list[Action]:
        """Return the expert's action a turn.

        Raises:
            AgentError: the environment has no expert.
        """
        return [self._ask(turn) for turn in turns]

    def _ask(self, turn: Turn) -> Action:
        env = turn.episode.env
        action = None if env is None else env.expert_action()
        if action is None and turn.index == 0:
            raise AgentError(
                f"{turn.episode.env_id} (seed {turn.episode.env_seed}) has no expert; "
                "choose another agent, or another environment"
            )
        return Action(action or "", notes={"off_path": action is None})
