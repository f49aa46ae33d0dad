"""A table of cards as pixels, for models that see: plain numpy, no fonts, no image library.

Every picture has the same size, so that those of many environments stack. Characters are 5 x 7
dots; a glyph is seven digits to the base 32, one a row, whose bits are the dots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pz_envs.gymcards.cards import Card

HEIGHT, WIDTH = 240, 320
"""Pixels of every picture."""

_GLYPHS = {
    **{"0": "EHJLPHE", "1": "4C4444E", "2": "EH1248V", "3": "V2421HE", "4": "26AIV22"},
    **{"5": "VGU11HE", "6": "68GUHHE", "7": "V124888", "8": "EHHEHHE", "9": "EHHF12C"},
    **{"A": "EHHVHHH", "C": "EHGGGHE", "D": "SIHHHIS", "E": "VGGUGGV", "G": "EHGNHHF"},
    **{"J": "72222IC", "K": "HIKOKIH", "L": "GGGGGGV", "N": "HHPLJHH", "O": "EHHHHHE"},
    **{"Q": "EHHHLID", "R": "UHHUKIH", "T": "V444444", "U": "HHHHHHE", "Y": "HHA4444"},
    **{"+": "044V440", "-": "000V000", "*": "04LEL40", "/": "01248G0", "(": "2488842"},
    **{")": "8422248", "=": "00V0V00", "_": "000000V", "?": "EH12404", " ": "0000000"},
    **{"♣": "EELVL4E", "♦": "04EVE40", "♥": "0AVVE40", "♠": "04EVVLE"},
}
_SUITS = "♣♦♥♠"  # in the order of the deck
_DOT = 3
_LINE, _ROW, _CARD = 33, 84, 56  # heights of a line and of a row of cards, width of a card
_LINE_CHARACTERS = (WIDTH - 16) // (6 * _DOT)
_FELT, _PAPER, _BACK = (16, 96, 56), (255, 255, 255), (40, 60, 160)
_RED, _BLACK = (200, 0, 0), (0, 0, 0)

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]


def picture(rows: Sequence[str | Sequence[Card | None]]) -> Pixels:
    """Return [240, 320, 3] uint8 RGB: lines of text and rows of cards, from the top.

    A card that is None lies face down. Cards of a long row overlap; a long text goes on below.
    """
    pixels = np.full((HEIGHT, WIDTH, 3), _FELT, np.uint8)
    top = 2
    for row in rows:
        if isinstance(row, str):
            for start in range(0, len(row), _LINE_CHARACTERS):
                _write(pixels, row[start : start + _LINE_CHARACTERS], top + 6, 8, _PAPER)
                top += _LINE
            continue
        step = min(_CARD + 8, (WIDTH - 16 - _CARD) // max(len(row) - 1, 1))
        for number, card in enumerate(row):
            _lay(pixels, card, top, 8 + number * step)
        top += _ROW
    return pixels


def _lay(pixels: Pixels, card: Card | None, top: int, left: int) -> None:
    bottom, right = top + _ROW - 4, left + _CARD
    pixels[top:bottom, left:right] = _BLACK  # the rim
    pixels[top + 1 : bottom - 1, left + 1 : right - 1] = _BACK if card is None else _PAPER
    if card is None:
        _write(pixels, "?", top + 30, left + 21, _PAPER)
        return
    rank, suit = str(card)[:-1], _SUITS[card.index // 13]
    colour = _RED if suit in "♦♥" else _BLACK
    _write(pixels, rank, top + 8, left + 5, colour)
    _write(pixels, suit, top + 44, left + 5, colour)


def _write(pixels: Pixels, text: str, top: int, left: int, colour: Colour) -> None:
    for number, character in enumerate(text):
        rows = [int(digit, 32) for digit in _GLYPHS[character]]
        dots = np.array([[row >> (4 - bit) & 1 for bit in range(5)] for row in rows], np.bool_)
        mask = dots.repeat(_DOT, 0).repeat(_DOT, 1)
        x = left + number * 6 * _DOT
        pixels[top : top + 7 * _DOT, x : x + 5 * _DOT][mask] = colour
