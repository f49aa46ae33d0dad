r"""Published sets of problems as rows of a table, and files of one's own in the same layouts.

A file is JSON lines (``.jsonl``, ``.jsonl.gz``) or Parquet. In every row

- the problem is the first of ``problem``, ``question``, ``prompt``, ``input`` that is there: a
  text, or chat messages, of which the last by the user counts;
- the answer is the first of ``answer``, ``final_answer``, ``expected_answer``, ``ground_truth``,
  ``reward_model.ground_truth``, ``extra_info.answer``, ``solution`` that is there and not empty:
  what follows the last ``####``, else what the last ``\boxed{}`` holds, else all of it.

A problem that comes again is left out, so DAPO's AIME file of 30 problems 32 times has 30. Of
DAPO-Math-17k's 17,917 rows 17,290 differ, and 17,255 when spaces at the ends are taken off, as
here; 12 problems have two different answers there, of which the first is kept.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pz_envs.datasets import find_file
from pz_envs.errors import ConfigError, DataError, did_you_mean, require
from pz_envs.seeding import derive_seed

TEXT_COLUMNS = ("problem", "question", "prompt", "input")
"""Where a row may have its problem, in order."""

ANSWER_COLUMNS = (
    "answer",
    "final_answer",
    "expected_answer",
    "ground_truth",
    "reward_model.ground_truth",
    "extra_info.answer",
    "solution",
)
"""Where a row may have its answer, in order; a dot leads into a nested record."""

_DAPO_TEST = 300
_DAPO_BEFORE = "Solve the following math problem step by step."
_DAPO_AFTER = 'Remember to put your answer on its own line after "Answer:".'


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem, its gold answer as text, and a name that is the same in every process."""

    id: str
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """A published set: per split the names its file may have in the data folder ``math``.

    ``free`` says that ``pz-envs data get math`` brings it. ``split_here`` marks a set published in
    one piece, of which 300 problems, chosen by a hash of their text, are the test split.
    """

    title: str
    files: Mapping[str, tuple[str, ...]]
    free: bool = True
    split_here: bool = False


def _names(stem: str) -> tuple[str, ...]:
    return (f"{stem}.jsonl", f"{stem}.parquet")


SETS: Mapping[str, ProblemSet] = {
    "dapo_math_17k": ProblemSet(
        "DAPO-Math-17k",
        dict.fromkeys(("train", "test"), ("dapo_math_17k.parquet", "dapo_math_17k.jsonl")),
        split_here=True,
    ),
    "aime24": ProblemSet("AIME 2024", {"test": _names("aime24")}),
    "aime25": ProblemSet("AIME 2025", {"test": _names("aime25")}, free=False),
    "amc23": ProblemSet("AMC 12 2023", {"test": _names("amc23")}),
    "math500": ProblemSet("MATH-500", {"test": _names("math500")}),
    "gsm8k": ProblemSet("GSM8K", {"train": _names("gsm8k_train"), "test": _names("gsm8k_test")}),
    "minerva_math": ProblemSet("Minerva (OCWCourses)", {"test": _names("minerva_math")}),
    "olympiadbench": ProblemSet("OlympiadBench", {"test": _names("olympiadbench")}, free=False),
}
"""Every published set, by name."""


def load_set(name: str, split: str | None) -> tuple[Problem, ...]:
    """Return the problems of a published set.

    Args:
        name: a key of ``SETS``.
        split: ``"train"`` or ``"test"``; None means train where the set has it.

    Raises:
        ConfigError: no such set, or the set has no such split.
        DataError: the file is not here, or is broken.
    """
    if name not in SETS:
        allowed = ("generated", *SETS)
        raise ConfigError(
            f"No math set `{name}`.{did_you_mean(name, allowed)} Allowed: {', '.join(allowed)}"
        )
    chosen = SETS[name]
    split = split or next(iter(chosen.files))
    if split not in chosen.files:
        raise ConfigError(
            f"{chosen.title} has no split {split!r}. Allowed: {', '.join(chosen.files)}"
        )
    found = (find_file("math", file) for file in chosen.files[split])
    path = next((path for path in found if path is not None), None)
    if path is None:
        raise DataError(advice(chosen, chosen.files[split]))
    if chosen.split_here:
        return _side_of(load_file(path, f"math/{name}"), split)
    return load_file(path, f"math/{name}/{split}" if len(chosen.files) > 1 else f"math/{name}")


