"""THE table: every family, its Gymnasium ids, data, extras and what its score means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class EnvRow:
    """One Gymnasium id.

    ``kwargs`` are what ``gym.make`` passes; ``train_kwargs`` and ``eval_kwargs`` are added by
    trainers and by the benchmark (disjoint splits). ``metric`` is the number a leaderboard shows.
    """

    id: str
    family: str
    entry_point: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    train_kwargs: Mapping[str, Any] = field(default_factory=dict)
    eval_kwargs: Mapping[str, Any] = field(default_factory=dict)
    metric: Literal["success", "score_norm"] = "success"
    max_turns: int = 100
    dataset: str | None = None
    extra: str | None = None
    expert: bool = True
