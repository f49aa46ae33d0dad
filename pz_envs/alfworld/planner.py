"""An expert for any state of a household: the shortest plan of a fixed shape that meets the goal.

A goal is read as the things that must be somewhere, in hand, clean, hot, cool or switched on; every
choice of things and places that the game allows is drafted (fetch each, treat it, bring it, then
the lamps) and the shortest draft is the plan. A plan's rest is itself such a plan, so that planning
anew after every command leads to the goal. Goals of all six task types have this form; for any
other, and where nothing can meet the goal, there is no plan. The planner sees into closed places.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pz_envs.alfworld.pddl import Existential, Fact, read_existential

if TYPE_CHECKING:
    from pz_envs.alfworld.native import World

_TREATMENTS = {"isclean": "clean", "ishot": "heat", "iscool": "cool"}
_WISHES = frozenset(("inreceptacle", "holds", "istoggled", "atlocation", *_TREATMENTS))
_Bound = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Job:
    """What one thing needs: treatments that are missing, and where it goes (None: the hand)."""

    thing: str
    treatments: tuple[str, ...]
    target: str | None


class _Draft:
    """A plan under construction and the part of the state that it changes."""

    def __init__(self, world: World, state: Mapping[str, set[Fact]]) -> None:
        self.world = world
        ((_, self.here),) = state["atlocation"]
        self.held = next((thing for _, thing in state["holds"]), None)
        self.opened = {row[0] for row in state["opened"]}
        self.where = {thing: receptacle for thing, receptacle in sorted(state["inreceptacle"])}
        self.moves: list[tuple[str, dict[str, str]]] = []

    def copy(self) -> _Draft:
        other = _Draft.__new__(_Draft)
        other.world, other.here, other.held = self.world, self.here, self.held
        other.opened, other.where = set(self.opened), dict(self.where)
        other.moves = list(self.moves)
        return other

    def cost(self, receptacle: str) -> int:
        """Return how many commands it takes until things can be put into ``receptacle``."""
        closed = receptacle in self.world.openable and receptacle not in self.opened
        return (self.world.place[receptacle] != self.here) + closed

    def go(self, receptacle: str) -> None:
        spot = self.world.place[receptacle]
        if spot != self.here:
            self.moves.append(
                ("gotolocation", {"lstart": self.here, "lend": spot, "r": receptacle})
            )
            self.here = spot

    def open(self, receptacle: str) -> None:
        self.go(receptacle)
        if receptacle in self.world.openable and receptacle not in self.opened:
            self.moves.append(("openobject", {"l": self.here, "r": receptacle}))
            self.opened.add(receptacle)

    def put(self, receptacle: str) -> None:
        """Put what is held into a receptacle that can contain it."""
        thing = self.held
        assert thing is not None
        fit = self.world.fit(thing, receptacle)
        assert fit is not None
        self.open(receptacle)
        bound = {"l": self.here, "o": thing, "r": receptacle, "ot": fit[0], "rt": fit[1]}
        self.moves.append(("putobject", bound))
        self.where[thing] = receptacle
        self.held = None

    def take(self, thing: str) -> bool:
        """Take a thing, putting down first what is in the way; False where it cannot be taken."""
        if self.held == thing:
            return True
        receptacle = self.where.get(thing)
        if receptacle is None or thing not in self.world.pickupable:
            return False
        if self.held is not None and not self._free_hand(receptacle):
            return False
        self.open(receptacle)
        self.moves.append(("pickupobject", {"l": self.here, "o": thing, "r": receptacle}))
        self.held = thing
        del self.where[thing]
        return True

    def treat(self, verb: str) -> bool:
        """Clean, heat or cool what is held; False where the household has nothing to do it with."""
        appliances = sorted(self.world.appliance[verb] & self.world.place.keys())
        if self.held not in self.world.can[verb] or not appliances:
            return False
        nearest = min(appliances, key=lambda name: self.world.place[name] != self.here)
        self.go(nearest)
        bound = {"l": self.here, "r": nearest, "o": self.held}
        self.moves.append((f"{verb}object", bound))
        return True

    def switch(self, lamp: str) -> bool:
        receptacle = self.where.get(lamp)
        if receptacle is None or lamp not in self.world.toggleable:
            return False
        self.go(receptacle)
        self.moves.append(("toggleobject", {"l": self.here, "o": lamp, "r": receptacle}))
        return True

    def _free_hand(self, towards: str) -> bool:
        """Put what is held into the nearest receptacle, one on the way where there is a choice."""
        assert self.held is not None
        goal = self.world.place[towards]
        fitting = [r for r in self.world.place if self.world.fit(self.held, r) is not None]
        if not fitting:
            return False
        self.put(min(fitting, key=lambda r: (self.cost(r), self.world.place[r] != goal, r)))
        return True


def plan(world: World, state: Mapping[str, set[Fact]]) -> tuple[str, ...] | None:
    """Return the commands that meet the goal of ``world`` from ``state``, or None.

    Args:
        world: the game.
        state: its changing facts by predicate, as ``Household`` keeps them.
    """
    goal = read_existential(world.formula)
    if goal is None:
        return None
    start = _Draft(world, state)
    best: list[tuple[str, dict[str, str]]] | None = None
    for bound in _assignments(world, start, goal):
        for draft in _drafts(state, start, goal, bound):
            if best is None or len(draft.moves) < len(best):
                best = draft.moves
    if best is None:
        return None
    return tuple(world.command(action, **arguments)[0] for action, arguments in best)


def _assignments(world: World, start: _Draft, goal: Existential) -> Iterator[_Bound]:
    """Yield things and receptacles for the goal's variables that its unchanging facts allow."""
    choices: dict[str, list[str]] = {}
    for variable, kind in goal.variables.items():
        if kind not in ("object", "receptacle"):
            continue
        found = sorted(world.place) if kind == "receptacle" else sorted(world.things)
        for name, terms in goal.atoms:
            if name in _WISHES or terms[0] != variable or goal.variables.keys() & terms[1:]:
                continue
            found = [thing for thing in found if world.facts.holds(name, (thing, *terms[1:]))]
        choices[variable] = found
    inside = [terms for name, terms in goal.atoms if name == "inreceptacle"]
    for values in itertools.product(*choices.values()):
        bound = dict(zip(choices, values, strict=True))
        if any(bound.get(a, a) == bound.get(b, b) for a, b in goal.unequal):
            continue
        if all(_can_be(start, bound.get(o, o), bound.get(r, r)) for o, r in inside):
            yield bound


