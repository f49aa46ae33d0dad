"""The two losses of the language model's training, as shares of a whole optimizer batch.

``imitation`` is the soft cross-entropy of a state's prior to its search's visits, ``reinforcement``
the policy gradient on the tokens of the command that was played.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pz_agents.algorithms.losses import (
    clipped_policy_loss,
    policy_gradient_loss,
    ratio,
    soft_cross_entropy,
)
from pz_agents.priorzero.language_settings import Decision, LanguageLearnerSettings
from pz_agents.sdk.types import Ids


class Totals(NamedTuple):
    """What an optimizer batch holds: states to imitate, and played tokens with an advantage."""

    states: float
    rewarded: float
    played: float


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """A decision with its numbers worked out.

    shares: [A] what to imitate; None: nothing. advantage: None: not paid for.
    old: [N] the played tokens' log-probs before the call's first update; None: those of now.
    """

    decision: Decision
    shares: NDArray[np.float64] | None
    advantage: float | None
    old: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens the played command has."""
        return len(self.decision.candidates[self.decision.played])


def sequences(lessons: Sequence[Lesson]) -> tuple[list[list[Ids]], Tensor]:
    """Return what to score behind each prefix, and the numbers of the played commands.

    It is all commands where the visits are imitated; otherwise the played one, with the ranked
    list behind it where that is imitated.
    """
    groups: list[list[Ids]] = []
    places = []
    count = 0
    for each in lessons:
        decision = each.decision
        group = list(decision.candidates)
        place = decision.played
        if each.shares is None or decision.ranking is not None:
            group, place = [decision.candidates[decision.played]], 0
            if each.shares is not None and decision.ranking is not None:
                group.append(decision.ranking)
        places.append(count + place)
        groups.append(group)
        count += len(group)
    return groups, torch.tensor(places)


def imitation(
    lessons: Sequence[Lesson],
    groups: Sequence[Sequence[Ids]],
    sums: Tensor,
    lengths: Tensor,
    reduction: Literal["mean", "sum"],
    temperature: float,
    states: float,
) -> dict[str, Tensor]:
    """Return the share of the cross-entropy to visits, and of what it says of the prior.

    Args:
        lessons: of the micro-batch.
        groups: the sequences of each.
        sums: [M] of the sequences' log-probs.
        lengths: [M] of the sequences.
        reduction: of log-probs to a command's score.
        temperature: of the prior.
        states: of the optimizer batch.
    """
    starts = np.cumsum([0, *(len(group) for group in groups)])
    ranked = sums.new_zeros(())
    rows: list[int] = []
    for number, each in enumerate(lessons):
        if each.shares is not None and each.decision.ranking is not None:
            last = starts[number] + 1
            ranked = ranked - sums[last] / lengths[last] / states
        elif each.shares is not None:
            rows.append(number)
    if not rows:
        return {"sft_loss": ranked}
    scores = sums / lengths if reduction == "mean" else sums
    width = max(len(groups[number]) for number in rows)
    table = sums.new_full((len(rows), width), -math.inf)
    targets = np.zeros((len(rows), width), np.float32)
    filled = torch.zeros(len(rows), width, dtype=torch.bool)
    wanted: list[int] = []
    for row, number in enumerate(rows):
        count = len(groups[number])
        filled[row, :count] = True
        targets[row, :count] = lessons[number].shares
        wanted += range(starts[number], starts[number] + count)
    table = table.masked_scatter(filled.to(sums.device), scores[wanted] / temperature)
    shares = torch.from_numpy(targets).to(sums.device)
    loss = soft_cross_entropy(table, shares, states)
    prior = torch.softmax(table.detach(), -1)
    best = shares.gather(-1, prior.argmax(-1, keepdim=True))[:, 0] == shares.amax(-1)
    return {
        "sft_loss": loss + ranked,
        "sft_kl": loss.detach() - torch.special.entr(shares).sum() / states,
        "agreement": best.float().sum() / states,
        "entropy": torch.special.entr(prior).sum() / states,
    }


def reinforcement(
    lessons: Sequence[Lesson], played: Tensor, totals: Totals, settings: LanguageLearnerSettings
) -> dict[str, Tensor]:
    """Return the share of the policy gradient's loss, and of the mean ratio to the old policy.

    Args:
        lessons: of the micro-batch.
        played: [N] log-probs of the played commands' tokens, one command after the other.
        totals: of the optimizer batch.
        settings: which loss.
    """

    def each_token(values: Sequence[float | bool], kind: torch.dtype) -> Tensor:
        counts = torch.tensor([each.tokens for each in lessons])
        return torch.tensor(values, dtype=kind).repeat_interleave(counts).to(played.device)

    advantages = each_token([each.advantage or 0.0 for each in lessons], torch.float32)
    mask = each_token([each.advantage is not None for each in lessons], torch.bool)
    known = [each.old for each in lessons if each.old is not None]
    ratios = ratio(played, torch.cat(known) if known else played.detach(), mask)
    if settings.rft == "clipped":
        losses = clipped_policy_loss(ratios, advantages, mask, settings.clip, settings.clip)
    else:
        losses = policy_gradient_loss(played, advantages, mask)
    return {
        "rft_loss": losses.sum() / totals.rewarded,
        "ratio": ratios.detach()[mask].sum() / totals.rewarded,
    }
