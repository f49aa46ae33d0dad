"""The native engine: an ALFWorld household played from its game file, in plain Python.

The rules of the one PDDL domain that all ALFWorld files share are written out here; a file with
another domain is refused. Texts come from the file's grammar. What the reference engine
(textworld 1.7.0 over Fast Downward) answers is reproduced, oddities included: only a held object
can be examined (the domain's other branch has a misprinted type), a thing put down beside the
place it was taken from shows up "next to" it, and things of a kind are numbered from the last id.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pz_envs.alfworld.pddl import (
    Expression,
    Fact,
    Facts,
    NotCoveredError,
    parse,
    parse_problem,
    predicates,
)
from pz_envs.alfworld.planner import plan
from pz_envs.alfworld.text import Grammar
from pz_envs.errors import DataError

NOTHING = "Nothing happens."
"""The game's answer to a command that is not admissible."""

_RULES_DIGEST = "93ccf384743f4990"
_CLEAN_DIGESTS = {
    "92426f71472379da": ("sinktype", "sinkbasintype"),
    "722984a68a379190": ("sinkbasintype",),
}
_CHANGING = (
    "atlocation",
    "checked",
    "holds",
    "holdsany",
    "inreceptacle",
    "isclean",
    "iscool",
    "ishot",
    "ison",
    "issliced",
    "istoggled",
    "not_inreceptacle",
    "objectatlocation",
    "opened",
)
_HARMLESS = frozenset(("look", "inventory", "help", "examinereceptacle", "examineobject"))
_ACTIONS = _HARMLESS | {
    "gotolocation",
    "openobject",
    "closeobject",
    "pickupobject",
    "putobject",
    "cleanobject",
    "heatobject",
    "coolobject",
    "toggleobject",
    "sliceobject",
}
_TOUCHED = {
    **dict.fromkeys(_HARMLESS, ("checked",)),
    "gotolocation": ("atlocation",),
    "openobject": ("opened", "checked"),
    "closeobject": ("opened",),
}
"""What the commonest actions change: a goal about other things need not be looked at again."""


@dataclass(frozen=True, slots=True)
class Record:
    """A game file's content; an empty domain means the rules as this engine has them."""

    domain: str
    problem: str
    grammar: str
    walkthrough: tuple[str, ...]

    @property
    def wording(self) -> str:
        """Which of the two published grammars, ``move X to Y`` or ``put X in/on Y``, or neither."""
        for wording, template in (
            ("move X to Y", "move {o} to"),
            ("put X in/on Y", "put {o} in/on"),
        ):
            if f'"{template} {{r}}"' in self.grammar:
                return wording
        return "unknown"

    @property
    def task(self) -> str:
        """The task as the game states it: ``Your task is to: ...``."""
        return task_line(self.grammar)


@dataclass(frozen=True, slots=True)
class Move:
    """An action with its arguments by the domain's parameter names."""

    action: str
    bound: Mapping[str, str]


