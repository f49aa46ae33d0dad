"""UniZero against random play on real games: the score of unseen episodes for a stated budget.

Trains the preset ``quick`` for each game and seed, then plays held-out episodes with the trained
agent and with the random one under the same limit of turns. Prints, a line a run, the budget
(turns collected, updates, CPU seconds) and both mean scores; then the mean difference a game with
its 95 % interval over seeds. Games need their story files (``PZ_DATA``).

    python benchmarks/unizero_learning.py [--env ID]... [--seeds N] [--steps N] [--out FOLDER]

The same command goes on from what ``--out`` holds.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pz_agents.priorzero.run import player, train
from pz_agents.priorzero.settings import UniZeroSettings
from pz_agents.rollout import EpisodeSpec, Limits, run_episodes
from pz_agents.sdk.loading import load_agent
from pz_agents.training.monitors import read_metrics
from pz_envs.catalog import make_env
from pz_envs.seeding import derive_seed

GAMES = ("pz/Detective-v0", "pz/Pentari-v0")
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_score(agent: Any, env: str, turns: int, episodes: int, seed: int) -> float:
    """Return the mean final score of held-out episodes."""
    specs = [
        EpisodeSpec(str(number), env, derive_seed("benchmark", env, number) % 2**31)
        for number in range(episodes)
    ]
    # Refused or repeated commands end no episode: the turns are the budget of both players.
    limits = Limits(turns=turns, invalid_streak=turns, repeats=turns)
    make = partial(make_env, split="eval", admissible_commands=True)
    played = run_episodes(agent, specs, make_env=make, limits=limits, seed=seed, concurrency=8)
    return float(np.mean([each.score for each in played]))


def run(env: str, seed: int, steps: int, folder: Path) -> float:
    """Train, evaluate, print a line; returns UniZero's score less the random player's."""
    settings = UniZeroSettings.model_validate(
        {"preset": "quick", "env": env, "seed": seed, "steps": steps, "eval_episodes": 0}
    )
    began = time.process_time()
    train(settings, folder)
    seconds = time.process_time() - began
    last = read_metrics(folder / "metrics.jsonl")[-1]
    learned = mean_score(player(folder), env, settings.max_turns, 4, seed)
    chance = mean_score(load_agent("random"), env, settings.max_turns, 40, seed)
    print(
        f"{env:18} {seed:4} {last['env_steps']:7.0f} {last['train/updates']:8.0f} "
        f"{seconds:8.0f} {chance:8.1f} {learned:8.1f}",
        flush=True,
    )
    return learned - chance


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", action="append", help=f"a game; default {', '.join(GAMES)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="unizero_"))
    print("game               seed   turns  updates   CPU s    random  unizero")
    gains = {
        env: [
            run(env, seed, options.steps, out / f"{env.rpartition('/')[2]}-s{seed}")
            for seed in range(options.seeds)
        ]
        for env in options.env or GAMES
    }
    print("\nunizero less random, mean over seeds [95 % interval]")
    for env, values in gains.items():
        mean, half = float(np.mean(values)), math.inf
        if 1 < len(values) <= len(QUANTILES) + 1:
            spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
            half = QUANTILES[len(values) - 2] * spread
        print(f"{env:18} {mean:8.1f} [{mean - half:.1f}, {mean + half:.1f}]")


if __name__ == "__main__":
    main()
