"""What the language model learns from: the replay's turns as it would have seen them.

The replay remembers segments; this remembers, beside each, what a prompt needs and a segment does
not have. A turn becomes a decision when it is drawn: its prompt is written anew from the segment's
texts, unless the model thought aloud before it, and its advantage is the reward or the world
model's estimate.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pz_agents.errors import ModelError
from pz_agents.priorzero.language_settings import Decision
from pz_agents.priorzero.prior import LanguagePrior, Moment
from pz_agents.sdk.types import Ids
from pz_agents.search.tree import Floats
from pz_agents.worldmodel import scalars
from pz_agents.worldmodel.learner import WorldModelLearner
from pz_agents.worldmodel.replay import Replay, ReplaySettings, Segment
from pz_agents.worldmodel.texts import Texts, state_text


@dataclass(frozen=True, slots=True, eq=False)
class Margin:
    """What an episode has beside its segment.

    instruction: the task's rules.
    prefixes: [L] what the model thought before each turn; None where the prompt says it all.
    env, env_seed: the game's id and what decided the episode, so that it can be played again.
    """

    instruction: str
    prefixes: tuple[Ids | None, ...] | None = None
    env: str = ""
    env_seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Reached:
    """A place that play came to, and how to come there again.

    moment: the place as a language model sees it. before: the commands that led there.
    """

    moment: Moment
    env: str
    env_seed: int
    before: tuple[str, ...]


class Memory:
    """The margins of a replay's segments.

    Args:
        replay: whose segments; ``add`` must follow each of its own.
        texts: the replay's.
        read_instruction: whether states begin with the instruction.
    """

    def __init__(self, replay: Replay, texts: Texts, *, read_instruction: bool) -> None:
        self._replay, self._texts, self._read_instruction = replay, texts, read_instruction
        self._margins: deque[Margin] = deque()

    def add(self, margin: Margin) -> None:
        """Remember what belongs to the newest segment; forget what the replay has forgotten."""
        self._margins.append(margin)
        while len(self._margins) > len(self._replay.segments):
            self._margins.popleft()

    def state(self) -> list[Any]:
        """Return everything that is remembered, for torch.save."""
        return _packed(self._margins)

    def load_state(self, state: Sequence[Any]) -> None:
        """Remember what ``state`` returned, and nothing else."""
        self._margins = deque(_unpacked(state))

    def draw(self, count: int, random: np.random.Generator) -> list[tuple[int, int]]:
        """Return the (episode, turn) of drawn turns, each at most once if there are enough."""
        ends = np.cumsum([len(each.actions) for each in self._replay.segments])
        if not len(ends):
            return []
        total = int(ends[-1])
        chosen = random.choice(total, size=count, replace=count > total)
        owners = np.searchsorted(ends, chosen, side="right")
        turns = chosen - np.concatenate([[0], ends[:-1]])[owners]
        return list(zip(owners.tolist(), turns.tolist(), strict=True))

    def decisions(
        self,
        drawn: Sequence[tuple[int, int]],
        prior: LanguagePrior,
        world: WorldModelLearner | None,
    ) -> list[Decision]:
        """Return drawn turns as the language learner takes them; what fits no prompt is left out.

        Args:
            drawn: of ``draw``.
            prior: writes the prompts.
            world: whose advantages; None: the rewards.
        """
        advantages: dict[int, Floats] = {}
        found = []
        for owner, turn in drawn:
            segment, margin = self._replay.segments[owner], self._margins[owner]
            if owner not in advantages:
                advantages[owner] = (
                    np.array(segment.rewards)
                    if world is None
                    else estimated(world, segment, self._texts)
                )
            moment = self._moment(segment, margin, turn, prior.settings.history)
            prefix = margin.prefixes[turn] if margin.prefixes else None
            try:
                found.append(
                    prior.decision(
                        prior.prefix(moment) if prefix is None else prefix,
                        moment.commands,
                        segment.visits[turn],
                        segment.lists[turn].index(segment.actions[turn]),
                        float(advantages[owner][turn]),
                    )
                )
            except ModelError:
                # No prompt fits, which was counted when the turn was played.
                continue
        return found

    def reached(self, drawn: Sequence[tuple[int, int]], history: int) -> list[Reached]:
        """Return the places of drawn turns, with up to ``history`` past turns."""
        found = []
        for owner, turn in drawn:
            segment, margin = self._replay.segments[owner], self._margins[owner]
            before = tuple(map(self._texts.string, segment.actions[:turn]))
            moment = self._moment(segment, margin, turn, history)
            found.append(Reached(moment, margin.env, margin.env_seed, before))
        return found

    def _moment(self, segment: Segment, margin: Margin, turn: int, history: int) -> Moment:
        past = range(max(turn - history, 0), turn)
        return Moment(
            self._seen(segment, margin, turn),
            margin.instruction,
            self._commands(segment, turn),
            tuple(
                (
                    self._seen(segment, margin, each),
                    self._texts.string(segment.actions[each]),
                    segment.rewards[each],
                )
                for each in past
            ),
        )

    def _commands(self, segment: Segment, turn: int) -> tuple[str, ...]:
        return tuple(map(self._texts.string, segment.lists[turn]))

    def _seen(self, segment: Segment, margin: Margin, turn: int) -> str:
        """Return the observation as the environment gave it: a state's text without additions."""
        text = self._texts.string(segment.observations[turn])
        text = text.removesuffix(state_text("", self._commands(segment, turn)))
        if self._read_instruction:
            text = text.removeprefix(f"{margin.instruction}\n")
        return text


