"""From trajectories to the rows a learner trains on, token for token as they were sampled.

Consecutive samples of a trajectory share one row as long as each prompt begins with exactly the
ids that came before it (integer comparison, nothing is decoded); otherwise a new row begins. The
mask is True on sampled tokens and nowhere else; where only the turns from some turn on are to be
trained, it is those turns' tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pz_agents.algorithms.credit import Advantages
from pz_agents.sdk.types import Ids, LogProbs, Sample, Trajectory


@dataclass(frozen=True, slots=True, eq=False)
class TrainRow:
    """One sequence to train on; all arrays are [L] and indexed by the token they describe.

    ids: the sequence. mask: True on sampled tokens that are trained, never at position 0.
    log_probs: as sampled, 0 elsewhere. versions: of the weights that sampled, -1 elsewhere.
    turns: index of the turn that sampled the token, -1 elsewhere, also where it is not trained.
    advantages: 0 off the mask.
    rewards: what each turn earned, on its last token; 0 elsewhere.
    """

    ids: Ids
    mask: NDArray[np.bool_]
    log_probs: LogProbs
    versions: NDArray[np.int32]
    turns: NDArray[np.int32]
    advantages: NDArray[np.float32]
    trajectory_id: str
    group_id: str
    rewards: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first trained one."""
        return int(np.argmax(self.mask))


def rewards_of(trajectories: Sequence[Trajectory]) -> NDArray[np.float64]:
    """Return the rewards [N]; NaN for failed and rejected rollouts."""
    return np.array(
        [item.reward if item.status == "ok" else np.nan for item in trajectories], np.float64
    )


def rows_with(trajectories: Sequence[Trajectory], advantages: Advantages) -> list[TrainRow]:
    """Return the rows of the trajectories that are used, each with its advantage."""
    return [
        row
        for trajectory, value, used in zip(
            trajectories, advantages.values, advantages.used, strict=True
        )
        if used
        for row in rows_of(trajectory, float(value))
    ]


def rows_of(trajectory: Trajectory, advantage: float, first_turn: int = 0) -> list[TrainRow]:
    """Return the rows of one trajectory, every trained token with the same ``advantage``.

    Samples without tokens, and steps without a sample, are passed over.

    Args:
        trajectory: a finished episode.
        advantage: of its tokens.
        first_turn: earlier turns are context only; a row of nothing else is left out.

    Raises:
        ValueError: a sample has an empty prompt, or not one log-prob a token.
    """
    rows = (_row(trajectory, chain, advantage, first_turn) for chain in _chains(trajectory))
    return [row for row in rows if row.mask.any()]


def shared_turns(first: Trajectory, second: Trajectory) -> int:
    """Return how many turns two episodes begin with that are the same, token for token."""
    count = 0
    for left, right in zip(first.steps, second.steps, strict=False):
        one, other = left.sample, right.sample
        if one is None or other is None:
            same = one is other and left.action == right.action
        else:
            same = np.array_equal(one.prompt_ids, other.prompt_ids)
            same = same and np.array_equal(one.token_ids, other.token_ids)
        if not same:
            break
        count += 1
    return count


def _chains(trajectory: Trajectory) -> Iterator[list[tuple[int, Sample]]]:
    """Split the trajectory's samples where a prompt does not continue what came before."""
    chain: list[tuple[int, Sample]] = []
    history: Ids = np.empty(0, np.int32)
    for turn, step in enumerate(trajectory.steps):
        sample = step.sample
        if sample is None or len(sample.token_ids) == 0:
            continue
        if len(sample.prompt_ids) == 0 or len(sample.log_probs) != len(sample.token_ids):
            raise ValueError(
                f"trajectory {trajectory.key!r}, turn {turn}: a sample needs a prompt and one "
                f"log-prob a token; got {len(sample.prompt_ids)} prompt ids, "
                f"{len(sample.token_ids)} tokens, {len(sample.log_probs)} log-probs"
            )
        if chain and not np.array_equal(sample.prompt_ids[: len(history)], history):
            yield chain
            chain = []
        chain.append((turn, sample))
        history = np.concatenate([sample.prompt_ids, sample.token_ids])
    if chain:
        yield chain


def _row(
    trajectory: Trajectory, chain: list[tuple[int, Sample]], advantage: float, first_turn: int
) -> TrainRow:
    last = chain[-1][1]
    ids = np.concatenate([last.prompt_ids, last.token_ids]).astype(np.int32)
    mask = np.zeros(len(ids), np.bool_)
    log_probs = np.zeros(len(ids), np.float32)
    versions = np.full(len(ids), -1, np.int32)
    turns = np.full(len(ids), -1, np.int32)
    rewards = np.zeros(len(ids), np.float32)
    earned = _earned(trajectory)
    for turn, sample in chain:
        start = len(sample.prompt_ids)
        sampled = slice(start, start + len(sample.token_ids))
        mask[sampled] = turn >= first_turn
        log_probs[sampled] = sample.log_probs
        versions[sampled] = sample.version
        turns[sampled] = turn
        rewards[sampled.stop - 1] = earned[turn]
    return TrainRow(
        ids=ids,
        mask=mask,
        log_probs=log_probs,
        versions=versions,
        turns=turns,
        advantages=np.where(mask, advantage, 0.0).astype(np.float32),
        trajectory_id=trajectory.key,
        group_id=trajectory.group_id,
        rewards=rewards,
    )


def _earned(trajectory: Trajectory) -> dict[int, float]:
    """Return what each sampled turn earned, with what came of later turns without a sample."""
    earned: dict[int, float] = {}
    turn = -1
    for number, step in enumerate(trajectory.steps):
        if step.sample is not None and len(step.sample.token_ids):
            turn = number
        earned[turn] = earned.get(turn, 0.0) + step.reward
    return earned
