"""Any backend in a process of its own, with a time limit, restarts, and its weights kept in step.

A call that dies or hangs is repeated, after pauses that double, on a fresh process that has first
loaded the weights of the last acknowledged version; samples depend on their seeds alone, so a
repeated request gives what the lost one would have given. ``load_weights`` is acknowledged when
the whole of it is done: a process that failed in the middle is ended and never answers again, so
that no reply comes from a mixture of two versions. A request that the backend refuses is
refused at once. Calls from several threads wait for one another.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pz_agents.errors import ModelError
from pz_agents.models.protocol import Completion, GenerateRequest, LanguageModel, Message
from pz_agents.sdk.types import Ids, LogProbs
from pz_envs.errors import InfraError, PzError
from pz_envs.workers import Worker

_ANY_MEMORY = 1 << 24
_LONGEST_PAUSE = 30.0

_logger = logging.getLogger(__name__)


class SupervisedModel:
    """The model of a spec, in a child process; see ``LanguageModel`` and the module.

    Args:
        spec: what ``load_model`` takes.
        device: likewise.
        timeout_s: seconds that one call may take before the process is killed.
        start_timeout_s: seconds that a start may take, the loading of weights included.
        retries: how often a call is repeated after its process was lost.
        backoff_s: the first pause; the next are twice as long each, up to half a minute.
        factory: ``"package.module:name"`` of what builds the backend in the child.

    Raises:
        ModelError: the model cannot be loaded.
    """

    def __init__(
        self,
        spec: str,
        *,
        device: str | None = None,
        timeout_s: float = 600.0,
        start_timeout_s: float = 600.0,
        retries: int = 4,
        backoff_s: float = 0.5,
        factory: str = "pz_agents.models:load_model",
    ) -> None:
        self._retries = retries
        self._backoff_s = backoff_s
        self._start_timeout_s = start_timeout_s
        self._lock = threading.RLock()
        self._acknowledged: Path | None = None
        self._copies = tempfile.mkdtemp(prefix="pz-weights-")
        self._cleanup = weakref.finalize(self, shutil.rmtree, self._copies, True)
        self._synchronised = 0  # the process that holds the acknowledged weights
        self.version = 0
        self._worker = Worker(
            "pz_agents.models.supervised:Child",
            {"factory": factory, "spec": spec, "device": device},
            timeout_s=timeout_s,
            start_timeout_s=start_timeout_s,
            memory_mb=_ANY_MEMORY,
        )
        about = self._call("describe")
        self.name = str(about["name"])
        self.max_context = int(about["max_context"])
        self.end_of_turn_id = int(about["end_of_turn_id"])
        self.template = str(about["template"])
        self.vocabulary = int(about["vocabulary"])

    def __enter__(self) -> SupervisedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The child's process id; 0 while there is none."""
        return self._worker.pid or 0

    @property
    def restarts(self) -> int:
        """How often a lost process was replaced."""
        return self._worker.restarts

    def encode(self, text: str) -> Ids:
        """Return the ids of plain text, no special tokens added."""
        return _ids(self._call("encode", text))

    def decode(self, ids: Ids) -> str:
        """Return the text of ``ids`` without special tokens."""
        return str(self._call("decode", _bytes(ids)))

    def render(self, messages: Sequence[Message], *, continuation: bool = False) -> Ids:
        """Return the ids of ``messages`` with the generation prompt; see ``LanguageModel``."""
        return _ids(self._call("render", [dict(each) for each in messages], continuation))

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Sample one completion a request, in order; see ``LanguageModel``.

        Raises:
            ModelError: the backend refuses, or its process was lost too often.
        """
        with self._lock:
            answers = self._call("generate", [_plain(request) for request in requests])
            return [
                Completion(_ids(ids), np.frombuffer(probs, np.float32), text, finish, self.version)
                for ids, probs, text, finish in answers
            ]

    def score(self, prefix_ids: Ids, candidates: Sequence[Ids]) -> list[LogProbs]:
        """Return log-probs [N_k] of each candidate's tokens after ``prefix_ids``, computed once."""
        told = self._call("score", _bytes(prefix_ids), [_bytes(each) for each in candidates])
        return [np.frombuffer(each, np.float32) for each in told]

    def load_weights(self, source: Path) -> int:
        """Load weights in the child and remember them for its successors; see ``LanguageModel``.

        Raises:
            ModelError: they could not be loaded; the old version answers on, wholly.
        """
        with self._lock:
            kept = self._keep(Path(source), self.version + 1)
            try:
                self._call("load_weights", str(kept))
            except ModelError:
                # Whatever the child holds now, its successor holds the acknowledged version.
                self._worker.close()
                shutil.rmtree(kept, ignore_errors=True)
                raise
            if self._acknowledged is not None:
                shutil.rmtree(self._acknowledged, ignore_errors=True)
            self._acknowledged = kept
            self._synchronised = self.pid
            self.version += 1
            return self.version

    def close(self) -> None:
        """End the child and forget its weights."""
        self._worker.close()
        self._cleanup()

    def _call(self, method: str, *arguments: Any) -> Any:
        with self._lock:
            for attempt in range(self._retries + 1):
                try:
                    self._synchronise()
                    return self._worker.call(method, *arguments)
                except InfraError as error:
                    if attempt == self._retries:
                        raise ModelError(
                            f"the engine was lost {attempt + 1} times in `{method}`: {error}"
                        ) from error
                    pause = min(self._backoff_s * 2**attempt, _LONGEST_PAUSE)
                    _logger.warning("%s; starting another in %.1f s", error, pause)
                    time.sleep(pause)
                except PzError as error:
                    raise ModelError(str(error)) from error
            raise AssertionError("the last attempt returns or raises")

    def _synchronise(self) -> None:
        """Give a child that has just been started the acknowledged weights."""
        if self._acknowledged is not None and self._synchronised != self._worker.pid:
            folder = str(self._acknowledged)
            self._worker.call("load_weights", folder, timeout_s=self._start_timeout_s)
            self._synchronised = self.pid

    def _keep(self, source: Path, version: int) -> Path:
        """Return a copy of ``source`` that stays when its owner deletes it; links where possible.

        Our own writers replace files and never change them, so a link is as good as a copy.
        """
        if not source.is_dir():
            raise ModelError(f"No weights in {source}: save_pretrained writes a folder")
        target = Path(self._copies) / str(version)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, copy_function=_link_or_copy)
        return target


