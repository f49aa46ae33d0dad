r"""Is an answer equal to the gold answer? Three steps, each only when the one before cannot tell.

1. The same text, after layout is taken off (``$``, ``\text{}``, ``\left``, spaces, "Answer:").
2. Both are numbers: compared as exact fractions. A side written as a decimal may be rounded: it
   may differ by half a unit of the sixth decimal, but by no more than one part in 20,000.
   ``50\%`` equals 50 as well as 1/2. Nothing is ever evaluated by Python.
3. Anything else goes to math-verify in a child process (``judge``), unless the grader is exact.

An answer is wrong when the last step fails or runs out of time. Units behind a number are ignored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from pz_envs.mathqa.judge import SharedJudge

MAX_ANSWER = 500
"""Characters that an answer may have; longer ones are not looked at."""

MAX_DEPTH = 20
"""Brackets that may be open at once in an answer that goes to math-verify."""

_SAME = str.maketrans("−–－＋０１２３４５６７８９．，／（）％，", "---+0123456789.,/()%,")
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore)\b,?\s*)?(?:the\s+)?(?:final\s+)?answer\s*(?:is\b\s*:?|[:=])\s*",
    re.IGNORECASE,
)
_LAYOUT = re.compile(
    r"(?<!\\)\\(?:[$!,;: ()\[\]]|(?:left|right|displaystyle)(?![A-Za-z]))|\$|\*\*|~"
)
_WRAP = re.compile(r"\\(?:text|textbf|mathrm|mbox|mathbf|boldsymbol)\s*\{([^{}\\]{0,200})\}")
_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_SCIENTIFIC = rf"(?:{_PLAIN})(?:[eE][+-]?[0-9]{{1,3}})?"
_POWER = r"(?: ?(?:\\times|\\cdot|[×·*]) ?10 ?\^ ?(?:\{ ?([+-]?[0-9]{1,3}) ?\}|([+-]?[0-9]{1,3})))?"
_UNIT = r"(?P<unit>(?: [A-Za-z]{2,}){0,6})"
_DECIMAL = re.compile(
    rf"(?P<top>{_SCIENTIFIC}){_POWER}(?: ?/ ?(?P<under>{_SCIENTIFIC}))?(?P<percent> ?\\?%)?{_UNIT}"
)
_FRACTION = re.compile(
    r"(?P<whole>[0-9]{1,9} ?)?\\[dt]?frac ?(?:\{ ?(?P<top>-?[0-9]+) ?\}|(?P<top1>[0-9]))"
    rf" ?(?:\{{ ?(?P<under>-?[0-9]+) ?\}}|(?P<under1>[0-9]))(?P<percent> ?\\?%)?{_UNIT}"
)
_MIXED = re.compile(rf"(?P<whole>[0-9]{{1,9}}) (?P<top>[0-9]+)/(?P<under>[0-9]+){_UNIT}")
_NO_UNIT = frozenset(
    (
        "hundred",
        "thousand",
        "million",
        "billion",
        "trillion",
        "dozen",
        "score",
        "half",
        "third",
        "quarter",
        "pi",
        "sqrt",
        "squared",
        "cubed",
        "plus",
        "minus",
        "times",
        "over",
        "or",
        "and",
        "to",
        "mod",
        "not",
        "percent",
        "base",
        "factorial",
        "is",
        "equals",
        "than",
    )
)
_MAY_BE_NUMBER = re.compile(r"[0-9\\]")
_HALF_SIXTH = Fraction(1, 2_000_000)
_COARSEST = Fraction(1, 20_000)


@dataclass(frozen=True, slots=True)
class Number:
    """A number as written: its value, if it is a decimal, and if a percent sign follows."""

    value: Fraction
    decimal: bool
    percent: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an answer is right, and which step said so.

    ``how``: ``"text"``, ``"number"``, ``"symbolic"``, ``"failed"`` (math-verify ran out of time or
    memory) or ``"none"``: it was not read, because the grader is exact, braces do not match or nest
    too deep, or words were given where a number is wanted.
    """

    right: bool
    how: Literal["text", "number", "symbolic", "none", "failed"]


