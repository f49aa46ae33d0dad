"""Random noise by counter, and the top-k and top-p masks; all batched, on any device.

The noise of a token is a hash of (seed, position, token id): there is no generator state, so rows
can be batched, reordered and replayed without changing a sample.
"""

from __future__ import annotations

import torch


def gumbel_noise(seeds: torch.Tensor, position: int, size: int) -> torch.Tensor:
    """Return standard Gumbel noise [B, size] in float32.

    Args:
        seeds: [B] int64, one stream a row.
        position: the step within each stream.
        size: number of tokens in the vocabulary.
    """
    tokens = torch.arange(1, size + 1, dtype=torch.int64, device=seeds.device)
    step = torch.tensor(position + 1, dtype=torch.int64, device=seeds.device)
    streams = _mix(_mix(seeds) + step * _GOLDEN)
    bits = _logical_shift(_mix(streams[:, None] + tokens * _GOLDEN), 12)
    uniform = (bits.to(torch.float64) + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform)).to(torch.float32)


def mask_top_k(log_probs: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Set all but the ``top_k`` [B] likeliest of ``log_probs`` [B, V] to -inf; 0 keeps all."""
    size = log_probs.shape[-1]
    counts = torch.where(top_k > 0, top_k, size).clamp(max=size)
    ranked = log_probs.sort(-1, descending=True).values
    least = ranked.gather(-1, counts[:, None] - 1)
    return log_probs.masked_fill(log_probs < least, -torch.inf)


def mask_top_p(log_probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep the smallest set of likeliest tokens whose mass reaches ``top_p`` [B]; rest -inf."""
    ranked, order = log_probs.sort(-1, descending=True)
    mass = torch.softmax(ranked, -1)
    before = mass.cumsum(-1) - mass
    dropped = torch.zeros_like(log_probs, dtype=torch.bool)
    dropped.scatter_(-1, order, before >= top_p[:, None])
    return log_probs.masked_fill(dropped, -torch.inf)


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), in wrapping int64."""
    x = (x ^ _logical_shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _logical_shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
