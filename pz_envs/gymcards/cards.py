"""Playing cards and the two deals of the formula games.

A deck is infinite: every card is drawn from all 52, whatever was drawn before. Jack, queen and
king count 10 and the ace 1; what else an ace may count is Blackjack's own business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SUITS = "CDHS"
_FACES = {1: "A", 11: "J", 12: "Q", 13: "K"}
_EZPOINTS_FACTORS = (2, 3, 4, 6)


@dataclass(frozen=True, slots=True)
class Card:
    """A card by its number in the deck: ``index`` in [0, 52), four suits of thirteen ranks."""

    index: int

    @property
    def rank(self) -> int:
        """Ace 1, jack 11, queen 12, king 13."""
        return self.index % 13 + 1

    @property
    def value(self) -> int:
        """What the card counts: 1 to 10."""
        return min(self.rank, 10)

    def __str__(self) -> str:
        """Rank and suit, e.g. ``KH`` or ``10S``."""
        return f"{_FACES.get(self.rank, self.rank)}{_SUITS[self.index // 13]}"


def shown(cards: Sequence[Card]) -> str:
    """Return the cards' names with spaces between."""
    return " ".join(map(str, cards))


def draw(rng: np.random.Generator, count: int) -> tuple[Card, ...]:
    """Return ``count`` cards of an infinite deck."""
    return tuple(Card(int(index)) for index in rng.integers(0, 52, count))


def deal_ezpoints(rng: np.random.Generator) -> tuple[Card, ...]:
    """Return two cards that make 12 by a sum or a product, as the original deals them.

    The first has rank 2 to 13; the second completes a product when the first divides 12 and a coin
    says so, else a sum; another coin swaps them.
    """
    rank = int(rng.integers(2, 14))
    value = min(rank, 10)
    by_product = value in _EZPOINTS_FACTORS and rng.random() <= 0.5
    other = 12 // value if by_product else 12 - value
    first, second = (
        Card(13 * int(suit) + number - 1)
        for suit, number in zip(rng.integers(0, 4, 2), (rank, other), strict=True)
    )
    return (second, first) if rng.random() <= 0.5 else (first, second)
