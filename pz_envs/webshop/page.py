"""The shop for a person: pages in a browser over the same session that agents step through.

A server on the loopback address only, without scripts and without anything fetched from elsewhere.
Every button is a form that sends the action an agent would send; what is shown is the session's
own list of nodes. ``/`` begins with a goal of the split, ``/fixed_<i>`` with goal ``i``. The hooks
that agents of the original's pages parse are kept: ``#search_input``, ``.btn``, ``.product-link``
and ``#instruction-text``.
"""

from __future__ import annotations

import html
import random
import re
import secrets
import threading
import urllib.parse
from collections import OrderedDict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pz_envs.errors import InfraError
from pz_envs.webshop.goals import GoalKind, Split, split_range
from pz_envs.webshop.pages import Node
from pz_envs.webshop.session import Session
from pz_envs.webshop.store import open_shop

ADDRESS = "127.0.0.1"
"""The only address the pages are served on."""

_MOST_SESSIONS = 256
_LONGEST_BODY = 65_536
_NAME = re.compile(r"/(fixed_(\d{1,9})|[0-9a-f]{16})\Z")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'"
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#222}
form{display:inline}button{font:inherit;cursor:pointer;margin:.15rem .3rem .15rem 0}
.btn{padding:.25rem .8rem;border:1px solid #777;border-radius:.3rem;background:#f4f4f4}
.btn[aria-pressed=true]{background:#225;color:#fff}
.product-link{border:0;background:none;color:#06c;padding:0;text-decoration:underline}
#instruction-text{padding:.6rem .9rem;background:#fff6d8;border-radius:.3rem}
#search_input{font:inherit;width:60%;padding:.25rem}.notice{color:#a00}p{margin:.35rem 0}
"""


class Storefront:
    """The sessions of everyone who looks in, the last few hundred of them.

    Args:
        source: as for ``open_shop``.
        goals: the kind of goals.
        split: the goals that ``/`` chooses among.
        seed: decides that choice.
        price_seed: as for the environment.
    """

    def __init__(
        self, source: str, goals: GoalKind, split: Split, seed: int, price_seed: int
    ) -> None:
        self._shop = open_shop(source, None)
        self._goals, self._prices = self._shop.goals(goals, price_seed)
        self._range = split_range(split, len(self._goals))
        self._rng = random.Random(seed)
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self) -> str:
        """Begin a session with a goal of the split; return its name."""
        with self._lock:
            name = secrets.token_hex(8)
            self._open(name, self._rng.choice(self._range))
            return name

    def show(self, name: str, index: int | None) -> str | None:
        """Return a session's page, beginning ``fixed`` ones; None when there is no such session."""
        with self._lock:
            session = self._find(name, index)
            return None if session is None else page_html(session, name)

    def act(self, name: str, index: int | None, action: str) -> str | None:
        """Apply an action; return a refusal as a page, an empty text when all is well."""
        with self._lock:
            session = self._find(name, index)
            if session is None:
                return None
            if action == "restart":
                session.restart()
                return ""
            if session.kind != "done" and session.act(action).valid:
                return ""
            return page_html(session, name, notice="That is not on this page (any more).")

    def _find(self, name: str, index: int | None) -> Session | None:
        if name not in self._sessions and index is not None and index < len(self._goals):
            self._open(name, index)
        if name in self._sessions:
            self._sessions.move_to_end(name)
        return self._sessions.get(name)

    def _open(self, name: str, index: int) -> None:
        self._sessions[name] = Session(self._shop, self._goals[index], str(index), self._prices)
        while len(self._sessions) > _MOST_SESSIONS:
            self._sessions.popitem(last=False)


class ShopServer(ThreadingHTTPServer):
    """Serves a storefront on ``ADDRESS``; use as a context manager around ``serve_forever``.

    Args:
        port: where; 0 for any free one, which is then ``server_port``.
        source: as for ``open_shop``.
        goals: the kind of goals.
        split: the goals that ``/`` chooses among.
        seed: decides that choice.
        price_seed: as for the environment.

    Raises:
        InfraError: the port is taken.
    """

    daemon_threads = True

    def __init__(
        self,
        port: int = 0,
        *,
        source: str = "builtin",
        goals: GoalKind = "human",
        split: Split = "train",
        seed: int = 0,
        price_seed: int = 0,
    ) -> None:
        self.storefront = Storefront(source, goals, split, seed, price_seed)
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise InfraError(
                f"cannot serve on {ADDRESS}:{port} ({error.strerror}); choose another port, or 0 "
                "for any free one"
            ) from error


class _Handler(BaseHTTPRequestHandler):
    """GET shows a page, POST applies an action and sends the browser back to the page."""

    server: ShopServer
    timeout = 60

    def do_GET(self) -> None:
        if not self._is_ours():
            return self._refuse(HTTPStatus.FORBIDDEN)
        if self.path == "/":
            return self._redirect(f"/{self.server.storefront.begin()}")
        match = _NAME.match(self.path)
        page = match and self.server.storefront.show(match[1], _index(match))
        return self._send(page) if page else self._refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        if not self._is_ours():
            return self._refuse(HTTPStatus.FORBIDDEN)
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _LONGEST_BODY:
            return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        body = self.rfile.read(int(length)).decode("utf-8", "replace")
        fields = dict(urllib.parse.parse_qsl(body, keep_blank_values=True))
        action = fields.get("action") or f"search[{fields.get('query', '')}]"
        match = _NAME.match(self.path)
        page = match and self.server.storefront.act(match[1], _index(match), action)
        if match is None or page is None:
            return self._refuse(HTTPStatus.NOT_FOUND)
        return self._send(page) if page else self._redirect(self.path)

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent: the terminal belongs to the command that serves."""

    def _is_ours(self) -> bool:
        """Return whether the request names this server: another site's name must not reach it."""
        port = self.server.server_port
        names = {f"{ADDRESS}:{port}", f"localhost:{port}"}
        origin = self.headers.get("Origin")
        return self.headers.get("Host") in names and (
            origin is None or origin.removeprefix("http://") in names
        )

    def _send(self, page: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        data = page.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(data)

    def _redirect(self, place: str) -> None:
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", place)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True
        self._send(_document(f'<p>{status.phrase}.</p><p><a href="/">Go shopping</a></p>'), status)


def page_html(session: Session, name: str, notice: str = "") -> str:
    """Return a session's current page as a whole HTML document, every text escaped."""
    parts = [f'<p class="notice" role="alert">{html.escape(notice)}</p>'] if notice else []
    before = ""
    for kind, text in session.page.nodes:
        if kind == "text" and before.startswith("Instruction:"):
            parts.append(f'<p id="instruction-text">{html.escape(text)}</p>')
        elif kind == "text":
            parts.append(f"<p>{html.escape(text)}</p>")
        elif session.page.has_search_bar:
            parts.append(_search_bar(name))
        else:
            parts.append(_button(session, name, (kind, text)))
        before = text
    if session.kind == "done":
        parts.append('<p><a class="btn" href="/">Another goal</a></p>')
    parts.append(f"<hr>{_form(name, 'restart', 'Start over')}")
    return _document("\n".join(parts))


def _search_bar(name: str) -> str:
    return (
        f'<form method="post" action="/{name}"><label for="search_input">Search</label> '
        '<input id="search_input" name="query" type="text" required autofocus> '
        '<button class="btn" type="submit">Search</button></form>'
    )


def _button(session: Session, name: str, node: Node) -> str:
    kind, text = node
    action = f"click[{text.lower() if kind != 'option' else text}]"
    if kind == "link":
        return f"<p>{_form(name, action, text, style='product-link')}</p>"
    if kind == "option":
        return _form(name, action, text, pressed=text in session.options.values())
    return _form(name, action, text)


def _form(
    name: str, action: str, text: str, *, style: str = "btn", pressed: bool | None = None
) -> str:
    state = "" if pressed is None else f' aria-pressed="{str(pressed).lower()}"'
    return (
        f'<form method="post" action="/{name}"><button class="{style}"{state} name="action" '
        f'value="{html.escape(action)}">{html.escape(text)}</button></form>'
    )


def _document(body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>WebShop</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _index(match: re.Match[str]) -> int | None:
    return None if match[2] is None else int(match[2])
