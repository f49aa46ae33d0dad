"""The true simulator as a search model: snapshots of live environments in place of predictions.

Every node keeps its own snapshot, so a step is restore, step, snapshot; states that coincide are
not merged. The reward is the gain in score, which every family reports, whatever its own reward is.
An environment is left wherever the last step took it: whoever lends it restores it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pz_agents.errors import AgentError
from pz_agents.search.planner import Expansion, Leaves, Roots
from pz_envs.textenv import Info, TextEnv

Estimate = Literal["zero", "rollout"]


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    """A node: how to come back to it, and what can be done there."""

    saved: bytes
    commands: tuple[str, ...]
    score: float
    depth: int


class SimulatorModel:
    """Environments that can snapshot, one a root, as a ``SearchModel``.

    Args:
        envs: each at the state its tree begins from.
        nodes_per_tree: the planner's.
        generators: one an environment, for rollouts and random candidates.
        discount: a step's.
        depth: longest path of commands below a root; deeper nodes have no actions.
        estimate: a leaf's value: ``zero``, or the discounted score gain of one random ``rollout``.
        rollout_steps: longest rollout.
        candidates: how many random actions stand for the list of commands in families without one
            (Countdown's expressions); equal ones count once.

    Raises:
        AgentError: an environment cannot snapshot.
    """

    def __init__(
        self,
        envs: Sequence[TextEnv],
        *,
        nodes_per_tree: int,
        generators: Sequence[np.random.Generator],
        discount: float = 0.99,
        depth: int = 20,
        estimate: Estimate = "zero",
        rollout_steps: int = 8,
        candidates: int = 32,
    ) -> None:
        for env in envs:
            if not env.can_snapshot:
                raise AgentError(
                    f"{env.family} cannot snapshot, so its true simulator cannot be searched; "
                    "choose an environment that can, or a search over a world model"
                )
        self._envs = envs
        self._generators = generators
        self._discount = discount
        self._depth = depth
        self._rollout_steps = rollout_steps if estimate == "rollout" else 0
        self._candidates = candidates
        self._states: dict[int, _State] = {}
        for tree, env in enumerate(envs):
            saved = env.snapshot()
            _, info = env.restore(saved)
            self._states[tree * nodes_per_tree] = self._state(tree, saved, info, depth=0)
        self._per_tree = nodes_per_tree

    def commands(self, node: int) -> tuple[str, ...]:
        """Return a node's commands, in the order of its actions."""
        return self._states[node].commands

    def roots(self) -> Roots:
        """Return the roots, with uniform priors and value 0 or a rollout's."""
        values = [self._value(tree, tree * self._per_tree) for tree in range(len(self._envs))]
        sizes = [len(self.commands(tree * self._per_tree)) for tree in range(len(self._envs))]
        return Roots.join([np.full(size, 1.0 / max(size, 1)) for size in sizes], values)

    def step(self, leaves: Leaves) -> Expansion:
        """Play each leaf's command from its parent's snapshot."""
        rewards, discounts, values, counts = (np.zeros(len(leaves.tree)) for _ in range(4))
        handles = zip(*(column.tolist() for column in leaves), strict=True)
        for number, (tree, parent, action, node) in enumerate(handles):
            env, before = self._envs[tree], self._states[parent]
            env.restore(before.saved)
            _, _, terminated, _, info = env.step(_reply(env, before.commands[action]))
            rewards[number] = float(info["score"]) - before.score
            if terminated:
                continue
            discounts[number] = self._discount
            state = self._state(tree, env.snapshot(), info, before.depth + 1)
            self._states[node] = state
            values[number] = self._value(tree, node)
            counts[number] = len(state.commands)
        sizes = counts.astype(np.int64)
        return Expansion(rewards, discounts, values, np.zeros(int(sizes.sum())), sizes)

    def _state(self, tree: int, saved: bytes, info: Info, depth: int) -> _State:
        commands = self._commands(tree, info) if depth < self._depth else ()
        return _State(saved, commands, float(info["score"]), depth)

    def _commands(self, tree: int, info: Info) -> tuple[str, ...]:
        listed = info["admissible_commands"]
        if listed is not None:
            return tuple(listed)
        env, rng = self._envs[tree], self._generators[tree]
        drawn = [env.random_action(rng) for _ in range(self._candidates)]
        return tuple(dict.fromkeys(command for command in drawn if command is not None))

    def _value(self, tree: int, node: int) -> float:
        """Return the discounted score gain of one random rollout from where the env is now."""
        state, env, rng = self._states[node], self._envs[tree], self._generators[tree]
        if self._rollout_steps == 0:
            return 0.0
        env.restore(state.saved)
        value, weight, score = 0.0, 1.0, state.score
        commands = state.commands
        for _ in range(min(self._rollout_steps, self._depth - state.depth)):
            if not commands:
                break
            command = commands[int(rng.integers(len(commands)))]
            _, _, terminated, _, info = env.step(_reply(env, command))
            value += weight * (float(info["score"]) - score)
            weight, score = weight * self._discount, float(info["score"])
            commands = () if terminated else self._commands(tree, info)
        return value


def _reply(env: TextEnv, command: str) -> str:
    tag = env.reply_tag
    return command if env.reply_format == "auto" else f"<{tag}>{command}</{tag}>"
