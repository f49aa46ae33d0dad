"""Search: BM25 over memory-mapped arrays, ranked as Lucene 8 with Anserini's settings does.

score = sum over query terms of ln(1 + (N - df + .5) / (df + .5)) · tf / (tf + k1 (1 - b +
b · dl / avgdl)), with k1 0.9 and b 0.4, in 32-bit floats a term; dl passes through Lucene's
one-byte length code, a repeated query term counts as often as it stands there, and equal scores
are ordered by ASIN. Terms are taken by the most they can add (MaxScore, Turtle and Flood 1995):
once no new document can reach the best ``top``, only those already found are scored further. What
is skipped cannot be in the result, so the ranking is that of scoring every document.
"""

from __future__ import annotations

import bisect
import functools
import math
import mmap
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pz_envs.webshop.analyzer import terms
from pz_envs.webshop.layout import Folder

TOP = 50
"""Products that a search returns at most."""

SMALL = 50_000
"""Documents up to which scoring them all is quicker than choosing."""

_CACHED_TERMS = 8192
# Mapped pages count as this process's memory until they are let go; the kernel keeps its copy.
_LET_GO_AFTER = 4 << 20
_PER_SEARCH = 1 << 18  # of the small arrays: ASINs, ranks, offsets, four records or more
_BLOCK = 1 << 16
# Doubles add 24-bit floats without rounding while their exponents lie this close together.
_EXACT_EXPONENTS = 29
_SLACK = 1e-5


@dataclass(frozen=True, slots=True)
class _Term:
    """A query term's postings ``[start, end)``, its factor, and the most it adds to a score."""

    start: int
    end: int
    factor: np.float32
    most: float


