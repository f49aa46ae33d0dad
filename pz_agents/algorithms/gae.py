"""Generalised advantage estimation and whitening: pure numpy over packed tokens.

Tokens are those the policy sampled and no others, trajectory after trajectory; the words of the
environment between two turns are skipped, so that what follows the last token of a turn is the
first token of the next. The same function over one entry a turn is the estimate by turns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

VARIANCE_EPSILON = 1e-8
"""Added to a variance before its root is taken; TRL's value."""


def gae(
    rewards: ArrayLike,
    values: ArrayLike,
    lengths: Sequence[int],
    *,
    gamma: float,
    lam: float,
    bootstrap: ArrayLike = 0.0,
) -> tuple[Floats, Floats]:
    """Return advantages [N] and returns [N] (Schulman et al., 2016, eq. 16).

    With V after a trajectory's last token its ``bootstrap``,

        delta_t = R_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   A_t + V_t

    Args:
        rewards: [N] of all trajectories, one after another.
        values: [N].
        lengths: [B] tokens of each trajectory; they add up to N.
        gamma: discount a token.
        lam: 1 is the return less the value, 0 the one-step error.
        bootstrap: [B] the value of what came after a trajectory that was cut short; 0: it ended.

    Raises:
        ValueError: the lengths do not add up.
    """
    rewards, values = np.asarray(rewards, np.float64), np.asarray(values, np.float64)
    sizes = np.asarray(lengths, np.int64)
    if rewards.shape != values.shape or rewards.shape != (int(sizes.sum()),):
        raise ValueError(
            f"{rewards.shape} rewards, {values.shape} values, {int(sizes.sum())} by the lengths"
        )
    advantages = np.zeros_like(values)
    ends = np.cumsum(sizes)
    after = np.broadcast_to(np.asarray(bootstrap, np.float64), sizes.shape).copy()
    later = np.zeros(sizes.shape)
    for back in range(1, int(sizes.max(initial=0)) + 1):
        live = sizes >= back
        here = ends[live] - back
        delta = rewards[here] + gamma * after[live] - values[here]
        advantages[here] = later[live] = delta + gamma * lam * later[live]
        after[live] = values[here]
    return advantages, advantages + values


def whitened(values: ArrayLike, *, shift: bool = True) -> Floats:
    """Return ``values`` [N] with variance 1 (ddof 1) and mean 0; fewer than two stay as they are.

    Args:
        values: of the whole batch.
        shift: False gives the mean back afterwards (whitened rewards).
    """
    values = np.asarray(values, np.float64)
    if values.size < 2:
        return values.copy()
    mean = values.mean()
    scaled: Floats = (values - mean) / np.sqrt(values.var(ddof=1) + VARIANCE_EPSILON)
    return scaled if shift else scaled + mean


def explained_variance(values: ArrayLike, returns: ArrayLike) -> float:
    """Return 1 - Var(returns - values) / Var(returns): 1 is perfect, 0 a constant's; NaN if flat.

    Args:
        values: [N] as the critic had them before it was trained on ``returns``.
        returns: [N].
    """
    values, returns = np.asarray(values, np.float64), np.asarray(returns, np.float64)
    spread = float(returns.var()) if returns.size else 0.0
    return 1.0 - float((returns - values).var()) / spread if spread > 0 else float("nan")


def adapted(weight: float, kl: float, target: float, rollouts: int, horizon: int) -> float:
    """Return the KL weight after a batch whose KL was ``kl`` (Ziegler et al., 2019, section 2.2).

    weight (1 + clip(kl / target - 1, -0.2, 0.2) rollouts / horizon)
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return weight * (1.0 + error * rollouts / horizon)
