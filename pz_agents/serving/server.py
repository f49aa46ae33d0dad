"""An OpenAI-compatible server over any ``LanguageModel``, on the standard library's threads.

``/v1/chat/completions`` and ``/v1/completions``, streamed or whole, ``/v1/models`` and ``/health``.
Requests that arrive together share a batch of the model, and with vLLM those that come while others
are answered join them. Tokens go in and out as they are:
see ``api``. It listens on loopback unless it is told otherwise. A stream is sent when the answer is
done, in one part a choice. With ``sessions``, a request belongs to whoever its API key (or the
``/s/KEY/`` before its path) names, and everything served is told to that session.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pz_agents.errors import ModelError
from pz_agents.models.protocol import Completion, GenerateRequest, LanguageModel
from pz_agents.sdk.types import Ids, LogProbs
from pz_agents.serving import api
from pz_agents.serving.api import ApiError, Call, Memory
from pz_envs.errors import InfraError

LOOPBACK = "127.0.0.1"

_BODY_BYTES = 64 << 20
_BATCH = 256
_LINGER_SECONDS = 0.002

_logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Session:
    """Somebody whose requests are kept apart.

    memory: of this session's conversations.
    next_seed: gives the seed of a request that has none.
    record: told every choice that was served.
    """

    memory: Memory = field(default_factory=Memory)
    next_seed: Callable[[], int] = field(default=lambda: secrets.randbits(63))
    record: Callable[[Sequence[Call]], None] = field(default=lambda calls: None)


class ModelServer:
    """Serves ``model`` until it is closed; requests may come as soon as it is made.

    Args:
        model: what answers.
        host: where to listen; whoever can reach it can use the model.
        port: 0 takes a free one.
        key: the API key that is demanded; None demands none.
        sessions: by key, instead of ``key``: only their requests are answered. The mapping may
            change while the server runs.

    Raises:
        ModelError: the port is taken.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        host: str = LOOPBACK,
        port: int = 0,
        key: str | None = None,
        sessions: dict[str, Session] | None = None,
    ) -> None:
        self._batcher = _Batcher(model)
        handler = type("Handler", (_Handler,), {"site": _Site(model, self._batcher, key, sessions)})
        try:
            self._http = _Http((host, port), handler)
        except OSError as error:
            self._batcher.close()
            raise ModelError(
                f"cannot listen on {host}:{port}: {error}. Take another --port; 0 is a free one"
            ) from error
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True, name="serve")
        self._thread.start()
        self.root = f"http://{host}:{self._http.server_port}"

    @property
    def url(self) -> str:
        """What to set ``OPENAI_BASE_URL`` to."""
        return f"{self.root}/v1"

    def __enter__(self) -> ModelServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; requests under way get no answer."""
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
        self._batcher.close()


class _Http(ThreadingHTTPServer):
    """Ends the connections that clients keep open, too, when it is closed."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Batcher:
    """One thread that asks the model, for all that waits at once.

    A model with ``shares_batches`` is asked by each request's own thread instead.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._shares = getattr(model, "shares_batches", False)
        self._waiting: queue.SimpleQueue[tuple[GenerateRequest, Future[Completion]] | None] = (
            queue.SimpleQueue()
        )
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="batches")
        self._thread.start()

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Return the completions of ``requests``, sampled beside those of other threads."""
        if self._shares:
            return self._model.generate(requests)
        if self._closed:
            raise InfraError("the server is closing")
        futures: list[Future[Completion]] = [Future() for _ in requests]
        for pair in zip(requests, futures, strict=True):
            self._waiting.put(pair)
        return [future.result() for future in futures]

    def score(self, prefix: Ids, candidate: Ids) -> LogProbs:
        """Return the log-probs of ``candidate`` after ``prefix``, in no batch of ``generate``'s."""
        with contextlib.nullcontext() if self._shares else self._lock:
            return self._model.score(prefix, [candidate])[0]

    def close(self) -> None:
        """End the thread after its present batch."""
        self._closed = True
        self._waiting.put(None)
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch = [first]
            while len(batch) < _BATCH:
                try:
                    following = self._waiting.get(timeout=_LINGER_SECONDS)
                except queue.Empty:
                    break
                if following is None:
                    self._waiting.put(None)
                    break
                batch.append(following)
            self._answer(batch)

    def _answer(self, batch: list[tuple[GenerateRequest, Future[Completion]]]) -> None:
        try:
            with self._lock:
                completions = self._model.generate([request for request, _ in batch])
        except Exception as error:  # the waiting thread raises it, and answers with a status
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for pair in batch:  # one request may have spoilt the others' batch
                self._answer([pair])
            return
        for (_, future), completion in zip(batch, completions, strict=True):
            future.set_result(completion)


