"""Positions from which no play can win, as far as two cheap and sound rules see.

A box is dead on a cell from which no pushes of this one box in the empty room reach a target
(corners, and walls without a target). Boxes are frozen when none of them can be the first to move,
but to a dead cell; a frozen box that is not on a target loses. Both rules say "deadlock" only
where it is one; a level can be lost without either of them noticing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from pz_envs.sokoban.levels import Level


def push_distances(level: Level, target: int) -> Mapping[int, int]:
    """Return, for each cell from which it can, the pushes that take a lone box to ``target``.

    The player is thought to be wherever it is needed, so the true number may be higher.
    """
    distances = {target: 0}
    layer = [target]
    while layer:
        following = []
        for cell in layer:
            for step in (-1, 1, -level.width, level.width):
                box, player = cell + step, cell + 2 * step
                if box in distances or box in level.walls or player in level.walls:
                    continue
                distances[box] = distances[cell] + 1
                following.append(box)
        layer = following
    return distances


@functools.lru_cache(maxsize=256)
def live_cells(level: Level) -> frozenset[int]:
    """Return the cells from which a lone box can be pushed to some target."""
    return frozenset().union(*(push_distances(level, target) for target in level.targets))


def is_deadlock(level: Level, live: frozenset[int], boxes: frozenset[int]) -> bool:
    """Return whether a box is on a dead cell or frozen off its target.

    Args:
        level: the room.
        live: ``live_cells(level)``.
        boxes: where the boxes are now.
    """
    return not (boxes <= live and _frozen(level, live, boxes) <= level.targets)


def locks(level: Level, live: frozenset[int], boxes: frozenset[int], pushed: int) -> bool:
    """Return whether the push that brought a box to ``pushed`` made a deadlock.

    Quicker than ``is_deadlock``, and the same where there was none before: boxes that freeze by a
    push are frozen together with the pushed one.
    """
    return not _can_move(level, live, boxes, pushed) and is_deadlock(level, live, boxes)


def _frozen(level: Level, live: frozenset[int], boxes: frozenset[int]) -> frozenset[int]:
    """Return the largest set of boxes none of which can move first.

    All are taken for frozen, and those that can move although the others cannot are let go, until
    none is left that can.
    """
    frozen = boxes
    while loose := {box for box in frozen if _can_move(level, live, frozen, box)}:
        frozen -= loose
    return frozen


def _can_move(level: Level, live: frozenset[int], fixed: frozenset[int], box: int) -> bool:
    """Return whether ``box`` can be pushed along an axis to a live cell past ``fixed`` boxes."""
    for step in (1, level.width):
        low, high = box - step, box + step
        blocked = low in level.walls or high in level.walls or low in fixed or high in fixed
        if not blocked and (low in live or high in live):
            return True
    return False
