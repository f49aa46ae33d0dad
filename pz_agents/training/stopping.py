"""Early stopping: a run ends when a metric has not become better for some time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import pydantic

from pz_agents.config import Settings
from pz_envs.errors import ConfigError, did_you_mean

EVALUATED = (
    *("success", "low", "high", "score_norm", "reward", "turns", "sampled_tokens", "failed"),
)
"""What an evaluation finds without `eval_metrics`; in `metrics.jsonl` each with `eval_` before."""


class EarlyStopping(Settings):
    """When to stop before the last step."""

    metric: str = "reward"
    """A name in `metrics.jsonl`; one that begins with `eval_` is looked at where it was taken."""

    mode: Literal["max", "min"] = "max"
    """Whether a higher or a lower value is better."""

    patience: int = pydantic.Field(default=20, ge=1)
    """So many values in a row that are not better end the run."""

    min_delta: float = pydantic.Field(default=1e-4, ge=0)
    """A value is better when it is better by more than this."""


def check_metric(
    settings: EarlyStopping | None, *, evaluates: bool = True, own_metrics: bool = False
) -> None:
    """Refuse a metric that no run has, as far as that is known before the first step.

    Args:
        settings: what is watched.
        evaluates: whether there are `eval_episodes`.
        own_metrics: whether there are `eval_metrics`, whose names only a call can tell.

    Raises:
        ConfigError: there is no such metric.
    """
    if settings is None or not settings.metric.startswith("eval_"):
        return  # what a step has is the algorithm's business: its first step tells
    if not evaluates:
        raise ConfigError(
            f"early_stopping: `{settings.metric}` is of an evaluation, and there are no "
            "`eval_episodes` to play; set them too (100 are usual)"
        )
    evaluated = [f"eval_{each}" for each in EVALUATED]
    if settings.metric not in evaluated and not own_metrics:
        raise _unknown(settings.metric, evaluated, "An evaluation has")


def _unknown(name: str, names: Iterable[str], has: str) -> ConfigError:
    names = list(names)
    nearest = did_you_mean(name, names)
    if name in EVALUATED or f"eval_{name}" in names:
        nearest = f" It is called `eval_{name}`."
    return ConfigError(
        f"early_stopping: no metric `{name}`.{nearest} {has}: {', '.join(names)}; and what "
        "`eval_metrics` measures, as eval_NAME"
    )


class Stopper:
    """Watches one metric.

    ``stopped`` is True from the step on at which the patience was over.
    """

    def __init__(self, settings: EarlyStopping | None) -> None:
        self._settings = settings
        self._best = -math.inf
        self._waited = 0
        self.stopped = False

    def observe(self, metrics: Mapping[str, float]) -> bool:
        """Take note of a step's metrics and return whether the run is to end.

        Raises:
            ConfigError: there is no such metric; one of an evaluation is missed at the first.
        """
        settings = self._settings
        if settings is None:
            return False
        value = metrics.get(settings.metric)
        evaluated = any(each.startswith("eval_") for each in metrics)
        if value is None and (evaluated or not settings.metric.startswith("eval_")):
            raise _unknown(settings.metric, metrics, "This step has")
        if value is None or math.isnan(value):
            return self.stopped
        value = value if settings.mode == "max" else -value
        if value > self._best + settings.min_delta:
            self._best, self._waited = value, 0
        else:
            self._waited += 1
        self.stopped = self._waited >= settings.patience
        return self.stopped

    def state(self) -> dict[str, float]:
        """Return what ``load_state`` needs to go on."""
        return {"best": self._best, "waited": float(self._waited)}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from ``state()``."""
        self._best, self._waited = state["best"], int(state["waited"])
        # The patience may be another now.
        self.stopped = self._settings is not None and self._waited >= self._settings.patience
