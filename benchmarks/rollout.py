"""Ratios of the rollout loop and rates of the experience store, each measured in this one run.

``python benchmarks/rollout.py`` prints one line a figure, with its goal. Ratios compare two ways
of doing the same episodes on the same machine; they are medians of interleaved pairs.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pz_agents.rollout import EpisodeSpec, ExperienceStore, Limits, run_episodes
from pz_agents.rollout.loop import MakeEnv
from pz_agents.sdk import Sample, Step, Trajectory, Turn, load_agent
from pz_envs import catalog
from pz_envs.seeding import generator
from pz_envs.textenv import Outcome, TextEnv

PAIRS = 3


class Walk(TextEnv):
    """Ten steps that cost what ``work`` costs."""

    family = "walk"

    def __init__(self, work: Callable[[np.random.Generator], None]) -> None:
        super().__init__()
        self.work = work

    def _start(self, seed, options):
        self.rng = generator("walk", seed)
        self.place = 0
        return Outcome("here", 0.0)

    def _advance(self, command):
        self.work(self.rng)
        self.place += 1
        return Outcome("there", float(self.place), terminated=self.place == 10)


class Policy:
    """Takes ``seconds`` a call, whatever the batch, as a language model on an accelerator does."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def act(self, turns: Sequence[Turn]) -> list[str]:
        """Say the same in every turn."""
        time.sleep(self.seconds)
        return ["go" for _ in turns]


def seconds_of(agent, make_env: MakeEnv, episodes: int, concurrency: int, **limits) -> float:
    """Return the wall clock of playing ``episodes``."""
    specs = [EpisodeSpec(f"e{number}", "walk", number) for number in range(episodes)]
    began = time.perf_counter()
    trajectories = list(
        run_episodes(
            agent,
            specs,
            make_env=make_env,
            limits=Limits(**limits),
            seed=0,
            concurrency=concurrency,
        )
    )
    seconds = time.perf_counter() - began
    assert [item.status for item in trajectories] == ["ok"] * episodes
    return seconds


def lockstep_seconds(agent: Policy, make_env: MakeEnv, episodes: int) -> float:
    """Return the wall clock with a barrier after every turn, all steps of a turn in parallel."""
    envs = [make_env("walk") for _ in range(episodes)]
    for number, env in enumerate(envs):
        env.reset(seed=number)
    costs: list[float] = []
    for env in envs:
        env.work = lambda rng: costs.append(rng.exponential(0.05))
    total = 0.0
    for _ in range(10):
        costs.clear()
        for env in envs:
            env.step("go")
        total += agent.seconds + max(costs)
    return total


def overlap() -> None:
    """32 environments of 50 ms a step and a policy of 20 ms, against one environment."""

    def make(env_id: str) -> TextEnv:
        return Walk(lambda rng: time.sleep(0.05))

    ratios = []
    for _ in range(PAIRS):
        one = seconds_of(Policy(0.02), make, 1, 1)
        many = seconds_of(Policy(0.02), make, 64, 32)
        ratios.append(one * 64 / many)
    show("32 environments over one, 50 ms step, 20 ms policy", statistics.median(ratios), 25.6)


def heavy_tails() -> None:
    """Exponential steps of 50 ms in the mean, against a barrier after every turn (no overhead)."""

    def make(env_id: str) -> TextEnv:
        return Walk(lambda rng: time.sleep(rng.exponential(0.05)))

    ratios = [
        lockstep_seconds(Policy(0.005), make, 32) * 4 / seconds_of(Policy(0.005), make, 128, 32)
        for _ in range(PAIRS)
    ]
    show("no barrier over lockstep, heavy-tailed steps", statistics.median(ratios), 1.5)


