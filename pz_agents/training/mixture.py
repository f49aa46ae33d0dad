"""Single-turn data sets as an environment: rows of several files, mixed by weight.

Draw ``n`` of a run is the same row wherever and whenever it is asked for: the file is the one that
is furthest behind its share, and within a file every row comes once an epoch, in an order that
hangs on (seed, epoch, file) alone. A resumed run therefore goes on at the exact next row without
anything being saved. Every algorithm trains on a row as on a game of one turn.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from pz_agents.config import Settings
from pz_envs.catalog import EnvRow, find
from pz_envs.errors import ConfigError, DataError, did_you_mean, require
from pz_envs.seeding import generator
from pz_envs.textenv import Info, Outcome, TextEnv

DATA_ENV = "pz/Data-v0"
"""What ``env`` is called where ``datasets`` are trained on; it stands in no catalogue."""

ORDERED = 2**31
"""A task's seed is its draw plus this; a smaller seed (a refill's) takes any row."""

Split = Literal["train", "eval"]
Row = Mapping[str, Any]


class DataSource(Settings):
    """One file of a mixture."""

    path: str
    """A .jsonl or .parquet file."""

    type: Literal["jsonl", "parquet"] | None = None
    """Its format; None: by its suffix."""

    input: str = "prompt"
    """The column that the model is shown."""

    output: str | None = None
    """The column with the answer that pays 1; None: only a function or a reward model pays."""

    weight: float = pydantic.Field(default=1.0, gt=0)
    """Its share of the draws, against the others' weights."""

    split: Split = "train"
    """`eval` files are what `eval_episodes` are played on."""

    skip: int = pydantic.Field(default=0, ge=0)
    """So many rows that cannot be read are passed over before it is an error."""


class Mixture:
    """The rows of several files and their order.

    Args:
        sources: of one split.
        seed: decides the order within the files.

    Raises:
        DataError: a file cannot be read, has a bad row, or lacks a column.
    """

    def __init__(self, sources: Sequence[DataSource], seed: int) -> None:
        self._sources = sources
        self._rows = [read_rows(source) for source in sources]
        self._seed = seed
        weights = np.array([source.weight for source in sources])
        self._shares = weights / weights.sum()
        self._drawn = np.zeros((1, len(sources)), np.int64)
        self._chosen = np.empty(0, np.int64)
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._rows)

    def place(self, draw: int) -> tuple[int, int]:
        """Return the number of the file and of the row in it of draw ``draw``, from 0."""
        with self._lock:
            self._extend(draw + 1)
            source = int(self._chosen[draw])
            epoch, position = divmod(int(self._drawn[draw, source]), len(self._rows[source]))
            if (source, epoch) not in self._orders:
                self._orders[source, epoch] = self._order(source, epoch)
            return source, int(self._orders[source, epoch][position])

    def find(self, seed: int) -> tuple[int, int]:
        """Return the number of the file and of the row in it that a task's seed stands for."""
        if seed >= ORDERED:
            return self.place(seed - ORDERED)
        rng = generator(self._seed, "mixture", seed)
        source = int(rng.choice(len(self._rows), p=self._shares))
        return source, int(rng.integers(len(self._rows[source])))

    def row(self, seed: int) -> Row:
        """Return the row of a task with all its columns."""
        source, number = self.find(seed)
        return self._rows[source][number]

    def question(self, seed: int) -> tuple[str, str | None, str]:
        """Return what a task asks, its answer if it has one, and its name."""
        source, number = self.find(seed)
        row, about = self._rows[source][number], self._sources[source]
        answer = None if about.output is None else str(row[about.output])
        return str(row[about.input]), answer, f"{Path(about.path).name}:{number + 1}"

    def _extend(self, count: int) -> None:
        """Decide which files the first ``count`` draws come from."""
        known = len(self._chosen)
        if count <= known:
            return
        # In blocks, so that a long run does not copy the past at every draw.
        count = max(count, 2 * known, 1024)
        drawn, chosen = np.zeros((count + 1, len(self._sources)), np.int64), np.zeros(count, int)
        drawn[: known + 1], chosen[:known] = self._drawn, self._chosen
        for draw in range(known, count):
            behind = self._shares * (draw + 1) - drawn[draw]
            chosen[draw] = int(np.argmax(behind))
            drawn[draw + 1] = drawn[draw]
            drawn[draw + 1, chosen[draw]] += 1
        self._drawn, self._chosen = drawn, chosen

    def _order(self, source: int, epoch: int) -> NDArray[np.int64]:
        stream = generator(self._seed, "mixture", self._sources[source].path, epoch)
        return stream.permutation(len(self._rows[source]))


