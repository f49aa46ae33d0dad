"""Chooses commands: many slots, one search over all of them, by what the world model imagines.

It keeps what happened in each slot and nothing else. While exploring, the root's policy gets
Dirichlet noise and a command is drawn from the visits; otherwise the most visited one is played and
nothing is random. The Gumbel rule brings its own noise and names its own command.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pz_agents.errors import AgentError
from pz_agents.priorzero.settings import UniZeroSettings
from pz_agents.search.planner import Planner, Roots
from pz_agents.search.priors import add_noise, root_statistics, visit_policy
from pz_agents.search.tree import Floats
from pz_agents.worldmodel.imagination import Imagination
from pz_agents.worldmodel.network import WorldModel
from pz_agents.worldmodel.texts import Texts, state_text

_NO_COMMANDS = ("look",)


@dataclass(frozen=True, slots=True, eq=False)
class Position:
    """Where a slot is: the state's text and its commands, by number, and the one played before.

    ``before`` is None at the start of an episode.
    """

    slot: int
    state: int
    commands: tuple[int, ...]
    before: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The command to play, its place in the position's list, and what the search said.

    policy: [A] what the world model's policy should become: shares of visits.
    """

    command: int
    place: int
    policy: Floats
    value: float
    statistics: Mapping[str, float] = field(default_factory=dict)


class Actor:
    """See the module.

    Args:
        model: the world model.
        texts: numbers the texts.
        settings: of the run.
        slots: episodes alive at once.
        explore: noise and sampling.
        commands: the commands, by number, that may be offered below a root from the beginning.
    """

    def __init__(
        self,
        model: WorldModel,
        texts: Texts,
        settings: UniZeroSettings,
        *,
        slots: int,
        explore: bool,
        commands: Sequence[int] = (),
    ) -> None:
        search = settings.search
        if not explore:
            search = search.model_copy(update={"gumbel_scale": 0.0})
        self._texts, self._settings, self._explore = texts, settings, explore
        self._planner = Planner(search)
        self.imagination = Imagination(
            model,
            texts,
            slots=slots,
            nodes_per_tree=self._planner.nodes_per_tree,
            branching=settings.branching,
            discount=settings.learner.loss.discount,
        )
        self.imagination.learn_commands(commands)

    def position(
        self, slot: int, observation: str, info: Mapping[str, Any], before: int | None
    ) -> Position:
        """Return where a slot is, after the command ``before``.

        Raises:
            AgentError: the environment does not list its admissible commands.
        """
        listed = info["admissible_commands"]
        if listed is None:
            raise AgentError(
                "unizero chooses from a list of commands, and this environment names none in "
                "`admissible_commands`; play a family that does"
            )
        commands = tuple(dict.fromkeys(listed)) or _NO_COMMANDS
        if self._settings.read_instruction:
            observation = f"{info['instruction']}\n{observation}"
        state = self._texts.intern(state_text(observation, commands))
        return Position(slot, state, tuple(map(self._texts.intern, commands)), before)

    def choose(
        self, positions: Sequence[Position], streams: Sequence[np.random.Generator]
    ) -> list[Choice]:
        """Search from all positions at once.

        Args:
            positions: of distinct slots.
            streams: one a position.
        """
        if not positions:
            return []
        slots = [each.slot for each in positions]
        imagination = self.imagination
        imagination.forget([each.slot for each in positions if each.before is None])
        imagination.observe(
            slots, [each.state for each in positions], [each.before for each in positions]
        )
        lists = [each.commands for each in positions]
        roots, policies = imagination.roots(slots, lists)
        gumbel = self._settings.search.rule == "gumbel"
        if self._explore and not gumbel:
            priors = [
                add_noise(policy, stream, self._settings.root)
                for policy, stream in zip(policies, streams, strict=True)
            ]
            roots = Roots.join(priors, roots.values)
        result = self._planner.search(roots, imagination, streams)
        choices = []
        for number, stream in enumerate(streams):
            at = result.at(number)
            visits = result.visits[at]
            place = int(result.chosen[number])
            if self._explore and not gumbel:
                shares = visit_policy(visits, self._settings.temperature)
                place = int(stream.choice(len(shares), p=shares))
            choices.append(
                Choice(
                    command=lists[number][place],
                    place=place,
                    policy=result.policy[at].copy(),
                    value=float(result.values[number]),
                    statistics=root_statistics(result.prior[at], visits),
                )
            )
        return choices
