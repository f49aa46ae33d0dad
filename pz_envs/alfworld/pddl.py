"""The part of PDDL that ALFWorld files use: s-expressions, typed objects, facts and goals.

Names are lowercased, as Fast Downward does. A goal is compiled once into a chain of joins over the
facts, so that checking it costs microseconds; ``and``, ``or``, ``not``, ``exists``, ``forall``,
``imply`` and ``=`` are understood, and anything else is refused, never guessed at. Nothing in a
file is ever executed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pz_envs.errors import DataError

Expression: TypeAlias = "str | list[Expression]"
Fact = tuple[str, ...]
Atom = tuple[str, tuple[str, ...]]
Bindings = dict[str, str]
_Rows = Sequence[Fact]

_TOKEN = re.compile(r"[()]|[^\s()]+")
_COMMENT = re.compile(r";[^\n]*")


class Facts:
    """Facts by predicate; ``rows`` gives them sorted, narrowed by what is already known."""

    __slots__ = ("_by_argument", "_changing", "_fixed", "_sets")

    def __init__(self, facts: Mapping[str, set[Fact]]) -> None:
        self._fixed = {name: tuple(sorted(rows)) for name, rows in facts.items()}
        self._sets = {name: frozenset(rows) for name, rows in facts.items()}
        self._by_argument: dict[tuple[str, int, str], _Rows] = {}
        for name, rows in self._fixed.items():
            for row in rows:
                for place, value in enumerate(row):
                    key = (name, place, value)
                    self._by_argument[key] = (*self._by_argument.get(key, ()), row)
        self._changing: Mapping[str, set[Fact]] = {}

    def with_changing(self, changing: Mapping[str, set[Fact]]) -> Facts:
        """Return a view that shares the fixed facts and also reads ``changing``, which may vary."""
        view = Facts.__new__(Facts)
        view._fixed = self._fixed
        view._sets = self._sets
        view._by_argument = self._by_argument
        view._changing = changing
        return view

    def holds(self, name: str, row: Fact) -> bool:
        """Return whether a fact is among these."""
        found = self._changing.get(name)
        return row in (self._sets.get(name, ()) if found is None else found)

    def rows(self, name: str, pattern: Sequence[str | None]) -> _Rows:
        """Return the sorted facts of a predicate that agree with ``pattern`` (None is any)."""
        known = [(place, value) for place, value in enumerate(pattern) if value is not None]
        changing = self._changing.get(name)
        if changing is not None:
            if len(known) == len(pattern):
                row = tuple(value for _, value in known)
                return (row,) if row in changing else ()
            if len(known) == 1:
                place, value = known[0]
                return sorted([row for row in changing if row[place] == value])
            return sorted([row for row in changing if all(row[p] == v for p, v in known)])
        if not known:
            return self._fixed.get(name, ())
        place, value = known[0]
        found = self._by_argument.get((name, place, value), ())
        if len(known) == 1:
            return found
        return [row for row in found if all(row[p] == v for p, v in known[1:])]


Test = Callable[[Facts, Bindings], bool]

_CONNECTIVES = ("and", "or", "not", "imply", "forall", "exists", "when")


class NotCoveredError(DataError):
    """A game file that is sound but beyond the native engine; the reference engine may know it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A parsed problem: objects by type, facts by predicate, and the goal as text and as test."""

    objects: Mapping[str, tuple[str, ...]]
    facts: Mapping[str, set[Fact]]
    formula: Expression
    goal: Test


@dataclass(frozen=True, slots=True)
class Existential:
    """A goal that asks for things: variables and their types, facts, and pairs that differ."""

    variables: Mapping[str, str]
    atoms: tuple[Atom, ...]
    unequal: tuple[tuple[str, str], ...]


def parse(text: str) -> list[Expression]:
    """Return the first s-expression of ``text``, lowercased, comments removed.

    Raises:
        DataError: the parentheses do not match.
    """
    stack: list[list[Expression]] = [[]]
    words: dict[str, str] = {}  # one object a name: a game holds thousands of repetitions
    for token in _TOKEN.findall(_COMMENT.sub("", text).lower()):
        if token == "(":
            stack.append([])
        elif token == ")":
            if len(stack) < 2:
                break
            done = stack.pop()
            stack[-1].append(done)
            if len(stack) == 1:
                return done
        else:
            stack[-1].append(words.setdefault(token, token))
    raise DataError("the PDDL text is cut short: a parenthesis is never closed")


def parse_problem(text: str) -> Problem:
    """Parse a problem file.

    Raises:
        DataError: a section is missing or has another form.
    """
    sections: dict[str, list[Expression]] = {}
    for part in parse(text):
        if isinstance(part, list) and part and isinstance(part[0], str):
            sections[part[0]] = part[1:]
    for name in (":objects", ":init", ":goal"):
        if name not in sections:
            raise DataError(f"the PDDL problem has no {name} section")
    objects: dict[str, list[str]] = {}
    for name, kind in _typed(sections[":objects"]):
        objects.setdefault(kind, []).append(name)
    types = {kind: tuple(names) for kind, names in objects.items()}
    facts: dict[str, set[Fact]] = {}
    for part in sections[":init"]:
        row = _strings(part)
        if row is not None and row[0] not in ("=", "not"):
            facts.setdefault(row[0], set()).add(row[1:])
    if len(sections[":goal"]) != 1:
        raise DataError("the PDDL problem's goal must be one formula")
    formula = sections[":goal"][0]
    return Problem(types, facts, formula, compile_formula(formula, types))


def predicates(formula: Expression) -> frozenset[str]:
    """Return every word of a formula that opens a parenthesis."""
    if isinstance(formula, str) or not formula:
        return frozenset()
    first = frozenset((formula[0],)) if isinstance(formula[0], str) else frozenset()
    return first.union(*map(predicates, formula))


def read_existential(formula: Expression) -> Existential | None:
    """Return a goal of ``and``, ``exists``, facts and ``(not (= a b))`` flat, None for another."""
    variables: dict[str, str] = {}
    atoms: list[Atom] = []
    unequal: list[tuple[str, str]] = []

    def read(part: Expression, names: Mapping[str, str]) -> bool:
        match part:
            case ["and", *parts]:
                return all(read(inner, names) for inner in parts)
            case ["exists", [*typed], body]:
                names = dict(names)
                for name, kind in _typed(typed):
                    names[name] = f"{name} {len(variables)}"
                    variables[names[name]] = kind
                return read(body, names)
            case ["not", ["=", str(left), str(right)]]:
                unequal.append((names.get(left, left), names.get(right, right)))
                return True
        row = _strings(part)
        if row is None or row[0] in ("=", *_CONNECTIVES):
            return False
        atoms.append((row[0], tuple(names.get(term, term) for term in row[1:])))
        return True

    if not read(formula, {}):
        return None
    return Existential(variables, tuple(atoms), tuple(unequal))


def compile_formula(formula: Expression, objects: Mapping[str, tuple[str, ...]]) -> Test:
    """Return a function that says whether ``formula`` holds under given facts and bindings.

    Raises:
        DataError: a connective is unknown.
    """
    if isinstance(formula, str):
        raise DataError(f"the PDDL goal has {formula!r} where a formula should be")
    if not formula:
        return lambda facts, bound: True
    head, rest = formula[0], formula[1:]
    compiled = functools.partial(compile_formula, objects=objects)
    if head == "and":
        tests = [compiled(part) for part in rest]
        return lambda facts, bound: all(test(facts, bound) for test in tests)
    if head == "or":
        tests = [compiled(part) for part in rest]
        return lambda facts, bound: any(test(facts, bound) for test in tests)
    if head == "not" and len(rest) == 1:
        test = compiled(rest[0])
        return lambda facts, bound: not test(facts, bound)
    if head == "imply" and len(rest) == 2:
        first, second = compiled(rest[0]), compiled(rest[1])
        return lambda facts, bound: not first(facts, bound) or second(facts, bound)
    if head == "forall" and len(rest) == 2:
        none_fails = compiled(["exists", rest[0], ["not", rest[1]]])
        return lambda facts, bound: not none_fails(facts, bound)
    if head == "exists" and len(rest) == 2 and isinstance(rest[0], list):
        variables, body = _typed(rest[0]), rest[1]
        while isinstance(body, list) and body[:1] == ["exists"] and len(body) == 3:
            inner = _typed(body[1]) if isinstance(body[1], list) else []
            if {name for name, _ in inner} & {name for name, _ in variables}:
                break
            variables, body = variables + inner, body[2]
        return _compile_exists(variables, body, objects)
    terms = _strings(formula)
    if terms is None or head in _CONNECTIVES:
        raise NotCoveredError(
            f"the PDDL goal has a form that pz does not know: {str(formula)[:200]}"
        )
    if head == "=" and len(terms) == 3:
        left, right = terms[1:]
        return lambda facts, bound: bound.get(left, left) == bound.get(right, right)
    name, arguments = terms[0], terms[1:]

    def holds(facts: Facts, bound: Bindings) -> bool:
        return facts.holds(name, tuple([bound.get(term, term) for term in arguments]))

    return holds


def _compile_exists(
    variables: Sequence[tuple[str, str]],
    body: Expression,
    objects: Mapping[str, tuple[str, ...]],
) -> Test:
    """Join the body's atoms in an order that binds early; then test what is no atom."""
    types = dict(variables)
    atoms: list[Fact] = []
    others: list[Expression] = []
    for part in _conjuncts(body):
        row = _strings(part)
        if row is None or row[0] in ("=", "not", "and", "or"):
            others.append(part)
        else:
            atoms.append(row)
    ordered: list[tuple[str, Fact, bool]] = []
    open_variables = set(types)
    while atoms:
        atoms.sort(key=lambda row: sum(term in open_variables for term in row[1:]))
        name, *terms = atoms.pop(0)
        ordered.append((name, tuple(terms), open_variables.isdisjoint(terms)))
        open_variables.difference_update(terms)
    tests = [compile_formula(part, objects) for part in others]
    domains = [(name, objects.get(types[name], ())) for name in types if name in open_variables]
    allowed = {name: frozenset(objects.get(kind, ())) for name, kind in types.items()}

    def solve(facts: Facts, bound: Bindings, depth: int) -> Iterator[Bindings]:
        if depth == len(ordered):
            yield from _assign(domains, bound)
            return
        name, terms, known = ordered[depth]
        if known:
            if facts.holds(name, tuple([bound.get(term, term) for term in terms])):
                yield from solve(facts, bound, depth + 1)
            return
        pattern = [bound.get(term, None if term in types else term) for term in terms]
        for row in facts.rows(name, pattern):
            extended = dict(bound)
            for term, value in zip(terms, row, strict=True):
                if term in types:
                    if value not in allowed[term] or extended.get(term, value) != value:
                        break
                    extended[term] = value
            else:
                yield from solve(facts, extended, depth + 1)

    def exists(facts: Facts, bound: Bindings) -> bool:
        outer = {name: value for name, value in bound.items() if name not in types}
        return any(
            all(test(facts, solution) for test in tests) for solution in solve(facts, outer, 0)
        )

    return exists


