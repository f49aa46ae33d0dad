"""The shop: products, search and goals, read once a process and shared by its environments.

Sources are the built-in catalogue, the published 1,000-product set, or a folder with the
original's own files. Nothing here changes after loading, except caches.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pz_envs.datasets import find_file
from pz_envs.errors import ConfigError, DataError
from pz_envs.webshop import catalogue
from pz_envs.webshop.goals import Goal, GoalKind, make_goals, purchase_prices
from pz_envs.webshop.products import Product, clean_products
from pz_envs.webshop.search import SearchIndex

PUBLISHED = "products_1000"
"""The source name of the published 1,000-product shop."""

BUILT_IN = "builtin"
"""The source name of the catalogue that ships with pz."""

_PUBLISHED_FILES = ("products_1000.jsonl.gz", "items_ins_v2_1000.json")
_CACHED_QUERIES = 20_000
_LONGEST_CACHED = 500


class Shop:
    """Products and the search over them.

    ``products`` maps ASIN to product in load order; ``nouns`` says where the nouns of titles came
    from: ``"given"`` by the data or the ``"lexicon"`` of closed word classes.
    """

    def __init__(self, name: str, products: Sequence[Product], *, nouns: str) -> None:
        if not products:
            raise DataError(f"the shop `{name}` holds no products")
        self.name = name
        self.nouns = nouns
        self.products: Mapping[str, Product] = {product.asin: product for product in products}
        self._index = SearchIndex({one.asin: one.indexed_text() for one in products})
        self._cached_search = functools.lru_cache(maxsize=_CACHED_QUERIES)(self._index.search)
        digest = hashlib.blake2b(digest_size=8)
        for product in products:
            digest.update(repr(product).encode("utf-8", "surrogatepass"))
        self.fingerprint = digest.hexdigest()
        self._drawn: dict[tuple[GoalKind, int], tuple[tuple[Goal, ...], dict[str, float]]] = {}

    def search(self, query: str) -> tuple[str, ...]:
        """Return at most 50 ASINs, best first; queries of usual length are remembered."""
        if len(query) > _LONGEST_CACHED:
            return self._index.search(query)
        return self._cached_search(query)

    def goals(
        self, kind: GoalKind, price_seed: int
    ) -> tuple[tuple[Goal, ...], Mapping[str, float]]:
        """Return the shuffled goals, and the purchase price of every ASIN in dollars."""
        key = (kind, price_seed)
        if key not in self._drawn:
            rng = random.Random(price_seed)
            products = tuple(self.products.values())
            prices = purchase_prices(products, rng)
            self._drawn[key] = (make_goals(products, prices, kind, rng), prices)
        return self._drawn[key]


def open_shop(source: str, num_products: int | None) -> Shop:
    """Return the shop of a source; the same object for the same files.

    Args:
        source: ``"builtin"``, ``"products_1000"``, or a folder that holds ``items_shuffle*.json``,
            ``items_ins_v2*.json`` and, for human goals, ``items_human_ins.json``. The folder may
            also hold ``title_nouns.json`` (title to nouns).
        num_products: how many records to take; None for all.

    Raises:
        ConfigError: ``num_products`` is below 1.
        DataError: files are missing or broken.
    """
    if num_products is not None and num_products < 1:
        raise ConfigError(f"num_products={num_products}: at least 1 is needed, or None for all")
    if source == BUILT_IN:
        return _built_in(num_products or catalogue.DEFAULT_SIZE)
    files = _published_files() if source == PUBLISHED else _folder_files(source)
    versions = tuple(
        (path, path.stat().st_size, path.stat().st_mtime_ns) for path in files if path is not None
    )
    return _from_files(source, versions, num_products)


@functools.lru_cache(maxsize=4)
def _built_in(size: int) -> Shop:
    records, attributes, annotations = catalogue.generate(size)
    products = clean_products(records, attributes, annotations)
    return Shop(f"{BUILT_IN}-{size}", products, nouns="lexicon")


@functools.lru_cache(maxsize=2)
def _from_files(
    source: str, versions: tuple[tuple[Path, int, int], ...], num_products: int | None
) -> Shop:
    paths = [path for path, _, _ in versions]
    if source == PUBLISHED:
        records = [json.loads(line) for line in _text(paths[0]).splitlines()]
        annotations = {one["asin"]: one["instructions"] for one in records if "instructions" in one}
        attributes = _json(paths[1])
        products = clean_products(
            records, attributes, annotations, cleaned=True, num_products=num_products
        )
        return Shop(source, products, nouns="lexicon")
    by_name = {path.name.split(".")[0]: path for path in paths}
    nouns = _json(by_name["title_nouns"]) if "title_nouns" in by_name else None
    people = _json(by_name["items_human_ins"]) if "items_human_ins" in by_name else {}
    products = clean_products(
        _json(paths[0]), _json(paths[1]), people, nouns=nouns, num_products=num_products
    )
    return Shop(
        Path(source).expanduser().name, products, nouns="lexicon" if nouns is None else "given"
    )


def _published_files() -> list[Path | None]:
    found = [find_file("webshop", name) for name in _PUBLISHED_FILES]
    if None in found:
        raise DataError(
            f"webshop/{' and webshop/'.join(_PUBLISHED_FILES)} are not here. Set PZ_DATA to a "
            "folder that holds them, pass source= a folder with the files of WebShop's own "
            "setup.sh (items_shuffle_1000.json, items_ins_v2_1000.json), or use source='builtin'"
        )
    return found


def _folder_files(source: str) -> list[Path | None]:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"No WebShop data at {source}. Allowed: '{BUILT_IN}', '{PUBLISHED}', or a folder with "
            "items_shuffle*.json and items_ins_v2*.json"
        )
    files: list[Path | None] = []
    for pattern in ("items_shuffle*.json", "items_ins_v2*.json"):
        matching = sorted(folder.glob(pattern))
        if len(matching) != 1:
            raise DataError(
                f"{folder} holds {len(matching)} files {pattern}; exactly one is needed"
            )
        files.append(matching[0])
    optional = (folder / name for name in ("items_human_ins.json", "title_nouns.json"))
    return files + [path for path in optional if path.is_file()]


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error
