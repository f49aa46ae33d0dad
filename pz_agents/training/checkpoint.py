"""Checkpoints: ``step_000120`` folders that are whole or absent, verified before they are used.

A checkpoint is written beside its final name, made durable, renamed, and only then are older ones
deleted. Its manifest holds the sha256 of every file; a checkpoint with a damaged or missing file
is passed over for the next older one, and a run of which none is whole is an error, never a
silent start from nothing. Weights for another process to play with are published the same way.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pz_envs.errors import ConfigError, DataError
from pz_envs.files import fsync_folder, sha256_file, write_atomic

MANIFEST = "manifest.json"
LATEST = "latest.json"

_NAME = re.compile(r"step_(\d{6,})")
_VERSIONS_OF = ("torch", "transformers", "trl")
_KEEP_PUBLISHED = 2
_RUN_FILES = ("checkpoints", "logs", "policy", "weights", "tensorboard", "wandb", "trackio")
_RUN_PATTERNS = (
    "config.json",
    "experience.db*",
    "*.jsonl",
    "bench.*",
    "training_metrics*",
    "ppo_metrics*",
)

_logger = logging.getLogger(__name__)


def save(
    checkpoints: Path,
    step: int,
    write: Callable[[Path], None],
    keep: int = 2,
    score: float | None = None,
) -> Path:
    """Write the checkpoint of ``step`` and delete all but the newest ``keep`` and the best.

    Args:
        checkpoints: the folder that holds the run's checkpoints.
        step: number of steps done.
        write: writes the files into the empty folder it is given.
        keep: how many to leave, this one included, whatever their scores.
        score: how good the policy is; the highest is the best.
    """
    target = checkpoints / f"step_{step:06d}"
    write_folder(target, write, score)
    kept = best(checkpoints)
    for old in steps_in(checkpoints)[keep:]:
        if old != kept:
            shutil.rmtree(old)
    return target


def write_folder(
    target: Path, write: Callable[[Path], None], score: float | None = None, *, durable: bool = True
) -> None:
    """Replace ``target`` by a folder with what ``write`` puts in it and a manifest.

    Args:
        target: the folder's final name.
        write: writes the files into the empty folder it is given.
        score: goes into the manifest.
        durable: survive a power cut, not only the end of the process.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(abandoned)
    temporary = target.parent / f".{target.name}.{os.getpid()}"
    temporary.mkdir()
    write(temporary)
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {
        "files": {
            path.relative_to(temporary).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
            }
            for path in files
        },
        "score": score,
        "versions": {name: _version(name) for name in _VERSIONS_OF},
    }
    write_atomic(temporary / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
    if durable:
        for path in files:
            _fsync_file(path)
        for folder in {path.parent for path in files}:
            fsync_folder(folder)
    if target.exists():
        target.rename(target.parent / f".{target.name}.old")
    temporary.rename(target)
    fsync_folder(target.parent)
    shutil.rmtree(target.parent / f".{target.name}.old", ignore_errors=True)


def problems(folder: Path) -> list[str]:
    """Return what is wrong with a folder that ``write_folder`` wrote; empty when it is whole."""
    try:
        files = _manifest(folder)["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder / MANIFEST}: {error}"]
    found = []
    for name, expected in files:
        path = folder / name
        if not path.is_file():
            found.append(f"{path} is missing")
        elif path.stat().st_size != expected["bytes"] or sha256_file(path) != expected["sha256"]:
            found.append(f"{path} is not the file that was saved (sha256 differs)")
    return found


def newest(checkpoints: Path) -> Path | None:
    """Return the newest whole checkpoint, or None when none was ever written.

    Newer ones that are damaged are renamed to ``step_N.damaged``.

    Raises:
        DataError: there are checkpoints and every one is damaged.
    """
    damaged: dict[Path, str] = {}
    for folder in steps_in(checkpoints):
        wrong = problems(folder)
        if wrong:
            damaged[folder] = wrong[0]
            continue
        for other, reason in damaged.items():
            aside = _free_name(other.with_name(f"{other.name}.damaged"))
            other.rename(aside)
            _logger.warning("%s; going on from %s, see %s", reason, folder, aside)
        return folder
    if damaged:
        raise DataError(
            f"no checkpoint in {checkpoints} is whole ({'; '.join(damaged.values())}); delete that "
            "folder to begin anew, or train into another one"
        )
    return None


def best(checkpoints: Path) -> Path | None:
    """Return the checkpoint with the highest score, the newest of equals; None without scores."""
    scores: list[tuple[float, int, Path]] = []
    for folder in steps_in(checkpoints):
        try:
            score = _manifest(folder).get("score")
        except (OSError, ValueError):
            continue
        if score is not None:
            scores.append((float(score), step_of(folder), folder))
    return max(scores)[2] if scores else None


def steps_in(checkpoints: Path) -> list[Path]:
    """Return the checkpoint folders, newest first, whole or not."""
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint folder is named after."""
    return int(folder.name.removeprefix("step_"))


def choose(run: Path, resume: str) -> Path | None:
    """Return the checkpoint that a run goes on from; None begins anew.

    Args:
        run: the run's folder.
        resume: ``auto`` takes the newest whole checkpoint if there is one; ``must`` takes it or
            fails; ``never`` moves what is there to ``before-N``; anything else is the path of a
            checkpoint, of this run or of another, or of another run.

    Raises:
        ConfigError: there is nothing to resume, or the run has checkpoints of its own already.
        DataError: every checkpoint, or the one that was named, is damaged.
    """
    if resume == "never":
        names = [path for path in map(run.joinpath, _RUN_FILES) if path.exists()]
        names += [path for pattern in _RUN_PATTERNS for path in run.glob(pattern)]
        set_aside(run, names)
        return None
    if resume not in ("auto", "must"):
        return _adopt(Path(resume), run)
    found = newest(run / "checkpoints")
    if found is None and resume == "must":
        raise ConfigError(
            f"--resume must: there is no checkpoint in {run / 'checkpoints'}. Name another "
            "folder, or use --resume auto to begin anew where there is none"
        )
    return found


def set_aside(run: Path, paths: list[Path]) -> None:
    """Move ``paths`` of a run into a new folder ``before-N`` of it; nothing is deleted."""
    if not paths:
        return
    aside = _free_name(run / "before-1")
    for path in paths:
        target = aside / path.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    _logger.warning("what was in %s is now in %s", run, aside)


@dataclass(frozen=True, slots=True)
class Published:
    """Weights to play with: after ``step`` steps and ``version`` updates.

    ``number`` counts publications; it grows even when a resumed run publishes a step again.
    """

    number: int
    step: int
    version: int
    folder: Path


def publish(weights: Path, write: Callable[[Path], None], step: int, version: int) -> Published:
    """Publish what ``write`` puts into the folder it is given; a reader sees all of it or nothing.

    The last two publications stay, so that a reader has time.
    """
    last = published(weights)
    number = last.number + 1 if last else 1
    folder = weights / f"{number:08d}"
    write_folder(folder, write, durable=False)
    told = {"number": number, "step": step, "version": version}
    write_atomic(weights / LATEST, json.dumps(told))
    for old in weights.iterdir():
        if old.is_dir() and old.name.isdigit() and int(old.name) <= number - _KEEP_PUBLISHED:
            shutil.rmtree(old)
    return Published(number, step, version, folder)


def published(weights: Path) -> Published | None:
    """Return the newest publication; None before the first."""
    try:
        told = json.loads((weights / LATEST).read_text("utf-8"))
    except FileNotFoundError:
        return None
    return Published(**told, folder=weights / f"{told['number']:08d}")


def _adopt(source: Path, run: Path) -> Path:
    """Make a named checkpoint the newest of ``run``."""
    if not _NAME.fullmatch(source.name):
        found = newest(source / "checkpoints")
        if found is None:
            raise ConfigError(
                f"--resume {source}: neither auto, never or must, nor a checkpoint "
                "(RUN/checkpoints/step_N), nor a run that has one"
            )
        source = found
    wrong = problems(source)
    if wrong:
        raise DataError(f"--resume {source}: {'; '.join(wrong)}")
    checkpoints = run / "checkpoints"
    own = steps_in(checkpoints)
    if source.resolve().parent == checkpoints.resolve():
        set_aside(run, [path for path in own if step_of(path) > step_of(source)])
        return checkpoints / source.name
    if own:
        raise ConfigError(
            f"--resume {source}: {run} has checkpoints of its own, the newest of step "
            f"{step_of(own[0])}. Leave --resume out to go on from it, or choose another --out"
        )
    target = checkpoints / source.name
    temporary = checkpoints / f".{source.name}.{os.getpid()}"
    shutil.copytree(source, temporary)
    metrics = source.resolve().parent.parent / "metrics.jsonl"
    if metrics.is_file():
        shutil.copyfile(metrics, run / "metrics.jsonl")
    temporary.rename(target)
    return target


def _manifest(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_text("utf-8"))


def _free_name(path: Path) -> Path:
    """Return ``path``, or with a higher number at its end when that is taken."""
    stem, number = path.name.rstrip("0123456789"), 1
    while path.exists():
        number += 1
        path = path.with_name(f"{stem}{number}")
    return path


def _fsync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _version(package: str) -> str:
    """Return a package's version; UniZero is trained without trl."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
