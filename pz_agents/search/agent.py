"""``MctsAgent``: plays by searching the true simulator, the ceiling for searches that must predict.

It searches the episode's own environment, from a snapshot that is restored before it answers.
What was found below the command that it played is kept until the episode ends, if the game is where
that was found, to the byte; so a plan, once found, is followed unless a better one turns up. Random
streams are named by the turn's seed: an answer depends on its own episode's turns only.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, ClassVar

from pz_agents.config import parse_settings
from pz_agents.errors import AgentError
from pz_agents.sdk.types import Action, Trajectory, Turn
from pz_agents.search.planner import Planner, Roots, SearchSettings
from pz_agents.search.priors import PriorSettings, add_noise, root_notes, root_statistics
from pz_agents.search.simulator import SimulatorModel, State
from pz_envs.errors import ConfigError
from pz_envs.seeding import generator
from pz_envs.textenv import TextEnv

_NO_COMMANDS = "look"
_MOST_DESCENTS = 100_000
_BREADTH = 8.0
"""Weight of the uniform prior (``SearchSettings.c_init``): what gains is known once it was found,
so most steps look for what else there is."""


class MctsAgent:
    """Monte Carlo tree search over environment snapshots, for scores.

    It plays the first command of the path with the greatest discounted gain in score, and among
    equals, such as all that neither gain nor lose, the most visited.

    Args:
        simulations: steps of the simulator a turn; descents through what is remembered are free.
        depth: longest path that is looked ahead.
        seconds: wall clock a turn, after which it answers with what it has.
        discount: of a step, below 1 so that an early gain is worth more than a late one.
        noise_weight: share of Dirichlet noise in the root's uniform prior; it decides, in place of
            the list's order, what is played while nothing within reach scores.
        candidates: random actions a state in families that list no commands.

    Raises:
        ConfigError: an argument is out of range.
    """

    needs_admissible_commands: ClassVar[bool] = True

    def __init__(
        self,
        *,
        simulations: int = 50,
        depth: int = 60,
        seconds: float | None = 60.0,
        discount: float = 0.95,
        noise_weight: float = 0.25,
        candidates: int = 32,
    ) -> None:
        for name, value in (("depth", depth), ("candidates", candidates)):
            if value < 1:
                raise ConfigError(f"mcts: {name} must be at least 1; got {value}")
        if not 0.0 < discount <= 1.0:
            raise ConfigError(f"mcts: discount must be above 0 and at most 1; got {discount}")
        self._settings = parse_settings(
            SearchSettings,
            {"simulations": simulations, "seconds": seconds, "c_init": _BREADTH},
            "mcts",
        )
        self._noise = parse_settings(PriorSettings, {"noise_weight": noise_weight}, "mcts")
        self._depth = depth
        self._discount = discount
        self._candidates = candidates
        self._roots: dict[str, State] = {}

    def act(self, turns: Sequence[Turn]) -> list[Action]:
        """Return the searched command a turn; ``look`` where there is nothing to choose from.

        Raises:
            AgentError: a turn has no environment, or one that cannot snapshot.
        """
        return [self._answer(turn) for turn in turns]

    def end(self, trajectory: Trajectory) -> None:
        """Forget the episode."""
        self._roots.pop(trajectory.key, None)

    def _answer(self, turn: Turn) -> Action:
        env = turn.episode.env
        if env is None:
            raise AgentError(
                f"mcts searches the live environment, and episode {turn.episode.key!r} has none; "
                "play it with run_episodes"
            )
        if not env.can_snapshot:
            raise AgentError(f"mcts cannot search {turn.episode.env_id}: it cannot snapshot")
        found = env.snapshot()
        try:
            return self._search(env, turn, found)
        finally:
            env.restore(found)

    def _search(self, env: TextEnv, turn: Turn, found: bytes) -> Action:
        before = self._roots.pop(turn.episode.key, None)
        following = () if before is None else before.following.values()
        model = SimulatorModel(
            env,
            generator(turn.seed, "simulator"),
            steps=self._settings.simulations,
            discount=self._discount,
            depth=self._depth,
            candidates=self._candidates,
            root=next((state for state in following if state.saved == found), None),
        )
        root = self._roots[turn.episode.key] = model.root
        if not root.commands:
            return Action(_NO_COMMANDS, notes={"commands": 0})
        roots = model.roots()
        prior = add_noise(roots.prior, generator(turn.seed, "noise"), self._noise)
        # What is remembered was found by as many simulations a turn, and each descent adds a state.
        descents = min(self._settings.simulations * (turn.index + 1), _MOST_DESCENTS)
        planner = Planner(self._settings.model_copy(update={"simulations": descents}))
        result = planner.search(Roots(prior, roots.counts, roots.values), model)
        ranks = zip(root.gains(self._discount), result.visits, result.q, prior, strict=True)
        chosen = max(enumerate(ranks), key=operator.itemgetter(1))[0]
        notes: dict[str, Any] = {
            "commands": len(root.commands),
            "simulations": model.taken,
            "gain": root.worth,
            "value": float(result.values[0]),
            "q": float(result.q[chosen]),
            **root_notes(root.commands, result.visits, prior),
            **root_statistics(prior, result.visits),
        }
        return Action(root.commands[chosen], notes=notes)
