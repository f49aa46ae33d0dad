"""From a stream of products to a shop folder: records, what goals need, and the search index.

Products are written as they come, each a zlib blob with a common dictionary made of the first few;
memory holds the vocabulary, the ASINs and a few numbers a product. Leaving half-way (an error, an
interrupt) leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from pz_envs.errors import DataError
from pz_envs.webshop.indexing import IndexBuilder
from pz_envs.webshop.layout import FolderWriter
from pz_envs.webshop.products import Product, packed

NO_INSTRUCTION = -1
"""The count of synthetic goals of a product without a machine-made instruction."""

_DICTIONARY_PRODUCTS = 64
_DICTIONARY_BYTES = 32_768
_LEVEL = 1
_REPORT_EVERY = 500

OnProgress = Callable[[int], None]


def build_shop(
    products: Iterable[Product],
    target: Path,
    *,
    name: str,
    nouns: str,
    on_progress: OnProgress | None = None,
) -> None:
    """Write the shop folder ``target``.

    Args:
        products: in load order, no ASIN twice.
        target: the folder to make.
        name: the shop's name in task ids.
        nouns: where the nouns of titles came from: ``"given"`` or ``"lexicon"``.
        on_progress: called with the number of products done, now and then and at the end.

    Raises:
        DataError: there are no products.
        InfraError: ``target`` cannot be written.
    """
    stream = iter(products)
    with FolderWriter(target) as writer:
        first = list(itertools.islice(stream, _DICTIONARY_PRODUCTS))
        if not first:
            raise DataError(f"the shop `{name}` holds no products")
        dictionary = b"".join(packed(product) for product in first)[-_DICTIONARY_BYTES:]
        index = IndexBuilder(writer)
        try:
            writer.save("dictionary", np.frombuffer(dictionary, dtype=np.uint8))
            records = _Records(writer, dictionary)
            goals = _GoalFacts()
            for product in itertools.chain(first, stream):
                records.add(product)
                goals.add(product)
                index.add(product.indexed_text())
                if on_progress is not None and len(records) % _REPORT_EVERY == 0:
                    on_progress(len(records))
            records.finish()
            goals.finish(writer)
            filled = index.finish()
        finally:
            index.close()
        writer.finish(
            {
                "name": name,
                "nouns": nouns,
                "products": len(records),
                "filled": filled,
                "fingerprint": records.fingerprint,
            }
        )
        if on_progress is not None:
            on_progress(len(records))


class _Records:
    """Writes ``products`` (blobs), their ``product_offsets``, and ASINs with their order."""

    def __init__(self, writer: FolderWriter, dictionary: bytes) -> None:
        self._writer = writer
        # Copying a compressor that has its dictionary costs half of giving it to a new one.
        self._primed = zlib.compressobj(_LEVEL, zdict=dictionary)
        self._file = open(writer.add("products", np.uint8), "wb")  # noqa: SIM115
        self._offsets = array("q", [0])
        self._asins: list[bytes] = []
        self._digest = hashlib.blake2b(digest_size=8)

    def __len__(self) -> int:
        return len(self._asins)

    @property
    def fingerprint(self) -> str:
        """A hash of all records."""
        return self._digest.hexdigest()

    def add(self, product: Product) -> None:
        data = packed(product)
        self._digest.update(data)
        packer = self._primed.copy()
        blob = packer.compress(data) + packer.flush()
        self._file.write(blob)
        self._offsets.append(self._offsets[-1] + len(blob))
        self._asins.append(product.asin.encode("utf-8", "surrogatepass"))

    def finish(self) -> None:
        self._file.close()
        self._writer.save("product_offsets", np.array(self._offsets, dtype=np.int64))
        asins = np.array(self._asins)
        order = np.argsort(asins, kind="stable").astype(np.uint32)
        ranks = np.empty_like(order)
        ranks[order] = np.arange(len(order), dtype=np.uint32)
        for name, values in (("asins", asins), ("asin_order", order), ("asin_ranks", ranks)):
            self._writer.save(name, values)


class _GoalFacts:
    """Collects what goals need of every product: prices, how many goals, and their weight.

    ``pricing`` ``[N, 2]`` in dollars, the second NaN where there is one price; ``human`` and
    ``synthetic`` ``[N]`` count goals; ``weights`` ``[N]`` is that of a synthetic goal.
    """

    def __init__(self) -> None:
        self._pricing = array("d")
        self._human = array("q")
        self._synthetic = array("q")
        self._attributes: list[tuple[int, ...]] = []
        self._numbers: dict[str, int] = {}
        self._counts: Counter[int] = Counter()

    def add(self, product: Product) -> None:
        low, high = (*product.pricing, math.nan)[:2]
        self._pricing.extend((low, high))
        self._human.append(sum(bool(one.attributes) for one in product.annotations))
        combinations = NO_INSTRUCTION
        wanted: tuple[int, ...] = ()
        if product.instruction is not None and product.instruction_attributes:
            combinations = math.prod(len(values) for values in product.options.values())
            wanted = tuple(
                self._numbers.setdefault(attribute, len(self._numbers))
                for attribute in product.instruction_attributes
            )
            for attribute in wanted:
                self._counts[attribute] += combinations
        self._synthetic.append(combinations)
        self._attributes.append(wanted)

    def finish(self, writer: FolderWriter) -> None:
        counts = self._counts
        weights = [
            sum(1.0 / counts[one] for one in wanted) / len(wanted) if wanted and many > 0 else 0.0
            for wanted, many in zip(self._attributes, self._synthetic, strict=True)
        ]
        writer.save("pricing", np.array(self._pricing, dtype=np.float64))
        writer.save("human", np.array(self._human, dtype=np.int64))
        writer.save("synthetic", np.array(self._synthetic, dtype=np.int64))
        writer.save("weights", np.array(weights, dtype=np.float64))
