"""The learning rate as a fraction of its setting: a linear rise, then one of four courses.

``constant`` stays, ``linear`` and ``cosine`` fall to 0 after the last update, and ``plateau``
halves each time that the reward has not risen for a number of steps. The fraction depends on the
number of updates taken and, for ``plateau``, on the rewards seen; both are in the state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

Course = Literal["constant", "linear", "cosine", "plateau"]

MIN_RISE = 1e-4
"""A reward counts as higher than the best so far when it is higher by this."""

SHRINK = 0.5
"""What a plateau multiplies the rate by."""

FLOOR = 0.01
"""No plateau lowers the rate below this fraction."""


def fraction(course: Course, position: int, rise: int, end: int) -> float:
    """Return the rate at ``position``: up to ``rise`` it is position / rise, at ``end`` it is 0.

    Args:
        course: ``plateau`` is ``constant`` here.
        position: counted from 0.
        rise: where the linear rise ends.
        end: where ``linear`` and ``cosine`` reach 0.
    """
    if position < rise:
        return position / rise
    done = min((position - rise) / max(end - rise, 1), 1.0)
    if course == "linear":
        return 1.0 - done
    if course == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0


class Schedule:
    """The course of one run.

    Args:
        course: what follows the rise.
        warmup: updates of the rise.
        updates: of the whole run.
        patience: steps without a higher reward that make a plateau.
    """

    def __init__(self, course: Course, warmup: int, updates: int, patience: int) -> None:
        self._course: Course = course
        self._warmup = warmup
        self._updates = updates
        self._patience = patience
        self._scale = 1.0
        self._best = -math.inf
        self._waited = 0

    def rate(self, updates: int) -> float:
        """Return the fraction for the update after ``updates`` others; it is never 0."""
        # Counted from 1, so that neither the first update nor the last is at 0.
        return self._scale * fraction(
            self._course, updates + 1, self._warmup + 1, self._updates + 1
        )

    def observe(self, reward: float) -> None:
        """Take note of a step's reward; without effect unless the course is ``plateau``."""
        if self._course != "plateau" or math.isnan(reward):
            return
        if reward > self._best + MIN_RISE:
            self._best, self._waited = reward, 0
            return
        self._waited += 1
        if self._waited >= self._patience:
            self._scale, self._waited = max(self._scale * SHRINK, FLOOR), 0

    def state(self) -> dict[str, float]:
        """Return what ``load_state`` needs to go on."""
        return {"scale": self._scale, "best": self._best, "waited": float(self._waited)}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from ``state()``."""
        self._scale, self._best = state["scale"], state["best"]
        self._waited = int(state["waited"])
