"""What the card games keep in a snapshot: the game's label and its state, as JSON."""

from __future__ import annotations

import json
from typing import Any

from pz_envs.errors import EnvError


def pack(game: str, *state: Any) -> bytes:
    """Return the state of ``game``, plain JSON values."""
    return json.dumps([game, *state]).encode()


def unpack(engine: bytes, game: str) -> list[Any]:
    """Return the values that ``pack`` took.

    Raises:
        EnvError: the state is another game's.
    """
    state: list[Any] = json.loads(engine)
    saved = state.pop(0)
    if saved != game:
        raise EnvError(f"this snapshot is of {saved}, the environment {game}")
    return state
