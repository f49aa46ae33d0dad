"""Makes one TextWorld game in a process of its own: ``python generate.py SPEC FOLDER``.

Started by ``games.build``, never imported. TextWorld prints, patches modules, draws from global
generators, and lets the order of sets and of folder listings decide what a game is: so the process
is fresh, ``PYTHONHASHSEED`` is fixed by the caller, and listings are sorted here. A game counts
only when its own walkthrough wins it; a seed whose game fails is passed over for the next, always
in the same way. The result is ``game.z8`` and ``game.json`` in FOLDER, without the compile date.
"""

from __future__ import annotations

import glob
import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

_ATTEMPTS = 20
_ATTEMPT_STRIDE = 10_000_000
_SERIAL = slice(0x12, 0x18)  # the header's compile date; the checksum leaves the header out


def _won_with(textworld: Any, story: str, walkthrough: list[str]) -> list[str]:
    """Return the part of the walkthrough that wins, or raise ``ValueError``."""
    env = textworld.start(story, textworld.EnvInfos(won=True, lost=True))
    env.reset()
    for number, command in enumerate(walkthrough, start=1):
        state, _, done = env.step(command)
        if state["won"]:
            return walkthrough[:number]
        if done:
            break
    raise ValueError("the walkthrough does not win")


def _make(textworld: Any, spec: dict[str, Any], seed: int, folder: Path) -> None:
    challenges = importlib.import_module("textworld.challenges").CHALLENGES
    options = textworld.GameOptions()
    options.seeds = seed
    options.grammar.only_last_action = not spec["route"]
    options.path = str(folder / "game.z8")
    options.force_recompile = True
    game = challenges[spec["generator"]][1](dict(spec["settings"]), options)
    story = Path(textworld.generator.compile_game(game, options))
    game.metadata["walkthrough"] = _won_with(textworld, str(story), list(game.walkthrough or ()))
    game.save(str(story.with_suffix(".json")))
    rom = bytearray(story.read_bytes())
    rom[_SERIAL] = b"000000"
    story.write_bytes(rom)


def main(arguments: list[str]) -> None:
    """Make the game that the JSON of ``arguments[0]`` describes in the folder ``arguments[1]``."""
    spec, folder = json.loads(arguments[0]), Path(arguments[1])
    parent = os.getppid()
    listed = glob.glob

    def sorted_glob(*args: Any, **kwargs: Any) -> list[str]:
        return sorted(listed(*args, **kwargs))

    glob.glob = sorted_glob  # type: ignore[assignment]
    textworld = importlib.import_module("textworld")
    failures = []
    for attempt in range(_ATTEMPTS):
        try:
            _make(textworld, spec, spec["seed"] + attempt * _ATTEMPT_STRIDE, folder)
            break
        except Exception as error:  # the generator fails on some seeds, in any way it likes
            failures.append(f"{type(error).__name__}: {error}")
    else:
        raise SystemExit(f"{_ATTEMPTS} seeds failed, the last with {failures[-1]}")
    if os.getppid() != parent:  # nobody is left to take the game and the folder away
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
