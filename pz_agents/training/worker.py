"""What runs in the processes of a fleet: workers that play, and engines they may share.

A worker plays its part of a batch with a model of its own, or asks an engine. Weights come as the
files of a ``save_pretrained`` folder (of an adapter alone, where one is trained), so that any
backend that ``load_model`` knows can take them; an engine may get them through a group instead.
Every completion says which version it is of.
"""

from __future__ import annotations

import io
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pz_agents.models.protocol import Completion, GenerateRequest, LanguageModel, Message
from pz_agents.models.sharing import Batcher, Gate
from pz_agents.rollout.codec import encode
from pz_agents.runtime import LostError, connect
from pz_agents.sdk.types import Ids, LogProbs
from pz_agents.training.player import make_agent, play_batch
from pz_agents.training.settings import TrainSettings
from pz_envs.errors import InfraError

if TYPE_CHECKING:
    from pz_agents.training.group import Backend, Group

_PATIENCE_SECONDS = 600.0
_LONGEST_PAUSE = 2.0
_ENGINE_SECONDS = 600.0


class RolloutWorker:
    """Plays parts of batches.

    Args:
        settings: of the run, as plain values.
        engines: addresses of the engines to ask; none: the worker has a model of its own.
        number: which of them it asks.
    """

    def __init__(self, settings: dict[str, Any], engines: list[str], number: int) -> None:
        self._settings = TrainSettings(**settings)
        one_thread(self._settings.threads)
        self._policy: Any
        if engines:
            self._policy = EngineClient(engines[number % len(engines)], self._settings.model)
        else:
            self._policy = _load(self._settings.model)
        self._agent = make_agent(self._settings, self._policy, self._settings.temperature)

    def play(
        self, number: int, places: list[int], version: int, weights: bytes | None
    ) -> list[bytes]:
        """Play tasks of a batch and return the encoded episodes.

        Args:
            number: of the batch.
            places: of the tasks in it.
            version: of the weights to play with.
            weights: those weights; None: they are here already, or an engine's business.

        Raises:
            InfraError: the weights that are here are not of ``version``; episodes keep failing.
        """
        if isinstance(self._policy, EngineClient):
            self._policy.wanted = version
        elif weights is not None:
            load_files(self._policy, weights, version)
        elif self._policy.version != version:
            raise InfraError(
                f"weights of version {version} are to play; this worker has {self._policy.version}"
            )
        return [encode(item) for item in play_batch(self._settings, self._agent, number, places)]


class Engine:
    """A language model for several workers at once; what it serves always is of one version.

    Their requests share batches; new weights wait until those under way are answered.

    Args:
        model: see ``load_model``.
        threads: torch's, on a CPU.
        number: of the engine.
    """

    def __init__(self, model: str, threads: int, number: int) -> None:
        one_thread(threads)
        self._model: Any = _load(model)
        self._batcher = Batcher(self._model)
        self._gate = Gate()
        self._group: Group | None = None
        self._version = -1

    def describe(self) -> dict[str, Any]:
        """Return what a client must know of the model."""
        names = ("name", "max_context", "end_of_turn_id", "template")
        return {name: getattr(self._model, name) for name in names}

    def version(self) -> int:
        """Return the version of the weights; -1 before there were any."""
        return self._version

    def load(self, weights: bytes, version: int) -> int:
        """Take up weights and serve them as ``version``; after a load that fails there are none."""
        with self._gate.changing():
            self._version = -1
            load_files(self._model, weights, version)
            self._version = version
        return version

    def device(self) -> str:
        """Return which device the model is on."""
        import torch

        from pz_agents.training.group import name_of

        return name_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def join(
        self, rank: int, size: int, host: str, port: int, backend: Backend, seconds: float
    ) -> None:
        """Join a group in which rank 0 sends weights; see ``Group``."""
        from pz_agents.training.group import Group

        self._group = Group(rank, size, host, port, backend, seconds)

    def receive(self, kinds: list[tuple[str, str, list[int]]], version: int) -> int:
        """Take up the weights that rank 0 sends, all at once when they are here.

        Args:
            kinds: each tensor's name, type and shape.
            version: of the weights.

        Raises:
            InfraError: they did not arrive whole; the engine has what it had.
        """
        import torch

        if self._group is None:
            raise InfraError("this engine has joined no group to get weights through")
        empty = [
            torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for _, dtype, shape in kinds
        ]
        try:
            tensors = self._group.receive(empty)
        except RuntimeError as error:
            self._group = None
            raise InfraError(f"weights {version} did not arrive whole: {error}") from error
        state = {name: tensor for (name, *_), tensor in zip(kinds, tensors, strict=True)}
        with self._gate.changing():
            self._version = -1
            self._model.load_state(state)
            self._model.version = self._version = version
        return version

    def generate(self, requests: list[dict[str, Any]], wanted: int) -> list[dict[str, Any]]:
        """Sample; requests and completions are those of ``LanguageModel`` as plain data.

        Raises:
            LostError: the weights are older than ``wanted``; they are on their way.
        """
        asked = [
            GenerateRequest(
                **{**request, "prompt_ids": np.frombuffer(request["prompt_ids"], np.int32)}
                | {"stop_ids": tuple(request["stop_ids"]), "stops": tuple(request["stops"])}
            )
            for request in requests
        ]
        with self._gate.using():
            self._check(wanted)
            completions = self._batcher.generate(asked)
        return [
            {
                "token_ids": np.asarray(done.token_ids, np.int32).tobytes(),
                "log_probs": np.asarray(done.log_probs, np.float32).tobytes(),
                "text": done.text,
                "finish": done.finish,
                "version": done.version,
            }
            for done in completions
        ]

    def score(self, prefix: bytes, candidates: list[bytes], wanted: int) -> list[bytes]:
        """Score; see ``generate``."""
        ids = [np.frombuffer(candidate, np.int32) for candidate in candidates]
        with self._gate.using():
            self._check(wanted)
            scored = self._batcher.score(np.frombuffer(prefix, np.int32), ids)
        return [np.asarray(each, np.float32).tobytes() for each in scored]

    def _check(self, wanted: int) -> None:
        if self._version < wanted:
            raise LostError(
                f"version {wanted} of the weights was asked for; this engine has {self._version}"
            )


