"""Searches over the settings of any kind of run: what is refused before trials, and a whole one."""

from __future__ import annotations

import contextlib
import csv
import json

import pytest

pytest.importorskip("trl", reason="needs pz-agents[train]")

from pz_agents.priorzero.settings import PriorZeroSettings
from pz_agents.runtime import open_runtime
from pz_agents.training.monitors import read_metrics
from pz_agents.training.settings import TrainSettings
from pz_agents.tune import check, parse_draw, trial_settings, tune
from pz_envs.errors import ConfigError

pytestmark = pytest.mark.timeout(300)

HYBRID = {"algorithm": "priorzero-ppo", "preset": "debug", "env": "pz/Detective-v0"}
LANGUAGE = {"env": "pz/Countdown-v0", "steps": 1}
UNIZERO = {
    "algorithm": "unizero",
    "env": "pz/Sokoban-v0",
    "steps": 2,
    "slots": 2,
    "episodes_per_step": 2,
    "max_turns": 3,
    "network": {"embed": 32, "heads": 2, "buckets": 256, "dropout": 0.0, "layers": 1},
    "learner": {"batch_windows": 4, "precision": "fp32"},
    "replay": {"horizon": 3},
    "search": {"simulations": 4},
    "eval_every": 2,
    "eval_episodes": 1,
    "save_every": 1,
}


def drawn(*texts):
    return dict(map(parse_draw, texts))


def test_settings_are_of_the_kind_that_the_algorithm_has():
    assert isinstance(trial_settings(LANGUAGE, {"options.beta": 0.1}), TrainSettings)
    hybrid = trial_settings(HYBRID, {"wm_llm_ratio": 0.3, "language.history": 2})
    assert (hybrid.algorithm, hybrid.wm_llm_ratio, hybrid.language.history) == (
        "priorzero-ppo",
        0.3,
        2,
    )
    other = trial_settings(HYBRID, {"algorithm": "priorzero"})
    assert isinstance(other, PriorZeroSettings)
    for base, key in ((LANGUAGE, "replay_ratio"), (UNIZERO, "wm_llm_ratio")):
        with pytest.raises(ConfigError, match=f"unknown key `{key}`"):
            trial_settings(base, {key: 0.5})
    with pytest.raises(ConfigError, match="`steps` is a single value"):
        trial_settings(LANGUAGE, {"steps.x": 1})


@pytest.mark.parametrize(
    ("base", "search", "said"),
    [
        (LANGUAGE, "options.clip_low=uniform(0.1, 3)", "options.clip_low, with 3"),
        (LANGUAGE, "group_size=uniform(2, 8)", "group_size, with 4.29"),
        (LANGUAGE, "groups_per_step=randint(0, 4)", "groups_per_step, with 0"),
        (HYBRID, "wm_llm_ratio=uniform(0.1, 1.9)", "wm_llm_ratio, with 1.9"),
        (UNIZERO, "replay_ratio=choice(0.5, -1)", "replay_ratio, with -1"),
    ],
)
def test_a_range_that_leaves_what_a_setting_may_be_is_refused_before_any_trial(
    tmp_path, base, search, said
):
    with pytest.raises(ConfigError, match=f"--search {said}"):
        tune(base, drawn(search), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_ranges_that_fit_are_tried_together_with_each_other():
    check(HYBRID, drawn("wm_llm_ratio=uniform(.1, .9)"), "mean_reward")
    check(LANGUAGE, drawn("group_size=randint(2, 4)", "options.clip_low=uniform(0, 1)"), "reward")
    # One of two that need each other would be refused alone.
    check(LANGUAGE, drawn("kl_target=uniform(.1, .2)", "kl_reward=choice(.1)"), "mean_reward")


@pytest.mark.parametrize(
    ("base", "metric"),
    [(LANGUAGE, "eval_success"), (UNIZERO | {"eval_episodes": 0}, "evaluator_step/score")],
)
def test_a_metric_of_evaluations_needs_some(tmp_path, base, metric):
    with pytest.raises(ConfigError, match=f"{metric} is of evaluations.*eval_episodes"):
        tune(base, drawn("seed=choice(1, 2)"), tmp_path, metric=metric)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_unizero_is_searched_and_an_unknown_metric_ends_the_search_after_a_step(tmp_path):
    pytest.importorskip("ray.tune", reason="needs pz-agents[ray]")
    searched = drawn("replay_ratio=grid(0.2, 0.5)")

    def run(metric):
        return tune(UNIZERO, searched, tmp_path, trials=1, metric=metric, concurrent=1)

    with contextlib.closing(open_runtime("ray", cpus=1)):
        with pytest.raises(
            ConfigError, match=r"rewad: .*Did you mean `reward`.*env_steps.*success"
        ):
            run("rewad")
        begun = [read_metrics(path) for path in tmp_path.glob("trials/*/metrics.jsonl")]
        assert [len(lines) for lines in begun] == [1]
        found = run("evaluator_step/score")
        table = (tmp_path / "trials.csv").read_bytes()
        # Ray may have a finished trial tell its figures again; its clock is among what it adds.
        run("evaluator_step/score")
        assert (tmp_path / "trials.csv").read_bytes() == table
    assert sorted(trial.drawn["replay_ratio"] for trial in found) == [0.2, 0.5]
    for trial in found:
        assert (trial.error, trial.metrics["step"]) == (None, 2)
        folder = tmp_path / "trials" / trial.name
        lines = read_metrics(folder / "metrics.jsonl")
        assert [line["step"] for line in lines] == [1, 2]
        assert trial.metrics["evaluator_step/score"] == lines[-1]["evaluator_step/score"]
        assert trial.metrics["mean_reward"] == sum(line["reward"] for line in lines) / 2
        saved = json.loads((folder / "config.json").read_text())
        assert (saved["algorithm"], saved["replay_ratio"]) == (
            "unizero",
            trial.drawn["replay_ratio"],
        )
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert [row["steps"] for row in rows] == ["2", "2"]
