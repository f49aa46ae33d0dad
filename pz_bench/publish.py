"""From the store to the written leaderboards, and whether the two still agree."""

from __future__ import annotations

import filecmp
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pz_bench import store

if TYPE_CHECKING:
    from pz_bench.report import Leaderboard


def build_suite(runs: Path, name: str) -> Leaderboard:
    """Return a suite's leaderboard from the store alone.

    Raises:
        ConfigError: the store has no such suite.
        DataError: a file of it is broken.
    """
    from pz_bench import report
    from pz_bench.report import curves

    title = store.read_suite(runs, name).title
    results = store.load_suite(runs, name)
    training = {
        cell.id: steps
        for cell in results
        if (steps := curves.read(store.cell_folder(runs, cell.id)))
    }
    return report.build(results, name, title, training)


def publish(runs: Path, name: str, out: Path) -> tuple[Leaderboard, list[Path]]:
    """Write a suite's leaderboard under ``out``; returns it and the files."""
    from pz_bench import report

    leaderboard = build_suite(runs, name)
    return leaderboard, report.write(leaderboard, out)


def differences(runs: Path, names: Sequence[str], out: Path) -> list[str]:
    """Return how the files under ``out`` differ from what the store gives, naming each file."""
    problems = []
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            _, files = publish(runs, name, Path(scratch))
            for fresh in files:
                written = out / fresh.relative_to(scratch)
                again = f"Write it anew: pz-bench report --suite {name} --runs {runs} --out {out}"
                if not written.is_file():
                    problems.append(f"{written} is not there. {again}")
                elif not filecmp.cmp(fresh, written, shallow=False):
                    problems.append(f"{written} is not what the store gives. {again}")
    return problems
