"""Plans: adjusted budgets, the cells of the R3L study, estimates, and what the command prints."""

from __future__ import annotations

import json

import pytest

from pz_bench import budget, cli, estimate
from pz_bench.cell import CellSpec
from pz_bench.matrix import BUILT_IN, expand, load_matrix
from pz_bench.runner import unavailable

ADJUSTED = """
name: adjusted
rows:
  - algorithms: [grpo, zeroshot]
    environments: [pz/Countdown-v0]
    models: [tiny, Qwen/Qwen2.5-1.5B-Instruct]
    episodes: 100
    train: {steps: 50, group_size: 8}
adjust:
  - {model: tiny, seeds: [0, 1, 2], episodes: 8, train: {steps: 2}}
  - {model: tiny, algorithm: zeroshot, episodes: 4}
"""


@pytest.fixture
def adjusted(tmp_path):
    path = tmp_path / "adjusted.yaml"
    path.write_text(ADJUSTED)
    return str(path)


def test_an_adjustment_changes_only_the_cells_its_globs_match(adjusted):
    cells = expand(load_matrix(adjusted))
    found = {(c.algorithm, c.model): (c.episodes, dict(c.train)) for c in cells}
    assert found["grpo", "tiny"] == (8, {"steps": 2, "group_size": 8})
    assert found["zeroshot", "tiny"] == (4, {})
    assert found["grpo", "Qwen/Qwen2.5-1.5B-Instruct"] == (100, {"steps": 50, "group_size": 8})
    seeds = [cell.seed for cell in cells if (cell.algorithm, cell.model) == ("grpo", "tiny")]
    assert seeds == [0, 1, 2]
    assert [c.seed for c in cells if c.algorithm == "grpo" and c.model != "tiny"] == [0]


def test_a_model_never_downloaded_is_not_run_and_says_the_command(adjusted):
    spec = next(cell for cell in expand(load_matrix(adjusted)) if cell.model != "tiny")
    reason, command = unavailable(spec)
    assert "Qwen/Qwen2.5-1.5B-Instruct" in reason
    assert command == "hf download Qwen/Qwen2.5-1.5B-Instruct"


def test_the_r3l_study_is_fifty_cells_from_one_short_file():
    text = (BUILT_IN / "r3l.yaml").read_text()
    assert len(text.splitlines()) <= 80
    cells = expand(load_matrix("r3l"))
    assert len(cells) == len({cell.id for cell in cells}) == 50
    assert len({cell.env for cell in cells}) == len({cell.algorithm for cell in cells}) == 5
    assert all(cell.agent_kwargs == {"temperature": 0.4} for cell in cells)


def test_the_r3l_study_with_tiny_is_seventy_five_small_cells():
    cells = expand(load_matrix("r3l", ["models=[tiny]"]))
    assert len(cells) == 75
    assert {cell.seed for cell in cells} == {0, 1, 2}
    assert max(cell.train["steps"] for cell in cells) <= 16


def test_parameters_are_read_from_names_and_from_weight_files(tmp_path):
    assert estimate.parameters("Qwen/Qwen2.5-1.5B-Instruct") == 1.5e9
    assert estimate.parameters("HuggingFaceTB/SmolLM2-135M") == 1.35e8
    assert estimate.parameters("openai:gpt-x@http://127.0.0.1:1/v1") is None
    (tmp_path / "model.safetensors").write_bytes(bytes(4000))
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    assert estimate.parameters(str(tmp_path)) == 1000


def test_tokens_follow_from_the_budget():
    spec = CellSpec(
        algorithm="grpo",
        env="pz/Countdown-v0",
        model="Qwen/Qwen2.5-7B-Instruct",
        episodes=10,
        max_turns=2,
        train={"steps": 5, "groups_per_step": 4, "group_size": 8, "max_turns": 2}
        | {"max_new_tokens": 100},
    )
    found = estimate.estimate(spec)
    episodes = 10 + 5 * 4 * 8  # evaluated and trained on, one of two turns used in each
    assert found.prompt_tokens == pytest.approx(episodes * estimate.OBSERVATION_TOKENS)
    assert found.sampled_tokens == pytest.approx(episodes * 100 * estimate.USED_REPLY)
    assert found.trained_tokens == pytest.approx(160 * (150 + 30))
    assert found.gpus == 8
    twice = estimate.estimate(spec.model_copy(update={"train": {**spec.train, "steps": 10}}))
    assert 1.8 < twice.hours / found.hours < 2.0


def test_evaluation_s_tokens_are_told_apart_from_training_s():
    spec = CellSpec(algorithm="zeroshot", env="pz/Countdown-v0", model="tiny", episodes=10)
    played = estimate.estimate(spec)
    assert played.evaluated_sampled_tokens == played.sampled_tokens > 0
    spec = spec.model_copy(update={"algorithm": "grpo", "train": {"steps": 20}})
    trained = estimate.estimate(spec)
    assert trained.sampled_tokens > 10 * trained.evaluated_sampled_tokens > 0
    # What a limit of a matrix counts is evaluation's.
    counted = trained.evaluated_prompt_tokens + trained.evaluated_sampled_tokens
    assert budget.expected(spec, trained, None, 0.0).tokens == counted


def test_the_time_of_players_without_a_model_follows_from_what_they_do():
    def hours(algorithm, **values):
        spec = CellSpec(algorithm=algorithm, env="pz/Detective-v0", max_turns=30, **values)
        return estimate.estimate(spec).hours

    quick = {"train": {"preset": "quick", "steps": 20}}
    assert hours("random") < hours("mcts") / 50
    assert hours("mcts", agent_kwargs={"simulations": 200}) == pytest.approx(4 * hours("mcts"))
    assert hours("unizero", **quick) > 20 * hours("random")
    doubled = {"train": {"preset": "quick", "steps": 40}}
    assert 1.5 < hours("unizero", **doubled) / hours("unizero", **quick) < 2
    assert hours("somebody:Agent") is None


def test_a_measured_sister_decides_the_time():
    spec = CellSpec(algorithm="random", env="pz/Countdown-v0", seed=3)
    sister = spec.model_copy(update={"seed": 1})
    known = estimate.sisters([(sister, 10.0), (spec.model_copy(update={"seed": 2}), 26.0)])
    found = estimate.estimate(spec, known[estimate.sister_key(spec)])
    assert found.measured
    assert found.hours == pytest.approx(18 / 3600)


def test_the_command_prints_every_cell_with_id_gpus_tokens_and_hours(tmp_path, adjusted, capsys):
    runs = str(tmp_path / "runs")
    assert cli.main(["plan", "--matrix", adjusted, "--runs", runs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["cells"]) == 8
    big = next(cell for cell in found["cells"] if cell["model"] != "tiny")
    assert big["gpus"] > 0
    assert big["hours"] > 0
    assert big["sampled_tokens"] > 0
    assert cli.main(["plan", "--matrix", adjusted, "--runs", runs, "--models", "tiny"]) == 0
    text = capsys.readouterr().out
    assert all(cell["id"] in text for cell in found["cells"] if cell["model"] == "tiny")
    assert big["id"] not in text
    assert not (tmp_path / "runs").exists()
