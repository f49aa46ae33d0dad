"""The verb grammar inside a story file: which command templates the parser cannot tell apart.

A story file lists, for each verb, the sentences its parser accepts and the action each stands for.
Two templates with the same action and the same kinds of objects ("put X in Y", "insert X in Y")
reach the same routine, so only one needs trying; two templates with the same kinds of objects
accept and refuse the same names. Three table formats are read: Inform's grammar versions 1 and 2,
and the Infocom tables of version-3 games; their layouts are those of The Inform Technical Manual
and of the ztools documentation. A table that fits none of them yields no knowledge, never a guess:
every template then stands for itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

_ALPHABETS = ("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_PUNCTUATION = " ^0123456789.,!?_#'\"/\\-:()"
_INFOCOM_CHECKS = 8 | 4 | 2
"""Flags of an object in Infocom's tables: take it first, may be many, must be held."""
HOLE = "OBJ"


@dataclass(frozen=True, slots=True)
class Template:
    """One command template and what the story's grammar says of it."""

    text: str
    """Words and up to two ``OBJ`` holes, e.g. ``put OBJ in OBJ``."""
    holes: int
    signature: int | None
    """Stands for the kinds of objects the parser wants: equal ones accept the same names."""
    many: tuple[bool, ...]
    """Per hole: may it be filled with ``all``?"""
    forms: tuple[str, ...] = ()
    """Other ways to say it, with every verb of the dictionary that means the same."""


@dataclass(frozen=True, slots=True)
class _Token:
    """A hole (``kind`` is set) or a literal (any word whose number is in ``words``)."""

    kind: object = None
    many: bool = False
    words: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class _Line:
    action: int
    tokens: tuple[_Token, ...]


@dataclass(frozen=True, slots=True)
class _Grammar:
    """Lines by verb number, and the numbers of verbs and literal words."""

    verbs: dict[str, tuple[_Line, ...]]
    literals: dict[str, int]
    word_length: int

    def lines(self, template: str) -> list[_Line]:
        """Return the lines that ``template`` spells out, in the parser's order."""
        verb, *rest = template.split()
        wanted: list[int | None] = []
        for word in rest:
            if word == HOLE:
                wanted.append(None)
                continue
            number = self.literals.get(word[: self.word_length])
            if number is None:
                return []
            wanted.append(number)
        return [
            line
            for line in self.verbs.get(verb[: self.word_length], ())
            if len(line.tokens) == len(wanted)
            and all(
                token.kind is not None if number is None else number in token.words
                for token, number in zip(line.tokens, wanted, strict=True)
            )
        ]


def read_templates(
    story: bytes, templates: Iterable[str], rank: Callable[[str], object]
) -> tuple[Template, ...]:
    """Return the templates worth trying, one for each action and kinds of objects.

    Args:
        story: the whole story file.
        templates: command templates with at most two ``OBJ`` holes.
        rank: sort key of a template's text; the lowest of several synonyms stands for them.
    """
    grammar = _read(story)
    groups: dict[object, list[tuple[str, list[_Line]]]] = {}
    for text in dict.fromkeys(templates):
        lines = grammar.lines(text) if grammar is not None else []
        holes = text.split().count(HOLE)
        key: object = tuple((line.action, _kinds(line)) for line in lines) if lines else text
        groups.setdefault((holes, key), []).append((text, lines))
    chosen = []
    signatures: dict[object, int] = {}
    for group in groups.values():
        group.sort(key=lambda item: (rank(item[0]), item[0]))
        text, lines = group[0]
        holes = text.split().count(HOLE)
        kinds = tuple(_kinds(line) for line in lines)
        chosen.append(
            Template(
                text=text,
                holes=holes,
                signature=signatures.setdefault(kinds, len(signatures)) if lines else None,
                many=_many(lines, holes),
                forms=tuple(form for other, _ in group for form in _forms(grammar, other)),
            )
        )
    return tuple(chosen)


