"""What ``pz-bench plan`` prints: each cell with its id, state, size and estimate, then the sums.

The estimates are ``estimate``'s; a cell one of whose sisters (the same but for the seed) is done
here takes that time, marked with an asterisk. Nothing is started and nothing is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pz_bench.budget import Price, expected, price_of
from pz_bench.estimate import Estimate, assumptions, estimate, sister_key, sisters
from pz_bench.runner import Job


@dataclass(frozen=True, slots=True)
class Line:
    """One cell of the plan."""

    job: Job
    estimate: Estimate
    price: Price | None = None

    def usd(self, gpu_price: float) -> float:
        """Return what the cell is estimated to cost, in dollars."""
        return expected(self.job.spec, self.estimate, self.price, gpu_price).usd


def lines(jobs: Sequence[Job], prices: Mapping[str, Price] | None = None) -> list[Line]:
    """Return the plan's lines in the order of ``jobs``; ``prices`` are those of a matrix."""
    done = [(job.spec, job.measured_seconds) for job in jobs if job.measured_seconds > 0]
    known = sisters(done)
    return [
        Line(
            job,
            estimate(job.spec, known.get(sister_key(job.spec))),
            price_of(job.spec.model, prices or {}),
        )
        for job in jobs
    ]


def to_text(found: Sequence[Line], gpu_price: float) -> str:
    """Return the plan for a terminal.

    Args:
        found: the plan.
        gpu_price: dollars for one GPU and one hour.
    """
    rows = [
        f"{'cell':16}  {'state':8} {'episodes':>10} {'tokens':>7} {'GPUs':>4} {'hours':>8}  what"
    ]
    for line in found:
        spec, guess = line.job.spec, line.estimate
        size = f"{spec.episodes} x {spec.max_turns}"
        tokens = _count(guess.prompt_tokens + guess.sampled_tokens)
        gpus = str(guess.gpus or "-")
        state = line.job.state.replace("_", " ")
        rows.append(_row(line.job.id, state, size, tokens, gpus, _hours(guess), spec.title))
    left = [line for line in found if line.job.state != "done"]
    owed = sum(line.job.state == "owed" for line in found)
    sums = _sums(left, gpu_price)
    rows.append(
        f"{owed} of {len(found)} cells are owed; all {sums['cells']} that are not done: at most "
        f"{sums['turns']:,} turns of evaluation, about {_count(sums['tokens'])} tokens, "
        f"{sums['gpu_hours']:,.0f} GPU hours, {sums['core_hours']:,.2f} core hours, "
        f"${sums['usd']:,.2f}"
    )
    return "\n".join([*rows, assumptions()])


def to_json(found: Sequence[Line], gpu_price: float) -> str:
    """Return the plan as JSON: ``cells``, ``left`` (sums over cells not done), ``assumptions``."""
    cells = [
        {
            "id": line.job.id,
            "state": line.job.state,
            "reason": line.job.reason,
            "command": line.job.command,
            "algorithm": line.job.spec.player,
            "env": line.job.spec.env,
            "model": line.job.spec.model,
            "seed": line.job.spec.seed,
            "episodes": line.job.spec.episodes,
            "max_turns": line.job.spec.max_turns,
            "prompt_tokens": round(line.estimate.prompt_tokens),
            "sampled_tokens": round(line.estimate.sampled_tokens),
            "trained_tokens": round(line.estimate.trained_tokens),
            "gpus": line.estimate.gpus,
            "hours": line.estimate.hours,
            "measured": line.estimate.measured,
            "usd": round(line.usd(gpu_price), 6),
        }
        for line in found
    ]
    left = [line for line in found if line.job.state != "done"]
    plan = {"cells": cells, "left": _sums(left, gpu_price), "assumptions": assumptions()}
    return json.dumps(plan, indent=1)


def _sums(found: Sequence[Line], gpu_price: float) -> Mapping[str, Any]:
    gpu_hours = sum(line.estimate.gpu_hours for line in found)
    on_cores = [line.estimate for line in found if line.estimate.gpus == 0]
    return {
        "cells": len(found),
        "turns": sum(line.job.spec.episodes * line.job.spec.max_turns for line in found),
        "tokens": sum(line.estimate.prompt_tokens + line.estimate.sampled_tokens for line in found),
        "gpu_hours": gpu_hours,
        "core_hours": sum(each.hours or 0.0 for each in on_cores),
        "usd": sum(line.usd(gpu_price) for line in found),
    }


def _row(cell: str, state: str, size: str, tokens: str, gpus: str, hours: str, what: str) -> str:
    return f"{cell:16}  {state:8} {size:>10} {tokens:>7} {gpus:>4} {hours:>8}  {what}"


def _count(number: float) -> str:
    """Return a token count in four or five characters."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _hours(guess: Estimate) -> str:
    if guess.hours is None:
        return "?"
    text = f"{guess.hours:.1f}" if guess.hours >= 0.1 else f"{guess.hours * 60:.1f} min"
    return text + ("*" if guess.measured else "")
