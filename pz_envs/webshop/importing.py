"""Reading the original's files without holding them: ``items_shuffle.json`` is gigabytes.

A JSON array or object is decoded one member at a time from a growing buffer. The attribute and
annotation files, keyed by ASIN in an order of their own, go into a temporary SQLite table that
lives on disk when it is large, and are looked up product by product.
"""

from __future__ import annotations

import gzip
import io
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from pz_envs.errors import ConfigError, DataError
from pz_envs.webshop.build import build_shop
from pz_envs.webshop.layout import HEADER
from pz_envs.webshop.products import Row, clean_products

OnImport = Callable[[int, float], None]
"""Told the number of products done and the share of the items file that is read, 0 to 1."""

_CHUNK = 1 << 20
_LONGEST_MEMBER = 1 << 26
_BLANK = " \t\r\n"
_AFTER = tuple(_BLANK + ",]}")


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """The original's files; ``people`` (human annotations) and ``nouns`` need not exist."""

    items: Path
    attributes: Path
    people: Path | None
    nouns: Path | None

    def present(self) -> tuple[Path, ...]:
        """Return those that exist."""
        return tuple(
            path
            for path in (self.items, self.attributes, self.people, self.nouns)
            if path is not None
        )


def find_source_files(folder: Path) -> SourceFiles:
    """Return the original's files in a folder, plain or ``.gz``.

    Raises:
        DataError: there is not exactly one ``items_shuffle*.json`` and one ``items_ins_v2*.json``.
    """
    found = []
    for pattern in ("items_shuffle*.json", "items_ins_v2*.json"):
        matching = sorted((*folder.glob(pattern), *folder.glob(f"{pattern}.gz")))
        if len(matching) != 1:
            raise DataError(
                f"{folder} holds {len(matching)} files {pattern}; exactly one is needed. The "
                "original's setup.sh says where they are downloaded from"
            )
        found.append(matching[0])
    optional = [
        next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
        for name in ("items_human_ins.json", "title_nouns.json")
    ]
    return SourceFiles(found[0], found[1], optional[0], optional[1])


def import_files(
    source: Path | str,
    target: Path | str,
    *,
    num_products: int | None = None,
    on_progress: OnImport | None = None,
) -> None:
    """Turn a folder with the original's files into a shop folder.

    Args:
        source: holds ``items_shuffle*.json``, ``items_ins_v2*.json`` and, for human goals,
            ``items_human_ins.json``; also ``title_nouns.json`` (title to its nouns) if there is.
        target: the folder to make; it must not exist, or be empty.
        num_products: how many records to look at; None for all.
        on_progress: told how far it is.

    Raises:
        ConfigError: ``target`` is taken, or ``num_products`` below 1.
        DataError: a file is missing or broken.
        InfraError: ``target`` cannot be written.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if not source.is_dir():
        raise DataError(f"{source} is no folder; name the one with items_shuffle.json")
    if num_products is not None and num_products < 1:
        raise ConfigError(f"num_products={num_products}: at least 1 is needed")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty; choose another target, or remove it")
    files = find_source_files(source)
    build_from_files(files, target, target.name, num_products, on_progress)
    if not (target / HEADER).is_file():
        raise ConfigError(f"{target} was taken while importing; choose another target")


def build_from_files(
    files: SourceFiles,
    target: Path,
    name: str,
    num_products: int | None,
    on_progress: OnImport | None = None,
) -> None:
    """Build the shop folder ``target``, named ``name``, from the original's files."""
    with closing(_Tables()) as tables:
        mined = tables.load("attributes", files.attributes)
        people = tables.load("people", files.people)
        nouns = tables.load("nouns", files.nouns)
        stream = JsonStream(files.items)

        def rows() -> Iterator[Row]:
            for _, record in islice(stream.members("["), num_products):
                asin = str(record.get("asin")) if isinstance(record, Mapping) else ""
                yield record, mined(asin) or {}, people(asin) or ()

        def report(done: int) -> None:
            if on_progress is not None:
                on_progress(done, stream.share)

        build_shop(
            clean_products(rows(), nouns=nouns),
            target,
            name=name,
            nouns="lexicon" if files.nouns is None else "given",
            on_progress=report,
        )


