"""Steps a second in TextWorld games: TextWorld's own engine, and ours in process and isolated.

All play the same commands on the same story files, in blocks taken in turn, in an order that
rotates. In process a block's time is this thread's CPU time, isolated it is the wall clock's (over
the stock engine's wall clock); of all blocks the least counts, which keeps other programs out.
Goal: at most 1.1 in process. Run: ``python benchmarks/textworld_step.py [--blocks 60]``
"""

from __future__ import annotations

import argparse
import collections
import math
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import textworld

from pz_envs.textworld.env import TextWorldEnv
from pz_envs.textworld.games import Options, prepare

_COMMANDS = (
    *("look", "inventory", "go north", "go south", "go east", "go west", "examine cookbook"),
    *("open fridge", "take coin from table", "dance", "drop knife", "go north", "take knife"),
)


def _stock(path: Path, listing: bool) -> Callable[[], None]:
    infos = textworld.EnvInfos(
        feedback=True, score=True, won=True, lost=True, admissible_commands=listing
    )
    env = textworld.start(str(path), infos)
    env.reset()

    def block() -> None:
        for command in _COMMANDS:
            _, _, done = env.step(command)
            if done:
                env.reset()

    return block


def _ours(path: Path, listing: bool, isolated: bool) -> Callable[[], None]:
    env = TextWorldEnv(game=path, admissible_commands=listing, isolated=isolated)
    env.reset(seed=0)

    def block() -> None:
        for command in _COMMANDS:
            if env.step(command)[2]:
                env.reset(seed=0)

    return block


def _measure(blocks: dict[str, Callable[[], None]], count: int) -> dict[str, float]:
    """Return the least microseconds a step of every block, and of the stock one by the wall."""
    least = dict.fromkeys((*blocks, "stock wall"), math.inf)
    order = collections.deque(blocks.items())
    for _ in range(count):
        order.rotate()
        for name, block in order:
            wall, own = time.perf_counter(), time.thread_time()
            block()
            own, wall = time.thread_time() - own, time.perf_counter() - wall
            least[name] = min(least[name], wall if name == "isolated" else own)
            if name == "stock":
                least["stock wall"] = min(least["stock wall"], wall)
    return {name: value / len(_COMMANDS) * 1e6 for name, value in least.items()}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=60)
    count = parser.parse_args().blocks
    print(f"{'game':10} {'commands':9} {'textworld':>12} {'in process':>17} {'isolated':>17}")
    with tempfile.TemporaryDirectory() as folder:
        for challenge in ("coin", "treasure", "cooking"):
            options: Any = Options(challenge, "train", None, (1, 3), 6, ("take", "cook"), False)
            path = Path(folder) / f"{challenge}.z8"
            with zipfile.ZipFile(prepare(options.spec(0))) as archive:
                path.write_bytes(archive.read("game.z8"))
                path.with_suffix(".json").write_bytes(archive.read("game.json"))
            for listing in (False, True):
                found = _measure(
                    {
                        "stock": _stock(path, listing),
                        "in process": _ours(path, listing, False),
                        "isolated": _ours(path, listing, True),
                    },
                    count,
                )
                stock, ours, isolated, wall = found.values()
                print(
                    f"{challenge:10} {'listed' if listing else '-':9} {1e6 / stock:8.0f} /s "
                    f"{1e6 / ours:8.0f} /s {ours / stock:4.2f}x "
                    f"{1e6 / isolated:8.0f} /s {isolated / wall:4.2f}x"
                )


if __name__ == "__main__":
    main()
