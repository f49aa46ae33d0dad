"""Products as the shop shows them, cleaned by the original's rules.

Two layouts are read: the original's files (a JSON array of scraped records, an attribute file and
an annotation file) and JSON lines of records that were cleaned already. The rules, from Yao et al.
2022: an ASIN appears once and has at most ten characters, option names and values are lower-cased,
a missing price is $100, and a product without mined attributes gets a dummy one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pz_envs.errors import DataError
from pz_envs.webshop.nouns import title_nouns

_NOT_A_NUMBER = re.compile(r"[^\d.]")
_DEFAULT_PRICE = 100.0


@dataclass(frozen=True, slots=True)
class Annotation:
    """One instruction that a person wrote for a product."""

    instruction: str
    attributes: tuple[str, ...]
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Product:
    """One product.

    ``pricing`` is one price or a low and a high one, in dollars. ``options`` maps a name to its
    values in page order. ``nouns`` are those of the title, with repetitions, for the reward.
    ``instruction`` is the machine-made one, None where there is none.
    """

    asin: str
    title: str
    description: str
    bullets: tuple[str, ...]
    pricing: tuple[float, ...]
    price_text: str
    options: Mapping[str, tuple[str, ...]]
    attributes: tuple[str, ...]
    category: str
    query: str
    product_category: str
    nouns: tuple[str, ...]
    instruction: str | None = None
    instruction_attributes: tuple[str, ...] = ()
    annotations: tuple[Annotation, ...] = ()

    def indexed_text(self) -> str:
        """Return what search sees: title, description, first bullet and options, lower-cased."""
        options = ", and ".join(
            f"{name}: {', '.join(values)}" for name, values in self.options.items()
        )
        first = self.bullets[0] if self.bullets else ""
        return " ".join((self.title, self.description, first, options)).lower()


def clean_products(
    records: Sequence[Mapping[str, Any]],
    attributes: Mapping[str, Any],
    annotations: Mapping[str, Any],
    *,
    nouns: Mapping[str, Sequence[str]] | None = None,
    num_products: int | None = None,
    cleaned: bool = False,
) -> list[Product]:
    """Return the shop's products in file order.

    Args:
        records: scraped records, or with ``cleaned`` records that went through this before.
        attributes: ASIN to ``{"attributes": [...], "instruction": ...}``.
        annotations: ASIN to a list of human annotations.
        nouns: title to its nouns; titles that are not in it are read with the closed lexicon.
        num_products: records to look at, before any is dropped; None for all.
        cleaned: whether prices and options have their final form already.

    Raises:
        DataError: a record lacks a field or has one of another type; the message names the ASIN.
    """
    products = []
    seen = set()
    for number, record in enumerate(records[:num_products]):
        try:
            asin = str(record["asin"])
            if asin == "nan" or len(asin) > 10 or asin in seen:
                continue
            seen.add(asin)
            products.append(
                _product(
                    record, attributes.get(asin, {}), annotations.get(asin, ()), nouns, cleaned
                )
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            name = record.get("asin") if isinstance(record, Mapping) else record
            raise DataError(
                f"product record {number} (asin {name!r:.40}) is not in WebShop's layout: {error!r}"
            ) from error
    return products


def _product(
    record: Mapping[str, Any],
    mined: Mapping[str, Any],
    annotations: Iterable[Mapping[str, Any]],
    nouns: Mapping[str, Sequence[str]] | None,
    cleaned: bool,
) -> Product:
    title = record["name"]
    bullets = record["small_description"]
    if cleaned:
        pricing = tuple(float(price) for price in record["pricing"])
        options = {name: tuple(values) for name, values in record["options"].items()}
    else:
        pricing = parse_pricing(record.get("pricing"))
        options = parse_options(record.get("customization_options"))
    known = None if nouns is None else nouns.get(title)
    return Product(
        asin=str(record["asin"]),
        title=title,
        description=record["full_description"],
        bullets=tuple(bullets if isinstance(bullets, list) else [bullets]),
        pricing=pricing,
        price_text=" to ".join(f"${price}" for price in pricing),
        options=options,
        attributes=tuple(mined.get("attributes", ("DUMMY_ATTR",))),
        category=record["category"],
        query=record["query"].lower().strip(),
        product_category=record["product_category"],
        nouns=title_nouns(title) if known is None else tuple(known),
        instruction=mined.get("instruction"),
        instruction_attributes=tuple(mined.get("instruction_attributes") or ()),
        annotations=tuple(
            Annotation(
                one["instruction"],
                tuple(one["instruction_attributes"]),
                tuple(one["instruction_options"]),
            )
            for one in annotations
        ),
    )


def parse_pricing(text: str | None) -> tuple[float, ...]:
    """Return one price, or the low and high end of a range; $100 when there is none."""
    if not text:
        return (_DEFAULT_PRICE,)
    prices = tuple(float(_NOT_A_NUMBER.sub("", part)) for part in text.split("$")[1:])
    return prices[:2]


def parse_options(customization: Mapping[str, Any] | None) -> dict[str, tuple[str, ...]]:
    """Return option name to values: lower-cased, stripped, ``/`` as `` | ``; null lists dropped."""
    options = {}
    for name, contents in (customization or {}).items():
        if contents is not None:
            options[name.lower()] = tuple(
                one["value"].strip().replace("/", " | ").lower() for one in contents
            )
    return options
