"""Engines that fail on demand: a file in a control folder names the next fault.

``hang``: ``generate`` answers the first request and then never returns. ``die-loading``: half of
the new weights are in place when the process is killed; ``raise-loading``: when it raises.
``always-`` before a name keeps the fault. The engine is a bigram model in numpy, which starts in a
moment and has real weights, or transformers.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pz_agents.errors import ModelError
from pz_agents.models.protocol import Completion, GenerateRequest
from pz_agents.models.scripted import ByteTokenizer
from pz_agents.sdk.types import Ids, LogProbs

SIZE = 260


def write_bigram(folder: Path, seed: int) -> Path:
    """Write the weights of a bigram model; returns the folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for name, shape in (("table", (SIZE, SIZE)), ("bias", (SIZE,))):
        np.save(folder / f"{name}.npy", rng.normal(size=shape).astype(np.float32))
    return folder


class BigramModel(ByteTokenizer):
    """A language model over bytes: logits = table[last token] + bias."""

    def __init__(self, folder: Path) -> None:
        self.name, self.version, self.max_context, self.template = "bigram", 0, 4096, "compact"
        self.load_half(folder)
        self.bias = np.load(folder / "bias.npy")

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        return [self._complete(request) for request in requests]

    def score(self, prefix_ids: Ids, candidates: Sequence[Ids]) -> list[LogProbs]:
        scores = []
        for candidate in candidates:
            before = np.concatenate([prefix_ids[-1:], candidate[:-1]])
            rows = [self._log_probs(int(token)) for token in before[: len(candidate)]]
            picked = [row[token] for row, token in zip(rows, candidate, strict=True)]
            scores.append(np.asarray(picked, np.float32))
        return scores

    def load_half(self, folder: Path) -> None:
        self.table = np.load(folder / "table.npy")

    def load_weights(self, source: Path) -> int:
        self.load_half(source)
        self.bias = np.load(source / "bias.npy")
        self.version += 1
        return self.version

    def _log_probs(self, last: int) -> LogProbs:
        logits = self.table[last] + self.bias
        return np.asarray(logits - np.logaddexp.reduce(logits), np.float32)

    def _complete(self, request: GenerateRequest) -> Completion:
        if len(request.prompt_ids) + request.max_new_tokens > self.max_context:
            raise ModelError(f"A prompt of {len(request.prompt_ids)} tokens does not fit")
        rng = np.random.default_rng(request.seed)
        ids, log_probs = [int(request.prompt_ids[-1])], []
        while len(log_probs) < request.max_new_tokens and ids[-1] != self.end_of_turn_id:
            row = self._log_probs(ids[-1])
            ids.append(int(np.argmax(row + rng.gumbel(size=SIZE))))
            log_probs.append(row[ids[-1]])
        sampled = np.asarray(ids[1:], np.int32)
        finish = "stop" if sampled[-1] == self.end_of_turn_id else "length"
        text = self.decode(sampled)
        return Completion(sampled, np.asarray(log_probs, np.float32), text, finish, self.version)


class Faulty:
    """``inner``, failing as its control folder says."""

    def __init__(self, inner: Any, control: Path) -> None:
        self._inner = inner
        self._control = control

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        if self._due("hang"):
            self._inner.generate(requests[:1])
            (self._control / "hanging").write_text(str(os.getpid()))
            time.sleep(600)
        return self._inner.generate(requests)

    def load_weights(self, source: Path) -> int:
        for fault in ("die-loading", "raise-loading"):
            if self._due(fault):
                self._inner.load_half(source)
                if fault == "die-loading":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("half of the weights are in place")
        return self._inner.load_weights(source)

    def _due(self, fault: str) -> bool:
        once = self._control / fault
        if once.exists():
            once.unlink()
            return True
        return (self._control / f"always-{fault}").exists()


def load(spec: str, device: str | None = None) -> Faulty:
    """Return the faulty model of ``FOLDER|CONTROL``."""
    folder, control = map(Path, spec.split("|"))
    if (folder / "table.npy").exists():
        return Faulty(BigramModel(folder), control)
    from pz_agents.models.transformers import TransformersModel

    return Faulty(TransformersModel(folder, device=device), control)
