"""Porter's stemmer of 1980 with the two departures of his reference program.

Source: M. F. Porter, "An algorithm for suffix stripping", Program 14(3), 1980; the departures are
``bli`` for ``abli`` and the added ``logi`` in step 2. Words of one or two letters stay.
"""

from __future__ import annotations

import functools

_STEP_2 = (
    *(("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize")),
    *(("bli", "ble"), ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous")),
    *(("ization", "ize"), ("ation", "ate"), ("ator", "ate"), ("alism", "al"), ("iveness", "ive")),
    *(("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"), ("iviti", "ive")),
    *(("biliti", "ble"), ("logi", "log")),
)
_STEP_3 = (
    *(("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic")),
    *(("ful", ""), ("ness", "")),
)
_STEP_4 = (
    *("al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion"),
    *("ou", "ism", "ate", "iti", "ous", "ive", "ize"),
)
_Rules = tuple[tuple[str, str], ...]
_ENDINGS: dict[_Rules, tuple[str, ...]] = {
    rules: tuple(ending for ending, _ in rules) for rules in (_STEP_2, _STEP_3)
}


@functools.lru_cache(maxsize=65_536)
def stem(word: str) -> str:
    """Return the stem of a lower-case word."""
    if len(word) <= 2:
        return word
    word = _plural(word)
    word = _past(word)
    if word.endswith("y") and _has_vowel(word[:-1]):
        word = word[:-1] + "i"
    word = _replaced(word, _STEP_2)
    word = _replaced(word, _STEP_3)
    word = _without_ending(word)
    if word.endswith("e"):
        size = _measure(word[:-1])
        if size > 1 or (size == 1 and not _ends_cvc(word[:-1])):
            word = word[:-1]
    if word.endswith("ll") and _measure(word) > 1:
        word = word[:-1]
    return word


def _plural(word: str) -> str:
    if word.endswith(("sses", "ies")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _past(word: str) -> str:
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for ending in ("ed", "ing"):
        if word.endswith(ending):
            base = word[: -len(ending)]
            if not _has_vowel(base):
                return word
            if base.endswith(("at", "bl", "iz")):
                return base + "e"
            if _ends_double(base) and base[-1] not in "lsz":
                return base[:-1]
            return base + "e" if _measure(base) == 1 and _ends_cvc(base) else base
    return word


def _replaced(word: str, rules: _Rules) -> str:
    """Apply the rule of the longest matching ending, if what precedes it has a measure above 0."""
    if not word.endswith(_ENDINGS[rules]):
        return word
    matching = [rule for rule in rules if word.endswith(rule[0])]
    ending, new = max(matching, key=lambda rule: len(rule[0]))
    base = word[: len(word) - len(ending)]
    return base + new if _measure(base) > 0 else word


def _without_ending(word: str) -> str:
    if not word.endswith(_STEP_4):
        return word
    matching = [ending for ending in _STEP_4 if word.endswith(ending)]
    ending = max(matching, key=len)
    base = word[: len(word) - len(ending)]
    if ending == "ion" and not base.endswith(("s", "t")):
        return word
    return base if _measure(base) > 1 else word


def _shape(word: str) -> str:
    """Return ``v`` and ``c`` for each letter; ``y`` is a vowel after a consonant."""
    shape = ""
    for letter in word:
        vowel = letter in "aeiou" or (letter == "y" and shape.endswith("c"))
        shape += "v" if vowel else "c"
    return shape


def _measure(word: str) -> int:
    return _shape(word).count("vc")


def _has_vowel(word: str) -> bool:
    return "v" in _shape(word)


def _ends_double(word: str) -> bool:
    return len(word) > 1 and word[-1] == word[-2] and _shape(word)[-1] == "c"


def _ends_cvc(word: str) -> bool:
    return _shape(word)[-3:] == "cvc" and word[-1] not in "wxy"
