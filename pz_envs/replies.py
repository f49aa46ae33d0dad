r"""From a model's reply to a command: one parser for every family.

Understands ``<think>`` (dropped), ``<action>``, ``<answer>`` and ``\boxed{}``. Never raises on any
text, however long or broken; a reply that cannot be read has ``command`` None and a ``problem``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Reply:
    """A parsed reply.

    ``command`` is None when nothing usable was found. ``problem`` is None when the reply obeyed
    the format; a reply can have a problem and still a usable command.
    """

    command: str | None
    problem: str | None = None


def parse_reply(text: str, tag: str, reply_format: Literal["auto", "tags"] = "auto") -> Reply:
    """Read the command out of ``text``.

    Args:
        text: the whole reply.
        tag: the family's tag, ``"action"`` or ``"answer"``.
        reply_format: ``"tags"`` demands the tag; ``"auto"`` also takes untagged text as a command.
    """
    raise NotImplementedError
