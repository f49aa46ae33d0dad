"""Losses as pure functions on per-token tensors.

Every per-token tensor is ``[B, T]`` and indexed by the token it describes: ``log_probs[b, t]`` is
the log-prob of token ``t`` given everything before it. ``mask`` is True where a token was sampled
by the policy; whatever stands elsewhere, NaN and infinities included, changes neither a loss nor a
gradient by one bit. Every sum is divided by totals of the whole optimizer batch, so a loss is the
sum of the losses of its micro-batches, however the rows are split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "const"]
KlEstimator = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to plus and minus this before ``exp``."""

MAX_K3 = 10.0
"""The k3 estimate of one token is clamped to plus and minus this."""


class Totals(NamedTuple):
    """What the whole optimizer batch holds, over all its micro-batches.

    tokens: trained tokens. sequences: rows with at least one of them (a
    rollout whose prompts do not continue one another is several). length: the constant row
    length that aggregation ``const`` divides by.
    """

    tokens: float
    sequences: float
    length: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """What a loss function sees of one micro-batch.

    log_probs: [B, T] under the weights being trained, with gradient.
    old_log_probs: [B, T] under the weights that sampled; with a correction, the learner's own
        before the first update.
    advantages: [B, T]. mask: [B, T] bool.
    reference_log_probs: [B, T] under the frozen reference, where the algorithm asked for one.
    totals: of the whole optimizer batch.
    groups: [B] the number of each row's group, for losses that compare rollouts of one task.
    entropies: [B, T] of what each token was sampled from, with gradient; where asked for.
    rollout_log_probs: [B, T] as the sampler reported them; None: they are ``old_log_probs``.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    totals: Totals
    reference_log_probs: Tensor | None = None
    groups: Tensor | None = None
    entropies: Tensor | None = None
    rollout_log_probs: Tensor | None = None


class Loss(NamedTuple):
    """A loss and what is worth knowing about it.

    stats: 0-dim tensors, each this micro-batch's share of a mean over all trained tokens; the
    shares of all micro-batches add up to that mean.
    """

    value: Tensor
    stats: Mapping[str, Tensor]


def predictions(logits: Tensor, count: int) -> Tensor:
    """Return the logits that predict the last ``count`` tokens; the only shift there is.

    Args:
        logits: [B, L, V] as a causal model gives them: position t predicts token t + 1.
        count: at most L - 1.
    """
    return logits[:, -count - 1 : -1]


def token_log_probs(
    logits: Tensor, ids: Tensor, temperature: float, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Return log-probs [...] of ``ids`` and the entropies [...] in nats, detached by default.

    Both are of softmax(logits / temperature), taken in float32 whatever the logits are.

    Args:
        logits: [..., V], each the prediction of the id at the same place.
        ids: [...].
        temperature: of sampling, above 0.
        entropy_gradient: the entropies keep their graph.
    """
    log_softmax = torch.log_softmax(logits.float() / temperature, dim=-1)
    chosen = log_softmax.gather(-1, ids.long().unsqueeze(-1)).squeeze(-1)
    if entropy_gradient:
        # The gradient of ``entr`` is infinite where a probability is 0.
        return chosen, -(log_softmax.exp() * log_softmax).sum(-1)
    entropy = torch.special.entr(log_softmax.detach().exp()).sum(-1)
    return chosen, entropy


