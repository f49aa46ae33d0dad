"""Wording from a game file's own grammar: command templates and feedback rules, never executed.

The reference engine evaluates pieces of the grammar as Python; here the few forms that occur
(``{o.name}``, ``{o.indefinite + ' ' + o.name | given}``, ``[{...}]``, ``#rule#``) are read as data
and anything else is refused. Rules, lists and their order are the reference's own: the first rule
whose condition can be met, facts in sorted order, different variables for different things.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pz_envs.alfworld.pddl import Atom, Bindings, Facts, NotCoveredError
from pz_envs.errors import DataError

Piece = Callable[[Facts, Bindings], str]

_ACTION = re.compile(r'\baction\s+([\w/-]+)\s*\{|\bgrammar\s*::\s*"""(.*?)"""', re.DOTALL)
_FIELD = re.compile(r'\b(template|feedback)\s*::\s*"([^"]*)"')
_SYMBOL = re.compile(r"\[\{([^{}]*)\}\]|\{([^{}]*)\}|#([^#]*)#|([^\[\]{}#]+)")
_TERM = re.compile(r"'([^']*)'|(\w+)(?:\.(\w+)(?:\s+or\s+\w+\.id)?)?")
_ATOM = re.compile(r"\s*([\w-]+)\(([^()]*)\)\s*")
_LEADING_SPACE = re.compile(r"\A\s*\n?")


@dataclass(frozen=True, slots=True)
class ActionText:
    """How an action is typed (``take {o} from {r}``) and what its feedback begins from."""

    template: str
    feedback: str


class Grammar:
    """A parsed grammar for a household whose things have ``names`` (by PDDL id)."""

    def __init__(self, text: str, names: Mapping[str, str]) -> None:
        self.actions, self._rules = parse_grammar(text)
        self._names = names
        self._pieces: dict[str, Sequence[tuple[Sequence[Atom], Piece]]] = {}
        self._texts: dict[str, Piece] = {}
        self._needed = {"list_empty", "list_separator", "list_last_separator"}

    def prepare(self, actions: Iterable[str]) -> None:
        """Compile all that these actions, the introduction and the task can say.

        Raises:
            DataError: a rule is missing.
            NotCoveredError: a form is not known; better now than in the middle of a game.
        """
        told = [self.actions[name] for name in actions if name in self.actions]
        for text in (
            "#intro#",
            "#task#",
            *(part for x in told for part in (x.template, x.feedback)),
        ):
            self._texts[text] = self._compile(text)
        while missing := sorted(self._needed - self._pieces.keys()):
            for name in missing:
                self._pieces[name] = self._compile_rules(name)

    def render(self, text: str, facts: Facts, bound: Bindings) -> str:
        """Expand a prepared ``text`` (``#intro#``, a template) with the variables of ``bound``.

        Raises:
            DataError: no rule of the grammar applies, or it uses a variable that nothing binds.
        """
        return self._texts[text](facts, bound)

    def _rule(self, name: str) -> Piece:
        """Return a piece that picks the first rule of ``name`` whose condition can be met."""
        self._needed.add(name)

        def expand(facts: Facts, bound: Bindings) -> str:
            for condition, piece in self._pieces[name]:
                if not condition or next(_matches(condition, facts, bound), None) is not None:
                    return piece(facts, bound)
            raise DataError(f"no rule `{name}` of the game's grammar applies here")

        return expand

    def _compile_rules(self, name: str) -> Sequence[tuple[Sequence[Atom], Piece]]:
        if name not in self._rules:
            raise DataError(f"the game's grammar has no rule `{name}`")
        return [
            (_condition(rule.get("condition", "")), self._compile(rule["rhs"]))
            for rule in self._rules[name]
        ]

    def _compile(self, text: str) -> Piece:
        """Turn a right-hand side into a function; the reference drops its leading blank line."""
        text = _LEADING_SPACE.sub("", text)
        pieces: list[Piece] = []
        end = 0
        for found in _SYMBOL.finditer(text):
            if found.start() != end:
                break
            end = found.end()
            listed, single, rule, literal = found.groups()
            if listed is not None:
                pieces.append(self._list(listed))
            elif single is not None:
                pieces.append(self._joined(single))
            elif rule is not None:
                pieces.append(self._rule(rule))
            else:
                pieces.append(_constant(literal))
        if end != len(text):
            raise NotCoveredError(f"the game's grammar has an unknown form: {text[:200]!r}")
        if len(pieces) == 1:
            return pieces[0]
        return lambda facts, bound: "".join([piece(facts, bound) for piece in pieces])

    def _list(self, text: str) -> Piece:
        """Return the piece of ``[{expression | given}]``: an enumeration with separators."""
        each = self._each(text)

        def enumerated(facts: Facts, bound: Bindings) -> str:
            items = each(facts, bound)
            if not items:
                return self._rule("list_empty")(facts, bound)
            if len(items) == 1:
                return items[0]
            between = self._rule("list_separator")(facts, bound)
            last = self._rule("list_last_separator")(facts, bound)
            return between.join(items[:-1]) + last + items[-1]

        return enumerated

    def _joined(self, text: str) -> Piece:
        each = self._each(text)
        return lambda facts, bound: "".join(each(facts, bound))

    def _each(self, text: str) -> Callable[[Facts, Bindings], list[str]]:
        expression, _, given = text.partition("|")
        expression = expression.strip()
        if expression.startswith("#") and expression.endswith("#"):
            piece = self._rule(expression[1:-1])
        else:
            piece = self._expression(expression)
        condition = _condition(given)
        if not condition:
            return lambda facts, bound: [piece(facts, bound)]
        return lambda facts, bound: [
            piece(facts, solution) for solution in _matches(condition, facts, bound)
        ]

    def _expression(self, text: str) -> Piece:
        """Return the piece of ``o.indefinite + ' ' + o.name``."""
        parts: list[Piece] = []
        rest = text
        while True:
            found = _TERM.match(rest)
            if found is None or (found[3] or "name") not in (
                "name",
                "id",
                "indefinite",
                "definite",
            ):
                raise DataError(f"the game's grammar has an unknown expression: {text[:120]!r}")
            literal, variable, attribute = found.groups()
            if literal is not None:
                parts.append(_constant(literal))
            else:
                parts.append(self._attribute(variable, attribute or "name"))
            rest = rest[found.end() :].strip()
            if not rest:
                break
            if rest[0] != "+":
                raise DataError(f"the game's grammar has an unknown expression: {text[:120]!r}")
            rest = rest[1:].strip()
        if len(parts) == 1:
            return parts[0]
        return lambda facts, bound: "".join([part(facts, bound) for part in parts])

    def _attribute(self, variable: str, attribute: str) -> Piece:
        if attribute in ("indefinite", "definite"):
            return _constant("a" if attribute == "indefinite" else "the")
        names: Mapping[str, str] = self._names if attribute == "name" else {}

        def value(facts: Facts, bound: Bindings) -> str:
            if variable not in bound:
                raise DataError(f"the game's grammar uses {variable!r}, which nothing binds")
            return names.get(bound[variable], bound[variable])

        return value


def parse_grammar(
    text: str,
) -> tuple[dict[str, ActionText], dict[str, list[dict[str, str]]]]:
    """Return the actions by lowercased name and the feedback rules by name.

    Raises:
        DataError: a block of rules is no JSON, or the text holds no action.
    """
    actions: dict[str, ActionText] = {}
    rules: dict[str, list[dict[str, str]]] = {}
    found = list(_ACTION.finditer(text))
    for number, match in enumerate(found):
        if match[2] is not None:
            lines = match[2].split("\n")
            try:
                rules |= json.loads("\n".join(x for x in lines if not x.lstrip().startswith("#")))
            except ValueError as error:
                raise DataError(f"a block of the game's grammar is no JSON: {error}") from error
            continue
        end = found[number + 1].start() if number + 1 < len(found) else len(text)
        fields = dict(_FIELD.findall(text[match.end() : end]))
        if "template" not in fields or "feedback" not in fields:
            raise DataError(f"action {match[1]} of the game's grammar lacks template or feedback")
        actions[match[1].lower()] = ActionText(fields["template"], fields["feedback"])
    if not actions:
        raise DataError("the game's grammar has no actions")
    return actions, rules


def _constant(text: str) -> Piece:
    return lambda facts, bound: text


def _condition(text: str) -> tuple[Atom, ...]:
    """Read ``p(a:agent) & q(a:agent, b:object)``; the types repeat what the facts say."""
    atoms: list[Atom] = []
    for part in text.split("&") if text.strip() else ():
        found = _ATOM.fullmatch(part)
        if found is None:
            raise NotCoveredError(f"the game's grammar has an unknown condition: {text[:200]!r}")
        variables = tuple(term.partition(":")[0].strip() for term in found[2].split(","))
        atoms.append((found[1], variables))
    return tuple(atoms)


def _matches(condition: Sequence[Atom], facts: Facts, bound: Bindings) -> Iterator[Bindings]:
    """Yield every extension of ``bound`` that meets the condition, in the reference's order."""
    if not condition:
        yield bound
        return
    name, variables = condition[0]
    pattern = [bound.get(variable) for variable in variables]
    if None not in pattern:
        if facts.holds(name, tuple([bound[variable] for variable in variables])):
            yield from _matches(condition[1:], facts, bound)
        return
    for row in facts.rows(name, pattern):
        extended = dict(bound)
        for variable, value in zip(variables, row, strict=True):
            if variable not in extended:
                if value in extended.values():
                    break
                extended[variable] = value
        else:
            yield from _matches(condition[1:], facts, extended)
