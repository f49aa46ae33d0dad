"""The Sokoban environment: one step of the player a turn, until every box is on a target.

The score is the number of boxes on targets, success is the solved level. A step that changes
nothing (into a wall, or a box that cannot be pushed) and a reply that is no step are invalid.
Levels are our own by default, or Boxoban's, or those of a file. There is no way to lose but to
get stuck: ``info["extra"]["deadlock"]`` is True where that is certain (see ``deadlocks``).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pz_envs.errors import ConfigError, did_you_mean
from pz_envs.seeding import generator
from pz_envs.sokoban.deadlocks import is_deadlock, live_cells
from pz_envs.sokoban.generator import Knobs, generate
from pz_envs.sokoban.levels import (
    Difficulty,
    Level,
    Split,
    check_split,
    draw_rows,
    load_levels,
    parse_level,
)
from pz_envs.sokoban.solver import Boxes, solve
from pz_envs.textenv import Outcome, ReplyFormat, TextEnv

COMMANDS = ("up", "down", "left", "right")
"""The steps, as they are listed and as the expert says them."""

_COMMAND = re.compile(r"(?:(?:move|push|go|step)\s+)?(up|down|left|right|[udlr])[.!]?", re.I)
_STEP_PENALTY, _FINISHED = -0.1, 10.0
_RULES = (
    "You push boxes in a room: step against a box to push it one cell, if the cell behind it is "
    "free. You cannot pull, and cannot push two boxes at once. Bring every box onto a target. "
    "Answer up, down, left or right."
)
_LEGEND = " # is a wall, @ you, $ a box, . a target, * a box on a target, + you on a target."


class SokobanEnv(TextEnv):
    """A room in, a step out.

    A command is ``up``, ``down``, ``left`` or ``right``, or its first letter, in any case, after
    an optional ``move``, ``push``, ``go`` or ``step``; all of these mean the same step.

    Args:
        source: ``"generated"``, ``"boxoban"`` or the path of a file of levels.
            ``reset(options={"index": i})`` picks a level of a file, else the seed.
        split: ``"train"``, ``"valid"`` or ``"test"``; a file given by path is taken whole.
        difficulty: of Boxoban levels: ``"unfiltered"``, ``"medium"`` (no test) or ``"hard"``.
        view: ``"symbols"`` draws the room, ``"text"`` says in words where everything is.
        reward: ``"boxes"`` pays +1 for a box put on a target and -1 for one taken off;
            ``"gym-sokoban"`` also pays -0.1 a step and +10 for the last box.
        size: side of generated rooms, one number or smallest and largest.
        boxes: boxes in generated rooms, one number or fewest and most.
        min_pushes: pushes that a generated level needs at least.
        expert_limit: positions that the expert looks at before it gives up.
        admissible_commands: whether info lists the steps that change something.
        reply_format: see ``TextEnv``.
        render_mode: see ``TextEnv``.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the file of ``source`` is missing or broken.
    """

    family: ClassVar[str] = "sokoban"
    can_snapshot: ClassVar[bool] = True

    def __init__(
        self,
        *,
        source: str = "generated",
        split: Split = "train",
        difficulty: Difficulty = "unfiltered",
        view: Literal["symbols", "text"] = "symbols",
        reward: Literal["boxes", "gym-sokoban"] = "boxes",
        size: int | Sequence[int] = (6, 8),
        boxes: int | Sequence[int] = (1, 3),
        min_pushes: int = 3,
        expert_limit: int = 100_000,
        admissible_commands: bool = True,
        reply_format: ReplyFormat = "auto",
        render_mode: str | None = None,
    ) -> None:
        super().__init__(reply_format=reply_format, render_mode=render_mode)
        check_split(split)
        _check("view", view, ("symbols", "text"))
        _check("reward", reward, ("boxes", "gym-sokoban"))
        self._split: Split = split
        self._knobs = Knobs(_pair("size", size), _pair("boxes", boxes), min_pushes)
        self._levels = None if source == "generated" else load_levels(source, split, difficulty)
        self._in_words = view == "text"
        self._shaped = reward == "gym-sokoban"
        self._expert_limit = expert_limit
        self._listed = admissible_commands
        self._level = Level("", 0, 0, frozenset(), frozenset(), frozenset(), 0)
        self._player = 0
        self._boxes: Boxes = frozenset()
        self._pushes = 0
        self._plan: dict[tuple[int, Boxes], str | None] = {}

    def expert_action(self) -> str | None:
        """Return the next step of a solution with the fewest pushes.

        None when the episode is over, no solution is left, or ``expert_limit`` was reached.
        """
        if self._outcome is None or self._outcome.terminated:
            return None
        here = (self._player, self._boxes)
        if here not in self._plan:
            self._plan = self._planned()
        return self._plan[here]

    def _planned(self) -> dict[tuple[int, Boxes], str | None]:
        """Return the expert's step in every position on its way."""
        player, boxes = self._player, self._boxes
        plan: dict[tuple[int, Boxes], str | None] = {(player, boxes): None}
        for name in solve(self._level, player, boxes, limit=self._expert_limit).moves:
            plan[player, boxes] = name
            player, boxes = _moved(self._level, player, boxes, name) or (player, boxes)
        return plan

    def _start(self, seed: int, options: Mapping[str, Any]) -> Outcome:
        self._level = self._choose(seed, options)
        self._player, self._boxes, self._pushes = self._level.player, self._level.boxes, 0
        self._plan = {}
        self._task_id = f"sokoban/{self._level.name}"
        self._max_score = float(len(self._level.boxes))
        self._instruction = _RULES + ("" if self._in_words else _LEGEND)
        return self._outcome_of()

    def _advance(self, command: str) -> Outcome:
        match = _COMMAND.fullmatch(command) if len(command) <= 40 else None
        if match is None:
            allowed = ", ".join(COMMANDS)
            return self._invalid(f"{command[:40]!r} is no step; allowed are {allowed}.")
        letter = match[1][0].lower()
        name = next(name for name in COMMANDS if name[0] == letter)
        after = _moved(self._level, self._player, self._boxes, name)
        if after is None:
            return self._invalid(f"You cannot go {name}.")
        before = self._boxes
        self._player, self._boxes = after
        self._pushes += before != self._boxes
        gained = len(self._boxes & self._level.targets) - len(before & self._level.targets)
        reward = float(gained)
        if self._shaped:
            reward += _STEP_PENALTY + _FINISHED * (self._boxes == self._level.targets)
        return self._outcome_of(reward)

    def _unreadable(self, last: Outcome, complaint: str) -> Outcome:
        return self._invalid(complaint)

    def _invalid(self, complaint: str) -> Outcome:
        outcome = self._outcome_of(_STEP_PENALTY if self._shaped else 0.0)
        return replace(outcome, observation=f"{complaint}\n{outcome.observation}", valid=False)

    def _outcome_of(self, reward: float = 0.0) -> Outcome:
        level, boxes = self._level, self._boxes
        solved = boxes == level.targets
        commands = None
        if self._listed and not solved:
            commands = tuple(n for n in COMMANDS if _moved(level, self._player, boxes, n))
        view = _in_words if self._in_words else _in_symbols
        return Outcome(
            view(level, self._player, boxes) + ("\nSolved." if solved else ""),
            score=float(len(boxes & level.targets)),
            reward=reward,
            terminated=solved,
            success=solved,
            admissible_commands=commands,
            extra={
                "deadlock": is_deadlock(level, live_cells(level), boxes),
                "pushes": self._pushes,
            },
        )

    def _choose(self, seed: int, options: Mapping[str, Any]) -> Level:
        index = options.get("index")
        if self._levels is None:
            if index is not None:
                raise ConfigError(
                    f"options={{'index': {index!r}}} needs levels to choose from: make the "
                    "environment with source='boxoban' or a path; generated levels go by seed"
                )
            return _generated(seed, self._split, self._knobs)
        if index is None:
            index = seed % len(self._levels)
        if not 0 <= index < len(self._levels):
            raise ConfigError(f"index={index}: allowed are 0 to {len(self._levels) - 1}")
        return self._levels[index]

    def _save(self) -> bytes:
        level = self._level
        start = [level.name, level.rows]
        return json.dumps([start, self._player, sorted(self._boxes), self._pushes]).encode()

    def _load(self, engine: bytes, header: Mapping[str, Any]) -> None:
        (name, rows), self._player, boxes, self._pushes = json.loads(engine)
        self._level = _read_back(name, "\n".join(rows))
        self._boxes = frozenset(boxes)


