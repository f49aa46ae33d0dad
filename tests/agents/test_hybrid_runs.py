"""Whole runs of the hybrid: modes, exact resume, PPO and GRPO, engines, both halves learning."""

from __future__ import annotations

import json
import os
import signal
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from pz_agents.cli import app
from pz_agents.errors import AgentError, FailureBudgetError
from pz_agents.hybrid import trainer
from pz_agents.hybrid.half import Half
from pz_agents.hybrid.settings import HybridSettings
from pz_agents.hybrid.warmup import teach_form
from pz_agents.models.recipe import Recipe
from pz_agents.models.tiny import tiny_config, tiny_tokenizer
from pz_agents.priorzero.agent import PriorZeroAgent
from pz_agents.runtime import open_runtime
from pz_agents.sdk.check import check_agent
from pz_agents.training import checkpoint
from pz_agents.training.critic import Critic
from pz_agents.training.monitors import read_metrics
from pz_agents.worldmodel.learner import WorldModelLearner
from tests.support.house import House

pytestmark = pytest.mark.timeout(280)

GAME = "pz/Detective-v0"
NETWORK = {"embed": 32, "heads": 2, "buckets": 256, "dropout": 0.1, "layers": 1}


@pytest.fixture(scope="module")
def formed(tmp_path_factory):
    """Return a one-layer model that has half learned the form of a reply."""
    start, folder = tmp_path_factory.mktemp("start"), tmp_path_factory.mktemp("formed")
    torch.manual_seed(0)
    recipe = Recipe(layers=1, hidden=32, key_value_heads=1, feed_forward=64, context=384)
    Qwen2ForCausalLM(tiny_config(recipe)).save_pretrained(start)
    tiny_tokenizer(recipe.context).save_pretrained(start)
    return teach_form(settings(start), folder / "model", updates=60, batch=8, learning_rate=1e-2)


def settings(model, **changes):
    values = {
        "env": GAME,
        "preset": "",
        "model": str(model),
        "steps": 2,
        "slots": 3,
        "episodes_per_step": 3,
        "max_turns": 6,
        "temperature": 1.0,
        "replay_ratio": 0.5,
        "wm_llm_ratio": 0.3,
        "phase_updates": 2,
        "network": NETWORK,
        "learner": {"learning_rate": 3e-3, "batch_windows": 8, "precision": "fp32"},
        "replay": {"horizon": 3},
        "search": {"simulations": 6},
        "branching": 4,
        "eval_episodes": 0,
        "save_every": 1,
        "keep_checkpoints": 9,
        "wm_training_mode": "sequential",
        "rollout_batch_size": 4,
        "n_samples_per_prompt": 4,
        "critic_update_steps": 3,
        "actor_learning_rate": 1e-3,
        "critic_learning_rate": 3e-3,
        "num_warmup_steps": 0,
        "generate_max_len": 16,
        "precision": "float32",
    }
    if changes.get("rl_algorithm") == "grpo":
        del values["critic_update_steps"], values["critic_learning_rate"]
        values["wm_llm_ratio"] = 0.7
    return HybridSettings.model_validate(values | changes)


@pytest.fixture
def house(monkeypatch):
    """Make every environment a House; the fixture's value sets its arguments."""
    arguments = {}
    monkeypatch.setattr("pz_agents.priorzero.run.plot_panels", lambda *given: [])
    monkeypatch.setattr("pz_envs.catalog.make_env", lambda env_id, **kwargs: House(**arguments))
    return arguments


def halves(folder):
    """Return the weights of the world model, the policy and the critic of the last checkpoint."""
    newest = checkpoint.newest(folder / "checkpoints")
    found = {"world": torch.load(newest / "learner.pt", weights_only=True)["model"]}
    for name, place in (("policy", "model"), ("critic", "critic")):
        path = newest / "language" / place / "model.safetensors"
        if path.is_file():
            found[name] = load_file(path)
    return found


