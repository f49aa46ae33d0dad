"""Ranges of a search as they are written, and when failures end a run: what needs no process."""

from __future__ import annotations

from typing import Any

import pytest

from pz_agents.errors import FailureBudgetError
from pz_agents.rollout.budget import FailureBudget
from pz_agents.tune import parse_draw
from pz_envs.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "kind", "arguments"),
    [
        ("learning_rate=loguniform(1e-6, 1e-3)", "loguniform", (1e-6, 1e-3)),
        ("options.beta=uniform(0,0.1)", "uniform", (0, 0.1)),
        ("group_size=randint(2,9)", "randint", (2, 9)),
        ("group_size=grid(2,4)", "grid", (2, 4)),
        ("schedule=choice(constant, cosine)", "choice", ("constant", "cosine")),
    ],
)
def test_a_range_is_read_and_nothing_is_evaluated(text, kind, arguments):
    key, draw = parse_draw(text)
    assert (key, draw.kind, draw.arguments) == (text.partition("=")[0], kind, arguments)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("learning_rate", "write KEY=KIND"),
        ("lr=__import__('os')", "write KEY=KIND"),
        ("a=logunifrm(1,2)", "Did you mean `loguniform`"),
        ("a=loguniform(0,1)", "both above 0"),
        ("a=uniform(2,1)", "LOW below HIGH"),
        ("a=randint(1,2.5)", "two whole numbers"),
        ("a=choice()", "at least one"),
    ],
)
def test_a_range_that_cannot_be_is_refused_with_what_can(text, reason):
    with pytest.raises(ConfigError, match=reason):
        parse_draw(text)


def episodes(pattern: str, groups: int = 1) -> list[Any]:
    """Return a batch; in ``pattern`` each letter is an attempt, x a failed one."""
    from types import SimpleNamespace

    return [
        SimpleNamespace(
            key=f"{group}/{attempt}",
            group_id=str(group),
            attempt=attempt,
            status="failed" if letter == "x" else "ok",
            error="broke",
        )
        for group in range(groups)
        for attempt, letter in enumerate(pattern)
    ]


def test_the_failure_budget_counts_over_batches_and_forgives_one_broken_task():
    budget = FailureBudget()
    budget.add(episodes("x" * 19))
    with pytest.raises(FailureBudgetError, match="20 episodes in a row"):
        budget.add(episodes("x"))
    # One task of two always fails, in groups of 64: no streak, and half is not more than half.
    budget = FailureBudget()
    for _ in range(8):
        broken, sound = episodes("x" * 64, 1), episodes("." * 64, 2)[64:]
        budget.add([*broken, *sound])
    budget = FailureBudget()
    for _ in range(85):
        budget.add(episodes("xx."))
    with pytest.raises(FailureBudgetError, match="more than half of the last 256"):
        budget.add(episodes("xx."))