class Waiting:
    """Batches that were collected and wait to be learned from, oldest first.

    Args:
        texts: of their segments.
        count: how many batches wait at most.
    """

    def __init__(self, texts: Texts, count: int) -> None:
        self._texts, self._count = texts, count
        self._batches: deque[Sequence[tuple[Segment, Margin]]] = deque()

    def swap(self, batch: Sequence[tuple[Segment, Margin]]) -> Sequence[tuple[Segment, Margin]]:
        """Take a batch in, and return the one whose turn it is; an empty one at the beginning."""
        self._batches.append(batch)
        return self._batches.popleft() if len(self._batches) > self._count else ()

    def state(self) -> dict[str, Any]:
        """Return everything that waits, for torch.save."""
        segments = Replay(self._texts, ReplaySettings(capacity=2**62))
        for segment, _ in (each for batch in self._batches for each in batch):
            segments.add(segment)
        return {
            "segments": segments.state(),
            "margins": _packed([margin for batch in self._batches for _, margin in batch]),
            "sizes": [len(batch) for batch in self._batches],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Hold what ``state`` returned, and nothing else."""
        segments = Replay(self._texts)
        segments.load_state(state["segments"])
        both = iter(zip(segments.segments, _unpacked(state["margins"]), strict=True))
        self._batches = deque([next(both) for _ in range(size)] for size in state["sizes"])


@torch.no_grad()
def estimated(world: WorldModelLearner, segment: Segment, texts: Texts) -> Floats:
    """Return z_t - v(o_t) of each turn: [L].

    z is the n-step target with the target network's bootstrap, v the trained network's value, both
    with the context that they have in play.
    """
    settings = world.settings.loss
    length, ahead = len(segment.actions), settings.td_steps
    numbers = list(dict.fromkeys(segment.observations))
    places = [numbers.index(each) for each in segment.observations]
    # Rows past the end repeat the last observation; the targets pass over them.
    at = torch.tensor([*places, *[places[-1]] * (ahead - 1)])[None]
    played = [*segment.actions, *[texts.intern("")] * ahead]
    states, bags = texts.states(numbers), texts.bags(played)

    def values(model: Any) -> torch.Tensor:
        was_training = model.training
        model.eval()
        latents = model.encode_observations(states)[at]
        known, _ = model(latents, model.encode_actions(bags)[None])
        model.train(was_training)
        return scalars.expectation(model.value_head(known))

    rewards = torch.zeros(1, length + ahead)
    rewards[0, :length] = torch.tensor(segment.rewards)
    wanted = scalars.n_step_values(
        rewards,
        values(world.target),
        torch.tensor([length]),
        torch.tensor([segment.terminated]),
        ahead,
        settings.discount,
    )
    own = values(world.model)[:, :length]
    return (wanted - own)[0].double().numpy()


def _packed(margins: Sequence[Margin] | deque[Margin]) -> list[Any]:
    """Return margins as plain objects and tensors."""

    def plain(ids: Ids | None) -> torch.Tensor | None:
        return None if ids is None else torch.from_numpy(np.asarray(ids))

    return [
        [
            each.instruction,
            None if each.prefixes is None else [*map(plain, each.prefixes)],
            each.env,
            each.env_seed,
        ]
        for each in margins
    ]


def _unpacked(state: Sequence[Any]) -> list[Margin]:
    """Return what ``_packed`` packed."""
    return [
        Margin(
            sys.intern(instruction),
            None
            if prefixes is None
            else tuple(None if ids is None else ids.numpy() for ids in prefixes),
            *origin,
        )
        for instruction, prefixes, *origin in state
    ]
