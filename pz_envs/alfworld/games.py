"""ALFWorld games: from an archive or a folder, kept in one compact cache file, or generated.

A source is a ``.tar``, ``.tar.gz``, ``.tar.xz`` or ``.zip`` archive, or a folder, with
``<split>/<task>/<trial>/game.tw-pddl`` files anywhere below it. It is read once: problems and
walkthroughs go into a cache file of compressed records, built whole or not at all; a later start
reads its index alone. Games are sorted by name, never in the order of a directory; their task type
is the first word of the task's folder. Unsolvable games are left out, as the original does. Where
no game of ALFWorld's is on the machine at all, generated households stand in and a warning says so.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pz_envs import datasets
from pz_envs.alfworld.household import TASK_TYPES, generate
from pz_envs.alfworld.native import Record, World, task_line
from pz_envs.alfworld.pddl import NotCoveredError
from pz_envs.errors import ConfigError, DataError, did_you_mean
from pz_envs.files import write_atomic

Split = Literal["train", "valid_seen", "valid_unseen"]

GENERATED = "generated"
"""The ``source`` of procedural households."""

_FILE = "game.tw-pddl"
_MAGIC = b"pzA1"
_MISSING = (
    "The ALFWorld games of {split} are not here. Get them: "
    "pip install alfworld && alfworld-download   or put "
    "games_{split}.tar.xz into {folder}, set PZ_DATA to a folder that holds "
    "alfworld/games_{split}.tar.xz, name an archive or folder of game files: source=..., or play "
    "generated households: source='generated'"
)
_GENERATED_A_TYPE = {"train": 600, "valid_seen": 25, "valid_unseen": 25}
# RuntimeError: what zipfile raises for a member that is encrypted or packed in an unknown way.
_UNREADABLE = (
    OSError,
    EOFError,
    tarfile.TarError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
    RuntimeError,
)
_log = logging.getLogger(__name__)
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Game:
    """One game of a source: its name (``task/trial``) and task type."""

    name: str
    task_type: str


@dataclass(frozen=True, slots=True)
class Opened:
    """A game ready to play: ``world`` is None where the native engine does not cover the file."""

    record: Record
    world: World | None
    not_covered: str = ""


class Games:
    """The games of a split, in order; ``record`` reads one of them."""

    def __init__(
        self, source: str, games: tuple[Game, ...], record: Callable[[Game], Record]
    ) -> None:
        self.source = source
        self.games = games
        self.record = record
        self._by_name = {game.name: game for game in games}

    def find(self, name: str) -> Game:
        """Return a game by name.

        Raises:
            DataError: the source has no such game.
        """
        if name not in self._by_name:
            near = did_you_mean(name, self._by_name)
            raise DataError(f"No ALFWorld game `{name}` in {self.source}.{near}")
        return self._by_name[name]


def load_games(split: Split, source: str | None = None) -> Games:
    """Return the games of ``split``; the first call for a source reads all of it (seconds).

    Args:
        split: ``"train"``, ``"valid_seen"`` or ``"valid_unseen"``; where a source has folders of
            these names, the others are left out.
        source: an archive, a folder, or ``"generated"``; None looks for
            ``alfworld/games_<split>.tar.xz`` in ``PZ_DATA`` and the download folder, then for what
            ``alfworld-download`` left in ``$ALFWORLD_DATA`` or ``~/.cache/alfworld``, and generates
            games where no split is found.

    Raises:
        ConfigError: no such split.
        DataError: the source is missing or broken, or holds no game of the split.
    """
    if split not in get_args(Split):
        raise ConfigError(
            f"split={split!r}: allowed are {', '.join(get_args(Split))}."
            f"{did_you_mean(str(split), get_args(Split))}"
        )
    if source is None and not any(map(_published, get_args(Split))):
        _warn_generated()
        source = GENERATED
    if source == GENERATED:
        return _generated(split)
    path = _find_source(split, source)
    folder = datasets.cache_dir() / "alfworld"
    return _load(path, split, folder / f"{split}-{_fingerprint(path)}.games")


def missing_games(split: Split = "train") -> str | None:
    """Return None when ``split`` can be played, else a sentence with the way to its games.

    A split is missing where another one is here; without any, generated games stand in for all.

    Raises:
        DataError: ``PZ_DATA`` names a folder that does not exist.
    """
    if _published(split) is not None or not any(map(_published, get_args(Split))):
        return None
    return _MISSING.format(split=split, folder=datasets.download_root() / "alfworld")


@functools.lru_cache(maxsize=8)
def _load(path: Path, split: Split, cached: Path) -> Games:
    """Open or build the cache file, whose name tells the version of the source."""
    header = _read_header(cached)
    if header is None:
        _build(path, split, cached)
        header = _read_header(cached)
    if header is None:
        raise DataError(f"the ALFWorld cache file {cached} cannot be read. Remove it: rm {cached}")
    offset, index = header
    places = {name: (offset + start, length) for name, start, length in index["games"]}
    games = tuple(Game(name, name.partition("-")[0]) for name in places)

    def record(game: Game) -> Record:
        return _read_record(cached, *places[game.name], index["texts"])

    return Games(str(path), games, record)


@functools.cache
def _generated(split: Split) -> Games:
    """Return the procedural games of a split; each is made when it is opened (about 10 ms)."""
    numbers = {
        Game(f"{task_type}-generated-{number:05d}/{split}", task_type): number
        for task_type in TASK_TYPES
        for number in range(_GENERATED_A_TYPE[split])
    }

    def record(game: Game) -> Record:
        return generate(game.task_type, split, numbers[game])

    return Games(GENERATED, tuple(numbers), record)


@functools.cache
def _warn_generated() -> None:
    """Say once a process that these are not ALFWorld's own games."""
    _log.warning(
        "no ALFWorld games found: generated households stand in for all splits. For the published "
        "games: pip install alfworld && alfworld-download, or set PZ_DATA"
    )


