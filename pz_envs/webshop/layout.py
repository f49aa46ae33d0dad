"""A folder of flat arrays with a header: how shops and goals lie on disk.

Written into a temporary folder beside its place and renamed when complete, so that a reader sees
all of it or nothing. The header names every file with its size and sha256; opening checks the
header's own checksum and the sizes, ``verify`` reads everything. Files are little-endian arrays.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pz_envs.errors import DataError, InfraError
from pz_envs.files import fsync_folder, sha256_file, write_atomic

HEADER = "header.json"
"""The file that makes a folder one of ours."""

VERSION = 1
"""Raised whenever an older reader would misread a newer folder."""

_FORMAT = "pz-webshop"


class FolderWriter:
    """Builds a folder that appears under its name only when ``finish`` is through.

    Use as a context manager: leaving it removes whatever was not finished.

    Args:
        target: the folder to make; its parent is created.

    Raises:
        InfraError: nothing can be written there.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
            self._folder.chmod(0o755)
        except OSError as error:
            raise _unwritable(target, error) from error
        self._files: dict[str, str] = {}

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise _unwritable(self.target, error) from error

    def add(self, name: str, dtype: Any) -> Path:
        """Return where to write the file ``name`` of elements ``dtype``."""
        self._files[name] = np.dtype(dtype).str
        return self._folder / name

    def save(self, name: str, values: NDArray[Any]) -> None:
        """Write an array as the file ``name``."""
        with open(self.add(name, values.dtype), "wb") as file:
            file.write(values.tobytes())

    def scratch(self, name: str) -> Path:
        """Return where to write a file that will not be part of the folder."""
        return self._folder / name

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the header with ``facts`` and put the folder in its place.

        Where another process has put the same folder there meanwhile, that one stays.
        """
        files = {}
        for name, dtype in self._files.items():
            path = self._folder / name
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            files[name] = {
                "size": path.stat().st_size,
                "sha256": sha256_file(path),
                "dtype": dtype,
            }
        body = {"format": _FORMAT, "version": VERSION, "facts": dict(facts), "files": files}
        text = json.dumps({**body, "checksum": _checksum(body)}, indent=1)
        for path in self._folder.iterdir():
            if path.name not in files:
                path.unlink()
        write_atomic(self._folder / HEADER, text)
        try:
            os.rename(self._folder, self.target)
        except OSError:
            if not (self.target / HEADER).is_file():
                raise
        fsync_folder(self.target.parent)


@dataclass(frozen=True, slots=True)
class Folder:
    """An opened folder: where it is, its header's facts, the element type of each file."""

    path: Path
    facts: Mapping[str, Any]
    dtypes: Mapping[str, str]
    remedy: str
    _views: list[mmap.mmap] = field(default_factory=list)

    def array(self, name: str) -> NDArray[Any]:
        """Return a file as a read-only memory-mapped array."""
        return np.frombuffer(self.view(name), dtype=self.dtypes[name])

    def view(self, name: str) -> mmap.mmap | bytes:
        """Return a file's memory-mapped content; an empty file cannot be mapped."""
        path = self.path / name
        if path.stat().st_size == 0:
            return b""
        with open(path, "rb") as file:
            self._views.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return self._views[-1]

    def let_go(self) -> None:
        """Unmap all pages read so far; they stay in the kernel's cache and come back when needed.

        A mapped page counts as memory of the process that read it, however many others read it too.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            for view in self._views:
                view.madvise(mmap.MADV_DONTNEED)

    def bytes(self, name: str) -> bytes:
        """Return a file's whole content."""
        return (self.path / name).read_bytes()

    def damaged(self, name: str, problem: str) -> DataError:
        """Return the error for a file found broken while reading."""
        return DataError(f"{self.path / name} is damaged ({problem}). {self.remedy}")


def is_folder(path: Path) -> bool:
    """Return whether ``path`` is such a folder, by its header's presence alone."""
    return (path / HEADER).is_file()


def open_folder(path: Path, remedy: str) -> Folder:
    """Open a folder and check its header and the size of every file.

    Args:
        path: the folder.
        remedy: what an error tells people to do, a sentence.

    Raises:
        DataError: the header or a file is missing, cut short, or of another version; the message
            names the file.
    """
    header = path / HEADER
    try:
        body = json.loads(header.read_bytes())
        checksum = body.pop("checksum")
        known = (body["format"], body["version"], body["facts"], body["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{header} cannot be read ({error!r:.120}). {remedy}") from error
    if known[:2] != (_FORMAT, VERSION):
        raise DataError(
            f"{header} has format {known[0]!r:.40} version {known[1]!r:.20}; this pz reads "
            f"{_FORMAT!r} version {VERSION}. {remedy}"
        )
    if checksum != _checksum(body):
        raise DataError(f"{header} is damaged (its checksum differs). {remedy}")
    for name, entry in known[3].items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != entry["size"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise DataError(f"{path / name} {found}; {entry['size']} are expected. {remedy}")
    return Folder(path, known[2], {name: one["dtype"] for name, one in known[3].items()}, remedy)


def verify(path: Path, remedy: str) -> None:
    """Check a folder as ``open_folder`` does, and every file's sha256.

    Raises:
        DataError: something differs; the message names the file.
    """
    open_folder(path, remedy)
    for name, entry in json.loads((path / HEADER).read_bytes())["files"].items():
        if sha256_file(path / name) != entry["sha256"]:
            raise DataError(f"{path / name} is damaged (its sha256 differs). {remedy}")


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _unwritable(target: Path, error: OSError) -> InfraError:
    return InfraError(
        f"cannot write {target} ({error.strerror or error}). Free space there, or choose another "
        "place: export PZ_CACHE=/some/folder, or another target folder"
    )
