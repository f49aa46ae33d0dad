"""The learner on a GPU with a model of a real size; without one there is nothing to see."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pz_agents.algorithms import grpo
from pz_agents.algorithms.rows import TrainRow
from pz_agents.training.settings import TrainSettings
from pz_agents.training.update import Updater

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def qwen_1_5b() -> Qwen2ForCausalLM:
    """Random weights in the shape of Qwen2.5-1.5B."""
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return Qwen2ForCausalLM(config).bfloat16().eval()


def rows(lengths=(900, 400, 650, 300, 800, 120, 500, 700)) -> list[TrainRow]:
    rng = np.random.default_rng(0)
    found = []
    for index, length in enumerate(lengths):
        mask = np.arange(length) >= length // 2
        zeros = np.zeros(length, np.int32)
        found.append(
            TrainRow(
                ids=rng.integers(5, 150_000, size=length).astype(np.int32),
                mask=mask,
                log_probs=np.where(mask, -12.0, 0.0).astype(np.float32),
                versions=zeros,
                turns=zeros,
                advantages=np.where(mask, (-1.0) ** index, 0.0).astype(np.float32),
                trajectory_id=str(index),
                group_id="g",
            )
        )
    return found


def updater(module, **changes) -> Updater:
    given = {
        "env": "pz/Countdown-v0",
        "steps": 2,
        "learning_rate": 1e-5,
        "correction": "token_truncate",
        **changes,
    }
    return Updater(module, TrainSettings(**given), partial(grpo.loss, options=grpo.Options()))


@pytest.mark.parametrize("rank", [0, 16])
def test_a_step_of_a_model_of_a_billion_weights_moves_what_is_trained(rank):
    module = qwen_1_5b()
    one = updater(module, lora_rank=rank)
    assert one.autocast == torch.bfloat16
    trained = [p for p in module.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    before = [p.detach().clone() for p in trained]
    step = one.step_rows(rows())
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        one.accumulate(step)
        metrics = one.before_update()
        one.optimizer.step()
        module.zero_grad(set_to_none=True)
    assert one.updates == 2
    assert 0 < metrics["grad_norm"] < float("inf")
    moved = [not torch.equal(p, old) for p, old in zip(trained, before, strict=True)]
    assert sum(moved) > len(moved) / 2
    weights = sum(p.numel() for p in module.parameters())
    assert torch.cuda.max_memory_allocated() < weights * (20 if rank == 0 else 8) + 40e9


def test_out_of_memory_on_the_gpu_halves_the_micro_batches():
    module = qwen_1_5b()
    one = updater(module, max_tokens_per_microbatch=0, lora_rank=16)
    step = one.step_rows([replace(row) for row in rows((1024,) * 16)])
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    used = torch.cuda.memory_allocated()
    # Room for some 4,000 tokens of activations and logits.
    torch.cuda.set_per_process_memory_fraction(min((used + 30e9) / total, 1.0))
    try:
        one.accumulate(step)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert one.out_of_memory >= 1
    assert one.budget < 16 * 1024
    assert np.isfinite(one.before_update()["grad_norm"])
