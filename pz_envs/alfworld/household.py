"""Procedural households: solvable games of all six task types, the same for the same number.

A household has two or three rooms with their furniture and things; a game places the things that
its task needs where the task is not yet done, and everything else at random where it belongs. A
record holds the problem, pz's own wording and the planner's walkthrough. ``write_game`` writes a
``game.tw-pddl`` that TextWorld's engine and alfworld load; it takes the domain and the grammar from
the installed alfworld package, since pz ships neither.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pz_envs.alfworld.native import Household, Record, World
from pz_envs.alfworld.wording import grammar_text
from pz_envs.errors import ConfigError, DataError
from pz_envs.files import write_atomic
from pz_envs.seeding import generator

TASK_TYPES: tuple[str, ...] = (
    "look_at_obj_in_light",
    "pick_and_place_simple",
    "pick_clean_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_two_obj_and_place",
)
"""The six task types."""

_ROOMS: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "kitchen": {
        "Fridge": (1, 1),
        "Microwave": (1, 1),
        "SinkBasin": (1, 1),
        "CounterTop": (1, 3),
        "Cabinet": (2, 6),
        "Drawer": (1, 4),
        "StoveBurner": (2, 4),
        "DiningTable": (0, 1),
        "CoffeeMachine": (0, 1),
        "Toaster": (0, 1),
        "GarbageCan": (1, 1),
    },
    "living room": {
        "Sofa": (1, 1),
        "ArmChair": (0, 2),
        "CoffeeTable": (1, 1),
        "SideTable": (1, 2),
        "TVStand": (0, 1),
        "Shelf": (0, 3),
    },
    "bedroom": {
        "Bed": (1, 1),
        "Desk": (1, 1),
        "Dresser": (0, 1),
        "SideTable": (0, 2),
        "Drawer": (1, 4),
        "Safe": (0, 1),
        "LaundryHamper": (0, 1),
    },
    "bathroom": {
        "SinkBasin": (1, 2),
        "BathtubBasin": (0, 1),
        "Toilet": (1, 1),
        "CounterTop": (1, 1),
        "Cabinet": (1, 3),
        "TowelHolder": (1, 2),
        "GarbageCan": (1, 1),
    },
}
_OPENABLE = ("Fridge", "Microwave", "Cabinet", "Drawer", "Safe")
_APPLIANCE = {"cool": "Fridge", "heat": "Microwave", "clean": "SinkBasin"}
_IDS = {"SinkBasin": "Sink_bar_{}_bar_SinkBasin", "BathtubBasin": "Bathtub_bar_{}_bar_BathtubBasin"}

_TABLES = "DiningTable CoffeeTable SideTable Desk CounterTop"
_STORAGE = "Cabinet Drawer Shelf"
_FOOD = "Fridge Microwave SinkBasin DiningTable CounterTop GarbageCan"
_DISHES = f"Fridge Microwave SinkBasin {_TABLES} Cabinet Shelf"
_CUTLERY = "SinkBasin DiningTable SideTable CounterTop Drawer"
_SMALL = f"{_TABLES} {_STORAGE} Dresser Sofa ArmChair TVStand"
_TOILETRY = "SinkBasin CounterTop Toilet Cabinet Drawer Shelf GarbageCan BathtubBasin"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of thing: where it can be, and what can be done with it."""

    places: tuple[str, ...]
    treatments: tuple[str, ...] = ()
    sliceable: bool = False
    lamp: bool = False


def _kinds() -> dict[str, Kind]:
    """Return every kind of thing by name."""
    groups: tuple[tuple[str, str, str, bool], ...] = (
        ("Apple Tomato Potato", _FOOD, "clean heat cool", True),
        ("Lettuce", _FOOD, "clean cool", True),
        ("Bread", _FOOD, "heat cool", True),
        ("Egg", _FOOD, "clean heat cool", False),
        ("Mug Cup", f"{_DISHES} CoffeeMachine", "clean heat cool", False),
        ("Plate", _DISHES, "clean heat cool", False),
        ("Bowl", f"{_DISHES} Dresser", "clean cool", False),
        ("Pan Pot", f"StoveBurner Cabinet {_FOOD}".replace("Microwave ", ""), "clean cool", False),
        ("Kettle", "StoveBurner SinkBasin CounterTop DiningTable Cabinet", "clean", False),
        ("WineBottle", "Fridge CounterTop DiningTable Cabinet GarbageCan", "cool", False),
        ("Fork Spoon Knife ButterKnife Ladle Spatula", _CUTLERY, "clean", False),
        ("SaltShaker PepperShaker", "CounterTop DiningTable Cabinet Drawer Shelf", "", False),
        ("DishSponge Cloth SoapBar", _TOILETRY, "clean", False),
        ("SoapBottle SprayBottle ToiletPaper Candle", _TOILETRY, "", False),
        ("HandTowel", "TowelHolder CounterTop BathtubBasin", "", False),
        ("Book Laptop CellPhone", f"{_SMALL} Bed", "", False),
        ("Pen Pencil CD AlarmClock", "Desk SideTable Shelf Drawer Dresser", "", False),
        ("KeyChain CreditCard Watch", f"{_SMALL} Safe", "", False),
        ("RemoteControl Newspaper", f"{_SMALL} GarbageCan", "", False),
        ("Box Statue Vase", "CoffeeTable SideTable Desk Shelf Dresser Safe TVStand", "", False),
        ("Pillow TeddyBear", "Bed Sofa ArmChair", "", False),
        ("Towel", "TowelHolder LaundryHamper Bed", "", False),
    )
    kinds = {
        name: Kind(tuple(places.split()), tuple(verbs.split()), sliceable)
        for names, places, verbs, sliceable in groups
        for name in names.split()
    }
    return kinds | {"DeskLamp": Kind(("Desk", "SideTable", "Dresser"), lamp=True)}