def load_path(path: str) -> tuple[Problem, ...]:
    """Return every problem of a file of one's own.

    Raises:
        DataError: there is no such file, or a row of it is no problem.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(
            f"No math file at {path}. Allowed: the path of a .jsonl, .jsonl.gz or .parquet file "
            f"with one of the columns {', '.join(TEXT_COLUMNS)} and one of "
            f"{', '.join(ANSWER_COLUMNS)}; or leave path out and name a dataset"
        )
    return load_file(file)


def load_file(path: Path, prefix: str | None = None) -> tuple[Problem, ...]:
    """Return the problems of a file, each once, in the file's order.

    Args:
        path: an existing file.
        prefix: what names begin with; by default ``math/`` and the file's stem.

    Raises:
        ConfigError: a Parquet file needs pyarrow.
        DataError: the file cannot be read, or a row of it is no problem.
    """
    stem = path.name.split(".")[0]
    status = path.stat()
    return _load(path, prefix or f"math/{stem}", status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _load(path: Path, prefix: str, size: int, mtime_ns: int) -> tuple[Problem, ...]:
    """Read a file once a version; ``size`` and ``mtime_ns`` are part of the cache's key."""
    problems: dict[str, Problem] = {}
    for place, row in _rows(path):
        text, answer = _text(row), _answer(row)
        if not text or not answer:
            missing, allowed = ("problem", TEXT_COLUMNS) if not text else ("answer", ANSWER_COLUMNS)
            raise DataError(f"{path}, {place}: no {missing} in any of {', '.join(allowed)}")
        problems.setdefault(text, Problem(f"{prefix}/{len(problems)}", text, answer))
    if not problems:
        raise DataError(f"{path} holds no problems")
    return tuple(problems.values())


def _rows(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if path.suffix == ".parquet":
        parquet = require("pyarrow.parquet", "pz-envs[math]")
        try:
            table = parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as Parquet: {error}") from error
        return ((f"row {number}", row) for number, row in enumerate(table))
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as JSON lines: {error}") from error
    lines = ((n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip())
    return ((f"line {number}", _record(path, number, line)) for number, line in lines)


def _record(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number}: {line[:80]!r} is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}, line {number}: {line[:80]!r} is not a JSON object")
    return record


def _text(row: Mapping[str, Any]) -> str:
    value = next((row[name] for name in TEXT_COLUMNS if row.get(name)), "")
    if isinstance(value, list):
        said = [m for m in value if isinstance(m, dict) and m.get("role") == "user"]
        value = said[-1].get("content", "") if said else ""
    if not isinstance(value, str):
        return ""
    text = value.strip()
    if text.startswith(_DAPO_BEFORE) and text.endswith(_DAPO_AFTER):
        text = text.removesuffix(_DAPO_AFTER).partition("\n\n")[2].strip()
    return text


def _answer(row: Mapping[str, Any]) -> str:
    for name in ANSWER_COLUMNS:
        value: Any = row
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        text = _final(value, boxed_only=name == "solution")
        if text:
            return text
    return ""


def _final(value: Any, *, boxed_only: bool) -> str:
    """Return the short answer in an answer column's value, or an empty text."""
    if isinstance(value, list):
        return ", ".join(filter(None, (_final(item, boxed_only=boxed_only) for item in value)))
    if isinstance(value, bool) or value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    _, marked, after = text.rpartition("####")
    if marked:
        return after.strip()
    boxed = last_boxed(text)
    return (boxed if boxed_only or boxed else text).strip()


def last_boxed(text: str) -> str:
    r"""Return what the last ``\boxed{}`` of ``text`` holds, or an empty text."""
    start = text.rfind("\\boxed{")
    depth = 0
    for position in range(start + 6, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + 7 : position]
    return ""


def _side_of(problems: tuple[Problem, ...], split: str) -> tuple[Problem, ...]:
    """Return our own split of a set: the problems with the smallest hashes are the test split."""
    ranked = sorted(problems, key=lambda problem: derive_seed("math-split", problem.text))
    test = {problem.text for problem in ranked[:_DAPO_TEST]}
    return tuple(problem for problem in problems if (problem.text in test) == (split == "test"))


def advice(chosen: ProblemSet, names: tuple[str, ...]) -> str:
    """Return a sentence on what is missing and how to get it."""
    where = f"set PZ_DATA to a folder that holds {' or '.join(f'math/{name}' for name in names)}"
    if chosen.free:
        return f"{names[0]} is not here. Get it: pz-envs data get math   or {where}"
    return (
        f"{chosen.title} is not here, and pz knows no source with a checked copy. Put your own "
        f"file there: {where}, or give path='...'"
    )
