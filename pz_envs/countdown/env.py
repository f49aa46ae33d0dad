"""The Countdown environment: one puzzle an episode, one or several tries.

The answer is an expression (see ``expression``). Success means that it uses every number exactly
once and equals the target exactly, in rational arithmetic; nothing else scores. A reply that
cannot be read, a malformed expression and a division by zero are wrong answers and use up a try.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np

from pz_envs.countdown.expression import ExpressionError, parse_expression
from pz_envs.countdown.puzzles import Knobs, Puzzle, Split, check_split, generate
from pz_envs.countdown.solver import solve
from pz_envs.countdown.tasks import load_tasks
from pz_envs.errors import ConfigError
from pz_envs.seeding import generator
from pz_envs.textenv import Outcome, ReplyFormat, TextEnv

_INSTRUCTION = (
    "Write an arithmetic expression that equals the target. Use every given number exactly once; "
    "combine them with + - * / and parentheses. No other numbers, no minus sign before a number. "
    "Put the expression alone between <answer> and </answer>."
)


class CountdownEnv(TextEnv):
    """Numbers and a target in, an expression out.

    The observation is terse (``Numbers: 19 35 44. Target: 98.``); the rules are in
    ``info["instruction"]``.

    Args:
        split: ``"train"`` or ``"test"``; generated puzzles of the two never coincide.
        numbers: how many numbers a generated puzzle has: one count, or several to choose from.
        max_number: generated numbers are 1 to this.
        min_target: smallest target of generated puzzles.
        max_target: largest target of generated puzzles.
        operators: what hidden solutions are built from; fewer make easier puzzles.
        tries: answers an episode allows; after a wrong one the observation says what was wrong.
        format_reward: paid once an episode for the first well-formed expression that came in a
            reply, right or wrong; added to the reward, never to the score.
        source: ``"generated"``, ``"tasks"`` (the published Countdown-Tasks rows of ``split``) or
            the path of a JSONL file. ``reset(options={"index": i})`` picks a row, else the seed.
        admissible_commands: accepted for uniformity; there is no list of commands.
        reply_format: see ``TextEnv``.
        render_mode: see ``TextEnv``.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the file of ``source`` is missing or broken.
    """

    family: ClassVar[str] = "countdown"
    reply_tag: ClassVar[str] = "answer"
    can_snapshot: ClassVar[bool] = True

    def __init__(
        self,
        *,
        split: Split = "train",
        numbers: int | Sequence[int] = (3, 4),
        max_number: int = 99,
        min_target: int = 10,
        max_target: int = 100,
        operators: str = "+-*/",
        tries: int = 1,
        format_reward: float = 0.0,
        source: str = "generated",
        admissible_commands: bool = True,
        reply_format: ReplyFormat = "auto",
        render_mode: str | None = None,
    ) -> None:
        super().__init__(reply_format=reply_format, render_mode=render_mode)
        check_split(split)
        if not 1 <= tries <= 100:
            raise ConfigError(f"tries={tries}: allowed are 1 to 100")
        counts = (numbers,) if isinstance(numbers, int) else tuple(numbers)
        self._split: Split = split
        self._knobs = Knobs(counts, max_number, min_target, max_target, operators)
        self._tries = tries
        self._format_reward = format_reward
        self._tasks = None if source == "generated" else load_tasks(str(source), split)
        self._puzzle = Puzzle((), 0)
        self._used = 0
        self._format_paid = False

    def expert_action(self) -> str | None:
        """Return the exhaustive solver's expression; None when there is none or all is over."""
        if self._outcome is None or self._outcome.terminated:
            return None
        return solve(self._puzzle.numbers, self._puzzle.target)

    def random_action(self, rng: np.random.Generator) -> str | None:
        """Return a random expression that uses every number once."""
        parts = [str(number) for number in self._puzzle.numbers]
        while len(parts) > 1:
            left = parts.pop(int(rng.integers(len(parts))))
            right = parts.pop(int(rng.integers(len(parts))))
            parts.append(f"({left}{'+-*/'[int(rng.integers(4))]}{right})")
        return parts[0].removeprefix("(").removesuffix(")") if parts else None

    def _start(self, seed: int, options: Mapping[str, Any]) -> Outcome:
        self._puzzle = self._choose(seed, options)
        self._used = 0
        self._format_paid = False
        self._task_id = self._puzzle.id
        self._max_score = 1.0
        self._instruction = _INSTRUCTION
        if self._tries > 1:
            self._instruction += f" You have {self._tries} tries."
        return Outcome(observation=self._statement(), score=0.0)

    def _advance(self, command: str) -> Outcome:
        puzzle = self._puzzle
        try:
            expression = parse_expression(command, puzzle.target)
        except ExpressionError as error:
            return self._wrong(f"Not a valid expression: {error}.", valid=False)
        reward = 0.0 if self._format_paid else self._format_reward
        self._format_paid = True
        if sorted(expression.numbers) != sorted(puzzle.numbers):
            used = " ".join(map(str, expression.numbers))
            return self._wrong(f"It uses {used}.", valid=False, reward=reward)
        if expression.value is None:
            return self._wrong("It divides by zero.", valid=False, reward=reward)
        if expression.value != puzzle.target:
            return self._wrong(f"It equals {_shown(expression.value)}.", reward=reward)
        self._used += 1
        return Outcome("Correct.", score=1.0, reward=1.0 + reward, terminated=True, success=True)

    def _unreadable(self, last: Outcome, complaint: str) -> Outcome:
        return self._wrong(complaint, valid=False)

    def _save(self) -> bytes:
        state = [self._puzzle.numbers, self._puzzle.target, self._used, self._format_paid]
        return json.dumps(state).encode()

    def _load(self, engine: bytes, header: Mapping[str, Any]) -> None:
        numbers, target, self._used, self._format_paid = json.loads(engine)
        self._puzzle = Puzzle(tuple(numbers), target)

    def _choose(self, seed: int, options: Mapping[str, Any]) -> Puzzle:
        index = options.get("index")
        if self._tasks is None:
            if index is not None:
                raise ConfigError(
                    f"options={{'index': {index!r}}} needs rows to choose from: make the "
                    "environment with source='tasks' or a path; generated puzzles go by seed"
                )
            return generate(generator("countdown", seed), self._split, self._knobs)
        if index is None:
            index = seed % len(self._tasks)
        if not 0 <= index < len(self._tasks):
            raise ConfigError(f"index={index}: allowed are 0 to {len(self._tasks) - 1}")
        return self._tasks[index]

    def _wrong(self, complaint: str, *, valid: bool = True, reward: float = 0.0) -> Outcome:
        self._used += 1
        left = self._tries - self._used
        outcome = Outcome(complaint, score=0.0, reward=reward, valid=valid, terminated=left == 0)
        if left == 0:
            return outcome
        again = f"{complaint} {self._statement()} Tries left: {left}."
        return replace(outcome, observation=again)

    def _statement(self) -> str:
        numbers = " ".join(map(str, self._puzzle.numbers))
        return f"Numbers: {numbers}. Target: {self._puzzle.target}."


def _shown(value: Fraction) -> str:
    text = str(value)
    return text if len(text) <= 40 else "a very long number"
