"""Our ScienceWorld step against the stock package's, in one run, so that only the ratio matters.

Both play the engine's own solution of the same variation, in turns of a few steps whose order
alternates, after a first pass that warms both Java processes up. A turn's time is the CPU time of
this process and of its player's Java process, so that other programs stay out; the figure is the
ratio of the sums. The stock step always lists all valid commands; ours with and without them.
Goals: 5 times without, 1.5 times with. Before that, the resident memory of one Java process by
number of environments.
Run: ``python benchmarks/scienceworld_step.py [task ...]`` (needs Java, about a minute a task)
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import scienceworld

from pz_envs.scienceworld.env import ScienceWorldEnv
from pz_envs.scienceworld.simulator import gold_actions

TASKS = ("boil", "find-animal", "chemistry-mix")
BLOCK = 4
LONGEST = 24
TICK = os.sysconf("SC_CLK_TCK")
ENVIRONMENTS = (1, 5, 10, 20, 64)
HEAP_MB = 1024

Step = Callable[[str], object]


def cpu_s(pid: int) -> float:
    """Return the seconds that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def resident_mb(pid: int) -> int:
    """Return a process's resident memory in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) // 1024


def engine_pid(env: ScienceWorldEnv) -> int:
    """Return the id of the Java process that an environment plays in."""
    assert env._simulator is not None
    return env._simulator.jvm.pid


def measure(task: str) -> dict[str, float]:
    """Return every player's CPU milliseconds a step."""
    plain = ScienceWorldEnv(task, split="all")
    listing = ScienceWorldEnv(task, split="all", admissible_commands=True)
    stock = scienceworld.ScienceWorldEnv(task)
    stock.load(task, 0, "", generateGoldPath=False)
    for env in (plain, listing):
        env.reset(options={"index": 0})
    ours, theirs = engine_pid(plain), stock._gateway.java_process.pid
    commands = gold_actions(task, 0, "", HEAP_MB)[:-1][:LONGEST]
    players: dict[str, tuple[int, Step]] = {
        "stock": (theirs, stock.step),
        "without": (ours, plain.step),
        "with": (ours, listing.step),
    }
    spent = dict.fromkeys(players, 0.0)
    for warm in (False, False, True):
        for env in (plain, listing):
            env.reset(options={"index": 0})
        stock.reset()
        order = list(players)
        for start in range(0, len(commands), BLOCK):
            order.reverse()
            for name in order:
                pid, step = players[name]
                began = cpu_s(pid) + time.process_time()
                for command in commands[start : start + BLOCK]:
                    step(command)
                if warm:
                    spent[name] += cpu_s(pid) + time.process_time() - began
    for env in (plain, listing):
        env.close()
    stock.close()
    stock._gateway.java_process.wait(60)
    return {name: 1000 * seconds / len(commands) for name, seconds in spent.items()}


def memory() -> list[tuple[int, int]]:
    """Return (environments, MiB of their one Java process), every one reset and stepped."""
    environments: list[ScienceWorldEnv] = []
    rows = []
    for number in range(1, max(ENVIRONMENTS) + 1):
        env = ScienceWorldEnv(heap_mb=HEAP_MB)
        environments.append(env)
        env.reset(seed=number)
        env.step("look around")
        if number in ENVIRONMENTS:
            rows.append((number, resident_mb(engine_pid(env))))
    for env in environments:
        env.close()
    return rows


def main() -> None:
    """Print one row a task, then the memory."""
    for number, megabytes in memory():
        print(f"{number:>3} environments: {megabytes} MiB in one Java process, heap {HEAP_MB} MiB")
    print(f"{'task':<20}{'stock ms':>10}{'without ms':>12}{'with ms':>9}{'without':>10}{'with':>8}")
    for task in sys.argv[1:] or TASKS:
        cost = measure(task)
        stock, plain, listing = cost["stock"], cost["without"], cost["with"]
        print(
            f"{task:<20}{stock:>10.1f}{plain:>12.1f}{listing:>9.1f}"
            f"{stock / plain:>9.1f}x{stock / listing:>7.1f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
