import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pz_bench import store
from pz_bench.cell import CellSpec, EpisodeRecord, identity, to_line
from pz_bench.lock import FolderLock, Locked, holder
from pz_bench.store import Suite, SuiteCell
from pz_envs.errors import ConfigError, DataError

SPEC = CellSpec(algorithm="random", env="pz/Countdown-v0", episodes=3)


def episode(number, **changes):
    values = EpisodeRecord(
        episode=number,
        env_seed=number + 10,
        task_id=f"countdown/{number}",
        success=False,
        score=0.0,
        max_score=1.0,
        score_norm=0.0,
        reward=0.0,
        turns=1,
        invalid=0,
        format_errors=0,
        sampled_tokens=0,
        prompt_tokens=0,
        truncated="",
        terminated=True,
        status="ok",
        error=None,
        seconds=0.1,
        steps=({"observation": "o", "action": "a", "score": 0.5},),
    )
    return replace(values, **changes)


def finished(runs, spec=SPEC, **changes):
    folder = store.create_cell(runs, spec, identity(spec))
    log = store.EpisodeLog(folder)
    for number in reversed(range(spec.episodes)):
        log.append(episode(number, **changes))
    log.close()
    store.finish_cell(folder, "done", seconds=2.0)
    return folder


def test_what_is_stored_is_loaded_in_order(tmp_path):
    folder = finished(tmp_path)
    (result,) = store.load(tmp_path)
    assert (result.id, result.spec, result.status) == (folder.name, SPEC, "done")
    assert result.episodes == tuple(episode(number) for number in range(3))
    assert result.versions["pz-envs"]
    assert store.verify(tmp_path) == []


def test_the_code_that_measures_a_cell_is_recorded_and_a_cell_without_it_is_read(tmp_path):
    folder = finished(tmp_path)
    path = folder / store.CELL
    values = json.loads(path.read_text())
    del values["code"]
    path.write_text(json.dumps(values))
    assert store.read_cell(folder).code == ()
    store.begin_cell(folder)
    store.begin_cell(folder)
    (code,) = store.read_cell(folder).code
    assert len(code) == 16
    store.write_cell(folder, replace(store.read_cell(folder), code=("older",)))
    store.begin_cell(folder)
    assert store.finish_cell(folder, "done").code == ("older", code)
    assert store.verify(tmp_path) == []


def test_a_cell_that_is_there_is_not_made_anew(tmp_path):
    folder = finished(tmp_path)
    assert store.create_cell(tmp_path, SPEC, identity(SPEC)) == folder
    assert store.read_cell(folder).status == "done"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(min_value=1, max_value=10_000))
def test_a_torn_last_line_is_owed_again(tmp_path, cut):
    path = tmp_path / store.EPISODES
    lines = [to_line(episode(number)) for number in range(3)]
    data = "".join(lines).encode()
    kept = data[: len(data) - 1 - cut % (len(lines[2]) - 1)]
    path.write_bytes(kept)
    log = store.EpisodeLog(tmp_path)
    assert log.numbers == {0, 1}
    log.append(episode(2))
    log.close()
    assert path.read_bytes() == data


def test_garbage_after_the_last_line_is_dropped(tmp_path):
    path = tmp_path / store.EPISODES
    path.write_bytes(to_line(episode(0)).encode() + b"\x00" * 64 + b"\n")
    assert len(store.read_episodes(tmp_path)) == 1
    store.EpisodeLog(tmp_path).close()
    assert path.read_text() == to_line(episode(0))


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / store.EPISODES
    path.write_text(to_line(episode(0)) + "{broken\n" + to_line(episode(1)))
    with pytest.raises(DataError, match=rf"{path}: line 2 is broken"):
        store.read_episodes(tmp_path)
    before = path.read_bytes()
    with pytest.raises(DataError):
        store.EpisodeLog(tmp_path)
    assert path.read_bytes() == before


def test_of_duplicate_lines_the_first_counts(tmp_path):
    path = tmp_path / store.EPISODES
    path.write_text(to_line(episode(0)) + to_line(episode(0, score=1.0)))
    assert store.read_episodes(tmp_path) == (episode(0),)
    log = store.EpisodeLog(tmp_path)
    log.append(episode(0, score=0.5))
    log.close()
    assert len(path.read_text().splitlines()) == 2


def test_one_changed_digit_is_found_and_its_file_named(tmp_path):
    path = finished(tmp_path) / store.EPISODES
    path.write_text(path.read_text().replace('"score":0.0', '"score":1.0', 1))
    (problem,) = store.verify(tmp_path)
    assert str(path) in problem
    assert "sha256" in problem


def test_a_changed_setting_is_found_and_its_file_named(tmp_path):
    path = finished(tmp_path) / store.CELL
    values = json.loads(path.read_text())
    values["identity"]["spec"]["episodes"] = 2
    path.write_text(json.dumps(values))
    (problem,) = store.verify(tmp_path)
    assert str(path) in problem


