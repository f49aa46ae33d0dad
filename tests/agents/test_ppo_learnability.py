"""PPO with its critic learns what can be learned, and only that."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs pz-agents[train]")

from transformers import Qwen2ForCausalLM

from pz_agents.algorithms.ppo import PPO, Options
from pz_agents.models.recipe import Recipe
from pz_agents.models.tiny import tiny_config, tiny_tokenizer
from pz_agents.models.transformers import TransformersModel
from pz_agents.prompting.agents import ZeroShot
from pz_agents.rollout import Limits, RolloutContext, Task
from pz_agents.training.critic import Critic
from pz_agents.training.settings import TrainSettings
from pz_agents.training.trl_learner import Learner
from tests.support.toy_envs import Bandit, Echo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EPISODES = 32


def as_played(rows, step):
    return rows


def learn(make_env, folder, *, steps, seed=0, turns=1, change=as_played):
    """Train a fresh micro model in groups of one; success and explained variance of each step."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    recipe = Recipe(layers=1, hidden=32, key_value_heads=1, feed_forward=64, context=64)
    Qwen2ForCausalLM(tiny_config(recipe)).save_pretrained(folder / "model")
    tiny_tokenizer(recipe.context).save_pretrained(folder / "model")
    model = TransformersModel(folder / "model", device="cpu")
    # Three turns are all there are: an unreadable reply must not be worth one more.
    options = Options(critic_learning_rate=5e-3, critic_update_steps=2, bootstrap=False)
    settings = TrainSettings(
        env="toy",
        algorithm="ppo",
        steps=steps,
        seed=seed,
        group_size=1,
        learning_rate=5e-3,
        max_new_tokens=1,
        max_turns=turns,
    )
    context = RolloutContext(
        agent=ZeroShot(model, max_new_tokens=1, history=-1),
        make_env=lambda env_id: make_env(),
        limits=Limits(turns=turns),
        seed=seed,
        concurrency=32,
        group_size=1,
    )
    assert PPO.critic is not None
    critic = Critic(model, settings, options, PPO.critic)
    success, explained = [], []

    def collect(step):
        tasks = [
            Task("toy", 1000 * step + number % 4, f"{step}/{number:02d}")
            for number in range(EPISODES)
        ]
        played = sorted(PPO.program(context, tasks), key=lambda item: item.group_id)
        success.append(float(np.mean([item.success for item in played])))
        rows = change(PPO.credit(played, options).rows, step)
        rows, figures = critic.judge(step, played, rows)
        explained.append(figures["explained_variance"])
        return rows

    loss = partial(PPO.loss, options=options)
    learner = Learner(model.network, model.chat.tokenizer, settings, loss)
    learner.run(1, steps, collect, lambda step, metrics: True, folder)
    return success, explained


def with_shuffled_rewards(rows, step):
    order = np.random.default_rng(step).permutation(len(rows))
    return [
        replace(row, rewards=np.where(row.mask, rows[other].rewards[rows[other].mask].sum(), 0.0))
        for row, other in zip(rows, order, strict=True)
    ]


def with_inverted_masks(rows, step):
    """Train what the environment said instead of what the policy did."""
    changed = []
    for row in rows:
        mask = ~row.mask
        mask[0] = False
        rewards = np.zeros(len(mask), np.float32)
        rewards[np.flatnonzero(mask)[-1]] = row.rewards.sum()
        changed.append(replace(row, mask=mask, rewards=rewards))
    return changed


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_bandit_is_solved(tmp_path, seed):
    success, _ = learn(Bandit, tmp_path, steps=60, seed=seed)
    assert np.mean(success[:3]) < 0.5
    assert np.mean(success[-10:]) >= 0.95


def test_three_turns_are_learned_and_the_critic_explains_their_returns(tmp_path):
    success, explained = learn(Echo, tmp_path, steps=150, turns=3)
    assert np.mean(success[:5]) < 0.4
    assert np.mean(success[-10:]) >= 0.9
    assert abs(explained[0]) < 0.3
    assert np.mean(explained[-10:]) >= 0.8


@pytest.mark.parametrize("change", [with_shuffled_rewards, with_inverted_masks])
def test_what_says_nothing_teaches_nothing(tmp_path, change):
    success, _ = learn(Bandit, tmp_path, steps=60, change=change)
    assert np.mean(success[-10:]) < 0.7
