"""How the language model is trained, and what it is trained on: a turn with its search's visits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pz_agents.config import Settings
from pz_agents.sdk.types import Ids


class LanguageLearnerSettings(Settings):
    """How the language model is trained."""

    sft_weight: float = Field(default=0.5, ge=0)
    """Weight of the cross-entropy to the visits; 0 leaves it out."""
    rft_weight: float = Field(default=0.3, ge=0)
    """Weight of the policy gradient on the played command's tokens; 0 leaves it out."""
    rft: Literal["reinforce", "clipped"] = "reinforce"
    """Plain policy gradient, or PPO's clipped one."""
    critic: Literal["reward", "world_model"] = "reward"
    """What a decision's advantage is: the turn's reward, turns without one left out (v1); or
    the world model's n-step target less its value, normalised over all decisions of a call (v2)."""
    clip: float = Field(default=0.2, gt=0, lt=1)
    """Of ``clipped``, on both sides."""
    kl: float = Field(default=0.01, ge=0)
    """Weight of the k3 estimate of the KL to the model as it was at the start."""
    target_temperature: float = Field(default=1.0, gt=0)
    """The target is visits^(1 / this), normalised."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """Of AdamW; 1e-4 is usual with an adapter."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    microbatch: int = Field(default=4, ge=1)
    """Decisions in one pass through the network."""
    accumulate: int = Field(default=8, ge=1)
    """Micro-batches of one optimizer step."""
    lora_rank: int = Field(default=0, ge=0)
    """Rank of the adapter that is trained instead of the weights; 0: the weights."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto: bfloat16 on a GPU that has it."""


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """One stored turn, ready to be learned from; ``LanguagePrior.decision`` makes it.

    prefix_ids: [P] what the model saw. candidates: A of [N_k] ids, terminators included.
    visits: [A] shares or counts of the search's visits; all 0: nothing to imitate here.
    played: place of the command that was played.
    advantage: of playing it: the reward, or z - v.
    ranking: the ids of a ranked list to imitate instead (kind ``generate``); None: the visits.
    """

    prefix_ids: Ids
    candidates: tuple[Ids, ...]
    visits: NDArray[np.floating]
    played: int
    advantage: float
    ranking: Ids | None = None
