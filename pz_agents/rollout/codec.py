"""Trajectories to bytes or JSON and back; no pickle.

``encode`` packs a trajectory's text as JSON and its token arrays as raw little-endian numbers, bit
for bit, under a checksum. A conversation's prompts grow at their end, so each prompt is kept as
the length it shares with the previous prompt and completion, and the rest: the size is linear in
the episode's length, not quadratic. Lists of admissible commands, which no learner reads, are left
out.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from pz_agents.sdk.types import Ids, LogProbs, Sample, Step, Trajectory
from pz_envs.errors import DataError

_STEP_FIELDS = tuple(each.name for each in fields(Step) if each.name != "admissible_commands")
_SAMPLE_SCALARS = ("finish", "version", "temperature")
_MAGIC = b"pzT1"


def trajectory_to_json(trajectory: Trajectory) -> dict[str, Any]:
    """Return a plain dictionary that ``json.dumps`` takes and ``trajectory_from_json`` reads.

    Raises:
        DataError: a step's ``notes`` hold something that JSON cannot express.
    """
    document = _document(trajectory)
    for step, plain in zip(trajectory.steps, document["steps"], strict=True):
        if step.sample is not None:
            plain["sample"]["prompt_ids"] = step.sample.prompt_ids.tolist()
            plain["sample"]["token_ids"] = step.sample.token_ids.tolist()
            plain["sample"]["log_probs"] = step.sample.log_probs.tolist()
    return document


def trajectory_from_json(document: Mapping[str, Any]) -> Trajectory:
    """Return the trajectory that ``trajectory_to_json`` was given.

    Raises:
        DataError: a field is missing or unknown.
    """
    try:
        samples = [
            (
                np.asarray(plain["sample"]["prompt_ids"], dtype=np.int32),
                np.asarray(plain["sample"]["token_ids"], dtype=np.int32),
                np.asarray(plain["sample"]["log_probs"], dtype=np.float32),
            )
            for plain in document["steps"]
            if plain["sample"] is not None
        ]
        return _rebuild(document, samples)
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise DataError(f"this is no trajectory ({type(error).__name__}: {error})") from error


def encode(trajectory: Trajectory) -> bytes:
    """Return magic, JSON length, crc32 of the rest, JSON, ids (int32), log-probs (float32).

    Raises:
        DataError: an array has the wrong type or shape, or ``notes`` are not JSON.
    """
    lengths: list[tuple[int, int, int]] = []
    ids: list[Ids] = []
    log_probs: list[LogProbs] = []
    seen: Ids = np.zeros(0, dtype=np.int32)
    for step in trajectory.steps:
        sample = step.sample
        if sample is None:
            continue
        _check(trajectory.key, sample)
        shared = _common_prefix(seen, sample.prompt_ids)
        rest = sample.prompt_ids[shared:]
        lengths.append((shared, len(rest), len(sample.token_ids)))
        ids += [rest, sample.token_ids]
        log_probs.append(sample.log_probs)
        seen = np.concatenate([sample.prompt_ids, sample.token_ids])
    document = _document(trajectory)
    document["lengths"] = lengths
    text = json.dumps(document, separators=(",", ":")).encode()
    arrays = [array.astype(array.dtype.newbyteorder("<")).tobytes() for array in [*ids, *log_probs]]
    body = b"".join([text, *arrays])
    return _MAGIC + struct.pack("<II", len(text), zlib.crc32(body)) + body


def decode(blob: bytes) -> Trajectory:
    """Return the trajectory that ``encode`` was given, its arrays bit-equal.

    Raises:
        DataError: the bytes are damaged or no trajectory.
    """
    if len(blob) < 12 or blob[:4] != _MAGIC:
        raise DataError(f"these {len(blob)} bytes are no stored trajectory")
    length, checksum = struct.unpack("<II", blob[4:12])
    if zlib.crc32(memoryview(blob)[12:]) != checksum:
        raise DataError("a stored trajectory is damaged (checksum differs)")
    document = json.loads(blob[12 : 12 + length])
    lengths = document.pop("lengths")
    sampled = sum(tokens for _, _, tokens in lengths)
    count = sum(rest for _, rest, _ in lengths) + sampled
    ids = np.frombuffer(blob, "<i4", count, offset=12 + length).astype(np.int32)
    probs = np.frombuffer(blob, "<f4", sampled, 12 + length + 4 * count).astype(np.float32)
    samples: list[tuple[Ids, Ids, LogProbs]] = []
    seen: Ids = np.zeros(0, dtype=np.int32)
    for shared, rest, tokens in lengths:
        prompt = np.concatenate([seen[:shared], ids[:rest]])
        samples.append((prompt, ids[rest : rest + tokens].copy(), probs[:tokens].copy()))
        seen = np.concatenate([prompt, samples[-1][1]])
        ids, probs = ids[rest + tokens :], probs[tokens:]
    return _rebuild(document, samples)


def _document(trajectory: Trajectory) -> dict[str, Any]:
    """Return everything but the token arrays."""
    document = {
        field.name: getattr(trajectory, field.name)
        for field in fields(Trajectory)
        if field.name != "steps"
    }
    document["steps"] = [_plain_step(trajectory.key, step) for step in trajectory.steps]
    return document


def _plain_step(key: str, step: Step) -> dict[str, Any]:
    plain = {name: getattr(step, name) for name in _STEP_FIELDS}
    sample = step.sample
    plain["sample"] = (
        None if sample is None else {name: getattr(sample, name) for name in _SAMPLE_SCALARS}
    )
    try:
        plain["notes"] = json.loads(json.dumps(dict(step.notes))) if step.notes else {}
    except (TypeError, ValueError) as error:
        raise DataError(
            f"episode {key}: Action.notes must be JSON (text, numbers, lists, mappings): {error}"
        ) from error
    return plain


def _rebuild(document: Mapping[str, Any], samples: list[tuple[Ids, Ids, LogProbs]]) -> Trajectory:
    arrays = iter(samples)
    steps = []
    for plain in document["steps"]:
        scalars = plain["sample"]
        sample = None
        if scalars is not None:
            sample = Sample(*next(arrays), **{name: scalars[name] for name in _SAMPLE_SCALARS})
        steps.append(Step(**{**plain, "sample": sample}))
    return Trajectory(**{**document, "steps": tuple(steps)})


def _check(key: str, sample: Sample) -> None:
    wanted = {"prompt_ids": np.int32, "token_ids": np.int32, "log_probs": np.float32}
    for name, dtype in wanted.items():
        array = getattr(sample, name)
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
            found = f"{array.dtype}{array.shape}" if isinstance(array, np.ndarray) else type(array)
            raise DataError(f"episode {key}: Sample.{name} must be [N] {dtype.__name__}; {found}")
    if len(sample.token_ids) != len(sample.log_probs):
        raise DataError(
            f"episode {key}: {len(sample.token_ids)} token ids but "
            f"{len(sample.log_probs)} log-probs in one Sample"
        )


def _common_prefix(first: Ids, second: Ids) -> int:
    length = min(len(first), len(second))
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if len(differs) else length
