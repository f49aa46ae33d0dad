"""The ALFWorld environment: one household task an episode, in the words of the original.

Observations, admissible commands and the end are those of the reference engine (textworld 1.7.0
with alfworld 0.4.2); golden transcripts and a differential test hold the native engine in them.
Success means that the goal of the game's PDDL problem holds; nothing else scores. A command that is
not admissible answers "Nothing happens." and is an invalid step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from pz_envs.alfworld.games import (
    GENERATED,
    Game,
    Opened,
    Split,
    choose,
    load_games,
    open_game,
)
from pz_envs.alfworld.household import with_original_texts
from pz_envs.alfworld.native import NOTHING, Household, Record
from pz_envs.alfworld.reference import ReferenceHousehold
from pz_envs.errors import ConfigError, EnvError
from pz_envs.textenv import Outcome, ReplyFormat, TextEnv

EngineName = Literal["native", "reference"]

_log = logging.getLogger(__name__)


class ALFWorldEnv(TextEnv):
    """A household task: go, open, take, clean, heat, cool, use, put.

    ``info["extra"]`` holds the game's name, task type, wording (``move X to Y`` or
    ``put X in/on Y``: the two published grammars), whether it knows ``help``, whether it was
    generated, the engine, and under ``not_covered`` why that is not the native one although it was
    asked for (None otherwise).

    Args:
        split: ``"train"`` (3,553 games), ``"valid_seen"`` (140) or ``"valid_unseen"`` (134);
            generated: 3,600, 150 and 150.
        task_types: one of the six task types or several; None is all.
        source: an archive or folder of ``game.tw-pddl`` files in place of the published ones, or
            ``"generated"``. ``reset(options={"index": i})`` picks a game by its place in the sorted
            list, else the seed does.
        engine: ``"native"``, or ``"reference"`` for TextWorld's PDDL engine in a child process. A
            file that the native engine does not cover is played on the reference anyway.
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
        engine: EngineName = "native",
        admissible_commands: bool = True,
        reply_format: ReplyFormat = "auto",
        render_mode: str | None = None,
    ) -> None:
        super().__init__(reply_format=reply_format, render_mode=render_mode)
        if engine not in get_args(EngineName):
            raise ConfigError(f"engine={engine!r}: allowed are {', '.join(get_args(EngineName))}")
        self._split = split
        self._games = load_games(split, source)
        self._chosen = choose(self._games.games, task_types)
        self._lists = admissible_commands
        self._engine: EngineName = engine
        self._game: Game | None = None
        self._record = Record("", "", "", ())
        self._playing: Household | ReferenceHousehold | None = None
        self._reference: ReferenceHousehold | None = None
        self._followed: int | None = 0
        self._extra: dict[str, Any] = {}

    def __len__(self) -> int:
        """Return how many games there are to choose from."""
        return len(self._chosen)

    def expert_action(self) -> str | None:
        """Return the next command of the game's walkthrough, off it that of a plan from here.

        None when the game is won, or can no longer be: a thing in hand that fits nowhere.
        """
        household = self._playing
        if household is None or household.won:
            return None
        if self._followed is not None:
            ahead = self._record.walkthrough[self._followed :]
            if ahead and ahead[0] in household.admissible():
                return ahead[0]
        plan = household.plan()
        return plan[0] if plan else None

    def close(self) -> None:
        """End the reference engine's process, if there is one."""
        if self._reference is not None:
            self._reference.close()
        super().close()

    def random_action(self, rng: np.random.Generator) -> str | None:
        """Return a random admissible command."""
        if self._playing is None:
            return None
        commands = self._playing.admissible()
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
        self._instruction = self._record.task
        self._extra["help"] = "help" in household.admissible()
        return self._outcome_of(household, observation)

    def _advance(self, command: str) -> Outcome:
        household = self._in_play()
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
        household = self._in_play()
        name = "" if self._game is None else self._game.name
        state = [name, self._extra["engine"], self._followed, household.state()]
        return json.dumps(state, separators=(",", ":")).encode()

    def _load(self, engine: bytes, header: Mapping[str, Any]) -> None:
        name, saved_by, followed, state = json.loads(engine)
        household = self._open(self._games.find(name))
        if saved_by != self._extra["engine"]:
            raise EnvError(
                f"this snapshot is of engine={saved_by!r}, the environment plays the game on "
                f"{self._extra['engine']!r}; restore it in an environment with the same engine"
            )
        household.set_state(state)
        self._extra["help"] = header["outcome"]["extra"]["help"]
        self._followed = followed

    def _open(self, game: Game) -> Household | ReferenceHousehold:
        """Put the start of ``game`` on the table."""
        if self._playing is not None and game == self._game:
            return self._playing
        opened = open_game(self._games, game)
        self._playing = self._choose_engine(opened)
        self._game, self._record = game, opened.record
        fell_back = opened.not_covered if self._engine == "native" else ""
        if fell_back:
            _log.warning("%s is played on the reference engine: %s", game.name, fell_back)
        self._extra = {
            "game": game.name,
            "task_type": game.task_type,
            "wording": opened.record.wording,
            "generated": self._games.source == GENERATED,
            "engine": "native" if isinstance(self._playing, Household) else "reference",
            "not_covered": fell_back or None,
        }
        return self._playing

    def _choose_engine(self, opened: Opened) -> Household | ReferenceHousehold:
        """Return the game on the native engine, or on this environment's one reference engine.

        Raises:
            ConfigError: the reference engine is needed and not installed.
        """
        if opened.world is not None and self._engine == "native":
            return Household(opened.world)
        if self._reference is None:
            try:
                self._reference = ReferenceHousehold()
            except ConfigError as error:
                why = opened.not_covered or "engine='reference'"
                raise ConfigError(f"{why}: {error}") from error
        record = opened.record
        self._reference.open(record if record.domain else with_original_texts(record))
        return self._reference

    def _in_play(self) -> Household | ReferenceHousehold:
        if self._playing is None:
            raise EnvError("no ALFWorld episode has begun; call reset() first")
        return self._playing

    def _outcome_of(
        self, household: Household | ReferenceHousehold, observation: str, valid: bool = True
    ) -> Outcome:
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
