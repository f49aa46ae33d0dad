"""UniZero's loop: learns what chance does not solve, resumes exactly, survives crashes."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from pz_agents.errors import AgentError
from pz_agents.priorzero import run as unizero
from pz_agents.priorzero.agent import UniZeroAgent
from pz_agents.priorzero.settings import UniZeroSettings
from pz_agents.rollout import EpisodeSpec, Limits, run_episodes
from pz_agents.sdk.check import check_agent
from pz_agents.sdk.loading import load_agent
from pz_agents.sdk.types import Episode
from pz_agents.training import checkpoint
from pz_agents.training.monitors import read_metrics
from pz_envs.errors import ConfigError, InfraError
from pz_envs.seeding import derive_seed
from tests.support.house import House

pytestmark = pytest.mark.timeout(280)

TURNS = 6


def settings(**changes):
    values = {
        "env": "pz/Detective-v0",
        "steps": 2,
        "slots": 4,
        "episodes_per_step": 6,
        "max_turns": TURNS,
        "temperature": 1.0,
        "replay_ratio": 0.5,
        "network": {"embed": 32, "heads": 2, "buckets": 256, "dropout": 0.0, "layers": 1},
        "learner": {"learning_rate": 3e-3, "batch_windows": 16, "precision": "fp32"},
        "replay": {"horizon": 4},
        "search": {"simulations": 8},
        "branching": 4,
        "eval_episodes": 2,
        "save_every": 1,
    }
    return UniZeroSettings.model_validate(values | changes)


@pytest.fixture
def house(monkeypatch):
    """Make every environment a House; the fixture's value sets its arguments."""
    arguments = {}
    monkeypatch.setattr("pz_agents.priorzero.run.plot_panels", lambda *given: [])
    monkeypatch.setattr("pz_envs.catalog.make_env", lambda env_id, **kwargs: House(**arguments))
    return arguments


LEARNING = {
    "steps": 35,
    "slots": 16,
    "episodes_per_step": 16,
    "replay_ratio": 1.0,
    "learner": {
        "learning_rate": 3e-3,
        "batch_windows": 16,
        "precision": "fp32",
        "loss": {"latent_weight": 1.0},
    },
    "eval_episodes": 0,
    "save_every": 100,
}


def late_reward(folder):
    return np.mean([line["reward"] for line in read_metrics(folder / "metrics.jsonl")[-5:]])


def greedy_score(folder):
    played = list(
        run_episodes(
            unizero.player(folder),
            [EpisodeSpec(str(number), "toy", number) for number in range(3)],
            make_env=lambda env_id: House(),
            limits=Limits(turns=TURNS),
            seed=0,
        )
    )
    return np.mean([each.score for each in played])


@pytest.mark.slow
def test_it_learns_a_house_that_chance_does_not_leave(tmp_path, house):
    folder = tmp_path / "run"
    unizero.train(settings(**LEARNING), folder)
    random = list(
        run_episodes(
            load_agent("random"),
            [EpisodeSpec(str(number), "toy", number) for number in range(100)],
            make_env=lambda env_id: House(),
            limits=Limits(turns=TURNS),
            seed=0,
        )
    )
    assert np.mean([each.score for each in random]) < 0.6
    assert late_reward(folder) > 1.2
    assert greedy_score(folder) > 1.0


@pytest.mark.slow
def test_shuffled_rewards_teach_nothing(tmp_path, house):
    """The rewards of a step's episodes are dealt out anew over all their turns."""
    random = np.random.default_rng(0)

    def shuffled(segments):
        rewards = [reward for each in segments for reward in each.rewards]
        dealt = iter(random.permutation(rewards).tolist())
        return [
            replace(each, rewards=tuple(next(dealt) for _ in each.rewards)) for each in segments
        ]

    folder = tmp_path / "run"
    unizero.train(settings(**LEARNING), folder, alter=shuffled)
    assert late_reward(folder) < 0.9


def weights(folder):
    newest = checkpoint.newest(folder / "checkpoints")
    return torch.load(newest / "learner.pt", weights_only=True)


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


DROPPING = {"embed": 32, "heads": 2, "buckets": 256, "dropout": 0.1, "layers": 1}


def test_a_resumed_run_is_the_run_that_was_not_cut_short(tmp_path, house):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    unizero.train(settings(steps=3, network=DROPPING, eval_every=1), whole)
    unizero.train(settings(steps=1, network=DROPPING, eval_every=1), cut)
    unizero.train(settings(steps=3, network=DROPPING, eval_every=1), cut)
    assert same(weights(whole), weights(cut))
    assert (whole / "metrics.jsonl").read_text() == (cut / "metrics.jsonl").read_text()
    assert not same(weights(whole), weights_of_seed(tmp_path / "other"))


def weights_of_seed(folder):
    unizero.train(settings(steps=3, network=DROPPING, seed=1), folder)
    return weights(folder)


def test_an_interrupted_collection_leaves_the_last_step(tmp_path, house):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    given = settings(steps=3, save_every=50, eval_episodes=0)
    unizero.train(given, whole)
    _, second, _ = read_metrics(whole / "metrics.jsonl")
    turns = itertools.count(1)  # one step of it is whole, whichever thread takes it

    def interrupt():
        if next(turns) == second["env_steps"] + 1:
            signal.raise_signal(signal.SIGINT)
        return False

    # The signal reaches the main thread while the third step's episodes are played.
    house["breaks"] = interrupt
    with pytest.raises(KeyboardInterrupt):
        unizero.train(given, cut)
    assert checkpoint.step_of(checkpoint.newest(cut / "checkpoints")) == 2
    house.clear()
    unizero.train(given, cut)
    assert same(weights(whole), weights(cut))


