"""NumberLine: walk from the current number to the target, one step at a time.

Rules of RL4VLM's gym_cards: +1 and the end at the target, -1 for a move that does not come closer,
else 0, and an end after ``2 * max_position`` moves. Its reset may put both numbers together, which
its own documentation rules out: here they always differ. A reply that is no move counts as a
move that does not come closer; the original plays a random one instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pz_envs.errors import ConfigError
from pz_envs.gymcards.picture import picture
from pz_envs.gymcards.saving import pack, unpack
from pz_envs.seeding import generator
from pz_envs.textenv import Info, Outcome, ReplyFormat, TextEnv

_MOVES = {"-": -1, "+": 1}
_SAME = str.maketrans("−–－＋", "---+")


class NumberLineEnv(TextEnv):
    """Two numbers in, ``-`` or ``+`` out; score 1 and success when the target is reached.

    ``valid`` is False for anything but a move, and for a move that the end of the line stops.

    Args:
        max_position: the numbers are 0 to this; an episode has at most twice as many moves.
        admissible_commands: whether info lists the moves that go somewhere.
        image: whether ``info["extra"]["image"]`` holds a picture, [240, 320, 3] uint8 RGB.
        reply_format: see ``TextEnv``.
        render_mode: see ``TextEnv``.

    Raises:
        ConfigError: an argument is out of range.
    """

    family: ClassVar[str] = "gymcards"
    can_snapshot: ClassVar[bool] = True

    def __init__(
        self,
        *,
        max_position: int = 5,
        admissible_commands: bool = True,
        image: bool = False,
        reply_format: ReplyFormat = "auto",
        render_mode: str | None = None,
    ) -> None:
        super().__init__(reply_format=reply_format, render_mode=render_mode)
        if not 1 <= max_position <= 1000:
            raise ConfigError(f"max_position={max_position}: allowed are 1 to 1000")
        self._last = max_position
        self._listed = admissible_commands
        self._image = image
        self._target = 0
        self._current = 0
        self._moves = 0

    def expert_action(self) -> str | None:
        """Return the move towards the target; None when the episode is over."""
        if self._outcome is None or self._outcome.terminated:
            return None
        return "-" if self._current > self._target else "+"

    def _start(self, seed: int, options: Mapping[str, Any]) -> Outcome:
        rng = generator("numberline", seed)
        self._current = int(rng.integers(0, self._last + 1))
        self._target = int(rng.integers(0, self._last))
        self._target += self._target >= self._current
        self._moves = 0
        self._task_id = f"numberline/{self._last}:{self._current}-{self._target}"
        self._max_score = 1.0
        self._instruction = (
            f"Move the current number to the target on a line from 0 to {self._last}. "
            "Answer - to go down by one or + to go up by one. "
            f"There are {2 * self._last} moves."
        )
        return self._outcome_of("")

    def _advance(self, command: str) -> Outcome:
        move = _MOVES.get(command.translate(_SAME).strip("'\"` "))
        if move is None:
            return self._move(0, f"{command[:40]!r} is no move; allowed are - and +. ")
        return self._move(move, "")

    def _unreadable(self, last: Outcome, complaint: str) -> Outcome:
        return self._move(0, f"{complaint} ")

    def _move(self, move: int, complaint: str) -> Outcome:
        self._moves += 1
        before, was = abs(self._current - self._target), self._current
        self._current = min(max(was + move, 0), self._last)
        after = abs(self._current - self._target)
        reward = 1.0 if after == 0 else -1.0 if after >= before else 0.0
        return self._outcome_of(complaint, reward=reward, valid=self._current != was)

    def _outcome_of(self, complaint: str, *, reward: float = 0.0, valid: bool = True) -> Outcome:
        reached = self._current == self._target
        cut = not reached and self._moves >= 2 * self._last
        ending = " Reached." if reached else " No moves are left." if cut else ""
        commands = tuple(
            name for name, move in _MOVES.items() if 0 <= self._current + move <= self._last
        )
        return Outcome(
            f"{complaint}Target: {self._target}. Current: {self._current}.{ending}",
            score=float(reached),
            reward=reward,
            terminated=reached or cut,
            success=reached,
            valid=valid,
            admissible_commands=commands if self._listed else None,
            extra={"target": self._target, "current": self._current, "cut": cut},
        )

    def _info(self, outcome: Outcome, *, format_error: bool) -> Info:
        info = super()._info(outcome, format_error=format_error)
        if self._image:
            rows = (f"TARGET {self._target}", f"CURRENT {self._current}")
            info["extra"]["image"] = picture(rows)
        return info

    def _save(self) -> bytes:
        return pack(f"numberline to {self._last}", self._target, self._current, self._moves)

    def _load(self, engine: bytes, header: Mapping[str, Any]) -> None:
        self._target, self._current, self._moves = unpack(engine, f"numberline to {self._last}")
