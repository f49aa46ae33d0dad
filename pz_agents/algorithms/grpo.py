r"""Group relative policy optimisation (Shao et al., DeepSeekMath, 2024, eq. 3).

A task is tried G times. A rollout's advantage, the same for each token it sampled, is its reward
against its group's:

    A_i = (R_i - mean(R_1..R_G)) / (std(R_1..R_G) + 1e-4)

and with r_t = pi(token_t) / pi_old(token_t), over the N sampled tokens of the whole batch,

    L = 1/N sum_t [ -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A) + beta k3_t ]

where k3_t estimates KL(pi || reference). The paper averages within each rollout first
(``aggregation: seq_mean_token_mean``); the default here is the mean over tokens, which does not
favour short wrong answers. Groups whose rewards are all equal are left out and counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pydantic

from pz_agents.algorithms import Algorithm, Credit
from pz_agents.algorithms.credit import Scale, group_advantages
from pz_agents.algorithms.losses import (
    Aggregation,
    Loss,
    Tokens,
    aggregate,
    clipped_policy_loss,
    kl_estimate,
    ratio,
    ratio_stats,
)
from pz_agents.algorithms.rows import rows_of
from pz_agents.config import Settings
from pz_agents.rollout.programs import single
from pz_agents.sdk.types import Trajectory


class Options(Settings):
    """What can be changed about GRPO."""

    scale: Scale = "group"
    """Divide advantages by the deviation of the group, of the batch, or by none (Dr. GRPO)."""

    clip_low: float = pydantic.Field(default=0.2, ge=0, le=1)
    """The ratio is clipped below 1 - clip_low."""

    clip_high: float = pydantic.Field(default=0.2, ge=0)
    """The ratio is clipped above 1 + clip_high."""

    beta: float = pydantic.Field(default=0.0, ge=0)
    """Weight of the KL term to the starting weights; the paper used 0.04."""

    aggregation: Aggregation = "token_mean"
    """How token losses become one number."""


def credit(trajectories: Sequence[Trajectory], options: Options) -> Credit:
    """Give every sampled token its rollout's group advantage; a failed rollout has no reward."""
    rewards = [item.reward if item.status == "ok" else np.nan for item in trajectories]
    advantages = group_advantages(
        rewards, [item.group_id for item in trajectories], scale=options.scale
    )
    rows = [
        row
        for trajectory, value, used in zip(
            trajectories, advantages.values, advantages.used, strict=True
        )
        if used
        for row in rows_of(trajectory, float(value))
    ]
    return Credit(rows, {"groups": advantages.groups, "usable_groups": advantages.usable})


def loss(tokens: Tokens, options: Options) -> Loss:
    """Return the clipped policy loss plus ``beta`` times the KL estimate."""
    ratios = ratio(tokens.log_probs, tokens.old_log_probs, tokens.mask)
    per_token = clipped_policy_loss(
        ratios, tokens.advantages, tokens.mask, options.clip_low, options.clip_high
    )
    stats = ratio_stats(tokens, ratios, options.clip_low, options.clip_high)
    if tokens.reference_log_probs is not None:
        kl = kl_estimate(tokens.log_probs, tokens.reference_log_probs, tokens.mask)
        per_token = per_token + options.beta * kl
        stats["kl"] = aggregate(kl.detach(), tokens.mask, "token_mean", tokens.totals)
    value = aggregate(per_token, tokens.mask, options.aggregation, tokens.totals)
    return Loss(value, stats)


GRPO = Algorithm(program=single, credit=credit, loss=loss, defaults=Options())
