"""The admissible commands of a TextWorld game, kept beside it from the actions that it reports.

A game that traces its actions writes ``[taking the coin - succeeded]`` into its answers. TextWorld
finds the action of its logic that such a line means, applies it to the facts, and lists what can
be done then; this module calls TextWorld's own logic for each of these steps. Looking the action
up among the valid ones takes most of the time, so nothing is done when no action succeeded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pz_envs.errors import require

EVENT = re.compile(r"^\[([^\]\n]*)\]\n?", re.M)
"""A line that tracing adds to an answer."""

_SUCCEEDED = " - succeeded"
_EXTRA = "pz-envs[textworld]"


class Tracker:
    """The facts of one running game.

    Args:
        description: the content of the game's ``.json``.

    Raises:
        ConfigError: TextWorld is not installed.
        KeyError, ValueError, TypeError: the description is not one of TextWorld's.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        self._rules = require("textworld.generator.game", _EXTRA)
        self._game = self._rules.Game.deserialize(description)
        self._inform = require("textworld.generator.inform7", _EXTRA).Inform7Game(self._game)
        self.reset()

    def reset(self) -> None:
        """Go back to the game's beginning."""
        self._progression = self._rules.GameProgression(self._game, track_quests=False)
        self._commands: tuple[str, ...] | None = None

    def follow(self, answer: str) -> None:
        """Apply the actions that succeeded in an answer of the game."""
        for event in EVENT.findall(answer):
            name, said, _ = event.partition(_SUCCEEDED)
            if not said or "(" in name or ")" in name:  # a number in brackets: part of an action
                continue
            action = self._inform.detect_action(name, self._progression.valid_actions)
            if action is not None:
                self._progression.update(action)
                self._commands = None

    def commands(self) -> tuple[str, ...]:
        """Return what can be done now, sorted, without repeats."""
        if self._commands is None:
            valid = self._progression.valid_actions
            self._commands = tuple(sorted(set(self._inform.gen_commands_from_actions(valid))))
        return self._commands

    def save(self) -> list[Any]:
        """Return the facts as JSON data; equal facts give equal data."""
        facts = [fact.serialize() for fact in self._progression.state.facts]
        return sorted(facts, key=lambda fact: json.dumps(fact, sort_keys=True))

    def load(self, facts: list[Any]) -> None:
        """Go to a state of this game that ``save`` returned."""
        logic = require("textworld.logic", _EXTRA)
        progression, knowledge = self._progression, self._game.kb
        propositions = [logic.Proposition.deserialize(fact) for fact in facts]
        progression.state = logic.State(knowledge.logic, propositions)
        progression._valid_actions = list(
            progression.state.all_applicable_actions(
                knowledge.rules.values(), knowledge.types.constants_mapping
            )
        )
        self._commands = None
