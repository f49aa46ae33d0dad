"""Word problems of our own, in five graded levels, with exact answers.

Level 1 takes one operation, 2 several, 3 fractions, percentages and rates, 4 linear equations, 5
quadratics, counting, chance and series. A problem is a template and its numbers; those alone decide
whether it belongs to train or test, so the two never share a problem, whatever names it carries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from pz_envs.errors import ConfigError
from pz_envs.mathqa.sets import Problem
from pz_envs.seeding import derive_seed

LEVELS = (1, 2, 3, 4, 5)
"""Levels of difficulty, the easiest first."""

_TEST_SHARE = 5  # one problem in five is a test problem
_ATTEMPTS = 10_000
_WHO = (
    "Amara",
    "Bilal",
    "Chidi",
    "Dana",
    "Elif",
    "Farid",
    "Greta",
    "Hana",
    "Ivo",
    "Jun",
    "Kofi",
    "Lena",
    "Mateo",
    "Nadia",
    "Omar",
    "Priya",
)
_THINGS = (
    "marbles",
    "stamps",
    "shells",
    "pencils",
    "badges",
    "buttons",
    "cards",
    "postcards",
    "coins",
    "beads",
)


@dataclass(frozen=True, slots=True)
class Template:
    """One kind of problem.

    ``text`` is filled with the drawn numbers, with ``shown`` (numbers computed from them) and with
    names; ``answer``, ``check`` and ``shown`` take the numbers in the order of ``ranges``, whose
    ends are both possible. A draw that ``check`` refuses is drawn again.
    """

    name: str
    level: int
    text: str
    ranges: Mapping[str, tuple[int, int]]
    answer: Callable[..., Fraction | int]
    check: Callable[..., bool] = field(default=lambda *_: True)
    shown: Callable[..., dict[str, int]] = field(default=lambda *_: {})


def generate(rng: np.random.Generator, split: str, level: int | None) -> tuple[Problem, int]:
    """Draw a problem of ``split`` and return it with its level.

    Args:
        rng: decides everything.
        split: ``"train"`` or ``"test"``.
        level: 1 to 5, or None for any, each as likely.
    """
    if level is None:
        level = LEVELS[int(rng.integers(len(LEVELS)))]
    kinds = [template for template in TEMPLATES if template.level == level]
    template = kinds[int(rng.integers(len(kinds)))]
    for _ in range(_ATTEMPTS):
        values = [int(rng.integers(low, high + 1)) for low, high in template.ranges.values()]
        if template.check(*values) and split_of(template, values) == split:
            break
    else:
        raise ConfigError(f"no {split} problem of the kind {template.name}")
    who, other = (_WHO[int(i)] for i in rng.choice(len(_WHO), 2, replace=False))
    names = {"who": who, "other": other, "thing": _THINGS[int(rng.integers(len(_THINGS)))]}
    numbers = dict(zip(template.ranges, values, strict=True)) | template.shown(*values)
    text = template.text.format(**numbers, **names)
    name = f"math/level{level}/{template.name}-{'-'.join(map(str, values))}"
    return Problem(name, text, str(Fraction(template.answer(*values)))), level


def split_of(template: Template, values: list[int]) -> str:
    """Return ``"train"`` or ``"test"``, the side that a template with these numbers is on."""
    key = derive_seed("math-split", template.name, *values)
    return "test" if key % _TEST_SHARE == 0 else "train"


TEMPLATES: tuple[Template, ...] = (
    Template(
        "gain",
        1,
        "{who} keeps {a} {thing} in a tin and is given {b} more. How many {thing} are that now?",
        {"a": (3, 99), "b": (2, 99)},
        lambda a, b: a + b,
    ),
    Template(
        "lend",
        1,
        "Of {a} {thing}, {who} lends {b} to {other}. How many does {who} still have at hand?",
        {"a": (10, 150), "b": (2, 99)},
        lambda a, b: a - b,
        lambda a, b: b < a,
    ),
    Template(
        "rows",
        1,
        "A small theatre has {a} rows with {b} seats each. How many seats does it have?",
        {"a": (3, 30), "b": (4, 30)},
        lambda a, b: a * b,
    ),
    Template(
        "share",
        1,
        "{who} deals {n} {thing} out evenly among {a} friends. How many does each friend get?",
        {"a": (2, 12), "b": (2, 25)},
        lambda a, b: b,
        shown=lambda a, b: {"n": a * b},
    ),
    Template(
        "taller",
        1,
        "One mast is {a} metres tall, another {b} metres. By how many metres do they differ?",
        {"a": (5, 120), "b": (5, 120)},
        lambda a, b: abs(a - b),
        lambda a, b: a != b,
    ),
    Template(
        "times",
        1,
        "{other} collected {a} {thing}; {who} collected {b} times as many. How many has {who}?",
        {"a": (3, 60), "b": (3, 9)},
        lambda a, b: a * b,
    ),
    Template(
        "basket",
        2,
        "{who} buys {a} notebooks at {b} coins apiece and {c} pens at {d} coins apiece. "
        "How many coins does that cost altogether?",
        {"a": (2, 12), "b": (2, 15), "c": (2, 12), "d": (1, 9)},
        lambda a, b, c, d: a * b + c * d,
    ),
    Template(
        "change",
        2,
        "{who} pays for {a} tickets of {b} coins each with a voucher worth {n} coins. "
        "How many coins remain on the voucher?",
        {"a": (2, 9), "b": (3, 19), "n": (20, 200)},
        lambda a, b, n: n - a * b,
        lambda a, b, n: n > a * b,
    ),
    Template(
        "legs",
        2,
        "In a yard there are {a} hens, {b} goats and a three-legged stool. "
        "How many legs stand in the yard, the stool's among them?",
        {"a": (2, 40), "b": (2, 40)},
        lambda a, b: 2 * a + 4 * b + 3,
    ),
    Template(
        "trip",
        2,
        "A lorry drives {b} hours at {a} km/h and then {d} hours at {c} km/h. "
        "How many kilometres does it cover?",
        {"a": (30, 90), "b": (2, 7), "c": (30, 90), "d": (2, 7)},
        lambda a, b, c, d: a * b + c * d,
    ),
    Template(
        "savings",
        2,
        "{who} starts with {s} coins, puts {a} coins aside every week for {b} weeks and then "
        "spends {c} coins. How many coins are left?",
        {"s": (0, 60), "a": (2, 20), "b": (3, 12), "c": (5, 90)},
        lambda s, a, b, c: s + a * b - c,
        lambda s, a, b, c: s + a * b > c,
    ),
    Template(
        "crates",
        2,
        "A crate takes {b} melons. What is the least number of crates that hold {p} melons?",
        {"p": (20, 300), "b": (4, 24)},
        lambda p, b: -(-p // b),
        lambda p, b: p % b != 0,
    ),
    Template(
        "walkers",
        3,
        "Of the {n} pupils of a school, {a}/{b} come on foot. How many pupils do not?",
        {"n": (24, 480), "a": (1, 7), "b": (3, 12)},
        lambda n, a, b: n - n * a // b,
        lambda n, a, b: n % b == 0 and a < b and math.gcd(a, b) == 1,
    ),
    Template(
        "discount",
        3,
        "A coat is marked at {p} coins. The shop first takes {q}% off, then {r}% off what is left. "
        "How many coins does the coat cost in the end? Give the exact value.",
        {"p": (20, 400), "q": (5, 60), "r": (5, 40)},
        lambda p, q, r: Fraction(p * (100 - q) * (100 - r), 10_000),
    ),
    Template(
        "together",
        3,
        "Alone, {who} paints a fence in {a} hours and {other} in {b} hours. How many hours do they "
        "need side by side? Give an exact fraction.",
        {"a": (2, 24), "b": (2, 24)},
        lambda a, b: Fraction(a * b, a + b),
        lambda a, b: a != b,
    ),
    Template(
        "brine",
        3,
        "{a} litres of brine with {p}% salt are stirred into {b} litres with {q}% salt. What is "
        "the percentage of salt in the mixture? Give the exact number of percent.",
        {"a": (1, 20), "p": (1, 40), "b": (1, 20), "q": (1, 40)},
        lambda a, p, b, q: Fraction(a * p + b * q, a + b),
        lambda a, p, b, q: p != q,
    ),
    Template(
        "mean",
        3,
        "After {k} tests {who}'s average is {m} points. The next test brings {s} points. "
        "What is the average of all tests now, exactly?",
        {"k": (2, 9), "m": (40, 95), "s": (20, 100)},
        lambda k, m, s: Fraction(k * m + s, k + 1),
        lambda k, m, s: m != s,
    ),
    Template(
        "ratio",
        3,
        "{who} and {other} split {n} {thing} in the ratio {a} to {b}. How many does {who} get?",
        {"n": (20, 600), "a": (2, 15), "b": (2, 15)},
        lambda n, a, b: n * a // (a + b),
        lambda n, a, b: n % (a + b) == 0 and math.gcd(a, b) == 1,
    ),
    Template(
        "balance",
        4,
        "{a} times a number, plus {b}, equals {c} times the same number, plus {d}. "
        "What is the number? Give it exactly.",
        {"a": (2, 20), "b": (1, 60), "c": (2, 20), "d": (1, 60)},
        lambda a, b, c, d: Fraction(d - b, a - c),
        lambda a, b, c, d: a != c and b != d,
    ),
    Template(
        "ages",
        4,
        "{who} is {a} times as old as {other}. In {b} years {who} will be {c} times as old as "
        "{other}. How old, in years, is {other} today? The exact value need not be whole.",
        {"a": (3, 12), "b": (2, 30), "c": (2, 8)},
        lambda a, b, c: Fraction((c - 1) * b, a - c),
        lambda a, b, c: a > c,
    ),
    Template(
        "tickets",
        4,
        "A ferry sold {n} tickets, some at {a} coins and some at {b} coins, for {t} coins in all. "
        "How many of the tickets at {a} coins were sold?",
        {"u": (5, 120), "v": (5, 120), "a": (5, 30), "b": (2, 20)},
        lambda u, v, a, b: u,
        lambda u, v, a, b: a > b,
        lambda u, v, a, b: {"n": u + v, "t": a * u + b * v},
    ),
    Template(
        "consecutive",
        4,
        "The sum of {k} consecutive whole numbers is {s}. Which is the smallest of them?",
        {"m": (-30, 150), "k": (3, 12)},
        lambda m, k: m,
        shown=lambda m, k: {"s": k * m + k * (k - 1) // 2},
    ),
    Template(
        "system",
        4,
        "Two numbers x and y satisfy {a}x + {b}y = {p} and {c}x - {d}y = {q}. What is x - y?",
        {"a": (1, 9), "b": (1, 9), "c": (1, 9), "d": (1, 9), "x": (-12, 20), "y": (-12, 20)},
        lambda a, b, c, d, x, y: x - y,
        shown=lambda a, b, c, d, x, y: {"p": a * x + b * y, "q": c * x - d * y},
    ),
    Template(
        "meeting",
        4,
        "Two cyclists set out towards each other from towns {n} km apart, one at {a} km/h and, "
        "{h} hours later, the other at {b} km/h. How many hours after the first one's start do "
        "they meet? Give an exact fraction.",
        {"n": (60, 300), "a": (12, 28), "b": (12, 28), "h": (2, 4)},
        lambda n, a, b, h: Fraction(n + b * h, a + b),
        lambda n, a, b, h: a * h < n,
    ),
    Template(
        "garden",
        5,
        "A rectangular garden is {d} metres longer than wide and covers {s} square metres. "
        "How many metres long is the fence around it?",
        {"w": (3, 60), "d": (1, 40)},
        lambda w, d: 2 * (2 * w + d),
        shown=lambda w, d: {"s": w * (w + d)},
    ),
    Template(
        "roots",
        5,
        "Let u and v be the two roots of x^2 - {s}x + {p} = 0. What is u^2 + v^2?",
        {"s": (3, 40), "p": (1, 90)},
        lambda s, p: s * s - 2 * p,
        lambda s, p: s * s > 4 * p,
    ),
    Template(
        "remainder",
        5,
        "What remainder does {a}^{n} leave when it is divided by {m}?",
        {"a": (2, 30), "n": (20, 400), "m": (7, 97)},
        lambda a, n, m: pow(a, n, m),
        lambda a, n, m: math.gcd(a, m) == 1,
    ),
    Template(
        "crew",
        5,
        "From {a} sailors and {b} cooks a crew of {c} sailors and {d} cooks is picked. "
        "In how many ways can that be done?",
        {"a": (4, 12), "c": (2, 5), "b": (3, 9), "d": (1, 4)},
        lambda a, c, b, d: math.comb(a, c) * math.comb(b, d),
        lambda a, c, b, d: c < a and d < b,
    ),
    Template(
        "urn",
        5,
        "A bag holds {a} red and {b} blue balls. Two are drawn one after the other and not put "
        "back. What is the probability that they differ in colour? Give an exact fraction.",
        {"a": (2, 30), "b": (2, 30)},
        lambda a, b: Fraction(2 * a * b, (a + b) * (a + b - 1)),
    ),
    Template(
        "series",
        5,
        "The first term of an arithmetic sequence is {a} and each term is {d} more than the one "
        "before. What is the sum of its first {n} terms?",
        {"a": (-20, 60), "d": (2, 15), "n": (10, 60)},
        lambda a, d, n: n * a + d * n * (n - 1) // 2,
    ),
    Template(
        "bounces",
        5,
        "A ball is dropped from {h} metres; after every bounce it rises to {a}/{b} of the height "
        "it fell from. How many metres does it travel in all, counting every bounce for ever?",
        {"h": (1, 40), "a": (1, 8), "b": (2, 9)},
        lambda h, a, b: h + 2 * h * Fraction(a, b - a),
        lambda h, a, b: a < b and math.gcd(a, b) == 1,
    ),
)
"""Every kind of problem, by level."""