class _Tables:
    """Objects by key, in a temporary database that spills to disk."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("")

    def close(self) -> None:
        self._database.close()

    def load(self, name: str, path: Path | None) -> Callable[[str], Any]:
        """Read a JSON object into a table; return its look-up (None for an unknown key)."""
        self._database.execute(f"CREATE TABLE {name} (key BLOB PRIMARY KEY, value TEXT)")
        if path is not None:
            self._database.executemany(
                f"INSERT OR REPLACE INTO {name} VALUES (?, ?)",
                ((_key(key), json.dumps(value)) for key, value in JsonStream(path).members("{")),
            )
        select = f"SELECT value FROM {name} WHERE key = ?"

        def look_up(key: str) -> Any:
            row = self._database.execute(select, (_key(key),)).fetchone()
            return None if row is None else json.loads(row[0])

        return look_up


def _key(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


class JsonStream:
    """The members of one JSON array or object in a file, plain or ``.gz``, one at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = max(1, path.stat().st_size)
        self._read = 0
        self._decode = json.JSONDecoder().raw_decode
        self._text = ""
        self._at = 0
        self._ended = False

    @property
    def share(self) -> float:
        """The share of the file that has been read, 0 to 1."""
        return self._read / self._size

    def members(self, opening: str) -> Iterator[tuple[str, Any]]:
        """Yield the key (empty in an array) and value of each member.

        Args:
            opening: ``"["`` or ``"{"``, what the file must begin with.

        Raises:
            DataError: the file is not such JSON, or ends early.
        """
        with open(self._path, "rb") as raw:
            binary: Any = gzip.GzipFile(fileobj=raw) if self._path.suffix == ".gz" else raw
            with io.TextIOWrapper(binary, encoding="utf-8") as file:

                def fill(least: int) -> None:
                    self._fill(file, least)
                    self._read = raw.tell()

                yield from self._members(opening, fill)

    def _members(self, opening: str, fill: Callable[[int], None]) -> Iterator[tuple[str, Any]]:
        closing_sign = {"[": "]", "{": "}"}[opening]
        self._expect(opening, fill)
        sign = self._peek(fill)
        if sign == closing_sign:
            self._at += 1
        while sign != closing_sign:
            key = ""
            if opening == "{":
                key = self._value(fill)
                self._expect(":", fill)
            yield key, self._value(fill)
            sign = self._peek(fill)
            if sign not in (",", closing_sign):
                raise self._broken(f"expected , or {closing_sign}, found {sign!r}")
            self._at += 1
        if self._peek(fill):
            raise self._broken("there is more after its end")

    def _expect(self, sign: str, fill: Callable[[int], None]) -> None:
        found = self._peek(fill)
        if found != sign:
            raise self._broken(f"expected {sign}, found {found!r}")
        self._at += 1

    def _peek(self, fill: Callable[[int], None]) -> str:
        """Return the next sign that is not blank without passing it; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _BLANK:
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                return ""
            fill(1)

    def _value(self, fill: Callable[[int], None]) -> Any:
        self._peek(fill)
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                left = len(self._text) - self._at
                if self._ended or left > _LONGEST_MEMBER:
                    raise self._broken(str(error)) from error
                fill(left)
                continue
            except RecursionError as error:
                raise self._broken("it is nested too deeply") from error
            # A number may go on behind what has been read; text and brackets close themselves.
            whole = not isinstance(value, int | float) or self._text[end : end + 1] in _AFTER
            if self._ended or (whole and end < len(self._text)):
                self._at = end
                return value
            fill(1)

    def _fill(self, file: TextIO, least: int) -> None:
        """Read on by a chunk, or ``least`` characters; doubling keeps long members linear."""
        try:
            more = file.read(max(_CHUNK, least))
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"{self._path} cannot be read ({error}); fetch it again") from error
        self._ended = not more
        self._text = self._text[self._at :] + more
        self._at = 0

    def _broken(self, problem: str) -> DataError:
        return DataError(
            f"{self._path} is not JSON as WebShop publishes it: {problem}, about byte "
            f"{self._read}. Fetch it again"
        )