def same(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return torch.equal(left, right)


def lines(folder):
    return (folder / "metrics.jsonl").read_text()


def test_the_modes_say_which_half_learns_when(tmp_path, house, formed):
    for mode in ("parallel", "sequential", "alternating"):
        given = settings(formed, steps=3, wm_training_mode=mode)
        trainer.train(given, tmp_path / mode)
    # What the language model reads of the world model's half is where its play came to.
    assert lines(tmp_path / "parallel") == lines(tmp_path / "sequential")
    assert same(halves(tmp_path / "parallel"), halves(tmp_path / "sequential"))
    first, second, third = read_metrics(tmp_path / "alternating" / "metrics.jsonl")
    assert first["train/updates"] >= 2
    assert "train/llm_rollouts" not in first
    assert "train/updates" not in second
    assert second["env_steps"] == first["env_steps"]
    assert (second["train/llm_rollouts"], second["train/llm_critic_updates"]) == (1.0, 3.0)
    assert third["train/updates"] > first["train/updates"]


@pytest.mark.parametrize(
    ("mode", "order"),
    [
        ("parallel", ["rollout", "world", "critic", "policy"]),
        ("sequential", ["world", "rollout", "critic", "policy"]),
    ],
)
def test_a_step_begins_a_rollout_and_teaches_each_half_in_its_order(
    tmp_path, house, formed, monkeypatch, mode, order
):
    done = []

    def noted(name, kind, method):
        real = getattr(kind, method)

        def call(*args, **kwargs):
            if name not in done:
                done.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(kind, method, call)

    noted("rollout", Half, "lessons")
    noted("world", WorldModelLearner, "learn")
    noted("critic", Critic, "learn")
    noted("policy", Half, "_improve")
    trainer.train(settings(formed, steps=1, wm_training_mode=mode), tmp_path)
    assert done == order


def test_the_ratio_is_of_all_updates(tmp_path, house, formed):
    trainer.train(settings(formed, steps=4, wm_llm_ratio=0.5), tmp_path)
    done = read_metrics(tmp_path / "metrics.jsonl")
    world = done[-1]["train/updates"]
    last = [line for line in done if "train/llm_rollouts" in line][-1]
    language = last["train/llm_updates"] + last["train/llm_critic_updates"]
    assert language == 4 * last["train/llm_rollouts"]
    assert world - 4 < language <= world


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_resumed_run_is_the_run_that_was_not_cut_short(tmp_path, house, formed, algorithm):
    changes = {"steps": 4, "save_every": 2, "eval_episodes": 1, "eval_every": 2}
    given = settings(formed, rl_algorithm=algorithm, wm_training_mode="parallel", **changes)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trainer.train(given, whole)

    def stop(step, steps, metrics):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.train(given, cut, on_progress=stop)
    assert checkpoint.step_of(checkpoint.newest(cut / "checkpoints")) == 2
    trainer.train(given, cut)
    assert lines(whole) == lines(cut)
    assert same(halves(whole), halves(cut))
    assert ("critic" in halves(cut)) == (algorithm == "ppo")


def values_of(folder, name):
    """Return a figure of the steps that have it."""
    return [line[name] for line in read_metrics(folder / "metrics.jsonl") if name in line]


def early_and_late(folder, name):
    values = values_of(folder, name)
    return np.mean(values[:3]), np.mean(values[-3:])


MANY = {"rollout_batch_size": 8, "n_samples_per_prompt": 8, "actor_learning_rate": 3e-3}


def test_both_halves_change_and_better_what_they_are_trained_for(tmp_path, house, formed):
    trainer.train(settings(formed, steps=1, **MANY), tmp_path)
    before = halves(tmp_path)
    trainer.train(settings(formed, steps=10, **MANY), tmp_path)
    after = halves(tmp_path)
    assert not any(same(before[name], after[name]) for name in ("world", "policy", "critic"))
    early, late = early_and_late(tmp_path, "train/wm_total_loss")
    assert late < 0.8 * early
    early, late = early_and_late(tmp_path, "train/llm_reward_mean")
    assert late > early + 0.1
    # One update a rollout of what was just sampled: the policy ratio is 1.
    assert all(abs(each - 1.0) < 1e-4 for each in values_of(tmp_path, "train/llm_ratio"))
    assert all(each < 1e-3 for each in values_of(tmp_path, "train/llm_engine_gap"))


def test_the_critic_learns_what_a_policy_that_stands_still_is_paid(tmp_path, house, formed):
    still = {**MANY, "actor_learning_rate": 1e-9, "rewards": {"score_gain": 0.0}}
    trainer.train(settings(formed, steps=8, **still), tmp_path)
    values = values_of(tmp_path, "train/llm_value_loss")
    # The critic learns fast, and what is left is what no critic can know.
    assert np.mean(values[-3:]) < 0.8 * values[0]


def test_grpo_learns_from_what_replies_to_one_prompt_are_paid(tmp_path, house, formed):
    given = settings(formed, rl_algorithm="grpo", options={"beta": 0.01}, steps=2)
    trainer.train(given, tmp_path)
    line = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert "train/llm_value_loss" not in line
    assert line["train/llm_kl"] >= 0.0
    assert 0 < line["train/llm_usable_groups"] <= 4


def by_length(completions, commands, **columns):
    return [len(each) / 100 if listed else None for each, listed in zip(completions, commands)]  # noqa: B905


def broken(completions):
    raise ZeroDivisionError


def test_a_function_of_ones_own_pays_beside_the_terms_or_alone(tmp_path, house, formed):
    off = {"score_gain": 0, "valid": 0, "invalid": 0, "format": 0}
    own = f"{__file__}:by_length"
    trainer.train(settings(formed, steps=1, rewards=off, custom_reward_fn=own), tmp_path / "own")
    (line,) = read_metrics(tmp_path / "own" / "metrics.jsonl")
    assert line["train/llm_reward_mean"] == pytest.approx(line["train/llm_reward_custom"])
    assert line["train/llm_reward_custom"] > 0.0
    failing = settings(formed, steps=1, custom_reward_fn=f"{__file__}:broken")
    with pytest.raises(AgentError, match="broken raised ZeroDivisionError"):
        trainer.train(failing, tmp_path / "broken")


def test_games_that_break_when_they_are_tried_end_the_run(tmp_path, house, formed):
    """Play has threads of its own; trials are made where the learner is."""
    house["breaks"] = lambda: threading.current_thread() is threading.main_thread()
    with pytest.raises(FailureBudgetError, match="the engine has gone"):
        trainer.train(settings(formed, steps=9), tmp_path)


def test_a_monitor_shows_the_names_of_the_public_code(tmp_path, house, formed):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer.train(settings(formed, steps=1, monitor="tensorboard", eval_episodes=1), tmp_path)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        *("train/wm_total_loss", "train/wm/total_loss", "train/wm/value_loss"),
        *("train/llm_policy_loss", "train/llm/policy_loss", "train/llm/rft_loss"),
        *("train/llm_value_loss", "train/llm/value_loss", "train/llm/reward_mean"),
        *("evaluator_step/reward_mean", "evals/reward_mean", "evals/llm_reward_mean"),
    } <= tags
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert "train/wm/total_loss" not in line
    (event,) = events.Scalars("train/llm/rft_loss")
    assert event.value == pytest.approx(line["train/llm_policy_loss"], abs=1e-6)


