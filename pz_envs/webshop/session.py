"""One shopper's way through the shop: the original server's page logic, without a server.

The state is small and plain (page kind, query, product, options), and every page is rebuilt from
it, so saving it saves the episode. Which page a click leads to depends on the current URL exactly
as in the original, substring tests included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pz_envs.webshop.goals import Goal
from pz_envs.webshop.pages import (
    BACK_TO_SEARCH,
    BUY,
    NEXT,
    PER_PAGE,
    PREVIOUS,
    SUB_PAGES,
    Page,
    done_page,
    index_page,
    item_page,
    results_page,
    sub_page,
)
from pz_envs.webshop.reward import Verdict, score_purchase
from pz_envs.webshop.store import Shop

BASE_URL = "http://127.0.0.1:3000"

_ACTION = re.compile(r"(.+)\[(.+)\]")
_BY_LOWER = {sub.lower(): sub for sub in SUB_PAGES}


@dataclass(slots=True)
class _State:
    """Where a shopper is; ``kind`` is index, results, item, sub or done."""

    kind: str = "index"
    url: str = ""
    keywords: list[str] = field(default_factory=list)
    page: int = 1
    asin: str = ""
    visited: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    sub: str = ""
    reward: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """What an action did: whether anything happened, and the verdict of a purchase."""

    valid: bool
    verdict: Verdict | None = None


class Session:
    """A shopper with one goal in one shop.

    Args:
        shop: where to shop.
        goal: what to buy.
        name: the session's name in URLs; the original uses the goal's index.
        prices: ASIN to purchase price in dollars.
        show_attributes: whether product pages have the Attributes sub-page.
    """

    def __init__(
        self,
        shop: Shop,
        goal: Goal,
        name: str,
        prices: Mapping[str, float],
        *,
        show_attributes: bool = False,
    ) -> None:
        self._shop = shop
        self._goal = goal
        self._name = name
        self._prices = prices
        self._show_attributes = show_attributes
        self.restart()

    def restart(self) -> None:
        """Go back to the beginning: the search bar, nothing looked at, nothing chosen."""
        self._state = _State(url=f"{BASE_URL}/{self._name}")
        self._page = self._build()

    @property
    def page(self) -> Page:
        """The current page."""
        return self._page

    @property
    def url(self) -> str:
        """The current address."""
        return self._state.url

    @property
    def kind(self) -> str:
        """Which page this is: index, results, item, sub or done."""
        return self._state.kind

    @property
    def query(self) -> str:
        """The last query, or an empty string."""
        return " ".join(self._state.keywords)

    @property
    def page_number(self) -> int:
        """The page of search results that was looked at last, from 1."""
        return self._state.page

    @property
    def asin(self) -> str:
        """The product looked at, or an empty string."""
        return self._state.asin

    @property
    def options(self) -> Mapping[str, str]:
        """The options chosen so far, by name."""
        return self._state.options

    @property
    def visited(self) -> frozenset[str]:
        """The ASINs opened since the last return to the search bar."""
        return frozenset(self._state.visited)

    def act(self, action: str) -> Step:
        """Apply ``search[...]`` or ``click[...]``; anything else changes nothing."""
        match = _ACTION.match(action)
        if match is None:
            return Step(valid=False)
        name, argument = match[1], match[2].lower()
        if name == "search":
            self._search(argument.split(" "), 1)
        elif name == "click" and argument != "search" and argument in self._page.clickables:
            verdict = self._click(argument)
            if verdict is not None:
                self._page = self._build()
                return Step(valid=True, verdict=verdict)
        else:
            return Step(valid=False)
        self._page = self._build()
        return Step(valid=True)

    def save(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return asdict(self._state)

    def load(self, data: Mapping[str, Any]) -> None:
        """Take up a saved state."""
        self._state = _State(**data)
        self._page = self._build()

    def _click(self, name: str) -> Verdict | None:
        state = self._state
        where = _place(state.url)
        if name == BUY.lower():
            return self._buy()
        if name == BACK_TO_SEARCH.lower():
            self._state = _State(url=f"{BASE_URL}/{self._name}")
        elif name == NEXT.lower() and where == "search_results":
            self._search(state.keywords, state.page + 1)
        elif name == PREVIOUS.lower() and where == "search_results":
            self._search(state.keywords, state.page - 1)
        elif name == PREVIOUS.lower() and where == "item_page":
            self._search(state.keywords, state.page)
        elif name in _BY_LOWER and not (name == PREVIOUS.lower() and where == "item_sub_page"):
            self._open_sub_page(_BY_LOWER[name])
        else:
            self._open_item(name)
        return None

    def _search(self, keywords: list[str], page: int) -> None:
        state = self._state
        state.kind, state.keywords, state.page = "results", keywords, page
        state.asin, state.options = "", {}
        state.url = f"{BASE_URL}/search_results/{self._name}/{'+'.join(keywords)}/{page}"

    def _open_item(self, name: str) -> None:
        state = self._state
        what = self._page.clickables[name]
        if what == "link":
            upper = name.upper()
            state.asin = upper if upper in self._shop.products else self._shown_asin(name)
            if state.asin not in state.visited:
                state.visited.append(state.asin)
        elif what.startswith(":"):
            state.options[what[1:]] = name
        state.kind = "item"
        state.url = self._item_url("item_page", json.dumps(state.options))

    def _open_sub_page(self, sub: str) -> None:
        state = self._state
        state.kind, state.sub = "sub", sub
        state.url = self._item_url("item_sub_page", f"{sub}/{state.options}")

    def _buy(self) -> Verdict:
        state = self._state
        product = self._shop.products[state.asin]
        price = self._prices[state.asin]
        verdict = score_purchase(product, self._goal, price, state.options)
        state.kind, state.reward = "done", verdict.reward
        state.url = f"{BASE_URL}/done/{self._name}/{state.asin}/{state.options}"
        return verdict

    def _item_url(self, place: str, tail: str) -> str:
        state = self._state
        query = "+".join(state.keywords)
        return f"{BASE_URL}/{place}/{self._name}/{state.asin}/{query}/{state.page}/{tail}"

    def _shown_asin(self, name: str) -> str:
        """Return the ASIN as shown, for one that is not upper-case (the original fails there)."""
        links = (text for kind, text in self._page.nodes if kind == "link")
        return next(text for text in links if text.lower() == name)

    def _build(self) -> Page:
        state = self._state
        text = self._goal.instruction_text
        match state.kind:
            case "index":
                return index_page(text)
            case "results":
                found = self._shop.search(" ".join(state.keywords))
                shown = found[(state.page - 1) * PER_PAGE : state.page * PER_PAGE]
                products = [self._shop.products[asin] for asin in shown]
                return results_page(text, products, state.page, len(found))
            case "item":
                product = self._shop.products[state.asin]
                return item_page(text, product, show_attributes=self._show_attributes)
            case "sub":
                return sub_page(text, self._shop.products[state.asin], state.sub)
            case _:
                return done_page(state.asin, state.options, state.reward)


def _place(url: str) -> str:
    """Return the kind of page a URL is for, found as the original finds it."""
    places = ("search_results", "item_page", "item_sub_page", "done")
    return next((place for place in places if place in url), "")