def _assign(domains: Sequence[tuple[str, Sequence[str]]], bound: Bindings) -> Iterator[Bindings]:
    if not domains:
        yield bound
        return
    name, values = domains[0]
    for value in values:
        yield from _assign(domains[1:], {**bound, name: value})


def _conjuncts(formula: Expression) -> Iterator[Expression]:
    if isinstance(formula, list) and formula and formula[0] == "and":
        for part in formula[1:]:
            yield from _conjuncts(part)
    else:
        yield formula


def _typed(parts: Sequence[Expression]) -> list[tuple[str, str]]:
    """Read ``a b - t c - u`` as pairs of name and type."""
    names = _strings(list(parts)) if parts else ()
    if names is None:
        raise DataError(f"a typed list in the PDDL text holds an expression: {str(parts)[:120]}")
    pairs: list[tuple[str, str]] = []
    waiting: list[str] = []
    tokens = iter(names)
    for token in tokens:
        if token == "-":
            kind = next(tokens, "object")
            pairs += [(name, kind) for name in waiting]
            waiting = []
        else:
            waiting.append(token)
    return pairs + [(name, "object") for name in waiting]


def _strings(part: Expression) -> Fact | None:
    """Return a flat list of words as a tuple, else None."""
    if isinstance(part, str):
        return None
    words = tuple(word for word in part if isinstance(word, str))
    return words if words and len(words) == len(part) else None
