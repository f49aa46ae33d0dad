"""Sokoban levels of our own: a room, targets in it, and boxes pulled away from them.

The room is carved by a random walk. From the solved positions every pull is followed, breadth
first, so each position found can be solved, and the number of pulls to it is the least number of
pushes from it. A level is drawn evenly over those numbers. Train, valid and test levels are
disjoint for every setting of the knobs, mirror images and turned levels included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pz_envs.errors import ConfigError
from pz_envs.sokoban.levels import Level, Split, named_by_hash, split_of
from pz_envs.sokoban.solver import Boxes, reachable, walkable

_ATTEMPTS = 500
_TRIES_IN_ROOM = 20
_POSITIONS = 1500
_TURN = 0.4  # chance that the random walk changes its direction


@dataclass(frozen=True, slots=True)
class Knobs:
    """What makes generated levels hard.

    size: smallest and largest side of the room in cells, outer walls included; 5 to 16.
    boxes: fewest and most boxes; 1 to 6.
    min_pushes: pushes that a solution needs at least.
    """

    size: tuple[int, int] = (6, 8)
    boxes: tuple[int, int] = (1, 3)
    min_pushes: int = 3

    def __post_init__(self) -> None:
        if not 5 <= self.size[0] <= self.size[1] <= 16:
            raise ConfigError(f"size={self.size}: needed is 5 <= smallest <= largest <= 16")
        if not 1 <= self.boxes[0] <= self.boxes[1] <= 6:
            raise ConfigError(f"boxes={self.boxes}: needed is 1 <= fewest <= most <= 6")
        if not 1 <= self.min_pushes <= 100:
            raise ConfigError(f"min_pushes={self.min_pushes}: allowed are 1 to 100")


def generate(rng: np.random.Generator, split: Split, knobs: Knobs) -> Level:
    """Draw a level of ``split``; it can be solved, with no fewer than ``min_pushes`` pushes.

    Raises:
        ConfigError: the knobs leave (next to) no level.
    """
    for _ in range(_ATTEMPTS):
        height, width = (int(side) for side in rng.integers(knobs.size[0], knobs.size[1] + 1, 2))
        count = int(rng.integers(knobs.boxes[0], knobs.boxes[1] + 1))
        floor = _carved(rng, height, width)
        if len(floor) < 3 * count + 3:
            continue
        targets = frozenset(int(cell) for cell in rng.choice(sorted(floor), count, replace=False))
        walls = frozenset(range(height * width)) - floor
        solved = Level("", width, height, walls, targets, targets, min(floor - targets))
        level = _drawn(rng, split, solved, knobs.min_pushes)
        if level is not None:
            return level
    raise ConfigError(
        f"no {split} level in {_ATTEMPTS} rooms with {knobs}; "
        "enlarge the room, or ask for fewer boxes or pushes"
    )


def pull_depths(solved: Level, limit: int) -> Mapping[tuple[Boxes, int], int]:
    """Return positions that can be solved, with the least pushes that each needs.

    A position is the boxes and the first cell of the player's region; all of them are found when
    there are no more than ``limit``.

    Args:
        solved: a room with its boxes on the targets; where the player is does not matter.
        limit: positions to return at most.
    """
    neighbours = walkable(solved)
    depths: dict[tuple[Boxes, int], int] = {}
    free = set(neighbours) - solved.targets
    while free:
        region = reachable(neighbours, solved.targets, min(free))
        depths[solved.targets, min(region)] = 0
        free -= region
    queue = list(depths)
    for boxes, start in queue:
        if len(depths) >= limit:
            break
        region = reachable(neighbours, boxes, start)
        for box in sorted(boxes):
            for beside in neighbours[box]:
                back = 2 * beside - box
                if beside not in region or back in boxes or back not in neighbours:
                    continue
                pulled = boxes - {box} | {beside}
                key = (pulled, min(reachable(neighbours, pulled, back)))
                if key not in depths:
                    depths[key] = depths[boxes, start] + 1
                    queue.append(key)
    return depths


def _carved(rng: np.random.Generator, height: int, width: int) -> frozenset[int]:
    """Return the floor cells of a connected room that leaves the outer walls standing."""
    inside = (height - 2) * (width - 2)
    wanted = int(inside * rng.uniform(0.45, 0.85))
    steps = (-width, width, -1, 1)
    row, column = int(rng.integers(1, height - 1)), int(rng.integers(1, width - 1))
    cell, floor = row * width + column, set[int]()
    step = steps[int(rng.integers(4))]
    while True:
        floor.add(cell)
        if len(floor) >= wanted:
            return frozenset(floor)
        if rng.random() < _TURN:
            step = steps[int(rng.integers(4))]
        after = cell + step
        if after // width in (0, height - 1) or after % width in (0, width - 1):
            step = steps[int(rng.integers(4))]
        else:
            cell = after


def _drawn(rng: np.random.Generator, split: Split, solved: Level, min_pushes: int) -> Level | None:
    """Return a level of the room that is far enough from solved and in the split, if any."""
    by_depth: dict[int, list[tuple[Boxes, int]]] = {}
    for position, depth in pull_depths(solved, _POSITIONS).items():
        if depth >= min_pushes and position[0] != solved.targets:
            by_depth.setdefault(depth, []).append(position)
    if not by_depth:
        return None
    neighbours, depths = walkable(solved), sorted(by_depth)
    for _ in range(_TRIES_IN_ROOM):
        positions = by_depth[depths[int(rng.integers(len(depths)))]]
        boxes, start = positions[int(rng.integers(len(positions)))]
        region = sorted(reachable(neighbours, boxes, start))
        player = region[int(rng.integers(len(region)))]
        level = named_by_hash(
            Level("", solved.width, solved.height, solved.walls, solved.targets, boxes, player)
        )
        if split_of(level) == split:
            return level
    return None
