r"""Reward-ranked fine-tuning: learn to say again what went well.

RAFT (Dong et al., 2023) accepts some rollouts and imitates them; the rest teaches nothing:

    L = 1/N_D sum_{t in D} -log pi_t

over the N_D sampled tokens of the accepted rollouts D alone, so that how many were rejected does
not scale the step. Accepted is a reward of at least ``threshold``, the best of each group, or the
best fraction of the whole step. RAFT++ (``raft-pp``; Xiong et al., "A minimalist approach to LLM
reasoning", 2025) puts the clipped ratio in place of the log-prob, with A = 1:

    L = 1/N_D sum_{t in D} -min(r_t, clip(r_t, 1 - clip_low, 1 + clip_high))

The program marks rejected rollouts as such, so that the store tells them from accepted ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pydantic
from numpy.typing import ArrayLike, NDArray

from pz_agents.algorithms import Algorithm, Credit
from pz_agents.algorithms.credit import members_of
from pz_agents.algorithms.losses import (
    Aggregation,
    Loss,
    Tokens,
    aggregate,
    clipped_policy_loss,
    policy_gradient_loss,
    ratio,
    ratio_stats,
)
from pz_agents.algorithms.rows import rows_of
from pz_agents.config import Settings
from pz_agents.rollout.programs import RolloutContext, Task, single
from pz_agents.sdk.types import Trajectory


class Options(Settings):
    """What can be changed about RAFT."""

    rule: Literal["threshold", "best_of_group", "top_frac"] = "threshold"
    """Which rollouts are accepted."""

    threshold: float = 1.0
    """The least reward that rule `threshold` accepts."""

    top_frac: float = pydantic.Field(default=0.25, gt=0, le=1)
    """The part of a step's rollouts that rule `top_frac` accepts, at least one."""

    clipped: bool = False
    """RAFT++: the clipped ratio in place of the log-prob."""

    clip_low: float = pydantic.Field(default=0.2, ge=0, le=1)
    """The ratio is clipped below 1 - clip_low."""

    clip_high: float = pydantic.Field(default=0.2, ge=0)
    """The ratio is clipped above 1 + clip_high."""

    aggregation: Aggregation = "token_mean"
    """How token losses become one number."""


def accepted(rewards: ArrayLike, groups: Sequence[str], options: Options) -> NDArray[np.bool_]:
    """Return [N] bool, True for the rollouts to imitate; of equals the first is taken.

    Args:
        rewards: [N] floats; NaN where a reward is missing, which is never accepted.
        groups: [N] the group each rollout belongs to.
        options: the rule.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if options.rule == "threshold":
        return rewards >= options.threshold
    chosen = np.zeros(rewards.shape, np.bool_)
    if options.rule == "best_of_group":
        for members in members_of(rewards, groups):
            chosen[members[np.argmax(rewards[members])]] = True
        return chosen
    # NaN sorts last.
    order = np.argsort(-rewards, kind="stable")
    present = int((~np.isnan(rewards)).sum())
    chosen[order[: math.ceil(options.top_frac * present)]] = True
    return chosen


def program(context: RolloutContext, tasks: Sequence[Task]) -> Iterator[Trajectory]:
    """Play as ``single`` does, then yield all rollouts with the rejected ones marked."""
    options = context.options if isinstance(context.options, Options) else Options()
    played = sorted(single(context, tasks), key=lambda item: (item.group_id, item.attempt))
    for trajectory, good in zip(played, _accepted(played, options), strict=True):
        if good or trajectory.status == "failed":
            yield trajectory
        else:
            yield replace(trajectory, status="rejected")


def credit(trajectories: Sequence[Trajectory], options: Options) -> Credit:
    """Give the sampled tokens of accepted rollouts an advantage of 1 and leave out the rest."""
    chosen = _accepted(trajectories, options)
    kept = [item for item, good in zip(trajectories, chosen, strict=True) if good]
    stats = {
        "groups": len({item.group_id for item in trajectories if item.status != "failed"}),
        "usable_groups": len({item.group_id for item in kept}),
        "accepted": len(kept) / max(len(trajectories), 1),
    }
    return Credit([row for item in kept for row in rows_of(item, 1.0)], stats)


def loss(tokens: Tokens, options: Options) -> Loss:
    """Return the negative log-likelihood of what was accepted, or RAFT++'s clipped ratio."""
    ratios = ratio(tokens.log_probs, tokens.old_log_probs, tokens.mask)
    if options.clipped:
        per_token = clipped_policy_loss(
            ratios, tokens.advantages, tokens.mask, options.clip_low, options.clip_high
        )
        stats = ratio_stats(tokens, ratios, options.clip_low, options.clip_high)
    else:
        per_token = policy_gradient_loss(tokens.log_probs, tokens.advantages, tokens.mask)
        stats = ratio_stats(tokens, ratios)
    return Loss(aggregate(per_token, tokens.mask, options.aggregation, tokens.totals), stats)


def _accepted(trajectories: Sequence[Trajectory], options: Options) -> NDArray[np.bool_]:
    """Return the rule's verdict on trajectories; a mark from an earlier verdict changes nothing."""
    rewards = [item.reward if item.status != "failed" else np.nan for item in trajectories]
    return accepted(rewards, [item.group_id for item in trajectories], options)


RAFT = Algorithm(program=program, credit=credit, loss=loss, defaults=Options())

RAFT_PP = RAFT._replace(defaults=Options(clipped=True))
