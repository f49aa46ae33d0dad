"""A small language model that has read the walkthroughs of other games, as a prior from scratch.

Where no pretrained model is at hand, this one is made within minutes: states along the walkthroughs
of some games, each with its admissible commands, and supervised learning that scores the
walkthrough's command above the others. What it knows of an unseen game is what text games share:
which verbs matter, and that what a room names is worth a try.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pz_agents.models.chat import without_progress_bars
from pz_agents.models.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS
from pz_agents.models.transformers import TransformersModel
from pz_agents.priorzero.language import LanguageLearner, LanguageLearnerSettings
from pz_agents.priorzero.prior import LanguagePrior, LanguageSettings, Moment
from pz_envs.errors import InfraError
from pz_envs.seeding import generator

SHORT = {
    "n": "north",
    "s": "south",
    "e": "east",
    "w": "west",
    "ne": "northeast",
    "nw": "northwest",
    "se": "southeast",
    "sw": "southwest",
    "u": "up",
    "d": "down",
    "i": "inventory",
    "l": "look",
    "z": "wait",
    "get": "take",
    "x": "examine",
}
"""What players write for short."""

_MOST_UNLISTED = 3

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """A state of a walkthrough, and the place of the walkthrough's command among its commands."""

    moment: Moment
    played: int


@dataclass(frozen=True, slots=True)
class WarmupRecipe:
    """Sizes and schedule; the defaults take about half a minute of one CPU core.

    words: most tokens of the vocabulary, which is made of the lessons' text.
    epochs: how often each lesson is seen. rate: the highest, after a rise over a tenth of the
    updates and before a cosine down to a twentieth.
    """

    layers: int = 2
    hidden: int = 128
    words: int = 2048
    context: int = 1024
    epochs: int = 3
    batch: int = 16
    rate: float = 2e-3
    weight_decay: float = 0.1
    seed: int = 0


def lessons_of(env_id: str, most_turns: int, *, timeout_s: float = 8.0) -> list[Lesson]:
    """Return the states along a game's walkthrough whose next command is an admissible one.

    The commands are searched for once in a machine's life, .1 to 4 s a state, and then cached. A
    state whose search takes longer than ``timeout_s`` is passed over, and after three such in a row
    the rest of the game; so is one whose walkthrough command is listed in another wording.

    Args:
        env_id: of a Jericho game.
        most_turns: turns from the start.
        timeout_s: seconds of one search.
    """
    from pz_envs.catalog import make_env

    env = make_env(env_id, admissible_commands=True, timeout_s=timeout_s)
    lessons: list[Lesson] = []
    history: list[tuple[str, str, float]] = []
    unlisted = 0
    try:
        observation, info = env.reset(seed=0, options={"expert": True})
        for _ in range(most_turns):
            command = env.expert_action()
            unlisted = unlisted + 1 if info["admissible_commands"] is None else 0
            if command is None or unlisted == _MOST_UNLISTED:
                break
            commands = tuple(info["admissible_commands"] or ())
            played = _place(command, commands)
            if played is not None:
                moment = Moment(observation, info["instruction"], commands, tuple(history))
                lessons.append(Lesson(moment, played))
            before = observation
            observation, reward, terminated, truncated, info = env.step(command)
            history.append((before, _spelled(command), float(reward)))
            if terminated or truncated:
                break
    except InfraError as error:
        _logger.warning("%s: the walkthrough ends after %d turns: %s", env_id, len(history), error)
    finally:
        env.close()
    return lessons


def _spelled(command: str) -> str:
    """Return a command with its first word in full."""
    first, _, rest = command.strip().lower().partition(" ")
    return f"{SHORT.get(first, first)} {rest}".strip()


def _place(command: str, commands: Sequence[str]) -> int | None:
    """Return where ``command`` stands in the list, in any spelling; None where it does not."""
    wanted = _spelled(command)
    return next((n for n, each in enumerate(commands) if _spelled(each) == wanted), None)