def read_rows(source: DataSource) -> list[Row]:
    """Return the rows of a file.

    Raises:
        DataError: there is no such file, it has no rows, more rows than may be skipped cannot be
            read (the message names file and line), or a column is missing (it lists those present).
    """
    path = Path(source.path).expanduser()
    kind = source.type or path.suffix.removeprefix(".")
    if kind not in ("jsonl", "parquet"):
        raise DataError(f"{path}: a data set is .jsonl or .parquet; set its `type`")
    if not path.is_file():
        raise DataError(f"no data set {path}")
    rows: list[Row] = []
    bad: list[str] = []
    for line, row in _jsonl(path) if kind == "jsonl" else _parquet(path):
        problem = row if isinstance(row, str) else _problem(row, source)
        if problem is None:
            rows.append(row)  # type: ignore[arg-type]  # a problem is text, a row is none
            continue
        bad.append(f"{path}:{line}: {problem}")
        if len(bad) > source.skip:
            raise DataError("; ".join(bad[-3:]))
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def _jsonl(path: Path) -> Iterator[tuple[int, Row | str]]:
    """Yield line numbers with a row each, or with what is wrong with the line."""
    with open(path, encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                yield line, f"not JSON ({error})"
                continue
            yield line, row if isinstance(row, dict) else f"an object is needed; got {text[:60]!r}"


def _parquet(path: Path) -> Iterator[tuple[int, Row | str]]:
    parquet = require("pyarrow.parquet", "pz-agents[train]")
    arrow = require("pyarrow", "pz-agents[train]")
    try:
        table = parquet.read_table(path)
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"{path} is no Parquet file: {error}") from error
    yield from enumerate(table.to_pylist(), start=1)


def _problem(row: Row, source: DataSource) -> str | None:
    for role, name in (("input", source.input), ("output", source.output)):
        if name is None:
            continue
        if name not in row:
            present = ", ".join(row)
            return (
                f"no column `{name}` (its `{role}`).{did_you_mean(name, list(row))} "
                f"Present: {present}"
            )
        if not isinstance(row[name], str | int | float):
            return f"column `{name}` must hold text; got {row[name]!r:.60}"
    return None


class DataEnv(TextEnv):
    """A row of a mixture as an episode of one turn; the seed given to ``reset`` says which.

    Where the row has an answer, a reply equal to it pays 1 (spaces around it and case aside).
    """

    family = "data"
    reply_tag = "answer"

    def __init__(
        self, mixture: Mixture, instruction: str = "Answer the question.", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._mixture = mixture
        self._instruction = instruction
        self._task = ORDERED - 1
        self._answer: str | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, Info]:
        """Ask the question that ``seed`` stands for; without one the next in order."""
        self._task = self._task + 1 if seed is None else seed
        return super().reset(seed=self._task, options=options)

    def _start(self, seed: int, options: Mapping[str, Any]) -> Outcome:
        question, self._answer, self._task_id = self._mixture.question(self._task)
        return Outcome(question, 0.0)

    def _advance(self, command: str) -> Outcome:
        right = self._answer is not None and _plain(command) == _plain(self._answer)
        return Outcome("", float(right), float(right), terminated=True, success=right)

    def _unreadable(self, last: Outcome, complaint: str) -> Outcome:
        return Outcome(complaint, 0.0, terminated=True, valid=False)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


@functools.lru_cache(maxsize=8)
def load_mixture(sources: tuple[DataSource, ...], split: Split, seed: int) -> Mixture:
    """Return the mixture of a split's files, read once.

    Raises:
        ConfigError: no file is of the split.
        DataError: a file cannot be read.
    """
    chosen = [source for source in sources if source.split == split]
    if not chosen:
        raise ConfigError(
            f"no data set has `split: {split}`; name one under `datasets`"
            + (", or set eval_episodes to 0" if split == "eval" else "")
        )
    return Mixture(chosen, seed)


def env_row(env: str) -> EnvRow:
    """Return the catalogue's row of ``env``, or the one that data sets have.

    Raises:
        ConfigError: there is no such environment.
    """
    if env == DATA_ENV:
        return EnvRow(id=DATA_ENV, family="data", entry_point="", max_turns=1, expert=False)
    return find(env)
