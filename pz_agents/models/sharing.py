"""What lets several threads share one model: their requests in one batch, and weights one by one.

Requests that come while a batch is sampled are the next batch; a backend that joins requests itself
(``shares_batches``) is asked by each thread at once instead. Samples depend on their seeds alone,
so who shares a batch with whom changes nothing in them. Whoever asks holds the ``Gate`` open for
itself; who changes the weights waits until nobody does, and those who come later wait for it, so
that every answer is wholly of one version and no change waits for ever.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

from pz_agents.models.protocol import Completion, GenerateRequest, LanguageModel
from pz_agents.sdk.types import Ids, LogProbs
from pz_envs.errors import InfraError

_BATCH = 256
_LINGER_SECONDS = 0.002


class Batcher:
    """Asks a model for all that waits at once; whoever waits does it for everybody.

    A model with ``shares_batches`` is asked by each thread for itself instead.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._shares = getattr(model, "shares_batches", False)
        self._waiting: queue.SimpleQueue[tuple[GenerateRequest, Future[Completion]]] = (
            queue.SimpleQueue()
        )
        self._condition = threading.Condition()
        self._asking = False
        self._closed = False

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Return the completions of ``requests``, sampled beside those of other threads."""
        if self._shares:
            return self._model.generate(requests)
        futures: list[Future[Completion]] = [Future() for _ in requests]
        for pair in zip(requests, futures, strict=True):
            self._waiting.put(pair)

        def answered() -> bool:
            return all(future.done() for future in futures)

        while not answered():
            with self._turn(answered) as mine:
                if mine:
                    self._answer(self._batch())
        return [future.result() for future in futures]

    def score(self, prefix_ids: Ids, candidates: Sequence[Ids]) -> list[LogProbs]:
        """Return the log-probs of ``candidates`` after ``prefix_ids``, in no batch of others."""
        with contextlib.nullcontext() if self._shares else self._turn(lambda: False):
            return self._model.score(prefix_ids, candidates)

    def close(self) -> None:
        """Answer nothing after the present batch."""
        self._closed = True

    @contextlib.contextmanager
    def _turn(self, answered: Callable[[], bool]) -> Iterator[bool]:
        """Wait until nobody asks the model, which is this thread's then, or for an answer."""
        with self._condition:
            self._condition.wait_for(lambda: answered() or not self._asking)
            if self._closed and not answered():
                raise InfraError("the model is no longer served")
            mine = not answered()
            self._asking = self._asking or mine
        try:
            yield mine
        finally:
            if mine:
                with self._condition:
                    self._asking = False
                    self._condition.notify_all()

    def _batch(self) -> list[tuple[GenerateRequest, Future[Completion]]]:
        """Take what waits, and what comes a moment later."""
        batch: list[tuple[GenerateRequest, Future[Completion]]] = []
        while len(batch) < _BATCH:
            try:
                batch.append(self._waiting.get(timeout=_LINGER_SECONDS))
            except queue.Empty:
                break
        return batch

    def _answer(self, batch: list[tuple[GenerateRequest, Future[Completion]]]) -> None:
        try:
            completions = self._model.generate([request for request, _ in batch])
        except Exception as error:  # the waiting thread raises it
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for pair in batch:  # one request may have spoilt the others' batch
                self._answer([pair])
            return
        for (_, future), completion in zip(batch, completions, strict=True):
            future.set_result(completion)


class Gate:
    """Lets many threads use something, or one change it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._users = 0
        self._changes = 0
        self._changing = False

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Hold what is there as it is; those who wait to change it go first."""
        with self._condition:
            self._condition.wait_for(lambda: not self._changes)
            self._users += 1
        try:
            yield
        finally:
            with self._condition:
                self._users -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Wait until nobody uses or changes it, and keep everybody out."""
        with self._condition:
            self._changes += 1
            self._condition.wait_for(lambda: not self._users and not self._changing)
            self._changing = True
        try:
            yield
        finally:
            with self._condition:
                self._changes -= 1
                self._changing = False
                self._condition.notify_all()
