"""ALFWorld's native engine against TextWorld's PDDL engine on many files; counts the differences.

Both play the same commands; text, admissible commands and win are compared after each. Games are a
random choice of a split or of a source of your own. Prints each difference and one line at the end.

    python benchmarks/alfworld_compare.py --split valid_seen --games 140 --steps 25
    python benchmarks/alfworld_compare.py --source FOLDER_OR_ARCHIVE [--seconds 600]
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from pz_envs.alfworld.compare import compare, reference_engine
from pz_envs.alfworld.games import load_games
from pz_envs.alfworld.household import with_original_texts
from pz_envs.alfworld.pddl import NotCoveredError
from pz_envs.alfworld.reference import check_installed
from pz_envs.errors import EnvError, InfraError


def main() -> int:
    """Compare the games that the arguments name; returns 1 when any differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--split", default="valid_seen")
    parser.add_argument("--source")
    parser.add_argument("--games", type=int, default=20)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    check_installed()
    games = load_games(arguments.split, arguments.source)
    count = min(arguments.games, len(games.games))
    picked = random.Random(arguments.seed).sample(games.games, count)
    played = compared = differing = uncovered = failed = 0
    end = time.monotonic() + arguments.seconds
    with reference_engine() as reference:
        for number, game in enumerate(picked, arguments.seed):
            if time.monotonic() > end:
                break
            if played % 50 == 49:
                reference.close()  # the engine never frees a game; the next call starts another
            record = games.record(game)
            record = record if record.domain else with_original_texts(record)
            try:
                states, difference = compare(reference, record, arguments.steps, number)
            except NotCoveredError as error:
                uncovered += 1
                print(f"{game.name}: {error}", flush=True)
                continue
            except (EnvError, InfraError) as error:
                failed += 1
                print(f"{game.name}: {error}", flush=True)
                continue
            played, compared = played + 1, compared + states
            if difference is not None:
                differing += 1
                print(f"{game.name}, {difference}", flush=True)
    print(
        f"{games.source}: {played} games, {compared} states compared, {differing} games differ, "
        f"{uncovered} not covered by the native engine, the reference failed on {failed}"
    )
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
