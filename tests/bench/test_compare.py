"""``compare`` and ``watch`` on stores made of synthetic cells."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats as scipy_stats

from pz_bench import compare, store, watch
from pz_bench.cell import cell_id
from pz_bench.cell_process import PROGRESS, Progress
from pz_bench.cli import main
from pz_bench.lock import FolderLock
from pz_envs.errors import ConfigError

COUNTDOWN, DETECTIVE = "pz/Countdown-v0", "pz/Detective-v0"


def keep(runs, result):
    """Write a synthetic result into a store; returns its cell's folder."""
    parts = {"spec": result.spec.model_dump(mode="json"), "versions": {}}
    folder = store.create_cell(runs, result.spec, parts)
    log = store.EpisodeLog(folder)
    for episode in result.episodes:
        log.append(episode)
    log.close()
    if result.status == "done":
        store.finish_cell(folder, "done", seconds=1.0)
    return folder


@pytest.fixture
def runs(tmp_path, make_cell):
    """Two players on two environments, one of them on a third of its own, as a suite."""
    rng = np.random.default_rng(5)
    cells = []
    for seed in (0, 1):
        hard = rng.random(12)
        cells += [
            make_cell("random", DETECTIVE, (hard * 0.4).tolist(), seed=seed, most=360),
            make_cell("zeroshot", DETECTIVE, (hard * 0.5 + 0.1).tolist(), seed=seed, model="tiny"),
            make_cell("random", COUNTDOWN, [0, 0, 1, 0], seed=seed),
            make_cell("zeroshot", COUNTDOWN, [0, 1, 1, 0], seed=seed, model="tiny"),
            make_cell("random", "pz/Zork1-v0", [0.1, 0.1], seed=seed),
        ]
    for cell in cells:
        keep(tmp_path, cell)
    listed = tuple(
        store.SuiteCell(cell_id({"spec": c.spec.model_dump(mode="json"), "versions": {}}), c.spec)
        for c in cells
    )
    store.write_suite(tmp_path, store.Suite("small", "Small", listed))
    return tmp_path


def test_a_comparison_is_paired_and_its_p_is_scipys(runs, make_cell):
    found = compare.compare(runs, "zeroshot", "random")
    assert (found.left, found.right) == ("zeroshot · tiny", "random")
    assert found.not_shared == ("pz/Zork1-v0",)
    line = next(line for line in found.lines if line.environment == DETECTIVE)
    assert (line.instances, line.left_seeds, line.right_seeds) == (12, 2, 2)
    assert line.difference == pytest.approx(line.left - line.right, abs=2e-6)
    assert line.low < line.difference < line.high

    results = {cell.spec.slot: cell for cell in store.load(runs)}
    means = {
        player: np.mean(
            [
                [episode.score_norm for episode in sorted(c.episodes, key=lambda e: e.env_seed)]
                for c in results.values()
                if c.spec.env == DETECTIVE and c.spec.algorithm == player
            ],
            axis=0,
        )
        for player in ("zeroshot", "random")
    }
    test = scipy_stats.permutation_test(
        (means["zeroshot"] - means["random"],),
        lambda values: values.mean(),
        permutation_type="samples",
        n_resamples=5000,
    )
    assert line.p == pytest.approx(test.pvalue, abs=1e-6)


def test_environments_have_the_names_of_the_tables(tmp_path, make_cell):
    for player, score in (("random", 0.0), ("zeroshot", 1.0)):
        for kwargs in ({}, {"split": "valid_unseen"}):
            keep(tmp_path, make_cell(player, "pz/ALFWorld-v0", [score, 1.0], env_kwargs=kwargs))
        keep(tmp_path, make_cell(player, COUNTDOWN, [score, 1.0], env_kwargs={"tries": 2}))
    found = compare.compare(tmp_path, "zeroshot", "random")
    shown = {
        line.environment: row[0].text
        for line, row in zip(found.lines, compare.table(found).rows, strict=True)
    }
    assert shown == {
        "pz/ALFWorld-v0": "ALFWorld seen",
        "pz/ALFWorld-v0 (split=valid_unseen)": "ALFWorld unseen",
        "pz/Countdown-v0 (tries=2)": "Countdown",
    }


def test_p_values_are_corrected_over_the_environments(runs):
    first, second = sorted(compare.compare(runs, "zeroshot", "random").lines, key=lambda x: x.p)
    assert first.p_holm == pytest.approx(min(1, 2 * first.p))
    assert second.p_holm == pytest.approx(max(first.p_holm, second.p))


def test_swapping_the_sides_turns_the_sign(runs):
    there = compare.compare(runs, "zeroshot", "random", "small")
    back = compare.compare(runs, "random", "zeroshot", "small")
    for one, other in zip(there.lines, sorted_like(back.lines, there.lines), strict=True):
        assert one.difference == pytest.approx(-other.difference)
        assert one.improvement == pytest.approx(1 - other.improvement)
        assert one.p == other.p