class World:
    """All of a game that never changes; games in play share it."""

    def __init__(self, domain: str, problem: str, grammar: str) -> None:
        """Parse a game file's three texts.

        Raises:
            NotCoveredError: the domain, the goal or the grammar is not one that this engine plays.
            DataError: a text is broken, or the grammar has an expression that nothing may evaluate.
        """
        self.sinks, self.has_help = _check_domain(domain)
        read = parse_problem(problem)
        self.formula, self.goal = read.formula, read.goal
        self.goal_predicates = predicates(read.formula)
        if len(read.facts.get("atlocation", ())) != 1:
            raise DataError("the PDDL problem must place exactly one agent")
        ((self.agent, _),) = read.facts["atlocation"]
        self.start = {name: frozenset(read.facts.get(name, ())) for name in _CHANGING}
        self.facts = Facts(read.facts)
        self.names = _names(read.facts.values())
        self.grammar = Grammar(grammar, self.names)
        self.grammar.prepare(_ACTIONS)
        self.has_help = self.has_help and "help" in self.grammar.actions
        self.things = {thing for thing, _ in self.facts.rows("objecttype", (None, None))}
        self.place = {r: spot for r, spot in self.facts.rows("receptacleatlocation", (None, None))}
        self.receptacles: dict[str, list[str]] = {}
        for receptacle, spot in self.facts.rows("receptacleatlocation", (None, None)):
            self.receptacles.setdefault(spot, []).append(receptacle)
        self.openable = self._unary("openable")
        self.pickupable = self._unary("pickupable")
        self.toggleable = self._unary("toggleable")
        self.sliceable = self._unary("sliceable")
        self.can = {kind: self._unary(f"{kind}able") for kind in ("clean", "heat", "cool")}
        self.appliance = {
            "clean": self._of_type("receptacletype", self.sinks),
            "heat": self._of_type("receptacletype", ("microwavetype",)),
            "cool": self._of_type("receptacletype", ("fridgetype",)),
        }
        self.knives = self._of_type("objecttype", ("knifetype", "butterknifetype"))
        self._fits: dict[tuple[str, str], tuple[str, str] | None] = {}
        self._commands: dict[tuple[str, Fact], tuple[str, Move]] = {}
        self._travel: dict[str, dict[str, Move]] = {}
        view = self.facts.with_changing({name: set(rows) for name, rows in self.start.items()})
        self.introduction = self.grammar.render("#intro#", view, {})
        self.task = self.grammar.render("#task#", view, {})
        self.won_at_start = self.goal(view, {})
        self.first_moves: tuple[dict[str, Move], tuple[str, ...]] | None = None

    def fit(self, thing: str, receptacle: str) -> tuple[str, str] | None:
        """Return the types by which ``receptacle`` can contain ``thing``, or None."""
        key = (thing, receptacle)
        if key not in self._fits:
            self._fits[key] = next(
                (
                    (kind, holder)
                    for _, kind in self.facts.rows("objecttype", (thing, None))
                    for _, holder in self.facts.rows("receptacletype", (receptacle, None))
                    if self.facts.rows("cancontain", (holder, kind))
                ),
                None,
            )
        return self._fits[key]

    def command(self, action: str, **bound: str) -> tuple[str, Move]:
        """Return how an action is typed here, and the move that it makes."""
        key = (action, tuple(bound.values()))
        if key not in self._commands:
            move = Move(action, {"a": self.agent, **bound})
            if action not in self.grammar.actions:
                raise DataError(f"the game's grammar has no action `{action}`")
            template = self.grammar.actions[action].template
            text = self.grammar.render(template, self.facts, dict(move.bound))
            self._commands[key] = (text, move)
        return self._commands[key]

    def travel(self, here: str) -> dict[str, Move]:
        """Return every ``go to`` command from ``here``."""
        if here not in self._travel:
            self._travel[here] = dict(
                self.command("gotolocation", lstart=here, lend=spot, r=receptacle)
                for spot, receptacles in self.receptacles.items()
                for receptacle in receptacles
                if spot != here
            )
        return self._travel[here]

    def _unary(self, name: str) -> frozenset[str]:
        return frozenset(row[0] for row in self.facts.rows(name, (None,)))

    def _of_type(self, name: str, kinds: Iterable[str]) -> frozenset[str]:
        return frozenset(row[0] for kind in kinds for row in self.facts.rows(name, (None, kind)))


