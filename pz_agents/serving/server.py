"""An OpenAI-compatible server over any ``LanguageModel``, on the standard library's threads.

``/v1/chat/completions`` and ``/v1/completions``, streamed or whole, ``/v1/models`` and ``/health``.
Requests that arrive together share a batch of the model, and with vLLM those that come while others
are answered join them. Tokens go in and out as they are:
see ``api``. It listens on loopback unless it is told otherwise. A stream is sent when the answer is
done, in one part a choice. A client that leaves ends its requests where the model can do that
(``generate_async``: vLLM). With ``sessions``, a request belongs to whoever its API key (or the
``/s/KEY/`` before its path) names, and everything served is told to that session.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import socket
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NoReturn, TypeVar
from urllib.parse import unquote

from pz_agents.errors import ModelError
from pz_agents.models.protocol import Completion, GenerateRequest, LanguageModel
from pz_agents.models.sharing import Batcher
from pz_agents.serving import api
from pz_agents.serving.api import ApiError, Call, Memory
from pz_agents.serving.fields import Kind
from pz_envs.errors import InfraError

LOOPBACK = "127.0.0.1"

_BODY_BYTES = 64 << 20
_KINDS: dict[str, Kind] = {"/chat/completions": "chat", "/completions": "text"}

T = TypeVar("T")

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
        self._batcher = Batcher(model)
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


class _Site:
    """What all requests share."""

    def __init__(
        self,
        model: LanguageModel,
        batcher: Batcher,
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
        self, session: Session, kind: Kind, body: Any, client: socket.socket
    ) -> tuple[api.Asked, dict[str, Any]]:
        """Return what was asked for and the whole answer.

        Raises:
            ApiError: the request is refused, or the model failed.
            ConnectionResetError: ``client`` has gone, and its requests are no longer answered.
        """
        if not isinstance(body, dict):
            raise ApiError("the body must be a JSON object")
        self._check_name(body.get("model"))
        model = self.model
        try:
            asked = api.parse(kind, body, model, session.memory, session.next_seed())
            completions = [
                api.cut(completion, asked.stops, model)
                for completion in self._generate(asked.requests, client)
            ]
            scored = []
            if asked.prompt_log_probs:
                prompts = [request.prompt_ids for request in asked.requests]
                scored = [self._batcher.score(ids[:1], [ids[1:]])[0] for ids in prompts]
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

    def _generate(
        self, requests: Sequence[GenerateRequest], client: socket.socket
    ) -> Sequence[Completion]:
        ask = getattr(self.model, "generate_async", None)
        if ask is None:
            return self._batcher.generate(requests)
        completions: Sequence[Completion] = asyncio.run(_while_there(ask(requests), client))
        return completions

    def models(self) -> dict[str, Any]:
        """Return what ``/v1/models`` says."""
        return {"object": "list", "data": [self.card("default")]}

    def card(self, name: str) -> dict[str, Any]:
        """Return what ``/v1/models/NAME`` says."""
        self._check_name(name)
        card = {"id": self.model.name, "object": "model", "created": 0, "owned_by": "pz"}
        return {**card, "max_model_len": self.model.max_context}

    def _check_name(self, name: Any) -> None:
        if name not in (None, "", "default", self.model.name):
            raise ApiError(
                f"The model `{name}` does not exist here; this server has `{self.model.name}`",
                status=404,
                param="model",
                code="model_not_found",
            )


async def _while_there(work: Coroutine[Any, Any, T], client: socket.socket) -> T:
    """Return what ``work`` does, and cancel it when ``client`` closes its connection.

    Raises:
        ConnectionResetError: it did.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)

    def look() -> None:
        try:
            gone = not client.recv(1, socket.MSG_PEEK)
        except OSError:
            gone = True
        loop.remove_reader(client)  # what is there to read is its next request
        if gone:
            task.cancel()

    loop.add_reader(client, look)
    try:
        return await task
    except asyncio.CancelledError:
        raise ConnectionResetError("the client has gone") from None
    finally:
        loop.remove_reader(client)


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
        """Answer ``/v1/models``, ``/v1/models/NAME`` and ``/health``; HEAD without a body."""
        self._guard(self._get)

    def do_POST(self) -> None:
        """Answer ``/v1/chat/completions`` and ``/v1/completions``."""
        self._guard(self._post)

    def do_PUT(self) -> None:
        """Refuse, as every other method."""
        self.close_connection = True  # its body is not read
        self._guard(self._no_page)

    do_HEAD = do_GET
    do_DELETE = do_OPTIONS = do_PATCH = do_PUT

    def _get(self, path: str, key: str) -> None:
        page = path.removeprefix("/v1")
        if path == "/health":
            self._send(200, {"status": "ok", "version": self.site.model.version})
            return
        if page != "/models" and not page.startswith("/models/"):
            self._no_page(path, key)
        self.site.session(key)
        name = unquote(page.removeprefix("/models").removeprefix("/"))
        self._send(200, self.site.card(name) if name else self.site.models())

    def _post(self, path: str, key: str) -> None:
        body = self._body()
        kind = _KINDS.get(path.removeprefix("/v1"))
        if kind is None:
            self._no_page(path, key)
        session = self.site.session(key)
        asked, whole = self.site.answer(session, kind, body, self.connection)
        if asked.stream:
            self._stream(api.chunks(asked, whole))
        else:
            self._send(200, whole)

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
            self._send(error.status, error.body, error.allow)
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
        if length < 0:
            self.close_connection = True
            raise ApiError(f"a Content-Length cannot be {length}")
        if length > _BODY_BYTES:
            self.close_connection = True
            raise ApiError(f"the body is over {_BODY_BYTES} bytes", status=413)
        try:
            return json.loads(self.rfile.read(length))
        except ValueError as error:
            raise ApiError(f"the body is not JSON: {error}") from None

    def _no_page(self, path: str, key: str) -> NoReturn:
        page = path.removeprefix("/v1")
        listed = path == "/health" or page == "/models" or page.startswith("/models/")
        if listed or page in _KINDS:
            allow = "GET, HEAD" if listed else "POST"
            raise ApiError(f"{path} takes {allow}, not {self.command}", status=405, allow=allow)
        raise ApiError(
            f"Nothing at {self.command} {path}. There are /v1/chat/completions, /v1/completions, "
            "/v1/models and /health",
            status=404,
        )

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Tell what the HTTP layer refuses in OpenAI's shape too."""
        self.close_connection = True
        self._send(code, ApiError(message or HTTPStatus(code).phrase, status=code).body)

    def _send(self, status: int, answer: Any, allow: str = "") -> None:
        payload = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        if allow:
            self.send_header("Allow", allow)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
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