class Grader:
    """Compares answers; several may be used by several threads at once.

    Args:
        exact: stop after step 2; then neither math-verify nor a child process is needed.
    """

    def __init__(self, *, exact: bool = False) -> None:
        self._judge = None if exact else SharedJudge()

    def grade(self, gold: str, answer: str) -> Verdict:
        """Compare ``answer``, of at most ``MAX_ANSWER`` characters, with ``gold``.

        Raises:
            ConfigError: step 3 is needed and math-verify is not installed.
            InfraError: step 3 is needed and no child process can be started.
        """
        wanted, given = _stripped(gold), _stripped(answer)
        if given and _same_text(wanted, given):
            return Verdict(True, "text")
        wanted_number, given_number = _number(wanted), _number(given)
        if wanted_number is not None and given_number is not None:
            return Verdict(same_number(wanted_number, given_number), "number")
        hopeless = wanted_number is not None and not _MAY_BE_NUMBER.search(given)
        if self._judge is None or hopeless or not _readable(given):
            return Verdict(False, "none")
        equal = self._judge.equal(wanted, given)
        return Verdict(False, "failed") if equal is None else Verdict(equal, "symbolic")

    def close(self) -> None:
        """Give up the share in the child process; a later ``grade`` takes a new one."""
        if self._judge is not None:
            self._judge.close()


def read_number(text: str) -> Number | None:
    r"""Read a whole number, decimal, fraction or mixed number; None when ``text`` is none.

    Understood besides: thousands separators, ``1.5e-7``, ``1.5 \times 10^{-7}``, ``\frac{1}{2}``,
    ``\frac12``, ``1 1/2``, ``x = 3``, a currency sign before, a percent sign or words behind.
    """
    return _number(_stripped(text))


def _number(text: str) -> Number | None:
    text = re.sub(r"^[A-Za-z] ?= ?", "", text).lstrip("€£¥")
    sign = 1
    if text[:1] in ("-", "+"):
        sign = -1 if text[0] == "-" else 1
        text = text[1:].lstrip(" €£¥")
    match = _DECIMAL.fullmatch(text)
    decimal = match is not None
    match = match or _FRACTION.fullmatch(text) or _MIXED.fullmatch(text)
    if match is None or _NO_UNIT.intersection(match["unit"].lower().split()):
        return None
    groups = match.groupdict()
    top = Fraction((groups["top"] or groups["top1"]).replace(",", ""))
    under = Fraction((groups["under"] or groups.get("under1") or "1").replace(",", ""))
    if under == 0:
        return None
    value = top / under + int(groups.get("whole") or 0)
    if decimal:
        value *= Fraction(10) ** int(match[2] or match[3] or 0)
        written = match["top"] + (match["under"] or "")
        decimal = "." in written or "e" in written.lower() or bool(match[2] or match[3])
    return Number(sign * value, decimal, bool(groups.get("percent")))


def same_number(gold: Number, answer: Number) -> bool:
    """Return whether two numbers are equal by the rules in the module's docstring."""
    rounded = gold.decimal or answer.decimal
    if gold.percent == answer.percent:
        return _close(gold.value, answer.value, rounded)
    as_fraction = gold.value / 100 if gold.percent else gold.value * 100
    return _close(gold.value, answer.value, rounded) or _close(as_fraction, answer.value, rounded)


def _close(gold: Fraction, answer: Fraction, rounded: bool) -> bool:
    if not rounded:
        return gold == answer
    return abs(gold - answer) <= min(_HALF_SIXTH, abs(gold) * _COARSEST)


def _stripped(text: str) -> str:
    """Return ``text`` without layout, its whitespace collapsed."""
    text = text.translate(_SAME).strip().strip("*").strip()
    lead = _LEAD.match(text)
    if lead is not None:
        text = text[lead.end() :]
    text = text.replace("{,}", ",").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"(?<=[0-9]),\\! ?(?=[0-9])", ",", text)
    text = _LAYOUT.sub(lambda match: " " if match[0] in ("~", "\\ ") else "", text)
    whole = _WRAP.fullmatch(text.strip())
    text = whole[1] if whole is not None else text
    return " ".join(text.split()).rstrip(".").rstrip()


def _same_text(gold: str, answer: str) -> bool:
    """Compare without spaces; words, such as a name or a choice, in any case and parentheses."""
    left, right = gold.replace(" ", ""), answer.replace(" ", "")
    if left == right:
        return True
    left, right = (_WRAP.sub(r"\1", side).replace(" ", "") for side in (gold, answer))
    left, right = (side.strip("()").casefold() for side in (left, right))
    return left == right and left.isalpha()


def _readable(text: str) -> bool:
    """Return whether braces match, so that an answer stays in its box, and nest within reason."""
    braces = depth = 0
    for token in re.findall(r"\\.|[{}()\[\]]", text):
        braces += {"{": 1, "}": -1}.get(token, 0)
        depth += 1 if token in "{([" else -1 if token in "})]" else 0
        if braces < 0 or depth > MAX_DEPTH:
            return False
    return braces == 0