@functools.lru_cache(maxsize=1024)
def _generated(seed: int, split: Split, knobs: Knobs) -> Level:
    """Return the level of a seed; groups of episodes begin with the same one many times."""
    return generate(generator("sokoban", seed), split, knobs)


@functools.lru_cache(maxsize=64)
def _read_back(name: str, text: str) -> Level:
    return parse_level(text, name)


def _moved(level: Level, player: int, boxes: Boxes, name: str) -> tuple[int, Boxes] | None:
    """Return player and boxes after a step, or None when it changes nothing."""
    match name:
        case "up":
            step = -level.width
        case "down":
            step = level.width
        case "left":
            step = -1
        case _:
            step = 1
    after = player + step
    if after in level.walls:
        return None
    if after not in boxes:
        return after, boxes
    beyond = after + step
    if beyond in level.walls or beyond in boxes:
        return None
    return after, boxes - {after} | {beyond}


def _in_symbols(level: Level, player: int, boxes: Boxes) -> str:
    return "\n".join(draw_rows(level, player, boxes))


def _in_words(level: Level, player: int, boxes: Boxes) -> str:
    """Say where everything is; rows and columns are counted from 1 at the top left."""
    row, column = level.place(player)
    walls = "; ".join(
        f"row {number}: {_runs([c + 1 for c, symbol in enumerate(line) if symbol == '#'])}"
        for number, line in enumerate(level.rows, start=1)
    )
    return (
        f"The room has {level.height} rows and {level.width} columns, counted from the top left. "
        f"You are at row {row}, column {column}. "
        f"Boxes on targets: {_places(level, boxes & level.targets)}. "
        f"Other boxes: {_places(level, boxes - level.targets)}. "
        f"Free targets: {_places(level, level.targets - boxes)}. "
        f"Columns with walls: {walls}."
    )


def _places(level: Level, cells: Boxes) -> str:
    places = (level.place(cell) for cell in sorted(cells))
    return ", ".join(f"row {row} column {column}" for row, column in places) or "none"


def _runs(numbers: Sequence[int]) -> str:
    """Write rising numbers as runs, e.g. ``1-3, 6``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise ConfigError(f"{name}={value!r}: needed is one number, or smallest and largest")
    return pair[0], pair[1]


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"{name}={value!r}.{did_you_mean(value, allowed)} Allowed: {', '.join(allowed)}"
        )
