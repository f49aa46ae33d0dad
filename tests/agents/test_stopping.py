"""Early stopping, evaluation by one's own metrics, the log, the plots, advice on memory."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs pz-agents[train]")

from pz_agents import cli_train
from pz_agents.errors import AgentError
from pz_agents.training import checkpoint
from pz_agents.training.memory import advice, savings
from pz_agents.training.monitors import read_metrics
from pz_agents.training.plots import DETAILS, _curves, plot_metrics
from pz_agents.training.run import TrainSettings, train
from pz_agents.training.stopping import (
    EVALUATED,
    EarlyStopping,
    Stopper,
    check_metric,
)
from pz_agents.training.telling import UsableGroups, epoch_text, step_line
from pz_envs.errors import ConfigError
from pz_envs.textenv import Outcome, TextEnv
from tests.support.learner_cases import network

GOLDEN = Path(os.environ.get("PZ_DATA", "/nonexistent")).parent / "golden" / "trainer_losses.json"
needs_golden = pytest.mark.skipif(not GOLDEN.is_file(), reason="needs the golden cases by PZ_DATA")
pytestmark = pytest.mark.timeout(280)


@needs_golden
def test_stopping_matches_the_golden_case():
    cases = {case["id"]: case for case in json.loads(GOLDEN.read_text())["cases"]}
    case = cases["early_stopping"]
    stopper = Stopper(EarlyStopping(metric="loss", mode="min", **case["params"]))
    stopped = [stopper.observe({"loss": value}) for value in case["inputs"]["metric"]]
    assert stopped.index(True) == case["expected"]["stop_at_eval"]


def test_a_stopper_goes_on_from_its_state():
    values = [0.1, 0.2, 0.2, 0.2]
    settings = EarlyStopping(patience=2)
    straight, first = Stopper(settings), Stopper(settings)
    expected = [straight.observe({"reward": value}) for value in values]
    found = [first.observe({"reward": value}) for value in values[:3]]
    second = Stopper(settings)
    second.load_state(first.state())
    assert [*found, second.observe({"reward": values[3]})] == expected == [False] * 3 + [True]
    for patience, stopped in ((2, True), (3, False)):
        other = Stopper(EarlyStopping(patience=patience))
        other.load_state(straight.state())
        assert other.stopped is stopped


def test_steps_without_an_evaluation_count_for_nothing_and_other_names_must_exist():
    stopper = Stopper(EarlyStopping(metric="eval_success", patience=1))
    seen = [{"eval_success": 0.5}, {"reward": 0.0}, {"eval_success": float("nan")}]
    assert [stopper.observe(each) for each in seen] == [False] * 3
    assert stopper.observe({"eval_success": 0.5})
    with pytest.raises(ConfigError, match=r"no metric `eval_nope`.*eval_success"):
        Stopper(EarlyStopping(metric="eval_nope")).observe({"reward": 1.0, "eval_success": 0.5})
    with pytest.raises(ConfigError, match=r"no metric `rewrad`.*`reward`"):
        Stopper(EarlyStopping(metric="rewrad")).observe({"reward": 1.0})
    with pytest.raises(ConfigError, match=r"It is called `eval_score_norm`.*as eval_NAME"):
        Stopper(EarlyStopping(metric="score_norm")).observe({"reward": 1.0})


@pytest.mark.parametrize(
    ("metric", "changes", "words"),
    [
        ("eval_sucess", {"eval_episodes": 2}, "Did you mean `eval_success`"),
        ("eval_success", {}, "no `eval_episodes` to play"),
    ],
)
def test_an_evaluation_that_no_run_has_is_told_before_the_first_step(metric, changes, words):
    given = {"env": "pz/Countdown-v0", "steps": 1, **changes}
    chosen = TrainSettings(**given, early_stopping={"metric": metric})
    stopping = chosen.early_stopping
    with pytest.raises(ConfigError, match=words):
        check_metric(
            stopping,
            evaluates=chosen.eval_episodes > 0,
            own_metrics=bool(chosen.eval_metrics),
        )


def test_ones_own_metrics_may_have_any_name_until_the_first_evaluation(micro, tmp_path):
    chosen = settings(
        micro,
        eval_metrics=f"{__file__}:figures_of",
        early_stopping={"metric": "eval_shortest"},
        steps=3,
    )
    with pytest.raises(ConfigError, match=r"no metric `eval_shortest`.*eval_longest"):
        train(TrainSettings(**chosen), tmp_path / "late")


# Runs.


class NeverPays(TextEnv):
    """One turn that pays nothing."""

    family = "toy"

    def _start(self, seed, options):
        self._task_id = "none"
        return Outcome("Go.", 0.0)

    def _advance(self, command):
        return Outcome("", 0.0, terminated=True)


@pytest.fixture(autouse=True, scope="module")
def _toy_env():
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pz_envs.catalog.make_env", lambda env_id, **kwargs: NeverPays())
        yield
    torch.set_num_threads(before)


def settings(model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "env": "pz/Countdown-v0",
        "algorithm": "ppo",
        "options": {"critic_update_steps": 1},
        "model": str(model),
        "steps": 9,
        "groups_per_step": 2,
        "group_size": 1,
        "max_new_tokens": 4,
        "max_turns": 1,
        "eval_episodes": 2,
        "save_every": 2,
        **changes,
    }


def figures_of(trajectories):
    """Metrics of one's own."""
    return {"longest": max(len(item.steps) for item in trajectories)}


