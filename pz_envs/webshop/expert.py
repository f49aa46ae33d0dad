"""Two ways to shop: an oracle that knows the goal's product, and a rule that only reads.

The oracle finds the query and page that show the product, opens it, chooses the options that the
reward will count and buys. ``rule_agent`` is the usual baseline: search for the instruction, open
the first result, choose options that the instruction names literally, buy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pz_envs.webshop.goals import Goal
from pz_envs.webshop.pages import BUY, NEXT, PER_PAGE, SUB_PAGES
from pz_envs.webshop.products import Product
from pz_envs.webshop.reward import MATCH_ABOVE, normalize_color, token_set_ratio
from pz_envs.webshop.session import Session
from pz_envs.webshop.store import Shop

_PRICE_CLAUSE = re.compile(r",? and price lower than [\d.]+ dollars\Z")
_UNWRITABLE = re.compile(r"[^\w\s'.,-]+")
_OPTION = re.compile(r"  \[(clicked )?button\] (.*) \[(?:clicked )?button_\]")
_RESERVED = frozenset(text.lower() for text in (*SUB_PAGES, BUY, "Back to Search", "< Prev"))


def find_query(shop: Shop, product: Product) -> tuple[str, int]:
    """Return a query whose results hold ``product``, and on which page (0 when none does)."""
    candidates = (
        product.title,
        f"{product.title} {product.description}"[:300],
        f"{product.title} {' '.join(' '.join(values) for values in product.options.values())}"[
            :300
        ],
        product.query,
    )
    best = (" ".join(_UNWRITABLE.sub(" ", product.title).lower().split()) or "x", 0)
    for candidate in candidates:
        query = " ".join(_UNWRITABLE.sub(" ", candidate).lower().split())
        found = shop.search(query) if query else ()
        if product.asin in found:
            page = found.index(product.asin) // PER_PAGE + 1
            if best[1] == 0 or page < best[1]:
                best = (query, page)
            if page == 1:
                break
    return best


def wanted_values(product: Product, goal: Goal) -> tuple[str, ...]:
    """Return the option values of ``product`` to choose for ``goal``, at most one a wish."""
    offered = [value for values in product.options.values() for value in values]
    usable = [value for value in offered if value and value not in _RESERVED]
    wishes = goal.options.values() if isinstance(goal.options, Mapping) else goal.options
    chosen = []
    for wish in wishes:
        if wish in usable:
            chosen.append(wish)
            continue
        plain = str(normalize_color(wish))
        ratios = [token_set_ratio(str(normalize_color(value)), plain) for value in usable]
        if ratios and max(ratios) > MATCH_ABOVE:
            chosen.append(usable[ratios.index(max(ratios))])
    return tuple(dict.fromkeys(chosen))


def oracle_action(session: Session, shop: Shop, goal: Goal) -> str | None:
    """Return the next action towards buying the goal's product; None once something is bought."""
    if session.kind == "done":
        return None
    product = shop.products[goal.asin]
    clickables = session.page.clickables
    if session.kind == "item" and session.asin == goal.asin:
        names = {clickables[value]: value for value in wanted_values(product, goal)}
        for name, value in names.items():
            if session.options.get(name[1:]) != value:
                return f"click[{value}]"
        return f"click[{BUY.lower()}]"
    if clickables.get(goal.asin.lower()) == "link":
        return f"click[{goal.asin.lower()}]"
    query, page = find_query(shop, product)
    if session.kind == "results" and session.query == query:
        if session.page_number < page:
            return f"click[{NEXT.lower()}]"
        if page == 0:
            return next((f"click[{x}]" for x, what in clickables.items() if what == "link"), None)
    if page == 0 and session.kind == "item":
        return f"click[{BUY.lower()}]"
    return f"search[{query}]"


def without_price(instruction: str) -> str:
    """Return an instruction as words to search for: no price clause, no brackets."""
    plain = _UNWRITABLE.sub(" ", _PRICE_CLAUSE.sub("", instruction))
    return " ".join(plain.lower().split()) or "x"


def rule_agent(observation: str, info: Mapping[str, Any]) -> str:
    """Return the baseline's action from what an agent sees (mode ``text_rich``).

    It needs ``admissible_commands``; wrong options stay wrong, and it never looks at page two.
    """
    commands = [command[6:-1] for command in info["admissible_commands"] if command[:6] == "click["]
    goal = without_price(str(info["extra"]["goal"]))
    if info["extra"]["page"] == "index":
        return f"search[{goal}]"
    if info["extra"]["page"] == "results":
        links = [text for text in commands if text not in _RESERVED | {NEXT.lower()}]
        return f"click[{links[0]}]" if links else "search[gift]"
    if info["extra"]["page"] == "item":
        value = _literal_option(observation, str(info["extra"]["goal"]).lower())
        return f"click[{value or BUY.lower()}]"
    return "click[< prev]"


def _literal_option(page: str, goal: str) -> str | None:
    """Return the longest value that ``goal`` names, of an option where none is chosen yet."""
    groups: list[list[re.Match[str]]] = [[]]
    for line in page.splitlines():
        match = _OPTION.fullmatch(line)
        if match is not None:
            groups[-1].append(match)
        elif groups[-1]:
            groups.append([])
    for group in groups:
        named = [
            match[2]
            for match in group
            if match[2].isascii() and re.search(rf"(?<!\w){re.escape(match[2])}(?!\w)", goal)
        ]
        if named and not any(match[1] for match in group):
            return max(named, key=len)
    return None
