"""Countdown puzzles from Countdown-Tasks files: JSON lines with ``nums`` and ``target``."""

from __future__ import annotations

import functools
import gzip
import io
import json
from pathlib import Path
from typing import Any

from pz_envs.countdown.puzzles import Puzzle, Split
from pz_envs.datasets import find_file
from pz_envs.errors import DataError, require

FILES: dict[Split, str] = {
    "train": "countdown_train_first10240.jsonl.gz",
    "test": "countdown_test1024_UFT.jsonl.gz",
}


def load_tasks(source: str, split: Split) -> tuple[Puzzle, ...]:
    """Return every puzzle of a file.

    Args:
        source: ``"tasks"`` for the published rows of ``split``, or the path of a ``.jsonl`` or
            ``.jsonl.gz`` file, which is taken whole.
        split: which published file.

    Raises:
        DataError: there is no such file, or a line in it is no puzzle.
    """
    if source == "tasks":
        path = find_file("countdown", FILES[split])
        if path is None:
            raise DataError(
                f"{FILES[split]} is not here. Get it: pz-envs data get countdown   or set PZ_DATA "
                f"to a folder that holds countdown/{FILES[split]}"
            )
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise DataError(
                f"No Countdown file at {source}. Allowed: 'generated', 'tasks', or the path of a "
                ".jsonl or .jsonl.gz file with `nums` and `target` in each line"
            )
    status = path.stat()
    return _load(path, status.st_size, status.st_mtime_ns)


def jsonl_from_parquet(content: bytes, rows: int) -> bytes:
    """Rewrite the first ``rows`` rows of a Countdown Parquet file as JSON lines.

    The numbers are read from ``nums`` and ``target``, or from ``reward_model.ground_truth``.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: the rows have neither form.
    """
    parquet = require("pyarrow.parquet", "pyarrow")
    lines = []
    for index, row in enumerate(parquet.read_table(io.BytesIO(content)).to_pylist()[:rows]):
        truth = row if "nums" in row else (row.get("reward_model") or {}).get("ground_truth") or {}
        numbers, target = truth.get("nums", truth.get("numbers")), truth.get("target")
        if numbers is None or target is None:
            raise DataError(f"row {index} of the Parquet file has no numbers and target: {row!r}")
        record = {"nums": [int(n) for n in numbers], "target": int(target), "row": index}
        lines.append(json.dumps(record) + "\n")
    return "".join(lines).encode()


@functools.lru_cache(maxsize=8)
def _load(path: Path, size: int, mtime_ns: int) -> tuple[Puzzle, ...]:
    """Read a file once a version; ``size`` and ``mtime_ns`` are part of the cache's key."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as JSON lines: {error}") from error
    lines = enumerate(text.splitlines(), start=1)
    puzzles = tuple(_puzzle(path, number, line) for number, line in lines if line.strip())
    if not puzzles:
        raise DataError(f"{path} holds no puzzles")
    return puzzles


def _puzzle(path: Path, number: int, line: str) -> Puzzle:
    try:
        record: Any = json.loads(line)
        numbers = tuple(int(n) for n in record["nums"])
        puzzle = Puzzle(numbers, int(record["target"]))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f'{path}, line {number}: {line[:80]!r} is not {{"nums": [...], "target": ...}} '
            f"({error!r})"
        ) from error
    if not numbers or min(numbers) < 0:
        raise DataError(f"{path}, line {number}: numbers must be whole and not negative")
    return puzzle
