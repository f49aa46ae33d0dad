"""The algorithm ``priorzero`` for ``pz-agents train``: UniZero's run with a language model."""

from __future__ import annotations

from pz_agents.priorzero.run import FREE_TO_CHANGE, last_evaluation, player, progress_line, train
from pz_agents.priorzero.settings import PriorZeroSettings

__all__ = ["FREE_TO_CHANGE", "Settings", "last_evaluation", "player", "progress_line", "train"]

Settings = PriorZeroSettings
