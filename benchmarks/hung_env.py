"""What one environment that hangs costs the others: their episodes a second, with and without it.

Episodes of 5 turns, one environment step of which takes 10 ms; the agent answers at once. A batch
is played twice a round, with every environment well and with one whose first step never returns.
Of both only the other episodes are counted, and the time until the last of them has ended. The
hung one fails at its time limit, which lies far behind.

    python benchmarks/hung_env.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from typing import Any

from pz_agents.rollout import EpisodeSpec, Limits, run_episodes
from pz_agents.sdk.types import Action
from pz_envs.seeding import derive_seed
from pz_envs.textenv import Outcome, TextEnv

STEP_SECONDS = 0.01
TURNS = 5
EPISODES = 1024


class SlowEnv(TextEnv):
    """Takes its time for every step; with seed 0 its first step returns at ``go_on`` alone."""

    family = "toy"

    def __init__(self, go_on: threading.Event) -> None:
        super().__init__()
        self._go_on = go_on

    def _start(self, seed: int, options: Any) -> Outcome:
        self._left, self._max_score, self._task_id = TURNS, 1.0, str(seed)
        self._hangs = seed == derive_seed("toy", 0)
        return Outcome("Go.", 0.0)

    def _advance(self, command: str) -> Outcome:
        if self._hangs:
            self._go_on.wait()
        time.sleep(STEP_SECONDS)
        self._left -= 1
        return Outcome("On.", 0.0, 0.0, terminated=self._left == 0)


class Says:
    """An agent that needs no model."""

    def act(self, turns: Any) -> list[Action]:
        """Say the same to all."""
        return [Action("go") for _ in turns]


def rate(concurrency: int, hangs: bool) -> float:
    """Return episodes a second, the hung one and its time not counted.

    Args:
        concurrency: episodes at once.
        hangs: whether one environment does; else it is well, and played as one more.
    """
    go_on = threading.Event()
    first = 0 if hangs else EPISODES
    specs = [EpisodeSpec(str(seed), "toy", seed) for seed in (first, *range(1, EPISODES))]
    began = time.perf_counter()
    played = run_episodes(
        Says(),
        specs,
        make_env=lambda env_id: SlowEnv(go_on),
        limits=Limits(turns=TURNS, repeats=TURNS + 1, seconds=600.0),
        seed=0,
        concurrency=concurrency,
    )
    count = EPISODES - hangs
    for _ in range(count):
        next(played)
    seconds = time.perf_counter() - began
    go_on.set()
    for _ in played:
        pass
    return count / seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"{EPISODES} episodes of {TURNS} turns, {STEP_SECONDS * 1e3:g} ms a step; episodes/s")
    print("at once   all well   one hangs   ratio   (goal: >= 0.9 of the environments left)")
    for concurrency in (16, 64):
        measured = [(rate(concurrency, False), rate(concurrency, True)) for _ in range(rounds)]
        well, hung = (statistics.median(rates) for rates in zip(*measured, strict=True))
        print(f"{concurrency:<7} {well:10.1f} {hung:11.1f} {hung / well:7.3f}")


if __name__ == "__main__":
    main()
