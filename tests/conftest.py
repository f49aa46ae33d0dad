"""Settings that every test shares: where data and caches are, and one thread per process."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

_REPOSITORY = Path(__file__).resolve().parents[1]
_BESIDE = _REPOSITORY.parent / "shared" / "data"

os.environ.setdefault("OMP_NUM_THREADS", "1")
# One cache for all runs of this checkout: building the tiny model takes a minute.
os.environ.setdefault("PZ_CACHE", str(_REPOSITORY / ".pytest_cache" / "pz"))
if _BESIDE.is_dir():
    os.environ.setdefault("PZ_DATA", str(_BESIDE))

# A shell starts background jobs with Ctrl-C ignored, and children inherit that; tests that
# interrupt a child need it to be as a terminal would have it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every run, and no deadline on a shared machine: a red run is a change of
# ours. To explore afresh: pytest --hypothesis-profile=default.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")


def pytest_collection_finish() -> None:
    """Leave what the imports made to itself when garbage is collected.

    Every training run collects some, which would take most of a second among half a million objects
    of torch and transformers.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return a process more than there are cores: many a test waits for what it has started."""
    return len(os.sched_getaffinity(0)) + 1
