"""``tiny``: a language model from scratch, small enough to be made, seen and trained offline.

A Qwen2 architecture of a quarter of a million parameters with a byte tokenizer. It is warmed
up on Countdown puzzles with the solver's answers, in exactly the prompt that ``ZeroShot`` makes,
and on a few invented game turns, so that its replies are well formed and there is much left to
learn. The folder is an ordinary ``save_pretrained`` folder, cached under its recipe's hash.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from pz_agents.models.chat import ChatTokenizer, without_progress_bars
from pz_agents.models.muon import Muon
from pz_agents.models.recipe import (
    RECIPE,
    TEMPLATE,
    Pair,
    Recipe,
    game_pairs,
    puzzle_pairs,
    recipe_folder,
)

Progress = Callable[[int, int, float], None]

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
TAGS = ("<think>", "</think>", "<action>", "</action>", "<answer>", "</answer>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_IGNORED = -100

_logger = logging.getLogger(__name__)


def tiny_folder(*, recipe: Recipe = RECIPE, on_progress: Progress | None = None) -> Path:
    """Return the cached folder of ``tiny``; builds it when it is absent, once per machine.

    Args:
        recipe: what to build.
        on_progress: called as ``(step, steps, loss)`` while it is built.
    """
    folder = recipe_folder(recipe)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            _logger.info("building the model `tiny` in %s; this takes about a minute", folder)
            build_tiny(folder, recipe=recipe, on_progress=on_progress or _log_progress)
    return folder


def build_tiny(
    folder: Path, *, recipe: Recipe = RECIPE, on_progress: Progress | None = None
) -> None:
    """Make the model and put it at ``folder``, which appears whole or not at all.

    The same recipe gives the same weights on the same kind of machine. One thread is used: on a
    busy machine two were more than ten times slower.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        tiny_tokenizer(recipe.context).save_pretrained(unfinished)
        chat = ChatTokenizer(unfinished)
        with torch.random.fork_rng(devices=[]), _one_thread():
            torch.manual_seed(recipe.seed)
            network = Qwen2ForCausalLM(tiny_config(recipe))
            _warm_up(network, chat, recipe, on_progress)
        network.eval()
        with without_progress_bars():
            network.save_pretrained(unfinished)
        unfinished.chmod(0o755)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def tiny_tokenizer(context: int = RECIPE.context) -> Qwen2Tokenizer:
    """Return the tokenizer: one token a byte of UTF-8, a tag, a role mark; nothing is merged.

    Any text comes back as it was (in Unicode form NFC). It is Qwen2's own tokenizer class with no
    merges, because that is the class that transformers makes for any folder with a Qwen2 model.
    """
    words = (*SPECIAL_TOKENS, *TAGS, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Qwen2Tokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[],
        unk_token=None,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return tokenizer


def tiny_config(recipe: Recipe = RECIPE) -> Qwen2Config:
    """Return the architecture of ``recipe``; it names its prompt template as ``pz_template``."""
    size = len(SPECIAL_TOKENS) + len(TAGS) + 256
    return Qwen2Config(
        vocab_size=math.ceil(size / 8) * 8,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.hidden // recipe.head_dim,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL_TOKENS.index("<|pad|>"),
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index("<|end|>"),
        dtype="float32",
        pz_template=TEMPLATE.name,
    )


def _warm_up(
    network: Any, chat: ChatTokenizer, recipe: Recipe, on_progress: Progress | None
) -> None:
    """Supervised learning on replies only; every pair is seen once."""
    matrices = [p for p in network.model.layers.parameters() if p.ndim == 2]
    others = [p for p in network.parameters() if all(p is not m for m in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=recipe.matrix_rate),
        torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
        for optimizer in optimizers
    ]
    puzzles, games = puzzle_pairs(recipe.seed), game_pairs(recipe.seed)
    network.train()
    for step in range(1, recipe.steps + 1):
        loss = _loss(network, chat, list(islice(puzzles, recipe.puzzles_a_step)))
        loss.backward()  # type: ignore[no-untyped-call]
        if step % recipe.game_every == 0:
            game_loss = _loss(network, chat, list(islice(games, recipe.games_a_step)))
            game_loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        network.zero_grad(set_to_none=True)
        if on_progress is not None:
            on_progress(step, recipe.steps, float(loss.detach()))


def _loss(network: Any, chat: ChatTokenizer, pairs: list[Pair]) -> torch.Tensor:
    """Return the mean cross-entropy of the replies' tokens, terminators included."""
    rows = []
    for pair in pairs:
        prompt = chat.render([{"role": "user", "content": pair.prompt}]).tolist()
        rows.append((prompt, [*chat.encode(pair.reply).tolist(), chat.end_of_turn_id]))
    width = max(len(prompt) + len(reply) for prompt, reply in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), _IGNORED)
    for row, (prompt, reply) in enumerate(rows):
        end = len(prompt) + len(reply)
        ids[row, :end] = torch.tensor(prompt + reply)
        labels[row, len(prompt) : end] = torch.tensor(reply)
    taught = labels[:, 1:] != _IGNORED
    hidden = network.model(ids).last_hidden_state[:, :-1][taught]
    return torch.nn.functional.cross_entropy(network.lm_head(hidden), labels[:, 1:][taught])


def _rate(step: int, recipe: Recipe) -> float:
    """Return the learning rate's factor: a linear rise, then a cosine down to a twentieth."""
    rise = min(1.0, (step + 1) / recipe.warm_steps)
    fall = 0.5 * (1 + math.cos(math.pi * min(step / recipe.steps, 1.0)))
    return rise * (0.05 + 0.95 * fall)


def _log_progress(step: int, steps: int, loss: float) -> None:
    if step % 80 == 0 or step == steps:
        _logger.info("tiny: step %d of %d, loss %.2f", step, steps, loss)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``; it is free again when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
