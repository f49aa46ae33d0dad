"""What a purchase is worth: attributes, options and price, times a factor for the product type.

Yao et al. 2022, section 3: (attribute hits + option hits + [price within bound]) / (attributes +
options + 1), times r_type in {0, 0.1, 0.5, 1}. The string comparison is thefuzz 0.19's
``token_set_ratio`` over difflib, whose threshold decides; colours are normalised first by the
original's list, substring by substring (so titanium is tan). Its oddities are kept.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from pz_envs.webshop.goals import Goal
from pz_envs.webshop.products import Product

_COLOR_TEXT = """
alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown
burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee
cognac copper coral cranberry cream crystal dark denim eggplant elephant espresso fuchsia gold
granite grape graphite grass gray green grey heather indigo ivory ivy khaki lavender lemon
leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom
mustard natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal
rust sand sapphire seashell silver skull slate steel stone stonewash sunflower tan taupe teal
tiger turquoise violet walnut wheat white wine yellow
"""
COLORS: tuple[str, ...] = tuple(_COLOR_TEXT.split())
"""Colour words in the order in which they are looked for."""

MATCH_ABOVE = 85
"""A ``token_set_ratio`` above this is a match."""

_NOT_A_WORD = re.compile(r"\W")
_LATIN_1 = dict.fromkeys(range(128, 256))


@dataclass(frozen=True, slots=True)
class Verdict:
    """A purchase's reward in [0, 1] and the parts that the original reports."""

    reward: float
    parts: Mapping[str, Any]


def score_purchase(
    product: Product, goal: Goal, price: float, options: Mapping[str, str]
) -> Verdict:
    """Return the reward for buying ``product`` at ``price`` dollars with the chosen ``options``."""
    kind = type_factor(product, goal)
    within = price <= goal.price_upper
    attribute_hits = count_attribute_hits(product, goal.attributes)
    wanted: Iterable[str | tuple[str, str]] = (
        goal.options.items() if isinstance(goal.options, Mapping) else goal.options
    )
    option_hits = count_option_hits(options.values(), wanted)
    total = len(goal.attributes) + len(goal.options) + 1
    reward = (attribute_hits + option_hits + within) / total * kind["r_type"]
    parts = {
        "r_type": kind["r_type"],
        "r_att": attribute_hits / len(goal.attributes),
        "w_att": len(goal.attributes) / total,
        "query_match": kind["query_match"],
        "category_match": kind["category_match"],
        "title_score": kind["title_score"],
    }
    if goal.options:
        parts["r_option"] = option_hits / len(goal.options)
        parts["w_option"] = len(goal.options) / total
    parts["r_price"] = within
    parts["w_price"] = 1 / total
    return Verdict(reward, parts)


def type_factor(product: Product, goal: Goal) -> dict[str, Any]:
    """Return ``r_type`` and what it rests on: query, category path and nouns of the title."""
    query_match = product.query == goal.query
    shared = _segments(product.product_category) & _segments(goal.product_category)
    category_match = len(shared) >= 2
    common = set(product.nouns) & set(goal.nouns)
    title_score = len(common) / len(goal.nouns) if goal.nouns else 0.2
    factor = 1.0 if query_match or category_match or title_score > 0.2 else 0.5
    if title_score < 0.1:
        factor = 0.1
    if title_score == 0.0:
        factor = 0.0
    return {
        "r_type": factor,
        "query_match": query_match,
        "category_match": category_match,
        "title_score": title_score,
    }


def count_attribute_hits(product: Product, wanted: Iterable[str]) -> int:
    """Return how many wanted attributes the product has, by its attributes or by its texts."""
    texts: tuple[str, ...] = ()
    hits = 0
    for attribute in wanted:
        if any(token_set_ratio(own, attribute) > MATCH_ABOVE for own in product.attributes):
            hits += 1
            continue
        if not texts:
            joined = " ".join(product.bullets)
            texts = (product.title.lower(), joined.lower(), product.description.lower())
        hits += any(attribute in text for text in texts)
    return hits


def count_option_hits(chosen: Iterable[str], wanted: Iterable[str | tuple[str, str]]) -> int:
    """Return how many wanted options some chosen one matches.

    A wanted option of a synthetic goal is a pair of name and value and is compared as the
    original compares it: by the pair's own text, unless one side of it is exactly a colour.
    """
    plain = [normalize_color(option) for option in chosen]
    return sum(
        any(token_set_ratio(own, str(goal)) > MATCH_ABOVE for own in plain)
        for goal in map(normalize_color, wanted)
    )


def normalize_color(option: str | tuple[str, str]) -> str | tuple[str, str]:
    """Return the first colour that ``option`` contains, else ``option``."""
    return next((color for color in COLORS if color in option), option)


@functools.lru_cache(maxsize=65_536)
def token_set_ratio(left: str, right: str) -> int:
    """Return thefuzz's similarity of two sets of words, 0 to 100."""
    first, second = set(_words(left)), set(_words(right))
    if not first or not second:
        return 0
    shared = " ".join(sorted(first & second))
    one = f"{shared} {' '.join(sorted(first - second))}".strip()
    other = f"{shared} {' '.join(sorted(second - first))}".strip()
    return max(_ratio(shared, one), _ratio(shared, other), _ratio(one, other))


def _words(text: str) -> list[str]:
    return _NOT_A_WORD.sub(" ", text.translate(_LATIN_1)).lower().split()


def _ratio(left: str, right: str) -> int:
    return 100 if left == right else round(100 * SequenceMatcher(None, left, right).ratio())


@functools.lru_cache(maxsize=4096)
def _segments(path: str) -> frozenset[str]:
    return frozenset(part.strip() for part in path.split("›"))
