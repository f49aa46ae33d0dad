"""A tokenizer folder with its chat template: text and messages to token ids and back.

A conversation grows only at its end. What the template puts between a sampled reply and the next
generation prompt is found by rendering the messages behind a dummy reply and taking the exact text
after it; its first token is the terminator that the model has sampled itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pz_agents.errors import ModelError
from pz_agents.models.protocol import Message
from pz_agents.sdk.types import Ids

_REPLY = "pzPastReply"


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing over the caller's terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class ChatTokenizer:
    """A Hugging Face tokenizer that speaks in messages.

    Attributes:
        tokenizer: the Hugging Face tokenizer.
        end_of_turn_id: what the chat template puts after a reply.

    Raises:
        ModelError: the folder holds no tokenizer, or one without a chat template.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._folder = folder
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{folder} holds no tokenizer that can be read ({error}). "
                f"Save one there: tokenizer.save_pretrained({str(folder)!r})"
            ) from error
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"The tokenizer in {folder} has no chat template, so messages cannot be rendered. "
                "Use an instruction-tuned model, or set tokenizer.chat_template and save it again"
            )
        after = self.encode(self._after_reply(()))
        if len(after) == 0:
            raise ModelError(
                f"The chat template in {folder} puts nothing after a reply, so a reply would have "
                "no end. Set a template that closes the assistant's turn with the end token"
            )
        self.end_of_turn_id = int(after[0])

    def encode(self, text: str) -> Ids:
        """Return the ids of plain text, no special tokens added."""
        # Whether it is too long is the model's to say, and a prompt may yet be shortened.
        ids = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return np.asarray(ids, np.int32)

    def decode(self, ids: Ids) -> str:
        """Return the text of ``ids`` without special tokens."""
        text: str = self.tokenizer.decode(
            np.asarray(ids).tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def render(self, messages: Sequence[Message], *, continuation: bool = False) -> Ids:
        """Return the ids of ``messages`` with the generation prompt; see ``LanguageModel``."""
        if continuation:
            return self.encode(self._after_reply(messages))[1:]
        return self.encode(self._template(messages, prompt=True))

    def _after_reply(self, messages: Sequence[Message]) -> str:
        """Return the text between a past reply and the next one (after ``messages``)."""
        past: list[Message] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _REPLY},
        ]
        text = self._template([*past, *messages], prompt=bool(messages))
        before, found, after = text.rpartition(_REPLY)
        if not found or _REPLY in before:
            raise ModelError(
                f"The chat template in {self._folder} does not show past replies as they are, so "
                "a conversation cannot be continued from them. Use a template that does"
            )
        return after

    def _template(self, messages: Sequence[Message], *, prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ModelError(
                f"The chat template in {self._folder} refuses messages with the roles {roles}: "
                f"{error}. Leave the system message out: choose a prompt template without one"
            ) from error
        return text
