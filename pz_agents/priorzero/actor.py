"""Chooses commands: many slots, one search over all of them, by what the world model imagines.

It keeps what happened in each slot and nothing else. While exploring, the root's policy gets
Dirichlet noise and a command is drawn from the visits; otherwise the most visited one is played and
nothing is random. The Gumbel rule brings its own noise and names its own command. A language
model's opinion, where there is one, is mixed into the root's policy before the noise, and nowhere
else; where it alone is to play, nothing is searched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from pz_agents.errors import AgentError
from pz_agents.priorzero.prior import LanguagePrior, Moment, Opinion
from pz_agents.priorzero.settings import UniZeroSettings
from pz_agents.sdk.types import Ids
from pz_agents.search.planner import Planner, Roots
from pz_agents.search.priors import add_noise, mix_prior, root_statistics, visit_policy
from pz_agents.search.tree import Floats
from pz_agents.worldmodel.imagination import Imagination
from pz_agents.worldmodel.network import WorldModel
from pz_agents.worldmodel.texts import Texts, state_text

Mode = Literal["wm", "both", "llm"]
"""Who plays: the search by the world model, with the prior, or the language model alone."""

_NO_COMMANDS = ("look",)


@dataclass(frozen=True, slots=True, eq=False)
class Position:
    """Where a slot is: the state's text and its commands, by number, and the one played before.

    ``before`` is None at the start of an episode; ``moment`` is the same place as a language model
    sees it, with the turns before it.
    """

    slot: int
    state: int
    commands: tuple[int, ...]
    before: int | None
    moment: Moment


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The command to play, its place in the position's list, and what the search said.

    policy: [A] what the world model's policy should become: shares of visits; nothing where
        nothing was searched.
    visits, prior: [A] of the search, the prior as it was searched with; empty likewise.
    prefix_ids: what the language model said its opinion behind; None where it was not asked or
        failed.
    """

    command: int
    place: int
    policy: Floats
    value: float
    visits: Floats = field(default_factory=lambda: np.zeros(0))
    prior: Floats = field(default_factory=lambda: np.zeros(0))
    statistics: Mapping[str, float] = field(default_factory=dict)
    prefix_ids: Ids | None = None


class Actor:
    """See the module.

    Args:
        model: the world model.
        texts: numbers the texts.
        settings: of the run.
        slots: episodes alive at once.
        explore: noise and sampling.
        commands: the commands, by number, that may be offered below a root from the beginning.
        prior: the language model's; None: the world model plays alone.
        alone: the language model plays alone.
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
        prior: LanguagePrior | None = None,
        alone: bool = False,
    ) -> None:
        search = settings.search
        if not explore:
            search = search.model_copy(update={"gumbel_scale": 0.0})
        self._texts, self._settings, self._explore = texts, settings, explore
        self._prior, self._alone = prior, alone
        # What each slot's episode was like so far, and its last observation with its score.
        self._past: list[list[tuple[str, str, float]]] = [[] for _ in range(slots)]
        self._last: list[tuple[str, float]] = [("", 0.0)] * slots
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
        moment = self._moment(slot, observation, info, commands, before)
        if self._settings.read_instruction:
            observation = f"{info['instruction']}\n{observation}"
        state = self._texts.intern(state_text(observation, commands))
        return Position(slot, state, tuple(map(self._texts.intern, commands)), before, moment)

    def _moment(
        self,
        slot: int,
        observation: str,
        info: Mapping[str, Any],
        commands: tuple[str, ...],
        before: int | None,
    ) -> Moment:
        """Note what came of the slot's last turn, and return what a language model sees now."""
        past, score = self._past[slot], float(info["score"])
        if before is None:
            past.clear()
        else:
            seen, earlier = self._last[slot]
            past.append((seen, self._texts.string(before), score - earlier))
        self._last[slot] = (observation, score)
        language = self._prior.settings.history if self._prior else 0
        return Moment(
            observation, info["instruction"], commands, tuple(past[max(len(past) - language, 0) :])
        )

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
        opinions = self._opinions(positions, streams)
        if self._alone:
            return [
                _said(position, opinion, stream)
                for position, opinion, stream in zip(positions, opinions, streams, strict=True)
            ]
        slots = [each.slot for each in positions]
        imagination = self.imagination
        imagination.forget([each.slot for each in positions if each.before is None])
        imagination.observe(
            slots, [each.state for each in positions], [each.before for each in positions]
        )
        lists = [each.commands for each in positions]
        roots, policies = imagination.roots(slots, lists)
        if self._prior is not None:
            policies = [
                mix_prior(policy, opinion.scores, self._settings.root)
                for policy, opinion in zip(policies, opinions, strict=True)
            ]
        gumbel = self._settings.search.rule == "gumbel"
        if self._explore and not gumbel:
            policies = [
                add_noise(policy, stream, self._settings.root)
                for policy, stream in zip(policies, streams, strict=True)
            ]
        result = self._planner.search(Roots.join(policies, roots.values), imagination, streams)
        choices = []
        for number, stream in enumerate(streams):
            at = result.at(number)
            visits = result.visits[at]
            place = int(result.chosen[number])
            if self._explore and not gumbel:
                shares = visit_policy(visits, self._settings.temperature)
                place = int(stream.choice(len(shares), p=shares))
            opinion = opinions[number]
            choices.append(
                Choice(
                    command=lists[number][place],
                    place=place,
                    policy=result.policy[at].copy(),
                    value=float(result.values[number]),
                    visits=visits.copy(),
                    prior=result.prior[at].copy(),
                    statistics={
                        **root_statistics(result.prior[at], visits),
                        **_of_opinion(opinion, visits),
                    },
                    prefix_ids=opinion.prefix_ids if opinion.scores is not None else None,
                )
            )
        return choices

    def _opinions(
        self, positions: Sequence[Position], streams: Sequence[np.random.Generator]
    ) -> list[Opinion]:
        """Ask the language model about all positions; opinions without scores where there is none.

        What it samples is seeded by each position's stream.
        """
        if self._prior is None:
            return [_SILENT] * len(positions)
        return self._prior.judge(
            [
                replace(position.moment, seed=int(stream.integers(2**31)))
                for position, stream in zip(positions, streams, strict=True)
            ]
        )


_SILENT = Opinion(None, np.empty(0, np.int32))


def _said(position: Position, opinion: Opinion, stream: np.random.Generator) -> Choice:
    """Return the language model's favourite; where it failed, any command."""
    count = len(position.commands)
    scores = opinion.scores
    place = int(stream.integers(count)) if scores is None else int(np.argmax(scores))
    return Choice(
        command=position.commands[place],
        place=place,
        policy=np.zeros(0),
        value=0.0,
        statistics=_of_opinion(opinion, None),
    )


def _of_opinion(opinion: Opinion, visits: Floats | None) -> dict[str, float]:
    """Return what a log wants to know of an opinion; nothing where none was asked for.

    ``llm_agreement`` is 1 where the language model's favourite is among the most visited.
    """
    told = {
        f"llm_{'success' if name == 'ok' else name}": value
        for name, value in opinion.statistics.items()
    }
    if opinion.scores is not None and visits is not None:
        told["llm_agreement"] = float(visits[int(np.argmax(opinion.scores))] == visits.max())
    return told
