"""Search: BM25 over numpy arrays, scored and ranked as Lucene 8 with Anserini's settings does.

score = sum over query terms of ln(1 + (N - df + .5) / (df + .5)) · tf / (tf + k1 (1 - b +
b · dl / avgdl)), with k1 0.9 and b 0.4, in 32-bit floats a term; dl passes through Lucene's
one-byte length code, a repeated query term counts as often as it stands there, and equal scores
are ordered by ASIN. The index lives in memory: 8 bytes a posting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pz_envs.webshop.analyzer import terms

TOP = 50
"""Products that a search returns at most."""

_K1 = np.float32(0.9)
_B = np.float32(0.4)


class SearchIndex:
    """An inverted index over texts by ASIN.

    Args:
        texts: ASIN to the text that is searched.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._asins = sorted(texts)
        counts = [Counter(terms(texts[asin])) for asin in self._asins]
        lengths = np.array([count.total() for count in counts], dtype=np.int64)
        average = np.float32(lengths.sum() / max(1, np.count_nonzero(lengths)))
        norms = _norms(lengths, average)
        postings: dict[str, list[tuple[int, int]]] = {}
        for document, count in enumerate(counts):
            for term, frequency in count.items():
                postings.setdefault(term, []).append((document, frequency))
        size = int(np.count_nonzero(lengths))
        self._postings = {
            term: _weighted(np.array(pairs, dtype=np.int64), norms, size)
            for term, pairs in postings.items()
        }

    def search(self, query: str, top: int = TOP) -> tuple[str, ...]:
        """Return the ASINs of the best products, best first; none when no word is known."""
        scores = np.zeros(len(self._asins), dtype=np.float64)
        for term, times in Counter(terms(query)).items():
            found = self._postings.get(term)
            if found is not None:
                documents, shares, weight = found
                scores[documents] += shares * (weight * np.float32(times))
        single = scores.astype(np.float32)
        hits = np.flatnonzero(single)
        order = np.argsort(-single[hits], kind="stable")[:top]
        return tuple(self._asins[document] for document in hits[order])


def _norms(lengths: NDArray[np.int64], average: np.float32) -> NDArray[np.float32]:
    """Return k1 (1 - b + b · dl / avgdl) of each document."""
    coded = np.array([decoded_length(int(length)) for length in lengths], dtype=np.float32)
    one = np.float32(1)
    return np.asarray(_K1 * ((one - _B) + _B * coded / average), dtype=np.float32)


def _weighted(
    pairs: NDArray[np.int64], norms: NDArray[np.float32], size: int
) -> tuple[NDArray[np.int32], NDArray[np.float32], np.float32]:
    """Return a term's documents, its saturated frequency in each, and its weight."""
    documents = pairs[:, 0].astype(np.int32)
    frequency = len(pairs)
    weight = np.float32(np.log(1 + (size - frequency + 0.5) / (frequency + 0.5)))
    tf = pairs[:, 1].astype(np.float64)
    share = (tf / (tf + norms[documents])).astype(np.float32)
    return documents, share, weight


def decoded_length(length: int) -> int:
    """Return ``length`` as Lucene's one-byte code keeps it: exact below 40, then 4 leading bits."""
    if length < 24:
        return length
    rest = length - 24
    bits = rest.bit_length()
    return 24 + (rest if bits < 4 else rest >> (bits - 4) << (bits - 4))
