"""The committed tables are what their committed stores say."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from pz_bench import publish, store

LEADERBOARDS = Path(__file__).parents[2] / "leaderboards"
ARCHIVES = sorted(LEADERBOARDS.glob("*.tar.gz"))


def test_every_table_has_its_store_beside_it():
    tables = {path.stem for path in LEADERBOARDS.glob("*.md")}
    assert tables == {path.name.removesuffix(".tar.gz") for path in ARCHIVES}


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name)
def test_a_committed_table_is_rebuilt_from_its_store_byte_for_byte(archive, tmp_path):
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    assert store.verify(tmp_path) == []
    assert publish.differences(tmp_path, store.suite_names(tmp_path), LEADERBOARDS) == []
