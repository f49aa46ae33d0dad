"""The true simulator as a search model: snapshots of a live environment in place of predictions.

What a step led to is remembered and never taken again, neither in this search nor, where the next
one begins at a state found by this one, in that. A state that reads like one on a path as short
(the same text and score) is closed: circles and idle commands take up no steps. The reward is the
gain in score, which every family reports, whatever its own reward is. An environment is left
wherever the last step took it: whoever lends it restores it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np

from pz_agents.errors import AgentError
from pz_agents.search.planner import Expansion, Leaves, Roots
from pz_envs.textenv import Info, TextEnv

NOVELTY = 0.01
"""The worth of a state that is not closed, far below any gain in score: it leads on where nothing
that is known scores, and away from endings and circles, which are worth 0."""


@dataclass(slots=True, eq=False)
class State:
    """A state that the simulator was in, and what its commands are known to lead to.

    saved: the snapshot; empty where the episode ended.
    reading: what it reads like, its text and score.
    commands: none where the episode ended.
    reward: of the step that led to it.
    worth: the greatest of ``gains``; what happened comes again, since an environment that
        snapshots repeats itself exactly.
    following: what was found by playing a command, by its place in ``commands``.
    """

    saved: bytes
    reading: tuple[str, float]
    commands: tuple[str, ...]
    ended: bool = False
    reward: float = 0.0
    worth: float = 0.0
    following: dict[int, Self] = field(default_factory=dict)

    def gains(self, discount: float) -> list[float]:
        """Return, a command, the best discounted gain in score known behind it; 0 if unknown."""
        known = (self.following.get(action) for action in range(len(self.commands)))
        return [0.0 if each is None else each.reward + discount * each.worth for each in known]


class SimulatorModel:
    """An environment that can snapshot, as a ``SearchModel`` of one tree.

    Args:
        env: at the state where the tree begins, unless ``root`` is given.
        generator: for random candidates.
        steps: of the simulator, after which the search is over; None for as many as it takes.
        discount: a step's.
        depth: longest path of commands below the root; deeper states are closed.
        candidates: how many random actions stand for the list of commands in families without one
            (Countdown's expressions); equal ones count once.
        root: where to begin, with what is known of it.

    Raises:
        AgentError: the environment cannot snapshot.
    """

    def __init__(
        self,
        env: TextEnv,
        generator: np.random.Generator,
        *,
        steps: int | None = None,
        discount: float = 0.99,
        depth: int = 20,
        candidates: int = 32,
        root: State | None = None,
    ) -> None:
        if not env.can_snapshot:
            raise AgentError(
                f"{env.family} cannot snapshot, so its true simulator cannot be searched; "
                "choose an environment that can, or a search over a world model"
            )
        self._env = env
        self._generator = generator
        self._steps = steps
        self._discount = discount
        self._depth = depth
        self._candidates = candidates
        if root is None:
            saved = env.snapshot()
            text, info = env.restore(saved)
            root = State(saved, (text, float(info["score"])), self._commands(info))
        self.root = root
        self.taken = 0
        """Steps of the simulator so far."""
        self._states = {0: root}
        self._above = {0: 0}
        self._depths = {0: 0}
        self._read = {root.reading: 0}

    def roots(self) -> Roots:
        """Return the root, with a uniform prior and what it is known to be worth."""
        count = len(self.root.commands)
        return Roots.join([np.full(count, 1.0 / max(count, 1))], [self.root.worth])

    def step(self, leaves: Leaves) -> Expansion | None:
        """Say where a command leads, by playing it if that is not known; None when steps are up."""
        _, parent, action, node = (int(column[0]) for column in leaves)
        before = self._states[parent]
        found = before.following.get(action)
        if found is None:
            if self.taken == self._steps:
                return None
            found = self._play(before, action)
            before.following[action] = found
        self._states[node], self._above[node] = found, parent
        self._depths[node] = self._depths[parent] + 1
        self._appraise(node)
        count, value = -1, 0.0
        if self._leads_on(node):
            count, value = len(found.commands), NOVELTY + found.worth
        return Expansion(
            np.array([found.reward]),
            np.array([0.0 if found.ended else self._discount]),
            np.array([value]),
            np.zeros(max(count, 0)),
            np.array([count]),
        )

    def _play(self, before: State, action: int) -> State:
        env = self._env
        env.restore(before.saved)
        text, _, ended, _, info = env.step(_reply(env, before.commands[action]))
        self.taken += 1
        score = float(info["score"])
        gain = score - before.reading[1]
        if ended:
            return State(b"", (text, score), (), ended, gain)
        return State(env.snapshot(), (text, score), self._commands(info), ended, gain)

    def _appraise(self, node: int) -> None:
        """Let the states above a new one know what it changes in their worth."""
        while node:
            node = self._above[node]
            state = self._states[node]
            worth = max(state.gains(self._discount))
            if worth == state.worth:
                break
            state.worth = worth

    def _leads_on(self, node: int) -> bool:
        """Whether to search below a state: one with commands, read on no path as short."""
        state, depth = self._states[node], self._depths[node]
        if not state.commands or depth >= self._depth:
            return False
        if self._read.get(state.reading, depth + 1) <= depth:
            return False
        self._read[state.reading] = depth
        return True

    def _commands(self, info: Info) -> tuple[str, ...]:
        listed = info["admissible_commands"]
        if listed is not None:
            return tuple(listed)
        drawn = [self._env.random_action(self._generator) for _ in range(self._candidates)]
        return tuple(dict.fromkeys(command for command in drawn if command is not None))


def _reply(env: TextEnv, command: str) -> str:
    tag = env.reply_tag
    return command if env.reply_format == "auto" else f"<{tag}>{command}</{tag}>"
