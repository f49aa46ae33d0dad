"""Steps per second of ALFWorld's native engine against TextWorld's PDDL engine, in one run.

Both play the same random commands on the same games; a step is a command and the list of admissible
commands after it. Times are processor seconds of the engine's own process, so that other load does
not bend the ratio (Linux). The native engine repeats the episode for long enough to be timed.
Opening is reading and parsing a game (the reference's first also imports it), reset is beginning it
again; the texts are compared on the way. A last line gives the whole environment's ``step``.

    python benchmarks/alfworld_step.py [--source FOLDER_OR_ARCHIVE] [--split valid_seen]
"""

from __future__ import annotations

import argparse
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

from pz_envs.alfworld.compare import reference_engine
from pz_envs.alfworld.env import ALFWorldEnv
from pz_envs.alfworld.games import Game, Games, Split, load_games
from pz_envs.alfworld.household import with_original_texts
from pz_envs.alfworld.native import Household, Record, World
from pz_envs.alfworld.reference import check_installed
from pz_envs.workers import Worker


@dataclass(frozen=True, slots=True)
class Figures:
    """Processor seconds: opening a game, resetting it, and one step."""

    opening: float
    reset: float
    step: float


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--source")
    parser.add_argument("--split", default="valid_seen")
    parser.add_argument("--games", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    check_installed()
    games = load_games(arguments.split, arguments.source)
    picked = random.Random(0).sample(games.games, arguments.games)
    print(f"{games.source}, {arguments.steps} random commands a game")
    print(
        f"{'game':44} {'places':>6} | {'open ms':>15} | {'reset ms':>15} | {'steps/s':>17} | ratio"
    )
    total_native = total_reference = 0.0
    with reference_engine() as worker:
        for game in picked:
            record = games.record(game)
            record = record if record.domain else with_original_texts(record)
            commands = _commands(record, arguments.steps)
            reference, said = _time_reference(worker, record, commands)
            native = _time_native(record, commands, said)
            total_native += native.step
            total_reference += reference.step
            places = len(World(record.domain, record.problem, record.grammar).place)
            print(
                f"{game.name.partition('/')[0][:44]:44} {places:6} "
                f"| {1e3 * native.opening:6.2f} {1e3 * reference.opening:8.0f} "
                f"| {1e3 * native.reset:6.3f} {1e3 * reference.reset:8.0f} "
                f"| {1 / native.step:9.0f} {1 / reference.step:7.1f} "
                f"| {reference.step / native.step:,.0f}x",
                flush=True,
            )
    print(f"over all steps of the {len(picked)} games: {total_reference / total_native:,.0f}x")
    rate = _environment(games, picked, arguments.split)
    print(f"ALFWorldEnv.step on the native engine: {rate:,.0f} steps/s")


def _commands(record: Record, steps: int) -> list[str]:
    """Return random commands that do not win."""
    rng = random.Random(1)
    household = Household(World(record.domain, record.problem, record.grammar))
    commands: list[str] = []
    while len(commands) < steps:
        command = rng.choice(household.admissible())
        trial = household.copy()
        trial.play(command)
        if not trial.won:
            household.play(command)
            commands.append(command)
    return commands


def _time_reference(
    worker: Worker, record: Record, commands: list[str]
) -> tuple[Figures, list[str]]:
    texts = (record.domain, record.problem, record.grammar)
    begin = _cpu_seconds(worker)
    worker.call("begin", *texts)
    loaded = _cpu_seconds(worker)
    worker.call("begin", *texts)
    ready = _cpu_seconds(worker)
    said = [str(worker.call("play", command)[0]) for command in commands]
    end = _cpu_seconds(worker)
    opening = loaded - begin - (ready - loaded)
    return Figures(opening, ready - loaded, (end - ready) / len(commands)), said


def _time_native(record: Record, commands: list[str], said: list[str]) -> Figures:
    begin = time.process_time()
    household = Household(World(record.domain, record.problem, record.grammar))
    opening = time.process_time() - begin
    resets = plays = 0.0
    rounds = 0
    while plays < 0.5:
        start = time.process_time()
        household.begin()
        ready = time.process_time()
        for command in commands:
            household.play(command)
            household.admissible()
        plays += time.process_time() - ready
        resets += ready - start
        rounds += 1
    household.begin()
    if [household.play(command) for command in commands] != said:
        raise SystemExit("the engines differ: python benchmarks/alfworld_compare.py tells where")
    return Figures(opening, resets / rounds, plays / rounds / len(commands))


def _cpu_seconds(worker: Worker) -> float:
    """Return the processor time of a worker's process, 0 before it is started (Linux)."""
    if worker.pid is None:
        return 0.0
    fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _environment(games: Games, picked: list[Game], split: Split) -> float:
    """Return the environment's steps per second with random commands over some games."""
    env = ALFWorldEnv(split=split, source=games.source)
    rng = random.Random(2)
    seconds, steps = 0.0, 0
    for game in picked:
        _, info = env.reset(options={"index": games.games.index(game)})
        for _ in range(2000):
            command = rng.choice(info["admissible_commands"])
            start = time.process_time()
            _, _, terminated, _, info = env.step(command)
            seconds += time.process_time() - start
            steps += 1
            if terminated:
                _, info = env.reset(options={"index": games.games.index(game)})
    return steps / seconds


if __name__ == "__main__":
    main()