class Child:
    """The child's side: the backend, spoken to in what a worker's messages can carry."""

    def __init__(self, factory: str, spec: str, device: str | None) -> None:
        from pz_envs.worker_child import load_factory

        self._model: LanguageModel = load_factory(factory)(spec, device=device)

    def describe(self) -> dict[str, Any]:
        """Return the model's attributes."""
        names = ("name", "max_context", "end_of_turn_id", "template")
        about = {name: getattr(self._model, name) for name in names}
        return {**about, "vocabulary": getattr(self._model, "vocabulary", 2**31)}

    def encode(self, text: str) -> bytes:
        """See ``LanguageModel``."""
        return _bytes(self._model.encode(text))

    def decode(self, ids: bytes) -> str:
        """See ``LanguageModel``."""
        return self._model.decode(_ids(ids))

    def render(self, messages: list[Message], continuation: bool) -> bytes:
        """See ``LanguageModel``."""
        return _bytes(self._model.render(messages, continuation=continuation))

    def generate(self, requests: list[list[Any]]) -> list[list[Any]]:
        """See ``LanguageModel``; a completion is its ids, log-probs, text and finish."""
        asked = [
            GenerateRequest(
                _ids(ids), new, seed, temperature, top_p, top_k, tuple(stop_ids), tuple(stops)
            )
            for ids, new, seed, temperature, top_p, top_k, stop_ids, stops in requests
        ]
        return [
            [_bytes(each.token_ids), each.log_probs.tobytes(), each.text, each.finish]
            for each in self._model.generate(asked)
        ]

    def score(self, prefix: bytes, candidates: list[bytes]) -> list[bytes]:
        """See ``LanguageModel``."""
        scored = self._model.score(_ids(prefix), [_ids(candidate) for candidate in candidates])
        return [np.asarray(each, np.float32).tobytes() for each in scored]

    def load_weights(self, source: str) -> int:
        """See ``LanguageModel``."""
        return self._model.load_weights(Path(source))


def _plain(request: GenerateRequest) -> list[Any]:
    return [
        _bytes(request.prompt_ids),
        int(request.max_new_tokens),
        int(request.seed),
        float(request.temperature),
        float(request.top_p),
        int(request.top_k),
        [int(each) for each in request.stop_ids],
        list(request.stops),
    ]


def _bytes(ids: Ids) -> bytes:
    return np.asarray(ids, np.int32).tobytes()


def _ids(data: bytes) -> Ids:
    return np.frombuffer(data, np.int32)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
