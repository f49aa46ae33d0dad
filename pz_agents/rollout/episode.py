"""One episode under way: what happened so far, whose turn it is, and which limit it has reached.

Pure bookkeeping: no threads, no clock of its own, no calls to the environment or the agent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pz_agents.rollout.slots import EnvSlot
from pz_agents.sdk.types import Action, Episode, Step, Trajectory, Truncation, Turn
from pz_envs.errors import ConfigError
from pz_envs.seeding import derive_seed


@dataclass(frozen=True, slots=True)
class Limits:
    """When an episode is cut short; ``Trajectory.truncated`` names the limit that did it.

    turns: actions sent.
    tokens: sampled tokens; the reply that passes the limit is still sent.
    seconds: wall clock from the moment the episode is started, the agent's time included.
    invalid_streak: invalid or unreadable actions in a row.
    repeats: the same action in a row.
    """

    turns: int = 100
    tokens: int = 100_000
    seconds: float = 600.0
    invalid_streak: int = 10
    repeats: int = 20

    def __post_init__(self) -> None:
        for name in ("turns", "tokens", "seconds", "invalid_streak", "repeats"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ConfigError(f"Limits.{name} must be positive and finite; got {value!r}")


@dataclass(frozen=True, slots=True, eq=False)
class Resume:
    """Where an episode begins that goes on from the middle of an earlier one.

    steps: of the earlier episode of the same environment and seed, up to that place.
    observation: what was seen there.
    snapshot: the environment's state there; None: the steps' actions are sent again and every
        observation is compared.
    Where what is seen differs, the episode begins at its start instead, without ``steps``.
    """

    steps: tuple[Step, ...]
    observation: str
    snapshot: bytes | None = None


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """One episode to play; ``key`` is unique within a run and names its random streams."""

    key: str
    env_id: str
    env_seed: int
    group_id: str = ""
    attempt: int = 0
    kind: str = "base"
    resume: Resume | None = None


@dataclass(slots=True, eq=False)
class LiveEpisode:
    """An episode under way; ``turn`` is set while the agent must act, else the env is at work.

    ``began`` and ``asked`` are the loop's clock when the episode began and when the environment
    was last asked for something; ``told`` says whether the agent's ``start`` was called for it.
    """

    order: int
    spec: EpisodeSpec
    slot: EnvSlot
    began: float
    asked: float
    episode: Episode | None = None
    turn: Turn | None = None
    action: Action | None = None
    told: bool = False
    steps: list[Step] = field(default_factory=list)
    observation: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0
    invalid_streak: int = 0
    repeats: int = 0

    def begin(self, observation: str, info: Mapping[str, Any], resumed: bool) -> None:
        """Take the first thing seen; if ``resumed``, after the steps that the spec resumes."""
        if resumed and self.spec.resume is not None:
            for step in self.spec.resume.steps:
                self._add(step)
        self.observation, self.info = observation, info

    def record(self, observation: str, reward: float, info: Mapping[str, Any]) -> None:
        """Add the step that ``action`` led to."""
        action = self.action
        assert action is not None
        self._add(
            Step(
                observation=self.observation,
                action=action.text,
                reward=float(reward),
                score=float(info["score"]),
                valid=bool(info["valid"]),
                format_error=bool(info["format_error"]),
                sample=action.sample,
                notes=action.notes,
                admissible_commands=self.info.get("admissible_commands"),
            )
        )
        self.observation, self.info = observation, info

    def _add(self, step: Step) -> None:
        again = bool(self.steps) and self.steps[-1].action == step.action
        self.repeats = self.repeats + 1 if again else 1
        self.invalid_streak = 0 if step.valid else self.invalid_streak + 1
        self.tokens += step.sampled_tokens
        self.steps.append(step)

    def open_turn(self, run_seed: int) -> None:
        """Hand the turn to the agent."""
        spec = self.spec
        if self.episode is None:
            self.episode = Episode(
                spec.key, spec.env_id, spec.env_seed, spec.group_id, spec.attempt, self.slot.env
            )
        index = len(self.steps)
        reward = self.steps[-1].reward if self.steps else 0.0
        seed = derive_seed(run_seed, "turn", spec.key, index)
        self.turn = Turn(self.episode, index, self.observation, self.info, reward, seed)

    def limit_reached(self, limits: Limits, now: float) -> Truncation:
        """Return the first limit that is reached, or an empty string."""
        if len(self.steps) >= limits.turns:
            return "turns"
        if self.tokens >= limits.tokens:
            return "tokens"
        if now - self.began >= limits.seconds:
            return "time"
        if self.invalid_streak >= limits.invalid_streak:
            return "invalid"
        return "repeats" if self.repeats >= limits.repeats else ""

    def trajectory(
        self,
        now: float,
        *,
        terminated: bool = False,
        truncated: Truncation = "",
        error: str | None = None,
    ) -> Trajectory:
        """Return the finished episode; with an ``error``, a failed one."""
        spec, info = self.spec, self.info
        return Trajectory(
            key=spec.key,
            env_id=spec.env_id,
            env_seed=spec.env_seed,
            task_id=str(info.get("task_id", "")),
            group_id=spec.group_id,
            attempt=spec.attempt,
            steps=tuple(self.steps),
            final_observation=self.observation,
            reward=float(sum(step.reward for step in self.steps)),
            score=float(info.get("score", 0.0)),
            max_score=float(info.get("max_score", 0.0)),
            score_norm=0.0 if error else float(info["score_norm"]),
            success=not error and bool(info["success"]),
            terminated=terminated,
            truncated=truncated,
            status="failed" if error else "ok",
            error=error,
            kind=spec.kind,
            seconds=now - self.began,
        )
