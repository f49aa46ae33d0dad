"""Building the search index: texts in, sorted runs on disk, merged postings out.

Memory is bounded but for the vocabulary: texts are reduced to (term, document, code) triples, a
run of them at a time is sorted and put aside, and the runs are merged by ranges of terms. A code
stands for a pair of term frequency and length class, so that a posting's share of the BM25 score
is one look-up in a small table, exact to the bit.
"""

from __future__ import annotations

import bisect
import os
from array import array
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pz_envs.webshop.analyzer import terms
from pz_envs.webshop.layout import FolderWriter

_K1 = np.float32(0.9)
_B = np.float32(0.4)
_RUN_TOKENS = 2_000_000
_MERGE_POSTINGS = 4_000_000
_WORD = 4
_CHUNKS_KEPT = 500_000


class _Numbers(dict[object, int]):
    """Gives every new key the next number."""

    def __missing__(self, key: object) -> int:
        number = self[key] = len(self)
        return number


class _Chunks(dict[str, tuple[int, ...]]):
    """The term numbers of every piece of text between spaces, worked out when first met.

    No word reaches over a space, so a text's terms are those of its pieces.
    """

    def __init__(self, numbers: _Numbers) -> None:
        super().__init__()
        self._numbers = numbers

    def __missing__(self, chunk: str) -> tuple[int, ...]:
        if len(self) >= _CHUNKS_KEPT:
            self.clear()
        found = self[chunk] = tuple(self._numbers[term] for term in terms(chunk))
        return found


