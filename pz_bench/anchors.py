"""Published figures of other people's systems, to stand under a table and never in its ranking.

``anchors.json`` holds them with their source, protocol and how they were checked. A figure belongs
to a column only when the column's name is the same, arguments included: other splits are other
tasks. Percent and shares of one are shown in percent; raw points in percent of the game's maximum,
and as they were printed. Their conditions differ from ours; the protocol says how.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_UNITS = {"percent": 0.01, "share": 1.0}


@dataclass(frozen=True, slots=True)
class Source:
    """Where figures come from, under which protocol, and how they were checked."""

    key: str
    source: str
    protocol: str
    verified: str


@dataclass(frozen=True, slots=True)
class Published:
    """One figure: ``value`` is a share of one, as our scores are, ``printed`` as its source has it.

    ``success`` is the success rate where the source gives one beside its score. Values below 0
    (points lost) stay below 0.
    """

    environment: str
    system: str
    value: float
    printed: str
    source: str
    success: float | None = None


def published(environments: Iterable[str]) -> tuple[Published, ...]:
    """Return the figures of the columns of these names, best first within a column and source."""
    found = _by_environment()
    return tuple(figure for name in environments for figure in found.get(name, ()))


def sources(figures: Iterable[Published]) -> tuple[Source, ...]:
    """Return the sources of these figures, in the file's order."""
    used = {figure.source for figure in figures}
    return tuple(
        Source(each["key"], each["source"], each["protocol"], each["verified"])
        for each in _file()
        if each["key"] in used
    )


@functools.cache
def _file() -> list[dict[str, Any]]:
    read: list[dict[str, Any]] = json.loads(Path(__file__).with_name("anchors.json").read_bytes())
    return read


@functools.cache
def _by_environment() -> dict[str, tuple[Published, ...]]:
    found: dict[str, list[Published]] = {}
    for each in _file():
        columns: dict[str, list[Published]] = {}
        for system, row in each["rows"].items():
            for environment, value in row.items():
                columns.setdefault(environment, []).append(
                    _figure(each, system, environment, float(value))
                )
        for environment, figures in columns.items():
            ordered = sorted(figures, key=lambda figure: (-figure.value, figure.system))
            found.setdefault(environment, []).extend(ordered)
    return {environment: tuple(figures) for environment, figures in found.items()}


def _figure(group: dict[str, Any], system: str, environment: str, value: float) -> Published:
    success = group.get("success", {}).get(system)
    if group["unit"] == "points":
        most = group["most"][environment]
        share, printed = value / most, f"{value:g} of {most:g} points"
    else:
        share = value * _UNITS[group["unit"]]
        printed = f"{value:g} %" if group["unit"] == "percent" else f"{value:g} of 1"
    return Published(
        environment,
        system,
        round(share, 6) + 0.0,
        printed,
        group["key"],
        None if success is None else round(success / 100, 6),
    )
