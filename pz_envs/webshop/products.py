"""Products as the shop shows them, cleaned by the original's rules.

Two layouts are read: the original's files (a JSON array of scraped records, an attribute file and
an annotation file) and JSON lines of records that were cleaned already. The rules, from Yao et al.
2022: an ASIN appears once and has at most ten characters, option names and values are lower-cased,
a missing price is $100, and a product without mined attributes gets a dummy one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pz_envs.errors import DataError
from pz_envs.webshop.nouns import title_nouns

_NOT_A_NUMBER = re.compile(r"[^\d.]")
_DEFAULT_PRICE = 100.0

Row = tuple[Mapping[str, Any], Mapping[str, Any], Iterable[Mapping[str, Any]]]
"""A record, its mined attributes, its annotations."""


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


_FIELDS = tuple(field.name for field in fields(Product))
_OPTIONS = _FIELDS.index("options")


def packed(product: Product) -> bytes:
    """Return a product as bytes: a JSON list of its fields in order."""
    values = [getattr(product, name) for name in _FIELDS]
    values[-1] = [[one.instruction, one.attributes, one.options] for one in product.annotations]
    return json.dumps(values, separators=(",", ":")).encode()


def unpacked(data: bytes) -> Product:
    """Return the product that ``packed`` made ``data`` of.

    Raises:
        ValueError: ``data`` are other bytes.
    """
    values = json.loads(data)
    options = {name: tuple(one) for name, one in values[_OPTIONS].items()}
    plain: list[Any] = [tuple(value) if isinstance(value, list) else value for value in values]
    plain[_OPTIONS] = options
    plain[-1] = tuple(Annotation(text, tuple(a), tuple(b)) for text, a, b in values[-1])
    return Product(*plain)


def clean_products(
    rows: Iterable[Row],
    *,
    nouns: Callable[[str], Sequence[str] | None] | None = None,
    cleaned: bool = False,
) -> Iterator[Product]:
    """Yield the shop's products in file order.

    Args:
        rows: a scraped record, its mined attributes ``{"attributes": [...], "instruction": ...}``
            and its human annotations; with ``cleaned`` records that went through this before.
        nouns: title to its nouns; titles it has none for are read with the closed lexicon.
        cleaned: whether prices and options have their final form already.

    Raises:
        DataError: a record lacks a field or has one of another type; the message names the ASIN.
    """
    seen = set()
    for number, (record, mined, people) in enumerate(rows):
        try:
            asin = str(record["asin"])
            if asin == "nan" or len(asin) > 10 or asin in seen:
                continue
            seen.add(asin)
            product = _product(record, mined, people, nouns, cleaned)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            name = record.get("asin") if isinstance(record, Mapping) else record
            raise DataError(
                f"product record {number} (asin {name!r:.40}) is not in WebShop's layout: {error!r}"
            ) from error
        yield product


def _product(
    record: Mapping[str, Any],
    mined: Mapping[str, Any],
    annotations: Iterable[Mapping[str, Any]],
    nouns: Callable[[str], Sequence[str] | None] | None,
    cleaned: bool,
) -> Product:
    title = record["name"]
    description = record["full_description"]
    if not isinstance(description, str):
        raise TypeError(f"full_description is {type(description).__name__}, not a string")
    bullets = record["small_description"]
    if cleaned:
        pricing = tuple(float(price) for price in record["pricing"])
        options = {name: tuple(values) for name, values in record["options"].items()}
    else:
        pricing = parse_pricing(record.get("pricing"))
        options = parse_options(record.get("customization_options"))
    known = None if nouns is None else nouns(title)
    return Product(
        asin=str(record["asin"]),
        title=title,
        description=description,
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
    if not text or not text.strip():
        return (_DEFAULT_PRICE,)
    prices = tuple(float(_NOT_A_NUMBER.sub("", part)) for part in text.split("$")[1:])
    return prices[:2] or (_DEFAULT_PRICE,)


def parse_options(customization: Mapping[str, Any] | None) -> dict[str, tuple[str, ...]]:
    """Return option name to values: lower-cased, stripped, ``/`` as `` | ``; null lists dropped."""
    options = {}
    for name, contents in (customization or {}).items():
        if contents is not None:
            options[name.lower()] = tuple(
                one["value"].strip().replace("/", " | ").lower() for one in contents
            )
    return options