KINDS: Mapping[str, Kind] = _kinds()
"""Every kind of thing in a generated household."""


def generate(task_type: str, split: str, number: int) -> Record:
    """Return game ``number`` of a split; different splits never share a seed.

    Raises:
        ConfigError: no such task type.
    """
    if task_type not in TASK_TYPES:
        raise ConfigError(f"task_type={task_type!r}: allowed are {', '.join(TASK_TYPES)}")
    rng = generator("alfworld household", split, task_type, number)
    kind, target, furniture = _task(rng, task_type)
    receptacles = [name for name in furniture for _ in range(furniture[name])]
    places = _numbered(receptacles)
    things = _things(rng, task_type, kind, target, places)
    problem = _problem(_goal(task_type, kind, target), places, things)
    grammar = grammar_text(_sentence(task_type, kind.lower(), target.lower()))
    walkthrough = Household(World("", problem, grammar)).plan()
    if not walkthrough:
        raise DataError(f"generated game {number} of {split}, {task_type}, has no solution")
    return Record("", problem, grammar, walkthrough)


def with_original_texts(record: Record) -> Record:
    """Return a generated game with the domain and the grammar of the installed alfworld package.

    Raises:
        ConfigError: alfworld is not installed.
    """
    spec = importlib.util.find_spec("alfworld")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "`alfworld`, whose domain and grammar a game file needs, is not installed. "
            "Install it: pip install --no-deps alfworld==0.4.2"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data"
    grammar = (folder / "alfred.twl2").read_text(encoding="utf-8")
    grammar = grammar.replace("Your task is to: UNKNOWN GOAL.", record.task)
    domain = (folder / "alfred.pddl").read_text(encoding="utf-8")
    return Record(domain, record.problem, grammar, record.walkthrough)


def write_game(path: Path | str, record: Record) -> None:
    """Write a game as a ``game.tw-pddl`` file that TextWorld's engine and alfworld can load.

    A generated game gets the domain and the grammar of the installed alfworld package.

    Raises:
        ConfigError: alfworld is not installed.
    """
    full = record if record.domain else with_original_texts(record)
    content = {
        "pddl_domain": full.domain,
        "grammar": full.grammar,
        "pddl_problem": full.problem,
        "solvable": True,
        "walkthrough": list(full.walkthrough),
    }
    write_atomic(path, json.dumps(content))


def _task(rng: np.random.Generator, task_type: str) -> tuple[str, str, dict[str, int]]:
    """Choose what the task is about, where it goes, and the furniture; all of it fits together."""
    verb = task_type.split("_")[1]
    while True:
        count = int(rng.integers(2, 4))
        rooms = [str(room) for room in rng.permutation(sorted(_ROOMS))[:count]]
        furniture: dict[str, int] = {}
        for room in rooms:
            for name, (least, most) in _ROOMS[room].items():
                furniture[name] = furniture.get(name, 0) + int(rng.integers(least, most + 1))
        furniture = {name: number for name, number in furniture.items() if number}
        if verb in _APPLIANCE and _APPLIANCE[verb] not in furniture:
            continue
        choices = [
            (name, target)
            for name, kind in KINDS.items()
            if verb not in _APPLIANCE or verb in kind.treatments
            for target in _targets(task_type, kind)
            if target in furniture and furniture.keys() & set(kind.places) - {target}
        ]
        names = sorted({name for name, _ in choices if not KINDS[name].lamp})
        if names and (task_type != TASK_TYPES[0] or furniture.keys() & KINDS["DeskLamp"].places):
            kind = names[int(rng.integers(len(names)))]
            targets = [target for name, target in choices if name == kind]
            return kind, targets[int(rng.integers(len(targets)))], furniture


def _targets(task_type: str, kind: Kind) -> Iterable[str]:
    """Return where a task may want a thing: not in the appliance that treats it anyway."""
    appliance = _APPLIANCE.get(task_type.split("_")[1])
    return [place for place in kind.places if place != appliance]


