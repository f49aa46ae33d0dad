"""What a step takes with several learner ranks against one, in one run.

One network and its rows, learned by this process alone and by this process with others; the steps
take turns, so that what else the machine does falls on both, and the median of each is printed.

    python benchmarks/learner_ranks.py [--ranks 2] [--steps 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
from transformers import Qwen2ForCausalLM

from pz_agents.algorithms.rows import TrainRow
from pz_agents.models import load_model
from pz_agents.models.recipe import Recipe
from pz_agents.models.tiny import tiny_config, tiny_tokenizer
from pz_agents.runtime import open_runtime
from pz_agents.training.peer import updaters_of
from pz_agents.training.ranks import Team
from pz_agents.training.settings import TrainSettings

RECIPE = Recipe(layers=4, hidden=256, key_value_heads=2, feed_forward=1024, context=512)
ROWS = 64


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Qwen2ForCausalLM(tiny_config(RECIPE)).save_pretrained(folder)
        tiny_tokenizer(RECIPE.context).save_pretrained(folder)
        settings = TrainSettings(
            env="pz/Countdown-v0",
            model=folder,
            steps=100,
            threads=given.threads,
            learner_ranks=given.ranks,
        )
        torch.set_num_threads(given.threads)
        alone, joined = (updaters_of(settings, load_model(folder)) for _ in range(2))
        with (
            contextlib.closing(open_runtime("local")) as runtime,
            contextlib.closing(Team(settings, runtime)) as team,
        ):
            team.join(joined)
            rows = random_rows()
            seconds: dict[str, list[float]] = {"alone": [], "joined": []}
            for _ in range(given.steps + 1):
                for name, updaters in (("alone", alone), ("joined", joined)):
                    began = time.monotonic()
                    step(updaters["policy"], rows)
                    seconds[name].append(time.monotonic() - began)
            team.check()
    one, several = (statistics.median(each[1:]) for each in seconds.values())
    count = sum(p.numel() for p in alone["policy"].module.parameters())
    tokens = sum(len(row.ids) for row in rows)
    print(
        f"{count / 1e6:.1f} M parameters, {ROWS} rows, {tokens} tokens a step; "
        f"{4 * count / 1e6:.0f} MB of gradients; CPU, gloo"
    )
    print(f"{'ranks':>6} {'s a step':>9} {'ratio':>6}")
    print(f"{1:>6} {one:>9.2f} {1.0:>6.2f}")
    print(f"{given.ranks:>6} {several:>9.2f} {several / one:>6.2f}")


def step(updater: Any, rows: list[TrainRow]) -> None:
    """Learn once from the rows."""
    updater.step_metrics(updater.take(updater.step_rows(rows)))


def random_rows() -> list[TrainRow]:
    """Rows of 64 to 448 tokens, of which the latter half was sampled."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(ROWS):
        length = int(rng.integers(64, 449))
        mask = np.arange(length) >= length // 2
        zeros = np.zeros(length, np.int32)
        rows.append(
            TrainRow(
                ids=rng.integers(5, 100, size=length).astype(np.int32),
                mask=mask,
                log_probs=np.where(mask, -4.6, 0.0).astype(np.float32),
                versions=zeros,
                turns=zeros,
                advantages=np.where(mask, rng.normal(), 0.0).astype(np.float32),
                trajectory_id=str(number),
                group_id=str(number // 8),
            )
        )
    return rows


if __name__ == "__main__":
    main()
