"""A language-model prior from scratch: what the walkthroughs of some games teach of others.

Reads the walkthroughs of the games that are not held out, trains the small model of
``pz_agents.priorzero.warmup`` on them, and prints for each held-out game how often the
walkthrough's command is the model's favourite, its mean rank and probability, and what equal scores
would give. The model is left in ``--out`` and is what ``language.model`` of a PriorZero run takes.
Listing commands takes about six minutes the first time; they are then cached. Games need their
story files (``PZ_DATA``).

    python benchmarks/prior_warmup.py [--turns N] [--epochs N] [--seed N] --out FOLDER
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from pz_agents.models.transformers import TransformersModel
from pz_agents.priorzero.prior import LanguagePrior, LanguageSettings
from pz_agents.priorzero.warmup import Lesson, WarmupRecipe, lessons_of, ranks, warm_up

TAUGHT = (
    "zork2",
    "zork3",
    "enter",
    "dragon",
    "jewel",
    "karn",
    "library",
    "loose",
    "ludicorp",
    "murdac",
    "deephome",
    "advent",
    "adventureland",
    "inhumane",
    "temple",
    "night",
    "reverb",
    "awaken",
    "omniquest",
    "balances",
    "snacktime",
)
HELD_OUT = ("detective", "pentari", "zork1")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=60, help="of each walkthrough")
    parser.add_argument("--epochs", type=int, default=WarmupRecipe().epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="where the model goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def read(names: Sequence[str]) -> dict[str, list[Lesson]]:
        return {n: lessons_of(f"pz/{n.capitalize()}-v0", arguments.turns) for n in names}

    taught = [lesson for lessons in read(TAUGHT).values() for lesson in lessons]
    recipe = WarmupRecipe(epochs=arguments.epochs, seed=arguments.seed)
    began = time.process_time()
    warm_up(arguments.out, taught, recipe)
    seconds = time.process_time() - began
    model = TransformersModel(arguments.out, device="cpu")
    size = sum(parameter.numel() for parameter in model.network.parameters())
    print(f"{len(taught)} states of {len(TAUGHT)} games, {size:,} weights, {seconds:.0f} CPU s")
    print(f"{'game':<10} {'score':<5} states  top-1 (chance)   rank (chance)   probability")
    for name, lessons in read(HELD_OUT).items():
        for reduction in ("mean", "sum"):
            prior = LanguagePrior(model, LanguageSettings(reduction=reduction))
            row = ranks(prior, lessons)
            print(
                f"{name:<10} {reduction:<5} {row['states']:6.0f}  {row['top1']:5.2f} "
                f"({row['uniform_top1']:.2f})   {row['rank']:6.2f} ({row['uniform_rank']:5.2f})   "
                f"{row['probability']:.2f}"
            )


if __name__ == "__main__":
    main()
