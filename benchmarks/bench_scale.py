"""Ten thousand cells: what ``plan``, ``status``, ``watch`` and ``report`` take, in time and memory.

    python benchmarks/bench_scale.py [--cells 10000] [--turns 40]

It writes a synthetic store of agents on every game of Jericho (no engine is started), then runs
each command in a process of its own and prints seconds and the most memory it held. Targets at
10,000 cells: ``plan`` 5 s, ``status`` 2 s, ``report`` 60 s and 1 GiB.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from pz_bench import store
from pz_bench.cell import CellSpec, EpisodeRecord, env_seed, to_line
from pz_bench.cell import identity as identity_of
from pz_envs import catalog
from pz_envs.seeding import generator

EPISODES = 3
SEEDS = 5
AGENT = "def play(observation, info):\n    return 'look'\n"


def specs(cells: int, folder: Path) -> tuple[list[CellSpec], str]:
    """Return ``cells`` cells of agents from files on all Jericho games, and their matrix file."""
    envs = [row.id for row in catalog.rows() if row.family == "jericho"]
    agents = -(-cells // (len(envs) * SEEDS))
    paths = [folder / f"agent{number}.py" for number in range(agents)]
    for path in paths:
        path.write_text(AGENT)
    names = [f"{path}:play" for path in paths]
    lines = ["name: large", f"seeds: {list(range(SEEDS))}", f"defaults: {{episodes: {EPISODES}}}"]
    lines += [f"rows: [{{algorithms: {names}, environments: ['family:jericho']}}]"]
    matrix = folder / "large.yaml"
    matrix.write_text("\n".join(lines).replace("'/", '"/').replace(":play'", ':play"'))
    from pz_bench.matrix import expand, load_matrix

    return expand(load_matrix(str(matrix)))[:cells], str(matrix)


def episode(spec: CellSpec, number: int, score: float, turns: int) -> EpisodeRecord:
    """Return a synthetic episode with that normalised score, reached in its last turn."""
    steps = [
        {
            "observation": f"Room {turn}. " + "You are in a maze of twisty little passages. " * 4,
            "admissible_commands": [[0, 9], f"take lamp {turn}"],
            "action": "go north",
            "reward": 0.0,
            "score": 100 * score * (turn == turns - 1),
            "valid": True,
            "format_error": False,
            "tokens": 0,
        }
        for turn in range(turns)
    ]
    return EpisodeRecord(
        number, env_seed(spec.env, number), f"task-{number}", score > 0.9, 100 * score, 100.0,
        score, 100 * score, turns, 3, 0, 0, 0, "turns", False, "ok", None, 0.5, tuple(steps),
    )  # fmt: skip


def fill(runs: Path, found: list[CellSpec], turns: int) -> None:
    """Write the store: a done cell for every spec, with a score that depends on game and agent."""
    listed = []
    for spec in found:
        parts = identity_of(spec)
        folder = store.create_cell(runs, spec, parts)
        random = generator("scale", spec.algorithm, spec.env, spec.seed)
        values = random.beta(2, 5, EPISODES)
        lines = [to_line(episode(spec, n, float(v), turns)) for n, v in enumerate(values)]
        (folder / store.EPISODES).write_text("".join(lines), "ascii")
        store.finish_cell(folder, "done", seconds=1.5)
        listed.append(store.SuiteCell(folder.name, spec))
    store.write_suite(runs, store.Suite("large", "Large", tuple(listed)))


def timed(words: list[str], folder: Path) -> tuple[float, float, float, int]:
    """Run ``pz-bench``; returns seconds, those of the processor, MiB at most, the exit code."""
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.execv(sys.executable, [sys.executable, "-m", "pz_bench.cli", *words])
    _, code, usage = os.wait4(child, 0)
    seconds, computing = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
    return seconds, computing, usage.ru_maxrss / 1024, os.waitstatus_to_exitcode(code)


def main() -> None:
    """Write the store and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=40, help="turns that each episode keeps")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        found, matrix = specs(options.cells, folder)
        began = time.perf_counter()
        fill(folder / "runs", found, options.turns)
        print(f"{len(found)} cells written in {time.perf_counter() - began:.1f} s\n")
        print("| command | seconds | of the processor | MiB | exit |\n|---|---:|---:|---:|---:|")
        for words in (
            ["status"],
            ["plan", "--matrix", matrix],
            ["watch", "--once", "--json"],
            ["report"],
        ):
            seconds, computing, memory, code = timed(words, folder)
            print(
                f"| {words[0]} | {seconds:.1f} | {computing:.1f} | {memory:.0f} | {code} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
