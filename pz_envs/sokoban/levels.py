"""Sokoban levels: the usual symbols, Boxoban's files, and which split a level belongs to.

Cells are numbered row by row (``row * width + column``). A level is closed by walls, has as many
boxes as targets, and is not solved at its start. Boxoban files hold levels below headings like
``; 17``; its unfiltered levels come in train, valid and test, its medium ones in train and valid,
and its hard ones, which have no split, are divided here by a hash that turning or mirroring a
level does not change.
"""

from __future__ import annotations

import functools
import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pz_envs.datasets import find_file
from pz_envs.errors import ConfigError, DataError, did_you_mean
from pz_envs.seeding import derive_seed

Split = Literal["train", "valid", "test"]
Difficulty = Literal["unfiltered", "medium", "hard"]

SPLITS: dict[str, tuple[str, ...]] = {
    "unfiltered": ("train", "valid", "test"),
    "medium": ("train", "valid"),
    "hard": ("train", "valid", "test"),
}
"""The splits of each Boxoban difficulty."""

_FLOOR, _WALL, _BOX, _TARGET, _PLAYER = " #$.@"
_BOX_ON_TARGET, _PLAYER_ON_TARGET = "*+"
_SYMBOLS = frozenset("# $.@*+")
_MOST_FILES = 1000
_MAX_SIDE = 64


class _BadLevel(ValueError):
    """The text is no level: the message says why, ``line`` where, counted from 0."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True, slots=True)
class Level:
    """A start position; ``name`` is a file and number, or a hash."""

    name: str
    width: int
    height: int
    walls: frozenset[int]
    targets: frozenset[int]
    boxes: frozenset[int]
    player: int

    @property
    def rows(self) -> tuple[str, ...]:
        """The start position in symbols, one string a row."""
        return draw_rows(self, self.player, self.boxes)

    def place(self, cell: int) -> tuple[int, int]:
        """Return row and column of a cell, both from 1."""
        return cell // self.width + 1, cell % self.width + 1


def draw_rows(level: Level, player: int, boxes: frozenset[int]) -> tuple[str, ...]:
    """Return a position in the symbols ``# $.@*+``, one string a row."""
    cells = list(_ground(level))
    for cell in boxes:
        cells[cell] = _BOX_ON_TARGET if cell in level.targets else _BOX
    cells[player] = _PLAYER_ON_TARGET if player in level.targets else _PLAYER
    text = "".join(cells)
    return tuple(text[i : i + level.width] for i in range(0, len(text), level.width))


def parse_level(text: str, name: str = "") -> Level:
    """Read one level from its symbols, one line a row.

    Raises:
        DataError: the text is no level; the message says what is wrong with it.
    """
    try:
        return _parsed(text.strip("\n").split("\n"), name)
    except _BadLevel as error:
        raise DataError(f"line {error.line + 1} of the level: {error}") from error


def read_levels(path: Path, name: str) -> tuple[Level, ...]:
    """Read a file of levels, ``.txt`` or ``.txt.gz``; each file is read once a version.

    The levels are named ``name/17`` after their headings.

    Raises:
        DataError: the file cannot be read, or a level in it is wrong; the message names the line.
    """
    status = path.stat()
    return _read(path, name, status.st_size, status.st_mtime_ns)


def load_levels(source: str, split: Split, difficulty: Difficulty) -> tuple[Level, ...]:
    """Return the levels of a source.

    Args:
        source: ``"boxoban"`` for the published files of ``difficulty`` and ``split``, numbered
            from 000, as many as are here without a gap, named as published
            (``medium/train/000.txt``) or flat and packed (``medium_train_000.txt.gz``); or the
            path of a file, taken whole.
        split: see ``SPLITS``.
        difficulty: ``"unfiltered"``, ``"medium"`` or ``"hard"``.

    Raises:
        ConfigError: no such split or difficulty.
        DataError: there is no such file, or one is broken.
    """
    if source != "boxoban":
        path = Path(source).expanduser()
        if not path.is_file():
            raise DataError(
                f"No Sokoban levels at {source}. Allowed: 'generated', 'boxoban', or the path of a "
                ".txt or .txt.gz file of levels"
            )
        return read_levels(path, path.name.removesuffix(".gz").removesuffix(".txt"))
    _check(difficulty, tuple(SPLITS), "difficulty")
    _check(split, SPLITS[difficulty], f"split of {difficulty} levels")
    by_file = difficulty != "hard"
    folder = f"{difficulty}/{split}" if by_file else difficulty
    levels: list[Level] = []
    for number in range(_MOST_FILES):
        names = (f"{folder}/{number:03}.txt", f"{folder.replace('/', '_')}_{number:03}.txt.gz")
        paths = (find_file("boxoban", name) for name in names)
        found = next((path for path in paths if path is not None), None)
        if found is None:
            break
        levels += read_levels(found, f"{folder.replace('/', '_')}_{number:03}")
    if not levels:
        raise DataError(
            f"{folder}/000.txt is not here. Get it: pz-envs data get boxoban   or set PZ_DATA to "
            f"a folder that holds boxoban/{folder}/000.txt, for example a clone of boxoban-levels"
        )
    return tuple(level for level in levels if by_file or split_of(level) == split)


