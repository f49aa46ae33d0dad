"""Two stores become one: what is copied, what is kept, and what is refused."""

from __future__ import annotations

import shutil

import pytest

from pz_bench import store
from pz_bench.cli import main
from pz_bench.merge import merge
from pz_envs.errors import ConfigError, DataError


def run(runs, *words):
    command = ["run", "-a", "random", "-e", "pz/Countdown-v0", "-n", "2", "--suite", "both"]
    code = main([*command, *words, "--runs", str(runs), "--out", str(runs.parent / "tables")])
    assert code == 0


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two stores: one has a cell, the other has the same cell, measured again, and a second."""
    folder = tmp_path_factory.mktemp("measured")
    run(folder / "one", "--seeds", "0")
    run(folder / "other", "--seeds", "0,1")
    return folder


@pytest.fixture
def two(measured, tmp_path):
    for name in ("one", "other"):
        shutil.copytree(measured / name, tmp_path / name)
    return tmp_path / "one", tmp_path / "other"


def test_cells_only_the_other_store_has_are_copied_and_tables_are_the_same(two):
    one, other = two
    assert main(["merge", str(other), "--runs", str(one)]) == 0
    assert [f.name for f in store.cell_folders(one)] == [f.name for f in store.cell_folders(other)]
    assert store.verify(one) == []
    assert len(store.read_suite(one, "both").cells) == 2
    again = merge(one, other)
    assert (again.copied, again.replaced, again.conflicts) == ((), (), ())
    assert len(again.equal) == 2


def test_the_fuller_cell_is_kept(two):
    one, other = two
    folder = store.cell_folders(one)[0]
    lines = (folder / store.EPISODES).read_bytes().splitlines(keepends=True)
    store.reopen_cell(folder)
    (folder / store.EPISODES).write_bytes(lines[0])
    assert folder.name in merge(one, other).replaced
    assert store.read_cell(folder).status == "done"
    assert not list(one.glob(".*"))


def test_two_that_are_done_and_differ_are_reported_and_ours_stays(two, capsys):
    one, other = two
    ours = store.cell_folders(one)[0]
    theirs = store.cell_folder(other, ours.name)
    path = theirs / store.EPISODES
    path.write_text(path.read_text().replace('"invalid":0', '"invalid":1'))
    store.finish_cell(theirs, "done")
    before = (ours / store.EPISODES).read_bytes()
    assert main(["merge", str(other), "--runs", str(one)]) == 1
    assert ours.name in capsys.readouterr().err
    assert (ours / store.EPISODES).read_bytes() == before


def test_what_is_only_there_to_be_looked_at_makes_no_difference(two):
    one, other = two
    theirs = store.cell_folder(other, store.cell_folders(one)[0].name)
    path = theirs / store.EPISODES
    path.write_text(
        path.read_text().replace(
            '"action":', '"admissible_commands":["up"],"notes":{"llm_latency":0.5},"action":'
        )
    )
    store.finish_cell(theirs, "done")
    found = merge(one, other)
    assert (found.equal, found.conflicts) == ((theirs.name,), ())


def test_a_damaged_store_is_refused_before_anything_is_copied(two):
    one, other = two
    for folder in store.cell_folders(other):
        path = folder / store.EPISODES
        path.write_text(path.read_text().replace("0", "1", 1))
    before = [folder.name for folder in store.cell_folders(one)]
    with pytest.raises(DataError, match="sha256"):
        merge(one, other)
    assert [folder.name for folder in store.cell_folders(one)] == before


def test_merging_into_an_empty_store_copies_it_whole(two, tmp_path):
    _, other = two
    fresh = tmp_path / "fresh"
    assert len(merge(fresh, other).copied) == 2
    shutil.rmtree(other)
    assert main(["report", "--runs", str(fresh), "--out", str(tmp_path / "t")]) == 0


def test_no_store_and_this_store_are_refused(two, tmp_path):
    one, _ = two
    with pytest.raises(ConfigError, match="holds no cells"):
        merge(one, tmp_path / "nothing")
    with pytest.raises(ConfigError, match="is this store"):
        merge(one, one)


def test_a_fresh_cell_is_measured_again_from_nothing(two, capsys):
    one, _ = two
    cell = store.cell_folders(one)[0]
    before = (cell / store.CELL).stat().st_mtime_ns
    run(one, "--seeds", "0")
    assert (cell / store.CELL).stat().st_mtime_ns == before
    run(one, "--seeds", "0", "--fresh", cell.name)
    assert (cell / store.CELL).stat().st_mtime_ns > before
    assert store.verify(one) == []
    capsys.readouterr()
    words = ["run", "-a", "random", "-e", "pz/Countdown-v0", "--fresh", "0123", "--runs", str(one)]
    assert main(words) == 2
    assert "0123" in capsys.readouterr().err
