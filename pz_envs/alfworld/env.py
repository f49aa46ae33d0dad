"""The ALFWorld environment: one household task an episode, in the words of the original.

Observations, admissible commands and the end are those of the reference engine (textworld 1.7.0
with alfworld 0.4.2), in which a golden file of transcripts holds it; the engine is ``native``.
Success means that the goal of the game's PDDL problem holds; nothing else scores. A command that is
not admissible answers "Nothing happens." and is an invalid step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from pz_envs.alfworld.games import Game, Record, Split, choose, load_games, open_game
from pz_envs.alfworld.native import Household
from pz_envs.errors import ConfigError, EnvError
from pz_envs.textenv import Outcome, ReplyFormat, TextEnv

NOTHING = "Nothing happens."
"""The game's answer to a command that is not admissible."""


class ALFWorldEnv(TextEnv):
    """A household task: go, open, take, clean, heat, cool, use, put.

    ``info["extra"]`` holds the game's name, task type, wording (``move X to Y`` or
    ``put X in/on Y``: the two published grammars), whether it knows ``help``, and the engine.

    Args:
        split: ``"train"`` (3,553 games), ``"valid_seen"`` (140) or ``"valid_unseen"`` (134).
        task_types: one of the six task types or several; None is all.
        source: an archive or folder of ``game.tw-pddl`` files in place of the published ones.
            ``reset(options={"index": i})`` picks a game by its place in the sorted list, else the
            seed does.
        admissible_commands: whether ``info`` lists the commands that do something now.
        reply_format: see ``TextEnv``.
        render_mode: see ``TextEnv``.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the games are missing or broken.
    """

    family: ClassVar[str] = "alfworld"
    can_snapshot: ClassVar[bool] = True

    def __init__(
        self,
        *,
        split: Split = "train",
        task_types: Sequence[str] | str | None = None,
        source: str | None = None,
        admissible_commands: bool = True,
        reply_format: ReplyFormat = "auto",
        render_mode: str | None = None,
    ) -> None:
        super().__init__(reply_format=reply_format, render_mode=render_mode)
        self._split = split
        self._games = load_games(split, source)
        self._chosen = choose(self._games.games, task_types)
        self._lists = admissible_commands
        self._game: Game | None = None
        self._record = Record("", "", "", ())
        self._household: Household | None = None
        self._followed: int | None = 0
        self._extra: dict[str, Any] = {}

    def __len__(self) -> int:
        """Return how many games there are to choose from."""
        return len(self._chosen)

    def expert_action(self) -> str | None:
        """Return the next command of the game's walkthrough.

        Off the walkthrough, the shortest rest of it that still wins is followed, commands that no
        longer apply left out; None when there is none.
        """
        if self._household is None or self._household.won:
            return None
        steps = self._record.walkthrough
        if self._followed is not None:
            return steps[self._followed] if self._followed < len(steps) else None
        for first in range(len(steps) - 1, -1, -1):
            trial = self._household.copy()
            done = [step for step in steps[first:] if trial.play(step) is not None]
            if trial.won:
                return done[0]
        return None

    def random_action(self, rng: np.random.Generator) -> str | None:
        """Return a random admissible command."""
        if self._household is None:
            return None
        commands = self._household.admissible()
        return commands[int(rng.integers(len(commands)))]

    def _start(self, seed: int, options: Mapping[str, Any]) -> Outcome:
        index = options.get("index")
        if index is None:
            index = seed % len(self._chosen)
        if not isinstance(index, int) or not 0 <= index < len(self._chosen):
            raise ConfigError(f"index={index!r}: allowed are 0 to {len(self._chosen) - 1}")
        household = self._open(self._chosen[index])
        self._followed = 0
        observation = household.begin()
        self._task_id = f"alfworld/{self._split}/{self._chosen[index].name}"
        self._max_score = 1.0
        self._instruction = household.world.task
        return self._outcome_of(household, observation)

    def _advance(self, command: str) -> Outcome:
        household = self._playing()
        answer = household.play(command)
        if answer is None:
            return self._outcome_of(household, NOTHING, valid=False)
        steps = self._record.walkthrough
        on_path = self._followed is not None and self._followed < len(steps)
        if on_path and self._followed is not None and command.strip() == steps[self._followed]:
            self._followed += 1
        else:
            self._followed = None
        return self._outcome_of(household, answer)

    def _save(self) -> bytes:
        name = "" if self._game is None else self._game.name
        state = [name, self._followed, self._playing().state()]
        return json.dumps(state, separators=(",", ":")).encode()

    def _load(self, engine: bytes, header: Mapping[str, Any]) -> None:
        name, followed, state = json.loads(engine)
        self._open(self._games.find(name)).set_state(state)
        self._followed = followed

    def _open(self, game: Game) -> Household:
        """Put the start of ``game`` on the table."""
        if self._household is not None and game == self._game:
            return self._household
        record, world = open_game(self._games, game)
        self._game, self._record = game, record
        self._household = Household(world)
        self._extra = {
            "game": game.name,
            "task_type": game.task_type,
            "wording": record.wording,
            "help": world.has_help,
            "engine": "native",
        }
        return self._household

    def _playing(self) -> Household:
        if self._household is None:
            raise EnvError("no ALFWorld episode has begun; call reset() first")
        return self._household

    def _outcome_of(self, household: Household, observation: str, valid: bool = True) -> Outcome:
        won = household.won
        return Outcome(
            observation,
            score=float(won),
            reward=float(won),
            terminated=won,
            success=won,
            valid=valid,
            admissible_commands=household.admissible() if self._lists else None,
            extra=self._extra,
        )
