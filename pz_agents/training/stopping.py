"""Early stopping: a run ends when a metric has not become better for some time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import pydantic

from pz_agents.config import Settings
from pz_envs.errors import ConfigError, did_you_mean


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
            ConfigError: there is no such metric.
        """
        settings = self._settings
        if settings is None:
            return False
        value = metrics.get(settings.metric)
        if value is None and not settings.metric.startswith("eval_"):
            raise ConfigError(
                f"early_stopping: no metric `{settings.metric}`."
                f"{did_you_mean(settings.metric, list(metrics))} This step has: "
                f"{', '.join(metrics)}"
            )
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
