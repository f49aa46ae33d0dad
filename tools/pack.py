"""Packs what a suite's table is made of into leaderboards/SUITE.tar.gz, for those who rebuild it.

    python tools/pack.py SUITE [RUNS] [OUT]
    tar xzf leaderboards/SUITE.tar.gz -C FOLDER
    pz-bench report --suite SUITE --runs FOLDER --check

The same store gives the same bytes. Logs and checkpoints stay behind.
"""

from __future__ import annotations

import argparse
import gzip
import io
import tarfile
from pathlib import Path

from pz_bench import store
from pz_envs.files import write_atomic

KEPT = ("cell.json", "episodes.jsonl", "train/metrics.jsonl", "train/timings.jsonl")


def pack(suite: str, runs: Path) -> bytes:
    """Return the archive of a suite's cells."""
    folders = sorted(
        store.cell_folder(runs, cell.id) for cell in store.read_suite(runs, suite).cells
    )
    paths = [runs / "suites" / f"{suite}.json"]
    paths += [path for folder in folders for name in KEPT if (path := folder / name).is_file()]
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", filename="", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in paths:
            content = path.read_bytes()
            entry = tarfile.TarInfo(str(path.relative_to(runs)))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("suite")
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"))
    parser.add_argument("out", type=Path, nargs="?", default=Path("leaderboards"))
    given = parser.parse_args()
    target = given.out / f"{given.suite}.tar.gz"
    write_atomic(target, pack(given.suite, given.runs))
    print(f"{target}: {target.stat().st_size / 1024:.0f} KiB")
