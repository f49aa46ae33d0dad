"""A model that says what it is told to: for tests, demonstrations and dry runs.

Replies come from a list, chosen by the request's seed, or from a function. Tokens are bytes, so
that nothing is ever out of vocabulary; every token has the same log-prob, in ``generate`` and in
``score``. All else is the whole contract: terminators, lengths, context, versions, errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pz_agents.errors import ModelError
from pz_agents.models.protocol import Completion, GenerateRequest, Message, tokens_to_stop
from pz_agents.sdk.types import Ids, LogProbs

Script = Callable[[str, int], str]
"""``(text of the prompt, seed) -> reply``."""

_END = 256
_ROLES = ("system", "user", "assistant")
_ROLE_IDS = {role: 257 + index for index, role in enumerate(_ROLES)}
_SIZE = 257 + len(_ROLES)


class ByteTokenizer:
    """Text as UTF-8 bytes, each message between a role mark and an end mark."""

    end_of_turn_id = _END
    vocabulary = _SIZE

    def encode(self, text: str) -> Ids:
        """Return one id a byte; lone surrogates become question marks."""
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)

    def decode(self, ids: Ids) -> str:
        """Return the text of the byte ids; marks are left out."""
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", "replace")

    def render(self, messages: Sequence[Message], *, continuation: bool = False) -> Ids:
        """Return the ids of ``messages`` with the generation prompt; see ``LanguageModel``."""
        ids: list[int] = []
        for message in messages:
            if message["role"] not in _ROLE_IDS:
                raise ModelError(f"No role `{message['role']}`. Allowed: {', '.join(_ROLES)}")
            ids += [_ROLE_IDS[message["role"]], *self.encode(message["content"]).tolist(), _END]
        return np.asarray([*ids, _ROLE_IDS["assistant"]], np.int32)

    def messages(self, ids: Ids) -> list[Message]:
        """Return the messages that ``render`` and appended replies made ``ids`` of.

        Raises:
            ModelError: ``ids`` were not made by this tokenizer.
        """
        messages: list[Message] = []
        rest = np.asarray(ids)
        while len(rest):
            role = int(rest[0]) - 257
            if not 0 <= role < len(_ROLES):
                raise ModelError(
                    f"A prompt must be made by this model's own render(); it has the id {rest[0]} "
                    "where a role mark should be"
                )
            ends = np.flatnonzero(rest == _END)
            end = int(ends[0]) if len(ends) else len(rest)
            if len(ends) or end > 1:
                messages.append({"role": _ROLES[role], "content": self.decode(rest[1:end])})
            rest = rest[end + 1 :]
        return messages


class ScriptedModel(ByteTokenizer):
    """Says its replies in order of nothing but the seed; see ``LanguageModel``.

    Args:
        replies: one or more replies, of which ``seed % len(replies)`` is given (the first, when
            the temperature is 0); or a function.
        name: what a table shows.
        max_context: in bytes.
        template: name of the prompt template.

    Raises:
        ModelError: there is no reply.
    """

    def __init__(
        self,
        replies: Sequence[str] | Script,
        *,
        name: str = "scripted",
        max_context: int = 65_536,
        template: str = "compact",
    ) -> None:
        self.name = name
        self.version = 0
        self.max_context = max_context
        self.template = template
        self._replies = replies if callable(replies) else _checked(replies, "replies")

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Return one reply a request, in order; see ``LanguageModel``."""
        return [self._complete(request) for request in requests]

    def score(self, prefix_ids: Ids, candidates: Sequence[Ids]) -> list[LogProbs]:
        """Return the log-prob that every token has, for each token of each candidate."""
        if len(prefix_ids) == 0:
            raise ModelError("score() needs a prefix of at least 1 token; got none")
        return [_log_probs(len(candidate)) for candidate in candidates]

    def load_weights(self, source: Path) -> int:
        """Take new replies from ``replies.json``, a list of texts, in the folder ``source``."""
        path = Path(source) / "replies.json"
        try:
            replies = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{path} cannot be read ({error}). Write a JSON list of replies there"
            ) from error
        self._replies = _checked(replies, str(path))
        self.version += 1
        return self.version

    def _complete(self, request: GenerateRequest) -> Completion:
        prompt, new = len(request.prompt_ids), request.max_new_tokens
        if prompt < 1 or new < 1 or prompt + new > self.max_context:
            raise ModelError(
                f"A prompt of {prompt} tokens with max_new_tokens={new} does not fit {self.name}. "
                f"Allowed: at least 1 of each and together {self.max_context}"
            )
        ids = np.append(self.encode(self._reply(request)), _END).astype(np.int32)
        stops = np.flatnonzero(np.isin(ids, [_END, *request.stop_ids]))
        ids = ids[: int(stops[0]) + 1]
        told = tokens_to_stop(self.decode, ids, request.stops)
        ids = ids[:told]
        stopped = len(ids) <= new
        ids = ids[:new]
        return Completion(
            token_ids=ids,
            log_probs=_log_probs(len(ids)),
            text=self.decode(ids[:-1] if stopped and told is None else ids),
            finish="stop" if stopped else "length",
            version=self.version,
        )

    def _reply(self, request: GenerateRequest) -> str:
        if callable(self._replies):
            return self._replies(self.decode(request.prompt_ids), request.seed)
        index = 0 if request.temperature == 0 else request.seed % len(self._replies)
        return self._replies[index]


def _checked(replies: object, source: str) -> tuple[str, ...]:
    if isinstance(replies, Sequence) and not isinstance(replies, str):
        texts = tuple(reply for reply in replies if isinstance(reply, str))
        if texts and len(texts) == len(replies):
            return texts
    raise ModelError(f"{source} must be one or more texts; got {replies!r}")


def _log_probs(count: int) -> LogProbs:
    return np.full(count, -np.log(_SIZE), np.float32)
