"""What another process costs an episode, on child processes and on Ray, in one run.

Three tables: the dispatch of an episode (a call that carries one encoded episode back); throughput
of a fleet whose environments take 50 ms a step, on Ray against child processes; and playing one
step ahead against playing and learning in turn, where both take equally long (both wait, so that
the figure is the machinery's and not that of a machine with few cores).

    python benchmarks/ray_dispatch.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from pz_agents.rollout import EpisodeSpec, Limits, run_episodes
from pz_agents.rollout.codec import encode
from pz_agents.runtime import Resources, open_runtime
from pz_agents.sdk.types import Action
from pz_agents.training import fleet as fleets
from pz_agents.training.settings import TrainSettings
from pz_envs.textenv import Outcome, TextEnv

STEP_SECONDS = 0.05
TURNS = 5
HALF_SECONDS = 0.4
SMALL = Resources(cpus=0.1)


class SlowEnv(TextEnv):
    """Takes its time for every step."""

    family = "toy"

    def _start(self, seed: int, options: Any) -> Outcome:
        self._left, self._max_score, self._task_id = TURNS, 1.0, str(seed)
        return Outcome("Go.", 0.0)

    def _advance(self, command: str) -> Outcome:
        time.sleep(STEP_SECONDS)
        self._left -= 1
        return Outcome("On.", 0.0, 0.0, terminated=self._left == 0)


class Says:
    """An agent that needs no model."""

    def act(self, turns: Any) -> list[Action]:
        """Say the same to all."""
        return [Action("go") for _ in turns]


class Worker:
    """Plays episodes of ``SlowEnv``, 16 at once; takes the place of a fleet's worker."""

    def __init__(self, number: int, settings: Any = None, engines: Any = None) -> None:
        self._one = self.play(0, [0], 0, None)[0]

    def play(self, number: int, places: list[int], version: int, weights: Any) -> list[bytes]:
        """Play an episode for each of ``places``."""
        specs = [EpisodeSpec(f"{number}/{place}", "toy", place) for place in places]
        played = run_episodes(
            Says(),
            specs,
            make_env=lambda env_id: SlowEnv(),
            limits=Limits(turns=TURNS, repeats=TURNS + 1),
            seed=0,
            concurrency=16,
        )
        return [encode(item) for item in played]

    def one(self) -> list[bytes]:
        """Return an episode that was played before."""
        return [self._one]


class Sleeper:
    """Takes as long for a share as the learner takes for a step."""

    def __init__(self, number: int, settings: Any, engines: Any) -> None:
        pass

    def play(self, number: int, places: list[int], version: int, weights: Any) -> list[bytes]:
        """Wait."""
        time.sleep(HALF_SECONDS)
        return []


def dispatch(runtime: Any, calls: int = 200) -> tuple[float, float]:
    """Return seconds an episode: one call after another, and all under way at once."""
    (handle,) = runtime.spawn("ray_dispatch:Worker", 1, SMALL)
    runtime.call(handle, "one").result()
    began = time.perf_counter()
    for _ in range(calls):
        runtime.call(handle, "one").result()
    middle = time.perf_counter()
    for call in [runtime.call(handle, "one") for _ in range(calls)]:
        call.result()
    ended = time.perf_counter()
    runtime.kill(handle)
    return (middle - began) / calls, (ended - middle) / calls


def settings(**changes: Any) -> TrainSettings:
    """Return a fleet's settings; there is no model to load."""
    given = {"env": "pz/Countdown-v0", "steps": 1, "resources": {"worker": {"cpus": 0.1}}}
    return TrainSettings(**{**given, **changes})


def ready_fleet(runtime: Any, worker: str, **changes: Any) -> fleets.Fleet:
    """Return a fleet that has played once, so that its processes are up."""
    fleets.WORKER = f"ray_dispatch:{worker}"
    made = fleets.Fleet(settings(**changes), runtime)
    made.publish(lambda folder: (folder / "none").write_text("none"), 0, 0)
    made.play(1)
    return made


def throughput(made: fleets.Fleet, batch: int) -> float:
    """Return episodes a second."""
    began = time.perf_counter()
    played = made.play(batch)
    return len(played) / (time.perf_counter() - began)


def in_turn(made: fleets.Fleet, steps: int) -> float:
    """Return the seconds of steps that play, then learn."""
    began = time.perf_counter()
    for step in range(steps):
        made.play(step + 2)
        time.sleep(HALF_SECONDS)
    return time.perf_counter() - began


def one_ahead(made: fleets.Fleet, steps: int) -> float:
    """Return the seconds of steps that learn while the next is played."""
    began = time.perf_counter()
    made.request(2)
    for step in range(steps):
        while made.running:
            made.finished()
        if step + 1 < steps:
            made.request(step + 3)
        time.sleep(HALF_SECONDS)
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with (
        contextlib.closing(open_runtime("local")) as local,
        contextlib.closing(open_runtime("ray", cpus=2)) as ray,
    ):
        runtimes = {"local": local, "ray": ray}
        print("dispatch, ms an episode       in turn  pipelined   (goal: ray <= 5)")
        for name, runtime in runtimes.items():
            measured = [dispatch(runtime) for _ in range(rounds)]
            one, many = (1e3 * statistics.median(values) for values in zip(*measured, strict=True))
            print(f"{name:<28} {one:8.2f} {many:10.2f}")
        made = {
            name: ready_fleet(runtime, "Worker", workers=2, groups_per_step=192)
            for name, runtime in runtimes.items()
        }
        rates: dict[str, list[float]] = {name: [] for name in made}
        for number in range(rounds):
            for name, fleet in made.items():
                rates[name].append(throughput(fleet, number + 2))
        here, there = (statistics.median(rates[name]) for name in ("local", "ray"))
        print("\n50 ms environments, 2 workers x 16 episodes, 192 episodes of 5 turns")
        print(f"local {here:6.1f} episodes/s, ray {there:6.1f}, ratio {there / here:.3f} (>= 0.9)")
        for fleet in made.values():
            fleet.close()
        print(f"\n10 steps, playing and learning {HALF_SECONDS:g} s each   (goal: <= 0.60)")
        for name, runtime in runtimes.items():
            fleet = ready_fleet(runtime, "Sleeper", workers=1)
            turns, ahead = in_turn(fleet, 10), one_ahead(fleet, 10)
            fleet.close()
            print(
                f"{name:<6} in turn {turns:5.2f} s, one ahead {ahead:5.2f} s: {ahead / turns:.3f}"
            )


if __name__ == "__main__":
    main()