@functools.lru_cache(maxsize=16_384)
def split_of(level: Level) -> Split:
    """Return the split of a level that no file assigns: test 2 in 10, valid 1 in 10, else train.

    A level, its mirror images and its turned forms are in the same split.
    """
    share = derive_seed("sokoban-split", *_canonical(level.rows)) % 10
    return "test" if share < 2 else "valid" if share == 2 else "train"


def named_by_hash(level: Level) -> Level:
    """Return the level with a name that its symbols decide."""
    return replace(level, name=f"own-{derive_seed('sokoban-level', *level.rows) % 16**10:010x}")


def check_split(split: str) -> None:
    """Refuse anything but ``train``, ``valid`` and ``test``.

    Raises:
        ConfigError: ``split`` is something else.
    """
    _check(split, ("train", "valid", "test"), "split")


def _check(value: str, allowed: tuple[str, ...], what: str) -> None:
    if value not in allowed:
        raise ConfigError(
            f"No {what} {value!r}.{did_you_mean(value, allowed)} Allowed: {', '.join(allowed)}"
        )


def _canonical(rows: Sequence[str]) -> tuple[str, ...]:
    forms = []
    for _ in range(4):
        rows = tuple("".join(column) for column in zip(*reversed(rows), strict=True))
        forms += [rows, tuple(row[::-1] for row in rows)]
    return min(forms)


@functools.lru_cache(maxsize=1024)
def _read(path: Path, name: str, size: int, mtime_ns: int) -> tuple[Level, ...]:
    """Read a file once a version; ``size`` and ``mtime_ns`` are part of the cache's key."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as Sokoban levels: {error}") from error
    levels: list[Level] = []
    for heading, first, rows in _blocks(text):
        try:
            levels.append(_parsed(rows, f"{name}/{heading or len(levels)}"))
        except _BadLevel as error:
            raise DataError(f"{path}:{first + error.line}: {error}") from error
    if not levels:
        raise DataError(f"{path} holds no Sokoban levels")
    return tuple(levels)


def _blocks(text: str) -> Iterator[tuple[str, int, list[str]]]:
    """Yield heading, number of the first row's line (from 1), and rows of each level."""
    heading, rows = "", list[str]()
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        line = line.rstrip("\r")
        if line.strip() and not line.startswith(";"):
            rows.append(line)
            continue
        if rows:
            yield heading, number - len(rows), rows
            heading, rows = "", []
        if line.startswith(";"):
            heading = line[1:].strip()[:40]


def _parsed(rows: Sequence[str], name: str) -> Level:
    width, height = max(map(len, rows)), len(rows)
    if not (3 <= width <= _MAX_SIDE and 3 <= height <= _MAX_SIDE):
        raise _BadLevel(f"a level is 3 to {_MAX_SIDE} cells wide and high, not {width} x {height}")
    for line, row in enumerate(rows):
        for symbol in row:
            if symbol not in _SYMBOLS:
                raise _BadLevel(f"{symbol!a} is no symbol of a level; allowed are `# $.@*+`", line)
    cells = "".join(row.ljust(width) for row in rows)
    players = _where(cells, "@+")
    boxes, targets = _where(cells, "$*"), _where(cells, ".*+")
    if len(players) != 1:
        raise _BadLevel(f"a level has one player, not {len(players)}")
    if len(boxes) != len(targets) or not boxes:
        raise _BadLevel(
            f"a level has as many boxes as targets; here are {len(boxes)} and {len(targets)}"
        )
    if boxes == targets:
        raise _BadLevel("every box is on a target already")
    (player,) = players
    level = Level(name, width, height, _where(cells, "#"), targets, boxes, player)
    room = _room(level)
    for cell in room:
        if cell % width in (0, width - 1) or cell // width in (0, height - 1):
            raise _BadLevel("walls do not close it", cell // width)
    outside = min((boxes | targets) - room, default=None)
    if outside is not None:
        raise _BadLevel("a box or target is where the player can never be", outside // width)
    return level


@functools.lru_cache(maxsize=256)
def _ground(level: Level) -> str:
    cells = range(level.width * level.height)
    marks = (
        _WALL if c in level.walls else _TARGET if c in level.targets else _FLOOR for c in cells
    )
    return "".join(marks)


def _where(cells: str, symbols: str) -> frozenset[int]:
    return frozenset(cell for cell, symbol in enumerate(cells) if symbol in symbols)


def _room(level: Level) -> set[int]:
    """Return the cells that the player could reach if there were no boxes, edge cells at most."""
    seen, pending = {level.player}, [level.player]
    while pending:
        cell = pending.pop()
        row, column = divmod(cell, level.width)
        if row in (0, level.height - 1) or column in (0, level.width - 1):
            continue
        for after in (cell - 1, cell + 1, cell - level.width, cell + level.width):
            if after not in seen and after not in level.walls:
                seen.add(after)
                pending.append(after)
    return seen