def sorted_like(lines, others):
    order = [other.environment for other in others]
    return sorted(lines, key=lambda line: order.index(line.environment))


def test_a_cell_is_named_by_the_first_letters_of_its_id(runs):
    cells = {
        cell.spec.algorithm: cell.id
        for cell in store.load(runs)
        if cell.spec.env == COUNTDOWN and cell.spec.seed == 0
    }
    found = compare.compare(runs, cells["zeroshot"][:12], cells["random"][:12])
    (line,) = found.lines
    assert (line.left, line.right, line.difference) == (0.5, 0.25, 0.25)
    assert cells["random"] in found.right


@pytest.mark.parametrize(
    ("name", "message"),
    [("zeroshoot", "Did you mean"), ("nobody at all", "Rows: random; zeroshot · tiny")],
)
def test_a_name_that_is_no_row_is_explained(runs, name, message):
    with pytest.raises(ConfigError, match=message):
        compare.compare(runs, name, "random")


def test_a_player_that_is_several_rows_must_be_named_by_its_row(runs, make_cell):
    keep(runs, make_cell("zeroshot", COUNTDOWN, [1, 1, 1, 1], model="other"))
    with pytest.raises(ConfigError, match=r"several rows.*zeroshot · other; zeroshot · tiny"):
        compare.compare(runs, "zeroshot", "random")
    assert compare.compare(runs, "zeroshot · other", "random").left == "zeroshot · other"


def test_sides_without_a_common_instance_are_refused(runs, make_cell):
    keep(runs, make_cell("expert", "pz/Pentari-v0", [1.0, 1.0]))
    with pytest.raises(ConfigError, match="no instance in common"):
        compare.compare(runs, "expert", "random")


def test_the_command_prints_a_table_or_json(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["compare", "zeroshot", "random", "--runs", str(runs)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "A: zeroshot · tiny" in printed
    assert "+25.0" in printed
    assert main([*words, "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)["lines"]
    assert {line["environment"]: line["instances"] for line in lines} == {
        COUNTDOWN: 4,
        DETECTIVE: 12,
    }
    assert main(["compare", "zeroshot", "nobody", "--runs", str(runs)]) == 2


def test_watch_shows_scores_and_states_from_the_files(runs, make_cell, capsys):
    half = make_cell("expert", COUNTDOWN, [1, 0, 1], seed=0, episodes=6, status="partial")
    folder = keep(runs, half)
    (folder / "train").mkdir()
    (folder / "train" / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"loss": 0.5}\n{"lo')
    listed = store.read_suite(runs, "small").cells
    store.write_suite(
        runs, store.Suite("small", "Small", (*listed, store.SuiteCell(folder.name, half.spec)))
    )
    with FolderLock(folder):
        Progress(folder)("evaluate", 3, 6)
        view = next(cell for cell in watch.look(runs) if cell.id == folder.name)
    assert (view.state, view.phase, view.at, view.to) == ("running", "evaluate", 3, 6)
    assert view.score == view.success == pytest.approx(2 / 3)
    assert view.metrics == {"loss": 0.5}
    after = next(cell for cell in watch.look(runs, "small") if cell.id == folder.name)
    assert (after.state, after.at, after.to) == ("owed", 3, 6)
    assert main(["watch", "--once", "--runs", str(runs)]) == 0
    assert "11 cells: 1 owed, 10 done" in capsys.readouterr().out
    assert main(["watch", "--once", "--json", "--runs", str(runs)]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"done": 10, "owed": 1}


def test_what_is_left_follows_from_the_speed_of_the_phase(runs, make_cell):
    begun = make_cell("grpo", COUNTDOWN, [], model="tiny", episodes=6, status="partial")
    folder = keep(runs, begun)
    store.write_suite(runs, store.Suite("own", "", (store.SuiteCell(folder.name, begun.spec),)))
    progress = {"phase": "train", "done": 6, "total": 10, "from": 2, "seconds": 20.0}
    (folder / PROGRESS).write_text(json.dumps(progress))
    with FolderLock(folder):
        (view,) = watch.look(runs, "own")
    assert view.state == "running"
    assert view.eta_seconds == 20.0  # 4 in 20 s, 4 to go


def test_every_reading_command_speaks_json(runs, tmp_path, capsys):
    store_option = ["--runs", str(runs), "--json"]
    for words in (["status"], ["ls"], ["watch", "--once"], ["doctor"]):
        main([*words, *store_option])
        json.loads(capsys.readouterr().out)
    assert main(["report", "--out", str(tmp_path / "tables"), *store_option]) == 0
    written = json.loads(capsys.readouterr().out)["written"]
    assert any(path.endswith("small.json") for path in written)