@functools.lru_cache(maxsize=256)
def open_game(games: Games, game: Game) -> Opened:
    """Read and parse a game; the environments of one process share the result.

    Raises:
        DataError: the file is broken or has an expression that nothing may evaluate.
    """
    record = games.record(game)
    try:
        return Opened(record, World(record.domain, record.problem, record.grammar))
    except NotCoveredError as error:
        return Opened(record, None, str(error))
    except DataError as error:
        raise DataError(f"{games.source}, game {game.name}: {error}") from error


def choose(games: Sequence[Game], task_types: Sequence[str] | str | None) -> tuple[Game, ...]:
    """Return the games of the given task types, all without.

    Raises:
        ConfigError: no such task type.
        DataError: no game is left.
    """
    if task_types is None:
        return tuple(games)
    wanted = (task_types,) if isinstance(task_types, str) else tuple(task_types)
    for name in wanted:
        if name not in TASK_TYPES:
            raise ConfigError(
                f"task_types has {name!r}.{did_you_mean(name, TASK_TYPES)} "
                f"Allowed: {', '.join(TASK_TYPES)}"
            )
    left = tuple(game for game in games if game.task_type in wanted)
    if not left:
        raise DataError(f"there are no ALFWorld games of task_types={wanted!r} in this split")
    return left


def _find_source(split: Split, source: str | None) -> Path:
    if source is not None:
        path = Path(source).expanduser()
        if not path.exists():
            raise DataError(
                f"No ALFWorld games at {source}. Allowed: a folder or an archive (.tar.xz, "
                f".tar.gz, .tar, .zip) with <split>/<task>/<trial>/{_FILE} files"
            )
        return path.resolve()
    found = _published(split)
    if found is None:
        raise DataError(_MISSING.format(split=split, folder=datasets.download_root() / "alfworld"))
    return found.resolve()


def _published(split: Split) -> Path | None:
    """Return pz's archive of a split, or the folder that ``alfworld-download`` filled."""
    found = datasets.find_file("alfworld", f"games_{split}.tar.xz")
    if found is not None:
        return found
    theirs = os.environ.get("ALFWORLD_DATA") or "~/.cache/alfworld"
    folder = Path(theirs).expanduser() / "json_2.1.1" / split
    return folder if folder.is_dir() else None


