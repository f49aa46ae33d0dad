"""A learner step through TRL's loop against plain torch on the same rows.

The same model, rows, loss and optimizer; one thread; the two ways interleaved; CPU time, the
median of the paired ratios. What TRL's loop costs beyond the arithmetic is the excess over 1.

    python benchmarks/learner.py [--rows 128] [--length 64] [--steps 12]
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2ForCausalLM

from pz_agents.algorithms.grpo import GRPO, Options
from pz_agents.algorithms.losses import Tokens, Totals
from pz_agents.algorithms.rows import TrainRow
from pz_agents.models.tiny import tiny_config, tiny_tokenizer
from pz_agents.training.settings import TrainSettings
from pz_agents.training.trl_learner import Learner, batch_of, completion_log_probs


def random_rows(count: int, length: int, seed: int) -> list[TrainRow]:
    """Return rows of two thirds prompt and one third reply, of lengths around ``length``."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        ids = rng.integers(5, 100, size=int(rng.integers(length // 2, length + 1))).astype(np.int32)
        mask = np.arange(len(ids)) >= len(ids) * 2 // 3
        nothing = np.zeros(len(ids), np.int32)
        log_probs = np.where(mask, -4.6, 0.0).astype(np.float32)
        advantages = np.where(mask, rng.normal(), 0.0).astype(np.float32)
        rows.append(
            TrainRow(ids, mask, log_probs, nothing, nothing, advantages, str(index), str(index))
        )
    return rows


def plain_step(
    network: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, rows: Sequence[TrainRow]
) -> None:
    """Take one step as one would without any trainer."""
    batch = batch_of(rows, 0, 1)
    log_probs, _ = completion_log_probs(network, batch, 1.0)
    mask = batch["tool_mask"].bool()
    totals = Totals(float(mask.sum()), float(mask.any(-1).sum()))
    tokens = Tokens(log_probs, batch["old_per_token_logps"], batch["advantages"], mask, totals)
    torch.autograd.backward(GRPO.loss(tokens, Options()).value)
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # the rows' log-probs are made up, and the learner notices
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = Qwen2ForCausalLM(tiny_config())
    other = copy.deepcopy(network).train()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-4, weight_decay=0.0)
    settings = TrainSettings(env="benchmark", steps=options.steps, learning_rate=1e-4)
    learner = Learner(network, tiny_tokenizer(), settings, partial(GRPO.loss, options=Options()))
    marks: list[float] = []
    plain: list[float] = []

    def collect(step: int) -> list[TrainRow]:
        rows = random_rows(options.rows, options.length, step)
        began = time.process_time()
        plain_step(other, optimizer, rows)
        plain.append(time.process_time() - began)
        marks.append(time.process_time())
        return rows

    ours: list[float] = []

    def after_step(step: int, metrics: object) -> bool:
        ours.append(time.process_time() - marks[-1])
        return True

    with tempfile.TemporaryDirectory() as folder:
        learner.run(1, options.steps, collect, after_step, Path(folder))
    ratio = statistics.median(a / b for a, b in zip(ours[1:], plain[1:], strict=True))
    print(f"plain torch {statistics.median(plain[1:]) * 1e3:.0f} ms a step of {options.rows} rows")
    print(f"learner     {statistics.median(ours[1:]) * 1e3:.0f} ms, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
