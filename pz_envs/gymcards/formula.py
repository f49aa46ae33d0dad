"""Formulas of single symbols: their exact value, and how one can still be completed.

A formula is a tuple of symbols: whole numbers, ``+ - * / ( )``, and ``_`` where a symbol was
refused, which counts as a place but not for the value. Numbers side by side are no formula and
neither are ``* *`` and ``/ /``; a sign may stand before an operand. Values are fractions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

from pz_envs.countdown.expression import combine

BLANK = "_"
"""What a refused symbol leaves behind."""

_NEW_PAIRS = 2  # four operands never need more pairs of parentheses


class _Malformed(Exception):
    """The symbols are no formula."""


def value(formula: Sequence[str]) -> Fraction | None:
    """Return what a formula is worth; None when it is malformed or divides by zero."""
    reader = _Reader([symbol for symbol in formula if symbol != BLANK])
    try:
        result = reader.sum()
    except _Malformed:
        return None
    return result if reader.position == len(reader.symbols) else None


def completion(
    formula: tuple[str, ...], numbers: tuple[int, ...], target: int, room: int, operators: str
) -> tuple[str, ...] | None:
    """Return symbols that complete ``formula`` to the target, or None when nothing does.

    Exhaustive up to parentheses that change no value.

    Args:
        formula: what stands already.
        numbers: the numbers that are left; each has to be used once.
        target: what the whole must be worth.
        room: how many symbols may be added.
        operators: the symbols besides numbers that the game has; parentheses if it has ``(``.
    """
    shape = _shape(formula)
    if shape is None:
        return None
    joins = [symbol for symbol in operators if symbol not in "()"]
    pairs = _NEW_PAIRS if "(" in operators else 0
    endings = _endings(*shape, tuple(sorted(numbers)), room, joins, pairs)
    return next((ending for ending in endings if value(formula + ending) == target), None)


def _shape(formula: Sequence[str]) -> tuple[bool, int] | None:
    """Return whether an operand is due and how many parentheses are open; None if malformed."""
    operand_due, depth = True, 0
    for symbol in formula:
        if symbol == BLANK:
            continue
        if operand_due:
            if symbol in ("*", "/", ")"):
                return None
            depth += symbol == "("
            operand_due = symbol in ("(", "+", "-")
        elif symbol == ")":
            depth -= 1
            if depth < 0:
                return None
        elif symbol in ("+", "-", "*", "/"):
            operand_due = True
        else:
            return None
    return operand_due, depth


def _endings(
    operand_due: bool,
    depth: int,
    numbers: tuple[int, ...],
    room: int,
    joins: Sequence[str],
    pairs: int,
) -> Iterator[tuple[str, ...]]:
    """Yield every ending of the shape, plain ones first."""
    if not numbers and not operand_due:
        if depth <= room:
            yield (")",) * depth
        return
    if not numbers or room <= 0:
        return
    if operand_due:
        for number in dict.fromkeys(numbers):
            at = numbers.index(number)
            rest = numbers[:at] + numbers[at + 1 :]
            for ending in _endings(False, depth, rest, room - 1, joins, pairs):
                yield (str(number), *ending)
        if pairs and len(numbers) > 1:
            for ending in _endings(True, depth + 1, numbers, room - 1, joins, pairs - 1):
                yield ("(", *ending)
        return
    for join in joins:
        for ending in _endings(True, depth, numbers, room - 1, joins, pairs):
            yield (join, *ending)
    if depth:
        for ending in _endings(False, depth - 1, numbers, room - 1, joins, pairs):
            yield (")", *ending)


class _Reader:
    """Recursive descent; None is a division by zero."""

    def __init__(self, symbols: list[str]) -> None:
        self.symbols = symbols
        self.position = 0

    def sum(self) -> Fraction | None:
        result = self.product()
        while (operator := self._next_of("+-")) is not None:
            result = combine(result, operator, self.product())
        return result

    def product(self) -> Fraction | None:
        result = self.operand()
        while (operator := self._next_of("*/")) is not None:
            result = combine(result, operator, self.operand())
        return result

    def operand(self) -> Fraction | None:
        sign = 1
        while (mark := self._next_of("+-")) is not None:
            sign = -sign if mark == "-" else sign
        if self._next_of("(") is None:
            if self.position == len(self.symbols) or not self.symbols[self.position].isdigit():
                raise _Malformed
            self.position += 1
            return Fraction(sign * int(self.symbols[self.position - 1]))
        inside = self.sum()
        if self._next_of(")") is None:
            raise _Malformed
        return None if inside is None else sign * inside

    def _next_of(self, wanted: str) -> str | None:
        if self.position < len(self.symbols) and self.symbols[self.position] in wanted:
            self.position += 1
            return self.symbols[self.position - 1]
        return None