def _can_be(start: _Draft, thing: str, receptacle: str) -> bool:
    if start.where.get(thing) == receptacle:
        return True
    return thing in start.world.pickupable and start.world.fit(thing, receptacle) is not None


def _drafts(
    state: Mapping[str, set[Fact]], start: _Draft, goal: Existential, bound: _Bound
) -> Iterator[_Draft]:
    """Yield a draft for every order of the jobs that ``bound`` means."""
    targets: dict[str, str | None] = {}
    treatments: dict[str, list[str]] = {}
    lamps: list[str] = []
    for name, terms in goal.atoms:
        thing, *rest = (bound.get(term, term) for term in terms)
        if name == "inreceptacle":
            targets[thing] = rest[0]
        elif name == "holds":
            targets[rest[0]] = None
        elif name == "istoggled" and (thing,) not in state[name]:
            lamps.append(thing)
        elif name in _TREATMENTS and (thing,) not in state[name]:
            treatments.setdefault(thing, []).append(_TREATMENTS[name])
    jobs = []
    for thing, target in ({thing: None for thing in treatments} | targets).items():
        there = start.held == thing if target is None else start.where.get(thing) == target
        if thing in treatments or not there:
            jobs.append(_Job(thing, tuple(treatments.get(thing, ())), target))
    last = [job for job in jobs if job.target is None]
    end = _end(goal, bound)
    for order in itertools.permutations([job for job in jobs if job.target is not None]):
        draft = start.copy()
        if all(_do(draft, job) for job in (*order, *last)) and all(map(draft.switch, lamps)):
            if end is not None:
                draft.go(end)
            yield draft


def _do(draft: _Draft, job: _Job) -> bool:
    if not draft.take(job.thing) or not all(map(draft.treat, job.treatments)):
        return False
    if job.target is not None:
        draft.put(job.target)
    return True


def _end(goal: Existential, bound: _Bound) -> str | None:
    """Return the receptacle where the agent must be at the end, if the goal names one."""
    spots = {terms[1] for name, terms in goal.atoms if name == "atlocation"}
    for name, terms in goal.atoms:
        if name == "receptacleatlocation" and terms[1] in spots:
            return bound.get(terms[0], terms[0])
    return None