class IndexBuilder:
    """Collects texts, then writes the index files.

    Documents are numbered in the order of ``add``. The files: ``terms`` (sorted, joined),
    ``term_offsets`` into it, ``term_numbers`` (sorted place to number), ``posting_offsets`` by
    number, ``documents`` and ``codes`` of all postings, ``shares`` by code, ``peaks`` (the
    largest share of each term, by number).
    """

    def __init__(self, writer: FolderWriter) -> None:
        self._writer = writer
        self._path = writer.scratch("runs")
        self._file: BinaryIO = open(self._path, "w+b")  # noqa: SIM115  (closed by finish or close)
        self._runs: list[tuple[int, int]] = []
        self._terms = _Numbers()
        self._chunks = _Chunks(self._terms)
        self._codes = _Numbers()
        self._tokens = array("I")
        self._lengths = array("I")
        self._documents = 0
        self._filled = 0
        self._total = 0

    def add(self, text: str) -> None:
        """Take up the next document."""
        numbers_of = self._chunks
        found = [number for chunk in text.split(" ") for number in numbers_of[chunk]]
        self._tokens.extend(found)
        self._lengths.append(len(found))
        self._filled += bool(found)
        self._total += len(found)
        if len(self._tokens) >= _RUN_TOKENS:
            self._flush()

    def close(self) -> None:
        """Close the file of runs; safe to call twice."""
        self._file.close()

    def finish(self) -> int:
        """Merge the runs and write the files; return the number of documents with any term."""
        self._flush()
        average = np.float32(self._total / max(1, self._filled))
        pairs = np.array(list(self._codes), dtype=np.int64).reshape(-1, 2)
        shares = _shares(pairs, average)
        self._write_terms()
        self._write_postings(shares)
        self._writer.save("shares", shares)
        self.close()
        return self._filled

    def _flush(self) -> None:
        """Sort the tokens at hand by term and document, count them, put the run aside."""
        if not self._lengths:
            return
        lengths = np.frombuffer(self._lengths, dtype=np.uint32).astype(np.int64)
        place = np.repeat(np.arange(len(lengths), dtype=np.uint64), lengths)
        keys = np.frombuffer(self._tokens, dtype=np.uint32).astype(np.uint64) << np.uint64(32)
        keys |= place
        keys.sort()
        new = np.ones(len(keys), dtype=bool)
        new[1:] = keys[1:] != keys[:-1]
        first = np.flatnonzero(new)
        counts = np.append(first[1:], len(keys))[: len(first)] - first
        keys = keys[first]
        local = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
        coded = np.array([decoded_length(length) for length in lengths.tolist()], dtype=np.int64)
        pairs, inverse = np.unique((counts << 32) | coded[local], return_inverse=True)
        numbered = [self._codes[(pair >> 32, pair & 0xFFFFFFFF)] for pair in pairs.tolist()]
        codes = np.array(numbered, dtype=np.uint32)[inverse]
        self._runs.append((self._file.tell(), len(keys)))
        for part in ((keys >> np.uint64(32)), local + self._documents, codes):
            self._file.write(part.astype(np.uint32).tobytes())
        self._documents += len(lengths)
        self._tokens = array("I")
        self._lengths = array("I")

    def _write_terms(self) -> None:
        encoded = [str(term).encode("utf-8", "surrogatepass") for term in self._terms]
        order = sorted(range(len(encoded)), key=encoded.__getitem__)
        with open(self._writer.add("terms", np.uint8), "wb") as file:
            file.writelines(encoded[number] for number in order)
        sizes = [len(encoded[number]) for number in order]
        self._writer.save("term_offsets", np.cumsum([0, *sizes], dtype=np.int64))
        self._writer.save("term_numbers", np.array(order, dtype=np.uint32))

    def _write_postings(self, shares: NDArray[np.float32]) -> None:
        self._file.flush()
        frequencies = np.zeros(len(self._terms), dtype=np.int64)
        for start, count in self._runs:
            frequencies += np.bincount(self._read(start, count), minlength=len(frequencies))
        offsets = np.concatenate(([0], np.cumsum(frequencies)))
        self._writer.save("posting_offsets", offsets.astype(np.int64))
        wide = len(shares) > np.iinfo(np.uint16).max
        code_type = np.uint32 if wide else np.uint16
        peaks = np.zeros(len(frequencies), dtype=np.float32)
        with (
            open(self._writer.add("documents", np.uint32), "wb") as documents_file,
            open(self._writer.add("codes", code_type), "wb") as codes_file,
        ):
            for first, last in _ranges(offsets):
                documents, codes = self._merged(first, last)
                documents_file.write(documents.tobytes())
                codes_file.write(codes.astype(code_type).tobytes())
                starts = offsets[first:last] - offsets[first]
                peaks[first:last] = np.maximum.reduceat(shares[codes], starts)
        self._writer.save("peaks", peaks)

    def _merged(self, first: int, last: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Return the documents and codes of the terms ``first`` to ``last``, in order."""
        parts = []
        for start, count in self._runs:
            low = self._place(start, count, first)
            high = self._place(start, count, last)
            columns = [
                self._read(start + column * count * _WORD + low * _WORD, high - low)
                for column in range(3)
            ]
            parts.append(np.stack(columns))
        joined = np.concatenate(parts, axis=1)
        # Runs hold ascending documents, so a stable sort by term keeps each term's in order.
        order = np.argsort(joined[0], kind="stable")
        return joined[1][order], joined[2][order]

    def _place(self, start: int, count: int, term: int) -> int:
        """Return where ``term`` begins in a run."""
        descriptor = self._file.fileno()

        def at(place: int) -> int:
            return int.from_bytes(os.pread(descriptor, _WORD, start + place * _WORD), "little")

        return bisect.bisect_left(range(count), term, key=at)

    def _read(self, start: int, count: int) -> NDArray[np.uint32]:
        data = os.pread(self._file.fileno(), count * _WORD, start)
        return np.frombuffer(data, dtype=np.uint32)


def decoded_length(length: int) -> int:
    """Return ``length`` as Lucene's one-byte code keeps it: exact below 40, then 4 leading bits."""
    if length < 24:
        return length
    rest = length - 24
    bits = rest.bit_length()
    return 24 + (rest if bits < 4 else rest >> (bits - 4) << (bits - 4))


def _shares(pairs: NDArray[np.int64], average: np.float32) -> NDArray[np.float32]:
    """Return tf / (tf + k1 (1 - b + b · dl / avgdl)) for rows of tf and dl."""
    one = np.float32(1)
    coded = pairs[:, 1].astype(np.float32)
    norms = (_K1 * ((one - _B) + _B * coded / average)).astype(np.float32)
    frequency = pairs[:, 0].astype(np.float64)
    return np.asarray(frequency / (frequency + norms), dtype=np.float32)


def _ranges(offsets: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield ranges of terms with about ``_MERGE_POSTINGS`` postings each, at least one term."""
    first, terms_in_all = 0, len(offsets) - 1
    while first < terms_in_all:
        last = int(np.searchsorted(offsets, offsets[first] + _MERGE_POSTINGS, side="right")) - 1
        last = min(max(last, first + 1), terms_in_all)
        yield first, last
        first = last
