"""A recording proxy: whoever plays through it has the tokens of what it said written down.

It is an OpenAI-compatible server over any ``LanguageModel`` that answers only those who have a
session's key, as API key or as ``/s/KEY`` in the address, and tells each session's calls apart by
it. An agent in another framework needs ``OPENAI_BASE_URL`` and ``OPENAI_API_KEY`` and nothing of
ours. The prompt's and the sampled ids of each call are what the model read and drew, so they can
be trained on; a conversation that goes on from a reply is continued from the reply's own ids.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pz_agents.models.protocol import LanguageModel, is_trainable
from pz_agents.sdk.types import Action, Sample, Trajectory
from pz_agents.serving.api import Call
from pz_agents.serving.server import LOOPBACK, ModelServer, Session
from pz_envs.seeding import derive_seed

EARLIER = "earlier"
"""Where ``Action.notes`` keep the calls before the one that is the action's sample."""


class RecordingProxy:
    """Serves ``model`` to the sessions that are open; it begins at once and ends with ``close``.

    Args:
        model: what answers.
        host: where to listen.
        port: 0 takes a free one.
    """

    def __init__(self, model: LanguageModel, *, host: str = LOOPBACK, port: int = 0) -> None:
        self._sessions: dict[str, Session] = {}
        self._server = ModelServer(model, host=host, port=port, sessions=self._sessions)

    def __enter__(self) -> RecordingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> Recording:
        """Return a new session."""
        return Recording(self._server.root, self._sessions)

    def close(self) -> None:
        """Stop answering anybody."""
        self._sessions.clear()
        self._server.close()


class Recording:
    """One session of a proxy.

    Attributes:
        key: the API key that belongs to it.
        url: what to set ``OPENAI_BASE_URL`` to; it names the session even without the key.
    """

    def __init__(self, root: str, sessions: dict[str, Session]) -> None:
        self.key = f"pz-{secrets.token_urlsafe(18)}"
        self.url = f"{root}/s/{self.key}/v1"
        self._lock = threading.Lock()
        self._calls: list[Call] = []
        self._seed = 0
        self._asked = 0
        self._sessions = sessions
        sessions[self.key] = Session(next_seed=self._next_seed, record=self._record)

    def begin(self, seed: int) -> None:
        """Begin a turn: requests without a seed draw from streams of ``seed``."""
        with self._lock:
            self._seed, self._asked = seed, 0

    def take(self) -> list[Call]:
        """Return the calls since the last ``take``, in the order they were answered."""
        with self._lock:
            calls, self._calls = self._calls, []
        return calls

    def close(self) -> None:
        """Refuse further requests."""
        self._sessions.pop(self.key, None)

    def _next_seed(self) -> int:
        with self._lock:
            self._asked += 1
            return derive_seed(self._seed, "request", self._asked - 1)

    def _record(self, calls: Sequence[Call]) -> None:
        with self._lock:
            self._calls += calls


def recorded_action(text: str, calls: Sequence[Call]) -> Action:
    """Return the action ``text`` with the calls that led to it.

    The last call is the action's sample. Where there were more, ``notes`` count them (``calls``),
    count their tokens (``other_tokens``, ``other_prompt_tokens``) and keep them (``earlier``).
    """
    if not calls:
        return Action(text)
    *earlier, last = calls
    sample = _sample(last) if is_trainable(last.completion) else None
    if not earlier:
        return Action(text, sample)
    notes: dict[str, Any] = {
        "calls": len(calls),
        "other_tokens": sum(len(call.completion.token_ids) for call in earlier),
        "other_prompt_tokens": sum(len(call.prompt_ids) for call in earlier),
        EARLIER: [_plain(_sample(call)) for call in earlier if is_trainable(call.completion)],
    }
    return Action(text, sample, notes)


def all_samples(trajectory: Trajectory) -> list[Sample]:
    """Return every call of an episode that was recorded through a proxy, in order."""
    samples: list[Sample] = []
    for step in trajectory.steps:
        samples += [_from_plain(each) for each in step.notes.get(EARLIER, ())]
        samples += [step.sample] if step.sample is not None else []
    return samples


def _sample(call: Call) -> Sample:
    completion = call.completion
    return Sample(
        prompt_ids=np.asarray(call.prompt_ids, np.int32),
        token_ids=completion.token_ids,
        log_probs=completion.log_probs,
        finish=completion.finish,
        version=completion.version,
        temperature=call.temperature,
    )


def _plain(sample: Sample) -> dict[str, Any]:
    return {
        "prompt_ids": sample.prompt_ids.tolist(),
        "token_ids": sample.token_ids.tolist(),
        "log_probs": sample.log_probs.tolist(),
        "finish": sample.finish,
        "version": sample.version,
        "temperature": sample.temperature,
    }


def _from_plain(plain: Mapping[str, Any]) -> Sample:
    arrays = {
        "prompt_ids": np.asarray(plain["prompt_ids"], np.int32),
        "token_ids": np.asarray(plain["token_ids"], np.int32),
        "log_probs": np.asarray(plain["log_probs"], np.float32),
    }
    return Sample(**{**plain, **arrays})