def _fingerprint(path: Path) -> str:
    """Return a digest that changes with the source: sizes and times, not contents."""
    digest = hashlib.blake2b(str(path).encode("utf-8", "surrogateescape"), digest_size=12)
    files = sorted(path.rglob(_FILE)) if path.is_dir() else [path]
    for file in files:
        status = file.stat()
        line = f"\n{file}\0{status.st_size}\0{status.st_mtime_ns}"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _build(path: Path, split: Split, cached: Path) -> None:
    """Read every game of a split and write the cache file."""
    found: dict[str, list[Any]] = {}
    texts: dict[str, int] = {}
    try:
        for member, content in _members(path):
            parts = member.split("/")
            if len(parts) >= 4 and parts[-4] in get_args(Split) and parts[-4] != split:
                continue
            name = "/".join(parts[-3:-1])
            fields = _fields(path, member, content, texts)
            if fields is not None:
                found[name] = fields
    except _UNREADABLE as error:
        raise DataError(
            f"{path} cannot be read as an archive of ALFWorld games ({error}). It may be cut "
            "short: fetch it again"
        ) from error
    if not found:
        raise DataError(
            f"{path} holds 0 ALFWorld games of {split}. Expected files like "
            f"{split}/pick_and_place_simple-Mug-None-Desk-308/trial_1/{_FILE}"
        )
    index: list[tuple[str, int, int]] = []
    blobs: list[bytes] = []
    start = 0
    for name in sorted(found):
        blob = zlib.compress(json.dumps(found[name], separators=(",", ":")).encode())
        index.append((name, start, len(blob)))
        blobs.append(blob)
        start += len(blob)
    head = zlib.compress(json.dumps({"texts": list(texts), "games": index}).encode())
    write_atomic(cached, b"".join([_MAGIC, len(head).to_bytes(4, "little"), head, *blobs]))


def _fields(path: Path, member: str, content: bytes, texts: dict[str, int]) -> list[Any] | None:
    """Return a game's record, common texts by number, or None for an unsolvable game."""
    try:
        data = json.loads(content)
        domain, grammar, problem = data["pddl_domain"], data["grammar"], data["pddl_problem"]
        walkthrough = data.get("walkthrough") or []
        solvable = data.get("solvable", True)
        task = task_line(grammar)
        if not domain.strip():
            raise ValueError("its pddl_domain is empty")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: {member} is no ALFWorld game file ({error!r})") from error
    if not solvable:
        return None
    common = grammar.replace(task, "\0")
    for text in (domain, common):
        texts.setdefault(text, len(texts))
    problem = _SPACE.sub(" ", re.sub(r";[^\n]*", "", problem))
    return [texts[domain], texts[common], task, problem, walkthrough]


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every game file of a folder or archive."""
    if path.is_dir():
        for file in sorted(path.rglob(_FILE)):
            yield file.as_posix(), file.read_bytes()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as bundle:
            for name in bundle.namelist():
                if name.rpartition("/")[2] == _FILE:
                    yield name, bundle.read(name)
    else:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is not None and member.name.rpartition("/")[2] == _FILE:
                    yield member.name, stream.read()


def _read_record(cached: Path, start: int, length: int, texts: list[str]) -> Record:
    """Read a game's texts from the cache file.

    Raises:
        DataError: the cache file was damaged or removed meanwhile.
    """
    try:
        with open(cached, "rb") as file:
            file.seek(start)
            fields = json.loads(zlib.decompress(file.read(length)))
    except (OSError, ValueError, zlib.error) as error:
        raise DataError(
            f"the cached ALFWorld games in {cached} cannot be read ({error}). "
            f"Remove the file and start again: rm {cached}"
        ) from error
    domain, grammar, task, problem, walkthrough = fields
    grammar_text = texts[grammar].replace("\0", task)
    return Record(texts[domain], problem, grammar_text, tuple(walkthrough))


def _read_header(cached: Path) -> tuple[int, dict[str, Any]] | None:
    """Return where the records begin and the index, or None if the file is absent or damaged."""
    try:
        with open(cached, "rb") as file:
            head = file.read(8)
            length = int.from_bytes(head[4:], "little")
            index = json.loads(zlib.decompress(file.read(length)))
    except (OSError, ValueError, zlib.error):
        return None
    return (8 + length, index) if head[:4] == _MAGIC and "games" in index else None
