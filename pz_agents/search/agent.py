"""``MctsAgent``: plays by searching the true simulator, the ceiling for searches that must predict.

It searches the episode's own environment, from a snapshot that is restored before it answers, and
draws from streams named by the turn's seed only, so an answer depends on no other turn. Nothing is
kept between turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pz_agents.config import parse_settings
from pz_agents.errors import AgentError
from pz_agents.sdk.types import Action, Turn
from pz_agents.search.planner import Planner, Roots, SearchSettings
from pz_agents.search.priors import PriorSettings, add_noise, root_statistics
from pz_agents.search.simulator import Estimate, SimulatorModel
from pz_envs.errors import ConfigError
from pz_envs.seeding import generator
from pz_envs.textenv import TextEnv

_NO_COMMANDS = "look"


class MctsAgent:
    """Monte Carlo tree search over environment snapshots, for scores.

    Args:
        simulations: steps of the simulator a turn (rollouts come on top).
        depth: longest path that is looked ahead.
        seconds: wall clock a turn, after which it answers with what it has.
        discount: of a step, below 1 so that an early gain is worth more than a late one.
        rule: see ``SearchSettings.rule``.
        estimate: value of a leaf: ``zero`` or a random ``rollout``.
        rollout_steps: longest rollout.
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
        depth: int = 20,
        seconds: float | None = 60.0,
        discount: float = 0.95,
        rule: Literal["puct", "lightzero", "gumbel"] = "puct",
        estimate: Estimate = "zero",
        rollout_steps: int = 8,
        noise_weight: float = 0.25,
        candidates: int = 32,
    ) -> None:
        for name, value in (("depth", depth), ("candidates", candidates)):
            if value < 1:
                raise ConfigError(f"mcts: {name} must be at least 1; got {value}")
        if not 0.0 < discount <= 1.0:
            raise ConfigError(f"mcts: discount must be above 0 and at most 1; got {discount}")
        if estimate not in ("zero", "rollout"):
            raise ConfigError(f"mcts: estimate is {estimate!r}; allowed: zero, rollout")
        self._settings = parse_settings(
            SearchSettings,
            {"simulations": simulations, "seconds": seconds, "rule": rule},
            "mcts",
        )
        self._noise = parse_settings(PriorSettings, {"noise_weight": noise_weight}, "mcts")
        self._planner = Planner(self._settings)
        self._depth = depth
        self._discount = discount
        self._estimate: Estimate = estimate
        self._rollout_steps = rollout_steps
        self._candidates = candidates

    def act(self, turns: Sequence[Turn]) -> list[Action]:
        """Return the searched command a turn; ``look`` where there is nothing to choose from.

        Raises:
            AgentError: a turn has no environment, or one that cannot snapshot.
        """
        return [self._answer(turn) for turn in turns]

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
            return self._search(env, turn.seed)
        finally:
            env.restore(found)

    def _search(self, env: TextEnv, seed: int) -> Action:
        streams = [generator(seed, "simulator")]
        model = SimulatorModel(
            [env],
            nodes_per_tree=self._planner.nodes_per_tree,
            generators=streams,
            discount=self._discount,
            depth=self._depth,
            estimate=self._estimate,
            rollout_steps=self._rollout_steps,
            candidates=self._candidates,
        )
        roots = model.roots()
        commands = model.commands(0)
        if not commands:
            return Action(_NO_COMMANDS, notes={"commands": 0})
        prior = add_noise(roots.prior, generator(seed, "noise"), self._noise)
        result = self._planner.search(
            Roots(prior, roots.counts, roots.values), model, [generator(seed, "search")]
        )
        chosen = int(result.chosen[0])
        notes: dict[str, Any] = {
            "commands": len(commands),
            "simulations": result.simulations,
            "value": float(result.values[0]),
            "q": float(result.q[chosen]),
            "visits": dict(zip(commands, map(int, result.visits), strict=False)),
            **root_statistics(prior, result.visits),
        }
        return Action(commands[chosen], notes=notes)