def test_what_was_trained_is_played_by_each_half_and_both(tmp_path, house, formed):
    policy = trainer.train(settings(formed, steps=1, eval_episodes=2), tmp_path)
    assert "language model alone" in trainer.last_evaluation(tmp_path)
    for mode in ("both", "wm", "llm"):
        agent = PriorZeroAgent(folder=str(policy), mode=mode, slots=3)
        check_agent(agent, make_env=lambda env_id: House())
    changed = load_file(policy / "language" / "model.safetensors")
    assert not same(changed, load_file(formed / "model.safetensors"))


def test_only_settings_that_no_weight_depends_on_change_in_a_resumed_run(tmp_path, house, formed):
    trainer.train(settings(formed, steps=1), tmp_path)
    with pytest.raises(Exception, match=r"critic_update_steps.*was 3"):
        trainer.train(settings(formed, steps=2, critic_update_steps=4), tmp_path)
    trainer.train(settings(formed, steps=2, monitor="none", save_every=2), tmp_path)


def test_an_adapter_is_what_is_trained(tmp_path, house, formed):
    pytest.importorskip("peft")
    given = settings(formed, steps=1, lora_rank=2)
    policy = trainer.train(given, tmp_path)
    assert (policy / "language" / "adapter_config.json").is_file()
    trainer.train(settings(formed, steps=2, lora_rank=2), tmp_path)
    whole = tmp_path / "whole"
    trainer.train(settings(formed, steps=2, lora_rank=2), whole)
    assert lines(whole) == lines(tmp_path)


