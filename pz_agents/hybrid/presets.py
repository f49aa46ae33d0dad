"""Settings by name for the hybrid, laid over one another and under what a user gives.

The settings' own defaults are those of Open-Reasoner-Zero (128 prompts of 64 samples, one update of
the policy and twelve of the critic, no KL); the world model's sizes are PriorZero's.
"""

from __future__ import annotations

from collections.abc import Mapping

from pz_agents.priorzero.presets import FOUNDATION as PRIORZERO_FOUNDATION
from pz_agents.priorzero.presets import PRIORZERO, Preset

_NOT_HERE = frozenset({"phase", "phase_updates", "wm_llm_ratio", "language_learner", "root"})


def _world(preset: Preset) -> Preset:
    """Return what a preset of PriorZero says about the world model and the run."""
    return {name: value for name, value in preset.items() if name not in _NOT_HERE}


FOUNDATION: Preset = {
    **_world(PRIORZERO_FOUNDATION),
    "phase": "parallel",
    "phase_updates": 260,
    "wm_llm_ratio": 0.5,
    "root": {"mode": "mix", "llm_prior_weight": 0.3},
}
"""What lies below every preset."""

HYBRID: Mapping[str, Preset] = {
    "standard": {},
    "quick": {
        **_world(PRIORZERO["quick"]),
        "phase_updates": 60,
        "rollout_batch_size": 8,
        "n_samples_per_prompt": 4,
        "critic_update_steps": 4,
        "actor_learning_rate": 3e-4,
        "critic_learning_rate": 1e-3,
        "num_warmup_steps": 0,
        "prompt_max_len": 640,
        "generate_max_len": 32,
    },
    "debug": {
        **_world(PRIORZERO["debug"]),
        "phase_updates": 4,
        "rollout_batch_size": 16,
        "n_samples_per_prompt": 2,
        "critic_update_steps": 1,
        "actor_learning_rate": 3e-4,
        "critic_learning_rate": 1e-3,
        "num_warmup_steps": 0,
        "prompt_max_len": 512,
        "generate_max_len": 16,
        "precision": "float32",
    },
    "grpo": {"rl_algorithm": "grpo"},
    "lora": {"lora_rank": 16, "actor_learning_rate": 1e-4, "critic_learning_rate": 1e-4},
}
"""``grpo`` and ``lora`` go with another one: ``quick,grpo``."""
