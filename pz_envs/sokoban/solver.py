"""Solve Sokoban by A* over pushes, up to a limit on the positions looked at.

A position is the set of boxes and the region that the player can walk in. The estimate is the
cheapest way to give each box a target of its own, each push distance taken in the empty room, so
it never overestimates: with ``weight`` 1 the solution has the fewest pushes; a greater weight
trades pushes for speed. Positions with a dead or frozen box are left out. The order is fixed: the
same position has the same solution in any process.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from pz_envs.sokoban.deadlocks import is_deadlock, live_cells, locks, push_distances
from pz_envs.sokoban.levels import Level

Boxes = frozenset[int]

_FAR = 10**6
_MOST_MATCHED = 8  # boxes; the table of the matching has 2 ** boxes entries


@dataclass(frozen=True, slots=True)
class Search:
    """How a search ended.

    ``moves`` are the player's steps when ``status`` is solved; ``unsolvable`` is a proof, and
    ``limit`` says that ``positions`` were looked at without an answer.
    """

    status: Literal["solved", "unsolvable", "limit"]
    moves: tuple[str, ...] = ()
    pushes: int = 0
    positions: int = 0


@dataclass(frozen=True, slots=True)
class _Node:
    """A position met: how it came about by pushing a box away from ``player`` along ``step``."""

    boxes: Boxes
    player: int
    pushes: int
    parent: int
    step: int


def solve(
    level: Level,
    player: int | None = None,
    boxes: Boxes | None = None,
    *,
    limit: int = 100_000,
    weight: float = 1.0,
) -> Search:
    """Search for a solution from the level's start or from another position of it.

    Args:
        level: the room.
        player: where the player is, else the level's start.
        boxes: where the boxes are, else the level's start.
        limit: positions to look at; each takes about a kilobyte.
        weight: what the estimate is multiplied by, at least 1.
    """
    player = level.player if player is None else player
    boxes = level.boxes if boxes is None else boxes
    live = live_cells(level)
    neighbours = walkable(level)
    estimate = _Estimate(level)
    if is_deadlock(level, live, boxes):
        return Search("unsolvable")
    nodes = [_Node(boxes, player, 0, -1, 0)]
    met: dict[tuple[Boxes, int], int] = {}
    closed: set[tuple[Boxes, int]] = set()
    queue = [(0.0, 0, 0)]
    while queue:
        index = heapq.heappop(queue)[2]
        node = nodes[index]
        if node.boxes == level.targets:
            return Search(
                "solved", _walk(level.width, neighbours, nodes, index), node.pushes, len(closed)
            )
        region = reachable(neighbours, node.boxes, node.player)
        key = (node.boxes, min(region))
        if key in closed:
            continue
        if len(closed) == limit:
            return Search("limit", positions=limit)
        closed.add(key)
        pushes = node.pushes + 1
        for box in sorted(node.boxes):
            for step in (-level.width, level.width, -1, 1):
                after = box + step
                if box - step not in region or after not in live or after in node.boxes:
                    continue
                moved = node.boxes - {box} | {after}
                if met.get((moved, box), _FAR) <= pushes:
                    continue
                guess = estimate(moved)
                if guess >= _FAR or locks(level, live, moved, after):
                    continue
                met[moved, box] = pushes
                heapq.heappush(queue, (pushes + weight * guess, guess, len(nodes)))
                nodes.append(_Node(moved, box, pushes, index, step))
    return Search("unsolvable", positions=len(closed))


def walkable(level: Level) -> Mapping[int, tuple[int, ...]]:
    """Return the cells beside each cell of the player's room: up, down, left, right."""
    steps = (-level.width, level.width, -1, 1)
    found: dict[int, tuple[int, ...]] = {}
    pending = [level.player]
    while pending:
        cell = pending.pop()
        if cell not in found:
            found[cell] = tuple(cell + step for step in steps if cell + step not in level.walls)
            pending += found[cell]
    return found


def reachable(neighbours: Mapping[int, tuple[int, ...]], boxes: Boxes, player: int) -> set[int]:
    """Return the cells that the player can walk to without a push."""
    seen, pending = {player}, [player]
    while pending:
        for cell in neighbours[pending.pop()]:
            if cell not in seen and cell not in boxes:
                seen.add(cell)
                pending.append(cell)
    return seen


class _Estimate:
    """The least pushes that take every box to a target of its own, were each box alone."""

    def __init__(self, level: Level) -> None:
        self._distances = [push_distances(level, target) for target in sorted(level.targets)]
        self._known: dict[Boxes, int] = {}

    def __call__(self, boxes: Boxes) -> int:
        if boxes not in self._known:
            self._known[boxes] = self._matched(boxes)
        return self._known[boxes]

    def _matched(self, boxes: Boxes) -> int:
        if len(boxes) > _MOST_MATCHED:
            nearest = (min(d.get(box, _FAR) for d in self._distances) for box in boxes)
            return min(sum(nearest), _FAR)
        costs = {0: 0}
        for box in boxes:
            after: dict[int, int] = {}
            for number, distances in enumerate(self._distances):
                distance = distances.get(box)
                if distance is None:
                    continue
                for taken, cost in costs.items():
                    if not taken >> number & 1:
                        key = taken | 1 << number
                        after[key] = min(after.get(key, _FAR), cost + distance)
            costs = after
        return min(costs.values(), default=_FAR)


def _walk(
    width: int, neighbours: Mapping[int, tuple[int, ...]], nodes: list[_Node], index: int
) -> tuple[str, ...]:
    """Return every step of the player, walks between pushes included."""
    line = []
    while index >= 0:
        line.append(nodes[index])
        index = nodes[index].parent
    line.reverse()
    cells = [line[0].player]
    for before, push in pairwise(line):
        cells += _path(neighbours, before.boxes, cells[-1], push.player - push.step)
        cells.append(push.player)
    names = {-width: "up", width: "down", -1: "left", 1: "right"}
    return tuple(names[after - before] for before, after in pairwise(cells))


def _path(
    neighbours: Mapping[int, tuple[int, ...]], boxes: Boxes, start: int, goal: int
) -> list[int]:
    """Return the cells of a shortest walk after ``start`` up to ``goal``, which can be reached."""
    came_from = {start: start}
    pending = deque([start])
    while goal not in came_from:
        cell = pending.popleft()
        for beside in neighbours[cell]:
            if beside not in came_from and beside not in boxes:
                came_from[beside] = cell
                pending.append(beside)
    path = []
    while goal != start:
        path.append(goal)
        goal = came_from[goal]
    return path[::-1]
