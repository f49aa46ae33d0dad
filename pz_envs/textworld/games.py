"""Which games there are, and where their files lie: settings, the cache, story files by path.

A game is named by its settings, its seed and TextWorld's version, and kept under that name in the
cache (``textworld`` below ``PZ_CACHE``), so it is made once. It is written whole or not at all, by
one process while others wait, and made again when it is damaged. Train, valid and test games have
seeds of their own; cooking games also keep the foods and preparations of TextWorld's own splits.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pz_envs.datasets import cache_dir
from pz_envs.errors import ConfigError, DataError, EnvError, InfraError, did_you_mean
from pz_envs.files import write_atomic

Challenge = Literal["cooking", "treasure", "coin", "mixed"]
Split = Literal["train", "valid", "test"]

SKILLS = ("take", "open", "cook", "cut", "drop")
"""What a cooking game can ask for beside preparing and eating the meal."""

_GENERATE = Path(__file__).with_name("generate.py")
_GENERATORS = {
    "cooking": "tw-cooking",
    "treasure": "tw-treasure_hunter",
    "coin": "tw-coin_collector",
}
_LEVELS = {"treasure": (11, 20), "coin": (105, 115)}
_ROOMS = (1, 6, 9, 12)
_FIRST_SEED = {"train": 0, "valid": 1_000_000, "test": 2_000_000}
_MOST_GAMES = 1_000_000
_TIMEOUT_S = 600.0
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Options:
    """What decides the set of games; game *i* of a set is always the same.

    level: lowest and highest level, taken in turn: treasure 1 to 30, coin 1 to 233 without those
        of more than 100 rooms; None is 11 to 20 and 105 to 115.
    recipe: fewest and most ingredients of cooking games, taken in turn; 1 to 5.
    rooms: of cooking games; 1, 6, 9 or 12.
    skills: of cooking games; some of ``SKILLS``.
    route: the opening text of treasure and coin games tells the whole way, as TextWorld's own
        default does, and not only the last command.
    """

    challenge: Challenge
    split: Split
    level: tuple[int, int] | None
    recipe: tuple[int, int]
    rooms: int
    skills: tuple[str, ...]
    route: bool

    def __post_init__(self) -> None:
        _check("challenge", self.challenge, get_args(Challenge))
        _check("split", self.split, get_args(Split))
        for skill in self.skills:
            _check("skills", skill, SKILLS)
        if not 1 <= self.recipe[0] <= self.recipe[1] <= 5:
            raise ConfigError(f"recipe={self.recipe}: needed is 1 <= fewest <= most <= 5")
        if self.rooms not in _ROOMS:
            raise ConfigError(f"rooms={self.rooms}: allowed are {', '.join(map(str, _ROOMS))}")
        if self.level is not None:
            self._check_level(self.level)

    def spec(self, index: int) -> dict[str, Any]:
        """Return all that makes game ``index`` of the set, as JSON data."""
        challenge: str = self.challenge
        if challenge == "mixed":
            challenges = tuple(_GENERATORS)
            index, place = divmod(index, len(challenges))
            challenge = challenges[place]
        settings: dict[str, Any]
        if challenge == "cooking":
            ingredients = _in_turn(self.recipe, index)
            settings = {
                "split": self.split,
                "recipe": ingredients,
                "take": ingredients if "take" in self.skills else 0,
                "go": self.rooms,
                "recipe_seed": 0,
            }
            settings |= {skill: skill in self.skills for skill in SKILLS if skill != "take"}
        else:
            settings = {"level": _in_turn(self.level or _LEVELS[challenge], index)}
        return {
            "challenge": challenge,
            "generator": _GENERATORS[challenge],
            "settings": settings,
            "seed": _FIRST_SEED[self.split] + index,
            "route": self.route,
        }

    def _check_level(self, level: tuple[int, int]) -> None:
        low, high = level
        if self.challenge not in _LEVELS:
            raise ConfigError(
                f"level={level} is for the challenges {' and '.join(_LEVELS)}, not "
                f"{self.challenge}; a cooking game has recipe, rooms and skills"
            )
        if self.challenge == "treasure" and not 1 <= low <= high <= 30:
            raise ConfigError(f"level={level}: treasure needs 1 <= lowest <= highest <= 30")
        if self.challenge == "coin" and not (
            1 <= low <= high and all(_coin_rooms(one) <= 100 for one in range(low, high + 1))
        ):
            raise ConfigError(
                f"level={level}: coin needs levels within 1-100, 101-150 or 201-233 (100 rooms at "
                "most)"
            )


@dataclass(frozen=True, slots=True)
class Story:
    """A story file's bytes and those of the description beside it, if there is one."""

    rom: bytes
    description: Mapping[str, Any] | None

    @property
    def digest(self) -> str:
        """What tells stories apart, in 16 hex digits."""
        return hashlib.blake2b(self.rom, digest_size=8).hexdigest()


@functools.cache
def textworld_version() -> str:
    """Return the version of the installed TextWorld, without importing it.

    Raises:
        ConfigError: it is not installed, or what it needs is not.
    """
    for module in ("textworld", "jericho"):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"`{module}` is not installed. Install it: pip install 'pz-envs[textworld]'"
            )
    return importlib.metadata.version("textworld")


def cached_path(spec: Mapping[str, Any]) -> Path:
    """Return where the game of ``spec`` lies, or will."""
    name = json.dumps([_FORMAT, textworld_version(), spec], sort_keys=True)
    key = hashlib.blake2b(name.encode(), digest_size=10).hexdigest()
    folder = cache_dir().absolute() / "textworld"  # an engine's process is in another folder
    return folder / f"{spec['challenge']}-{key}.zip"


