"""K candidates after one prefix: the prefix computed once, against K full forward passes.

One thread, the ways interleaved, the median of the paired ratios. Prints one line a way, with the
largest difference from the full passes' log-probs.

    python benchmarks/scoring.py [--prefix 256] [--candidates 16] [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pz_agents.models.scoring import score_expanded, score_tree
from pz_agents.sdk.types import Ids, LogProbs


def full_passes(network: LlamaForCausalLM, prefix: Ids, candidates: list[Ids]) -> list[LogProbs]:
    """Score each candidate with a forward pass of its own over prefix and candidate."""
    return [_pass(network, prefix, [candidate])[0] for candidate in candidates]


def padded_batch(network: LlamaForCausalLM, prefix: Ids, candidates: list[Ids]) -> list[LogProbs]:
    """Score all candidates in one padded batch, the prefix repeated in every row."""
    return _pass(network, prefix, candidates)


@torch.no_grad()
def _pass(network: LlamaForCausalLM, prefix: Ids, candidates: list[Ids]) -> list[LogProbs]:
    longest = max(map(len, candidates))
    ids = np.zeros((len(candidates), len(prefix) + longest), np.int64)
    mask = np.zeros_like(ids)
    for row, candidate in enumerate(candidates):
        end = len(prefix) + len(candidate)
        ids[row, :end] = np.concatenate([prefix, candidate])
        mask[row, :end] = 1
    tokens = torch.from_numpy(ids)
    output = network(
        tokens, attention_mask=torch.from_numpy(mask), use_cache=False, logits_to_keep=longest + 1
    )
    log_probs = torch.log_softmax(output.logits[:, :-1].float(), -1)
    picked = log_probs.gather(-1, tokens[:, len(prefix) :, None])[..., 0].numpy()
    return [picked[row, : len(candidate)] for row, candidate in enumerate(candidates)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefix", type=int, default=256)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    network = LlamaForCausalLM(config).eval()
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, 4096, options.prefix).astype(np.int32)
    candidates = [
        rng.integers(0, 4096, int(rng.integers(2, 9))).astype(np.int32)
        for _ in range(options.candidates)
    ]
    ways: dict[str, Callable[..., list[LogProbs]]] = {
        "full passes": full_passes,
        "padded batch": padded_batch,
        "cache expanded": score_expanded,
        "tree mask": score_tree,
    }
    expected = np.concatenate(full_passes(network, prefix, candidates))
    errors = {
        name: float(np.abs(np.concatenate(way(network, prefix, candidates)) - expected).max())
        for name, way in ways.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            start = time.process_time()
            way(network, prefix, candidates)
            seconds[name].append(time.process_time() - start)
    print(f"prefix {options.prefix}, {options.candidates} candidates, 1 thread, CPU time")
    for name in ways:
        pairs = zip(seconds["full passes"], seconds[name], strict=True)
        ratio = statistics.median(full / own for full, own in pairs)
        median = 1000 * statistics.median(seconds[name])
        print(f"{name:15s} {median:8.1f} ms  {ratio:6.2f} x  max error {errors[name]:.1e}")


if __name__ == "__main__":
    main()
