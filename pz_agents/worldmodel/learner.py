"""One update of the world model: draw, lose, step, follow.

AdamW with weight decay on matrices only, gradient norm clipped, and a target network that follows
by an exponential mean after every update. Products run in bfloat16 where the machine is quick at
it; weights, sums and losses stay in float32. Numbers that come before a collapse are watched, and
named.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from pz_agents.config import Settings
from pz_agents.worldmodel.losses import Batch, LossSettings, loss
from pz_agents.worldmodel.network import WorldModel, product_dtype
from pz_agents.worldmodel.replay import Replay
from pz_envs.errors import DataError
from pz_envs.files import write_atomic

ALARMS: Mapping[str, float] = {
    "policy_logit_max": 8.0,
    "latent_head_norm": 60.0,
    "latent_std": -1e-2,
}
"""Beyond these a run is about to collapse; a negative bound is one that must not be undercut."""


class LearnerSettings(Settings):
    """How the model is updated."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Of AdamW, betas .9 and .95."""

    weight_decay: float = Field(default=1e-4, ge=0)
    """On parameters with two dimensions or more."""

    max_grad_norm: float = Field(default=10.0, gt=0)
    """Gradients are scaled down to this norm."""

    target_rate: float = Field(default=0.05, gt=0, le=1)
    """Share of the new weights that the target network takes over after every update."""

    batch_windows: int = Field(default=64, ge=1)
    """Windows an update."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of matrix products while learning; ``auto`` is bf16 where the machine is quick at it."""

    loss: LossSettings = LossSettings()
    """Weights and horizons of the loss."""


class WorldModelLearner:
    """The model, its target network and its optimiser."""

    def __init__(self, model: WorldModel, settings: LearnerSettings | None = None) -> None:
        self.settings = settings or LearnerSettings()
        self.model = model
        self.target = copy.deepcopy(model).eval().requires_grad_(False)
        matrices = [each for each in model.parameters() if each.ndim >= 2]
        others = [each for each in model.parameters() if each.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": self.settings.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.settings.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.updates = 0

    def learn(self, replay: Replay, random: np.random.Generator) -> dict[str, float]:
        """Do one update on a batch from ``replay``, set its priorities, return what to log."""
        drawn = replay.draw(self.settings.batch_windows, self.settings.loss.td_steps, random)
        stats, priorities = self.update(drawn.batch)
        if math.isfinite(stats["total"]):
            replay.update(drawn, priorities)
        return stats

    def update(self, batch: Batch) -> tuple[dict[str, float], torch.Tensor]:
        """Do one update; a loss or gradient that is not finite changes no parameter.

        Returns:
            What to log (``skipped`` 1 where nothing was changed, ``alarms`` how many numbers are
            beyond ``ALARMS``), and the windows' priorities.
        """
        self.model.train()
        device = batch.rewards.device.type
        bf16 = self.settings.precision == "bf16"
        if self.settings.precision == "auto":
            bf16 = product_dtype(device) is torch.bfloat16
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            learned = loss(self.model, self.target, batch, self.settings.loss)
        self.optimizer.zero_grad(set_to_none=True)
        learned.loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        finite = bool(torch.isfinite(norm)) and bool(torch.isfinite(learned.loss))
        if finite:
            self.optimizer.step()
            self._follow()
            self.updates += 1
        else:
            self.optimizer.zero_grad(set_to_none=True)
        stats = dict(learned.stats) | {"grad_norm": float(norm), "skipped": float(not finite)}
        stats["alarms"] = float(len(alarms(stats)))
        return stats, learned.priorities

    def save(self, path: Path) -> None:
        """Write model, target and optimiser to one file, at once or not at all."""
        import io

        buffer = io.BytesIO()
        torch.save(self.state(), buffer)
        write_atomic(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        """Read ``save`` back.

        Raises:
            DataError: the file is broken, or of a model of another size.
        """
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            self.model.load_state_dict(state["model"])
            self.target.load_state_dict(state["target"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.updates = int(state["updates"])
        except (OSError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
            raise DataError(f"{path} is no state of this world model: {error}") from None

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs."""
        return {
            "model": self.model.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
        }

    @torch.no_grad()
    def _follow(self) -> None:
        pairs = zip(self.target.parameters(), self.model.parameters(), strict=True)
        for followed, leading in pairs:
            followed.lerp_(leading, self.settings.target_rate)


def alarms(stats: Mapping[str, float]) -> list[str]:
    """Return which watched numbers are beyond their bounds, each as ``name value (bound)``."""
    found = []
    for name, bound in ALARMS.items():
        value = stats.get(name)
        if value is None:
            continue
        if (value > bound) if bound > 0 else (value < -bound):
            found.append(f"{name} {value:.3g} ({'above' if bound > 0 else 'below'} {abs(bound):g})")
    return found
