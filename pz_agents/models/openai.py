"""Models behind an OpenAI-compatible server, in one of two ways.

With a tokenizer folder, token ids go to ``/completions`` and token ids with log-probs come back:
what vLLM serves (``return_token_ids``), and what training needs. Without one, messages go to
``/chat/completions``, which any server has; then ids and log-probs are empty, so episodes can be
played and not trained on, lengths are counted in bytes, and texts end before a stop. Requests run
side by side; the client repeats those that fail for a while. Seeds are sent, but whether equal
seeds give equal samples is up to the server.

A spec reads ``openai:MODEL@URL?tokenizer=FOLDER&timeout=60``; the options are the fields of
``ServerSettings``. The key is taken from ``OPENAI_API_KEY``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

import numpy as np
import pydantic

from pz_agents.config import Settings, parse_settings
from pz_agents.errors import ModelError
from pz_agents.models.chat import ChatTokenizer
from pz_agents.models.protocol import Completion, GenerateRequest, Message, tokens_to_stop
from pz_agents.models.scripted import ByteTokenizer
from pz_agents.sdk.types import Finish, Ids, LogProbs
from pz_envs.errors import ConfigError, require

_NO_LOG_PROBS = np.empty(0, np.float32)
_NO_IDS = np.empty(0, np.int32)


class ServerSettings(Settings):
    """Where a model is served and how to talk to it."""

    model: str
    """The name that the server knows the model by."""
    url: str
    """Base of the API, e.g. `http://localhost:8000/v1`."""
    tokenizer: Path | None = None
    """Folder of the model's tokenizer; with it, token ids are sent and received."""
    context: int = pydantic.Field(32_768, ge=64)
    """Most tokens of prompt and reply; bytes where there is no tokenizer."""
    timeout: float = pydantic.Field(120.0, gt=0)
    """Seconds that one try of a request may take."""
    retries: int = pydantic.Field(8, ge=0, le=20)
    """How often a request is repeated, with growing pauses; 8 outlast half a minute."""
    concurrency: int = pydantic.Field(16, ge=1)
    """Requests under way at once."""
    log_probs: Literal["raw", "processed"] = "raw"
    """`processed` if the server's log-probs include the temperature (vLLM:
    `--logprobs-mode processed_logprobs`). Raw ones are kept only at temperatures 0 and 1."""
    template: str = "chat"
    """Name of the prompt template."""


def openai_model(spec: str) -> OpenAIModel:
    """Return the model of a spec; nothing is sent yet.

    Raises:
        ModelError: the spec cannot be read.
        ConfigError: the package ``openai`` is not installed.
    """
    return OpenAIModel(parse_spec(spec))


def parse_spec(spec: str) -> ServerSettings:
    """Return the settings in ``openai:MODEL@URL?option=value``.

    Raises:
        ModelError: there is no model, no URL, or an option that does not exist.
    """
    model, _, address = spec.removeprefix("openai:").rpartition("@")
    url, _, options = address.partition("?")
    if not model or not url.startswith(("http://", "https://")):
        raise ModelError(
            f"`{spec}` names no served model. Write openai:MODEL@http://host:port/v1, with "
            "?tokenizer=FOLDER for token ids"
        )
    values = dict(parse_qsl(options, keep_blank_values=True))
    try:
        return parse_settings(ServerSettings, {**values, "model": model, "url": url}, spec)
    except ConfigError as error:
        raise ModelError(str(error)) from error


