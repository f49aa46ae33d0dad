"""The built-in catalogue: made-up products in the original's three file layouts, by one fixed seed.

Products come in families of near-duplicates: the same kind and nearly the same attributes under
other brands, differing in one attribute, in options and in price. An instruction says most
attributes and options in other words, so that searching for it and buying the first hit falls far
short of what reading the pages achieves. The first n products of a larger catalogue are the
catalogue of size n.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

from pz_envs.errors import ConfigError
from pz_envs.seeding import derive_seed
from pz_envs.webshop.products import Row
from pz_envs.webshop.wording import ATTRIBUTES, DEPARTMENTS, KINDS, OPENINGS, OPTIONS, USES, Kind

DEFAULT_SIZE = 10_000
"""Products of the catalogue unless another number is asked for."""

LARGEST = 1_000_000
"""Products that may be asked for."""

EDITION = 1
"""Raised whenever the same size would give other products, so that old copies are not read."""

_PARAPHRASED = 0.8
_FAMILY = (3, 7)
_NO_PRICE = 0.04
_PRICE_RANGE = 0.3
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SYLLABLE_TEXT = "ba bel cor dan fi gra hol jun ka lum mar nor ori pel quo ral sen tor ulm ves"
_SYLLABLES = _SYLLABLE_TEXT.split()


def check_size(size: int) -> None:
    """Refuse a size that there is not.

    Raises:
        ConfigError: ``size`` is not 1 to ``LARGEST``.
    """
    if not 1 <= size <= LARGEST:
        raise ConfigError(f"the built-in catalogue has 1 to {LARGEST} products, not {size}")


def generate(size: int) -> Iterator[Row]:
    """Yield ``size`` product records, each with its attributes and its human-style annotations.

    The three have the layouts of members of ``items_shuffle.json``, ``items_ins_v2.json`` and
    ``items_human_ins.json``.
    """
    return itertools.islice(_endless(), size)


def _endless() -> Iterator[Row]:
    rng = random.Random(derive_seed("webshop catalogue", 1))
    taken: set[str] = set()
    while True:
        kind = rng.choice(KINDS)
        core = rng.sample(sorted(ATTRIBUTES[kind.category]), 3)
        for _ in range(rng.randint(*_FAMILY)):
            asin = _new_asin(rng, taken)
            own = _vary(rng, kind, core)
            options = _options(rng, kind)
            record = _record(rng, kind, asin, own, options)
            wanted = rng.sample(own, rng.randint(2, len(own)))
            mined = {
                "attributes": own,
                "instruction": f"Find me {', '.join(wanted)} {kind.name}",
                "instruction_attributes": wanted,
            }
            yield record, mined, [_annotation(rng, kind, asin, wanted, options)]


def _new_asin(rng: random.Random, taken: set[str]) -> str:
    while True:
        asin = "B0" + "".join(rng.choices(_ALPHABET, k=8))
        if asin not in taken:
            taken.add(asin)
            return asin


def _vary(rng: random.Random, kind: Kind, core: list[str]) -> list[str]:
    """Return the family's attributes with one exchanged, sometimes with one more."""
    others = [name for name in ATTRIBUTES[kind.category] if name not in core]
    own = list(core)
    own[rng.randrange(len(own))] = rng.choice(others)
    if rng.random() < 0.5:
        own.append(rng.choice([name for name in others if name not in own]))
    return own


def _options(rng: random.Random, kind: Kind) -> dict[str, list[str]]:
    chosen = {}
    for axis in kind.axes:
        values = list(OPTIONS[axis])
        count = rng.randint(2, len(values))
        picked = set(rng.sample(values, count))
        chosen[axis] = [value for value in values if value in picked]
    return chosen


def _record(
    rng: random.Random, kind: Kind, asin: str, own: list[str], options: dict[str, list[str]]
) -> dict[str, Any]:
    brand = "".join(rng.sample(_SYLLABLES, 2)).title()
    shown = rng.sample(own, min(2, len(own)))
    use = rng.choice(USES)
    title = f"{brand} {kind.name.title()}, {', '.join(shown).title()}, for {use.title()}"
    said = [ATTRIBUTES[kind.category][name] for name in own]
    bullets = [f"This {kind.name} {phrase}." for phrase in said]
    rng.shuffle(bullets)
    description = (
        f"{brand} makes {kind.name} with care. {', '.join(own).capitalize()}. "
        f"Chosen by people who want it for {use}."
    )
    return {
        "asin": asin,
        "name": title,
        "category": kind.category,
        "query": kind.name,
        "product_category": f"{DEPARTMENTS[kind.category]} › {kind.shelf} › {kind.name.title()}",
        "pricing": _pricing(rng, kind),
        "small_description": [f"A {kind.other_name} for {use}.", *bullets],
        "full_description": description,
        "customization_options": {
            axis: [{"value": value} for value in values] for axis, values in options.items()
        },
    }


def _pricing(rng: random.Random, kind: Kind) -> str:
    price = kind.low * (kind.high / kind.low) ** rng.random()
    draw = rng.random()
    if draw < _NO_PRICE:
        return ""
    if draw < _NO_PRICE + _PRICE_RANGE:
        return f"${price:.2f} - ${price * rng.uniform(1.1, 1.6):.2f}"
    return f"${price:.2f}"


def _annotation(
    rng: random.Random, kind: Kind, asin: str, wanted: list[str], options: dict[str, list[str]]
) -> dict[str, Any]:
    """Return one annotation: attributes and option values wanted, mostly in other words."""
    thing = kind.other_name if rng.random() < _PARAPHRASED / 2 else kind.name
    plain = [name for name in wanted if rng.random() >= _PARAPHRASED]
    other = [ATTRIBUTES[kind.category][name] for name in wanted if name not in plain]
    picked = {axis: rng.choice(values) for axis, values in options.items()}
    wishes = [
        OPTIONS[axis][value] if rng.random() < _PARAPHRASED else value
        for axis, value in picked.items()
    ]
    parts = [f"{', '.join(plain)} {thing}".strip()]
    if other:
        parts.append(f"that {' and '.join(other)}")
    text = rng.choice(OPENINGS).format(thing=" ".join(parts))
    return {
        "asin": asin,
        "instruction": f"{text}. as for the choice: {', '.join(wishes)}.",
        "instruction_attributes": wanted,
        "instruction_options": list(picked.values()),
    }
