"""Text to search terms as Lucene's English analyzer makes them.

Words follow UAX #29 (letters joined over an apostrophe or a colon, digits over a comma or a point,
Han and Hiragana one character a word, emoji and signs such as ® are words), then a possessive
``'s`` is dropped, the word lower-cased, 33 stop words removed and the rest stemmed by Porter's
algorithm. Thai, Lao, Khmer and Burmese runs stay whole. Words beyond 255 characters are cut.
"""

from __future__ import annotations

import functools
import re
import unicodedata

from pz_envs.webshop.porter import stem

_STOP_TEXT = """
a an and are as at be but by for if in into is it no not of on or such that the their then
there these they this to was will with
"""
STOP_WORDS = frozenset(_STOP_TEXT.split())

_LONGEST = 255
_POSSESSIVE = re.compile(r"['’＇][sS]\Z")

# Classes: A letter, N digit, K Katakana, J one-character word, E connector, M joins letters,
# U joins letters or digits, D joins digits, X attaches to what precedes, G pictograph, R regional
# indicator, S run of a script without spaces, Z joiner, o anything else.
_RUN = r"(?:AX*(?:[MU]X*(?=A))?|NX*(?:[DU]X*(?=N))?)+"
_CORE = rf"(?:{_RUN}|(?:KX*)+)"
_TOKEN = re.compile(
    rf"(?:EX*)*{_CORE}(?:(?:EX*)+{_CORE})*(?:EX*)*|(?:SX*)+|JX*|RX*RX*|GX*(?:ZX*GX*)*"
)

_PICTOGRAPHS: tuple[tuple[int, int], ...] = (
    *((code, code) for code in (0xA9, 0xAE, 0x203C, 0x2049, 0x2122, 0x2139, 0x2328, 0x2388)),
    *((code, code) for code in (0x23CF, 0x24C2, 0x25B6, 0x25C0, 0x2714, 0x2716, 0x271D, 0x2721)),
    *((code, code) for code in (0x2728, 0x2744, 0x2747, 0x274C, 0x274E, 0x2757, 0x27A1, 0x27B0)),
    *((code, code) for code in (0x27BF, 0x2B50, 0x2B55, 0x3030, 0x303D, 0x3297, 0x3299)),
    (0x2194, 0x2199),
    (0x21A9, 0x21AA),
    (0x231A, 0x231B),
    (0x23E9, 0x23F3),
    (0x23F8, 0x23FA),
    (0x25AA, 0x25AB),
    (0x25FB, 0x25FE),
    (0x2600, 0x2605),
    (0x2607, 0x2612),
    (0x2614, 0x2685),
    (0x2690, 0x2705),
    (0x2708, 0x2712),
    (0x2733, 0x2734),
    (0x2753, 0x2755),
    (0x2763, 0x2767),
    (0x2795, 0x2797),
    (0x2934, 0x2935),
    (0x2B05, 0x2B07),
    (0x2B1B, 0x2B1C),
    (0x1F000, 0x1F0FF),
    (0x1F10D, 0x1F10F),
    (0x1F12F, 0x1F12F),
    (0x1F16C, 0x1F171),
    (0x1F17E, 0x1F17F),
    (0x1F18E, 0x1F18E),
    (0x1F191, 0x1F19A),
    (0x1F201, 0x1F20F),
    (0x1F21A, 0x1F21A),
    (0x1F22F, 0x1F22F),
    (0x1F232, 0x1F23A),
    (0x1F23C, 0x1F23F),
    (0x1F249, 0x1F3FA),
    (0x1F400, 0x1F53D),
    (0x1F546, 0x1F64F),
    (0x1F680, 0x1F6FF),
    (0x1F90C, 0x1F93A),
    (0x1F93C, 0x1F945),
    (0x1F947, 0x1FAFF),
)
_UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x1950, 0x19DF),
    (0x1A20, 0x1AAF),
)
_JOINERS = {
    "M": ":···՟״︓﹕：",
    "U": ".'‘’․﹒＇．",
    "D": ",;;՚։،؍٬߸⁄︐︔﹐﹔，；",
}


class _Classes(dict[int, str]):
    """Code point to class, worked out when first met (the form ``str.translate`` wants)."""

    def __missing__(self, code: int) -> str:
        found = self[code] = _class_of(code)
        return found


def _class_of(code: int) -> str:
    char = chr(code)
    category = unicodedata.category(char)
    name = unicodedata.name(char, "")
    for letter, members in _JOINERS.items():
        if char in members:
            return letter
    if code == 0x200D:
        return "Z"
    if 0x1F1E6 <= code <= 0x1F1FF:
        return "R"
    if any(low <= code <= high for low, high in _PICTOGRAPHS):
        return "G"
    if category in ("Mn", "Me", "Mc", "Cf") or 0x1F3FB <= code <= 0x1F3FF:
        return "o" if code == 0x200B else "X"
    if category == "Pc" or code == 0x202F:
        return "E"
    if "KATAKANA" in name and category[0] == "L":
        return "K"
    if name.startswith(("CJK UNIFIED", "CJK COMPAT", "HIRAGANA")) or char in "々〆〇":
        return "J"
    if any(low <= code <= high for low, high in _UNSPACED) and category in ("Lo", "Lm"):
        return "S"
    if category == "Nd":
        return "N"
    return "A" if category[0] == "L" or category == "Nl" or 0x24B6 <= code <= 0x24E9 else "o"


_CLASSES = _Classes()


def words(text: str) -> list[str]:
    """Return the words of ``text`` by UAX #29, as written."""
    found = []
    for match in _TOKEN.finditer(text.translate(_CLASSES)):
        start, end = match.span()
        if end - start <= _LONGEST:
            found.append(text[start:end])
        else:
            found.extend(text[at : min(at + _LONGEST, end)] for at in range(start, end, _LONGEST))
    return found


def terms(text: str) -> list[str]:
    """Return the search terms of ``text``, in order, with repetitions."""
    found: list[str] = []
    for chunk in text.split(" "):  # no word reaches over a space
        found += _chunk_terms(chunk) if len(chunk) <= _LONGEST else _terms(chunk)
    return found


@functools.lru_cache(maxsize=65_536)
def _chunk_terms(chunk: str) -> tuple[str, ...]:
    return _terms(chunk)


def _terms(chunk: str) -> tuple[str, ...]:
    return tuple(term for word in words(chunk) if (term := _term(word)))


@functools.lru_cache(maxsize=65_536)
def _term(word: str) -> str:
    plain = _POSSESSIVE.sub("", word).lower()
    return "" if plain in STOP_WORDS else stem(plain)
