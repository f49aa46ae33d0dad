"""What the learner's test files share: a small network, rows for it, and an updater over it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from transformers import Qwen2ForCausalLM

from pz_agents.algorithms import grpo
from pz_agents.algorithms.rows import TrainRow
from pz_agents.models.recipe import Recipe
from pz_agents.models.tiny import tiny_config
from pz_agents.training.settings import TrainSettings
from pz_agents.training.update import Updater

RECIPE = Recipe(layers=2, hidden=32, key_value_heads=1, feed_forward=32, context=128)


def network(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(tiny_config(RECIPE)).eval()


def random_rows(lengths=(9, 5, 12, 7, 6, 12), seed=0) -> list[TrainRow]:
    """Rows of the given lengths whose log-probs nobody sampled."""
    rng = np.random.default_rng(seed)
    rows = []
    for index, length in enumerate(lengths):
        mask = rng.random(length) < 0.5
        mask[0], mask[-1] = False, True
        zeros = np.zeros(length, np.int32)
        rows.append(
            TrainRow(
                ids=rng.integers(5, 100, size=length).astype(np.int32),
                mask=mask,
                log_probs=np.where(mask, rng.normal(-5.6, 0.2, length), 0).astype(np.float32),
                versions=zeros,
                turns=zeros,
                advantages=np.where(mask, rng.normal(), 0.0).astype(np.float32),
                trajectory_id=str(index),
                group_id=str(index // 2),
            )
        )
    return rows


def own_log_probs(module, rows, temperature=1.0) -> list[TrainRow]:
    """The rows with the log-probs of ``module``, each taken alone."""
    found = []
    for row in rows:
        with torch.no_grad():
            logits = module(torch.tensor(row.ids[None]).long()).logits[0] / temperature
        ids = torch.tensor(row.ids[1:, None]).long()
        every = torch.log_softmax(logits.float(), -1)[:-1].gather(-1, ids)[:, 0]
        log_probs = np.where(row.mask, np.concatenate([[0.0], every.numpy()]), 0.0)
        found.append(replace(row, log_probs=log_probs.astype(np.float32)))
    return found


def settings(**changes) -> TrainSettings:
    return TrainSettings(**{"env": "pz/Countdown-v0", "steps": 3, "learning_rate": 1e-2, **changes})


def loss_of(**options):
    return partial(grpo.loss, options=grpo.Options(**options))


def updater(module, *, reference=None, loss=None, **changes) -> Updater:
    return Updater(module, settings(**changes), loss or loss_of(), reference)


def gradients(module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
