"""Settings by name for UniZero and PriorZero, laid over one another and under what a user gives.

PriorZero's foundation is its paper's method (arXiv 2605.12289, 2026), preset ``v2``: the language
model scores every command, half of the root's prior is its own, and it is trained in stretches by
the world model's advantages. ``v1`` is its predecessor of 2025: the model writes a ranked list that
replaces the root's policy, and both learn in every step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pz_envs.errors import ConfigError, did_you_mean

Preset = Mapping[str, Any]

UNIZERO: Mapping[str, Preset] = {
    "standard": {},
    "quick": {
        "steps": 30,
        "max_turns": 30,
        "network": {"embed": 96, "heads": 4, "buckets": 4096, "dropout": 0.0},
        "learner": {"learning_rate": 1e-3, "batch_windows": 32, "loss": {"discount": 0.95}},
        "search": {"simulations": 16, "value_floor": 0.5},
    },
}

FOUNDATION: Preset = {
    "replay_ratio": 0.1,
    "phase": "alternating",
    "phase_updates": 2000,
    "wm_llm_ratio": 10 / 11,
    "network": {"embed": 768, "heads": 24},
    "learner": {"learning_rate": 3e-4, "max_grad_norm": 10.0, "loss": {"entropy_weight": 0.05}},
    "replay": {"alpha": 0.0},
    "language": {"kind": "score", "reduction": "mean", "history": 25},
    "root": {"mode": "mix", "llm_prior_weight": 0.5},
    "language_learner": {
        "sft_weight": 0.0,
        "rft_weight": 1.0,
        "rft": "clipped",
        "critic": "world_model",
        "kl": 0.01,
        "weight_decay": 0.01,
        "microbatch": 1,
        "accumulate": 128,
    },
}
"""What lies below every preset of PriorZero."""

_BOTH_LOSSES: Preset = {
    "sft_weight": 0.5,
    "rft_weight": 0.3,
    "rft": "reinforce",
    "kl": 0.0,
    "weight_decay": 0.0,
    "microbatch": 4,
    "accumulate": 8,
}

PRIORZERO: Mapping[str, Preset] = {
    "standard": {},
    "v2": {},
    "v1": {
        "replay_ratio": 0.25,
        "phase": "parallel",
        "wm_llm_ratio": 0.5,
        "network": {"embed": 512, "heads": 8},
        "learner": {"batch_windows": 32},
        "replay": {"alpha": 0.6},
        "language": {"kind": "generate", "history": 5, "top": 5, "tries": 3, "seconds": 30.0},
        "root": {"mode": "replace"},
        "language_learner": {**_BOTH_LOSSES, "critic": "reward"},
    },
    "quick": {
        "steps": 12,
        "episodes_per_step": 4,
        "slots": 4,
        "max_turns": 30,
        "replay_ratio": 0.25,
        "phase_updates": 60,
        "wm_llm_ratio": 0.9,
        "eval_every": 6,
        "eval_episodes": 2,
        "save_every": 2,
        "network": {"embed": 96, "heads": 4, "buckets": 4096, "dropout": 0.0},
        "learner": {
            "learning_rate": 1e-3,
            "batch_windows": 32,
            "loss": {"entropy_weight": 5e-3, "discount": 0.95},
        },
        "replay": {"alpha": 0.6},
        "search": {"simulations": 16, "value_floor": 0.5},
        "language": {"history": 3},
        "language_learner": {**_BOTH_LOSSES, "learning_rate": 3e-4},
    },
    "debug": {
        "steps": 3,
        "episodes_per_step": 2,
        "slots": 2,
        "max_turns": 5,
        "replay_ratio": 0.5,
        "phase_updates": 4,
        "wm_llm_ratio": 0.5,
        "eval_every": 1,
        "eval_episodes": 1,
        "save_every": 1,
        "network": {"embed": 32, "heads": 2, "layers": 1, "buckets": 256, "dropout": 0.0},
        "learner": {"batch_windows": 4, "precision": "fp32"},
        "replay": {"horizon": 3},
        "search": {"simulations": 4},
        "language": {"model": "tiny", "history": 1},
        "language_learner": {"microbatch": 2, "accumulate": 2, "precision": "float32"},
    },
    "pure": {"language": None},
    "sft": {"language_learner": {"sft_weight": 1.0, "rft_weight": 0.0}},
    "lora": {"language_learner": {"lora_rank": 16, "learning_rate": 1e-4}},
}
"""``pure`` is UniZero, ``sft`` trains the language model on visits alone; both, like ``lora``, go
with another one: ``quick,lora``."""


def composed(
    presets: Mapping[str, Preset], foundation: Preset, values: Mapping[str, Any], algorithm: str
) -> dict[str, Any]:
    """Return ``values`` over the presets that they name, over the foundation.

    A later name wins over an earlier one. Where ``values`` name none, not even an empty one, and
    the environment variable ``DEBUG_MODE`` is 1, it is ``debug`` if there is one.

    Raises:
        ConfigError: there is no preset of a name.
    """
    debug = "debug" in presets and os.environ.get("DEBUG_MODE") == "1"
    names = values.get("preset", "debug" if debug else "") or ""
    found = dict(foundation)
    for name in filter(None, map(str.strip, str(names).split(","))):
        if name not in presets:
            raise ConfigError(
                f"No preset `{name}` of {algorithm}.{did_you_mean(name, presets)} "
                f"Known: {', '.join(presets)}"
            )
        found = _over(found, presets[name])
    return _over(found, values)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``below`` with ``above`` laid over it, mappings merged."""
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping):
            merged[key] = _over(below[key], above[key])
    return merged
