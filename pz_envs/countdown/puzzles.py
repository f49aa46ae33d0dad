"""Countdown puzzles of our own: solvable by construction, split by a hash of the puzzle.

A puzzle is drawn by joining its numbers with random operations and taking the result as the
target, so a solution exists. Train and test are disjoint for every setting of the knobs: which
side a puzzle is on depends on its sorted numbers and its target alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from pz_envs.countdown.expression import combine
from pz_envs.errors import ConfigError, did_you_mean
from pz_envs.seeding import derive_seed

Split = Literal["train", "test"]

_TEST_SHARE = 5  # one puzzle in five is a test puzzle
_ATTEMPTS = 20_000


@dataclass(frozen=True, slots=True)
class Puzzle:
    """Numbers in the order shown, and the target to make of them."""

    numbers: tuple[int, ...]
    target: int

    @property
    def id(self) -> str:
        """Name of the puzzle as shown, e.g. ``countdown/19-35-44=98``."""
        return f"countdown/{'-'.join(map(str, self.numbers))}={self.target}"


@dataclass(frozen=True, slots=True)
class Knobs:
    """What makes generated puzzles hard; the defaults have the ranges of Countdown-Tasks-3to4.

    numbers: how many numbers a puzzle may have, each count as likely as the next; 2 to 6.
    max_number: numbers are uniform in [1, max_number].
    min_target, max_target: the range of targets.
    operators: what the hidden solution is built from; an answer may use all four.
    """

    numbers: tuple[int, ...] = (3, 4)
    max_number: int = 99
    min_target: int = 10
    max_target: int = 100
    operators: str = "+-*/"

    def __post_init__(self) -> None:
        if not self.numbers or not all(2 <= count <= 6 for count in self.numbers):
            raise ConfigError(f"numbers={self.numbers}: each count must be 2 to 6, e.g. (3, 4)")
        if not 1 <= self.max_number <= 10_000:
            raise ConfigError(f"max_number={self.max_number}: allowed are 1 to 10000")
        if not 0 <= self.min_target <= self.max_target <= 1_000_000:
            raise ConfigError(
                f"min_target={self.min_target}, max_target={self.max_target}: "
                "needed is 0 <= min_target <= max_target <= 1000000"
            )
        if not self.operators or set(self.operators) - set("+-*/"):
            raise ConfigError(f"operators={self.operators!r}: allowed are some of '+-*/'")


def split_of(puzzle: Puzzle) -> Split:
    """Return the side that a puzzle is on; the order of its numbers does not matter."""
    key = derive_seed("countdown-split", *sorted(puzzle.numbers), puzzle.target)
    return "test" if key % _TEST_SHARE == 0 else "train"


def check_split(split: str) -> None:
    """Refuse anything but ``train`` and ``test``.

    Raises:
        ConfigError: ``split`` is something else.
    """
    if split not in ("train", "test"):
        raise ConfigError(
            f"No split {split!r}.{did_you_mean(split, ('train', 'test'))} Allowed: train, test"
        )


def generate(rng: np.random.Generator, split: Split, knobs: Knobs) -> Puzzle:
    """Draw a puzzle of ``split``.

    Raises:
        ConfigError: the knobs leave (next to) no puzzle.
    """
    for _ in range(_ATTEMPTS):
        count = knobs.numbers[int(rng.integers(len(knobs.numbers)))]
        numbers = tuple(int(n) for n in rng.integers(1, knobs.max_number + 1, count))
        target = _join_all(numbers, rng.random(3 * count), knobs.operators)
        if target is None or not knobs.min_target <= target <= knobs.max_target:
            continue
        puzzle = Puzzle(numbers, target)
        if split_of(puzzle) == split:
            return puzzle
    raise ConfigError(f"no {split} puzzle in {_ATTEMPTS} draws with {knobs}; widen the ranges")


def _join_all(numbers: tuple[int, ...], draws: np.ndarray, operators: str) -> int | None:
    """Return the whole number that random operations make of all numbers, or None."""
    pool: list[Fraction | None] = [Fraction(n) for n in numbers]
    choices = iter(draws.tolist())
    while len(pool) > 1:
        left = pool.pop(int(next(choices) * len(pool)))
        right = pool.pop(int(next(choices) * len(pool)))
        value = combine(left, operators[int(next(choices) * len(operators))], right)
        if value is None or value.denominator != 1:
            return None
        pool.append(value)
    (result,) = pool
    return None if result is None else result.numerator
