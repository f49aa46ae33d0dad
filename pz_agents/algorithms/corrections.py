"""What to do when the weights that sampled are not those that learn: weights, masks, measures.

The sampler may be another engine than the learner, whose log-probs of the same tokens differ, or
it may have held older weights. Here ``rollout_log_probs`` are the sampler's own and
``old_log_probs`` the learner's, taken before its first update on the batch. Weights multiply a
token's loss after clipping and get no gradient; what they mask still counts in every denominator,
so that masking lowers the step instead of raising the rest. All tensors are [B, T] unless said.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pz_agents.algorithms.losses import MAX_LOG_RATIO, Totals, aggregate, keep, kl_estimate, ratio

Correction = Literal["none", "token_truncate", "token_mask", "seq_truncate", "seq_mask", "geo"]


BOUNDS: Mapping[Correction, tuple[float, float]] = {
    "none": (0.0, 0.0),
    "token_truncate": (0.0, 2.0),
    "token_mask": (0.5, 5.0),
    "seq_truncate": (0.0, 3.0),
    "seq_mask": (0.0, 3.0),
    "geo": (0.5, 1.5),
}
"""The bounds (low, high) that each rule was published with."""


class Mismatch(NamedTuple):
    """How far the sampler was from the learner, before anything is cut off; 0-dim tensors.

    kl: the k3 estimate of KL(sampler || learner). ratio, square: the means of rho and of its
    square. These are shares of means over all trained tokens, to be added up over micro-batches.
    largest: the largest |old - rollout| of a token of this batch, in nats.
    """

    kl: Tensor
    ratio: Tensor
    square: Tensor
    largest: Tensor


def effective_share(ratio: float, square: float) -> float:
    """Return the effective sample size over tokens as a fraction of them (Kish, 1965).

    It is (sum rho)^2 / (n sum rho^2), here from the two means; 1 where all rho are equal, and 0
    where there are none.
    """
    return min(ratio**2 / square, 1.0) if square else 0.0


def rollout_weights(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor,
    how: Correction,
    *,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """Return the weight w of each token, from rho = exp(old - rollout); 1 off the mask.

    ``token_truncate``: min(rho, high) (TIS). ``token_mask``: rho where it is in [low, high], else
    0 (IcePop). ``seq_truncate`` and ``seq_mask``: the product of a row's rho, cut at ``high`` or 0
    above it. ``geo``: min(rho, 2) in rows whose geometric mean of rho is in [low, high], else 0.

    Args:
        old_log_probs: under the learner before its first update on the batch.
        rollout_log_probs: as the engine that sampled reported them.
        mask: True on sampled tokens.
        how: the rule.
        low: lower bound of the rules that have one; None: the one in BOUNDS.
        high: upper bound; None: the one in BOUNDS.
    """
    low = BOUNDS[how][0] if low is None else low
    high = BOUNDS[how][1] if high is None else high
    with torch.no_grad():
        token = ratio(old_log_probs, rollout_log_probs, mask)
        logs = token.log().sum(-1, keepdim=True)
        row = logs.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        if how == "token_truncate":
            weights = token.clamp(max=high)
        elif how == "token_mask":
            weights = torch.where((token >= low) & (token <= high), token, 0.0)
        elif how == "seq_truncate":
            weights = row.clamp(max=high).expand_as(token)
        elif how == "seq_mask":
            weights = torch.where(row <= high, row, 0.0).expand_as(token)
        elif how == "geo":
            mean = (logs / mask.sum(-1, keepdim=True).clamp(min=1)).exp()
            inside = (mean >= low) & (mean <= high)
            weights = torch.where(inside, token.clamp(max=2.0), 0.0)
        else:
            weights = torch.ones_like(token)
        return torch.where(mask, weights, 1.0)


def mismatch(
    old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor, totals: Totals
) -> Mismatch:
    """Return how far the sampler was from the learner."""
    with torch.no_grad():
        kl = kl_estimate(rollout_log_probs, old_log_probs, mask)
        rho = ratio(old_log_probs, rollout_log_probs, mask)
        moved = keep(old_log_probs, mask) - keep(rollout_log_probs, mask)
        largest = moved.abs().max() if moved.numel() else moved.sum()
        mean = partial(aggregate, mask=mask, how="token_mean", totals=totals)
        return Mismatch(mean(kl), mean(rho), mean(rho.square()), largest)


def keeps_row(
    log_probs: Tensor, rollout_log_probs: Tensor, advantages: Tensor, mask: Tensor, delta: float
) -> Tensor:
    """Return [B] bool: False where A < 0 and mean_t(rollout - log_probs) > delta.

    Pushing down what the policy no longer says is where off-policy learning breaks first
    (DeepSeek-V3.2, 2025).

    Args:
        log_probs: under the weights being trained.
        rollout_log_probs: as sampled.
        advantages: the same on all trained tokens of a row.
        mask: True on sampled tokens.
        delta: in nats a token.
    """
    with torch.no_grad():
        moved = keep(rollout_log_probs, mask) - keep(log_probs, mask)
        count = mask.sum(-1).clamp(min=1)
        negative = keep(advantages, mask).sum(-1) < 0
        return ~(negative & (moved.sum(-1) / count > delta))