def _things(
    rng: np.random.Generator, task_type: str, kind: str, target: str, places: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    """Return the kind and the receptacle of every thing; the task's own are not yet in place."""
    by_kind: dict[str, list[str]] = {}
    for receptacle, name in places.items():
        by_kind.setdefault(name, []).append(receptacle)
    found: list[tuple[str, str]] = []

    def place(name: str, number: int, avoid: str = "") -> None:
        choices = [r for p in KINDS[name].places if p != avoid for r in by_kind.get(p, ())]
        for _ in range(number if choices else 0):
            found.append((name, choices[int(rng.integers(len(choices)))]))

    look = task_type == "look_at_obj_in_light"
    least = 2 if task_type == "pick_two_obj_and_place" else 1
    place(kind, least + int(rng.integers(2)), "" if look else target)
    for name in sorted(KINDS):
        if name == kind:
            continue
        if KINDS[name].lamp:
            place(name, int(look or rng.random() < 0.4))
        else:
            place(name, int(rng.binomial(2, 0.4)))
    ids = _numbered([name for name, _ in found])
    return {
        thing: (name, receptacle)
        for (thing, name), (_, receptacle) in zip(ids.items(), found, strict=True)
    }


def _numbered(names: Iterable[str]) -> dict[str, str]:
    """Give every name of a list an id in the form that the game files use, and keep the name."""
    ids: dict[str, str] = {}
    counts: dict[str, int] = {}
    for name in names:
        number = counts[name] = counts.get(name, -1) + 1
        ids[_IDS.get(name, f"{name}_bar_{{}}").format(f"{number:02d}")] = name
    return ids


def _sentence(task_type: str, kind: str, target: str) -> str:
    match task_type.split("_")[1]:
        case "at":
            return f"look at {kind} under the desklamp"
        case "and":
            return f"put some {kind} on {target}"
        case "two":
            return f"put two {kind} in {target}"
        case verb:
            return f"{verb} some {kind} and put it in {target}"


def _goal(task_type: str, kind: str, target: str) -> str:
    match task_type.split("_")[1]:
        case "at":
            return (
                "(and (exists (?t - object ?r - receptacle ?a - agent ?l - location) (and "
                "(objectType ?t DeskLampType) (isToggled ?t) (inReceptacle ?t ?r) "
                "(receptacleAtLocation ?r ?l) (atLocation ?a ?l))) "
                f"(exists (?o - object ?a - agent) (and (objectType ?o {kind}Type) (holds ?a ?o))))"
            )
        case "two":
            return (
                f"(exists (?r - receptacle ?o - object ?p - object) (and "
                f"(receptacleType ?r {target}Type) (objectType ?o {kind}Type) "
                f"(objectType ?p {kind}Type) (not (= ?o ?p)) (inReceptacle ?o ?r) "
                "(inReceptacle ?p ?r)))"
            )
        case verb:
            state = {"clean": "(isClean ?o)", "heat": "(isHot ?o)", "cool": "(isCool ?o)"}
            return (
                f"(exists (?r - receptacle ?o - object) (and (receptacleType ?r {target}Type) "
                f"(objectType ?o {kind}Type) (inReceptacle ?o ?r) {state.get(verb, '')}))"
            )


def _problem(goal: str, places: Mapping[str, str], things: Mapping[str, tuple[str, str]]) -> str:
    """Write the PDDL problem; every receptacle stands at a spot of its own."""
    spots = {receptacle: f"loc_bar_{number:02d}" for number, receptacle in enumerate(places, 1)}
    furniture = sorted({*places.values(), "SinkBasin", "Microwave", "Fridge"})
    kinds = sorted({*(kind for kind, _ in things.values()), "Knife", "ButterKnife"})
    objects = ["agent1 - agent", "loc_bar_00 - location"]
    objects += [f"{name}Type - rtype" for name in furniture]
    objects += [f"{name}Type - otype" for name in kinds]
    objects += [f"{spot} - location" for spot in spots.values()]
    objects += [f"{name} - receptacle" for name in places]
    objects += [f"{name} - object" for name in things]
    facts = ["= (total-cost) 0", "atLocation agent1 loc_bar_00"]
    for name in furniture:
        facts += [f"canContain {name}Type {k}Type" for k in kinds if name in KINDS[k].places]
    for receptacle, name in places.items():
        facts.append(f"receptacleType {receptacle} {name}Type")
        facts.append(f"receptacleAtLocation {receptacle} {spots[receptacle]}")
        if name in _OPENABLE:
            facts.append(f"openable {receptacle}")
    for thing, (name, receptacle) in things.items():
        kind = KINDS[name]
        facts.append(f"objectType {thing} {name}Type")
        facts.append(f"inReceptacle {thing} {receptacle}")
        facts.append(f"objectAtLocation {thing} {spots[receptacle]}")
        facts.append(f"{'toggleable' if kind.lamp else 'pickupable'} {thing}")
        facts += [f"{verb}able {thing}" for verb in kind.treatments]
        if kind.sliceable:
            facts.append(f"sliceable {thing}")
    listed = "\n".join(f"({fact})" for fact in facts)
    return (
        f"(define (problem household)\n(:domain alfred)\n(:objects\n{chr(10).join(objects)}\n)\n"
        f"(:init\n{listed}\n)\n(:goal {goal}))\n"
    )
