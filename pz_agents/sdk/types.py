"""The data that agents, rollouts, stores and learners pass to one another; all frozen.

Token ids and log-probs are written once, when they are sampled, and travel untouched to the loss.
Nothing here is ever decoded and re-encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pz_envs.textenv import TextEnv

Ids = NDArray[np.int32]
LogProbs = NDArray[np.float32]

Finish = Literal["stop", "length"]
Truncation = Literal["", "turns", "tokens", "time", "invalid", "repeats"]
Status = Literal["ok", "failed", "rejected"]


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One completion as it was sampled.

    prompt_ids: [P] what the model saw; never trained.
    token_ids: [N] what it sampled, terminator included; exactly these get gradient.
    log_probs: [N] log-probs of ``token_ids`` under softmax(logits / temperature).
    version: the weights' version that sampled them.
    """

    prompt_ids: Ids
    token_ids: Ids
    log_probs: LogProbs
    finish: Finish = "stop"
    version: int = 0
    temperature: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """One live episode as its agent may know it.

    ``key`` is unique within a run; ``group_id`` is shared by the rollouts of one task.
    ``env`` is the live environment, for agents that search or know the expert; it must be left
    in the state it was found in.
    """

    key: str
    env_id: str
    env_seed: int
    group_id: str = ""
    attempt: int = 0
    env: TextEnv | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """What an agent sees when it must act.

    ``index`` counts from 0; ``reward`` is the one earned by the previous action (0 at first);
    ``info`` is the environment's info dictionary; ``seed`` names this turn's random stream.
    """

    episode: Episode
    index: int
    observation: str
    info: Mapping[str, Any]
    reward: float
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class Action:
    """An agent's answer to a turn: the text for the environment and how it came about."""

    text: str
    sample: Sample | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One turn as it happened: what was seen, what was said, what came of it.

    ``admissible_commands`` are those where the agent acted, None where the environment named none;
    they are for people to look at and are not written to the experience store.
    Requests beside the one that ``sample`` holds (candidates not chosen, reflections) are counted
    in ``notes``: ``other_tokens`` were sampled and ``other_prompt_tokens`` read for them.
    """

    observation: str
    action: str
    reward: float
    score: float
    valid: bool
    format_error: bool
    sample: Sample | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    admissible_commands: tuple[str, ...] | None = None

    @property
    def sampled_tokens(self) -> int:
        """Number of tokens that were sampled for this step."""
        own = 0 if self.sample is None else len(self.sample.token_ids)
        return own + int(self.notes.get("other_tokens", 0))

    @property
    def prompt_tokens(self) -> int:
        """Number of prompt tokens that were read for this step, counted once a request."""
        own = 0 if self.sample is None else len(self.sample.prompt_ids)
        return own + int(self.notes.get("other_prompt_tokens", 0))


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """A finished episode.

    ``reward`` is the sum of step rewards; ``score``, ``score_norm`` and ``success`` are the
    environment's last word. A failed episode (``status`` ``failed``, ``error`` says why) has
    score_norm 0 and success False and stays in every denominator.
    """

    key: str
    env_id: str
    env_seed: int
    task_id: str
    group_id: str
    attempt: int
    steps: tuple[Step, ...]
    final_observation: str
    reward: float
    score: float
    max_score: float
    score_norm: float
    success: bool
    terminated: bool
    truncated: Truncation
    status: Status = "ok"
    error: str | None = None
    kind: str = "base"
    seconds: float = 0.0

    @property
    def sampled_tokens(self) -> int:
        """Number of tokens that the policy sampled in this episode."""
        return sum(step.sampled_tokens for step in self.steps)

    @property
    def prompt_tokens(self) -> int:
        """Number of prompt tokens read, counted once a request."""
        return sum(step.prompt_tokens for step in self.steps)