class OpenAIModel:
    """A served model; see ``LanguageModel`` and the module.

    Raises:
        ConfigError: the package ``openai`` is not installed.
        ModelError: the tokenizer folder cannot be read.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._openai = require("openai", "pz-agents[openai]")
        self._settings = settings
        self._client = self._openai.OpenAI(
            base_url=settings.url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=settings.timeout,
            max_retries=settings.retries,
        )
        self._bytes = ByteTokenizer()
        self._chat = None if settings.tokenizer is None else ChatTokenizer(settings.tokenizer)
        self._tokenizer: ChatTokenizer | ByteTokenizer = self._chat or self._bytes
        self.name = settings.model
        self.version = 0
        self.max_context = settings.context
        self.end_of_turn_id = self._tokenizer.end_of_turn_id
        self.template = settings.template

    def encode(self, text: str) -> Ids:
        """Return the ids of plain text (bytes where there is no tokenizer)."""
        return self._tokenizer.encode(text)

    def decode(self, ids: Ids) -> str:
        """Return the text of ``ids`` without special tokens."""
        return self._tokenizer.decode(ids)

    def render(self, messages: Sequence[Message], *, continuation: bool = False) -> Ids:
        """Return the ids of ``messages`` with the generation prompt; see ``LanguageModel``."""
        return self._tokenizer.render(messages, continuation=continuation)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Ask for one completion a request, in order; see ``LanguageModel``.

        Raises:
            ModelError: a prompt does not fit; the server cannot be reached, refuses, or answers
                what cannot be read.
        """
        for request in requests:
            self._check(request)
        complete = self._by_chat if self._chat is None else self._by_ids
        if not requests:
            return []
        with ThreadPoolExecutor(min(self._settings.concurrency, len(requests))) as pool:
            return list(pool.map(complete, requests))

    def score(self, prefix_ids: Ids, candidates: Sequence[Ids]) -> list[LogProbs]:
        """Return log-probs [N_k] of each candidate's tokens after ``prefix_ids``.

        Servers recompute the whole prompt for prompt log-probs: K candidates cost K prefills.

        Raises:
            ModelError: there is no tokenizer folder, or the server gives no prompt log-probs.
        """
        if self._chat is None:
            raise ModelError(
                f"{self.name} cannot score without token ids. Add ?tokenizer=FOLDER to the spec"
            )
        if len(prefix_ids) == 0:
            raise ModelError("score() needs a prefix of at least 1 token; got none")
        prompts = [np.concatenate([prefix_ids, candidate]).tolist() for candidate in candidates]
        with ThreadPoolExecutor(self._settings.concurrency) as pool:
            scored = list(pool.map(self._prompt_log_probs, prompts))
        return [log_probs[len(prefix_ids) :] for log_probs in scored]

    def load_weights(self, source: Path) -> int:
        """Refuse: what a server serves is changed at the server."""
        raise ModelError(
            f"{self.name} is served by {self._settings.url} and cannot load {source} from here. "
            "Restart the server with the new weights, or load the folder as a local model"
        )

    def _check(self, request: GenerateRequest) -> None:
        prompt, new = len(request.prompt_ids), request.max_new_tokens
        if prompt < 1 or new < 1 or prompt + new > self.max_context:
            raise ModelError(
                f"A prompt of {prompt} tokens with max_new_tokens={new} does not fit {self.name}. "
                f"Allowed: at least 1 of each and together {self.max_context} (option `context`)"
            )

    def _by_ids(self, request: GenerateRequest) -> Completion:
        extra: dict[str, Any] = {"return_token_ids": True, "add_special_tokens": False}
        stops = {self.end_of_turn_id, *request.stop_ids}
        extra["stop_token_ids"] = sorted(stops)
        if request.top_k:
            extra["top_k"] = request.top_k
        answer = self._call(
            self._client.completions.create,
            prompt=np.asarray(request.prompt_ids).tolist(),
            max_tokens=request.max_new_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            logprobs=1,
            extra_body=extra,
            **({"stop": list(request.stops)} if request.stops else {}),
        )
        choice = self._choice(answer)
        finish = _finish(choice)
        ids = np.asarray(getattr(choice, "token_ids", None) or (), np.int32)
        log_probs = _NO_LOG_PROBS
        told = getattr(choice.logprobs, "token_logprobs", None) if choice.logprobs else None
        by_id = len(ids) > 0 and int(ids[-1]) in stops
        by_text = tokens_to_stop(self.decode, ids, request.stops) == len(ids)
        ended = finish == "length" or by_id or by_text
        if told and len(told) == len(ids) and ended and self._comparable(request.temperature):
            log_probs = np.asarray(told, np.float32)
        shown = ids[:-1] if finish == "stop" and by_id else ids
        text = self.decode(shown) if len(ids) else str(choice.text)
        return Completion(ids, log_probs, text, finish, self.version)

    def _by_chat(self, request: GenerateRequest) -> Completion:
        answer = self._call(
            self._client.chat.completions.create,
            messages=[dict(message) for message in self._bytes.messages(request.prompt_ids)],
            max_tokens=request.max_new_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            **({"stop": list(request.stops)} if request.stops else {}),
            **({"extra_body": {"top_k": request.top_k}} if request.top_k else {}),
        )
        choice = self._choice(answer)
        text = str(choice.message.content or "")
        return Completion(_NO_IDS, _NO_LOG_PROBS, text, _finish(choice), self.version)

    def _prompt_log_probs(self, ids: list[int]) -> LogProbs:
        answer = self._call(
            self._client.completions.create,
            prompt=ids,
            max_tokens=1,
            temperature=0.0,
            extra_body={"prompt_logprobs": 0, "add_special_tokens": False},
        )
        told: Any = getattr(self._choice(answer), "prompt_logprobs", None)
        try:
            return np.array(
                [0.0, *(told[i][str(ids[i])]["logprob"] for i in range(1, len(ids)))], np.float32
            )
        except (TypeError, LookupError) as error:
            raise ModelError(
                f"{self._settings.url} gave no log-probs of the prompt's tokens. Serve "
                f"{self.name} with vLLM, or load its folder as a local model"
            ) from error

    def _call(self, create: Any, **arguments: Any) -> Any:
        settings = self._settings
        try:
            return create(model=settings.model, **arguments)
        except self._openai.APIStatusError as error:
            raise ModelError(
                f"{settings.url} refused a request for `{settings.model}` with status "
                f"{error.status_code}: {error.message[:300]}. See what it serves: "
                f"curl {settings.url}/models"
            ) from error
        except self._openai.APITimeoutError as error:
            raise ModelError(
                f"{settings.url} did not answer within {settings.timeout:g} s, "
                f"{settings.retries + 1} times. Raise `timeout` in the spec, or ask for fewer "
                "tokens"
            ) from error
        except self._openai.APIConnectionError as error:
            raise ModelError(
                f"No connection to {settings.url}, tried {settings.retries + 1} times. Is the "
                f"server up? Try: curl {settings.url}/models"
            ) from error
        except self._openai.OpenAIError as error:
            raise ModelError(f"{settings.url} answered what cannot be read: {error}") from error

    def _choice(self, answer: Any) -> Any:
        choices = getattr(answer, "choices", None)
        if not choices:
            raise ModelError(
                f"{self._settings.url} answered without a completion. Is it an OpenAI-compatible "
                f"API? Try: curl {self._settings.url}/models"
            )
        return choices[0]

    def _comparable(self, temperature: float) -> bool:
        """Return whether the server's log-probs are those that the contract asks for."""
        if self._settings.log_probs == "raw":
            return temperature in (0.0, 1.0)
        return temperature > 0


def _finish(choice: Any) -> Finish:
    return "length" if choice.finish_reason == "length" else "stop"
