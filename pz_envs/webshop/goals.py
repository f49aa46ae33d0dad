"""Goals: what an episode asks for, in the original's order, and the splits over them.

Human goals come one an annotation, synthetic ones one a combination of a product's options. A
price bound is drawn for each, then all are shuffled with seed 233, so a goal's index is the same
everywhere and the published splits are ranges of it. The random draws use one ``random.Random`` in
the original's call order: first a purchase price for every product whose price is a range, then
the bounds.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pz_envs.errors import ConfigError, did_you_mean
from pz_envs.webshop.products import Product

GoalKind = Literal["human", "synthetic"]
Split = Literal["train", "eval", "test", "all", "fork_train", "fork_test"]

SPLITS: tuple[str, ...] = ("train", "eval", "test", "all", "fork_train", "fork_test")

_SHUFFLE_SEED = 233
_BOUNDS = tuple(10.0 * tens for tens in range(1, 100))
_NO_BOUND = 1_000_000
_OFFICIAL_TEST, _OFFICIAL_EVAL = 500, 1500
_FEWEST_FOR_OFFICIAL = 3000
_FORK_TRAIN, _FORK_TEST = 4096, 4196


@dataclass(frozen=True, slots=True)
class Goal:
    """What to buy.

    ``options`` are values (human goals) or a mapping of names to values (synthetic ones).
    ``price_upper`` is in dollars. ``weight`` is for the original's draw.
    """

    asin: str
    category: str
    query: str
    name: str
    product_category: str
    instruction_text: str
    attributes: tuple[str, ...]
    price_upper: float
    options: tuple[str, ...] | Mapping[str, str]
    nouns: tuple[str, ...]
    weight: float = 1.0


def purchase_prices(products: Sequence[Product], rng: random.Random) -> dict[str, float]:
    """Return ASIN to price in dollars; a range is drawn from, uniformly, in load order."""
    return {
        product.asin: (
            rng.uniform(*product.pricing) if len(product.pricing) > 1 else product.pricing[0]
        )
        for product in products
    }


def make_goals(
    products: Sequence[Product],
    prices: Mapping[str, float],
    kind: GoalKind,
    rng: random.Random,
) -> tuple[Goal, ...]:
    """Return every goal, shuffled.

    Raises:
        ConfigError: ``kind`` is neither ``"human"`` nor ``"synthetic"``.
    """
    if kind == "human":
        goals = _human(products, prices, rng)
    elif kind == "synthetic":
        goals = _synthetic(products, prices, rng)
    else:
        raise ConfigError(f"goals={kind!r}: allowed are 'human' and 'synthetic'")
    random.Random(_SHUFFLE_SEED).shuffle(goals)
    return tuple(goals)


def split_range(split: str, count: int) -> range:
    """Return the goal indices of a split over ``count`` goals.

    The official ranges are test 0–499, eval 500–1499, train the rest. A shop with fewer than 3,000
    goals has the first tenth as test, the second as eval. ``fork_train`` (0–4095) and
    ``fork_test`` (4096–4195) are those of the published R3L runs.

    Raises:
        ConfigError: no such split, or no goals in it.
    """
    if split not in SPLITS:
        raise ConfigError(
            f"split={split!r}: allowed are {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}"
        )
    test, dev = _OFFICIAL_TEST, _OFFICIAL_EVAL
    if count < _FEWEST_FOR_OFFICIAL:
        test, dev = -(-count // 10), -(-count // 5)
    chosen = {
        "all": range(count),
        "test": range(test),
        "eval": range(test, dev),
        "train": range(dev, count),
        "fork_train": range(min(_FORK_TRAIN, count)),
        "fork_test": range(_FORK_TRAIN, min(_FORK_TEST, count)),
    }[split]
    if not chosen:
        raise ConfigError(
            f"split={split!r} is empty: this shop has {count} goals of that kind. "
            "Use split='all', other goals, or more products"
        )
    return chosen


def draw_like_original(goals: Sequence[Goal], rng: random.Random) -> int:
    """Return an index as the original draws it: goal i with the weight of goal i - 1.

    Its cumulative sums begin with a 0 that shifts every weight by one, so goal 0 never comes.
    """
    sums = [0.0, *itertools.accumulate(goal.weight for goal in goals)]
    return min(bisect.bisect(sums, rng.uniform(0, sums[-1])), len(goals) - 1)


def _human(
    products: Sequence[Product], prices: Mapping[str, float], rng: random.Random
) -> list[Goal]:
    goals = []
    for product in products:
        for annotation in product.annotations:
            if not annotation.attributes:
                continue
            upper, clause = _price_bound(prices[product.asin], rng)
            text = annotation.instruction.strip(".") + clause
            goals.append(_goal(product, text, annotation.attributes, upper, annotation.options))
    return goals


def _synthetic(
    products: Sequence[Product], prices: Mapping[str, float], rng: random.Random
) -> list[Goal]:
    goals = []
    for product in products:
        attributes = product.instruction_attributes
        if product.instruction is None or not attributes:
            continue
        upper, clause = _price_bound(prices[product.asin], rng)
        names = sorted(product.options)
        for values in itertools.product(*(product.options[name] for name in names)):
            options = dict(zip(names, values, strict=True))
            wish = ", and ".join(f"{name}: {value}" for name, value in options.items())
            text = f"{product.instruction}{' with ' + wish if wish else ''}{clause}"
            goals.append(_goal(product, text, attributes, upper, options))
    counts = Counter(attribute for goal in goals for attribute in goal.attributes)
    return [
        replace(
            goal,
            weight=sum(1.0 / counts[one] for one in goal.attributes) / len(goal.attributes),
        )
        for goal in goals
    ]


def _goal(
    product: Product,
    text: str,
    attributes: tuple[str, ...],
    upper: float,
    options: tuple[str, ...] | Mapping[str, str],
) -> Goal:
    return Goal(
        asin=product.asin,
        category=product.category,
        query=product.query,
        name=product.title,
        product_category=product.product_category,
        instruction_text=text,
        attributes=attributes,
        price_upper=upper,
        options=options,
        nouns=product.nouns,
    )


def _price_bound(price: float, rng: random.Random) -> tuple[float, str]:
    candidates = [bound for bound in _BOUNDS if bound > price][:4]
    if len(candidates) < 2:
        return _NO_BOUND, ""
    upper = max(rng.sample(candidates, 2))
    return upper, f", and price lower than {upper:.2f} dollars"
