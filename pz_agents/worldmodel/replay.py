"""What the world model remembers: segments of play, drawn by priority, as batches of windows.

A segment is an episode with the search's visits at each step. A window begins at any step; its
horizon, and the steps after it that targets need, may run past the end of the episode, where they
are not alive. Priorities belong to the first step of a window and really change what is drawn and
how much it weighs (Schaul et al. 2016): P(i) ~ p_i^alpha, w_i ~ (N P(i))^-beta / max.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from pz_agents.config import Settings
from pz_agents.worldmodel.losses import Batch
from pz_agents.worldmodel.texts import Texts
from pz_envs.errors import ConfigError


class ReplaySettings(Settings):
    """How much is kept and how it is drawn."""

    capacity: int = Field(default=300_000, ge=1)
    """Steps; whole episodes are forgotten, oldest first."""

    horizon: int = Field(default=10, ge=1)
    """Steps of a window that are learned from."""

    alpha: float = Field(default=0.6, ge=0, le=1)
    """How much priorities matter; 0 draws all windows alike."""

    beta: float = Field(default=0.4, ge=0, le=1)
    """How much of what priorities bias is undone by weights."""


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One episode as it was searched and played, its texts by number (``Texts.intern``).

    observations: [L + 1] state texts, the last one after the last action.
    actions: [L] commands played; rewards: [L].
    lists: [L] the commands that were admissible at each step; visits: [L] of the same lengths,
        shares that sum to 1.
    terminated: whether the episode ended of itself; when it was only cut off, the value of the last
        observation still counts.
    weight: factor of all its windows.
    """

    observations: tuple[int, ...]
    actions: tuple[int, ...]
    rewards: tuple[float, ...]
    lists: tuple[tuple[int, ...], ...]
    visits: tuple[NDArray[np.float64], ...]
    terminated: bool
    weight: float = 1.0


class Drawn:
    """A batch, and which windows it is made of, to give their priorities back."""

    def __init__(self, batch: Batch, windows: Sequence[tuple[int, int]]) -> None:
        self.batch = batch
        self.windows = windows


