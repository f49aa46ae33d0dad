"""What happens to a root's prior before the search, and what is read off its visits after.

Mixing is done in probability space: the world model's policy and a language model's prior are both
probabilities over the root's real list of commands, and the mix is what the search gets, bit for
bit. Inside the tree the world model's policy stays alone. All functions are of one root.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pz_agents.config import Settings
from pz_agents.errors import ModelError
from pz_agents.search.tree import Floats

PriorMode = Literal["mix", "adaptive", "replace", "off"]


class PriorSettings(Settings):
    """How a language model's prior enters at the root."""

    mode: PriorMode = "mix"
    """``mix``: (1 - w) world model + w language model with w = ``llm_prior_weight``; ``adaptive``:
    w = ``adaptive_base`` + ``adaptive_gain`` (1 - H / log n), H the entropy of the world model's
    policy over n actions, so that the surer the world model, the larger w (PriorZero, 2026);
    ``replace``: w = 1; ``off``: w = 0."""
    llm_prior_weight: float = Field(default=0.5, ge=0.0, le=1.0)
    """The language model's share in mode ``mix``."""
    adaptive_base: float = Field(default=0.3, ge=0.0, le=1.0)
    """The language model's least share in mode ``adaptive``."""
    adaptive_gain: float = Field(default=0.4, ge=0.0, le=1.0)
    """What certainty of the world model adds to it."""
    temperature: float = Field(default=1.0, gt=0.0)
    """The language model's scores are divided by it before the softmax."""
    noise_alpha: float = Field(default=0.3, gt=0.0)
    """Concentration of the Dirichlet noise."""
    noise_weight: float = Field(default=0.25, ge=0.0, le=1.0)
    """Share of the noise while collecting; 0 when evaluating."""


def softmax(scores: NDArray[np.floating], temperature: float = 1.0) -> Floats:
    """Return the softmax of scores / temperature in double precision; an empty list stays empty."""
    scaled = np.asarray(scores, np.float64) / temperature
    if scaled.size == 0:
        return scaled
    weights = np.exp(scaled - scaled.max())
    return np.asarray(weights / weights.sum())


def mix_prior(
    world: Floats, language: NDArray[np.floating] | None, settings: PriorSettings
) -> Floats:
    """Return the root prior.

    Args:
        world: [A] the world model's policy, probabilities.
        language: [A] the language model's scores of the same commands (log-probs, mean or sum, or
            log weights of a ranking), -inf allowed; None where it failed, which leaves the
            world model alone.
        settings: mode, weight and temperature.

    Returns:
        [A] probabilities: exactly ``world`` with weight 0, exactly the language model's with 1.

    Raises:
        ModelError: the two are of different length, or ``language`` holds NaN or no finite score.
    """
    if language is None or settings.mode == "off" or len(world) == 0:
        return world
    if len(language) != len(world) or not np.isfinite(np.max(language)):
        raise ModelError(
            f"the language model scored {len(language)} of {len(world)} commands, the best with "
            f"{np.max(language, initial=-np.inf)}; give one score a command, or None on failure"
        )
    other = softmax(language, settings.temperature)
    weight = _language_weight(world, settings)
    return np.asarray((1.0 - weight) * world + weight * other)


def add_noise(prior: Floats, generator: np.random.Generator, settings: PriorSettings) -> Floats:
    """Return (1 - w) prior + w Dirichlet(alpha); what has fewer than two actions is unchanged."""
    weight = settings.noise_weight
    if weight == 0.0 or len(prior) < 2:
        return prior
    noise = generator.dirichlet(np.full(len(prior), settings.noise_alpha))
    return np.asarray((1.0 - weight) * prior + weight * noise)


def visit_policy(visits: Floats, temperature: float) -> Floats:
    """Return visits^(1 / temperature), normalised; temperature 0 shares 1 among the most visited.

    Where nothing was visited it is uniform.
    """
    if len(visits) == 0:
        return np.zeros(0)
    shares = visits / max(float(visits.max()), 1.0)
    if temperature > 0.0:
        with np.errstate(divide="ignore"):
            weights = np.exp(np.log(shares) / temperature)
    else:
        weights = (shares == 1.0).astype(np.float64)
    if not weights.any():
        weights = np.ones(len(visits))
    return np.asarray(weights / weights.sum())


def entropy(policy: Floats) -> float:
    """Return the entropy in nats."""
    positive = policy[policy > 0.0]
    return max(0.0, float(-(positive * np.log(positive)).sum()))


def root_statistics(prior: Floats, visits: Floats) -> dict[str, float]:
    """Return what a log wants to know of one searched root; nothing for a root without visits.

    ``prior_entropy`` and ``visit_entropy`` in nats; ``agreement`` 1 where the prior's favourite is
    among the most visited; ``overlap`` the probability mass that prior and visits share (0..1).
    """
    total = float(visits.sum())
    if total == 0.0:
        return {}
    policy = visits / total
    return {
        "prior_entropy": entropy(prior),
        "visit_entropy": entropy(policy),
        "agreement": float(visits[int(np.argmax(prior))] == visits.max()),
        "overlap": float(np.minimum(prior, policy).sum()),
    }


def root_notes(
    commands: Sequence[str], visits: Floats, prior: Floats
) -> dict[str, dict[str, float]]:
    """Return what a viewer shows of a root: ``visits`` and ``prior`` of each visited command."""
    tried = [place for place in range(len(commands)) if visits[place] > 0]
    return {
        "visits": {commands[place]: int(visits[place]) for place in tried},
        "prior": {commands[place]: round(float(prior[place]), 4) for place in tried},
    }


def _language_weight(world: Floats, settings: PriorSettings) -> float:
    if settings.mode == "replace":
        return 1.0
    if settings.mode == "mix":
        return settings.llm_prior_weight
    certainty = 1.0 - entropy(world) / np.log(len(world)) if len(world) > 1 else 1.0
    return min(1.0, settings.adaptive_base + settings.adaptive_gain * float(certainty))
