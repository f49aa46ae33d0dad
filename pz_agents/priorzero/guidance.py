"""The language model of a run: the prior that it gives, and how it is trained and kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pz_agents.errors import ModelError
from pz_agents.models import load_model
from pz_agents.models.adapters import ADAPTER_CONFIG
from pz_agents.models.chat import without_progress_bars
from pz_agents.priorzero.language import LanguageLearner
from pz_agents.priorzero.language_settings import Decision
from pz_agents.priorzero.memory import Memory
from pz_agents.priorzero.prior import LanguagePrior
from pz_agents.priorzero.settings import PriorZeroSettings, UniZeroSettings
from pz_agents.training import checkpoint
from pz_agents.worldmodel.learner import WorldModelLearner

FOLDER = "language"
"""Where a checkpoint keeps it; ``model`` in there is what ``load_model`` takes."""
_MERGED = "start"


class Guidance:
    """See the module.

    Args:
        settings: with a language model.
        source: the model to begin with, where it is not ``settings.language.model``.

    Attributes:
        prior: judges with whatever the weights are now.
        asked: whether the search asks it (mode ``off`` does not).
    """

    def __init__(self, settings: PriorZeroSettings, source: Path | None = None) -> None:
        assert settings.language is not None
        model = load_model(str(source or settings.language.model))
        self.prior = LanguagePrior(model, settings.language)
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


def trained_model(policy: Path) -> Path | None:
    """Return the trained language model beside a policy, where there is one."""
    for folder in (policy / FOLDER, policy.parent / FOLDER / "model"):
        if folder.is_dir():
            return folder
    return None


def guidance_of(
    settings: UniZeroSettings, start: Path | None, folder: Path, *, resumed: bool
) -> Guidance | None:
    """Return a run's language model; None where it has none.

    Args:
        settings: of the run.
        start: the policy that the run begins with; None: with ``settings.language.model``.
        folder: of the run. An adapter that it begins with becomes weights in there, for a new
            adapter to belong to.
        resumed: whether that was done before.

    Raises:
        ModelError: the adapter is of another model than ``settings.language.model``.
    """
    if not isinstance(settings, PriorZeroSettings) or settings.language is None:
        return None
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
    return Guidance(settings, source)