def keep(values: Tensor, mask: Tensor) -> Tensor:
    """Return ``values`` with zeros where ``mask`` is False; junk there gets no gradient either."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Return exp(log_probs - old_log_probs) [B, T], 1 where ``mask`` is False."""
    difference = keep(log_probs, mask) - keep(old_log_probs, mask)
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sequence_ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Return each row's exp(mean_t(log_probs - old_log_probs)) on all its tokens [B, T].

    GSPO's ratio: of the whole rows' likelihoods, per token (Zheng et al., 2025).
    """
    difference = keep(log_probs, mask) - keep(old_log_probs, mask)
    mean = difference.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return mean.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().expand_as(log_probs)


def clipped_policy_loss(
    ratios: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """Return -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) per token [B, T].

    With ``dual_clip`` c, a token with A < 0 costs at most -c A (Ye et al., "Mastering complex
    control in MOBA games", 2020; c = 3).
    """
    advantages = keep(advantages, mask)
    clipped = ratios.clamp(1.0 - clip_low, 1.0 + clip_high)
    losses = -torch.minimum(ratios * advantages, clipped * advantages)
    if dual_clip is not None:
        worst = -dual_clip * advantages
        losses = torch.where(advantages < 0, torch.minimum(losses, worst), losses)
    return keep(losses, mask)


def policy_gradient_loss(
    log_probs: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Return -w A log_prob per token [B, T], REINFORCE's; ``weights`` [B, T] get no gradient."""
    kept = keep(log_probs, mask)
    if weights is not None:
        kept = kept * keep(weights, mask).detach()
    return keep(-keep(advantages, mask) * kept, mask)


def kl_estimate(
    log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor, kind: KlEstimator = "k3"
) -> Tensor:
    """Return an estimate of KL(policy || reference) per token [B, T].

    With d = log_probs - reference_log_probs: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d
    (Schulman, "Approximating KL divergence", 2020).
    """
    difference = keep(log_probs, mask) - keep(reference_log_probs, mask)
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    inverse_ratio = (-difference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return (inverse_ratio - 1.0 + difference).clamp(-MAX_K3, MAX_K3)


def soft_cross_entropy(scores: Tensor, targets: Tensor, states: float) -> Tensor:
    """Return -sum_a q_a log softmax(scores)_a, a share of the mean over ``states`` states.

    Its gradient is softmax(scores) - q. What was never visited stays in the denominator; what may
    not be played, or pads a row, has the score -inf and takes no part.

    Args:
        scores: [S, A] already divided by the prior's temperature; -inf off the list.
        targets: [S, A] shares q of each state's visits; 0 off the list.
        states: S over all micro-batches of the optimizer batch.
    """
    log_probs = keep(torch.log_softmax(scores.float(), -1), scores > -math.inf)
    return -(targets * log_probs).sum() / max(states, 1.0)


def aggregate(values: Tensor, mask: Tensor, how: Aggregation, totals: Totals) -> Tensor:
    """Reduce per-token values [B, T] to this micro-batch's share of the batch's loss.

    ``token_mean``: sum / tokens. ``seq_mean_token_mean``: mean over rows of each row's mean.
    ``seq_mean_token_sum``: mean over rows of each row's sum. ``const``: sum / (rows * length).
    With nothing to train the result is 0 and still has a graph.
    """
    kept = keep(values, mask)
    sequences = max(totals.sequences, 1.0)
    if how == "token_mean":
        return kept.sum() / max(totals.tokens, 1.0)
    if how == "seq_mean_token_mean":
        return (kept.sum(-1) / mask.sum(-1).clamp(min=1)).sum() / sequences
    if how == "seq_mean_token_sum":
        return kept.sum() / sequences
    return kept.sum() / (sequences * totals.length)


def ratio_stats(
    tokens: Tokens, ratios: Tensor, clip_low: float = math.inf, clip_high: float = math.inf
) -> dict[str, Tensor]:
    """Return how far the policy has moved since it sampled, as shares of token means.

    ``clip_low`` and ``clip_high`` are the fractions of tokens whose gradient the clip stopped (0
    for losses that do not clip); ``approx_kl`` is the mean of log_probs_old - log_probs.
    """
    with torch.no_grad():
        advantages = keep(tokens.advantages, tokens.mask)
        moved = keep(tokens.old_log_probs, tokens.mask) - keep(tokens.log_probs, tokens.mask)
        values = {
            "ratio": ratios,
            "approx_kl": moved,
            "clip_low": ((ratios < 1.0 - clip_low) & (advantages < 0)).float(),
            "clip_high": ((ratios > 1.0 + clip_high) & (advantages > 0)).float(),
        }
        return {
            name: aggregate(value, tokens.mask, "token_mean", tokens.totals)
            for name, value in values.items()
        }
