"""Goals: what an episode asks for, in the original's order, and the splits over them.

Human goals come one an annotation, synthetic ones one a combination of a product's options. A
price bound is drawn for each, then all are shuffled with seed 233, so a goal's index is the same
everywhere and the published splits are ranges of it. The random draws use one ``random.Random`` in
the original's call order: first a purchase price for every product whose price is a range, then
the bounds. Goals are numbers on disk (16 bytes each); one is made when it is asked for.
"""

from __future__ import annotations

import bisect
import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from pz_envs.errors import ConfigError, did_you_mean
from pz_envs.webshop.build import NO_INSTRUCTION
from pz_envs.webshop.layout import Folder, FolderWriter
from pz_envs.webshop.products import Product

GoalKind = Literal["human", "synthetic"]
Split = Literal["train", "eval", "test", "all", "fork_train", "fork_test"]

SPLITS: tuple[str, ...] = ("train", "eval", "test", "all", "fork_train", "fork_test")

_SHUFFLE_SEED = 233
_LET_GO_EVERY = 64
_BOUNDS = tuple(10.0 * tens for tens in range(1, 100))
NO_BOUND = 1_000_000.0
"""The price bound, in dollars, of a goal that says nothing about the price."""

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


class Goals(Sequence[Goal]):
    """All goals of one kind in one shop, shuffled.

    Args:
        folder: where ``write_goals`` wrote them.
        kind: their kind.
        products: the shop's products by load order.
        weights: ``[N]`` weight of a product's synthetic goals.
    """

    def __init__(
        self,
        folder: Folder,
        kind: GoalKind,
        products: Callable[[int], Product],
        weights: NDArray[np.float64],
    ) -> None:
        self._folder = folder
        self._made = 0
        self._kind = kind
        self._products = products
        self._weights = weights
        self._owners = folder.array("owners")
        self._variants = folder.array("variants")
        self._bounds = folder.array("bounds")
        self.prices: NDArray[np.float64] = folder.array("prices")
        """``[N]`` purchase price of each product, in dollars."""

    def __len__(self) -> int:
        return len(self._owners)

    @overload
    def __getitem__(self, index: int) -> Goal: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Goal, ...]: ...
    def __getitem__(self, index: int | slice) -> Goal | tuple[Goal, ...]:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(*index.indices(len(self))))
        self._made += 1
        if self._made % _LET_GO_EVERY == 0:
            self._folder.let_go()
        owner, variant = int(self._owners[index]), int(self._variants[index])
        product, bound = self._products(owner), float(self._bounds[index])
        if self._kind == "human":
            return _human(product, variant, bound)
        return _synthetic(product, variant, bound, float(self._weights[owner]))

    def weights(self, chosen: range) -> NDArray[np.float64]:
        """Return the weights of the goals ``chosen``, for the original's draw."""
        if self._kind == "human":
            return np.ones(len(chosen))
        return np.asarray(self._weights[self._owners[chosen.start : chosen.stop]])


def check_kind(kind: str) -> None:
    """Refuse a kind of goals that there is not.

    Raises:
        ConfigError: ``kind`` is neither ``"human"`` nor ``"synthetic"``.
    """
    if kind not in ("human", "synthetic"):
        raise ConfigError(f"goals={kind!r}: allowed are 'human' and 'synthetic'")


def write_goals(shop: Folder, kind: GoalKind, price_seed: int, target: Path) -> None:
    """Draw all prices and bounds, shuffle the goals, and write them to the folder ``target``.

    Files: ``prices`` by product; ``owners`` (product), ``variants`` (which of its annotations or
    combinations of options) and ``bounds`` (dollars) by goal.
    """
    rng = random.Random(price_seed)
    pricing = shop.array("pricing").reshape(-1, 2)
    prices = np.array(pricing[:, 0])
    for number in np.flatnonzero(~np.isnan(pricing[:, 1])).tolist():
        prices[number] = rng.uniform(*pricing[number].tolist())
    counts = shop.array(kind)
    bounds = array("d")
    if kind == "human":
        for number in np.flatnonzero(counts).tolist():
            price = float(prices[number])
            bounds.extend(price_bound(price, rng) for _ in range(int(counts[number])))
        bound_of_goal = np.array(bounds, dtype=np.float64)
    else:
        drawn = np.flatnonzero(counts != NO_INSTRUCTION)
        bounds.extend(price_bound(price, rng) for price in prices[drawn].tolist())
        bound_of_goal = np.repeat(np.array(bounds, dtype=np.float64), counts[drawn])
    many = np.maximum(counts, 0)
    owners = np.repeat(np.arange(len(many), dtype=np.uint32), many)
    starts = np.cumsum(many) - many
    variants = np.arange(len(owners), dtype=np.int64) - np.repeat(starts, many)
    order = array("I", range(len(owners)))
    random.Random(_SHUFFLE_SEED).shuffle(order)
    places = np.frombuffer(order, dtype=np.uint32)
    with FolderWriter(target) as writer:
        writer.save("prices", prices)
        writer.save("owners", owners[places])
        writer.save("variants", variants[places].astype(np.uint32))
        writer.save("bounds", bound_of_goal[places])
        writer.finish({"kind": kind, "price_seed": price_seed})


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


def draw_like_original(sums: Sequence[float] | NDArray[np.float64], rng: random.Random) -> int:
    """Return an index as the original draws it: goal i with the weight of goal i - 1.

    Args:
        sums: running totals of the weights, the first that of goal 0. The original puts a 0 before
            them, which shifts every weight by one, so that goal 0 never comes.
        rng: where the draw comes from.
    """
    drawn = rng.uniform(0, float(sums[-1]))
    return min(bisect.bisect(sums, drawn) + 1, len(sums) - 1)


def price_bound(price: float, rng: random.Random) -> float:
    """Return the most that a goal's product may cost, in dollars; ``NO_BOUND`` for no limit."""
    candidates = [bound for bound in _BOUNDS if bound > price][:4]
    return max(rng.sample(candidates, 2)) if len(candidates) > 1 else NO_BOUND


def _human(product: Product, variant: int, bound: float) -> Goal:
    usable = [one for one in product.annotations if one.attributes]
    annotation = usable[variant]
    text = annotation.instruction.strip(".") + _price_clause(bound)
    return _goal(product, text, annotation.attributes, bound, annotation.options, 1.0)


def _synthetic(product: Product, variant: int, bound: float, weight: float) -> Goal:
    """Return the goal of the combination ``variant``; the last option's value changes fastest."""
    values = []
    names = sorted(product.options)
    for name in reversed(names):
        variant, place = divmod(variant, len(product.options[name]))
        values.append(product.options[name][place])
    options = dict(zip(names, reversed(values), strict=True))
    wish = ", and ".join(f"{name}: {value}" for name, value in options.items())
    text = f"{product.instruction}{' with ' + wish if wish else ''}{_price_clause(bound)}"
    return _goal(product, text, product.instruction_attributes, bound, options, weight)


def _goal(
    product: Product,
    text: str,
    attributes: tuple[str, ...],
    bound: float,
    options: tuple[str, ...] | Mapping[str, str],
    weight: float,
) -> Goal:
    return Goal(
        asin=product.asin,
        category=product.category,
        query=product.query,
        name=product.title,
        product_category=product.product_category,
        instruction_text=text,
        attributes=attributes,
        price_upper=bound,
        options=options,
        nouns=product.nouns,
        weight=weight,
    )


def _price_clause(bound: float) -> str:
    return "" if bound == NO_BOUND else f", and price lower than {bound:.2f} dollars"
