"""Which cells share a line and a column of the table, and what the two are called.

A line is an algorithm with a model, a column an environment with its arguments. Labels name no
machine: an agent's file without its folder, a model without its server.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pz_bench import scores
from pz_bench.cell import CellResult, canonical
from pz_envs import catalog

_TEST_SPLITS = {"valid_seen": "seen", "valid_unseen": "unseen"}


def one_per_slot(results: Sequence[CellResult]) -> tuple[list[CellResult], list[str]]:
    """Return one cell a place in the table, the fullest, and a sentence for each left out."""
    slots = grouped(list(results), lambda cell: canonical(cell.spec.slot))
    kept, left_out = [], []
    for slot in sorted(slots):
        first, *others = sorted(slots[slot], key=_fullness)
        kept.append(first)
        left_out += [
            f"{scores.portable(cell.spec.title)}: {cell.status}, {len(cell.episodes)} episodes, "
            f"left out for {first.id}, a cell of the same place that is "
            + ("fuller" if _fullness(first)[:2] < _fullness(cell)[:2] else "as full")
            for cell in others
        ]
    return kept, left_out


def _fullness(cell: CellResult) -> tuple[Any, ...]:
    order = {"done": 0, "partial": 1, "failed": 2, "not_run": 3}
    found = (order[cell.status], -len(cell.episodes), not cell.data, cell.id)
    return (*found, cell.spec.model_dump_json())


def grouped(
    cells: Sequence[CellResult], key: Callable[[CellResult], str]
) -> dict[str, list[CellResult]]:
    """Return the cells by key, each group and the groups in the order in which they came."""
    groups: dict[str, list[CellResult]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return groups


def column(cell: CellResult) -> str:
    """Return the name of the column: the environment's id, and its arguments if it has any."""
    extra = settings_text(cell.spec.env_kwargs)
    name = catalog.find(cell.spec.env).id
    return f"{name} ({extra})" if extra else name


def short_name(cell: CellResult, only_one: bool) -> str:
    """Return what a column is called: without arguments when its id stands in it alone.

    Of two test splits that must be told apart it says which, the default one's too.
    """
    row = catalog.find(cell.spec.env)
    given = dict(cell.spec.env_kwargs)
    split = _TEST_SPLITS.get({**row.kwargs, **row.eval_kwargs, **given}.get("split", ""), "")
    if split:
        given.pop("split", None)
    extra = "" if only_one else settings_text(given)
    name = row.id.removeprefix("pz/").removesuffix("-v0")
    return " ".join(filter(None, (name, split, f"({extra})" if extra else "")))


def _line(cell: CellResult) -> str:
    return canonical([cell.spec.player, cell.spec.model])


def labelled(cells: Sequence[CellResult]) -> list[tuple[str, list[CellResult]]]:
    """Return the table's lines by label; models that differ only by folder or server get a mark."""
    lines = [
        (label, key, line)
        for key, line_cells in grouped(cells, _line).items()
        for label, line in _variants(line_cells)
    ]
    labels = [label for label, _, _ in lines]
    return [
        (label if labels.count(label) == 1 else f"{label} #{_mark(key)}", line)
        for label, key, line in lines
    ]


def _mark(key: str) -> str:
    return hashlib.blake2b(key.encode(), digest_size=2).hexdigest()


def _variants(cells: Sequence[CellResult]) -> list[tuple[str, list[CellResult]]]:
    """Return (label, cells); several only when one place was played with two settings."""
    base = _label(cells[0])
    by_settings = grouped(cells, lambda cell: canonical(settings(cell)))
    clash = any(
        len({canonical(settings(cell)) for cell in group}) > 1
        for group in grouped(cells, lambda cell: f"{column(cell)} {cell.spec.seed}").values()
    )
    if not clash:
        return [(base, list(cells))]
    every = [settings(group[0]) for group in by_settings.values()]
    differing = {
        key
        for one in every
        for key in one
        if len({canonical(other.get(key)) for other in every}) > 1
    }
    variants = []
    for group in by_settings.values():
        own = {key: value for key, value in settings(group[0]).items() if key in differing}
        variants.append((f"{base} ({settings_text(own) or 'default settings'})", group))
    return variants


def _label(cell: CellResult) -> str:
    model = model_name(cell.spec.model)
    return scores.portable(f"{cell.spec.player} · {model}" if model else cell.spec.player)


def model_name(model: str | None) -> str | None:
    """Return the model as a table shows it: no server's address, no machine's folders."""
    if model is None:
        return None
    name = model.partition("@")[0]
    return Path(name).name if Path(name).is_absolute() else name


def settings(cell: CellResult) -> dict[str, Any]:
    """Return the training settings and the agent's arguments."""
    return {**cell.spec.train, **cell.spec.agent_kwargs}


def settings_text(values: Mapping[str, Any]) -> str:
    """Return ``key=value`` pairs in order of their keys."""
    pairs = (f"{key}={_plain(values[key])}" for key in sorted(values))
    return scores.portable(", ".join(pairs))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
