"""The shop's pages as text nodes, and the three ways of showing them.

A page is what the original's templates leave when their markup is taken away: nodes in document
order, each plain text, a button, an option or a product link, and the mapping of what can be
clicked. Blank nodes follow Beautiful Soup: an empty one is absent, one that holds a newline is
dropped, any other is one space.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

from pz_envs.webshop.products import Product

ObservationMode = Literal["text_rich", "text", "url"]
NodeKind = Literal["text", "button", "option", "link"]
Node = tuple[NodeKind, str]

SUB_PAGES: tuple[str, ...] = ("Description", "Features", "Reviews", "Attributes")
BACK_TO_SEARCH = "Back to Search"
NEXT = "Next >"
PREVIOUS = "< Prev"
BUY = "Buy Now"
PER_PAGE = 10

_BLANK = " \n\t\f\r"
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "'": "\\u0027"}


@dataclass(frozen=True, slots=True)
class Page:
    """One page.

    ``clickables`` maps the text to click to what it is: ``"button"``, ``"link"``, or an option's
    name behind a colon.
    """

    nodes: tuple[Node, ...]
    clickables: Mapping[str, str]
    has_search_bar: bool = False


def index_page(instruction: str) -> Page:
    """Return the page with the search bar."""
    nodes: list[Node] = [("text", "WebShop"), ("text", "Instruction: "), ("text", instruction)]
    return _page([*nodes, ("button", "Search")], has_search_bar=True)


def results_page(instruction: str, products: Iterable[Product], page: int, total: int) -> Page:
    """Return one page of search results out of ``total``."""
    nodes = _top(instruction, [BACK_TO_SEARCH])
    nodes.append(("text", f"Page {page} (Total results: {total})"))
    if page > 1:
        nodes.append(("button", PREVIOUS))
    nodes.append(("button", NEXT))
    for product in products:
        nodes.append(("link", product.asin))
        nodes.append(("text", product.title))
        nodes.append(("text", product.price_text))
    return _page(nodes)


def item_page(instruction: str, product: Product, *, show_attributes: bool = False) -> Page:
    """Return a product's page with its options."""
    nodes = _top(instruction, [BACK_TO_SEARCH, PREVIOUS])
    for name, values in product.options.items():
        nodes.append(("text", name))
        nodes.extend(("option", value) for value in values)
    nodes.append(("text", product.title))
    nodes.append(("text", f"Price: {product.price_text}"))
    nodes.append(("text", "Rating: N.A."))
    nodes.extend(("button", sub) for sub in SUB_PAGES[: 4 if show_attributes else 3])
    nodes.append(("button", BUY))
    return _page(nodes, options=product.options)


def sub_page(instruction: str, product: Product, sub: str) -> Page:
    """Return the page behind one of ``SUB_PAGES``."""
    texts: Sequence[str] = ()
    if sub == "Description":
        texts = (product.description,)
    elif sub == "Features":
        texts = [f" {bullet}" for bullet in product.bullets]
    elif sub == "Attributes":
        attributes = [f" {attribute}" for attribute in product.attributes]
        texts = [*attributes, product.category, product.query, product.product_category]
    nodes = _top(instruction, [BACK_TO_SEARCH, PREVIOUS])
    nodes.extend(("text", text) for text in texts)
    return _page(nodes)


def done_page(asin: str, options: Mapping[str, str], reward: float) -> Page:
    """Return the page after a purchase, with the empty fields of the original's form."""
    chosen = json.dumps(options, sort_keys=True)
    for char, escape in _UNSAFE.items():
        chosen = chosen.replace(char, escape)
    before = ("Thank you for shopping with us!", "Your code: ", "None")
    form = (" (Paste it in your MTurk interface.)", "Purchased", "asin", asin, "options", chosen)
    bought = ("attrs", "None", "category", "None", "query", "None", "product category", "None")
    target = ("Target", "asin", "options", "attrs", "price upper", "instuction text", "category")
    goal = ("product category", "query", "Goal ", "None")
    score = ("Reward", "Your score (min 0.0, max 1.0)", str(reward), "Reward Details ", "None")
    return _page([("text", text) for text in (*before, *form, *bought, *target, *goal, *score)])


def render(page: Page, mode: ObservationMode, url: str, visited: Set[str]) -> str:
    """Return the observation of ``page`` at ``url``; ``visited`` are ASINs opened before."""
    if mode == "url":
        return url
    if mode == "text":
        return " [SEP] ".join(text.strip() for _, text in page.nodes)
    lines = []
    clicked = []
    for kind, text in page.nodes:
        if kind == "text":
            lines.append(text)
        elif kind == "button":
            lines.append(f"[button] {text} [button_]")
        elif kind == "link":
            mark = "clicked button" if text in visited else "button"
            lines.append(f"\n[{mark}] {text} [{mark}_]")
        elif f'"{text}"' in url:
            lines.append(f"  [clicked button] {text} [clicked button_]")
            clicked.append(f"You have clicked {text}.")
        else:
            lines.append(f"  [button] {text} [button_]")
    return "\n".join((*reversed(clicked), *lines, ""))


def _top(instruction: str, buttons: Iterable[str]) -> list[Node]:
    nodes: list[Node] = [("text", "Instruction:"), ("text", instruction)]
    nodes.extend(("button", button) for button in buttons)
    return nodes


def _page(
    nodes: Iterable[Node],
    *,
    options: Mapping[str, Sequence[str]] | None = None,
    has_search_bar: bool = False,
) -> Page:
    """Drop blank nodes and collect clickables: buttons, then links, then options."""
    kept = tuple(_visible(nodes))
    clickables: dict[str, str] = {}
    for wanted in ("button", "link"):
        clickables.update((text.lower(), wanted) for kind, text in kept if kind == wanted)
    for name, values in (options or {}).items():
        clickables.update((value, f":{name}") for value in values)
    return Page(kept, clickables, has_search_bar)


def _visible(nodes: Iterable[Node]) -> Iterator[Node]:
    for kind, text in nodes:
        if text.strip(_BLANK):
            yield kind, text
        elif text and "\n" not in text:
            yield kind, " "
