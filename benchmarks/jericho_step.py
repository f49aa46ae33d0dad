"""Wrapper step over raw jericho step, interleaved in one run, so that only the ratio matters.

Every game is played along its walkthrough by four players that take turns in short blocks: jericho
itself, ``Engine`` alone, ``JerichoEnv`` in process and ``JerichoEnv`` isolated, in an order that
rotates. In process a block's time is this thread's CPU time, isolated it is the wall clock's (over
raw's wall clock); of all rounds the least counts, which keeps other programs out. The figure is
the ratio of the sums. Goal: at most 1.05 in process where a raw step costs 100 µs or more.
Run: ``python benchmarks/jericho_step.py [game ...]``
"""

from __future__ import annotations

import collections
import math
import statistics
import sys
import time
from collections.abc import Callable

import jericho

from pz_envs import datasets
from pz_envs.jericho.engine import Engine
from pz_envs.jericho.env import JerichoEnv
from pz_envs.jericho.games import find_game

GAMES = ("zork1", "inhumane", "pentari", "detective", "905", "library", "anchor", "lostpig")
BLOCK = 20
SECONDS = 4.0

Player = tuple[Callable[[], object], Callable[[str], object]]


def players(name: str) -> tuple[list[str], dict[str, Player], JerichoEnv]:
    """Return the walkthrough's first part, how each player resets and steps, and the env to close.

    Raises:
        SystemExit: the story file is not here.
    """
    game = find_game(name)
    story = datasets.find_story(game.md5)
    if story is None:
        raise SystemExit(f"no story file of {name}; set PZ_DATA")
    raw = jericho.FrotzEnv(str(story))
    engine = Engine(str(story), game.md5)
    inside = JerichoEnv(name, isolated=False)
    isolated = JerichoEnv(name)
    options = {"expert": True}
    ways: dict[str, Player] = {
        "raw": (raw.reset, raw.step),
        "engine": (lambda: engine.start(0, expert=True), engine.step),
        "in process": (lambda: inside.reset(options=options), inside.step),
        "isolated": (lambda: isolated.reset(options=options), isolated.step),
    }
    commands = [command.strip() for command in raw.get_walkthrough()]
    usable = commands.index("") if "" in commands else len(commands) - 1
    return commands[: usable - usable % BLOCK], ways, isolated


def measure(name: str) -> tuple[float, dict[str, float]]:
    """Return the raw step's microseconds, and every player's ratio to it."""
    commands, ways, isolated = players(name)
    starts = range(0, len(commands), BLOCK)
    least = {way: dict.fromkeys(starts, math.inf) for way in (*ways, "raw wall")}
    end = time.perf_counter() + SECONDS
    rounds = 0
    while time.perf_counter() < end or rounds < 5:
        rounds += 1
        for reset, _ in ways.values():
            reset()
        order = collections.deque(ways.items())
        order.rotate(rounds)
        for start in starts:
            order.rotate()
            for way, (_, step) in order:
                wall, own = time.perf_counter(), time.thread_time()
                for command in commands[start : start + BLOCK]:
                    step(command)
                own, wall = time.thread_time() - own, time.perf_counter() - wall
                took = wall if way == "isolated" else own
                least[way][start] = min(least[way][start], took)
                if way == "raw":
                    least["raw wall"][start] = min(least["raw wall"][start], wall)
    isolated.close()
    sums = {way: sum(blocks.values()) for way, blocks in least.items()}
    return sums["raw"] / len(commands) * 1e6, {
        way: took / sums["raw"] for way, took in sums.items()
    }


def main() -> None:
    """Print the table; also what starting an isolated engine costs."""
    print("game         raw µs/step    engine  in process  isolated   (ratio to raw)")
    for name in sys.argv[1:] or GAMES:
        raw_us, ratio = measure(name)
        print(
            f"{name:12} {raw_us:11.0f} {ratio['engine']:9.3f} {ratio['in process']:11.3f} "
            f"{ratio['isolated']:9.2f}"
        )
    env = JerichoEnv("zork1" if len(sys.argv) < 2 else sys.argv[1])
    starts = []
    for _ in range(5):
        began = time.perf_counter()
        env.reset()
        starts.append(time.perf_counter() - began)
        env.close()
    print(f"start of an isolated engine and first reset: {statistics.median(starts):.3f} s")


if __name__ == "__main__":
    main()
