"""Write ``golden_alfworld.json.gz``: transcripts of the reference engine that the tests replay.

Run it in an environment of its own, where the reference is installed::

    pip install --no-deps textworld==1.7.0 alfworld==0.4.2 fast-downward-textworld==20.6.4
    pip install numpy networkx more_itertools tatsu==5.8.3 hashids mementos prompt_toolkit tqdm
    python make_alfworld_golden.py GAMES_FOLDER OLD_DATA_FOLDER golden_alfworld.json.gz

``GAMES_FOLDER`` holds unpacked ``game.tw-pddl`` files, ``OLD_DATA_FOLDER`` the ``alfred.pddl`` and
``alfred.twl2`` of an alfworld 0.3 wheel, whose grammar says "put X in/on Y". Only what was typed
and answered goes into the file; the tests read the games from the data folder.
"""

from __future__ import annotations

import gzip
import importlib
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

_TASK = re.compile(r"Your task is to: [^\"]*")
_ODD = ("look around", "Look", " look ", "examine fridge 99", "xyzzy", "go to", "help", "inventory")
_STEPS = 30
_FOOD = "(apple|tomato|lettuce|potato|bread)"
_COOKING = (
    "take (butter)?knife",
    "slice",
    "(move|put) (butter)?knife",
    f"take {_FOOD}",
    *(
        f"{verb} {_FOOD}"
        for step in ("heat", "cool", "clean", "heat")
        for verb in (step, "examine")
    ),
)
_COOKING_STEPS = 120


def main(games: Path, old: Path, target: Path, per_type: int, seed: int) -> None:
    """Play ``per_type`` games of each task type, by walkthrough and at random, and write all."""
    rng = random.Random(seed)
    by_type: dict[str, list[Path]] = {}
    for path in sorted(games.rglob("game.tw-pddl")):
        by_type.setdefault(path.parts[-3].split("-")[0], []).append(path)
    records = []
    for paths in by_type.values():
        for number, path in enumerate(rng.sample(paths, per_type)):
            data = json.loads(path.read_text())
            older = number % 3 == 2
            if older:
                data = _with_old_grammar(data, old)
            plays = [_play(data, data["walkthrough"]), _play(data, _random_commands(rng))]
            if number == 0 and path.parts[-3].startswith("pick_heat"):
                plays.append(_play(data, _cooking_commands()))
            name = "/".join(path.parts[-4:-1])
            records.append({"id": name, "older": older, "plays": plays})
    payload = json.dumps({"games": records}, separators=(",", ":"))
    target.write_bytes(gzip.compress(payload.encode(), 9, mtime=0))


def _with_old_grammar(data: dict[str, Any], old: Path) -> dict[str, Any]:
    """Return the same game under the older domain and grammar."""
    task = _TASK.search(data["grammar"])
    if task is None:
        raise ValueError("the grammar states no task")
    grammar = (old / "alfred.twl2").read_text()
    grammar = grammar.replace("Your task is to: UNKNOWN GOAL.", task.group())
    walkthrough = [re.sub(r"^move (.*) to ", r"put \1 in/on ", c) for c in data["walkthrough"]]
    domain = (old / "alfred.pddl").read_text()
    return data | {"grammar": grammar, "pddl_domain": domain, "walkthrough": walkthrough}


def _random_commands(rng: random.Random) -> Any:
    """Return a policy: a random kind of command, then one of it; sometimes an odd one."""

    def choose(step: int, admissible: list[str]) -> str | None:
        if step >= _STEPS:
            return None
        if rng.random() < 0.08:
            return rng.choice(_ODD)
        kinds: dict[str, list[str]] = {}
        for command in admissible:
            kinds.setdefault(command.split()[0], []).append(command)
        for kind in ("take", "move", "put", "heat", "cool", "clean", "slice", "use", "open"):
            if kind in kinds and rng.random() < 0.35:
                return rng.choice(kinds[kind])
        return rng.choice(kinds[rng.choice(sorted(kinds))])

    return choose


def _cooking_commands() -> Any:
    """Return a policy that slices something, then heats, cools and cleans it, examining it."""
    wanted, visits, opened = list(_COOKING), 0, set()

    def choose(step: int, admissible: list[str]) -> str | None:
        nonlocal visits
        if step >= _COOKING_STEPS or not wanted:
            return None
        for command in admissible:
            if re.match(wanted[0], command):
                wanted.pop(0)
                return command
        for command in admissible:
            if command.startswith("open") and command not in opened:
                opened.add(command)
                return command
        visits += 1
        places = [command for command in admissible if command.startswith("go to")]
        return places[visits % len(places)]

    return choose


def _play(data: dict[str, Any], policy: Any) -> list[list[Any]]:
    """Return ``[command, observation, admissible commands, won]`` of the start and every step."""
    core = importlib.import_module("textworld.core")
    pddl = importlib.import_module("textworld.envs.pddl")
    alfred = importlib.import_module("alfworld.agents.environment.alfred_tw_env")
    infos = core.EnvInfos(won=True, admissible_commands=True)
    env = alfred.AlfredDemangler(pddl.PddlEnv(infos))
    env.load(data)
    state = env.reset()
    events = [["", state["feedback"], state["admissible_commands"], bool(state["won"])]]
    while not state["won"]:
        step = len(events) - 1
        if callable(policy):
            command = policy(step, state["admissible_commands"])
        else:
            command = policy[step] if step < len(policy) else None
        if command is None:
            break
        state, _, _ = env.step(command)
        events.append(
            [command, state["feedback"], state["admissible_commands"], bool(state["won"])]
        )
    return events


if __name__ == "__main__":
    _games, _old, _target = map(Path, sys.argv[1:4])
    main(_games, _old, _target, per_type=3, seed=11)