class Household:
    """A game in play: ``begin``, ``admissible``, ``play``, ``won``, ``plan``, and its state."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._state: dict[str, set[Fact]] = {}
        self._facts = world.facts
        self._moves: dict[str, Move] | None = None
        self._listed: tuple[str, ...] | None = None
        self._won = False
        self.begin()

    @property
    def won(self) -> bool:
        """Whether the goal of the PDDL problem holds."""
        return self._won

    def begin(self) -> str:
        """Put everything back to the start and return the introduction with the task."""
        world = self.world
        self._set({name: set(rows) for name, rows in world.start.items()}, world.won_at_start)
        if world.first_moves is None:
            world.first_moves = (self._options(), self.admissible())
        self._moves, self._listed = world.first_moves
        return world.introduction

    def admissible(self) -> tuple[str, ...]:
        """Return the commands that do something now, sorted."""
        if self._listed is None:
            self._listed = tuple(sorted(self._options()))
        return self._listed

    def play(self, command: str) -> str | None:
        """Carry out a command and return the game's answer, or None if it is not admissible."""
        move = self._options().get(command.strip())
        if move is None:
            return None
        self._apply(move)
        if move.action not in _HARMLESS:
            self._moves = self._listed = None
        touched = _TOUCHED.get(move.action)
        if touched is None or not self.world.goal_predicates.isdisjoint(touched):
            self._won = self.world.goal(self._facts, {})
        feedback = self.world.grammar.actions[move.action].feedback
        return self.world.grammar.render(feedback, self._facts, dict(move.bound))

    def plan(self) -> tuple[str, ...] | None:
        """Return commands that win from here, or None where no plan is known (see ``planner``)."""
        commands = plan(self.world, self._state)
        if commands is None:
            return None
        trial = self.copy()
        done = [trial.play(command) for command in commands]
        return commands if trial.won and None not in done else None

    def state(self) -> dict[str, list[list[str]]]:
        """Return all that can change, as JSON data."""
        return {name: sorted(map(list, rows)) for name, rows in self._state.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to a state that ``state`` returned."""
        self._set({name: {tuple(row) for row in state[name]} for name in _CHANGING})

    def copy(self) -> Household:
        """Return an independent copy that shares the world."""
        other = Household(self.world)
        other._set({name: set(rows) for name, rows in self._state.items()}, self._won)
        return other

    def _set(self, state: dict[str, set[Fact]], won: bool | None = None) -> None:
        self._state = state
        self._facts = self.world.facts.with_changing(state)
        self._moves = self._listed = None
        self._won = self.world.goal(self._facts, {}) if won is None else won

    def _options(self) -> dict[str, Move]:
        """Return every admissible command and its move."""
        if self._moves is not None:
            return self._moves
        world, state = self.world, self._state
        ((agent, here),) = state["atlocation"]
        held = next((thing for holder, thing in state["holds"] if holder == agent), None)
        moves = dict(world.travel(here))
        found = [world.command("look", l=here), world.command("inventory")]
        if world.has_help:
            found.append(world.command("help"))
        if held is not None:
            found.append(world.command("examineobject", o=held))
        for receptacle in world.receptacles.get(here, ()):
            found.append(world.command("examinereceptacle", r=receptacle))
            closed = False
            if receptacle in world.openable:
                closed = (receptacle,) not in state["opened"]
                action = "openobject" if closed else "closeobject"
                found.append(world.command(action, l=here, r=receptacle))
            for thing, holder in state["inreceptacle"]:
                if holder != receptacle:
                    continue
                if held is None and not closed and thing in world.pickupable:
                    found.append(world.command("pickupobject", l=here, o=thing, r=receptacle))
                if thing in world.toggleable:
                    found.append(world.command("toggleobject", l=here, o=thing, r=receptacle))
            if held is None:
                continue
            fit = None if closed else world.fit(held, receptacle)
            if fit is not None:
                kind, holder = fit
                found.append(
                    world.command("putobject", l=here, o=held, r=receptacle, ot=kind, rt=holder)
                )
            for verb in ("clean", "heat", "cool"):
                if receptacle in world.appliance[verb] and held in world.can[verb]:
                    found.append(world.command(f"{verb}object", l=here, r=receptacle, o=held))
        if held in world.knives and held is not None:
            for thing, spot in state["objectatlocation"]:
                if spot == here and thing in world.sliceable:
                    found.append(world.command("sliceobject", l=here, co=thing, ko=held))
        moves.update(found)
        self._moves = moves
        return moves

    def _apply(self, move: Move) -> None:
        state, bound = self._state, move.bound
        agent = bound["a"]
        match move.action:
            case "look":
                state["checked"].add((bound["l"],))
            case "inventory" | "help":
                state["checked"].add((agent,))
            case "examinereceptacle":
                state["checked"].add((bound["r"],))
            case "examineobject":
                state["checked"].add((bound["o"],))
            case "gotolocation":
                state["atlocation"] = {(agent, bound["lend"])}
            case "openobject":
                state["opened"].add((bound["r"],))
                state["checked"].add((bound["r"],))
            case "closeobject":
                state["opened"].discard((bound["r"],))
            case "pickupobject":
                pair = (bound["o"], bound["r"])
                state["inreceptacle"].discard(pair)
                state["not_inreceptacle"].add(pair)
                state["holds"].add((agent, bound["o"]))
                state["holdsany"].add((agent,))
                state["objectatlocation"].discard((bound["o"], bound["l"]))
            case "putobject":
                pair = (bound["o"], bound["r"])
                state["inreceptacle"].add(pair)
                state["not_inreceptacle"].discard(pair)
                state["objectatlocation"].add((bound["o"], bound["l"]))
                state["holds"].discard((agent, bound["o"]))
                state["holdsany"].discard((agent,))
            case "cleanobject":
                state["isclean"].add((bound["o"],))
            case "heatobject":
                state["ishot"].add((bound["o"],))
                state["iscool"].discard((bound["o"],))
            case "coolobject":
                state["iscool"].add((bound["o"],))
                state["ishot"].discard((bound["o"],))
            case "toggleobject":
                state["ison"] ^= {(bound["o"],)}
                state["istoggled"].add((bound["o"],))
            case "sliceobject":
                state["issliced"].add((bound["co"],))


def task_line(grammar: str) -> str:
    """Return the sentence of a grammar that states the task.

    Raises:
        ValueError: the grammar has none.
    """
    return grammar[grammar.index("Your task is to: ") :].partition('"')[0]


def _names(rows: Iterable[Iterable[Fact]]) -> dict[str, str]:
    """Name every thing that a fact mentions: ``drawer 3``; the last id of a kind is number 1."""
    ids = sorted({term for facts in rows for fact in facts for term in fact})
    kinds = {}
    for thing in ids:
        kind, bar, _ = thing.partition("_bar_")
        if bar:
            kinds[thing] = kind + ("basin" if "basin" in thing else "")
    left = Counter(kinds.values())
    names = {}
    for thing in ids:
        if thing not in kinds:
            names[thing] = f"{thing} "
            continue
        kind = kinds[thing]
        names[thing] = f"{kind} {left[kind]}"
        left[kind] -= 1
    return names


def _check_domain(text: str) -> tuple[tuple[str, ...], bool]:
    """Return the types that clean, and whether there is a ``help`` action.

    An empty text means the engine's own rules, which generated games use.
    """
    if not text:
        return ("sinkbasintype",), True
    rules: list[Expression] = []
    clean, has_help = "", False
    for part in parse(text):
        name = part[1] if isinstance(part, list) and part[:1] == [":action"] else None
        if name == "help":
            has_help = True
        elif name == "cleanobject":
            clean = _digest(part)
        else:
            rules.append(part)
    if _digest(rules) != _RULES_DIGEST or clean not in _CLEAN_DIGESTS:
        raise NotCoveredError(
            f"the game's PDDL domain is not one that the native engine covers "
            f"(rules {_digest(rules)}, clean {clean or 'absent'})"
        )
    return _CLEAN_DIGESTS[clean], has_help


def _digest(expression: Expression) -> str:
    return hashlib.sha256(repr(expression).encode()).hexdigest()[:16]
