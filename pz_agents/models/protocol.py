"""The language-model contract that every backend keeps; one test suite runs over all of them."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pz_agents.sdk.types import Finish, Ids, LogProbs

Message = Mapping[Literal["role", "content"], str]


@dataclass(frozen=True, slots=True, eq=False)
class GenerateRequest:
    """One completion to sample.

    prompt_ids: [P] token ids, special tokens and chat template already in place.
    temperature: 0 is greedy; log-probs are then those of temperature 1.
    top_p, top_k: 1.0 and 0 are off; anything else biases training and is refused there.
    seed: decides the sample alone; the other requests of the batch do not matter.
    stop_ids: generation ends after any of these (the end-of-turn token is always among them).
    stops: texts, of any number of tokens; generation ends with the token in which the first of them
        is complete.
    """

    prompt_ids: Ids
    max_new_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """What was sampled.

    token_ids: [N] as they were sampled; with ``finish`` ``"stop"`` the last is the terminator
        or the token in which a stop text ended.
    log_probs: [N] log-softmax(logits / temperature) at ``token_ids``, before top-p or top-k.
    text: the decoded ids without the terminator; a stop text is part of it.
    version: of the weights.

    A server that does not tell ids or log-probs leaves ``log_probs`` (and ``token_ids``, where it
    does not tell those) empty; such a completion can be played but not trained on.
    """

    token_ids: Ids
    log_probs: LogProbs
    text: str
    finish: Finish
    version: int


def tokens_to_stop(decode: Callable[[Ids], str], ids: Ids, stops: Sequence[str]) -> int | None:
    """Return how many of ``ids`` it takes until a stop text is complete; None: there is none."""
    if not stops:
        return None

    def stopped(count: int) -> bool:
        text = decode(ids[:count])
        return any(stop in text for stop in stops)

    count = bisect.bisect_left(range(len(ids) + 1), True, key=stopped)
    return count if count <= len(ids) else None


def is_trainable(completion: Completion) -> bool:
    """Return whether ``completion`` has its token ids, and one log-prob for each."""
    return 0 < len(completion.token_ids) == len(completion.log_probs)


class LanguageModel(Protocol):
    """A policy over tokens.

    Attributes:
        name: what a table shows.
        version: grows with every ``load_weights``.
        max_context: most tokens of prompt and completion together.
        end_of_turn_id: the token that ends a reply.
        template: name of the prompt template that fits the model (``pz_agents.prompting``).
    """

    name: str
    version: int
    max_context: int
    end_of_turn_id: int
    template: str

    def encode(self, text: str) -> Ids:
        """Return the ids of plain text, no special tokens added."""
        ...

    def decode(self, ids: Ids) -> str:
        """Return the text of ``ids`` without special tokens."""
        ...

    def render(self, messages: Sequence[Message], *, continuation: bool = False) -> Ids:
        """Return the ids of ``messages`` with the generation prompt after them.

        With ``continuation`` the messages follow a sampled reply: the ids are those to append
        after that reply's terminator, so that a conversation only ever grows at its end.
        """
        ...

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Sample one completion a request, in order.

        Raises:
            ModelError: a prompt does not fit, or the backend failed for good.
        """
        ...

    def score(self, prefix_ids: Ids, candidates: Sequence[Ids]) -> list[LogProbs]:
        """Return log-probs [N_k] of each candidate's tokens after ``prefix_ids``, computed once."""
        ...

    def load_weights(self, source: Path) -> int:
        """Load weights from a ``save_pretrained`` folder of the same architecture; new version."""
        ...