class _Site:
    """What all requests share."""

    def __init__(
        self,
        model: LanguageModel,
        batcher: _Batcher,
        key: str | None,
        sessions: dict[str, Session] | None,
    ) -> None:
        self.model = model
        self._batcher = batcher
        self._key = key
        self._sessions = sessions
        self._everybody = Session()

    def session(self, key: str) -> Session:
        """Return whose request it is that came with ``key``."""
        if self._sessions is None:
            if self._key is not None and not secrets.compare_digest(
                key.encode(), self._key.encode()
            ):
                raise ApiError("Wrong or no API key", status=401, code="invalid_api_key")
            return self._everybody
        session = self._sessions.get(key)
        if session is None:
            raise ApiError(
                "No session has this API key; an episode's key is valid while it is played",
                status=401,
                code="invalid_api_key",
            )
        return session

    def answer(
        self, session: Session, kind: api.Kind, body: Any
    ) -> tuple[api.Asked, dict[str, Any]]:
        """Return what was asked for and the whole answer."""
        if not isinstance(body, dict):
            raise ApiError("the body must be a JSON object")
        self._check_name(body.get("model"))
        model = self.model
        try:
            asked = api.parse(kind, body, model, session.memory, session.next_seed())
            completions = [
                api.cut(completion, asked.stops, model)
                for completion in self._batcher.generate(asked.requests)
            ]
            scored = []
            if asked.prompt_log_probs:
                prompts = [request.prompt_ids for request in asked.requests]
                scored = [self._batcher.score(ids[:1], ids[1:]) for ids in prompts]
        except InfraError as error:
            raise ApiError(str(error), status=503) from error
        except ModelError as error:
            raise ApiError(str(error), status=500) from error
        calls = [
            Call(kind, request.prompt_ids, completion, request.temperature, asked.messages)
            for request, completion in zip(asked.requests, completions, strict=True)
        ]
        if kind == "chat":
            for call in calls:
                session.memory.add(model, call)
        session.record(calls)
        return asked, api.answer(asked, completions, model, scored)

    def models(self) -> dict[str, Any]:
        """Return what ``/v1/models`` says."""
        card = {"id": self.model.name, "object": "model", "created": 0, "owned_by": "pz"}
        return {"object": "list", "data": [{**card, "max_model_len": self.model.max_context}]}

    def _check_name(self, name: Any) -> None:
        if name not in (None, "", "default", self.model.name):
            raise ApiError(
                f"The model `{name}` does not exist here; this server has `{self.model.name}`",
                status=404,
                param="model",
                code="model_not_found",
            )


class _Handler(BaseHTTPRequestHandler):
    """One connection; ``site`` is set by the server."""

    site: _Site
    protocol_version = "HTTP/1.1"
    server_version = "pz"
    timeout = 600
    # One packet an answer: with head and body apart, a client waits 40 ms for the second.
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self) -> None:
        """Answer ``/v1/models`` and ``/health``."""

        def respond(path: str, key: str) -> None:
            if path == "/health":
                self._send(200, {"status": "ok", "version": self.site.model.version})
            elif path in ("/v1/models", "/models"):
                self.site.session(key)
                self._send(200, self.site.models())
            else:
                raise self._no_page(path)

        self._guard(respond)

    def do_POST(self) -> None:
        """Answer ``/v1/chat/completions`` and ``/v1/completions``."""

        def respond(path: str, key: str) -> None:
            body = self._body()
            kinds: dict[str, api.Kind] = {"/chat/completions": "chat", "/completions": "text"}
            kind = kinds.get(path.removeprefix("/v1"))
            if kind is None:
                raise self._no_page(path)
            asked, whole = self.site.answer(self.site.session(key), kind, body)
            if asked.stream:
                self._stream(api.chunks(asked, whole))
            else:
                self._send(200, whole)

        self._guard(respond)

    def _guard(self, respond: Callable[[str, str], None]) -> None:
        """Call ``respond(path, key)``; whatever goes wrong becomes an answer."""
        path = self.path.partition("?")[0]
        key = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if path.startswith("/s/"):
            key, _, rest = path.removeprefix("/s/").partition("/")
            path = f"/{rest}"
        try:
            respond(path, key)
        except ApiError as error:
            self._send(error.status, error.body)
        except (TimeoutError, BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        except Exception:  # the process boundary of a request: the server lives on
            _logger.exception("a request for %s failed", path)
            self._send(500, ApiError("the server failed; see its log", status=500).body)

    def _body(self) -> Any:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            self.close_connection = True
            raise ApiError("a Content-Length is needed", status=411) from None
        if length > _BODY_BYTES:
            self.close_connection = True
            raise ApiError(f"the body is over {_BODY_BYTES} bytes", status=413)
        try:
            return json.loads(self.rfile.read(length))
        except ValueError as error:
            raise ApiError(f"the body is not JSON: {error}") from None

    def _no_page(self, path: str) -> ApiError:
        return ApiError(
            f"Nothing at {self.command} {path}. There are /v1/chat/completions, /v1/completions "
            "and /v1/models",
            status=404,
        )

    def _send(self, status: int, answer: Any) -> None:
        payload = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def _stream(self, parts: Sequence[Any]) -> None:
        lines = [f"data: {json.dumps(part)}\n\n" for part in parts]
        payload = "".join([*lines, "data: [DONE]\n\n"]).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: Any) -> None:
        """Send the server's log where all logs go."""
        _logger.debug(format, *args)