def broken_figures(trajectories):
    raise KeyError("no")


@pytest.fixture(scope="module")
def stopped(micro, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    chosen = settings(
        micro,
        eval_metrics=f"{__file__}:figures_of",
        early_stopping={"metric": "reward", "patience": 3},
    )
    logging.getLogger("pz_agents").warning("before the run")
    train(TrainSettings(**chosen), folder)
    return folder


def test_a_run_stops_early_with_a_checkpoint_a_policy_and_its_plots(stopped):
    lines = read_metrics(stopped / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line.get("eval_longest") for line in lines] == [None, 1, None, 1]
    evaluated = {f"eval_{name}" for name in (*EVALUATED, "longest")}
    assert {name for name in lines[1] if name.startswith("eval_")} == evaluated
    assert checkpoint.step_of(checkpoint.newest(stopped / "checkpoints")) == 4
    assert checkpoint.problems(stopped / "policy") == []
    for name in ("training_metrics_detailed.png", "ppo_metrics_with_entropy.png"):
        assert (stopped / name).read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_stopped_early_stays_stopped(stopped, micro, tmp_path):
    chosen = json.loads((stopped / "config.json").read_text())
    train(TrainSettings(**chosen), stopped)
    assert len(read_metrics(stopped / "metrics.jsonl")) == 4


def test_the_log_has_a_line_a_step_and_the_warnings_of_the_run_alone(stopped):
    first = min((stopped / "logs").glob("training_*.log"))
    text = first.read_text()
    assert [f"step {step}/9" in text for step in (1, 4, 5)] == [True, True, False]
    assert "value_loss" in text
    assert "stopped early after step 4" in text
    assert "before the run" not in text


def test_the_figures_are_found_among_the_logs_too_also_in_a_copy_that_goes_on(
    stopped, micro, tmp_path
):
    link = stopped / "logs" / "metrics.jsonl"
    assert link.is_symlink()
    assert read_metrics(link) == read_metrics(stopped / "metrics.jsonl")
    copy = tmp_path / "copy"
    shutil.copytree(stopped, copy)  # follows links
    assert not (copy / "logs" / "metrics.jsonl").is_symlink()
    patient = {"early_stopping": {"metric": "reward", "patience": 4}}
    train(TrainSettings(**{**json.loads((copy / "config.json").read_text()), **patient}), copy)
    assert [line["step"] for line in read_metrics(copy / "logs" / "metrics.jsonl")] == [
        *range(1, 6)
    ]


def test_evaluation_may_come_apart_from_checkpoints_and_only_what_was_evaluated_is_compared(
    micro, tmp_path
):
    chosen = settings(micro, steps=5, save_every=2, eval_every=3, keep_checkpoints=9)
    train(TrainSettings(**chosen), tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval_success" in line] == [3, 5]
    scores = {
        checkpoint.step_of(path): json.loads((path / "manifest.json").read_text())["score"]
        for path in checkpoint.steps_in(tmp_path / "checkpoints")
    }
    assert scores == {2: None, 4: None, 5: lines[-1]["eval_success"]}
    # How often is nothing that weights depend on.
    more = {**chosen, "steps": 6, "eval_every": 1}
    train(TrainSettings(**more), tmp_path)
    assert "eval_success" in read_metrics(tmp_path / "metrics.jsonl")[-1]


def test_evaluating_without_episodes_is_refused(micro):
    with pytest.raises(ConfigError, match="no `eval_episodes` to play"):
        TrainSettings(**settings(micro, eval_every=2, eval_episodes=0))


def test_an_interrupted_run_leaves_its_plots_and_a_checkpoint(micro, tmp_path):
    def interrupt(step, steps, metrics):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(TrainSettings(**settings(micro)), tmp_path, on_progress=interrupt)
    assert (tmp_path / "ppo_metrics_with_entropy.png").read_bytes()[:4] == b"\x89PNG"
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "checkpoints")) == 1


def test_metrics_that_break_end_the_run_by_their_name(micro, tmp_path):
    chosen = settings(micro, steps=1, eval_metrics=f"{__file__}:broken_figures")
    with pytest.raises(AgentError, match="broken_figures raised KeyError"):
        train(TrainSettings(**chosen), tmp_path)


# The console.


