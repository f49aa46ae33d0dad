"""PriorZero against UniZero on real games: environment steps to the same score.

A small language model is warmed up on the walkthroughs of other games (or given with ``--model``)
and guides the search's root; everything else is UniZero's preset ``quick``, the language model
stays as it is. For each game and seed both are trained for as many steps. Prints, a game, the mean
gain in score of the episodes collected by so many turns, and the turns after which the mean of
three steps in a row first reaches given scores: the median over seeds, ``-`` where fewer than half
of them got there. Games need their story files (``PZ_DATA``).

    python benchmarks/priorzero_learning.py [--env ID]... [--seeds N] [--steps N] [--out FOLDER]

The same command goes on from what ``--out`` holds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pz_agents.priorzero.run import train
from pz_agents.priorzero.settings import PriorZeroSettings, UniZeroSettings
from pz_agents.priorzero.warmup import lessons_of, warm_up
from pz_agents.training.monitors import read_metrics

GAMES = ("pz/Detective-v0", "pz/Pentari-v0")
WARMUP = (
    "pz/Acorncourt-v0",
    "pz/Adventureland-v0",
    "pz/Balances-v0",
    "pz/Library-v0",
    "pz/Loose-v0",
    "pz/Omniquest-v0",
    "pz/Reverb-v0",
    "pz/Temple-v0",
    "pz/Zork1-v0",
    "pz/Zork3-v0",
)
WARMUP_TURNS = 60
SMOOTHED = 3

Curve = Sequence[Mapping[str, Any]]


def curve(env: str, seed: int, steps: int, model: Path | None, folder: Path) -> Curve:
    """Train, and return the metrics of each step."""
    common = {"preset": "quick", "env": env, "seed": seed, "steps": steps, "eval_episodes": 0}
    settings = UniZeroSettings.model_validate(common)
    if model is not None:
        # A prior and nothing else: the world model, search and amount of play are UniZero's.
        same = settings.model_dump(
            include={"episodes_per_step", "slots", "replay_ratio", "replay", "network", "learner"}
        )
        settings = PriorZeroSettings.model_validate(
            common
            | same
            | {
                "search": settings.search.model_dump(),
                "language": {"model": str(model), "history": 3},
                "language_learner": None,
                "phase": "parallel",
                "wm_llm_ratio": 1.0,
            }
        )
    train(settings, folder)
    return [each for each in read_metrics(folder / "metrics.jsonl") if each["step"] <= steps]


def smoothed(found: Curve) -> list[float]:
    """Return the mean reward of each step and the two before it."""
    rewards = [each["reward"] for each in found]
    return [float(np.mean(rewards[max(0, n - SMOOTHED + 1) : n + 1])) for n in range(len(rewards))]


def turns_to(found: Curve, score: float) -> float:
    """Return the turns after which the smoothed reward is at least ``score``; infinity if never."""
    for line, reached in zip(found, smoothed(found), strict=True):
        if line["step"] >= SMOOTHED and reached >= score:
            return float(line["env_steps"])
    return float("inf")


def report(env: str, curves: Mapping[str, Sequence[Curve]]) -> None:
    """Print one game's table."""
    print(f"\n{env}: mean gain in score of all episodes so far, and at the end")
    best = max(max(smoothed(each)) for found in curves.values() for each in found)
    marks = [best * part for part in (0.25, 0.5, 0.75)]
    print("            turns  all so far  last 3 steps" + "".join(f"   to {m:5.1f}" for m in marks))
    for name, found in curves.items():
        turns = np.mean([each[-1]["env_steps"] for each in found])
        whole = np.mean([line["reward"] for each in found for line in each])
        last = np.mean([smoothed(each)[-1] for each in found])
        medians = [float(np.median([turns_to(each, mark) for each in found])) for mark in marks]
        shown = "".join(f"{'-' if np.isinf(m) else format(m, '.0f'):>11}" for m in medians)
        print(f"{name:9} {turns:7.0f} {whole:11.1f} {last:13.1f}{shown}")
        seeds = ", ".join(f"{smoothed(each)[-1]:.1f}" for each in found)
        print(f"          last 3 steps of each seed: {seeds}", flush=True)


def main() -> None:
    """Train all runs and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", action="append", help=f"a game; default {', '.join(GAMES)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--model", type=Path, help="a warmed-up model's folder")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = options.out or Path(tempfile.mkdtemp(prefix="priorzero_"))
    games = options.env or list(GAMES)
    model = options.model or out / "warmed"
    if not model.is_dir():
        others = [env for env in WARMUP if env not in games]
        warm_up(model, [each for env in others for each in lessons_of(env, WARMUP_TURNS)])
    for env in games:
        name = env.rpartition("/")[2]
        found = {
            kind: [
                curve(env, seed, options.steps, prior, out / f"{kind}-{name}-s{seed}")
                for seed in range(options.seeds)
            ]
            for kind, prior in (("unizero", None), ("priorzero", model))
        }
        report(env, found)


if __name__ == "__main__":
    main()
