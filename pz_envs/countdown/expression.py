r"""Read an arithmetic expression exactly: our own parser and fractions, never Python's ``eval``.

Grammar: whole numbers, ``+ - * /`` with the usual precedence, parentheses. Also read as the four
operators: ``× · ÷ − –``, their full-width forms and LaTeX's ``\times \cdot \div``. There is no
unary sign, no power, no decimal point and no implied multiplication.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_LENGTH = 300
"""Characters that an expression may have; longer ones are refused unread."""

MAX_DEPTH = 20
"""Parentheses that may be open at once."""

_SAME = str.maketrans("×·⋅∗＊÷／−–－＋（）＝０１２３４５６７８９", "****" + "*//---+()=0123456789")
_LATEX = {"\\times": "*", "\\cdot": "*", "\\div": "/", "\\left": "", "\\right": ""}
_TOKEN = re.compile(r"\s*(?:([0-9]{1,9}(?![0-9]))|([-+*/()]))")


class ExpressionError(ValueError):
    """The text is no expression; the message says where reading stopped."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A read expression: its exact value (None after a division by zero) and its numbers."""

    value: Fraction | None
    numbers: tuple[int, ...]


def parse_expression(text: str, target: int | None = None) -> Expression:
    """Read and evaluate ``text``.

    With a ``target``, a suffix ``= target`` is tolerated; any other ``=`` is an error.

    Raises:
        ExpressionError: ``text`` is not an expression of the grammar, or is too long or deep.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"it is {len(text)} characters long; {MAX_LENGTH} are allowed")
    plain = text.translate(_SAME)
    for name, operator in _LATEX.items():
        plain = plain.replace(name, operator)
    body, equals, suffix = plain.partition("=")
    if equals and (target is None or suffix.strip() != str(target)):
        raise ExpressionError("after `=` only the target itself may stand")
    reader = _Reader(_tokens(body))
    value = reader.sum(0)
    if reader.position < len(reader.tokens):
        raise ExpressionError(f"unexpected `{reader.tokens[reader.position]}`")
    numbers = tuple(int(token) for token in reader.tokens if token.isdigit())
    return Expression(value, numbers)


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    position = 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            rest = text[position:].lstrip()
            raise ExpressionError(f"unexpected {rest[:12]!a}")
        tokens.append(match[1] or match[2])
        position = match.end()
    return tokens


class _Reader:
    """Recursive descent over tokens; a value of None means that a division by zero happened."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0

    def sum(self, depth: int) -> Fraction | None:
        value = self.product(depth)
        while (operator := self._next_of("+-")) is not None:
            value = combine(value, operator, self.product(depth))
        return value

    def product(self, depth: int) -> Fraction | None:
        value = self.atom(depth)
        while (operator := self._next_of("*/")) is not None:
            value = combine(value, operator, self.atom(depth))
        return value

    def atom(self, depth: int) -> Fraction | None:
        if self.position == len(self.tokens):
            raise ExpressionError("it ends where a number should follow")
        token = self.tokens[self.position]
        self.position += 1
        if token.isdigit():
            return Fraction(int(token))
        if token != "(":
            raise ExpressionError(f"`{token}` where a number or `(` should be")
        if depth == MAX_DEPTH:
            raise ExpressionError(f"more than {MAX_DEPTH} parentheses are open at once")
        value = self.sum(depth + 1)
        if self._next_of(")") is None:
            raise ExpressionError("a parenthesis is not closed")
        return value

    def _next_of(self, wanted: str) -> str | None:
        if self.position < len(self.tokens) and self.tokens[self.position] in wanted:
            self.position += 1
            return self.tokens[self.position - 1]
        return None


def combine(left: Fraction | None, operator: str, right: Fraction | None) -> Fraction | None:
    """Return ``left operator right``; None for a division by zero or when either side is None."""
    if left is None or right is None:
        return None
    match operator:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case _:
            return left / right if right else None
