"""``TextWorldEnv``: TextWorld's cooking, treasure and coin games, or a story file by path.

A seed decides the game and nothing else: it picks one of ``games`` games of the split, which is
made on first use (seconds, in a process of its own) and kept in the cache. By default the
interpreter runs in a child process, since it is native code; ``isolated=False`` runs it in this
process. The score is the game's own counter, success that the game declares the end as won.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pz_envs.errors import ConfigError, InfraError
from pz_envs.textenv import Outcome, ReplyFormat, TextEnv
from pz_envs.textworld.engine import Beginning, Engine, Report
from pz_envs.textworld.games import (
    SKILLS,
    Challenge,
    Options,
    Split,
    check_games,
    pair,
    prepare,
    read_story,
    textworld_version,
)
from pz_envs.workers import Worker

_ENGINE = "pz_envs.textworld.engine:Engine"
_INDEX = struct.Struct("<Q")
_LOADING_S = 60.0

_INSTRUCTION = """\
You are playing a text adventure made by TextWorld. Each turn you read what happens and reply with \
one command for the game.
Commands are short and imperative: look, inventory, go north, examine cookbook, open fridge, take \
coin, take apple from counter, unlock door with key, put plate on table, insert apple into fridge\
{more}.
{objective}The most you can score is {max_score}.
Put the command into <action> tags, for example <action>go north</action>."""
_COOKING = (
    ", drop knife, cook potato with oven, slice potato with knife (or chop, dice), prepare meal, "
    "eat meal"
)


class TextWorldEnv(TextEnv):
    """A game of TextWorld.

    ``reward`` is the change of the score in this step. The episode ends when the game is won or
    lost. ``valid`` is False when the input rules refused the command or the game took no turn for
    it (not understood, a question back, or a command about the game such as ``score``).
    ``info["extra"]["engine_restarts"]`` counts the engines that were lost.

    Args:
        challenge: ``"cooking"``, ``"treasure"``, ``"coin"``, or ``"mixed"``: each in turn.
        game: path of a ``.z8`` file made by TextWorld, its ``.json`` beside it for admissible
            commands and the expert; ``challenge`` and all that shapes generated games is unused.
        split: ``"train"``, ``"valid"`` or ``"test"``, disjoint sets of games.
        games: how many games the set has; ``reset(options={"index": i})`` picks one.
        level: of treasure and coin games, see ``games.Options``; one number, or lowest and highest.
        recipe: ingredients of cooking games, one number, or fewest and most.
        rooms: of cooking games.
        skills: of cooking games.
        route: tell the whole way in the opening text of treasure and coin games.
        admissible_commands: list in info what can be done; a step takes up to 1.6 times as long.
        isolated: run the engine in a child process.
        timeout_s: seconds for one step; only when isolated can a hung engine be stopped.
        reply_format: see ``TextEnv``.
        render_mode: see ``TextEnv``.

    Raises:
        ConfigError: an argument is out of range, or TextWorld is not installed.
        DataError: the file of ``game`` is missing, damaged, or of another kind.
        EnvError: it is a Glulx file.
    """

    family: ClassVar[str] = "textworld"
    can_snapshot: ClassVar[bool] = True

    def __init__(
        self,
        challenge: Challenge = "mixed",
        *,
        game: Path | str | None = None,
        split: Split = "train",
        games: int = 100,
        level: int | Sequence[int] | None = None,
        recipe: int | Sequence[int] = (1, 3),
        rooms: int = 6,
        skills: Sequence[str] = SKILLS[:4],
        route: bool = False,
        admissible_commands: bool = False,
        isolated: bool = True,
        timeout_s: float = 30.0,
        reply_format: ReplyFormat = "auto",
        render_mode: str | None = None,
    ) -> None:
        super().__init__(reply_format=reply_format, render_mode=render_mode)
        textworld_version()
        self._set = Options(
            challenge,
            split,
            None if level is None else pair("level", level),
            pair("recipe", recipe),
            rooms,
            tuple(skills),
            route,
        )
        check_games(games)
        self._games = games
        self._story = None if game is None else Path(game).expanduser().absolute()
        if self._story is not None:
            read_story(self._story)
        self._index = 0
        self._expert: str | None = None
        self._extra: dict[str, Any] = {"engine_restarts": 0}
        self._worker: Worker | None = None
        self._engine: Engine | None = None
        if isolated:
            self._worker = Worker(_ENGINE, {"commands": admissible_commands}, timeout_s=timeout_s)
        else:
            self._engine = Engine(commands=admissible_commands)

    def expert_action(self) -> str | None:
        """Return the walkthrough's next command while the episode has followed it.

        Every generated game is won by it. None once the episode has left it, and for a file
        without a walkthrough.
        """
        return None if self._outcome is None else self._expert

    def close(self) -> None:
        """End the engine; ``reset`` starts another."""
        self._outcome = None
        if self._worker is not None:
            self._worker.close()
        super().close()

    def _start(self, seed: int, options: Mapping[str, Any]) -> Outcome:
        self._outcome = None  # when this fails there is no episode
        index = options.get("index", seed % self._games)
        if not 0 <= index < self._games:
            raise ConfigError(f"index={index}: allowed are 0 to {self._games - 1}")
        self._index = index
        beginning = Beginning(*self._call("start", str(self._path(index))))
        self._max_score = float(beginning.max_score)
        objective = " ".join(beginning.objective.split())
        self._instruction = _INSTRUCTION.format(
            more=_COOKING if "meal" in objective else "",
            objective=f"{objective}\n" if objective else "",
            max_score=beginning.max_score,
        )
        return self._outcome_of(Report(*beginning.report), 0.0)

    def _path(self, index: int) -> Path:
        """Return the file of a game, made now if need be, and name the task after it."""
        if self._story is not None:
            self._task_id = f"textworld/{self._story.stem}"
            return self._story
        path = prepare(self._set.spec(index))
        self._task_id = f"textworld/{path.stem}"
        return path

    def _advance(self, command: str) -> Outcome:
        assert self._outcome is not None
        if self._engine is not None:
            report = self._engine.step(command)
        else:
            report = Report(*self._call("step", command))
        return self._outcome_of(report, self._outcome.score)

    def _save(self) -> bytes:
        state: bytes = self._call("save")
        return _INDEX.pack(self._index) + state

    def _load(self, engine: bytes, header: Mapping[str, Any]) -> None:
        (index,) = _INDEX.unpack_from(engine)
        path = self._path(index)
        self._expert = Report(*self._call("load", str(path), engine[_INDEX.size :])).expert
        self._index = index

    def _call(self, method: str, *arguments: Any) -> Any:
        if self._worker is None:
            return getattr(self._engine, method)(*arguments)
        try:
            # The first game that lists commands brings TextWorld with it, which takes seconds.
            slow = 0 if method in ("step", "save") else _LOADING_S
            return self._worker.call(method, *arguments, timeout_s=self._worker.timeout_s + slow)
        except InfraError:
            self._outcome = None  # the episode died with its engine: only reset() can go on
            raise
        finally:
            self._extra["engine_restarts"] = self._worker.restarts

    def _outcome_of(self, report: Report, before: float) -> Outcome:
        text, score, over, won, accepted, self._expert, commands = report
        return Outcome(
            text,
            float(score),
            score - before,
            over,
            won,
            accepted,
            None if commands is None else tuple(commands),
            self._extra,
        )
