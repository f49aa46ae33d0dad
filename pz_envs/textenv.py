"""The one environment contract: ``TextEnv``, its text space, info keys and snapshots.

A family implements ``_start`` and ``_advance`` (and ``_save``/``_load`` where its engine can);
this class parses replies, counts steps, builds the info dictionary and wraps snapshots, so every
family means the same by every key. The same seed gives the same episode in any process. Step
limits are not the environment's business: the rollout loop or Gymnasium's TimeLimit sets them.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

import gymnasium
import numpy as np

from pz_envs.errors import EnvError
from pz_envs.replies import parse_reply
from pz_envs.seeding import derive_seed

Info = dict[str, Any]
ReplyFormat = Literal["auto", "tags"]

INFO_KEYS: tuple[str, ...] = (
    "admissible_commands",
    "score",
    "max_score",
    "score_norm",
    "success",
    "steps",
    "valid",
    "format_error",
    "task_id",
    "instruction",
    "extra",
)
"""Keys of every info dictionary, in every family."""

_PRINTABLE = "".join(chr(code) for code in range(32, 127))
_SNAPSHOT_MAGIC = b"pzS1"


class TextSpace(gymnasium.Space[str]):
    """All strings of at most ``max_length`` characters (Gymnasium's ``Text`` refuses spaces)."""

    def __init__(self, max_length: int = 1_000_000, seed: int | None = None) -> None:
        self.max_length = max_length
        super().__init__(shape=(), dtype=None, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        """Text has no fixed-size array form."""
        return False

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """Return up to 32 random printable characters; ``mask`` and ``probability`` are refused."""
        if mask is not None or probability is not None:
            raise ValueError("TextSpace.sample takes no mask and no probability")
        length = int(self.np_random.integers(1, min(32, self.max_length) + 1))
        return "".join(_PRINTABLE[i] for i in self.np_random.integers(0, len(_PRINTABLE), length))

    def contains(self, x: Any) -> bool:
        """Return whether ``x`` is a string that is short enough."""
        return isinstance(x, str) and len(x) <= self.max_length

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TextSpace) and self.max_length == other.max_length

    def __repr__(self) -> str:
        return f"TextSpace(max_length={self.max_length})"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a family's engine reports after a start or a command.

    ``score`` is cumulative, in the family's own units; ``reward`` belongs to this step alone.
    ``valid`` is False when the command was refused or changed nothing by the family's own rule.
    """

    observation: str
    score: float
    reward: float = 0.0
    terminated: bool = False
    success: bool = False
    valid: bool = True
    admissible_commands: tuple[str, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A saved episode: the wrapper's header (JSON) and the engine's own bytes."""

    header: Mapping[str, Any]
    engine: bytes

    def to_bytes(self) -> bytes:
        """Pack as magic, crc32 of the rest, header length, header, engine bytes."""
        header = json.dumps(self.header, separators=(",", ":"), sort_keys=True).encode()
        rest = struct.pack("<I", len(header)) + header + self.engine
        return _SNAPSHOT_MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest

    @classmethod
    def from_bytes(cls, data: bytes) -> Snapshot:
        """Unpack ``to_bytes``.

        Raises:
            EnvError: ``data`` is no snapshot, or a damaged one.
        """
        if len(data) < 12 or data[:4] != _SNAPSHOT_MAGIC:
            raise EnvError(f"restore() needs bytes from snapshot(); got {len(data)} other bytes")
        checksum, length = struct.unpack("<II", data[4:12])
        # The checksum covers the length too: a flipped length would cut the header elsewhere.
        if zlib.crc32(data[8:]) != checksum or 12 + length > len(data):
            raise EnvError("the snapshot is damaged (checksum differs); take a new one")
        return cls(json.loads(data[12 : 12 + length]), data[12 + length :])


class TextEnv(gymnasium.Env[str, str]):
    """Base of every family: ``reset(seed) -> (str, info)``, ``step(str) -> 5-tuple``.

    A reply may be a bare command or text with the family's tag (``<action>go north</action>``,
    ``<answer>...</answer>``); ``reply_format="tags"`` demands the tag. A reply that cannot be read
    is an invalid step: the engine is not touched, ``format_error`` and ``valid`` say so.

    Subclasses set the class attributes and implement ``_start`` and ``_advance``.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"]}  # noqa: RUF012  (Gymnasium's own form)
    family: ClassVar[str]
    reply_tag: ClassVar[str] = "action"
    can_snapshot: ClassVar[bool] = False

    def __init__(
        self, *, reply_format: ReplyFormat = "auto", render_mode: str | None = None
    ) -> None:
        self.observation_space = TextSpace()
        self.action_space = TextSpace()
        self.render_mode = render_mode
        self.reply_format: ReplyFormat = reply_format
        self._max_score = 1.0
        self._task_id = ""
        self._instruction = ""
        self._seed = 0
        self._steps = 0
        self._outcome: Outcome | None = None

    # What a family implements.

    def _start(self, seed: int, options: Mapping[str, Any]) -> Outcome:
        """Begin the episode that ``seed`` (>= 1) decides.

        Sets ``_task_id``, ``_max_score`` and ``_instruction``.
        """
        raise NotImplementedError

    def _advance(self, command: str) -> Outcome:
        """Apply one parsed command; any text must be survived."""
        raise NotImplementedError

    def _unreadable(self, last: Outcome, complaint: str) -> Outcome:
        """Return what follows a reply without a command; by default nothing happened."""
        return replace(last, observation=complaint, reward=0.0, terminated=False, valid=False)

    def _save(self) -> bytes:
        """Return the engine's whole state (families with ``can_snapshot``)."""
        raise EnvError(f"{self.family} cannot snapshot; use replay(actions)")

    def _load(self, engine: bytes, header: Mapping[str, Any]) -> None:
        """Put the engine back into the state that ``_save`` returned; also after another reset."""
        raise EnvError(f"{self.family} cannot restore; use replay(actions)")

    def expert_action(self) -> str | None:
        """Return an expert's next command in the current state, or None where none is known."""
        return None

    def random_action(self, rng: np.random.Generator) -> str | None:
        """Return a random well-formed action, in families whose actions are no list of commands."""
        return None

    # The Gymnasium surface.

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, Info]:
        """Start the episode that ``seed`` decides; without a seed, the next of the env's stream.

        Args:
            seed: any non-negative integer.
            options: ``{"expert": True}`` asks for the episode that ``expert_action`` is certified
                for, where a family's expert needs one (Jericho walkthroughs).
        """
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(0, 2**31 - 1))
        self._seed = derive_seed(self.family, int(seed))
        self._steps = 0
        self._outcome = self._start(self._seed, options or {})
        return self._outcome.observation, self._info(self._outcome, format_error=False)

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        """Send one reply; ``truncated`` is always False here (limits live in the rollout loop)."""
        if self._outcome is None or self._outcome.terminated:
            raise EnvError("the episode is over or not begun; call reset() before step()")
        self._steps += 1
        reply = parse_reply(action, self.reply_tag, self.reply_format)
        if reply.command is None:
            outcome = self._unreadable(
                self._outcome, f"Your reply could not be read: {reply.problem}."
            )
        else:
            outcome = self._advance(reply.command)
        self._outcome = outcome
        info = self._info(outcome, format_error=reply.problem is not None)
        return outcome.observation, float(outcome.reward), outcome.terminated, False, info

    def render(self) -> str | None:
        """Return the last observation in render mode ``ansi``."""
        if self.render_mode != "ansi" or self._outcome is None:
            return None
        return self._outcome.observation

    # Search and retry.

    def snapshot(self) -> bytes:
        """Return bytes that ``restore`` turns back into exactly this state, in any process.

        Raises:
            EnvError: no episode has begun, or the family's engine cannot (``can_snapshot``).
        """
        if self._outcome is None:
            raise EnvError("nothing to save; call reset() before snapshot()")
        header = {
            "family": self.family,
            "task_id": self._task_id,
            "max_score": self._max_score,
            "instruction": self._instruction,
            "seed": self._seed,
            "steps": self._steps,
            "outcome": asdict(self._outcome),
        }
        return Snapshot(header, self._save()).to_bytes()

    def restore(self, data: bytes) -> tuple[str, Info]:
        """Go back to a snapshot's state; returns that state's observation and info.

        Raises:
            EnvError: ``data`` is damaged or was taken from another family.
        """
        snapshot = Snapshot.from_bytes(data)
        header = snapshot.header
        if header["family"] != self.family:
            raise EnvError(f"this snapshot is of {header['family']}, the environment {self.family}")
        self._load(snapshot.engine, header)
        outcome = dict(header["outcome"])
        commands = outcome["admissible_commands"]
        outcome["admissible_commands"] = None if commands is None else tuple(commands)
        self._task_id = header["task_id"]
        self._max_score = header["max_score"]
        self._instruction = header["instruction"]
        self._seed = header["seed"]
        self._steps = header["steps"]
        self._outcome = Outcome(**outcome)
        return self._outcome.observation, self._info(self._outcome, format_error=False)

    def replay(self, record: Iterable[tuple[str, str]], *, seed: int) -> tuple[str, Info]:
        """Reset to ``seed`` and repeat recorded ``(action, observation)`` pairs, checking each.

        Raises:
            EnvError: an observation differs from the record (the engine is not deterministic).
        """
        observation, info = self.reset(seed=seed)
        for number, (action, expected) in enumerate(record, start=1):
            observation, _, _, _, info = self.step(action)
            if observation != expected:
                raise EnvError(
                    f"replay diverged at step {number} ({action!r}): expected {expected[:80]!r}, "
                    f"got {observation[:80]!r}"
                )
        return observation, info

    # Internals.

    def _info(self, outcome: Outcome, *, format_error: bool) -> Info:
        return {
            "admissible_commands": outcome.admissible_commands,
            "score": outcome.score,
            "max_score": self._max_score,
            "score_norm": min(max(outcome.score / self._max_score, 0.0), 1.0),
            "success": outcome.success,
            "steps": self._steps,
            "valid": outcome.valid,
            "format_error": format_error,
            "task_id": self._task_id,
            "instruction": self._instruction,
            "extra": dict(outcome.extra),
        }


def text_env(env: gymnasium.Env[str, str]) -> TextEnv:
    """Return the ``TextEnv`` under Gymnasium's wrappers.

    Raises:
        EnvError: ``env`` is not one of ours.
    """
    inner = env.unwrapped
    if not isinstance(inner, TextEnv):
        raise EnvError(f"{type(inner).__name__} is not a pz_envs TextEnv")
    return inner
