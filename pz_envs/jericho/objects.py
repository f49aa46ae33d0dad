"""Names of the things a player could refer to now, without a language parser.

Words come from the room's description, the inventory and the object tree around the player; the
game's own dictionary says which of them are nouns or adjectives. Names with the same ``examine``
reply are taken for one thing and the plainest stands for it, so a list is a function of what
``look`` and ``inventory`` print and of the object tree, never of earlier replies.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

ALL = "all"
_WORD = re.compile(r"[a-z0-9'-]+")
_STOP_WORDS = """
a all an and another any both but by down each east else every everything except for from he her him
his i in inside into it its me my myself no north northeast northwest not of off on one onto or
other out outside over she some south southeast southwest that the their them then these this those
three to two under up us we west with you your yourself d e n ne nw s se sw u w
"""
_NOT_THINGS = frozenset(_STOP_WORDS.split())
# Lower is plainer: nouns before names of the tree before adjectives.
_NOUN, _NAME, _ADJECTIVE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Thing:
    """One thing the player can name."""

    name: str
    held: bool


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the engine shows of the current state."""

    look: str
    inventory: str
    here: tuple[str, ...]
    """Names of the objects in the player's location, all levels down."""
    carried: tuple[str, ...]
    """Names of the objects the player holds, all levels down."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The words that the game's parser takes for things."""

    nouns: frozenset[str]
    adjectives: frozenset[str]
    length: int

    def words(self, text: str) -> Iterator[tuple[str, int]]:
        """Yield the nouns and adjectives in ``text`` with their rank."""
        for word in _WORD.findall(text.lower()):
            key = word[: self.length]
            if word in _NOT_THINGS:
                continue
            if key in self.nouns:
                yield word, _NOUN
            elif key in self.adjectives:
                yield word, _ADJECTIVE


@dataclass(frozen=True, slots=True)
class ObjectTable:
    """The Z-machine's object tree as it is in memory now; object 0 is none."""

    table: bytes
    """The entries from object 1 on."""
    version: int

    def links(self, number: int) -> tuple[int, int, int] | None:
        """Return an object's parent, sibling and child, or None when there is no such object."""
        size, first, width = (9, 4, 1) if self.version <= 3 else (14, 6, 2)
        at = (number - 1) * size + first
        if number < 1 or at + 3 * width > len(self.table):
            return None
        if width == 1:
            return self.table[at], self.table[at + 1], self.table[at + 2]
        parent, sibling, child = struct.unpack_from(">HHH", self.table, at)
        return parent, sibling, child

    def around(self, player: int) -> tuple[list[int], list[int]]:
        """Return what is in the player's location (all levels down), and what the player holds."""
        links = self.links(player)
        if links is None:
            return [], []
        parent, _, child = links
        location = self.links(parent)
        here = self._below(location[2], apart=player) if location is not None else []
        return here, self._below(child, apart=0)

    def _below(self, first: int, *, apart: int) -> list[int]:
        """Return the objects from ``first`` on, in order, but for ``apart`` and what it holds."""
        found: list[int] = []
        visited = {0}
        todo = [first]
        while todo:
            number = todo.pop()
            links = self.links(number) if number not in visited else None
            visited.add(number)
            if links is None:
                continue
            todo.append(links[1])
            if number != apart:
                found.append(number)
                todo.append(links[2])
        return sorted(found)


def name_ranks(surroundings: Surroundings, vocabulary: Vocabulary) -> dict[str, int]:
    """Return every name worth examining with its rank (lower is plainer)."""
    ranks: dict[str, int] = {}

    def add(name: str, rank: int) -> None:
        ranks[name] = min(rank, ranks.get(name, rank))

    for text in (surroundings.look, surroundings.inventory):
        for word, rank in vocabulary.words(text):
            add(word, rank)
    for name in (*surroundings.here, *surroundings.carried):
        *first, last = name.lower().split() or [""]
        for word in first:
            for known, _ in vocabulary.words(word):
                add(known, _ADJECTIVE)
        for known, _ in vocabulary.words(last):
            add(known, _NOUN)
        if first:
            add(" ".join((*first, last)), _NAME)
    return ranks


def things(
    surroundings: Surroundings,
    vocabulary: Vocabulary,
    examine: Callable[[str], str | None],
) -> tuple[Thing, ...]:
    """Return the things in reach, the plainest name for each, in alphabetical order.

    Args:
        surroundings: what the engine shows.
        vocabulary: the game's words for things.
        examine: gives a name's ``examine`` reply, or None where the parser does not know it here.
    """
    ranks = name_ranks(surroundings, vocabulary)
    aliases: dict[str, list[str]] = {}
    for name in sorted(ranks):
        reply = examine(name)
        if reply is not None:
            aliases.setdefault(reply, []).append(name)
    carried = held_words(surroundings, vocabulary)
    return tuple(sorted(_choose(aliases, ranks, carried), key=lambda thing: thing.name))


def _choose(
    aliases: Mapping[str, Iterable[str]], ranks: Mapping[str, int], carried: frozenset[str]
) -> Iterator[Thing]:
    for names in aliases.values():
        ordered = sorted(names, key=lambda name: (ranks[name], len(name), name))
        yield Thing(ordered[0], any(name in carried for name in ordered))


def held_words(surroundings: Surroundings, vocabulary: Vocabulary) -> frozenset[str]:
    """Return the words that name something the player holds."""
    words = {word for word, _ in vocabulary.words(surroundings.inventory)}
    for name in surroundings.carried:
        words.add(name.lower())
        words.update(word for word, _ in vocabulary.words(name))
    return frozenset(words)