def test_the_console_line_of_a_critic_has_its_six_figures():
    metrics = {
        "loss": -0.0123,
        "value_loss": 0.0456,
        "reward": 0.512,
        "advantage": 0.003,
        "entropy": 1.234,
        "learning_rate": 1e-6,
        "sampled_tokens": 8420.0,
        "seconds": 10.0,
    }
    expected = "PL -0.0123 VL 0.0456 R 0.512 A 0.003 E 1.234 LR 1.00e-06 | 842 tok/s"
    assert step_line(metrics) == expected
    rounding = {**metrics, "loss": -1e-9, "advantage": -1e-9}
    assert "PL 0.0000" in step_line(rounding)
    assert "A 0.000" in step_line(rounding)


def test_a_step_is_told_with_the_epoch_in_which_it_began():
    # Fifteen rows, five a step; then seven a step, so that steps begin in one epoch and end in
    # the next, and the last one reaches beyond the third.
    told = [epoch_text({"epoch": step * 5 / 15}, step, 9) for step in range(1, 10)]
    assert told == [f"Epoch {number}/3 | " for number in (1, 1, 1, 2, 2, 2, 3, 3, 3)]
    told = [epoch_text({"epoch": step * 7 / 15}, step, 7) for step in range(1, 8)]
    assert told == [f"Epoch {number}/3 | " for number in (1, 1, 1, 2, 2, 3, 3)]
    assert epoch_text({}, 1, 9) == ""


def tell_usable(usable, success, groups=16, steps=9):
    watch = UsableGroups()
    for _ in range(steps):
        watch.observe({"usable_groups": usable, "groups": groups, "success": success})


@pytest.mark.parametrize(
    ("usable", "success", "words"), [(1, 0.0, "preset tiny-countdown"), (0, 1.0, "harder tasks")]
)
def test_a_run_that_learns_hardly_anything_is_told_so_once(caplog, usable, success, words):
    tell_usable(usable, success)
    (record,) = caplog.records
    assert f"(usable {2 * usable}/32)" in record.getMessage()
    assert words in record.getMessage()


def test_nothing_is_said_of_runs_that_learn_or_have_just_begun(caplog):
    tell_usable(2, 0.1)
    tell_usable(0, 0.0, groups=2)
    assert caplog.records == []


@pytest.mark.parametrize(("answer", "anew"), [("y", False), ("", False), ("n", True)])
def test_a_terminal_asks_whether_to_go_on(stopped, monkeypatch, capsys, answer, anew):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{answer}\n"))
    assert cli_train._begins_anew(stopped, 9) is anew
    assert "Resume from step 4? [Y/n]" in capsys.readouterr().err


def test_nothing_is_asked_without_a_checkpoint_and_when_all_is_done(stopped, tmp_path):
    assert cli_train._begins_anew(tmp_path, 9) is False
    assert cli_train._begins_anew(stopped, 4) is False


# Plots and memory.


def test_a_run_without_a_critic_gets_no_plot_of_one(tmp_path):
    pytest.importorskip("matplotlib")
    metrics = [{"step": step, "reward": 0.1, "loss": None} for step in range(3)]
    names = [path.name for path in plot_metrics(metrics, tmp_path / "training_metrics")]
    assert names == [
        "training_metrics.png",
        "training_metrics.svg",
        "training_metrics_detailed.png",
    ]


def test_a_plot_has_whole_steps_and_does_not_blow_rounding_up():
    pytest.importorskip("matplotlib")
    noise = [{"step": step, "loss": (-1) ** step * 1e-8, "value_loss": 1.0} for step in range(1, 5)]
    axes, _ = _curves(noise, ["loss", "value_loss"], 2).axes
    low, high = axes.get_ylim()
    assert high - low >= 1e-3
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert axes.get_title() == "loss (policy)"


def test_the_kl_in_the_reward_and_its_weight_are_among_the_details():
    assert {"kl", "kl_weight"} <= set(DETAILS)


def changes_of(found) -> list[str]:
    return [each.change.split("=")[0] for each in found]


def test_advice_is_ordered_by_what_it_saves_and_names_nothing_that_is_done():
    given = TrainSettings(env="pz/Countdown-v0", steps=1, algorithm="ppo")
    found = savings(given, network(), 100, reference=True)
    sizes = [each.size for each in found]
    assert sizes == sorted(sizes, reverse=True)
    assert {"lora_rank", "algorithm", "kl_reward", "max_turns"} <= set(changes_of(found))
    done = given.model_copy(update={"lora_rank": 8, "algorithm": "grpo", "max_turns": 1})
    left = changes_of(savings(done, network(), 100, reference=False))
    assert not {"lora_rank", "algorithm", "kl_reward", "max_turns"} & set(left)
    assert "max_new_tokens=128 (about" in advice(found)


def test_long_rows_are_what_to_shorten_and_large_weights_what_to_adapt():
    given = TrainSettings(env="pz/Countdown-v0", steps=1, max_turns=1)
    assert changes_of(savings(given, network(), 10, reference=False))[0] == "lora_rank"
    assert changes_of(savings(given, network(), 100_000, reference=False))[0] == "max_new_tokens"
