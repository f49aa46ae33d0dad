"""Rewards and values as categories: the transform h, two-hot targets, and the way back.

h(x) = sign(x) (sqrt(|x| + 1) - 1) + 0.001 x (Pohlen et al. 2018, arXiv 1805.11593) squeezes scores
of very different games into -50..50; a number between two atoms is split over both (MuZero,
appendix F). There is no label smoothing: it would pull every decoded value towards 0.
"""

from __future__ import annotations

import torch

LIMIT = 50
ATOMS = 2 * LIMIT + 1
_EPSILON = 0.001


def transform(values: torch.Tensor) -> torch.Tensor:
    """Return h of each value."""
    return torch.sign(values) * (torch.sqrt(values.abs() + 1) - 1) + _EPSILON * values


def inverse(scaled: torch.Tensor) -> torch.Tensor:
    """Return x for each h(x)."""
    root = torch.sqrt(1 + 4 * _EPSILON * (scaled.abs() + 1 + _EPSILON))
    return torch.sign(scaled) * (((root - 1) / (2 * _EPSILON)) ** 2 - 1)


def two_hot(values: torch.Tensor) -> torch.Tensor:
    """Return each value as a distribution over the atoms: [...] to [..., ATOMS].

    Values beyond what the outermost atoms mean are clipped to them; a NaN stays one, so that the
    loss it is in is one too.
    """
    known = values.float().nan_to_num(nan=0.0)
    place = transform(known).clamp(-LIMIT, LIMIT) + LIMIT
    below = place.floor().clamp(max=ATOMS - 2)
    above_share = (place - below).unsqueeze(-1)
    index = below.long().unsqueeze(-1)
    target = torch.zeros(*values.shape, ATOMS, device=values.device)
    target.scatter_(-1, index, 1 - above_share)
    target.scatter_(-1, index + 1, above_share)
    return target.masked_fill(values.isnan().unsqueeze(-1), torch.nan)


def expectation(logits: torch.Tensor) -> torch.Tensor:
    """Return the value that logits over the atoms stand for: [..., ATOMS] to [...]."""
    atoms = torch.arange(-LIMIT, LIMIT + 1, dtype=torch.float32, device=logits.device)
    return inverse((logits.float().softmax(-1) * atoms).sum(-1))


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return -sum target log softmax(logits) over the last dimension."""
    return -(target * logits.float().log_softmax(-1)).sum(-1)


def n_step_values(
    rewards: torch.Tensor,
    values: torch.Tensor,
    ends: torch.Tensor,
    terminated: torch.Tensor,
    steps: int,
    discount: float,
) -> torch.Tensor:
    """Return z_t = sum_{i<m} g^i r_{t+i} + g^m v(o_{t+m}), m = min(n, steps left), for t < T - n.

    An episode that was only cut off is bootstrapped from its last observation; one that ended of
    itself is worth nothing after it.

    Args:
        rewards: [B, T] of the action taken after observation t; 0 past the end.
        values: [B, T] the target network's value of observation t.
        ends: [B] the place of the episode's last observation, which may lie beyond the window.
        terminated: [B] whether the episode ended there of itself.
        steps: n.
        discount: g.

    Returns:
        [B, T - n].
    """
    length = rewards.shape[1] - steps
    total = torch.zeros_like(rewards[:, :length])
    for ahead in range(steps):
        total = total + discount**ahead * rewards[:, ahead : ahead + length]
    place = torch.arange(length, device=rewards.device).expand(len(rewards), length)
    reached = torch.minimum(place + steps, ends[:, None].clamp(min=0))
    later = values.gather(1, reached) * discount ** (reached - place).clamp(min=0)
    over = (reached == ends[:, None]) & terminated[:, None]
    return total + later.masked_fill(over | (place > ends[:, None]), 0.0)
