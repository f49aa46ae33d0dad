"""What the world model learns from a batch of windows: targets, losses, and what to watch.

total = 10 latent + reward + 0.5 value + policy - entropy weight x entropy (UniZero, table of its
appendix). Each is averaged over the steps of a window that exist, then over windows with their
weights: importance weights of prioritised replay times whatever the caller gives. Latents and
bootstrap values come from one pass of the target network over the whole window, so that every
bootstrap has the context it would have had in play.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from pydantic import Field

from pz_agents.config import Settings
from pz_agents.worldmodel import scalars
from pz_agents.worldmodel.network import LatentNorm, WorldModel
from pz_agents.worldmodel.texts import Bags


class LossSettings(Settings):
    """Weights and horizons."""

    latent_weight: float = Field(default=10.0, ge=0)
    """Of predicting the target network's next latent."""

    reward_weight: float = Field(default=1.0, ge=0)
    """Of the reward's cross-entropy."""

    value_weight: float = Field(default=0.5, ge=0)
    """Of the value's cross-entropy."""

    policy_weight: float = Field(default=1.0, ge=0)
    """Of the cross-entropy to the search's visits."""

    entropy_weight: float = Field(default=5e-3, ge=0)
    """Of the policy's entropy, as a bonus."""

    discount: float = Field(default=0.997, gt=0, le=1)
    """Of a step's reward."""

    td_steps: int = Field(default=5, ge=1)
    """Rewards summed before the bootstrap."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B windows of T = H + ``td_steps`` steps, of which the first H are learned from.

    Distinct texts stand once; windows refer to them by place.

    observations, actions: the distinct texts. An empty action stands in after the last one.
    observation_at, action_at: [B, T] places in them.
    rewards: [B, T]; alive: [B, T] 1 where the step's action was played.
    ends: [B] the place of the last observation of the episode, which may lie beyond the window.
    terminated: [B] whether the episode ended of itself.
    policy_row, policy_action, policy_share: [P] for every command of every learned step: which
        step (b * H + t), which action text, which share of the visits.
    weights: [B] a window's weight.
    """

    observations: Bags | torch.Tensor
    actions: Bags
    observation_at: torch.Tensor
    action_at: torch.Tensor
    rewards: torch.Tensor
    alive: torch.Tensor
    ends: torch.Tensor
    terminated: torch.Tensor
    policy_row: torch.Tensor
    policy_action: torch.Tensor
    policy_share: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """The loss of a batch, its parts as numbers, and each window's new priority: [B]."""

    loss: torch.Tensor
    priorities: torch.Tensor
    stats: Mapping[str, float] = field(default_factory=dict)


def loss(model: WorldModel, target: WorldModel, batch: Batch, settings: LossSettings) -> Learned:
    """Return the loss of ``batch``; ``target`` is only read."""
    horizon = batch.rewards.shape[1] - settings.td_steps
    with torch.no_grad():
        latents, values = _target_pass(target, batch)
        wanted = scalars.n_step_values(
            batch.rewards,
            values,
            batch.ends,
            batch.terminated,
            settings.td_steps,
            settings.discount,
        )
    alive, rewards = batch.alive[:, :horizon], batch.rewards[:, :horizon]
    seen = model.encode_observations(batch.observations)[batch.observation_at[:, :horizon]]
    tokens = model.encode_actions(batch.actions)
    known, imagined = model(seen, tokens[batch.action_at[:, :horizon]])
    next_latents = model.normalise(model.latent_head(imagined))
    value_logits = model.value_head(known)
    per_step = {
        "latent": latent_distance(
            next_latents, latents[:, 1 : horizon + 1], model.settings.latent_norm
        ),
        "reward": scalars.cross_entropy(model.reward_head(imagined), scalars.two_hot(rewards)),
        "value": scalars.cross_entropy(value_logits, scalars.two_hot(wanted)),
    }
    policy, entropy, logits = _policy(model, known, tokens, batch)
    per_step |= {"policy": policy, "entropy": entropy}
    steps = alive.sum(1).clamp(min=1)
    parts = {
        name: (batch.weights * (value * alive).sum(1) / steps).mean()
        for name, value in per_step.items()
    }
    total = (
        settings.latent_weight * parts["latent"]
        + settings.reward_weight * parts["reward"]
        + settings.value_weight * parts["value"]
        + settings.policy_weight * parts["policy"]
        - settings.entropy_weight * parts["entropy"]
    )
    with torch.no_grad():
        errors = (scalars.expectation(value_logits) - wanted).abs()
        priorities = (errors * alive).sum(1) / steps + 1e-6
        stats = {name: float(value) for name, value in parts.items()} | {
            "total": float(total),
            "policy_logit_max": float(logits.abs().max()) if len(logits) else 0.0,
            "latent_head_norm": float(imagined.norm(dim=-1).mean()),
            "latent_std": float(seen.std(0).mean()),
            "value_error": float((errors * alive).sum() / alive.sum().clamp(min=1)),
        }
    return Learned(total, priorities, stats)


def latent_distance(
    predicted: torch.Tensor, wanted: torch.Tensor, norm: LatentNorm
) -> torch.Tensor:
    """Return how far predicted latents are from wanted ones: [..., E] to [...].

    ``layernorm``: the mean of squared differences. ``simnorm``: KL(wanted || predicted) summed over
    the eight of a group, averaged over groups.
    """
    if norm == "layernorm":
        return (predicted.float() - wanted.float()).square().mean(-1)
    wanted, predicted = (
        each.float().view(*each.shape[:-1], -1, 8) + 1e-6 for each in (wanted, predicted)
    )
    return (wanted * (wanted.log() - predicted.log())).sum(-1).mean(-1)


def _target_pass(target: WorldModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the target network's latents [B, T, E] and values [B, T], in one pass."""
    latents = target.encode_observations(batch.observations)[batch.observation_at]
    actions = target.encode_actions(batch.actions)[batch.action_at]
    known, _ = target(latents, actions)
    return latents, scalars.expectation(target.value_head(known))


def _policy(
    model: WorldModel, known: torch.Tensor, tokens: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return cross-entropy to the visits [B, H], entropy [B, H] and all logits [P].

    Steps have as many commands as they have: a softmax over ragged rows.
    """
    rows = known.shape[0] * known.shape[1]
    at, shares = batch.policy_row, batch.policy_share
    query = model.policy_head(known).flatten(0, 1)
    keys = model.policy_keys(tokens)
    logits = (query[at] * keys[batch.policy_action]).sum(-1).float() / known.shape[-1] ** 0.5
    most = torch.full((rows,), -torch.inf).scatter_reduce(0, at, logits.detach(), "amax")
    shifted = logits - most[at]
    sums = torch.zeros(rows).index_add(0, at, shifted.exp())
    log_probs = shifted - sums.log()[at]
    cross = torch.zeros(rows).index_add(0, at, -shares * log_probs)
    entropy = torch.zeros(rows).index_add(0, at, -log_probs.exp() * log_probs)
    shape = known.shape[:2]
    return cross.view(shape), entropy.view(shape), logits.detach()