def test_the_command_line_prints_the_settings(capsys):
    words = ["--algorithm", "priorzero-ppo", "--env", GAME, "--preset", "quick,grpo"]
    values = ["--model", "tiny", "--set", "wm_training_mode=alternating"]
    with pytest.raises(SystemExit) as ended:
        app(["train", *words, *values, "--print-config"])
    assert not ended.value.code
    shown = json.loads(capsys.readouterr().out)
    assert (shown["rl_algorithm"], shown["wm_training_mode"]) == ("grpo", "alternating")
    assert (shown["rollout_batch_size"], shown["language"]["model"]) == (8, "tiny")


ENGINES = {"vllm_num_engines": 2, "total_num_nodes": 2, "colocate_all": True}


def close_to(left, right):
    return all(
        torch.allclose(left[half][name], right[half][name], atol=1e-4)
        for half in right
        for name in right[half]
    )


def test_engines_play_what_the_learner_would_have_played(tmp_path, formed):
    """One engine is killed: another plays its share again."""
    given = {"wm_training_mode": "parallel", "max_turns": 4, "episodes_per_step": 2}
    here, there = tmp_path / "here", tmp_path / "there"
    trainer.train(settings(formed, **given), here)
    runtime = open_runtime("local", cpus=2)
    spawned = []
    spawn = runtime.spawn

    def noted(*args, **kwargs):
        spawned.extend(spawn(*args, **kwargs))
        return spawned

    runtime.spawn = noted

    def kill(step, steps, metrics):
        if step == 1:
            os.kill(runtime.pid(spawned[0]), signal.SIGKILL)

    try:
        trainer.train(
            settings(formed, **given, **ENGINES), there, on_progress=kill, runtime=runtime
        )
    finally:
        runtime.close()
    mine, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (here, there))
    for one, other in zip(mine, theirs, strict=True):
        for name in ("reward_mean", "valid", "format", "response_length", "value_loss"):
            assert one[f"train/llm_{name}"] == pytest.approx(other[f"train/llm_{name}"], abs=1e-5)
    assert close_to(halves(here), halves(there))


@pytest.mark.slow
def test_a_true_game_on_ray_betters_both_halves(tmp_path, formed):
    pytest.importorskip("ray")
    engine = {"runtime": "ray", "vllm_num_engines": 1, "total_num_nodes": 1, "colocate_all": True}
    given = {**MANY, **engine, "wm_llm_ratio": 0.5, "wm_training_mode": "parallel", "max_turns": 4}
    trainer.train(settings(formed, steps=1, **given), tmp_path)
    before = halves(tmp_path)
    trainer.train(settings(formed, steps=6, **given), tmp_path)
    after = halves(tmp_path)
    assert not any(same(before[name], after[name]) for name in ("world", "policy", "critic"))
    early, late = early_and_late(tmp_path, "train/wm_total_loss")
    assert late < 0.8 * early
    early, late = early_and_late(tmp_path, "train/llm_reward_mean")
    assert late > early
