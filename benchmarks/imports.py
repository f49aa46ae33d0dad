"""How long imports and ``--help`` take: medians over fresh processes, one table.

Run: python benchmarks/imports.py [repeats]. The bare interpreter and gymnasium are shown because
they are the floor: pz_envs cannot import quicker than gymnasium does. Limits are those that the
project holds itself to; on a busy machine look at the column with the minimum.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = ("pz_envs", "pz_agents", "pz_bench")
IMPORT_LIMIT_S = 0.25
HELP_LIMIT_S = 0.30


def fresh(command: list[str], repeats: int) -> list[float]:
    """Return the wall times in seconds of ``command`` in new processes, sorted."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return sorted(times)


def main() -> None:
    """Measure and print the table; a program that is not installed is left out and named."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    rows: list[tuple[str, list[str], float | None]] = [
        ("python -c pass", [sys.executable, "-c", "pass"], None),
        ("import gymnasium", [sys.executable, "-c", "import gymnasium"], None),
    ]
    for name in PACKAGES:
        rows.append((f"import {name}", [sys.executable, "-c", f"import {name}"], IMPORT_LIMIT_S))
    for name in PACKAGES:
        script = Path(sys.executable).parent / name.replace("_", "-")
        rows.append((f"{script.name} --help", [str(script), "--help"], HELP_LIMIT_S))
    print(f"{'':<20} {'median s':>9} {'min s':>9} {'limit s':>9}")
    for label, command, limit in rows:
        try:
            fresh(command, 1)  # compiles bytecode, warms the disk cache
            times = fresh(command, repeats)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{label:<20} cannot run: {error}")
            continue
        middle = statistics.median(times)
        bound = "" if limit is None else f"{limit:9.2f} {'ok' if middle <= limit else 'OVER'}"
        print(f"{label:<20} {middle:9.3f} {times[0]:9.3f} {bound}")


if __name__ == "__main__":
    main()
