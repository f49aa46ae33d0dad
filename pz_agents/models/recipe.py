"""What ``tiny`` is made of, as data, and the hash that names the result.

Everything that can change the weights is in the hash: sizes, schedule, the text of the first
warm-up pairs (and with it the puzzle generator, the solver and the prompt template), and
``REVISION``, which goes up when the training code itself changes. Neither torch nor transformers
is imported here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pz_agents.prompting.templates import TEMPLATES, shown_commands, user_text
from pz_envs.countdown.env import CountdownEnv
from pz_envs.datasets import cache_dir
from pz_envs.seeding import derive_seed, generator

REVISION = 1

TEMPLATE = TEMPLATES["compact"]

PUZZLES: Mapping[str, Any] = {"numbers": 3, "max_number": 20, "operators": "+-*"}
"""Arguments of ``CountdownEnv`` for the warm-up's puzzles; on others ``tiny`` hardly succeeds."""

_LETTERS = np.arange(26, 0, -1) / 351
"""Some letters are commoner than others."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Sizes and schedule of ``tiny``."""

    layers: int = 3
    hidden: int = 96
    head_dim: int = 32
    key_value_heads: int = 1
    feed_forward: int = 192
    context: int = 768
    steps: int = 280
    puzzles_a_step: int = 32
    game_every: int = 4
    games_a_step: int = 8
    matrix_rate: float = 0.01
    other_rate: float = 0.005
    warm_steps: int = 30
    seed: int = 0


RECIPE = Recipe()


@dataclass(frozen=True, slots=True)
class Pair:
    """A user message and the reply that the warm-up teaches."""

    prompt: str
    reply: str


def recipe_hash(recipe: Recipe = RECIPE) -> str:
    """Return the name of what ``recipe`` makes."""
    sample = [
        asdict(pair)
        for pairs in (puzzle_pairs(recipe.seed), game_pairs(recipe.seed))
        for pair in itertools.islice(pairs, 16)
    ]
    text = json.dumps([REVISION, asdict(recipe), dict(PUZZLES), sample], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def recipe_folder(recipe: Recipe = RECIPE) -> Path:
    """Return where the model that ``recipe`` makes is cached; it is built when this exists."""
    return cache_dir() / "models" / f"tiny-{recipe_hash(recipe)}"


def puzzle_pairs(seed: int) -> Iterator[Pair]:
    """Yield the expert's Countdown episodes of the train split, without end."""
    env = CountdownEnv(split="train", **PUZZLES)
    for index in itertools.count():
        observation, info = env.reset(seed=derive_seed("tiny", "puzzles", seed, index))
        prompt = user_text(TEMPLATE, observation, info["admissible_commands"])
        yield Pair(prompt, f"<answer>{env.expert_action()}</answer>")


def game_pairs(seed: int) -> Iterator[Pair]:
    """Yield invented text-game turns, each with one of its listed commands, without end.

    Commands are chosen by number, uniformly: what is taught is the form of a reply, not the play.
    The words are random letters; no game's text is used.
    """
    rng = generator("tiny", "games", seed)
    while True:
        commands = _commands(rng, int(rng.integers(1, 14)))
        prompt = user_text(TEMPLATE, _observation(rng), commands)
        number = int(rng.integers(len(shown_commands(TEMPLATE, commands)))) + 1
        yield Pair(prompt, f"<action>{number}</action>")


def _observation(rng: np.random.Generator) -> str:
    """Return a few sentences of invented words."""
    sentences = []
    for _ in range(int(rng.integers(1, 4))):
        words = [_word(rng) for _ in range(int(rng.integers(1, 7)))]
        if rng.random() < 0.2:
            words.append(str(rng.integers(1, 100)))
        sentences.append(" ".join(words).capitalize() + ".,!?:"[int(rng.integers(5))])
    return " \n"[int(rng.integers(2))].join(sentences)


def _commands(rng: np.random.Generator, count: int) -> list[str]:
    """Return up to ``count`` distinct commands of one to four invented words."""
    lengths = 1 + rng.binomial(3, 0.3, count)
    return list(dict.fromkeys(" ".join(_word(rng) for _ in range(n)) for n in lengths))


def _word(rng: np.random.Generator) -> str:
    letters = rng.choice(26, int(rng.integers(1, 8)), p=_LETTERS)
    return "".join(chr(97 + int(letter)) for letter in letters)
