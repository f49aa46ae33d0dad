r"""From a model's reply to a command: one parser for every family.

Understands ``<think>`` (dropped), ``<action>``, ``<answer>`` and ``\boxed{}``. Never raises on any
text, however long or broken, and reads it in linear time; a reply that cannot be read has
``command`` None and a ``problem``.

What is thought is dropped first: from ``<think>`` to the next ``</think>``, everything before a
``</think>`` that no ``<think>`` opened (chat templates open it in the prompt), and everything
after a ``<think>`` that is never closed. In what is left the last complete tag is the command, of
nested tags the innermost. Tags are matched in any case and take no attributes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_MARKUP = re.compile(r"[<\\]|```")
_THINK = re.compile(r"<(/?)think\s{0,8}>", re.IGNORECASE)
_TAGS = {tag: re.compile(rf"<(/?){tag}\s{{0,8}}>", re.IGNORECASE) for tag in ("action", "answer")}
_BRACES = re.compile(r"\\\\|\\boxed\s{0,8}\{|\\[{}]|[{}]")


@dataclass(frozen=True, slots=True)
class Reply:
    """A parsed reply.

    ``command`` is None when nothing usable was found. ``problem`` is None when the reply obeyed
    the format; a reply can have a problem and still a usable command.
    """

    command: str | None
    problem: str | None = None


def parse_reply(text: str, tag: str, reply_format: Literal["auto", "tags"] = "auto") -> Reply:
    r"""Read the command out of ``text``.

    A repeated or nested tag is a problem, and its command is still used. An empty tag, one that is
    opened and never closed when no complete one came before, and a reply of thought alone have no
    command. For ``"answer"``, ``\boxed{...}`` stands for the tag when the tag is absent, and is
    taken off inside it; its braces must balance.

    Args:
        text: the whole reply.
        tag: the family's tag, ``"action"`` or ``"answer"``.
        reply_format: ``"tags"`` demands the tag; ``"auto"`` also takes untagged text as a command:
            its last line that is neither blank nor a code fence.
    """
    if reply_format == "auto" and text.isprintable() and not _MARKUP.search(text):
        command = text.strip()  # a bare command on one line, without the searches below
        return Reply(command) if command else Reply(None, "it is empty")
    visible, open_thought = _without_thought(text)
    contents, problem = _tagged(visible, tag)
    if contents is None and problem is None and tag == "answer":
        contents, problem = _boxed(visible)
    elif contents is not None and tag == "answer":
        contents = _boxed(contents)[0] or contents
    if contents is not None:
        command = contents.strip()
        return Reply(command, problem) if command else Reply(None, f"the <{tag}> tag is empty")
    if problem is not None:
        return Reply(None, problem)
    unclosed = "<think> is never closed" if open_thought else None
    if unclosed and not visible.strip():
        return Reply(None, unclosed)
    if reply_format == "tags":
        return Reply(None, f"it has no <{tag}>...</{tag}> tag")
    lines = (line.strip() for line in reversed(visible.splitlines()))
    command = next((line for line in lines if line and not line.startswith("```")), "")
    return Reply(command, unclosed) if command else Reply(None, "it is empty")


def _without_thought(text: str) -> tuple[str, bool]:
    """Return what is not thought, and whether a thought was left open."""
    kept: list[str] = []
    start = 0
    thinking = False
    for match in _THINK.finditer(text):
        if match[1]:
            if not thinking:
                kept.clear()
            thinking = False
            start = match.end()
        elif not thinking:
            kept.append(text[start : match.start()])
            thinking = True
    if not thinking:
        kept.append(text[start:])
    return "".join(kept), thinking


def _tagged(text: str, tag: str) -> tuple[str | None, str | None]:
    """Return the contents of the last complete tag, and what is wrong with the tags."""
    pattern = _TAGS.get(tag) or re.compile(rf"<(/?){re.escape(tag)}\s{{0,8}}>", re.IGNORECASE)
    contents: str | None = None
    opened: int | None = None
    complete = 0
    nested = False
    for match in pattern.finditer(text):
        if not match[1]:
            nested = nested or opened is not None
            opened = match.end()
        elif opened is not None:
            contents = text[opened : match.start()]
            opened = None
            complete += 1
    if opened is not None:
        return contents, f"<{tag}> is never closed"
    if nested:
        return contents, f"<{tag}> tags are nested; the innermost was used"
    if complete > 1:
        return contents, f"it has {complete} <{tag}> tags; the last was used"
    return contents, None


def _boxed(text: str) -> tuple[str | None, str | None]:
    r"""Return the contents of the last ``\boxed{}`` (innermost if nested), and what is wrong."""
    opened: list[tuple[bool, int]] = []
    best: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        token = match[0]
        if token.endswith("{") and token != "\\{":
            opened.append((token != "{", match.end()))
        elif token == "}" and opened:
            is_box, start = opened.pop()
            if is_box and (best is None or start > best[0]):
                best = (start, match.start())
    if best is not None:
        return text[best[0] : best[1]], None
    if any(is_box for is_box, _ in opened):
        return None, "\\boxed{ is never closed"
    return None, None
