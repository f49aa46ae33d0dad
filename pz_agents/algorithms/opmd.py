r"""Online policy mirror descent (Trinity-RFT, arXiv 2505.17826, 2025; after Kimi k1.5, 2025).

A rollout's advantage is its reward against its group's baseline, A_i = R_i - b, where b is the mean
or tau log mean exp(R / tau). There is no importance ratio, so rows may come from older weights:

    simple    L = 1/N sum_t -A log pi_t / (1 + tau)
    squared   L = mean_i (A_i - tau D_i)^2,                D_i = sum_t (log pi_t - log reference_t)
    pairwise  L = mean_{i<j} ((A_i - tau D_i) - (A_j - tau D_j))^2     over pairs of one group

each plus beta times the mean of k2 = (log pi_t - log reference_t)^2 / 2. The sums D_i are over the
tokens of a row; the reference is the starting weights, or with beta 0 the weights that sampled.

``opmd-reweight`` changes the advantages afterwards: a success earns ``success_advantage``, a
partial success ``alpha`` A, and the rest A. Published code has 3 and 1 for the former.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pydantic
import torch
from torch import Tensor

from pz_agents.algorithms import Algorithm, Credit
from pz_agents.algorithms.credit import Baseline, baseline_advantages, reweighted
from pz_agents.algorithms.losses import (
    Aggregation,
    Loss,
    Tokens,
    aggregate,
    keep,
    kl_estimate,
    policy_gradient_loss,
    ratio,
    ratio_stats,
)
from pz_agents.algorithms.rows import rewards_of, rows_with
from pz_agents.config import Settings
from pz_agents.rollout.programs import single
from pz_agents.sdk.types import Trajectory
from pz_envs.errors import ConfigError


class Options(Settings):
    """What can be changed about OPMD."""

    form: Literal["simple", "squared", "pairwise"] = "simple"
    """Which of the three losses; `pairwise` needs `max_tokens_per_microbatch` 0."""

    baseline: Baseline = "mean"
    """What a reward is compared with: the group's `mean` or `log_mean_exp`."""

    tau: float = pydantic.Field(default=1.0, ge=0)
    """How strongly the policy is held where it is; `log_mean_exp` needs it above 0."""

    beta: float = pydantic.Field(default=0.001, ge=0)
    """Weight of the k2 term to the starting weights."""

    success_advantage: float | None = None
    """What every success earns; None: advantages are not reweighted."""

    alpha: float = pydantic.Field(default=3.0, ge=0)
    """Factor on positive advantages below success, when they are reweighted."""

    success_reward: float = 1.0
    """The least reward that counts as success."""

    singletons: bool = False
    """A group of one earns its reward where it would be left out."""

    aggregation: Aggregation = "token_mean"
    """How token losses become one number in the simple form."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Options:
        if self.tau == 0 and (self.baseline == "log_mean_exp" or self.form != "simple"):
            raise ConfigError(
                "OPMD's `tau` is 0, which leaves nothing of `log_mean_exp` and of the forms "
                "`squared` and `pairwise`; set it above 0"
            )
        return self


def credit(trajectories: Sequence[Trajectory], options: Options) -> Credit:
    """Give every sampled token its rollout's reward against the baseline, reweighted if asked."""
    rewards = rewards_of(trajectories)
    groups = [item.group_id for item in trajectories]
    advantages = baseline_advantages(
        rewards,
        groups,
        baseline=options.baseline,
        tau=options.tau,
        singletons=options.singletons,
    )
    if options.success_advantage is not None:
        advantages = reweighted(
            advantages,
            rewards,
            groups,
            success_advantage=options.success_advantage,
            alpha=options.alpha,
            success_reward=options.success_reward,
        )
    return Credit(
        rows_with(trajectories, advantages),
        {"groups": advantages.groups, "usable_groups": advantages.usable},
    )


def loss(tokens: Tokens, options: Options) -> Loss:
    """Return the loss of the chosen form plus ``beta`` times k2.

    Raises:
        ConfigError: the form is pairwise and the batch was split.
    """
    now, mask, totals = tokens.log_probs, tokens.mask, tokens.totals
    reference = tokens.reference_log_probs
    stats = ratio_stats(tokens, ratio(now, tokens.old_log_probs, mask))
    if options.form == "simple":
        per_token = policy_gradient_loss(now, tokens.advantages, mask) / (1.0 + options.tau)
        value = aggregate(per_token, mask, options.aggregation, totals)
    else:
        start = tokens.old_log_probs if reference is None else reference
        rest = residuals(now, start, tokens.advantages, mask, options.tau)
        if options.form == "squared":
            value = keep(rest.square(), mask.any(-1)).sum() / max(totals.sequences, 1.0)
        else:
            value = _pairwise(rest, tokens)
    if reference is not None:
        kl = kl_estimate(now, reference, mask, "k2")
        value = value + options.beta * aggregate(kl, mask, options.aggregation, totals)
        stats["kl"] = aggregate(kl.detach(), mask, "token_mean", totals)
    return Loss(value, stats)


def residuals(
    log_probs: Tensor, reference: Tensor, advantages: Tensor, mask: Tensor, tau: float
) -> Tensor:
    """Return A_i - tau D_i of each row [B]; 0 for a row without trained tokens."""
    ratios = (keep(log_probs, mask) - keep(reference, mask)).sum(-1)
    return keep(advantages, mask).sum(-1) / mask.sum(-1).clamp(min=1) - tau * ratios


def _pairwise(rest: Tensor, tokens: Tokens) -> Tensor:
    """Return the mean over the groups' pairs of the squared difference of their residuals."""
    trained = tokens.mask.any(-1)
    if tokens.groups is None or float(trained.sum()) != tokens.totals.sequences:
        raise ConfigError(
            "OPMD's pairwise form compares all rollouts of a group with one another, so their "
            "rows must stay together; set `max_tokens_per_microbatch` to 0"
        )
    same = tokens.groups[:, None] == tokens.groups[None, :]
    pairs = torch.triu(same & trained[:, None] & trained[None, :], diagonal=1)
    squares = (rest[:, None] - rest[None, :]).square()
    return keep(squares, pairs).sum() / pairs.sum().clamp(min=1)


OPMD = Algorithm(program=single, credit=credit, loss=loss, defaults=Options())

OPMD_REWEIGHT = OPMD._replace(defaults=Options(success_advantage=3.0, alpha=3.0))