class Replay:
    """Segments with a priority for each step."""

    def __init__(self, texts: Texts, settings: ReplaySettings | None = None) -> None:
        self.settings = settings or ReplaySettings()
        self._texts = texts
        self._segments: deque[Segment] = deque()
        self._priorities: deque[NDArray[np.float64]] = deque()
        self._forgotten = 0

    def __len__(self) -> int:
        """Return how many steps are remembered."""
        return sum(len(segment.actions) for segment in self._segments)

    @property
    def segments(self) -> Sequence[Segment]:
        """What is remembered, oldest first."""
        return self._segments

    def add(self, segment: Segment) -> None:
        """Remember an episode; its windows get the highest priority there is.

        Raises:
            ConfigError: the segment is empty, or its parts are of different lengths.
        """
        steps = len(segment.actions)
        lengths = {len(segment.rewards), len(segment.lists), len(segment.visits)}
        if steps == 0 or lengths != {steps} or len(segment.observations) != steps + 1:
            raise ConfigError(
                f"a segment of {steps} actions needs as many rewards, lists and visits, and "
                f"one observation more; got {len(segment.rewards)}, {len(segment.lists)}, "
                f"{len(segment.visits)} and {len(segment.observations)}"
            )
        highest = max((float(each.max()) for each in self._priorities), default=1.0)
        self._segments.append(segment)
        self._priorities.append(np.full(steps, highest))
        size = len(self)
        while len(self._segments) > 1 and size > self.settings.capacity:
            size -= len(self._segments.popleft().actions)
            self._priorities.popleft()
            self._forgotten += 1

    def state(self) -> dict[str, torch.Tensor]:
        """Return everything that is remembered, as flat tensors."""
        segments = self._segments

        def flat(values: Iterable[Iterable[float]], kind: type) -> torch.Tensor:
            return torch.from_numpy(np.fromiter(itertools.chain.from_iterable(values), kind))

        return {
            "steps": torch.tensor([len(each.actions) for each in segments], dtype=torch.int64),
            "terminated": torch.tensor([each.terminated for each in segments], dtype=torch.bool),
            "weights": torch.tensor([each.weight for each in segments], dtype=torch.float64),
            "observations": flat((each.observations for each in segments), np.int64),
            "actions": flat((each.actions for each in segments), np.int64),
            "rewards": flat((each.rewards for each in segments), np.float64),
            "counts": flat((map(len, each.lists) for each in segments), np.int64),
            "lists": flat((listed for each in segments for listed in each.lists), np.int64),
            "visits": flat((shares for each in segments for shares in each.visits), np.float64),
            "priorities": flat(self._priorities, np.float64),
            "forgotten": torch.tensor(self._forgotten),
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Remember what ``state`` returned, and nothing else."""
        self._segments.clear()
        self._priorities.clear()
        numbers = {name: iter(value.tolist()) for name, value in state.items() if value.ndim}

        def take(name: str, count: int) -> tuple[Any, ...]:
            return tuple(itertools.islice(numbers[name], count))

        for steps in state["steps"].tolist():
            counts = take("counts", steps)
            self._segments.append(
                Segment(
                    observations=take("observations", steps + 1),
                    actions=take("actions", steps),
                    rewards=take("rewards", steps),
                    lists=tuple(take("lists", count) for count in counts),
                    visits=tuple(np.array(take("visits", count)) for count in counts),
                    terminated=take("terminated", 1)[0],
                    weight=take("weights", 1)[0],
                )
            )
            self._priorities.append(np.array(take("priorities", steps)))
        self._forgotten = int(state["forgotten"])

    def probabilities(self) -> NDArray[np.float64]:
        """Return the chance of each window: [steps], in the order in which they came."""
        raised = np.concatenate(list(self._priorities)) ** self.settings.alpha
        shares: NDArray[np.float64] = raised / raised.sum()
        return shares

    def draw(self, windows: int, td_steps: int, random: np.random.Generator) -> Drawn:
        """Return a batch of windows, drawn with replacement.

        Args:
            windows: how many.
            td_steps: steps beyond the horizon that the value targets need.
            random: decides the draw.

        Raises:
            ConfigError: nothing is remembered yet.
        """
        if not self._segments:
            raise ConfigError("the replay is empty; play before learning")
        chances = self.probabilities()
        chosen = random.choice(len(chances), size=windows, p=chances)
        weights = (len(chances) * chances[chosen]) ** -self.settings.beta
        ends = np.cumsum([len(segment.actions) for segment in self._segments])
        owners = np.searchsorted(ends, chosen, side="right")
        starts = chosen - np.concatenate([[0], ends[:-1]])[owners]
        places = list(zip(owners.tolist(), starts.tolist(), strict=True))
        own = np.array([self._segments[owner].weight for owner in owners.tolist()])
        batch = self._batch(places, td_steps, weights / weights.max() * own)
        return Drawn(batch, [(owner + self._forgotten, start) for owner, start in places])

    def update(self, drawn: Drawn, priorities: torch.Tensor) -> None:
        """Set the priorities of the windows of ``drawn``; forgotten ones are passed over."""
        values = zip(drawn.windows, priorities.tolist(), strict=True)
        for (owner, start), priority in values:
            if owner >= self._forgotten:
                self._priorities[owner - self._forgotten][start] = priority

    def _batch(
        self, places: Sequence[tuple[int, int]], td_steps: int, weights: NDArray[np.float64]
    ) -> Batch:
        horizon = self.settings.horizon
        length = horizon + td_steps
        shape = (len(places), length)
        seen, played = _Places(), _Places()
        observation_at, action_at = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        rewards, alive = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        nothing = self._texts.intern("")
        rows: list[int] = []
        commands: list[int] = []
        shares: list[NDArray[np.float64]] = []
        for number, (owner, start) in enumerate(places):
            segment = self._segments[owner]
            for step in range(length):
                at = start + step
                last = min(at, len(segment.actions))
                observation_at[number, step] = seen[segment.observations[last]]
                if at >= len(segment.actions):
                    action_at[number, step] = played[nothing]
                    continue
                action_at[number, step] = played[segment.actions[at]]
                rewards[number, step] = segment.rewards[at]
                alive[number, step] = 1.0
                if step < horizon:
                    listed = segment.lists[at]
                    rows += [number * horizon + step] * len(listed)
                    commands += [played[command] for command in listed]
                    shares.append(segment.visits[at])
        return Batch(
            observations=self._texts.states(seen.order),
            actions=self._texts.bags(played.order),
            observation_at=torch.from_numpy(observation_at),
            action_at=torch.from_numpy(action_at),
            rewards=torch.from_numpy(rewards),
            alive=torch.from_numpy(alive),
            ends=torch.tensor([len(self._segments[o].actions) - start for o, start in places]),
            terminated=torch.tensor([self._segments[owner].terminated for owner, _ in places]),
            policy_row=torch.tensor(rows, dtype=torch.int64),
            policy_action=torch.tensor(commands, dtype=torch.int64),
            policy_share=torch.from_numpy(np.concatenate(shares).astype(np.float32)),
            weights=torch.from_numpy(weights.astype(np.float32)),
        )


class _Places:
    """Distinct text numbers in the order in which they come."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self._place: dict[int, int] = {}

    def __getitem__(self, number: int) -> int:
        place = self._place.get(number)
        if place is None:
            place = self._place[number] = len(self.order)
            self.order.append(number)
        return place
