"""Plots: limits, profiles, and learning curves from what trainings wrote."""

from __future__ import annotations

import json

import pytest

from pz_bench import report
from pz_bench.report import curves, plots, tables
from pz_envs.errors import DataError

COUNTDOWN, ZORK, DETECTIVE = "pz/Countdown-v0", "pz/Zork1-v0", "pz/Detective-v0"


def row_of(board, label):
    return next(row for row in board.rows if row.label == label)


def many(make_cell, rows):
    return [
        make_cell(f"agent{number}.py:play", env, [number / rows, 0.1])
        for number in range(rows)
        for env in (ZORK, DETECTIVE)
    ]


def test_plots_draw_the_best_rows_and_the_tables_all(make_cell):
    board = report.build(many(make_cell, 20), "suite")
    panel = plots.score_panel(board, None)
    assert "agent19.py:play" in panel.alt
    assert "agent3.py:play" not in panel.alt
    assert "the best 12 of 20" in panel.svg
    assert len(tables.headline(board).rows) == 20


def test_profiles_are_provisional_with_fewer_than_five_seeds(make_cell):
    def profiled(seeds):
        made = [
            make_cell("random", env, [0.3, 0.5], seed=seed)
            for env in (ZORK, DETECTIVE)
            for seed in range(seeds)
        ]
        return report.build(made, "suite")

    few, enough = profiled(4), profiled(5)
    row = row_of(enough, "random")
    assert dict(zip(enough.thresholds, row.profile, strict=True))[0.38] == 1.0
    assert dict(zip(enough.thresholds, row.profile, strict=True))[0.4] == 0.0
    assert "provisional" in plots.profile_panel(few).alt
    assert "provisional" not in plots.profile_panel(enough).alt


def training(folder, rewards):
    """Write what a training of one step a reward would."""
    (folder / "train").mkdir(parents=True)
    for name, lines in (
        (
            "metrics",
            [{"reward": reward, "success": reward, "sampled_tokens": 10.0} for reward in rewards],
        ),
        ("timings", [{"seconds": 36.0} for _ in rewards]),
    ):
        text = "".join(json.dumps({"step": n, **line}) + "\n" for n, line in enumerate(lines, 1))
        (folder / "train" / f"{name}.jsonl").write_text(text + '{"step": 9', "utf-8")  # torn
    return curves.read(folder)


def test_learning_curves_are_means_over_seeds_by_steps_tokens_and_hours(make_cell, tmp_path):
    made = [
        make_cell("grpo", COUNTDOWN, [1, 0], seed=seed, model="tiny", train={"steps": 3})
        for seed in (0, 1)
    ]
    steps = {
        made[0].id: training(tmp_path / "one", [0.0, 0.5, 1.0]),
        made[1].id: training(tmp_path / "two", [0.0, 0.0]),  # stopped early
    }
    board = report.build(made, "suite", training=steps)
    (curve,) = board.curves
    assert (curve.measure, curve.seeds, curve.values) == ("success", 2, (0.0, 0.25))
    assert (curve.steps, curve.tokens, curve.hours) == ((1, 2), (10, 20), (0.01, 0.02))
    assert len(plots.training_panels(board)) == 3
    assert "suite-training.svg" in plots.files(board)
    assert plots.files(board) == plots.files(report.build(made[::-1], "suite", training=steps))
    assert not report.build(made, "suite").curves


def test_a_long_training_is_averaged_over_equal_runs_of_steps():
    steps = [{"step": n, "reward": float(n % 2)} for n in range(1, 2401)]
    found = curves.curve("grpo", ZORK, "score_norm", [steps])
    assert (found.measure, len(found.values)) == ("reward", curves.MOST_POINTS)
    assert set(found.values) == {0.5}
    assert found.tokens == found.hours == ()


def test_a_broken_line_of_metrics_names_its_file(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl: line 2 is broken"):
        curves.read(tmp_path)