def warm_up(
    folder: Path,
    lessons: Sequence[Lesson],
    recipe: WarmupRecipe = WarmupRecipe(),
    *,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> None:
    """Make a model from scratch and put it at ``folder``, as ``load_model`` takes it.

    Args:
        folder: appears whole or not at all.
        lessons: to learn.
        recipe: sizes and schedule.
        on_progress: called as ``(update, updates, loss)``.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as unfinished:
        place = Path(unfinished) / "model"
        _begin(place, lessons, recipe)
        model = TransformersModel(place, device="cpu")
        _teach(model, lessons, recipe, on_progress)
        with without_progress_bars():
            model.save(place)
        os.replace(place, folder)


def ranks(prior: LanguagePrior, lessons: Sequence[Lesson]) -> dict[str, float]:
    """Return how well a prior finds the walkthroughs' commands, and how well chance does.

    Returns:
        ``top1``: share of states where the command is the favourite. ``rank``: its mean rank from
        1, ties at their middle. ``probability``: its mean. ``uniform_top1`` and ``uniform_rank``:
        what equal scores give. Single-command states are left out. ``states``: how many are left.
    """
    found: list[tuple[float, float, float, float, float]] = []
    for lesson in lessons:
        count = len(lesson.moment.commands)
        (opinion,) = prior.judge([lesson.moment])
        if count < 2 or opinion.scores is None:
            continue
        scores = opinion.scores
        own = scores[lesson.played]
        better, equal = int((scores > own).sum()), int((scores == own).sum())
        weights = np.exp(scores - scores.max())
        probability = float(weights[lesson.played] / weights.sum())
        top = float(better == 0) / equal
        found.append((top, better + (equal + 1) / 2, probability, 1 / count, (count + 1) / 2))
    names = ("top1", "rank", "probability", "uniform_top1", "uniform_rank")
    means = np.mean(found, axis=0) if found else np.zeros(len(names))
    return {**dict(zip(names, means.tolist(), strict=True)), "states": float(len(found))}


def _begin(folder: Path, lessons: Sequence[Lesson], recipe: WarmupRecipe) -> None:
    """Write random weights, and a tokenizer of the lessons' words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    texts = [
        text
        for lesson in lessons
        for text in (lesson.moment.observation, "\n".join(f" {c}" for c in lesson.moment.commands))
    ]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learned.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=recipe.words,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    merges = json.loads(learned.to_str())["model"]["merges"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned.get_vocab(),
        merges=[tuple(pair) for pair in merges],
        unk_token=None,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    )
    with torch.random.fork_rng(devices=[]), without_progress_bars():
        torch.manual_seed(recipe.seed)
        network = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=math.ceil(len(tokenizer) / 8) * 8,
                hidden_size=recipe.hidden,
                intermediate_size=2 * recipe.hidden,
                num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.hidden // 32,
                num_key_value_heads=recipe.hidden // 32,
                max_position_embeddings=recipe.context,
                tie_word_embeddings=True,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                dtype="float32",
                pz_template="compact",
            )
        )
        network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _teach(
    model: TransformersModel,
    lessons: Sequence[Lesson],
    recipe: WarmupRecipe,
    on_progress: Callable[[int, int, float], None] | None,
) -> None:
    prior = LanguagePrior(model, LanguageSettings())
    decisions = [
        prior.decision(
            prior.prefix(lesson.moment),
            lesson.moment.commands,
            np.eye(len(lesson.moment.commands))[lesson.played],
            lesson.played,
            0.0,
        )
        for lesson in lessons
    ]
    settings = LanguageLearnerSettings(
        sft_weight=1.0,
        rft_weight=0.0,
        kl=0.0,
        learning_rate=recipe.rate,
        weight_decay=recipe.weight_decay,
        microbatch=recipe.batch,
        accumulate=1,
    )
    learner = LanguageLearner(model, settings, seed=recipe.seed)
    random = generator(recipe.seed, "warm-up")
    a_pass = math.ceil(len(decisions) / recipe.batch)
    updates = a_pass * recipe.epochs
    done = 0
    for _ in range(recipe.epochs):
        order = random.permutation(len(decisions))
        for first in range(0, len(order), recipe.batch):
            rise = min(1.0, (done + 1) / max(updates / 10, 1))
            fall = 0.05 + 0.475 * (1 + math.cos(math.pi * done / updates))
            for group in learner.optimizer.param_groups:
                group["lr"] = recipe.rate * rise * fall
            part = [decisions[place] for place in order[first : first + recipe.batch]]
            figures = learner.learn(part)
            done += 1
            if on_progress is not None:
                on_progress(done, updates, figures["llm_sft_loss"])
