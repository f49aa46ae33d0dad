r"""Relatives of GRPO that differ from it in options only, each under its own name.

``dr-grpo`` (Liu et al., "Understanding R1-Zero-like training", 2025): A = R - mean, and the sum of
token losses over a constant length, so that neither a task's difficulty nor a reply's length
weighs in.

``rloo`` (Ahmadian et al., "Back to basics", 2024): A_i = R_i - mean(the others' R), per rollout;
the log-probs of a rollout are added up, not averaged.

``gspo`` (Zheng et al., "Group sequence policy optimization", 2025): the ratio is
s = exp(mean_t(log pi - log pi_old)) of the row, clipped to 1 - 3e-4 and 1 + 4e-4.

``cispo`` (MiniMax-M1, 2025): L = -1/N sum_t stop_gradient(min(r_t, 5)) A log pi, so that rare
tokens with large ratios keep their gradient.
"""

from __future__ import annotations

from pz_agents.algorithms.grpo import GRPO, Options

DR_GRPO = GRPO._replace(defaults=Options(scale="none", aggregation="const"))

RLOO = GRPO._replace(defaults=Options(scale="leave_one_out", aggregation="seq_mean_token_sum"))

GSPO = GRPO._replace(
    defaults=Options(
        importance="sequence", clip_low=3e-4, clip_high=4e-4, aggregation="seq_mean_token_mean"
    )
)

CISPO = GRPO._replace(defaults=Options(surrogate="cispo", clip_low=1.0, clip_high=4.0))
