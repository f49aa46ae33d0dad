"""What works on this machine for the benchmark, found without starting anything."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

_PACKAGES = ("pz-envs", "pz-agents", "pz-bench", "torch", "transformers", "trl", "jericho")
_LEAST_FREE_GB = 1.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at; ``fatal`` when no benchmark can run because of it."""

    ok: bool
    text: str
    fatal: bool = False


def findings(runs: Path) -> list[Finding]:
    """Return everything worth knowing before a run, each with what mends it."""
    found = [
        Finding(True, f"Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores")
    ]
    found += [_package(name) for name in _PACKAGES]
    found.append(_space(runs))
    found += _environments()
    return found


def _package(name: str) -> Finding:
    try:
        return Finding(True, f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        extra = {"trl": "pz-agents[train]", "jericho": "pz-envs[jericho]"}.get(name, name)
        needed = name.startswith("pz-")
        return Finding(False, f"{name}: pip install '{extra}'", fatal=needed)


def _space(runs: Path) -> Finding:
    folder = next(path for path in (runs.absolute(), *runs.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free / 1e9
    if not os.access(folder, os.W_OK):
        return Finding(False, f"{folder} cannot be written; choose another --runs", fatal=True)
    if free < _LEAST_FREE_GB:
        return Finding(
            False, f"{folder} has {free:.1f} GB free; make room or choose another --runs"
        )
    return Finding(True, f"{folder} has {free:.1f} GB free for runs")


def _environments() -> list[Finding]:
    """Return one finding a family and one for each environment of the starter that is missing."""
    from pz_bench.matrix import expand, load_matrix
    from pz_envs import catalog
    from pz_envs.families import FAMILIES

    found = []
    for family in FAMILIES.values():
        rows = [row for row in catalog.rows() if row.family == family.name]
        playable = sum(catalog.missing(row) is None for row in rows)
        found.append(Finding(playable > 0, f"{family.title}: {playable} of {len(rows)} playable"))
    wanted = dict.fromkeys(spec.env for spec in expand(load_matrix("starter")))
    for env_id in wanted:
        reason = catalog.missing(catalog.find(env_id))
        if reason is not None:
            found.append(Finding(False, f"{env_id}: {reason}"))
    return found