class EngineClient:
    """An engine as a ``LanguageModel``; text becomes tokens here, tokens are sampled there.

    An engine that died, or that was started anew and has no weights yet, is asked again with
    growing pauses.

    Args:
        address: of the engine.
        model: what the engine loaded; its tokenizer is loaded here.

    Attributes:
        wanted: the oldest version of the weights that may answer.
    """

    def __init__(self, address: str, model: str) -> None:
        from pz_agents.models import model_folder
        from pz_agents.models.chat import ChatTokenizer
        from pz_agents.models.tiny import tiny_folder

        self._engine = connect(address)
        self._chat = ChatTokenizer(tiny_folder() if model == "tiny" else model_folder(model))
        told = self._asked("describe")
        self.name: str = told["name"]
        self.max_context: int = told["max_context"]
        self.end_of_turn_id: int = told["end_of_turn_id"]
        self.template: str = told["template"]
        self.version = self.wanted = 0

    def encode(self, text: str) -> Ids:
        """Return the ids of plain text; see ``LanguageModel``."""
        return self._chat.encode(text)

    def decode(self, ids: Ids) -> str:
        """Return the text of ``ids``; see ``LanguageModel``."""
        return self._chat.decode(ids)

    def render(self, messages: Sequence[Message], *, continuation: bool = False) -> Ids:
        """Return the ids of ``messages``; see ``LanguageModel``."""
        return self._chat.render(messages, continuation=continuation)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Sample one completion a request; see ``LanguageModel``."""
        asked = [plain_request(request) for request in requests]
        answers = self._asked("generate", asked, self.wanted)
        self.version = max((answer["version"] for answer in answers), default=self.version)
        return [
            Completion(
                np.frombuffer(answer["token_ids"], np.int32),
                np.frombuffer(answer["log_probs"], np.float32),
                answer["text"],
                answer["finish"],
                answer["version"],
            )
            for answer in answers
        ]

    def score(self, prefix_ids: Ids, candidates: Sequence[Ids]) -> list[LogProbs]:
        """Return log-probs of each candidate's tokens; see ``LanguageModel``."""
        prefix, *rest = (np.asarray(ids, np.int32).tobytes() for ids in (prefix_ids, *candidates))
        scored = self._asked("score", prefix, rest, self.wanted)
        return [np.frombuffer(each, np.float32) for each in scored]

    def load_weights(self, source: Path) -> int:
        """Refuse: an engine's weights are its fleet's business."""
        raise InfraError(f"an engine that several workers share cannot load {source} for one")

    def _asked(self, method: str, *args: Any) -> Any:
        def ask() -> Any:
            return self._engine.call(method, *args, timeout=_ENGINE_SECONDS)

        return patiently(ask, _PATIENCE_SECONDS)


def plain_request(request: GenerateRequest) -> dict[str, Any]:
    """Return ``request`` as ``Engine.generate`` takes it."""
    return {
        "prompt_ids": np.asarray(request.prompt_ids, np.int32).tobytes(),
        "max_new_tokens": request.max_new_tokens,
        "seed": request.seed,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stop_ids": list(request.stop_ids),
        "stops": list(request.stops),
    }


def patiently(ask: Callable[[], Any], seconds: float) -> Any:
    """Return what ``ask`` returns, asking again with growing pauses while an engine is away.

    Raises:
        InfraError: it was away for ``seconds``.
    """
    until, pause = time.monotonic() + seconds, 0.05
    while True:
        try:
            return ask()
        except LostError:
            if time.monotonic() + pause > until:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def pack_files(save: Callable[[Path], None]) -> bytes:
    """Return the files that ``save`` writes into the folder it is given, as one string of bytes."""
    buffer = io.BytesIO()
    with (
        tempfile.TemporaryDirectory(prefix="pz-weights-") as folder,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive,
    ):
        save(Path(folder))
        for path in sorted(Path(folder).iterdir()):
            archive.write(path, path.name)
    return buffer.getvalue()


def load_files(model: LanguageModel, data: bytes, version: int) -> None:
    """Load what ``pack_files`` returned into ``model`` and call it ``version``."""
    with tempfile.TemporaryDirectory(prefix="pz-weights-") as folder:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            archive.extractall(folder)
        model.load_weights(Path(folder))
    model.version = version


def one_thread(threads: int) -> None:
    """Give this process so many of torch's threads, and no progress bars."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(threads)
    disable_progress_bar()


def _load(model: str) -> LanguageModel:
    from pz_agents.models import load_model

    return load_model(model)
