"""Whole PPO runs: a critic beside the actor, checkpoints, exact resuming, episodes cut short."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs pz-agents[train]")

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pz_agents.algorithms import load_algorithm, ppo
from pz_agents.algorithms.rows import rows_of
from pz_agents.errors import ModelError
from pz_agents.models import load_model
from pz_agents.rollout import ExperienceStore
from pz_agents.training import checkpoint
from pz_agents.training.critic import Critic, classifier
from pz_agents.training.monitors import read_metrics
from pz_agents.training.run import TrainSettings, train
from pz_agents.training.update import Updater
from pz_envs.textenv import Outcome, TextEnv
from tests.support.learner_cases import random_rows

pytestmark = pytest.mark.timeout(280)


class ParityEnv(TextEnv):
    """Pays 1 for a reply of an even number of characters; ends at a limit and never by itself."""

    family = "toy"

    def _start(self, seed, options):
        self._total, self._max_score = 0.0, 2.0
        self._task_id = f"parity-{seed % 7}"
        return Outcome(f"Go {seed % 7}.", 0.0)

    def _advance(self, command):
        reward = float(len(command) % 2 == 0)
        self._total += reward
        return Outcome("Again.", self._total, reward, success=self._total >= 2)


@pytest.fixture(autouse=True, scope="module")
def _toy_env_and_one_thread():
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pz_envs.catalog.make_env", lambda env_id, **kwargs: ParityEnv())
        patch.setattr("pz_agents.training.run.plot_metrics", lambda metrics, path: [])
        yield
    torch.set_num_threads(before)


def settings(model: Path | str, options: dict[str, Any] | None = None, **changes: Any):
    given = {
        "env": "pz/Countdown-v0",
        "algorithm": "ppo",
        "options": {"critic_learning_rate": 1e-2, "critic_update_steps": 3, **(options or {})},
        "model": str(model),
        "steps": 4,
        "groups_per_step": 5,
        "group_size": 1,
        "learning_rate": 1e-3,
        "max_new_tokens": 6,
        "max_turns": 2,
        "save_every": 2,
        **changes,
    }
    return TrainSettings(**given)


@pytest.fixture(scope="module")
def straight(micro, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    train(settings(micro), folder)
    return folder


class StopHereError(Exception):
    pass


def stop_after(last):
    def on_progress(step, steps, metrics):
        if step == last:
            raise StopHereError

    return on_progress


def files_of(run: Path) -> dict[str, bytes]:
    newest = checkpoint.newest(run / "checkpoints")
    found = {
        path.relative_to(newest).as_posix(): path.read_bytes()
        for path in newest.rglob("*")
        if path.is_file()
    }
    return {**found, "metrics.jsonl": (run / "metrics.jsonl").read_bytes()}


def weights(module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_actor_and_critic_both_move_and_the_critic_says_how_well_it_does(straight, micro):
    newest = checkpoint.newest(straight / "checkpoints")
    start = AutoModelForCausalLM.from_pretrained(micro)
    actor = AutoModelForCausalLM.from_pretrained(newest / "policy")
    critic = AutoModelForSequenceClassification.from_pretrained(newest / "critic")
    assert critic.config.num_labels == 1
    assert (weights(actor) - weights(start)).abs().max() > 1e-4
    assert (weights(critic.base_model) - weights(start.base_model)).abs().max() > 1e-3
    lines = read_metrics(straight / "metrics.jsonl")
    assert lines[0]["value"] == 0.0
    assert lines[-1]["value"] != 0.0
    for name in ("value_loss", "explained_variance", "critic_grad_norm", "return", "advantage"):
        assert all(name in line for line in lines)
    assert all(line["critic_learning_rate"] == pytest.approx(1e-2) for line in lines)


def test_the_first_update_is_on_policy_with_groups_of_one(straight):
    for line in read_metrics(straight / "metrics.jsonl"):
        assert line["usable_groups"] == line["groups"] == 5
        assert abs(line["ratio"] - 1.0) <= 1e-4
        assert line["skipped_updates"] == 0


@pytest.mark.parametrize("killed_at", [1, 3])
def test_a_run_cut_short_and_called_again_equals_one_that_was_not(
    straight, micro, tmp_path, killed_at
):
    with pytest.raises(StopHereError):
        train(settings(micro), tmp_path, on_progress=stop_after(killed_at))
    train(settings(micro), tmp_path)
    expected = files_of(straight)
    assert {"critic/model.safetensors", "critic/config.json", "optimizer/critic.pt"} <= set(
        expected
    )
    assert files_of(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"lora_rank": 4, "kl_reward": 0.05, "kl_target": 0.01, "kl_horizon": 20},
        {"iterations": 2, "policy_update_steps": 3, "correction": "token_truncate"},
        {"options": {"beta": 0.1, "entropy_coef": 0.01, "level": "turn"}, "schedule": "cosine"},
    ],
    ids=["adapter-and-adaptive-kl", "minibatches", "kl-in-loss"],
)
def test_runs_with_other_settings_resume_exactly(micro, tmp_path, changes):
    for folder, stops in (("straight", []), ("cut", [3])):
        for stop in stops:
            with pytest.raises(StopHereError):
                train(settings(micro, **changes), tmp_path / folder, on_progress=stop_after(stop))
        train(settings(micro, **changes), tmp_path / folder)
    assert files_of(tmp_path / "straight") == files_of(tmp_path / "cut")
    lines = read_metrics(tmp_path / "cut" / "metrics.jsonl")
    assert all(np.isfinite(line["value_loss"]) for line in lines)
    if "kl_reward" in changes:
        assert [line["kl_weight"] for line in lines] != [0.05] * len(lines)
        assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-4)  # the weights have not moved yet
        assert lines[-1]["kl"] != 0.0
    critic = checkpoint.newest(tmp_path / "cut" / "checkpoints") / "critic"
    assert set(classifier(critic).state_dict()) == set(classifier(micro).state_dict())


# The critic by itself.


@pytest.fixture(scope="module")
def policy(micro):
    return load_model(str(micro), device="cpu")


def critic_of(policy, **changes: Any) -> Critic:
    options = ppo.Options(**{"critic_learning_rate": 1e-2, "value_clip": None, **changes})
    rule = load_algorithm("ppo").critic
    return Critic(policy, settings("tiny"), options, rule)


def test_a_critic_begins_with_the_policys_body_and_worth_nothing(policy):
    critic = critic_of(policy)
    rows = random_rows()
    assert torch.equal(weights(critic.module.base_model), weights(policy.network.base_model))
    assert all(not values.any() for values in critic.values(rows))


def test_a_value_depends_on_what_came_before_its_token_alone(policy):
    critic = critic_of(policy)
    torch.nn.init.normal_(critic.module.score.weight)
    (row,) = random_rows((9,))
    row.mask[1:] = True
    (before,) = critic.values([row])
    row.ids[5] += 1
    (after,) = critic.values([row])
    np.testing.assert_allclose(after[:6], before[:6], atol=1e-6)
    assert np.abs(after[6:] - before[6:]).max() > 1e-3


def returns_for(rows, seed=0):
    rng = np.random.default_rng(seed)
    return [np.where(row.mask, rng.normal(), 0.0).astype(np.float32) for row in rows]


@pytest.mark.parametrize("rows", [random_rows(), random_rows((9, 5, 12, 7, 6))], ids=len)
@pytest.mark.parametrize("steps", [1, 4, 12])
def test_every_row_is_learned_from_once_a_pass_however_many_updates(policy, rows, steps):
    critic = critic_of(policy, critic_update_steps=steps)
    step = critic.step_rows(rows)
    seen = np.concatenate(step.minibatches)
    assert sorted(seen.tolist()) == list(range(len(rows)))
    sizes = [len(part) for part in step.minibatches]
    assert max(sizes) - min(sizes) <= 1
    values = critic.values(rows)
    critic.learn(rows, values, returns_for(rows))
    assert critic.updates == min(steps, len(rows))


def test_the_critics_loss_is_that_of_all_rows_however_they_are_cut(policy):
    rows = random_rows()
    returns, norms, losses = returns_for(rows), [], []
    for budget in (0, 12, 30):
        critic = critic_of(policy, critic_update_steps=1)
        critic.budget = budget
        found = critic.learn(rows, critic.values(rows), returns)
        losses.append(found["value_loss"])
        norms.append(found["critic_grad_norm"])
    tokens = np.concatenate([each[row.mask] for each, row in zip(returns, rows, strict=True)])
    assert losses == pytest.approx([0.5 * float(np.mean(tokens**2))] * 3, rel=1e-5)
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


def test_a_critic_learns_returns_that_its_rows_tell(policy):
    rows = random_rows(tuple(range(5, 21)))
    returns = returns_for(rows)
    critic = critic_of(policy, critic_update_steps=2)
    first = critic.learn(rows, critic.values(rows), returns)["value_loss"]
    for _ in range(30):
        last = critic.learn(rows, critic.values(rows), returns)["value_loss"]
    assert last < 0.1 * first


def test_memory_that_runs_out_changes_nothing_but_the_micro_batches(policy, monkeypatch):
    rows = random_rows()
    returns, found = returns_for(rows), []
    for fails in (False, True):
        critic = critic_of(policy, critic_update_steps=1)
        share, calls = critic._share, []

        def failing(step, batch, share=share, calls=calls, fails=fails):
            calls.append(len(batch.ids))
            if fails and len(batch.ids) > 2:
                raise torch.OutOfMemoryError
            return share(step, batch)

        monkeypatch.setattr(critic, "_share", failing)
        found.append(critic.learn(rows, critic.values(rows), returns)["critic_grad_norm"])
    assert critic.out_of_memory > 0
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_what_is_not_finite_leaves_the_critic_as_it_was(policy):
    rows = random_rows()
    critic = critic_of(policy, critic_update_steps=1)
    before = weights(critic.module).clone()
    broken = [np.full(len(row.ids), np.nan, np.float32) for row in rows]
    for _ in range(4):
        critic.learn(rows, critic.values(rows), broken)
    assert torch.equal(weights(critic.module), before)
    assert critic.skipped == 4
    with pytest.raises(ModelError, match="were not finite"):
        critic.learn(rows, critic.values(rows), broken)


def test_a_critic_may_begin_from_a_folder_and_a_reward_model_needs_its_head(
    policy, micro, straight, tmp_path
):
    saved = checkpoint.newest(straight / "checkpoints") / "critic"
    critic = critic_of(policy, critic_model=str(saved))
    assert torch.equal(weights(critic.module), weights(classifier(saved)))
    assert not classifier(micro).score.weight.any()
    with pytest.raises(ModelError, match="no reward model"):
        classifier(micro, needs_head=True)
    with pytest.raises(ModelError, match="holds no model"):
        classifier(tmp_path)


def test_an_episode_cut_short_is_valued_where_the_next_reply_would_begin(straight, policy):
    with ExperienceStore(straight / "experience.db") as store:
        item = next(item for item in store.trajectories() if item.truncated == "turns")
    critic = critic_of(policy)
    torch.nn.init.normal_(critic.module.score.weight)
    rows = rows_of(item, 0.0)
    lasts = critic._lasts([item], rows)
    message = {"role": "user", "content": item.final_observation}
    said = [rows[-1].ids, policy.render([message], continuation=True)]
    if rows[-1].ids[-1] != policy.end_of_turn_id:
        said.insert(1, np.array([policy.end_of_turn_id]))
    ids = torch.tensor(np.concatenate(said)[None]).long()
    with torch.no_grad():
        value = critic.module.score(critic.module.base_model(ids).last_hidden_state[0, -1])
    assert lasts[item.key] == pytest.approx(float(value), abs=1e-5)


def test_an_episode_cut_short_for_what_it_said_is_over(straight, policy):
    with ExperienceStore(straight / "experience.db") as store:
        played = store.trajectories()
        item = next(item for item in played if item.truncated == "turns")
    critic = critic_of(policy)
    for why in ("invalid", "repeats", ""):
        assert critic._lasts([replace(item, truncated=why)], rows_of(item, 0.0)) == {}


# KL in the reward.


@pytest.fixture
def learner(policy):
    """An updater whose reference is another network than the one that is trained."""
    given = settings("tiny", kl_reward=0.5, kl_target=1e-3, kl_horizon=60)
    reference = copy.deepcopy(policy.network)
    torch.nn.init.normal_(reference.get_input_embeddings().weight, std=0.1)
    return Updater(policy.network, given, partial(ppo.loss, options=ppo.Options()), reference)


@pytest.fixture
def paid_rows():
    return [replace(row, rewards=np.ones(len(row.ids), np.float32)) for row in random_rows()]


def test_kl_comes_off_token_by_token(learner, paid_rows):
    moved = learner.divergences(paid_rows)
    assert max(float(np.abs(kl).max()) for kl in moved) > 0.1
    changed = learner.with_kl_in_token_rewards(paid_rows, 6)
    for row, kl, after in zip(paid_rows, moved, changed, strict=True):
        assert not kl[~row.mask].any()
        np.testing.assert_allclose(after.rewards, 1.0 - 0.5 * kl, atol=1e-6)


def test_the_weight_of_the_kl_is_steered_and_saved(learner, paid_rows):
    total = sum(float(kl.sum()) for kl in learner.divergences(paid_rows))
    mean = total / sum(int(row.mask.sum()) for row in paid_rows)
    learner.with_kl_in_token_rewards(paid_rows, 6)
    change = 0.2 if mean > 0 else -0.2
    assert learner.kl_figures == {"kl": pytest.approx(mean), "kl_weight": 0.5}  # before the step
    assert learner.kl_weight == pytest.approx(0.5 * (1 + change * 6 / 60))
    assert json.loads(json.dumps(learner.state()))["kl_weight"] == learner.kl_weight


# The actor's mini-batches.


def test_a_mini_batch_has_the_gradient_of_its_rows_alone(policy):
    rows = random_rows((9, 5, 12, 7, 6))
    loss = partial(ppo.loss, options=ppo.Options(beta=0.1))

    def updater(**changes):
        network = copy.deepcopy(policy.network)
        return Updater(network, settings("tiny", **changes), loss, policy.network)

    whole = updater(policy_update_steps=2)
    step = whole.step_rows(rows)
    assert sorted(len(part) for part in step.minibatches) == [2, 3]
    for _ in range(4):  # a later pass over the same mini-batches
        numbers = step.numbers
        alone = updater()
        expected = alone.accumulate(alone.step_rows([rows[number] for number in numbers]))
        whole.module.zero_grad()
        assert float(whole.accumulate(step)) == pytest.approx(float(expected), abs=1e-6)
        for one, other in zip(whole.module.parameters(), alone.module.parameters(), strict=True):
            if other.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4)


def test_the_critics_schedule_covers_its_own_number_of_updates(policy):
    chosen = settings("tiny", schedule="linear", steps=2, options={"critic_update_steps": 3})
    critic = Critic(
        policy, chosen, ppo.Options(critic_update_steps=3), load_algorithm("ppo").critic
    )
    rates = [critic.schedule.rate(update) for update in range(6)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1 / 6)
