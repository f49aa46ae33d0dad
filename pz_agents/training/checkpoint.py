"""Checkpoints: ``step_000120`` folders that are whole or absent, verified before they are used.

A checkpoint is written beside its final name, made durable, renamed, and only then are older ones
deleted. Its manifest holds the sha256 of every file; a checkpoint with a damaged or missing file
is passed over for the next older one, and a run of which none is whole is an error, never a
silent start from nothing.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from pz_envs.errors import DataError
from pz_envs.files import fsync_folder, sha256_file, write_atomic

MANIFEST = "manifest.json"

_NAME = re.compile(r"step_(\d{6,})")
_logger = logging.getLogger(__name__)


def save(checkpoints: Path, step: int, write: Callable[[Path], None], keep: int = 2) -> Path:
    """Write the checkpoint of ``step`` and delete all but the newest ``keep``.

    Args:
        checkpoints: the folder that holds the run's checkpoints.
        step: number of steps done.
        write: writes the files into the empty folder it is given.
        keep: how many to leave, this one included.
    """
    target = checkpoints / f"step_{step:06d}"
    write_folder(target, write)
    for old in steps_in(checkpoints)[keep:]:
        shutil.rmtree(old)
    return target


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Replace ``target`` by a folder with what ``write`` puts in it and a manifest."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(abandoned)
    temporary = target.parent / f".{target.name}.{os.getpid()}"
    temporary.mkdir()
    write(temporary)
    files = _files(temporary)
    hashes = {str(path.relative_to(temporary)): sha256_file(path) for path in files}
    write_atomic(temporary / MANIFEST, json.dumps(hashes, indent=1, sort_keys=True))
    for path in files:
        _fsync_file(path)
    for folder in {path.parent for path in files}:
        fsync_folder(folder)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    fsync_folder(target.parent)


def problems(folder: Path) -> list[str]:
    """Return what is wrong with a folder that ``write_folder`` wrote; empty when it is whole."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError) as error:
        return [f"{folder / MANIFEST}: {error}"]
    found = []
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path} is missing")
        elif sha256_file(path) != expected:
            found.append(f"{path} is not the file that was saved (sha256 differs)")
    return found


def newest(checkpoints: Path) -> Path | None:
    """Return the newest whole checkpoint, or None when none was ever written.

    Raises:
        DataError: there are checkpoints and every one is damaged.
    """
    found = steps_in(checkpoints)
    reasons = []
    for folder in found:
        wrong = problems(folder)
        if not wrong:
            return folder
        _logger.warning("checkpoint passed over: %s", "; ".join(wrong))
        reasons += wrong[:1]
    if found:
        raise DataError(
            f"no checkpoint in {checkpoints} is whole ({'; '.join(reasons)}); delete that folder "
            "to begin anew, or train into another one"
        )
    return None


def steps_in(checkpoints: Path) -> list[Path]:
    """Return the checkpoint folders, newest first, whole or not."""
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint folder is named after."""
    return int(folder.name.removeprefix("step_"))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fsync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
