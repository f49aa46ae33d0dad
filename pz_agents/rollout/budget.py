"""When a run whose episodes keep failing is broken: counted over all of its batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from pz_agents.errors import FailureBudgetError
from pz_agents.sdk.types import Trajectory

WINDOW = 256
IN_A_ROW = 20

_SHOWN = 5


class FailureBudget:
    """Fails when 20 episodes in a row did, or more than half of the last 256."""

    def __init__(self) -> None:
        self._recent: deque[bool] = deque(maxlen=WINDOW)
        self._streak: deque[str] = deque(maxlen=IN_A_ROW)

    def add(self, played: Iterable[Trajectory]) -> None:
        """Count a batch.

        Attempts at one task are spread over the batch, so that a single broken task is no streak.

        Raises:
            FailureBudgetError: the run is broken; the message has the last reasons.
        """
        for item in sorted(played, key=lambda item: (item.attempt, item.group_id)):
            failed = item.status == "failed"
            self._recent.append(failed)
            if failed:
                self._streak.append(f"{item.key}: {item.error}")
            else:
                self._streak.clear()
            half = len(self._recent) == WINDOW and 2 * sum(self._recent) > WINDOW
            if half or len(self._streak) == IN_A_ROW:
                what = f"more than half of the last {WINDOW} episodes" if half else ""
                what = what or f"{IN_A_ROW} episodes in a row"
                last = "\n  ".join(list(self._streak)[-_SHOWN:])
                raise FailureBudgetError(
                    f"{what} failed, so the run is broken. The last were:\n  {last}\nWhen the "
                    "reason is gone, the same command goes on from the last checkpoint"
                )
