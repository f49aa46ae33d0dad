"""One episode's conversation as token ids that only ever grow at their end.

What the model sampled stays exactly as it was sampled; what the environment says is rendered once
and appended. When the next turn would not fit into the model's context, or would show more past
turns than the template's ``history``, the conversation starts afresh: the system message, the
newest half of the past turns that were allowed (fewer until it fits), the newest observation. A
trajectory then has several training rows, and past replies in a fresh prompt are context only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pz_agents.errors import ModelError
from pz_agents.models.protocol import Completion, LanguageModel, Message
from pz_agents.prompting.templates import Template, clip, for_family, system_text, user_text
from pz_agents.sdk.types import Ids, Turn


@dataclass(frozen=True, slots=True, eq=False)
class _PastTurn:
    """What the environment said, and the reply's ids with the terminator at their end."""

    user: str
    reply: Ids


class Conversation:
    """The prompts of one episode.

    Args:
        model: renders messages; its ``max_context`` is never exceeded.
        template: how a turn reads, and how many past turns stay.
        max_new_tokens: room that every prompt leaves for the reply.
    """

    def __init__(self, model: LanguageModel, template: Template, max_new_tokens: int) -> None:
        self._model = model
        self._template = template
        self._room = model.max_context - max_new_tokens
        if self._room < 16:
            raise ModelError(
                f"max_new_tokens={max_new_tokens} leaves {self._room} tokens for the prompt in "
                f"{model.name}'s context of {model.max_context}. Allowed: at most "
                f"{model.max_context - 16}"
            )
        self._past: list[_PastTurn] = []  # exactly those that the current ids hold
        self._ids: Ids = np.empty(0, np.int32)
        self._user = ""

    def prompt_ids(self, turn: Turn) -> Ids:
        """Return the prompt [P] for ``turn``; call ``add_reply`` before the next one."""
        template = for_family(self._template, _family(turn))
        self._user = user_text(template, turn.observation, turn.info.get("admissible_commands"))
        history = template.history
        if self._past and (history is None or len(self._past) <= history):
            grown = np.concatenate([self._ids, self._after(self._user)])
            if len(grown) <= self._room:
                self._ids = grown
                return grown
        self._ids = self._afresh(turn, template)
        return self._ids

    def add_reply(self, completion: Completion) -> None:
        """Append what was sampled; a reply cut by its length gets the terminator it lacks."""
        reply = completion.token_ids
        if len(reply) == 0:
            reply = self._model.encode(completion.text)
        self._ids = np.concatenate([self._ids, reply])
        if len(reply) == 0 or reply[-1] != self._model.end_of_turn_id:
            end = np.asarray([self._model.end_of_turn_id], np.int32)
            reply = np.concatenate([reply, end])
            self._ids = np.concatenate([self._ids, end])
        self._past.append(_PastTurn(self._user, reply))

    def _after(self, user: str) -> Ids:
        return self._model.render([{"role": "user", "content": user}], continuation=True)

    def _afresh(self, turn: Turn, template: Template) -> Ids:
        instruction = str(turn.info.get("instruction", ""))
        system = system_text(template, instruction, reply_tag(turn))
        history = template.history
        allowed = len(self._past) if history is None else min(len(self._past), history)
        self._past = self._newest((allowed + 1) // 2)
        ids = self._join(system, self._past, self._user)
        while len(ids) > self._room and self._past:
            self._past = self._newest(len(self._past) // 2)
            ids = self._join(system, self._past, self._user)
        return ids if len(ids) <= self._room else self._squeezed(system)

    def _newest(self, count: int) -> list[_PastTurn]:
        return self._past[len(self._past) - count :]

    def _join(self, system: str, past: list[_PastTurn], user: str) -> Ids:
        texts = [*(turn.user for turn in past), user]
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        parts = [self._model.render([*messages, {"role": "user", "content": texts[0]}])]
        for turn, text in zip(past, texts[1:], strict=True):
            parts += [turn.reply, self._after(text)]
        return np.concatenate(parts)

    def _squeezed(self, system: str) -> Ids:
        """Return the newest turn alone, cut at its beginning until it fits."""
        limit = len(self._user)
        while limit > 0:
            ids = self._join(system, [], clip(self._user, limit))
            if len(ids) <= self._room:
                return ids
            limit = limit * 3 // 4
        raise ModelError(
            f"The system message of template `{self._template.name}` alone does not fit into the "
            f"{self._room} prompt tokens of {self._model.name}. Use the template `compact`"
        )


def reply_tag(turn: Turn) -> str:
    """Return the tag that the episode's environment reads replies from."""
    return turn.episode.env.reply_tag if turn.episode.env is not None else "action"


def _family(turn: Turn) -> str | None:
    return turn.episode.env.family if turn.episode.env is not None else None
