"""Algorithms learn what can be learned, and only that: toy environments, a model from scratch."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs pz-agents[train]")

from transformers import Qwen2ForCausalLM

from pz_agents.algorithms import ALGORITHMS, Algorithm, load_algorithm
from pz_agents.algorithms.grpo import GRPO
from pz_agents.models.recipe import Recipe
from pz_agents.models.tiny import tiny_config, tiny_tokenizer
from pz_agents.models.transformers import TransformersModel
from pz_agents.prompting.agents import ZeroShot
from pz_agents.prompting.reflection import Report
from pz_agents.rollout import Limits, RolloutContext, Task
from pz_agents.training.settings import TrainSettings
from pz_agents.training.trl_learner import Learner
from tests.support.toy_envs import Bandit, Echo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def as_played(algorithm, played, step):
    return algorithm.credit(played, algorithm.defaults).rows


def with_shuffled_rewards(algorithm, played, step):
    order = np.random.default_rng(step).permutation(len(played))
    shuffled = [
        replace(item, reward=played[other].reward, success=played[other].success)
        for item, other in zip(played, order, strict=True)
    ]
    return algorithm.credit(shuffled, algorithm.defaults).rows


def learn(
    make_env, folder, *, steps, algorithm: Algorithm = GRPO, seed=0, turns=1, change=as_played
):
    """Train a fresh micro model; return the success rate of each step's episodes."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    recipe = Recipe(layers=1, hidden=32, key_value_heads=1, feed_forward=64, context=64)
    Qwen2ForCausalLM(tiny_config(recipe)).save_pretrained(folder / "model")
    tiny_tokenizer(recipe.context).save_pretrained(folder / "model")
    model = TransformersModel(folder / "model", device="cpu")
    settings = TrainSettings(
        env="toy", steps=steps, seed=seed, learning_rate=5e-3, max_new_tokens=1, max_turns=turns
    )
    context = RolloutContext(
        agent=ZeroShot(model, max_new_tokens=1),
        make_env=lambda env_id: make_env(),
        limits=Limits(turns=turns),
        seed=seed,
        concurrency=32,
        group_size=16,
        options=algorithm.defaults,
    )
    success = []

    def collect(step):
        tasks = [Task("toy", 1000 * step + number, f"{step}/{number}") for number in range(4)]
        played = sorted(
            algorithm.program(context, tasks), key=lambda item: (item.group_id, item.attempt)
        )
        # Neither tasks that DAPO adds because the first were solved count, nor R3L's retries.
        first = [item for item in played if item.kind == "base" and "refill" not in item.group_id]
        success.append(float(np.mean([item.success for item in first])))
        return change(algorithm, played, step)

    reference = None
    if getattr(algorithm.defaults, "beta", 0.0):
        reference = copy.deepcopy(model.network).requires_grad_(False)
    learner = Learner(
        model.network,
        model.chat.tokenizer,
        settings,
        partial(algorithm.loss, options=algorithm.defaults),
        reference,
    )
    learner.run(1, steps, collect, lambda step, metrics: True, folder)
    return success


def with_inverted_masks(algorithm, played, step):
    """Train what the environment said instead of what the policy did."""
    rows = []
    for row in as_played(algorithm, played, step):
        mask = ~row.mask
        mask[0] = False
        advantages = np.where(mask, row.advantages.sum() / row.mask.sum(), 0.0)
        rows.append(replace(row, mask=mask, advantages=advantages.astype(np.float32)))
    return rows


NAMES = [name for name in ALGORITHMS if not name.startswith("r3l-") and name != "ppo"]
"""All but presets of `r3l`, which only change its options, and PPO, which has its own file."""

QUICK = {"dapo": {"max_rounds": 2}, "r3l": {"reflection_tokens": 16}}
"""A solved bandit has no group that teaches, so DAPO soon gives up; nobody reads a reflection."""


def quick(name: str) -> Algorithm:
    """Return the algorithm, without what only takes time here."""
    algorithm = load_algorithm(name)
    defaults = algorithm.defaults.model_copy(update=QUICK.get(name, {}))
    return algorithm._replace(defaults=defaults)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_bandit_is_solved(tmp_path, name, seed):
    algorithm = quick(name)
    success = learn(Bandit, tmp_path, steps=60, algorithm=algorithm, seed=seed)
    assert np.mean(success[:3]) < 0.5
    assert np.mean(success[-10:]) >= 0.95


def test_three_turns_are_learned_from_the_return_of_the_episode(tmp_path):
    success = learn(Echo, tmp_path, steps=250, turns=3)
    assert np.mean(success[:5]) < 0.4
    assert np.mean(success[-10:]) >= 0.9


@pytest.mark.parametrize("name", NAMES)
def test_shuffled_rewards_do_not_learn(tmp_path, name):
    algorithm = quick(name)
    success = learn(Bandit, tmp_path, steps=60, algorithm=algorithm, change=with_shuffled_rewards)
    assert np.mean(success[-10:]) < 0.7


def test_inverted_masks_do_not_learn(tmp_path):
    success = learn(Bandit, tmp_path, steps=120, change=with_inverted_masks)
    assert np.mean(success[-10:]) < 0.7


def told(base, expert):
    """Stand in for a reflection: what did not succeed is to be done otherwise from its start."""
    if base.success:
        return Report("Won.", None, "success")
    return Report("Lost.", "Chance.", "failure", "Do otherwise.", 0)


def scripted_r3l(**options) -> Algorithm:
    algorithm = load_algorithm("r3l")
    return algorithm._replace(
        program=partial(algorithm.program, reflector=told),
        defaults=algorithm.defaults.model_copy(update=options),
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_r3l_with_a_scripted_reflector_solves_a_bandit(tmp_path, seed):
    success = learn(Bandit, tmp_path, steps=60, algorithm=scripted_r3l(), seed=seed)
    assert np.mean(success[:3]) < 0.5
    assert np.mean(success[-10:]) >= 0.95


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_r3l_with_a_scripted_reflector_learns_three_turns(tmp_path, seed):
    success = learn(Echo, tmp_path, steps=250, algorithm=scripted_r3l(), seed=seed, turns=3)
    assert np.mean(success[:5]) < 0.4
    assert np.mean(success[-10:]) >= 0.9


@pytest.mark.parametrize("change", [with_shuffled_rewards, with_inverted_masks])
def test_r3l_with_a_scripted_reflector_learns_nothing_from_what_says_nothing(tmp_path, change):
    # Which retries are imitated is decided while they are played, before anything is shuffled.
    algorithm = scripted_r3l(meta="off")
    success = learn(Bandit, tmp_path, steps=60, algorithm=algorithm, change=change)
    assert np.mean(success[-10:]) < 0.7