def read_nouns(story: bytes) -> tuple[frozenset[str], frozenset[str], int]:
    """Return the nouns and adjectives of the parser's dictionary, and how long its words are.

    A story that marks no word as a noun gives every word that is neither verb nor preposition.
    """
    size = 4 if story[0] <= 3 else 6
    nouns, adjectives, others = set(), set(), set()
    for address in _entries(story):
        text, flags = _decode(story, address, size // 2), story[address + size]
        if flags & 0x80:
            nouns.add(text)
        elif story[0] <= 3 and flags & 0x20:
            adjectives.add(text)
        elif not flags & (0x48 if story[0] <= 3 else 0x09):
            others.add(text)
    return frozenset(nouns or others), frozenset(adjectives), 6 if story[0] <= 3 else 9


def _forms(grammar: _Grammar | None, template: str) -> list[str]:
    verb, *rest = template.split()
    if grammar is None or (lines := grammar.verbs.get(verb[: grammar.word_length])) is None:
        return [template]
    same = [word for word, others in grammar.verbs.items() if others is lines]
    return [" ".join((word, *rest)) for word in same]


def _kinds(line: _Line) -> tuple[object, ...]:
    return tuple(token.kind for token in line.tokens if token.kind is not None)


def _many(lines: Sequence[_Line], holes: int) -> tuple[bool, ...]:
    if not lines:
        return (True,) * holes
    slots = [[token.many for token in line.tokens if token.kind is not None] for line in lines]
    return tuple(any(slot[index] for slot in slots) for index in range(holes))


def _read(story: bytes) -> _Grammar | None:
    """Return the grammar in ``story``, or None when its tables are of no known format."""
    if len(story) < 64:
        return None
    table = _word(story, 0x0E)
    first = _word(story, table)
    if not table < first < len(story) or (first - table) % 2:
        return None
    starts = [_word(story, table + 2 * index) for index in range((first - table) // 2)]
    spans = list(itertools.pairwise(starts))
    if any(end <= start for start, end in spans):
        return None
    if story[0] <= 3:
        readers = [(_infocom_line, False)]
    else:
        readers = [(_inform2_line, True), (_inform1_line, False)]
    for reader, variable in readers:
        lines = [_verb_lines(story, start, end, reader, variable) for start, end in spans]
        last = _verb_lines(story, starts[-1], None, reader, variable)
        if last is not None and all(item is not None for item in lines):
            return _with_dictionary(story, [item or () for item in [*lines, last]], variable)
    return None


def _verb_lines(
    story: bytes,
    start: int,
    end: int | None,
    reader: Callable[[bytes, int], tuple[_Line, int] | None],
    variable: bool,
) -> tuple[_Line, ...] | None:
    """Read one verb's lines; None unless they fill ``start`` to ``end`` (one byte of padding)."""
    lines, position = [], start + 1
    for _ in range(story[start]):
        found = reader(story, position) if position + 8 <= len(story) else None
        if found is None:
            return None
        line, position = found
        lines.append(line)
    slack = 0 if end is None else end - position
    return tuple(lines) if slack == 0 or (slack == 1 and not variable) else None


def _infocom_line(story: bytes, at: int) -> tuple[_Line, int] | None:
    objects, prep1, prep2, _, _, where1, where2, action = story[at : at + 8]
    if objects > 2:
        return None
    tokens: list[_Token] = []
    for index, (preposition, where) in enumerate(((prep1, where1), (prep2, where2))):
        if preposition:
            tokens.append(_Token(words=frozenset((preposition,))))
        if index < objects:
            # The other flags say where to look for an object the player did not name.
            tokens.append(_Token(kind=where & _INFOCOM_CHECKS, many=bool(where & 4)))
    return _Line(action, tuple(tokens)), at + 8


def _inform1_line(story: bytes, at: int) -> tuple[_Line, int] | None:
    count, *numbers, action = story[at : at + 8]
    tokens: list[_Token] = []
    for number in numbers:
        if number >= 176:
            tokens.append(_Token(words=frozenset((number,))))
        elif count > 0:
            count -= 1
            tokens.append(_Token(kind=number, many=number not in (0, 1, 6)))
        else:
            break
    return (_Line(action, tuple(tokens)), at + 8) if count == 0 else None


def _inform2_line(story: bytes, at: int) -> tuple[_Line, int] | None:
    action = _word(story, at)
    at += 2
    tokens: list[_Token] = []
    while story[at] != 15:
        kind, data = story[at], _word(story, at + 1)
        at += 3
        if at + 3 > len(story) or not 1 <= kind & 15 <= 6:
            return None
        if kind & 15 != 2:
            many = (kind & 15, data) not in ((1, 0), (1, 1), (1, 6))
            tokens.append(_Token(kind=(kind & 15, data), many=many))
        elif kind & 0x10 and tokens and tokens[-1].words:
            tokens[-1] = _Token(words=tokens[-1].words | {data})
        else:
            tokens.append(_Token(words=frozenset((data,))))
    return _Line(action, tuple(tokens)), at + 1


def _with_dictionary(
    story: bytes, by_number: Sequence[tuple[_Line, ...]], addresses: bool
) -> _Grammar:
    """Attach the words: verbs to their lines, literals to the numbers that lines use."""
    text_size = 4 if story[0] <= 3 else 6
    verbs: dict[str, tuple[_Line, ...]] = {}
    literals: dict[str, int] = {}
    for address in _entries(story):
        text = _decode(story, address, text_size // 2)
        flags, first, second = story[address + text_size : address + text_size + 3]
        if story[0] <= 3:
            verb = first if flags & 3 == 1 else second
            is_verb, is_literal, number = flags & 0x40, flags & 8, second if flags & 3 else first
        else:
            verb, is_verb, is_literal = first, flags & 1, True
            number = address if addresses else second
        if is_verb and 255 - verb < len(by_number):
            verbs[text] = by_number[255 - verb]
        if is_literal:
            literals[text] = number
    return _Grammar(verbs, literals, 6 if story[0] <= 3 else 9)


def _entries(story: bytes) -> range:
    """Return the addresses of the dictionary's words."""
    start = _word(story, 8)
    length, count = story[start + 1 + story[start]], _word(story, start + 2 + story[start])
    first = start + 4 + story[start]
    return range(first, first + count * length, length)


def _decode(story: bytes, address: int, words: int) -> str:
    """Return a dictionary word (letters and punctuation of the standard alphabets)."""
    codes = []
    for index in range(words):
        word = _word(story, address + 2 * index)
        codes += [word >> 10 & 31, word >> 5 & 31, word & 31]
    letters: list[str] = []
    shift = 0
    for code in codes:
        if code in (4, 5):
            shift = code - 3
        elif code >= 6:
            letters.append(_PUNCTUATION[code - 6] if shift == 2 else _ALPHABETS[shift][code - 6])
            shift = 0
    return "".join(letters)


def _word(story: bytes, at: int) -> int:
    return story[at] << 8 | story[at + 1]
