r"""Proximal policy optimisation with a critic (Schulman et al., 2017).

R_t is what a turn earned, on its last token (KL to the starting weights comes off every token
where ``kl_reward`` is set), and V_t the critic's value of what was there before token t. Over the
sampled tokens of an episode alone (GAE, Schulman et al., 2016):

    delta_t = R_t + gamma V_{t+1} - V_t      A_t = delta_t + gamma lam A_{t+1}      G_t = A_t + V_t

where the episode's own end is worth 0 and a limit's V(what would have come next). With
r_t = pi(token_t) / pi_old(token_t), A whitened over the batch, and N tokens, the two losses are

    L_pi = 1/N sum_t [ -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A) + beta k3_t - c H_t ]
    L_V  = 1/N sum_t 1/2 max((V - G)^2, (V_old + clip(V - V_old, -value_clip, value_clip) - G)^2)

The critic is a network of its own with its own optimizer and takes its steps first
(``training/critic.py``). A group may be one attempt: nothing is compared within groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pydantic
from numpy.typing import NDArray
from torch import Tensor

from pz_agents.algorithms import Algorithm, Credit, CriticRule, Estimate
from pz_agents.algorithms.gae import explained_variance, gae, whitened
from pz_agents.algorithms.losses import (
    Aggregation,
    Loss,
    Tokens,
    Totals,
    aggregate,
    clipped_policy_loss,
    keep,
    kl_estimate,
    ratio,
    ratio_stats,
)
from pz_agents.algorithms.rows import TrainRow, rows_of
from pz_agents.config import Settings
from pz_agents.rollout.programs import single
from pz_agents.sdk.types import Trajectory


class Options(Settings):
    """What can be changed about PPO."""

    gamma: float = pydantic.Field(default=1.0, gt=0, le=1)
    """Discount a token (a turn where `level` is `turn`)."""

    lam: float = pydantic.Field(default=0.95, ge=0, le=1)
    """GAE's lambda; 1 takes the whole return, 0 the next value."""

    level: Literal["token", "turn"] = "token"
    """What an entry of GAE is: a token, or a turn, whose tokens then share one advantage."""

    bootstrap: bool = True
    """An episode that a limit cut short goes on with the critic's value; False: it is over."""

    whiten: bool = True
    """Advantages get mean 0 and variance 1 over the batch."""

    whiten_rewards: bool = False
    """Token rewards get variance 1 over the batch and keep their mean."""

    clip_low: float = pydantic.Field(default=0.2, ge=0, le=1)
    """The ratio is clipped below 1 - clip_low."""

    clip_high: float = pydantic.Field(default=0.2, ge=0)
    """The ratio is clipped above 1 + clip_high."""

    dual_clip: float | None = pydantic.Field(default=None, gt=1)
    """A token with a negative advantage costs at most this times it; None: no cap."""

    beta: float = pydantic.Field(default=0.0, ge=0)
    """Weight of the KL to the starting weights in the loss; see also the setting `kl_reward`."""

    entropy_coef: float = pydantic.Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""

    aggregation: Aggregation = "token_mean"
    """How the policy's token losses become one number."""

    value_clip: float | None = pydantic.Field(default=0.2, gt=0)
    """A value may move this far from the old one before the loss stops paying; in units of the
    return, so raise it where rewards are large. None: no clip."""

    critic_model: str = ""
    """What the critic starts from, `tiny` or a folder; empty: the policy's own starting weights."""

    critic_learning_rate: float = pydantic.Field(default=5e-6, gt=0)
    """Highest learning rate of the critic's own AdamW."""

    critic_update_steps: int = pydantic.Field(default=12, ge=1)
    """Mini-batches that the rows are shuffled into for the critic, one update each."""


def credit(trajectories: Sequence[Trajectory], options: Options) -> Credit:
    """Return the rows of every episode that did not fail, with the rewards of their tokens."""
    kept = [item for item in trajectories if item.status == "ok"]
    rows = [row for item in kept for row in rows_of(item, advantage=0.0)]
    groups = {item.group_id for item in kept}
    return Credit(rows, {"groups": len(groups), "usable_groups": len(groups)})


