"""Texts as hashed n-grams: every distinct string is read once and then known by a number.

An observation or a command is the bag of its words and pairs of neighbouring words, each hashed by
crc32 into a fixed number of buckets. Nothing is pretrained and nothing is downloaded; two texts
with the same bag are the same to the model. A state's text should name its admissible commands:
without them, a quarter of the observations of a text game stand for more than one state.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

BUCKETS = 16_384
_WORDS = re.compile(r"[a-z0-9']+|[^\sa-z0-9']")
_NOTHING = np.zeros(1, np.int64)


class Bags(NamedTuple):
    """Texts as ``torch.nn.EmbeddingBag`` takes them: flat bucket ids and where each text begins."""

    ids: torch.Tensor
    offsets: torch.Tensor


def features(text: str, buckets: int = BUCKETS) -> NDArray[np.int64]:
    """Return the bucket of every word and of every pair of neighbouring words: [N], N at least 1.

    Words are lower case; every other visible sign is a word of its own. A text without words is
    bucket 0.
    """
    words = _WORDS.findall(text.lower())
    if not words:
        return _NOTHING
    pairs = map(" ".join, itertools.pairwise(words))
    hashed = [zlib.crc32(gram.encode()) % buckets for gram in (*words, *pairs)]
    return np.array(hashed, np.int64)


def state_text(observation: str, commands: Iterable[str] | None) -> str:
    """Return what the model reads of a state: the observation, then its admissible commands."""
    if commands is None:
        return observation
    return f"{observation}\nCommands: {'; '.join(commands)}"


class Texts:
    """Numbers strings in the order in which they come, and keeps their features.

    Ids never change, so segments, vocabularies and caches can hold them in place of strings.

    Args:
        buckets: of the hashed n-grams.
        encode: a frozen encoder, from a text to its vector [W]; states are then read by it, each
            distinct one once. Commands stay n-grams.

    Attributes:
        vectors: of states that were read by the frozen encoder, by number.
    """

    def __init__(
        self, buckets: int = BUCKETS, encode: Callable[[str], torch.Tensor] | None = None
    ) -> None:
        self._buckets, self._encode = buckets, encode
        self.vectors: dict[int, torch.Tensor] = {}
        self._ids: dict[str, int] = {}
        self._strings: list[str] = []
        self._features: list[NDArray[np.int64]] = []

    def __len__(self) -> int:
        """Return how many distinct strings there are."""
        return len(self._strings)

    def intern(self, text: str) -> int:
        """Return the string's number, a new one if it was never seen."""
        known = self._ids.get(text)
        if known is None:
            known = self._ids[text] = len(self._strings)
            self._strings.append(text)
            self._features.append(features(text, self._buckets))
        return known

    def string(self, number: int) -> str:
        """Return the string of that number."""
        return self._strings[number]

    def strings(self) -> tuple[str, ...]:
        """Return all strings in order of their numbers; interning them anew gives the same ones."""
        return tuple(self._strings)

    def states(self, numbers: Sequence[int]) -> Bags | torch.Tensor:
        """Return what the model reads of states: bags, or the frozen encoder's vectors [N, W]."""
        if self._encode is None:
            return self.bags(numbers)
        for number in numbers:
            if number not in self.vectors:
                self.vectors[number] = self._encode(self._strings[number])
        return torch.stack([self.vectors[number] for number in numbers])

    def bags(self, numbers: Sequence[int] | NDArray[np.int64]) -> Bags:
        """Return the features of texts, one after another."""
        found = [self._features[int(number)] for number in numbers]
        sizes = np.array([len(each) for each in found], np.int64)
        ids = np.concatenate(found) if found else np.zeros(0, np.int64)
        return Bags(torch.from_numpy(ids), torch.from_numpy(np.cumsum(sizes) - sizes))
