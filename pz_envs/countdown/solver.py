"""Find an expression that makes the target, by trying everything.

Values are integer pairs (numerator, denominator), an order of magnitude quicker than
``fractions.Fraction``. The order of the search is fixed and puts ``+`` and ``-`` first, so the
same puzzle always has the same solution, and a plain one where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "": 3}


class _Term(NamedTuple):
    """A value with the text that makes it and that text's outermost operator."""

    top: int
    bottom: int
    text: str
    operator: str


def solve(numbers: Sequence[int], target: int) -> str | None:
    """Return an expression over all ``numbers``, each used once, equal to ``target``, or None.

    Exhaustive: None means that there is none. Up to four numbers take milliseconds.
    """
    ordered = sorted(numbers, reverse=True)
    found = _search(tuple(_Term(n, 1, str(n), "") for n in ordered), target, set())
    return None if found is None else found.text


def _search(
    terms: tuple[_Term, ...], target: int, seen: set[tuple[tuple[int, int], ...]]
) -> _Term | None:
    if len(terms) == 1:
        return terms[0] if terms[0].top == target * terms[0].bottom else None
    key = tuple(sorted((term.top, term.bottom) for term in terms))
    if key in seen:
        return None
    seen.add(key)
    for i, left in enumerate(terms):
        for j in range(i + 1, len(terms)):
            rest = terms[:i] + terms[i + 1 : j] + terms[j + 1 :]
            for joined in _joins(left, terms[j]):
                found = _search((joined, *rest), target, seen)
                if found is not None:
                    return found
    return None


def _joins(a: _Term, b: _Term) -> Iterator[_Term]:
    """Yield the up to six results of one operation on two values."""
    cross_a, cross_b = a.top * b.bottom, b.top * a.bottom
    bottom = a.bottom * b.bottom
    yield _joined(a, "+", b, cross_a + cross_b, bottom)
    yield _joined(a, "-", b, cross_a - cross_b, bottom)
    yield _joined(b, "-", a, cross_b - cross_a, bottom)
    yield _joined(a, "*", b, a.top * b.top, bottom)
    if cross_b:
        yield _joined(a, "/", b, cross_a, cross_b)
    if cross_a:
        yield _joined(b, "/", a, cross_b, cross_a)


def _joined(left: _Term, operator: str, right: _Term, top: int, bottom: int) -> _Term:
    if bottom < 0:
        top, bottom = -top, -bottom
    level = _PRECEDENCE[operator]
    left_text = f"({left.text})" if _PRECEDENCE[left.operator] < level else left.text
    tight = _PRECEDENCE[right.operator] < level or (
        _PRECEDENCE[right.operator] == level and operator in "-/"
    )
    right_text = f"({right.text})" if tight else right.text
    return _Term(top, bottom, f"{left_text}{operator}{right_text}", operator)
