"""A full disk: noticed before a checkpoint is begun, and told as what it is anywhere else."""

from __future__ import annotations

import contextlib
import errno
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from pz_agents.training import checkpoint
from pz_envs.errors import InfraError

SPARE = 1.2
"""Room that a checkpoint is given, as a multiple of the last one's size."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def room_for_another(checkpoints: Path) -> bool:
    """Return whether a checkpoint like the newest one would fit; True before the first."""
    there = checkpoint.steps_in(checkpoints)
    if not there:
        return True
    size = sum(path.stat().st_size for path in there[0].rglob("*") if path.is_file())
    return shutil.disk_usage(checkpoints).free >= SPARE * size


@contextlib.contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    """Turn the failure of a write for want of room into an error that says so.

    Raises:
        InfraError: the disk of ``folder`` is full.
    """
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        number = getattr(error, "errno", None)
        if number not in _FULL and "disk is full" not in str(error):
            raise
        raise InfraError(
            f"the disk of {folder} is full ({error}). What was saved is whole: free some room, "
            "and the same command goes on from the last checkpoint"
        ) from error
