"""What a study may spend as a whole, and what its cells have spent: money, tokens, steps, hours.

A cell that is done costs what its episodes say: tokens at the model's price, or GPU hours. One that
runs costs what it was estimated to, or what it has spent if that is more. A cell is started only
while all of that and its own estimate fit; nothing that runs is stopped.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydantic

from pz_agents.config import Settings
from pz_bench import store
from pz_bench.cell import CellSpec
from pz_bench.estimate import USED_TURNS, Estimate, estimate
from pz_bench.runner import Job
from pz_envs.errors import ConfigError


class Price(Settings):
    """Dollars for a million tokens of a model behind a server."""

    read: float = pydantic.Field(ge=0)
    """Of prompts, counted anew in every request."""

    write: float = pydantic.Field(ge=0)
    """Of replies."""


class Limits(Settings):
    """What all cells of a matrix may spend together; None: as much as they need."""

    usd: float | None = pydantic.Field(default=None, ge=0)
    """Dollars, from the prices of models and of GPU hours."""

    tokens: float | None = pydantic.Field(default=None, ge=0)
    """Tokens read and written in evaluation."""

    steps: float | None = pydantic.Field(default=None, ge=0)
    """Environment steps of evaluation."""

    hours: float | None = pydantic.Field(default=None, ge=0)
    """Wall clock of the cells' processes, added up."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a cell costs, in the units of ``Limits``."""

    usd: float = 0.0
    tokens: float = 0.0
    steps: float = 0.0
    hours: float = 0.0

    def plus(self, other: Cost) -> Cost:
        """Return the sum."""
        return Cost(
            self.usd + other.usd,
            self.tokens + other.tokens,
            self.steps + other.steps,
            self.hours + other.hours,
        )

    def minus(self, other: Cost) -> Cost:
        """Return the difference."""
        return self.plus(Cost(-other.usd, -other.tokens, -other.steps, -other.hours))

    def at_least(self, other: Cost) -> Cost:
        """Return the larger of each."""
        return Cost(
            max(self.usd, other.usd),
            max(self.tokens, other.tokens),
            max(self.steps, other.steps),
            max(self.hours, other.hours),
        )


def price_of(model: str | None, prices: Mapping[str, Price]) -> Price | None:
    """Return the price of the first glob of ``prices`` that names ``model``, None without one.

    A model behind a server is matched as ``openai:NAME``, without its address, and as ``NAME``.
    """
    if model is None:
        return None
    name = model.partition("@")[0]
    names = (name, name.rpartition(":")[2])
    for glob, price in prices.items():
        if any(fnmatch.fnmatchcase(each, glob) for each in names):
            return price
    return None


def parse_price(text: str) -> tuple[str, Price]:
    """Read ``MODEL=READ,WRITE``, dollars for a million tokens.

    Raises:
        ConfigError: it is not written so.
    """
    model, equals, numbers = text.rpartition("=")
    try:
        read, write = map(float, numbers.split(","))
        if not equals or not model or min(read, write) < 0:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--price {text}: write it as MODEL=READ,WRITE in dollars for a million tokens, "
            "e.g. --price 'gpt-*=2.5,10'"
        ) from None
    return model, Price(read=read, write=write)


def expected(spec: CellSpec, guess: Estimate, price: Price | None, gpu_price: float) -> Cost:
    """Return what a cell is estimated to cost; a priced model reads its whole context each turn."""
    turns = max(1.0, USED_TURNS * spec.max_turns)
    reads, writes = guess.evaluated_prompt_tokens, guess.evaluated_sampled_tokens
    if price is not None:
        # Turn k reads what the k turns before it added: the sum over k of an arithmetic row.
        reads = (reads + writes) * (turns + 1) / 2
    reads = min(reads, float(spec.episodes * spec.max_tokens)) if spec.model else 0.0
    usd = _usd(reads, writes, guess.gpu_hours, price, gpu_price)
    return Cost(usd, reads + writes, spec.episodes * turns, guess.hours or 0.0)


def spent(runs: Path, job: Job, guess: Estimate, price: Price | None, gpu_price: float) -> Cost:
    """Return what a cell has spent by its files; nothing where there are none."""
    folder = store.cell_folder(runs, job.id)
    if not (folder / store.CELL).exists():
        return Cost()
    episodes = store.read_episodes(folder)
    hours = store.read_cell(folder).seconds / 3600
    reads = float(sum(each.prompt_tokens for each in episodes))
    writes = float(sum(each.sampled_tokens for each in episodes))
    usd = _usd(reads, writes, guess.gpus * hours, price, gpu_price)
    return Cost(usd, reads + writes, float(sum(each.turns for each in episodes)), hours)


def gate(
    runs: Path,
    jobs: Sequence[Job],
    limits: Limits,
    prices: Mapping[str, Price],
    gpu_price: float,
) -> Callable[[Job], str | None]:
    """Return a function that says why a job of ``jobs`` may not be started now, else None.

    It is asked before each start. Only jobs that it let start are looked at again, so that asking
    about every job of a study takes time in proportion to them.

    Args:
        runs: the store.
        jobs: every job of the matrix; those done before count too.
        limits: of all of them together.
        prices: of models, by glob.
        gpu_price: dollars for one GPU and one hour.
    """
    wanted = {name: most for name, most in limits.model_dump().items() if most is not None}
    waiting: dict[str, Cost] | None = None  # what the files of jobs say that were not let start
    begun: dict[str, Job] = {}
    settled = Cost()

    def cost(job: Job, *, begins: bool) -> Cost:
        guess, price = estimate(job.spec), price_of(job.spec.model, prices)
        found = spent(runs, job, guess, price, gpu_price)
        return found.at_least(expected(job.spec, guess, price, gpu_price)) if begins else found

    def may_not(job: Job) -> str | None:
        nonlocal settled, waiting
        if not wanted:
            return None
        if waiting is None:
            waiting = {each.id: cost(each, begins=False) for each in jobs}
            settled = functools.reduce(Cost.plus, waiting.values(), settled)
        for other in list(begun.values()):
            if other.state not in ("running", "owed"):
                settled = settled.plus(cost(other, begins=False))
                del begun[other.id]
        total = settled.minus(waiting.get(job.id, Cost())).plus(cost(job, begins=True))
        for other in begun.values():
            if other.id != job.id:
                total = total.plus(cost(other, begins=other.state == "running"))
        for name, most in wanted.items():
            # What is added and taken away again leaves a trace in the last digits.
            if getattr(total, name) > most * (1 + 1e-9):
                return (
                    f"with this cell the study would have taken about {getattr(total, name):,.4g} "
                    f"of {most:,.4g} {name}; raise the limit to go on"
                )
        settled = settled.minus(waiting.pop(job.id, Cost()))
        begun[job.id] = job
        return None

    return may_not


def _usd(
    reads: float, writes: float, gpu_hours: float, price: Price | None, gpu_price: float
) -> float:
    if price is not None:
        return (reads * price.read + writes * price.write) / 1e6
    return gpu_hours * gpu_price
