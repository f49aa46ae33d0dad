"""A turn as the store keeps it, and back to what a viewer shows.

The commands that were admissible take most of the room where there are many, and change little from
turn to turn. So each list is written against the one before it: a text stands for itself, a pair
``[first, end]`` for that range of the last list. A turn whose environment named no commands has no
list, and neither has one of a store from before lists were kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from pz_agents.sdk.types import Ids, Step

Packed = list[str | list[int]]
COMMANDS = "admissible_commands"


def to_records(
    steps: Iterable[Step], decode: Callable[[Ids], str] | None = None
) -> tuple[dict[str, Any], ...]:
    """Return what is kept of an episode's steps; ``decode`` turns a token into text."""
    records = []
    before: Sequence[str] = ()
    for step in steps:
        kept = _record(step, decode)
        if step.admissible_commands is not None:
            kept[COMMANDS] = pack(step.admissible_commands, before)
            before = step.admissible_commands
        records.append(kept)
    return tuple(records)


def commands_of(records: Iterable[Mapping[str, Any]]) -> list[list[str] | None]:
    """Return each step's admissible commands in full; None where none were kept."""
    found: list[list[str] | None] = []
    before: list[str] = []
    for record in records:
        packed = record.get(COMMANDS)
        if packed is not None:
            before = unpack(packed, before)
        found.append(None if packed is None else before)
    return found


def pack(commands: Sequence[str], before: Sequence[str]) -> Packed:
    """Return ``commands`` as texts and as ranges of ``before``."""
    packed: Packed = []
    matcher = SequenceMatcher(None, before, commands, autojunk=False)
    for kind, first, end, start, stop in matcher.get_opcodes():
        packed += [[first, end]] if kind == "equal" else commands[start:stop]
    return packed


def unpack(packed: Packed, before: Sequence[str]) -> list[str]:
    """Return the commands that ``pack`` was given."""
    commands: list[str] = []
    for each in packed:
        commands += [each] if isinstance(each, str) else before[slice(*each)]
    return commands


def _record(step: Step, decode: Callable[[Ids], str] | None) -> dict[str, Any]:
    kept: dict[str, Any] = {
        "observation": step.observation,
        "action": step.action,
        "reward": step.reward,
        "score": step.score,
        "valid": step.valid,
        "format_error": step.format_error,
        "tokens": 0 if step.sample is None else len(step.sample.token_ids),
    }
    if step.notes:
        kept["notes"] = dict(step.notes)
    if step.sample is not None and decode is not None:
        kept["pieces"] = [decode(step.sample.token_ids[n : n + 1]) for n in range(kept["tokens"])]
        kept["log_probs"] = [_finite(value) for value in step.sample.log_probs.tolist()]
    return kept


def _finite(value: float) -> float | None:
    """Return ``value`` to three decimals; None where a server gave no log-prob."""
    return round(value, 3) if math.isfinite(value) else None
