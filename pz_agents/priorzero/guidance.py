"""The language model of a run: the prior that it gives, and how it is trained and kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pz_agents.errors import ModelError
from pz_agents.models import load_model
from pz_agents.models.adapters import ADAPTER_CONFIG
from pz_agents.models.chat import without_progress_bars
from pz_agents.priorzero.language import LanguageLearner
from pz_agents.priorzero.language_settings import Decision
from pz_agents.priorzero.memory import Memory
from pz_agents.priorzero.prior import LanguagePrior
from pz_agents.priorzero.settings import GuidedSettings, PriorZeroSettings, UniZeroSettings
from pz_agents.training import checkpoint
from pz_agents.worldmodel.learner import WorldModelLearner

FOLDER = "language"
"""Where a checkpoint keeps it; ``model`` in there is what ``load_model`` takes."""
_MERGED = "start"


class Guide(Protocol):
    """What a run asks of its language model's half.

    Attributes:
        prior: judges with whatever the weights are now.
        asked: whether the search asks it.
    """

    prior: LanguagePrior
    asked: bool

    def lessons(
        self, memory: Memory, updates: int, world: WorldModelLearner, random: np.random.Generator
    ) -> list[Any]:
        """Draw what ``updates`` optimizer steps need; in ``parallel``, before the world learns."""
        ...

    def learn(self, decisions: list[Any]) -> dict[str, float]:
        """Learn from what ``lessons`` drew; returns what to log."""
        ...

    def save(self, folder: Path) -> None:
        """Write what is trained into a checkpoint's folder."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from ``save``."""
        ...

    def close(self) -> None:
        """End what it has started."""
        ...


MakeGuide = Callable[..., Guide | None]
"""As ``guidance_of``."""


class Guidance:
    """A run's language model as PriorZero trains it.

    Args:
        settings: with a language model.
        source: the model to begin with.

    Attributes:
        prior: judges with whatever the weights are now.
        asked: whether the search asks it (mode ``off`` does not).
    """

    def __init__(self, settings: PriorZeroSettings, source: str) -> None:
        assert settings.language is not None
        model = load_model(source)
        self.prior = settings.prior(model)
        self.asked = settings.root.mode != "off"
        self._learner: LanguageLearner | None = None
        self._size = 0
        learner = settings.language_learner
        if learner is not None:
            self._learner = LanguageLearner(
                model,
                learner,
                seed=settings.seed,
                reduction=settings.language.reduction,
                temperature=settings.root.temperature,
            )
            self._size = learner.microbatch * learner.accumulate
            self._estimates = learner.critic == "world_model"

    def lessons(
        self,
        memory: Memory,
        updates: int,
        world: WorldModelLearner,
        random: np.random.Generator,
    ) -> list[Decision]:
        """Draw what ``updates`` optimiser steps need, with advantages by the weights of now."""
        drawn = memory.draw(updates * self._size, random)
        return memory.decisions(drawn, self.prior, world if self._estimates else None)

    def learn(self, decisions: list[Decision]) -> dict[str, float]:
        """Learn from the decisions; returns what to log."""
        if self._learner is None:
            return {}
        return {f"train/{name}": each for name, each in self._learner.learn(decisions).items()}

    def save(self, folder: Path) -> None:
        """Write what is trained into a checkpoint's folder."""
        if self._learner is not None:
            (folder / FOLDER).mkdir()
            with without_progress_bars():
                self._learner.save(folder / FOLDER)

    def load(self, folder: Path) -> None:
        """Go on from ``save``."""
        if self._learner is not None:
            self._learner.load(folder / FOLDER)

    def close(self) -> None:
        """There is nothing to end."""


def trained_model(policy: Path) -> Path | None:
    """Return the trained language model beside a policy, where there is one."""
    for folder in (policy / FOLDER, policy.parent / FOLDER / "model"):
        if folder.is_dir():
            return folder
    return None


def guidance_of(
    settings: UniZeroSettings, start: Path | None, folder: Path, *, resumed: bool
) -> Guidance | None:
    """Return a run's language model; None where it has none. See ``beginning_of``."""
    if not isinstance(settings, PriorZeroSettings) or settings.language is None:
        return None
    return Guidance(settings, beginning_of(settings, start, folder, resumed=resumed))


def beginning_of(
    settings: GuidedSettings, start: Path | None, folder: Path, *, resumed: bool
) -> str:
    """Return the model that a run begins with, for ``load_model``.

    Args:
        settings: of a run with a language model.
        start: the policy that the run begins with; None: with ``settings.language.model``.
        folder: of the run. An adapter that it begins with becomes weights in there, for a new
            adapter to belong to.
        resumed: whether that was done before.

    Raises:
        ModelError: the adapter is of another model than ``settings.language.model``.
    """
    assert settings.language is not None
    source = trained_model(start) if start else None
    from pz_agents.models.transformers import TransformersModel

    if source is not None and (source / ADAPTER_CONFIG).is_file():
        merged = folder / _MERGED
        if not resumed:
            model = load_model(settings.language.model)
            if not isinstance(model, TransformersModel):
                raise ModelError(
                    f"`{model.name}` cannot take over the adapter in {source}; set "
                    "`language.model` to what that was trained on"
                )
            model.load_weights(source)
            with without_progress_bars():
                checkpoint.write_folder(merged, model.save)
        source = merged
    return str(source or settings.language.model)
