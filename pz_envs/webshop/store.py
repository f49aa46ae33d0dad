"""The shop: products, search and goals, on disk, memory-mapped, shared by a process's environments.

Every source becomes a shop folder: the built-in catalogue and plain files once, in the cache,
``pz-envs data import-webshop`` where it is told. A process holds a few thousand products and
queries at most; the rest stays on disk, in the kernel's cache, shared by all processes.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pz_envs.datasets import cache_dir, find_file
from pz_envs.errors import ConfigError, DataError
from pz_envs.webshop import catalogue, layout
from pz_envs.webshop.build import build_shop
from pz_envs.webshop.goals import GoalKind, Goals, check_kind, write_goals
from pz_envs.webshop.importing import build_from_files, find_source_files
from pz_envs.webshop.products import Product, Row, clean_products, unpacked
from pz_envs.webshop.search import SearchIndex

PUBLISHED = "products_1000"
"""The source name of the published 1,000-product shop."""

BUILT_IN = "builtin"
"""The source name of the catalogue that pz makes itself."""

_PUBLISHED_FILES = ("products_1000.jsonl.gz", "items_ins_v2_1000.json")
_CACHED_QUERIES = 1024
_CACHED_PRODUCTS = 1024
_LONGEST_CACHED = 500

_log = logging.getLogger(__name__)


class Products(Mapping[str, Product]):
    """The products of a shop by ASIN, in load order, read when asked for."""

    def __init__(self, folder: layout.Folder) -> None:
        self._folder = folder
        self._dictionary = folder.bytes("dictionary")
        self._offsets = folder.array("product_offsets")
        self._asins = folder.array("asins")
        self._order = folder.array("asin_order")
        self._file = open(folder.path / "products", "rb")  # noqa: SIM115  (lives as long as this)
        self.at = functools.lru_cache(maxsize=_CACHED_PRODUCTS)(self._read)
        """The product of a number in load order."""
        self.number = functools.lru_cache(maxsize=_CACHED_PRODUCTS)(self._find)
        """The number of an ASIN; KeyError where there is none."""

    def __len__(self) -> int:
        return len(self._asins)

    def __iter__(self) -> Iterator[str]:
        return iter(self.asins(slice(None)))

    def __getitem__(self, asin: str) -> Product:
        return self.at(self.number(asin))

    def asins(self, numbers: NDArray[np.int64] | slice) -> tuple[str, ...]:
        """Return the ASINs of numbers in load order."""
        return tuple(one.decode("utf-8", "surrogatepass") for one in self._asins[numbers].tolist())

    def _find(self, asin: str) -> int:
        wanted = asin.encode("utf-8", "surrogatepass")
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self._asins[self._order[middle]] < wanted:
                low = middle + 1
            else:
                high = middle
        if low < len(self) and self._asins[self._order[low]] == wanted:
            return int(self._order[low])
        raise KeyError(asin)

    def _read(self, number: int) -> Product:
        start, end = int(self._offsets[number]), int(self._offsets[number + 1])
        try:
            blob = os.pread(self._file.fileno(), end - start, start)
            data = zlib.decompressobj(zdict=self._dictionary).decompress(blob)
            return unpacked(data)
        except (zlib.error, ValueError, TypeError) as error:
            raise self._folder.damaged("products", f"product {number}: {error}") from error


class Prices(Mapping[str, float]):
    """The purchase price of every product of a shop, in dollars, by ASIN."""

    def __init__(self, products: Products, goals: Goals) -> None:
        self._products = products
        self._prices = goals.prices

    def __len__(self) -> int:
        return len(self._products)

    def __iter__(self) -> Iterator[str]:
        return iter(self._products)

    def __getitem__(self, asin: str) -> float:
        return float(self._prices[self._products.number(asin)])


class Shop:
    """Products and the search over them.

    ``nouns`` says where the nouns of titles came from: ``"given"`` by the data or the
    ``"lexicon"`` of closed word classes. ``fingerprint`` is a hash of all products.
    """

    def __init__(self, folder: layout.Folder) -> None:
        self._folder = folder
        self.name = str(folder.facts["name"])
        self.nouns = str(folder.facts["nouns"])
        self.fingerprint = str(folder.facts["fingerprint"])
        self.products = Products(folder)
        self._index = SearchIndex(folder, folder.array("asin_ranks"))
        self._cached_search = functools.lru_cache(maxsize=_CACHED_QUERIES)(self._search)
        self._drawn: dict[tuple[GoalKind, int], Goals] = {}

    def search(self, query: str) -> tuple[str, ...]:
        """Return at most 50 ASINs, best first; queries of usual length are remembered."""
        if len(query) > _LONGEST_CACHED:
            return self._search(query)
        return self._cached_search(query)

    def goals(self, kind: GoalKind, price_seed: int) -> tuple[Goals, Prices]:
        """Return the shuffled goals, and the purchase prices; drawn once, then read from disk.

        Raises:
            ConfigError: no such kind of goals.
        """
        check_kind(kind)
        key = (kind, price_seed)
        if key not in self._drawn:
            path = _cache() / "goals" / f"{self.fingerprint}-{kind}-{price_seed}"
            if not layout.is_folder(path):
                write_goals(self._folder, kind, price_seed, path)
            drawn = layout.open_folder(path, _delete(path))
            weights = self._folder.array("weights")
            self._drawn[key] = Goals(drawn, kind, self.products.at, weights)
        return self._drawn[key], Prices(self.products, self._drawn[key])

    def _search(self, query: str) -> tuple[str, ...]:
        return self.products.asins(self._index.search(query))


def open_shop(source: str, num_products: int | None) -> Shop:
    """Return the shop of a source; the same object for the same files.

    Args:
        source: ``"builtin"``, ``"products_1000"``, a shop folder of ``import-webshop``, or a folder
            that holds ``items_shuffle*.json``, ``items_ins_v2*.json`` and, for human goals,
            ``items_human_ins.json``. The folder may also hold ``title_nouns.json`` (title to
            nouns).
        num_products: how many records to take; None for all.

    Raises:
        ConfigError: ``num_products`` is below 1, or given for a shop folder.
        DataError: files are missing or broken.
        InfraError: the cache cannot be written.
    """
    if num_products is not None and num_products < 1:
        raise ConfigError(f"num_products={num_products}: at least 1 is needed, or None for all")
    folder = Path(source).expanduser()
    if source not in (BUILT_IN, PUBLISHED) and layout.is_folder(folder):
        if num_products is not None:
            raise ConfigError(
                f"{source} is a shop folder and has its number of products; leave num_products out,"
                " or import again: pz-envs data import-webshop SOURCE TARGET --num-products N"
            )
        again = f"Make it again: pz-envs data import-webshop SOURCE {folder}"
        return _opened(folder.resolve(), again)
    plan = _plan(source, folder, num_products)
    path = _cache() / f"{plan.name}-{plan.key()}"
    if not layout.is_folder(path):
        _log.info("building the shop %s in %s", plan.name, path)
        plan.build(path)
    return _opened(path, _delete(path))


@dataclass(frozen=True, slots=True)
class _Plan:
    """How to build a shop that is kept in the cache: its name, what it depends on, the builder."""

    name: str
    depends: tuple[object, ...]
    build: Callable[[Path], None]

    def key(self) -> str:
        """Return a name for this very content."""
        text = repr((layout.VERSION, *self.depends))
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _plan(source: str, folder: Path, num_products: int | None) -> _Plan:
    if source == BUILT_IN:
        size = catalogue.DEFAULT_SIZE if num_products is None else num_products
        catalogue.check_size(size)
        name = f"{BUILT_IN}-{size}"

        def made(path: Path) -> None:
            products = clean_products(catalogue.generate(size))
            build_shop(products, path, name=name, nouns="lexicon")

        return _Plan(name, (catalogue.EDITION, size), made)
    if source == PUBLISHED:
        items, attributes = _published_files()

        def published(path: Path) -> None:
            rows = _published_rows(items, attributes, num_products)
            products = clean_products(rows, cleaned=True)
            build_shop(products, path, name=PUBLISHED, nouns="lexicon")

        return _Plan(PUBLISHED, (*_versions(items, attributes), num_products), published)
    if not folder.is_dir():
        raise DataError(
            f"No WebShop data at {source}. Allowed: '{BUILT_IN}', '{PUBLISHED}', a shop folder, or "
            "a folder with items_shuffle*.json and items_ins_v2*.json"
        )
    files = find_source_files(folder)
    name = folder.resolve().name

    def imported(path: Path) -> None:
        build_from_files(files, path, name, num_products)

    return _Plan(name, (*_versions(*files.present()), num_products), imported)


@functools.lru_cache(maxsize=8)
def _opened(path: Path, remedy: str) -> Shop:
    return Shop(layout.open_folder(path, remedy))


def _cache() -> Path:
    return cache_dir() / "webshop"


def _delete(path: Path) -> str:
    return f"It is remade when it is gone: rm -r '{path}'"


def _versions(*paths: Path) -> tuple[tuple[str, int, int], ...]:
    found = ((path.resolve(), path.stat()) for path in paths)
    return tuple((str(path), status.st_size, status.st_mtime_ns) for path, status in found)


def _published_files() -> tuple[Path, Path]:
    items, attributes = (find_file("webshop", name) for name in _PUBLISHED_FILES)
    if items is None or attributes is None:
        raise DataError(
            f"webshop/{' and webshop/'.join(_PUBLISHED_FILES)} are not here. Set PZ_DATA to a "
            "folder that holds them, pass source= a folder with the files of WebShop's own "
            "setup.sh (items_shuffle_1000.json, items_ins_v2_1000.json), or use source='builtin'"
        )
    return items, attributes


def _published_rows(items: Path, attributes: Path, num_products: int | None) -> Iterator[Row]:
    """Yield the rows of the published small shop, whose records were cleaned before."""
    mined = _json(attributes, _text(attributes))
    for line in _text(items).splitlines()[:num_products]:
        record = _json(items, line)
        yield record, mined.get(record["asin"], {}), record.get("instructions", ())


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error
