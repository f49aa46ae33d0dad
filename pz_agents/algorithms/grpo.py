r"""Group relative policy optimisation (Shao et al., DeepSeekMath, 2024, eq. 3).

A task is tried G times. A rollout's advantage, the same for each token it sampled, is its reward
against its group's:

    A_i = (R_i - mean(R_1..R_G)) / (std(R_1..R_G) + 1e-4)

and with r_t = pi(token_t) / pi_old(token_t), over the N sampled tokens of the whole batch,

    L = 1/N sum_t [ -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A) + beta k3_t ]

where k3_t estimates KL(pi || reference). The paper averages within each rollout first
(``aggregation: seq_mean_token_mean``, which takes rows: a rollout whose context is cut on the way
is several); the default here is the mean over tokens, which does not favour short wrong answers.
Groups whose rewards are all equal are left out and counted. Other choices of these options go by
names of their own (``variants.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import pydantic

from pz_agents.algorithms import Algorithm, Credit
from pz_agents.algorithms.corrections import keeps_row
from pz_agents.algorithms.credit import Scale, group_advantages
from pz_agents.algorithms.losses import (
    Aggregation,
    Loss,
    Tokens,
    aggregate,
    clipped_policy_loss,
    kl_estimate,
    policy_gradient_loss,
    ratio,
    ratio_stats,
    sequence_ratio,
)
from pz_agents.algorithms.rows import rewards_of, rows_with
from pz_agents.config import Settings
from pz_agents.rollout.programs import single
from pz_agents.sdk.types import Trajectory


class Options(Settings):
    """What can be changed about GRPO."""

    scale: Scale = "group"
    """Divide advantages by the deviation of the group, of the batch, or by none (Dr. GRPO);
    `leave_one_out` compares a reward with the mean of the others (RLOO)."""

    importance: Literal["token", "sequence"] = "token"
    """Take the ratio of each token, or of a row's likelihood per token (GSPO)."""

    surrogate: Literal["clip", "cispo"] = "clip"
    """Clip the objective, or only the ratio's weight, so that no token loses its gradient."""

    clip_low: float = pydantic.Field(default=0.2, ge=0, le=1)
    """The ratio is clipped below 1 - clip_low."""

    clip_high: float = pydantic.Field(default=0.2, ge=0)
    """The ratio is clipped above 1 + clip_high."""

    dual_clip: float | None = pydantic.Field(default=None, gt=1)
    """A token with a negative advantage costs at most this times it (3 is usual); None: no cap."""

    off_policy_delta: float | None = pydantic.Field(default=None, gt=0)
    """Leave out rows with a negative advantage that the policy has moved this far from, in nats
    a token since they were sampled; None: keep all."""

    beta: float = pydantic.Field(default=0.0, ge=0)
    """Weight of the KL term to the starting weights; the paper used 0.04."""

    aggregation: Aggregation = "token_mean"
    """How token losses become one number."""

    @pydantic.model_validator(mode="after")
    def _cap_is_used(self) -> Options:
        if self.surrogate == "cispo" and self.dual_clip is not None:
            raise ValueError(
                f"dual_clip {self.dual_clip} does nothing with surrogate cispo; leave it out, or "
                "set surrogate to clip"
            )
        return self


def credit(trajectories: Sequence[Trajectory], options: Options) -> Credit:
    """Give every sampled token its rollout's group advantage; a failed rollout has no reward."""
    advantages = group_advantages(
        rewards_of(trajectories), [item.group_id for item in trajectories], scale=options.scale
    )
    return Credit(
        rows_with(trajectories, advantages),
        {"groups": advantages.groups, "usable_groups": advantages.usable},
    )


def loss(tokens: Tokens, options: Options) -> Loss:
    """Return the clipped policy loss plus ``beta`` times the KL estimate."""
    now, old, mask = tokens.log_probs, tokens.old_log_probs, tokens.mask
    ratios = (ratio if options.importance == "token" else sequence_ratio)(now, old, mask)
    clip_low = options.clip_low
    if options.surrogate == "clip":
        per_token = clipped_policy_loss(
            ratios, tokens.advantages, mask, clip_low, options.clip_high, options.dual_clip
        )
    else:
        clip_low = math.inf  # only the weight's upper side is clipped
        weights = ratios.clamp(max=1.0 + options.clip_high)
        per_token = policy_gradient_loss(now, tokens.advantages, mask, weights)
    stats = ratio_stats(tokens, ratios, clip_low, options.clip_high)
    if options.off_policy_delta is not None:
        sampled = old if tokens.rollout_log_probs is None else tokens.rollout_log_probs
        kept = keeps_row(now, sampled, tokens.advantages, mask, options.off_policy_delta)
        per_token = per_token * kept[:, None]
        stats["off_policy"] = aggregate(
            (~kept).float()[:, None].expand_as(mask), mask, "token_mean", tokens.totals
        )
    if tokens.reference_log_probs is not None:
        kl = kl_estimate(now, tokens.reference_log_probs, mask)
        per_token = per_token + options.beta * kl
        stats["kl"] = aggregate(kl.detach(), mask, "token_mean", tokens.totals)
    return Loss(aggregate(per_token, mask, options.aggregation, tokens.totals), stats)


GRPO = Algorithm(program=single, credit=credit, loss=loss, defaults=Options())