def test_a_second_run_in_the_same_folder_is_refused_and_a_dead_one_is_no_obstacle(tmp_path, house):
    holder = (
        "import sys, time; from pathlib import Path; from pz_agents.rollout.store import take_lock;"
        "folder = Path(sys.argv[1]); take_lock(folder / 'run.lock', folder, 'that trains');"
        "print('held', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], stdout=subprocess.PIPE)
    half = tmp_path / "checkpoints" / "step_000001"
    half.mkdir(parents=True)
    try:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(InfraError, match=rf"open in process {child.pid} on .* that trains"):
            unizero.train(settings(steps=1), tmp_path)
        assert sorted(each.name for each in tmp_path.iterdir()) == ["checkpoints", "run.lock"]
        assert [each.name for each in half.parent.iterdir()] == ["step_000001"]
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    half.rmdir()
    unizero.train(settings(steps=1), tmp_path)
    unizero.train(settings(steps=2), tmp_path)


def test_a_finished_run_is_not_trained_again(tmp_path, house):
    policy = unizero.train(settings(steps=1), tmp_path)
    before = (policy / "model.pt").stat().st_mtime_ns
    assert unizero.train(settings(steps=1), tmp_path) == policy
    assert (policy / "model.pt").stat().st_mtime_ns == before


def test_a_changed_setting_is_refused_and_a_longer_run_is_not(tmp_path, house):
    unizero.train(settings(steps=1), tmp_path)
    with pytest.raises(ConfigError, match=r"search\.simulations.*was 8"):
        unizero.train(settings(steps=2, search={"simulations": 9}), tmp_path)
    unizero.train(settings(steps=2), tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    with pytest.raises(ConfigError, match=r"`steps` was 2"):
        unizero.train(settings(steps=1), tmp_path)


def test_an_episode_that_breaks_is_counted_and_the_others_are_learned_from(tmp_path, house):
    turns = itertools.count(1)
    house["breaks"] = lambda: next(turns) == 3
    unizero.train(settings(steps=2), tmp_path)
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["episodes"], first["failed_episodes"]) == (5, 1)
    assert (second["episodes"], second["failed_episodes"]) == (11, 1)
    assert first["train/updates"] == max(1, round(first["env_steps"] * 0.5))


def test_an_environment_that_always_breaks_ends_the_run(tmp_path, house):
    calls = itertools.count()
    house["breaks"] = lambda: next(calls) >= 0
    with pytest.raises(InfraError, match="the engine has gone"):
        unizero.train(settings(steps=50), tmp_path)
    assert next(calls) == unizero.BARREN_COLLECTIONS * 6


def test_an_environment_without_commands_is_refused(tmp_path, house):
    house["lists"] = False
    with pytest.raises(AgentError, match="admissible_commands"):
        unizero.train(settings(), tmp_path)


def test_metrics_have_the_names_users_know(tmp_path, house):
    seen = []
    unizero.train(settings(), tmp_path, on_progress=lambda *given: seen.append(given))
    first, last = read_metrics(tmp_path / "metrics.jsonl")
    assert {
        "train/wm_total_loss",
        "train/wm_latent_loss",
        "train/wm_policy_loss",
        "collector_iter/visit_entropy_mean",
        "collector_iter/reward_mean",
    } <= first.keys()
    assert "evaluator_step/reward_mean" in last
    assert "evaluator_step/reward_mean" not in first
    assert [each[:2] for each in seen] == [(1, 2), (2, 2)]
    assert "reward" in unizero.progress_line(seen[-1][2])


def test_the_agent_plays_what_was_evaluated(tmp_path, house):
    policy = unizero.train(settings(steps=3), tmp_path)
    reward = read_metrics(tmp_path / "metrics.jsonl")[-1]["evaluator_step/reward_mean"]
    seed = derive_seed("eval", "pz/Detective-v0", 0) % 2**31
    for agent in (
        load_agent("pz_agents.priorzero.agent:UniZeroAgent", kwargs={"folder": str(tmp_path)}),
        UniZeroAgent(folder=str(policy), slots=2),
    ):
        specs = [EpisodeSpec(str(number), "toy", seed) for number in range(4)]
        played = list(
            run_episodes(
                agent,
                specs,
                make_env=lambda env_id: House(),
                limits=Limits(turns=TURNS),
                seed=0,
                concurrency=2,
            )
        )
        assert [each.reward for each in played] == [reward] * 4
        for step in played[0].steps:
            visits, prior = step.notes["visits"], step.notes["prior"]
            assert visits.keys() == prior.keys() <= set(step.admissible_commands)
            assert visits[step.action] == max(visits.values()) > 0
            assert 0.0 < sum(prior.values()) < 1.001


def test_the_agent_keeps_its_contract(tmp_path, house):
    policy = unizero.train(settings(steps=1, eval_episodes=0), tmp_path)
    agent = UniZeroAgent(folder=str(policy), slots=3)
    check_agent(agent, make_env=lambda env_id: House())
    with pytest.raises(AgentError, match="3 slots"):
        agent.start([Episode(str(number), "toy", number) for number in range(4)])


def test_an_agent_without_a_trained_folder_says_how_to_train(tmp_path):
    with pytest.raises(ConfigError, match="pz-agents train --algorithm unizero"):
        UniZeroAgent(folder=str(tmp_path))


def test_presets_are_laid_under_what_is_given():
    found = UniZeroSettings.model_validate(
        {"preset": "quick", "env": "x", "network": {"layers": 1}, "steps": 3}
    )
    assert (found.network.embed, found.network.layers, found.steps) == (96, 1, 3)
    with pytest.raises(ConfigError, match="quick"):
        UniZeroSettings.model_validate({"preset": "quik", "env": "x"})
    json.dumps(found.model_dump(mode="json"))