class SearchIndex:
    """A search over the index files of a shop folder.

    Args:
        folder: the shop.
        ranks: ``[N]`` place of each document's ASIN in ASIN order, for equal scores.
    """

    def __init__(self, folder: Folder, ranks: NDArray[np.uint32]) -> None:
        self._ranks = ranks
        self._filled = int(folder.facts["filled"])
        self._folder = folder
        self._terms = folder.view("terms")
        self._term_offsets = folder.array("term_offsets")
        self._numbers = folder.array("term_numbers")
        self._offsets = folder.array("posting_offsets")
        self._peaks = folder.array("peaks")
        self._shares = np.frombuffer(folder.bytes("shares"), dtype=np.float32)
        self._documents = folder.array("documents")
        self._codes = folder.array("codes")
        self._read = 0
        self._scores = np.zeros(len(ranks), dtype=np.float64)
        self._lock = threading.Lock()
        self._number = functools.lru_cache(maxsize=_CACHED_TERMS)(self._find)

    def search(self, query: str, top: int = TOP) -> NDArray[np.int64]:
        """Return the best documents' numbers, best first; none when no word is known."""
        found = []
        for term, times in Counter(terms(query)).items():
            number = self._number(term)
            if number is not None:
                found.append(self._term(number, times))
        if not found:
            return np.empty(0, dtype=np.int64)
        with self._lock:
            self._count_read(_PER_SEARCH)
            documents = self._candidates(found, top)
            best = self._best(documents, top) if len(documents) > top else documents
            single = self._scores[best].astype(np.float32)
            self._clear(documents, [])
        order = np.lexsort((self._ranks[best], -single))
        return best[order].astype(np.int64)

    def _best(self, documents: NDArray[np.uint32], top: int) -> NDArray[np.uint32]:
        """Return the ``top`` best documents in any order; of equal ones those of lowest rank."""
        least = np.float32(self._least(documents, top))
        above, equal = [], []
        for block in _blocks(documents):
            single = self._scores[block].astype(np.float32)
            above.append(block[single > least])
            equal.append(block[single == least])
        better, tied = np.concatenate(above), np.concatenate(equal)
        places = top - len(better)
        if len(tied) > places:
            tied = tied[np.argpartition(self._ranks[tied], places - 1)[:places]]
        return np.concatenate((better, tied))

    def _candidates(self, found: list[_Term], top: int) -> NDArray[np.uint32]:
        """Score documents into ``_scores``; return those that can be among the best ``top``.

        Every other score is 0 again.
        """
        if len(self._scores) <= SMALL:
            for term in found:
                own = self._documents[term.start : term.end]
                self._scores[own] += self._shares[self._codes[term.start : term.end]] * term.factor
            return np.flatnonzero(self._scores).astype(np.uint32)
        prunable = self._sums_are_exact(found)
        if prunable:
            found = sorted(found, key=lambda term: -term.most)
        rest = total = sum(term.most for term in found)
        documents = np.empty(0, dtype=np.uint32)
        least = 0.0
        for term in found:
            if prunable and not len(documents):
                least = self._least_of(term, top)
            elif prunable and rest < total - rest and len(documents) >= top:
                # No score is above what the terms so far add at most, so mostly it needs no look.
                least = max(least, self._least(documents, top))
            enough = least * (1 - _SLACK)
            if rest < enough:
                documents = self._kept(documents, enough - rest)
                self._add_to(documents, term)
            else:
                documents = self._add_all(documents, term, enough - (rest - term.most))
            rest -= term.most
        return documents

    def _add_all(
        self, documents: NDArray[np.uint32], term: _Term, floor: float
    ) -> NDArray[np.uint32]:
        """Add a term to all its documents, but to new ones only where it adds ``floor`` or more.

        Returns the documents found before and the new ones.
        """
        parts = [documents]
        for start, end in self._pieces(term):
            own = self._documents[start:end]
            added = self._shares[self._codes[start:end]] * term.factor
            if not len(documents) and floor > 0:
                own, added = own[added >= floor], added[added >= floor]
            places = own.astype(np.intp)
            before = self._scores[places]
            fresh = before == 0.0
            if len(documents) and floor > 0:
                added[fresh & (added < floor)] = 0.0
                fresh &= added > 0.0
            self._scores[places] = before + added
            parts.append(own[fresh])
        return np.concatenate(parts)

    def _pieces(self, term: _Term) -> Iterator[tuple[int, int]]:
        for start in range(term.start, term.end, _BLOCK):
            end = min(start + _BLOCK, term.end)
            yield start, end
            self._count_read((end - start) * 6)

    def _least_of(self, term: _Term, top: int) -> float:
        """Return the ``top``-th most that a term adds, 0 where it has fewer documents."""
        pieces = (
            self._shares[self._codes[start:end]] * term.factor for start, end in self._pieces(term)
        )
        return _top(pieces, top)

    def _add_to(self, documents: NDArray[np.uint32], term: _Term) -> None:
        """Add a term to those of ``documents`` that hold it."""
        own = self._documents[term.start : term.end]
        for block in _blocks(documents):
            places = np.searchsorted(own, block)
            places[places == len(own)] = 0
            held = own[places] == block
            codes = self._codes[term.start + places[held]]
            self._scores[block[held]] += self._shares[codes] * term.factor
            self._count_read(min(own.nbytes, len(block) * mmap.PAGESIZE))

    def _least(self, documents: NDArray[np.uint32], top: int) -> float:
        """Return the ``top``-th best score so far."""
        return _top((self._scores[block] for block in _blocks(documents)), top)

    def _kept(self, documents: NDArray[np.uint32], least: float) -> NDArray[np.uint32]:
        """Drop documents, and their scores, below ``least``."""
        kept = [block[self._scores[block] >= least] for block in _blocks(documents)]
        self._clear(documents, kept)
        return np.concatenate(kept)

    def _clear(self, documents: NDArray[np.uint32], kept: list[NDArray[np.uint32]]) -> None:
        """Set the scores of ``documents`` to 0, but for those ``kept``."""
        saved = [self._scores[block] for block in kept]
        if len(documents) > len(self._scores) // 8:
            self._scores.fill(0.0)
        else:
            self._scores[documents] = 0.0
        for block, scores in zip(kept, saved, strict=True):
            self._scores[block] = scores

    def _sums_are_exact(self, found: list[_Term]) -> bool:
        """Return whether a score is the same in whichever order its terms are added."""
        largest = max(term.most for term in found)
        smallest = min(float(self._shares.min() * term.factor) for term in found)
        spread = math.frexp(largest)[1] - math.frexp(smallest)[1]
        return smallest > 0 and spread + len(found).bit_length() <= _EXACT_EXPONENTS

    def _term(self, number: int, times: int) -> _Term:
        start, end = int(self._offsets[number]), int(self._offsets[number + 1])
        frequency = end - start
        weight = np.float32(np.log(1 + (self._filled - frequency + 0.5) / (frequency + 0.5)))
        factor = weight * np.float32(times)
        return _Term(start, end, factor, float(self._peaks[number] * factor))

    def _find(self, term: str) -> int | None:
        """Return a term's number by bisection of the sorted terms."""
        wanted = term.encode("utf-8", "surrogatepass")
        text, offsets = self._terms, self._term_offsets

        def at(place: int) -> bytes:
            return text[offsets[place] : offsets[place + 1]]

        place = bisect.bisect_left(range(len(self._numbers)), wanted, key=at)
        if place < len(self._numbers) and at(place) == wanted:
            return int(self._numbers[place])
        return None

    def _count_read(self, size: int) -> None:
        self._read += size
        if self._read >= _LET_GO_AFTER:
            self._read = 0
            self._folder.let_go()


def _blocks(documents: NDArray[np.uint32]) -> Iterator[NDArray[np.uint32]]:
    """Yield pieces small enough that what is computed of them stays small, too."""
    for start in range(0, max(1, len(documents)), _BLOCK):
        yield documents[start : start + _BLOCK]


def _top(pieces: Iterable[NDArray[Any]], top: int) -> float:
    """Return the ``top``-th largest value of all pieces, 0 where there are fewer."""
    best = np.empty(0)
    least = 0.0
    for piece in pieces:
        better = piece[piece > least] if least else piece
        if len(better):
            best = np.concatenate((best, better))
        if len(best) > top:
            best = np.partition(best, len(best) - top)[len(best) - top :]
        if len(best) == top:
            least = float(best.min())
    return least