def estimate(
    rows: Sequence[TrainRow],
    values: Sequence[NDArray[np.float32]],
    lasts: dict[str, float],
    options: Options,
) -> Estimate:
    """Return the rows with their advantages, and the returns that the critic is to learn.

    Args:
        rows: a trajectory's rows stand together and in order.
        values: [L] of each row, read on the mask alone.
        lasts: by trajectory, the value of what came after it; absent: nothing did.
        options: of the algorithm.
    """
    if not rows:
        return Estimate([], [], {})
    counts = [int(row.mask.sum()) for row in rows]
    names = np.repeat([row.trajectory_id for row in rows], counts)
    moved = np.append(True, names[1:] != names[:-1])
    turns = np.concatenate([row.turns[row.mask] for row in rows])
    rewards = np.concatenate([row.rewards[row.mask] for row in rows]).astype(np.float64)
    flat = np.concatenate([each[row.mask] for each, row in zip(values, rows, strict=True)])
    if options.whiten_rewards:
        rewards = whitened(rewards, shift=False)
    # Where an entry begins: at each token, or at the first token of each turn.
    begins = moved | (np.diff(turns, prepend=-1) != 0) | (options.level == "token")
    starts, firsts = np.flatnonzero(begins), np.flatnonzero(moved)
    lengths = np.diff(np.append(np.searchsorted(starts, firsts), len(starts)))
    found, returns = gae(
        np.add.reduceat(rewards, starts),
        flat[starts],
        lengths.tolist(),
        gamma=options.gamma,
        lam=options.lam,
        bootstrap=[lasts.get(str(names[place]), 0.0) for place in firsts],
    )
    entry = np.cumsum(begins) - 1
    advantages, goals = found[entry], returns[entry]
    stats = {
        "advantage": float(advantages.mean()),
        "advantage_std": float(advantages.std()),
        "value": float(flat.mean()),
        "return": float(goals.mean()),
        "explained_variance": explained_variance(flat, goals),
    }
    if options.whiten:
        advantages = whitened(advantages)
    filled = [
        replace(row, advantages=each)
        for row, each in zip(rows, _spread(rows, advantages), strict=True)
    ]
    return Estimate(filled, _spread(rows, goals), stats)


def loss(tokens: Tokens, options: Options) -> Loss:
    """Return the clipped policy loss with its KL term and its entropy bonus."""
    mask = tokens.mask
    ratios = ratio(tokens.log_probs, tokens.old_log_probs, mask)
    per_token = clipped_policy_loss(
        ratios, tokens.advantages, mask, options.clip_low, options.clip_high, options.dual_clip
    )
    stats = ratio_stats(tokens, ratios, options.clip_low, options.clip_high)
    if tokens.reference_log_probs is not None:
        kl = kl_estimate(tokens.log_probs, tokens.reference_log_probs, mask)
        per_token = per_token + options.beta * kl
        stats["kl"] = aggregate(kl.detach(), mask, "token_mean", tokens.totals)
    if options.entropy_coef and tokens.entropies is not None:
        per_token = per_token - options.entropy_coef * keep(tokens.entropies, mask)
    return Loss(aggregate(per_token, mask, options.aggregation, tokens.totals), stats)


def value_loss(
    values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, totals: Totals, options: Options
) -> Loss:
    """Return the critic's loss, a mean over tokens; all tensors are [B, T].

    Args:
        values: with gradient.
        old: before the critic's first update on these rows.
        returns: what was estimated from ``old``.
        mask: True on sampled tokens.
        totals: of the whole optimizer batch.
        options: of the algorithm.
    """
    values, old, returns = keep(values, mask), keep(old, mask), keep(returns, mask)
    losses = (values - returns).square()
    clip = options.value_clip
    if clip is None:
        return Loss(0.5 * aggregate(losses, mask, "token_mean", totals), {})
    moved = old + (values - old).clamp(-clip, clip)
    clipped = (moved - returns).square()
    value = 0.5 * aggregate(losses.maximum(clipped), mask, "token_mean", totals)
    stopped = aggregate((clipped > losses).float(), mask, "token_mean", totals)
    return Loss(value, {"value_clip": stopped})


def _spread(rows: Sequence[TrainRow], flat: NDArray[np.float64]) -> list[NDArray[np.float32]]:
    """Return [L] of each row with the flat entries on its mask, 0 elsewhere."""
    spread, first = [], 0
    for row in rows:
        place = np.zeros(len(row.ids), np.float32)
        count = int(row.mask.sum())
        place[row.mask] = flat[first : first + count]
        first += count
        spread.append(place)
    return spread


PPO = Algorithm(
    program=single,
    credit=credit,
    loss=loss,
    defaults=Options(),
    critic=CriticRule(estimate=estimate, loss=value_loss),
)
