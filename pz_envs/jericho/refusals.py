"""What the parser's refusals say about sentences not yet tried.

A parser decides from the grammar's kinds of objects and the names alone, before any action runs.
So when sentences of one signature are refused for some names in the same words, others of that
signature are refused for them too; and a name that is refused beside companions that were accepted
elsewhere is at fault itself, whatever stands beside it. A refusal is a reply that took no turn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Set

from pz_envs.jericho.grammar import Template
from pz_envs.jericho.objects import ALL

ENOUGH = 2
"""Equal refusals (of two templates, or beside two companions) before the rest is ruled out; after
one, a verb's own question ("What do you want to attack it with?") would count."""

Names = tuple[str, ...]


class _Seen:
    """What was seen of one signature's sentences."""

    def __init__(self) -> None:
        self.accepted: set[Names] = set()
        self.refused: dict[Names, tuple[object, int]] = {}
        self.ruled_out: set[Names] = set()
        self.good: tuple[set[str], set[str]] = (set(), set())
        self.beside: tuple[dict[str, tuple[object, set[str]]], ...] = ({}, {})
        self.doubtful: tuple[set[str], set[str]] = (set(), set())


class Refusals:
    """The refusals seen in one state; names refused in two ways are not ruled out."""

    def __init__(self) -> None:
        self._seen: defaultdict[int, _Seen] = defaultdict(_Seen)

    def left(self, template: Template, row: list[Names]) -> list[Names]:
        """Return the names of ``row`` that the parser is not known to refuse in the template."""
        seen = None if template.signature is None else self._seen.get(template.signature)
        if seen is None:
            return row
        left = [names for names in row if names not in seen.ruled_out]
        if left and len(left[0]) == 2:
            first, second = self._at_fault(seen, 0), self._at_fault(seen, 1)
            if first or second:
                left = [
                    names
                    for names in left
                    if ALL in names or not (names[0] in first or names[1] in second)
                ]
        return left

    def accept(self, template: Template, names: Names) -> None:
        """Record that the parser took ``names`` in a template."""
        if template.signature is None:
            return
        seen = self._seen[template.signature]
        seen.accepted.add(names)
        if len(names) == 2:
            for hole in (0, 1):
                seen.good[hole].add(names[hole])

    def refuse(self, template: Template, names: Names, reply: object) -> None:
        """Record that the parser refused ``names`` in a template with ``reply``."""
        if template.signature is None:
            return
        seen = self._seen[template.signature]
        before, count = seen.refused.get(names, (reply, 0))
        if before != reply:
            seen.accepted.add(names)
        seen.refused[names] = (before, count + 1)
        if count + 1 >= ENOUGH and names not in seen.accepted:
            seen.ruled_out.add(names)
        if len(names) < 2 or ALL in names:
            return
        for hole in (0, 1):
            alone = seen.beside[hole].setdefault(names[hole], (reply, set()))
            if alone[0] == reply:
                alone[1].add(names[1 - hole])
            else:
                seen.doubtful[hole].add(names[hole])

    def _at_fault(self, seen: _Seen, hole: int) -> Set[str]:
        """Return the names refused in one hole whatever stands in the other."""
        companions = seen.good[1 - hole]
        if len(companions) < ENOUGH:
            return frozenset()
        return {
            name
            for name, (_, beside) in seen.beside[hole].items()
            if len(beside & companions) >= ENOUGH
            and name not in seen.good[hole]
            and name not in seen.doubtful[hole]
        }
