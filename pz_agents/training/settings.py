"""What a training run is told: settings, named presets, and which settings may change on resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pydantic

from pz_agents.algorithms import load_algorithm
from pz_agents.config import Settings, parse_settings
from pz_envs.errors import ConfigError, did_you_mean

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny-countdown": {
        "algorithm": "grpo",
        "env": "pz/Countdown-v0",
        "env_kwargs": {"numbers": [3], "max_number": 20, "operators": "+-*"},
        "model": "tiny",
        "steps": 60,
        "groups_per_step": 16,
        "group_size": 16,
        "learning_rate": 1.5e-4,
        "max_new_tokens": 24,
        "max_turns": 1,
    },
}
"""Settings that were tried together. A setting given beside ``preset`` wins over the preset's."""

FREE_TO_CHANGE = frozenset({"preset", "save_every", "keep_checkpoints", "monitor", "threads"})
"""Settings that a resumed run may change, because no weight depends on them."""

TRUNCATED_SAMPLING = ("top_p", "top_k", "min_p")
"""Settings of sampling that exist elsewhere and bias training."""


class TrainSettings(Settings):
    """Everything a training run depends on."""

    preset: str = ""
    """A name in PRESETS that supplies the settings not given here."""

    algorithm: str = "grpo"
    """A name in `pz_agents.algorithms.ALGORITHMS`."""

    options: Mapping[str, Any] = {}
    """The algorithm's own options, e.g. `{"beta": 0.04}` (documented in its file)."""

    env: str
    """A Gymnasium id of pz_envs; training plays its training split."""

    env_kwargs: Mapping[str, Any] = {}
    """Keyword arguments of the environment."""

    model: str = "tiny"
    """What to start from: `tiny` or a folder written by `save_pretrained`."""

    seed: int = pydantic.Field(default=0, ge=0)
    """Decides the tasks, the sampling and the order of rows."""

    steps: int = pydantic.Field(ge=1)
    """Steps of the run; in each, fresh tasks are played and learned from."""

    groups_per_step: int = pydantic.Field(default=8, ge=1)
    """Tasks a step."""

    group_size: int = pydantic.Field(default=8, ge=2)
    """Attempts at each task."""

    learning_rate: float = pydantic.Field(default=1e-6, gt=0)
    """Highest learning rate of AdamW (betas .9 and .999, no weight decay)."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after warm-up; linear and cosine end at 0."""

    warmup_updates: int = pydantic.Field(default=0, ge=0)
    """Updates over which the learning rate rises."""

    iterations: int = pydantic.Field(default=1, ge=1)
    """Updates on the rows of one step; with 1 the policy ratio is 1 and clipping never acts."""

    micro_batches: int = pydantic.Field(default=1, ge=1)
    """Parts an update's rows are split into to save memory; the loss does not depend on it."""

    max_grad_norm: float = pydantic.Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""

    temperature: float = pydantic.Field(default=1.0, gt=0)
    """Of sampling; the loss uses the same. There is no top-p or top-k: both bias the ratio."""

    max_new_tokens: int = pydantic.Field(default=256, ge=1)
    """Most tokens of one reply."""

    max_turns: int = pydantic.Field(default=10, ge=1)
    """Most turns of an episode."""

    concurrency: int = pydantic.Field(default=256, ge=1)
    """Episodes alive at once."""

    save_every: int = pydantic.Field(default=20, ge=1)
    """Steps between checkpoints; the last step is always saved."""

    keep_checkpoints: int = pydantic.Field(default=2, ge=1)
    """Newest checkpoints to keep."""

    monitor: Literal["none", "tensorboard"] = "none"
    """Where metrics go beside `metrics.jsonl`."""

    threads: int = pydantic.Field(default=1, ge=1)
    """Torch's CPU threads; more than one pays only for models above some 10 M parameters."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _refuse_truncated_sampling(cls, values: Any) -> Any:
        for name in TRUNCATED_SAMPLING:
            if isinstance(values, Mapping) and name in values:
                raise ConfigError(
                    f"`{name}` ({values[name]!r}) cannot be used while training: it samples from "
                    "a part of the vocabulary and renormalises, so the log-probs of what was "
                    "sampled are too high and every policy ratio is too low by exactly the mass "
                    "that was kept. Remove it; `temperature` is allowed."
                )
        return values

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not values.get("preset"):
            return values
        name = values["preset"]
        if name not in PRESETS:
            hint = did_you_mean(str(name), PRESETS)
            raise ConfigError(f"No preset `{name}`.{hint} Known: {', '.join(PRESETS)}")
        return {**PRESETS[name], **values}


def algorithm_options(settings: TrainSettings) -> Settings:
    """Return the algorithm's options with the user's changes.

    Raises:
        ConfigError: an option does not exist or is out of range.
    """
    defaults = load_algorithm(settings.algorithm).defaults
    values = {**defaults.model_dump(), **settings.options}
    return parse_settings(type(defaults), values, f"options of {settings.algorithm}")


def check_resumable(saved: Mapping[str, Any], settings: TrainSettings, folder: str) -> None:
    """Compare the settings a run was started with to those it is to go on with.

    ``steps`` may grow while the learning rate is constant.

    Raises:
        ConfigError: a setting that weights depend on has changed; the message names it.
    """
    now = settings.model_dump(mode="json")
    free = set(FREE_TO_CHANGE)
    if settings.schedule == "constant" and settings.steps >= saved.get("steps", 0):
        free.add("steps")
    for key in now.keys() - free:
        if now[key] != saved.get(key):
            raise ConfigError(
                f"`{key}` was {saved.get(key)!r} when the run in {folder} began and is "
                f"{now[key]!r} now; set it back, or train into another folder."
            )
