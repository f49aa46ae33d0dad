"""The pool: how many times quicker than one by one, and the memory of 64 environments.

First, environments whose step waits 50 ms: 32 in the vector form against 32 one after another, in
one run. Then one id of each family that is playable here: 64 environments are reset and stepped,
and the proportional set size (PSS) of all their processes, children of children included, is
added up. Goals: at least 25 times, and at most 4 GiB on two cores.
Run: ``python benchmarks/vector.py [id ...]``
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from pathlib import Path

import gymnasium

import pz_envs
from pz_envs.countdown.env import CountdownEnv
from pz_envs.pool import AsyncPool
from pz_envs.textenv import Outcome
from pz_envs.vector import PoolVectorEnv

SLOW, MANY = 32, 64
PROCESSES = 2
STEP_S = 0.05
ROUNDS = 10


class Waiting(CountdownEnv):
    """Its step takes ``STEP_S`` seconds, as if it asked a server."""

    def _advance(self, command: str) -> Outcome:
        time.sleep(STEP_S)
        return super()._advance(command)


def waiting() -> Waiting:
    """Return an environment whose episodes do not end within the benchmark."""
    return Waiting(tries=100)


def speedup() -> tuple[float, float]:
    """Return seconds a round of ``SLOW`` steps, one by one and in the vector form."""
    envs = [waiting() for _ in range(SLOW)]
    for env in envs:
        env.reset(seed=0)
    began = time.perf_counter()
    for env in envs:
        env.step("1")
    alone = time.perf_counter() - began
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    vector = PoolVectorEnv("vector:waiting", SLOW, processes=PROCESSES)
    vector.reset(seed=0)
    began = time.perf_counter()
    for _ in range(ROUNDS):
        vector.step(["1"] * SLOW)
    together = (time.perf_counter() - began) / ROUNDS
    vector.close()
    return alone, together


def pss_mb(pool: AsyncPool) -> tuple[float, int]:
    """Return the PSS of the pool's processes and their descendants in MiB, and their number."""
    children = defaultdict(list)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children[parent].append(int(folder.name))
    todo = [shard.process.pid for shard in pool._shards if shard.process is not None]
    total, count = 0, 0
    while todo:
        pid = todo.pop()
        todo += children[pid]
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
        count += 1
    return total / 1024, count


def measure(env_id: str) -> str:
    """Return a row of the table."""
    began = time.perf_counter()
    vector = gymnasium.make_vec(env_id, num_envs=MANY, processes=PROCESSES)
    assert isinstance(vector, PoolVectorEnv)
    try:
        vector.reset(seed=0)
        ready = time.perf_counter() - began
        began = time.perf_counter()
        for number in range(ROUNDS):
            vector.step([("look", "north", "1")[(number + i) % 3] for i in range(MANY)])
        rate = MANY * ROUNDS / (time.perf_counter() - began)
        memory, processes = pss_mb(vector.pool)
    finally:
        vector.close()
    return f"{env_id:24} {ready:10.1f} {rate:9.0f} {processes:10} {memory:9.0f}"


def main() -> None:
    """Print both tables."""
    chosen = sys.argv[1:]
    if not chosen:
        alone, together = speedup()
        print(f"{SLOW} environments, step {STEP_S * 1000:.0f} ms, {PROCESSES} processes:")
        print(
            f"one by one {alone:.3f} s a round, together {together:.3f} s: "
            f"{alone / together:.1f} times quicker\n"
        )
        families: dict[str, str] = {}
        for row in pz_envs.rows():
            if pz_envs.missing(row) is None:
                families.setdefault(row.family, row.id)
        chosen = list(families.values())
    print(f"{MANY} environments in {PROCESSES} processes")
    print(f"{'id':24} {'ready in s':>10} {'steps/s':>9} {'processes':>10} {'PSS MiB':>9}")
    for env_id in chosen:
        print(measure(env_id), flush=True)


if __name__ == "__main__":
    main()