def two_workers() -> None:
    """Engines that compute outside the interpreter's lock: two at once over one.

    Two bare threads at the same work say what the machine has to give at the moment.
    """
    block = os.urandom(60_000)

    def make(env_id: str) -> TextEnv:
        return Walk(lambda rng: work(1))

    def work(times: int) -> None:
        for _ in range(times):
            zlib.compress(block)

    def bare(threads: int) -> float:
        workers = [threading.Thread(target=work, args=(600 // threads,)) for _ in range(threads)]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - began

    ratios, ceilings = [], []
    for _ in range(PAIRS):
        ceilings.append(bare(1) / bare(2))
        ratios.append(seconds_of(Policy(0.0), make, 60, 1) / seconds_of(Policy(0.0), make, 60, 2))
    ceiling = statistics.median(ceilings)
    print(f"{'two bare threads over one (what the machine gives now)':64} {ceiling:8.2f}")
    show("two worker threads over one, computing engines", statistics.median(ratios), 1.6)


def two_jericho_workers() -> None:
    """Random play of Detective with admissible commands in child processes: two over one."""
    name = "two worker processes over one, Detective with admissible commands"
    reason = catalog.missing(catalog.find("pz/Detective-v0"))
    if reason is not None:
        print(f"{name:64} not measured: {reason}")
        return

    def make(env_id: str) -> TextEnv:
        return catalog.make_env("pz/Detective-v0", admissible_commands=True)

    before = os.environ.get("PZ_CACHE")
    ratios = []
    for _ in range(PAIRS):
        seconds = []
        for workers in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                os.environ["PZ_CACHE"] = folder  # neither side may read what the other found
                with contextlib.closing(make("pz/Detective-v0")) as env:
                    env.reset(seed=0)  # what is found once for a story is nobody's step
                seconds.append(
                    seconds_of(
                        load_agent("random"),
                        make,
                        12,
                        workers,
                        turns=25,
                    )
                )
        ratios.append(seconds[0] / seconds[1])
    os.environ.pop("PZ_CACHE")
    if before is not None:
        os.environ["PZ_CACHE"] = before
    show(name, statistics.median(ratios), 1.6)


def loop_cost() -> None:
    """What the loop adds to a turn of an environment and an agent that cost nothing."""
    seconds = min(
        seconds_of(Policy(0.0), lambda env_id: Walk(lambda rng: None), 300, 16)
        for _ in range(PAIRS)
    )
    print(f"{'loop time a turn':64} {seconds / 3000 * 1e6:8.0f} us")


def store_rate() -> None:
    """Append, lease and acknowledge 1,000 trajectories of 2,000 tokens, in groups of 8."""
    rng = np.random.default_rng(0)

    def trajectory(number: int) -> Trajectory:
        context = rng.integers(0, 30_000, 100).astype(np.int32)
        steps = []
        for _ in range(10):
            ids = rng.integers(0, 30_000, 100).astype(np.int32)
            sample = Sample(context, ids, rng.normal(size=100).astype(np.float32))
            steps.append(Step("see " * 50, "go", 0.0, 0.0, True, False, sample))
            context = np.concatenate([context, ids, ids])[: 2_000 - 100]
        key = f"g{number // 8}/{number % 8}"
        return Trajectory(
            key, "e", 0, "t", f"g{number // 8}", 0, tuple(steps), "", 0, 0, 1, 0, False, True, ""
        )

    trajectories = [trajectory(number) for number in range(1_000)]
    with tempfile.TemporaryDirectory() as folder:
        store = ExperienceStore(Path(folder) / "experience.db")
        began = time.perf_counter()
        for step, start in enumerate(range(0, 1_000, 40)):
            store.append(trajectories[start : start + 40], step)
            store.ack(store.lease(5), step + 1)
        rate = 1_000 / (time.perf_counter() - began)
        assert store.counts()["consumed"] == 125
        store.close()
    show("trajectories a second: append, lease, ack", rate, 500)


def show(name: str, value: float, goal: float) -> None:
    """Print one figure."""
    verdict = "reached" if value >= goal else "MISSED"
    print(f"{name:64} {value:8.2f}   goal {goal:g} {verdict}")


if __name__ == "__main__":
    overlap()
    heavy_tails()
    two_workers()
    loop_cost()
    store_rate()
    two_jericho_workers()
