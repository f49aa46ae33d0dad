"""UniZero against random play, and against search in the true game, on real games.

Trains the preset ``quick`` for each game and seed; then the trained agent, the random one and
``mcts``, which searches the game itself, play the same held-out episodes under the same limit of
turns. Prints, a line a run, the budget (turns collected, updates, CPU seconds) and the mean score;
then a game's differences with the 95 % intervals by which ``pz-bench`` compares agents.
``--control`` trains on rewards that are dealt out anew over the turns of each step. Games need
their story files (``PZ_DATA``).

    python benchmarks/unizero_learning.py [--env ID]... [--seeds N] [--steps N] [--out FOLDER]

The same command goes on from what ``--out`` holds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pz_agents.priorzero.run import player, train
from pz_agents.priorzero.settings import UniZeroSettings
from pz_agents.rollout import EpisodeSpec, Limits, run_episodes
from pz_agents.sdk.loading import load_agent
from pz_agents.training.monitors import read_metrics
from pz_agents.worldmodel.replay import Segment
from pz_bench.stats import paired_difference
from pz_envs.catalog import make_env
from pz_envs.seeding import derive_seed

GAMES = ("pz/Detective-v0", "pz/Pentari-v0")
EPISODES = 16
"""Held-out, the same for all players."""

Scores = NDArray[np.float64]


def scores(agent: Any, env: str, turns: int, seed: int) -> Scores:
    """Return the final scores of held-out episodes, in their order: [EPISODES]."""
    specs = [
        EpisodeSpec(str(number), env, derive_seed("benchmark", env, number) % 2**31)
        for number in range(EPISODES)
    ]
    # Refused or repeated commands end no episode: the turns are the budget of all players.
    limits = Limits(turns=turns, invalid_streak=turns, repeats=turns)
    make = partial(make_env, split="eval", admissible_commands=True)
    played = run_episodes(agent, specs, make_env=make, limits=limits, seed=seed, concurrency=8)
    found = {each.key: each.score for each in played}
    return np.array([found[spec.key] for spec in specs])


def dealt_anew(random: np.random.Generator) -> Callable[[list[Segment]], list[Segment]]:
    """Return what shuffles the rewards of a step's episodes over all their turns."""

    def alter(segments: list[Segment]) -> list[Segment]:
        rewards = [reward for each in segments for reward in each.rewards]
        dealt = iter(random.permutation(rewards).tolist())
        return [
            replace(each, rewards=tuple(next(dealt) for _ in each.rewards)) for each in segments
        ]

    return alter


def learn(settings: UniZeroSettings, folder: Path, control: bool) -> Scores:
    """Train, play, print a line."""
    began = time.process_time()
    alter = dealt_anew(np.random.default_rng(settings.seed)) if control else None
    train(settings, folder, alter=alter)
    seconds = time.process_time() - began
    last = read_metrics(folder / "metrics.jsonl")[-1]
    found = scores(player(folder), settings.env, settings.max_turns, settings.seed)
    print(
        f"{settings.env:18} {settings.seed:4} {last['env_steps']:7.0f} "
        f"{last['train/updates']:8.0f} {seconds:7.0f} {found.mean():7.1f}",
        flush=True,
    )
    return found


def compare(name: str, left: Scores, right: Scores) -> None:
    """Print a difference of means with its interval; matrices are seeds by episodes."""
    found = paired_difference(left, right)
    print(f"  {name:24} {found.mean:7.1f} [{found.low:.1f}, {found.high:.1f}]", flush=True)


def report(env: str, turns: int, learned: Scores, seeds: Sequence[int]) -> None:
    """Print the other players' means and the differences."""
    chance = np.stack([scores(load_agent("random"), env, turns, seed) for seed in seeds])
    searched = scores(load_agent("mcts"), env, turns, 0)[None]
    print(
        f"\n{env}: random {chance.mean():.1f}, unizero {learned.mean():.1f}, "
        f"mcts {searched.mean():.1f} (most {learned.max():.0f} and {searched.max():.0f})"
    )
    compare("unizero less random", learned, chance)
    compare("mcts less unizero", searched, learned)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", action="append", help=f"a game; default {', '.join(GAMES)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--control", action="store_true", help="shuffled rewards")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="unizero_"))
    games, seeds = options.env or GAMES, range(options.seeds)
    print("game               seed   turns  updates   CPU s   score")
    learned: dict[str, list[Scores]] = {}
    for env, seed in ((env, seed) for env in games for seed in seeds):
        settings = UniZeroSettings.model_validate(
            {
                "preset": "quick",
                "env": env,
                "seed": seed,
                "steps": options.steps,
                "eval_episodes": 0,
            }
        )
        folder = out / f"{env.rpartition('/')[2]}{'-control' * options.control}-s{seed}"
        learned.setdefault(env, []).append(learn(settings, folder, options.control))
    for env, found in learned.items():
        report(env, settings.max_turns, np.stack(found), seeds)


if __name__ == "__main__":
    main()