def prepare(spec: Mapping[str, Any]) -> Path:
    """Return the file of the game of ``spec``; makes it (seconds) when it is not there or damaged.

    Raises:
        ConfigError: TextWorld is not installed.
        EnvError: TextWorld cannot make this game.
        InfraError: it took too long, or the cache cannot be written.
    """
    path = cached_path(spec)
    if not _is_whole(path):
        with _locked(path):
            if not _is_whole(path):
                # A pool of environments asks for many games at once: build as many as cores.
                slot = int(path.stem[-8:], 16) % (os.cpu_count() or 1)
                with _locked(path.parent.with_name(f"textworld-building-{slot}"), keep=True):
                    write_atomic(path, build(spec))
    return path


def build(spec: Mapping[str, Any]) -> bytes:
    """Make the game of ``spec`` in a fresh process; returns a zip of ``game.z8`` and ``game.json``.

    Raises:
        EnvError: TextWorld cannot make this game.
        InfraError: it took too long.
    """
    with tempfile.TemporaryDirectory(prefix="pz-textworld-") as folder:
        environment = os.environ | {"PYTHONHASHSEED": "0", "TMPDIR": folder}
        try:
            done = subprocess.run(
                [sys.executable, "-P", str(_GENERATE), json.dumps(spec), folder],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise InfraError(
                f"TextWorld took more than {_TIMEOUT_S:g} s to make {dict(spec)}; "
                "choose a lower level"
            ) from error
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip()[-500:]
            raise EnvError(
                f"TextWorld could not make {dict(spec)} (exit code {done.returncode}): {said}. "
                "Choose another level, or fewer skills or rooms"
            )
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("game.z8", "game.json"):
                entry = zipfile.ZipInfo(name)  # with a date of 1980, whatever the clock says
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, (Path(folder) / name).read_bytes())
        return packed.getvalue()


def read_story(path: Path) -> Story:
    """Read a game of the cache, or a ``.z8`` file and the ``.json`` beside it, and check it.

    Raises:
        DataError: the file is missing, damaged, or of another kind.
        EnvError: it is a Glulx file, which TextWorld itself no longer plays.
    """
    if path.suffix == ".ulx":
        raise EnvError(
            f"{path} is a Glulx file; TextWorld 1.7 and pz play .z8 files only. Make the game "
            "again from its .json with TextWorld 1.7: textworld.generator.compile_game(game, "
            "options) with options.path='game.z8'"
        )
    if path.suffix not in (".z8", ".zip"):
        raise DataError(f"{path}: a TextWorld game is a .z8 file (with its .json beside it)")
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                rom, text = archive.read("game.z8"), archive.read("game.json")
        else:
            rom, beside = path.read_bytes(), path.with_suffix(".json")
            text = beside.read_bytes() if beside.is_file() else b""
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"the TextWorld game {path} cannot be read ({reason})") from error
    _check_rom(path, rom)
    if not text:
        return Story(rom, None)
    try:
        description = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"{path.with_suffix('.json')} is no JSON ({error}); copy it again, or remove it to "
            "play without admissible commands and expert"
        ) from error
    if not (
        isinstance(description, dict)
        and "KB" in description
        and isinstance(description.get("metadata", {}), dict)
    ):
        raise DataError(f"{path.with_suffix('.json')} does not describe a TextWorld game")
    return Story(rom, description)


def _check_rom(path: Path, rom: bytes) -> None:
    """Check version, length and checksum, which the interpreter would die of."""
    if len(rom) < 64 or rom[0] != 8:
        raise DataError(f"{path} is no Z-machine story file of version 8")
    length = int.from_bytes(rom[0x1A:0x1C], "big") * 8
    whole = 64 < length <= len(rom)
    if not whole or sum(rom[64:length]) & 0xFFFF != int.from_bytes(rom[0x1C:0x1E], "big"):
        raise DataError(
            f"{path} is truncated or damaged ({len(rom)} bytes, its header says {length}, and its "
            "checksum differs); copy or make it again"
        )


def _is_whole(path: Path) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return _version_is_whole(str(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _version_is_whole(path: str, size: int, mtime_ns: int) -> bool:
    try:
        read_story(Path(path))
    except DataError:
        return False
    return True


@contextmanager
def _locked(path: Path, *, keep: bool = False) -> Iterator[None]:
    """Hold the lock of one game of the cache; the kernel frees it when the holder dies.

    ``keep`` leaves the file there, so that those who wait and those who come later meet.
    """
    lock = path.with_suffix(".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InfraError(
            f"cannot write to the cache {lock.parent} ({error.strerror}). "
            "Name one that can be written: export PZ_CACHE=/some/folder"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        if not keep:
            lock.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _coin_rooms(level: int) -> int:
    """Return the rooms of a coin game of this level (one, two or three times its way)."""
    return ((level - 1) // 100 + 1) * ((level - 1) % 100 + 1) if level <= 300 else sys.maxsize


def _in_turn(bounds: tuple[int, int], index: int) -> int:
    return bounds[0] + index % (bounds[1] - bounds[0] + 1)


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Return one number, or lowest and highest, as two.

    Raises:
        ConfigError: it is neither.
    """
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or not all(isinstance(one, int) for one in both):
        raise ConfigError(f"{name}={value!r}: needed is one number, or lowest and highest")
    return both[0], both[1]


def check_games(games: int) -> None:
    """Check the number of games of a set.

    Raises:
        ConfigError: it is out of range.
    """
    if not 1 <= games <= _MOST_GAMES:
        raise ConfigError(f"games={games}: allowed are 1 to {_MOST_GAMES}")


def _check(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"{name}={value!r}.{did_you_mean(str(value), allowed)} Allowed: {', '.join(allowed)}"
        )
