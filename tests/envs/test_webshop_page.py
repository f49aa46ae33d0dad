from __future__ import annotations

import http.client
import re
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from pz_envs.errors import InfraError
from pz_envs.webshop.env import WebShopEnv
from pz_envs.webshop.page import ShopServer, page_html
from pz_envs.webshop.session import Session
from pz_envs.webshop.store import open_shop


class _Page(HTMLParser):
    """What a browser would hold of a page: hooks, the buttons' actions, every tag and link."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.instruction = ""
        self.has_search_input = False
        self.buttons: dict[str, str] = {}
        self.products: list[str] = []
        self.pressed: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self._open: dict[str, str | None] = {}
        self.feed(text)
        self.text = re.sub(r"<[^>]*>", " ", text.partition("<body>")[2])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = dict(attrs)
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("href", "src") and value]
        self.has_search_input |= self._open.get("id") == "search_input"

    def handle_endtag(self, tag: str) -> None:
        self._open = {}

    def handle_data(self, data: str) -> None:
        if self._open.get("id") == "instruction-text":
            self.instruction = data
        if self._open.get("name") == "action":
            self.buttons[data] = str(self._open["value"])
            if self._open.get("class") == "product-link":
                self.products.append(data)
            if self._open.get("aria-pressed") == "true":
                self.pressed.append(data)


class _Browser:
    def __init__(self, port: int) -> None:
        self._port = port
        self.place = ""

    def ask(self, method: str, path: str, body: str = "", **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            place = answer.getheader("Location")
            text = answer.read().decode()
        finally:
            connection.close()
        if place is not None:
            self.place = place
        return answer.status, text

    def open(self, path: str) -> _Page:
        status, text = self.ask("GET", path)
        if status == 303:
            status, text = self.ask("GET", self.place)
        else:
            self.place = path
        assert status == 200
        return _Page(text)

    def send(self, **fields: str) -> _Page:
        status, text = self.ask("POST", self.place, urllib.parse.urlencode(fields))
        return _Page(text) if status == 200 else self.open(self.place)


@pytest.fixture(scope="module")
def browser() -> Iterator[_Browser]:
    with ShopServer(source="builtin") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield _Browser(server.server_port)
        finally:
            server.shutdown()
            thread.join(60)


def test_a_person_buys_what_the_oracle_buys_by_clicking(browser: _Browser) -> None:
    env = WebShopEnv(split="all")
    env.reset(options={"index": 3})
    page = browser.open("/fixed_3")
    assert page.instruction == env._goal.instruction_text
    reward = 0.0
    while (action := env.expert_action()) is not None:
        reward = env.step(action)[1]
        if action.startswith("search["):
            assert page.has_search_input
            page = browser.send(query=action[7:-1])
            assert len(page.products) == 10
        else:
            assert action in page.buttons.values()
            page = browser.send(action=action)
    assert reward == 1.0
    assert "Your score (min 0.0, max 1.0)" in page.text
    assert " 1.0 " in page.text.replace("\n", " ")
    assert "Start over" in page.buttons
    assert browser.send(action="restart").has_search_input


def test_chosen_options_are_shown_and_stale_buttons_refused(browser: _Browser) -> None:
    browser.open("/fixed_5")
    shop = open_shop("builtin", None)
    goal = shop.goals("human", 0)[0][5]
    product = shop.products[goal.asin]
    browser.send(query=product.title)
    browser.send(action=f"click[{goal.asin.lower()}]")
    value = next(iter(product.options.values()))[0]
    assert browser.send(action=f"click[{value}]").pressed == [value]
    refused = browser.send(action="click[next >]")
    assert "not on this page" in refused.text
    assert refused.pressed == [value]
    assert "not on this page" in browser.send(action="nonsense").text
    assert not browser.send(action="click[back to search]").products


def test_the_front_door_gives_everyone_a_session_of_their_own(browser: _Browser) -> None:
    browser.open("/")
    first = browser.place
    browser.open("/")
    assert first != browser.place
    browser.send(query="mug")
    assert browser.open(first).has_search_input


def test_pages_fetch_nothing_and_run_nothing(browser: _Browser) -> None:
    for page in (browser.open("/fixed_0"), browser.send(query="red")):
        assert not page.tags & {"script", "img", "link", "iframe"}
        assert all(link.startswith("/") for link in page.links)


def test_hostile_texts_are_shown_as_text() -> None:
    shop = open_shop("builtin", 50)
    goals, prices = shop.goals("human", 0)
    text = '<script>alert("x")</script>" onclick=\'y\''
    session = Session(shop, replace(goals[0], instruction_text=text), "0", prices)
    page = page_html(session, "fixed_0", notice=text)
    assert "<script" not in page
    assert _Page(page).instruction == text


def test_other_sites_other_paths_and_floods_are_refused(browser: _Browser) -> None:
    assert browser.ask("GET", "/fixed_0", Host="evil.example:80")[0] == 403
    assert browser.ask("POST", "/fixed_0", "query=x", Origin="http://evil.example")[0] == 403
    for path in ("/fixed_10000", "/fixed_x", "/nobody", "/../etc/passwd", "/" + "0" * 16):
        assert browser.ask("GET", path)[0] == 404
        assert browser.ask("POST", path, "query=x")[0] == 404
    assert browser.ask("POST", "/fixed_0", Content_Length="70000")[0] == 413
    assert browser.open("/fixed_0").instruction


def test_a_taken_port_is_named() -> None:
    with ShopServer(source="builtin") as server:
        port = server.server_port
        with pytest.raises(InfraError, match=rf"127\.0\.0\.1:{port}"):
            ShopServer(port, source="builtin")