def test_missing_and_unreadable_files_are_found(tmp_path):
    folder = finished(tmp_path)
    (folder / store.EPISODES).unlink()
    (problem,) = store.verify(tmp_path)
    assert str(folder / store.EPISODES) in problem
    (folder / store.CELL).write_text("{")
    (problem,) = store.verify(tmp_path)
    assert str(folder / store.CELL) in problem


def test_a_done_cell_with_an_episode_too_few_is_found(tmp_path):
    folder = finished(tmp_path)
    path = folder / store.EPISODES
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    store.finish_cell(folder, "done")
    assert "1 of 3 episodes are missing" in store.verify(tmp_path)[0]


def test_reopening_keeps_good_episodes_and_owes_failed_ones(tmp_path):
    folder = finished(tmp_path)
    path = folder / store.EPISODES
    lines = [episode(0), episode(1, status="failed", error="x"), episode(2)]
    path.write_text("".join(map(to_line, lines)))
    store.finish_cell(folder, "failed", reason="x")
    store.reopen_cell(folder)
    assert [each.episode for each in store.read_episodes(folder)] == [0, 2]
    assert store.read_cell(folder).status == "partial"


def suite_cell(seed, **changes):
    spec = SPEC.model_copy(update={"seed": seed})
    return replace(SuiteCell(spec.id, spec), **changes)


def test_a_suite_lists_cells_that_were_run_not_begun_and_not_run(tmp_path):
    finished(tmp_path)
    cells = (
        suite_cell(2, reason="No story.", command="pz-envs data get x"),
        suite_cell(1),
        suite_cell(0),
    )
    store.write_suite(tmp_path, Suite("starter", "Starter", cells))
    results = store.load_suite(tmp_path, "starter")
    assert [result.status for result in results] == ["not_run", "partial", "done"]
    assert (results[0].reason, results[0].command) == ("No story.", "pz-envs data get x")
    whole = store.read_result(tmp_path / results[2].id).episodes
    assert results[2].episodes == tuple(
        replace(each, steps=({"score": 0.5},), final_observation="") for each in whole
    )
    assert store.read_suite(tmp_path, "starter") == Suite("starter", "Starter", cells)


def test_a_suite_that_is_not_there_is_named_with_the_nearest(tmp_path):
    store.write_suite(tmp_path, Suite("starter"))
    with pytest.raises(ConfigError, match="Did you mean `starter`"):
        store.read_suite(tmp_path, "startr")
    for name in ("../x", "a/b", "", ".hidden"):
        with pytest.raises(ConfigError, match="cannot name a suite"):
            store.write_suite(tmp_path, Suite(name))


def test_cells_added_by_hand_join_a_suite_and_survive_its_matrix(tmp_path):
    mine = replace(suite_cell(0), spec=SPEC.model_copy(update={"algorithm": "mine"}), added=True)
    matrix = Suite("s", "S", (suite_cell(0), suite_cell(1)))
    both = store.merge_suite(matrix, Suite("s", "", (mine,)))
    assert both == Suite("s", "S", (*matrix.cells, mine))
    smaller = Suite("s", "S", (suite_cell(0),))
    assert store.merge_suite(both, smaller).cells == (suite_cell(0), mine)


def test_a_newer_cell_of_the_same_slot_replaces_the_older(tmp_path):
    older = suite_cell(0, added=True)
    newer = replace(older, id="0" * 16, spec=SPEC.model_copy(update={"episodes": 9}))
    merged = store.merge_suite(Suite("s", "", (older,)), Suite("s", "", (newer,)))
    assert merged.cells == (newer,)


def test_a_folder_has_one_writer(tmp_path):
    with FolderLock(tmp_path):
        held = holder(tmp_path)
        assert held is not None
        assert held["pid"] == os.getpid()
        with pytest.raises(Locked, match=str(os.getpid())), FolderLock(tmp_path):
            pass
    assert holder(tmp_path) is None
    with FolderLock(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import sys, time, pathlib\n"
        "from pz_bench.lock import FolderLock\n"
        "with FolderLock(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(Locked), FolderLock(tmp_path):
        pass
    child.kill()
    with FolderLock(tmp_path, wait_seconds=5.0):
        assert holder(tmp_path)["pid"] == os.getpid()
    child.wait()
    child.stdout.close()


@pytest.mark.parametrize(("age", "free"), [(5.0, False), (10_000.0, True)])
def test_another_hosts_lock_is_free_when_its_heartbeat_is_old(tmp_path, age, free):
    other = {"pid": 1, "host": "elsewhere", "started": 5, "token": "t"}
    (tmp_path / "lock").write_text(json.dumps(other | {"heartbeat": time.time() - age}))
    assert (holder(tmp_path) is None) == free


def test_a_writer_that_lost_its_lock_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("pz_bench.lock.HEARTBEAT_SECONDS", 0.05)
    with FolderLock(tmp_path) as lock:
        lock.check()
        (tmp_path / "lock").write_text("")
        time.sleep(0.3)
        with pytest.raises(Exception, match="taken over"):
            lock.check()
