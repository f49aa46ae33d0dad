"""PPO's formulas: golden cases, the definition of GAE, invariances of its two losses."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pz_agents.algorithms import ppo
from pz_agents.algorithms.gae import adapted, explained_variance, gae, whitened
from pz_agents.algorithms.losses import Tokens, Totals, aggregate, kl_estimate, token_log_probs
from pz_agents.algorithms.rows import TrainRow, rows_of
from pz_agents.sdk.types import Sample, Step, Trajectory
from pz_agents.training.settings import TrainSettings, algorithm_options
from pz_envs.errors import ConfigError

GOLDEN = Path(os.environ.get("PZ_DATA", "/nonexistent")).parent / "golden" / "trainer_losses.json"
needs_golden = pytest.mark.skipif(not GOLDEN.is_file(), reason="needs the golden cases by PZ_DATA")
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Any]]:
    return {case["id"]: case for case in json.loads(GOLDEN.read_text())["cases"]}


def close(actual: Any, expected: Any, atol: float = 1e-6) -> None:
    found = torch.as_tensor(np.asarray(actual) if isinstance(actual, list) else actual)
    np.testing.assert_allclose(found.detach().numpy(), np.asarray(expected), atol=atol, rtol=0)


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def over_mask(rewards, values, mask, *, gamma, lam, bootstrap=0.0):
    """GAE of [B, T] arrays, read and written on the mask alone."""
    mask = np.asarray(mask, bool)
    found = gae(
        np.asarray(rewards)[mask],
        np.asarray(values)[mask],
        mask.sum(-1).tolist(),
        gamma=gamma,
        lam=lam,
        bootstrap=bootstrap,
    )
    spread = [np.zeros(mask.shape) for _ in found]
    for whole, flat in zip(spread, found, strict=True):
        whole[mask] = flat
    return spread


def by_definition(rewards, values, mask, *, gamma, lam, bootstrap):
    """A_t = sum_k (gamma lam)^k delta_{t+k} over what the policy sampled, in O(n^2)."""
    advantages = np.zeros(np.shape(rewards))
    for row, (reward, value, sampled) in enumerate(zip(rewards, values, mask, strict=True)):
        places = np.flatnonzero(sampled)
        for start, place in enumerate(places):
            total = 0.0
            for steps, here in enumerate(places[start:]):
                last = start + steps + 1 == len(places)
                after = bootstrap[row] if last else value[places[start + steps + 1]]
                total += (gamma * lam) ** steps * (reward[here] + gamma * after - value[here])
            advantages[row, place] = total
    return advantages


# Golden cases.


@needs_golden
@pytest.mark.parametrize("name", ["gae_multiturn", "gae_discounted"])
def test_gae_over_turns_matches_the_golden_cases(golden, name):
    inputs, case = golden["gae_multiturn"]["inputs"], golden[name]
    advantages, returns = over_mask(**inputs, **case["params"])
    close(advantages, case["expected_f64"]["advantages"])
    close(returns, case["expected_f64"]["returns"])
    if name == "gae_multiturn":
        mask = np.asarray(inputs["mask"], bool)
        flat = whitened(advantages[mask])
        close(flat, np.asarray(case["expected_f64"]["whitened"])[mask])


@needs_golden
def test_an_episode_cut_short_matches_the_golden_case(golden):
    case = golden["gae_truncated_bootstrap"]
    inputs = dict(case["inputs"])
    bootstrap = [inputs.pop("bootstrap")]
    rows = {name: [value] for name, value in inputs.items()}
    advantages, returns = over_mask(**rows, **case["params"], bootstrap=bootstrap)
    close(advantages[0], case["expected_f64"]["advantages"])
    close(returns[0], case["expected_f64"]["returns"])


@needs_golden
def test_packed_rows_match_the_golden_case_and_padded_ones(golden):
    case = golden["gae_packed_equals_padded"]
    packed, _ = gae(**case["inputs"], **case["params"])
    close(packed, case["expected_f64"]["advantages"])
    padded = golden["gae_multiturn"]["inputs"]
    advantages, _ = over_mask(**padded, **case["params"])
    close(advantages[np.asarray(padded["mask"], bool)], packed, atol=1e-12)


@needs_golden
def test_gae_by_turns_matches_the_golden_case(golden):
    case = golden["gae_turn_level"]
    advantages, _ = gae(**case["inputs"], lengths=[2], **case["params"])
    close(advantages, case["expected_f64"]["turn_advantages"])


@needs_golden
def test_the_value_loss_matches_the_golden_case(golden):
    case = golden["value_loss"]
    inputs = {name: doubles(value) for name, value in case["inputs"].items()}
    mask = inputs["mask"].bool()
    totals = Totals(float(mask.sum()), 3.0)
    for clip, name in ((0.2, "clipped"), (None, "unclipped")):
        options = ppo.Options(value_clip=clip)
        found = ppo.value_loss(
            inputs["values_new"], inputs["values_old"], inputs["returns"], mask, totals, options
        )
        close(found.value, case["expected_f64"][name])
        if clip:
            close(found.stats["value_clip"], case["expected_f64"]["clipfrac"])


@needs_golden
def test_the_whole_of_ppo_matches_the_golden_case(golden):
    case, batch = golden["ppo_full"], golden["common_batch"]["inputs"]
    given, params, expected = case["inputs"], case["params"], case["expected_f64"]
    mask = np.asarray(batch["mask"], bool)
    old = np.asarray(batch["logp_old"])
    reference = np.asarray(batch[next(key for key in batch if "ref" in key)])
    rewards = np.where(mask, -params["kl_coef"] * (old - reference), 0.0)
    rewards[np.arange(3), given["last_index"]] += given["scores"]
    close(rewards, expected["token_rewards"])
    rows = [
        replace(some_row(mask[number]), trajectory_id=str(number), rewards=rewards[number])
        for number in range(3)
    ]
    options = ppo.Options(entropy_coef=params["ent_coef"], lam=params["lam"])
    values = np.asarray(given["values_old"])
    found = ppo.estimate(rows, list(values), {}, options)
    close(np.stack([row.advantages for row in found.rows]), expected["advantages_whitened"])
    close(np.stack(found.returns), expected["returns"])
    tensor_mask = torch.from_numpy(mask)
    totals = Totals(float(mask.sum()), 3.0)
    tokens = Tokens(
        log_probs=doubles(batch["logp"]),
        old_log_probs=doubles(batch["logp_old"]),
        advantages=doubles(expected["advantages_whitened"]),
        mask=tensor_mask,
        totals=totals,
        entropies=doubles(given["token_entropy"]),
    )
    policy = ppo.loss(tokens, options).value
    plain = ppo.loss(replace(tokens, entropies=None), options).value
    close(plain, expected["pg_loss"])
    close(plain - policy, params["ent_coef"] * expected["entropy"])
    value = ppo.value_loss(
        doubles(given["values_new"]),
        doubles(given["values_old"]),
        doubles(expected["returns"]),
        tensor_mask,
        totals,
        options,
    ).value
    close(value, expected["vf_loss"])
    close(policy + params["vf_coef"] * value, expected["total"])


@needs_golden
def test_whitened_rewards_keep_their_mean_as_in_the_golden_case(golden):
    case = golden["reward_whiten_noshift"]
    mask = np.asarray(case["inputs"]["mask"], bool)
    rewards = np.asarray(case["inputs"]["token_rewards"])[mask]
    found = whitened(rewards, shift=False)
    close(found, np.asarray(case["expected_f64"]["whitened"])[mask])
    assert found.mean() == pytest.approx(rewards.mean())


@needs_golden
def test_the_adaptive_weight_of_the_kl_matches_the_golden_case(golden):
    case = golden["adaptive_kl"]
    params, weight, found = case["params"], case["params"]["init"], []
    for kl in case["inputs"]["observed_kl"]:
        weight = adapted(weight, kl, params["target"], params["n"], params["horizon"])
        found.append(weight)
    close(found, case["expected_f64"]["coef"], atol=1e-12)


@needs_golden
def test_kl_estimators_match_the_golden_case(golden):
    batch, expected = golden["common_batch"]["inputs"], golden["kl_estimators"]["expected_f64"]
    mask = doubles(batch["mask"]).bool()
    reference = doubles(batch[next(key for key in batch if "ref" in key)])
    totals = Totals(float(mask.sum()), 3.0)
    for kind in ("k1", "k2", "k3"):
        estimate = kl_estimate(doubles(batch["logp"]), reference, mask, kind)
        close(aggregate(estimate, mask, "token_mean", totals), expected[kind])


@needs_golden
def test_the_clipped_loss_matches_the_golden_case_in_every_aggregation(golden):
    batch, case = golden["common_batch"]["inputs"], golden["ppo_clip_sym_aggregations"]
    mask = doubles(batch["mask"]).bool()
    now = doubles(batch["logp"]).requires_grad_()
    tokens = Tokens(
        log_probs=now,
        old_log_probs=doubles(batch["logp_old"]),
        advantages=doubles(batch["adv_seq"])[:, None].expand_as(now),
        mask=mask,
        totals=Totals(float(mask.sum()), 3.0, 8.0),
    )
    names = {"const": "dr_grpo_const"}
    for how in ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "const"):
        found = ppo.loss(tokens, ppo.Options(aggregation=how))
        close(found.value, case["expected_f64"][names.get(how, how)])
    ppo.loss(tokens, ppo.Options()).value.backward()
    close(now.grad, case["expected_f64"]["grad_wrt_logp_token_mean"])


# Against definitions.


def test_gae_is_its_definition_on_two_hundred_random_masks():
    rng = np.random.default_rng(0)
    for _ in range(200):
        shape = (int(rng.integers(1, 5)), int(rng.integers(1, 14)))
        mask = rng.random(shape) < rng.uniform(0.2, 0.9)
        mask[~mask.any(-1), 0] = True
        rewards, values = rng.normal(size=shape), rng.normal(size=shape)
        values[~mask] = np.nan
        given = {
            "gamma": rng.uniform(0.5, 1.0),
            "lam": rng.uniform(),
            "bootstrap": rng.normal(size=shape[0]) * (rng.random(shape[0]) < 0.5),
        }
        advantages, returns = over_mask(rewards, values, mask, **given)
        expected = by_definition(rewards, values, mask, **given)
        assert np.abs(advantages - expected).max() <= 1e-9
        assert np.abs((returns - expected - values)[mask]).max() <= 1e-9


def test_lambda_one_is_the_return_less_the_value_and_lambda_zero_the_next_error():
    rewards, values = [0.0, 1.0, 2.0], [0.5, 0.25, 1.0]
    full, returns = gae(rewards, values, [3], gamma=1.0, lam=1.0)
    assert full.tolist() == [2.5, 2.75, 1.0]
    assert returns.tolist() == [3.0, 3.0, 2.0]
    assert gae(rewards, values, [3], gamma=1.0, lam=0.0)[0].tolist() == [-0.25, 1.75, 1.0]


def test_lengths_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match=r"4 by the lengths"):
        gae([0.0] * 3, [0.0] * 3, [1, 3], gamma=1.0, lam=1.0)


def test_explained_variance_is_one_for_a_perfect_critic_and_nothing_for_a_constant():
    returns = np.array([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(np.ones(3), returns) == pytest.approx(0.0)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert np.isnan(explained_variance(returns, np.ones(3)))


# Rows.


def some_row(mask) -> TrainRow:
    zeros = np.zeros(len(mask), np.float32)
    whole = np.zeros(len(mask), np.int32)
    return TrainRow(whole, np.asarray(mask), zeros, whole, whole, zeros, "0", "g", zeros)


def episode(*turns, key="g/0", truncated="") -> Trajectory:
    """An episode of (prompt ids, token ids, reward) turns; a turn without tokens has no sample."""
    steps = []
    for prompt, tokens, reward in turns:
        sample = None
        if tokens:
            log_probs = np.full(len(tokens), -1.0, np.float32)
            sample = Sample(np.array(prompt, np.int32), np.array(tokens, np.int32), log_probs)
        steps.append(Step("", "a", reward, reward, True, False, sample))
    total = sum(step.reward for step in steps)
    return Trajectory(
        key=key,
        env_id="toy",
        env_seed=0,
        task_id="t",
        group_id=key.rpartition("/")[0],
        attempt=0,
        steps=tuple(steps),
        final_observation="",
        reward=total,
        score=total,
        max_score=1.0,
        score_norm=0.0,
        success=False,
        terminated=not truncated,
        truncated=truncated,
    )


def test_a_reward_stands_on_the_last_token_of_the_turn_that_earned_it():
    (row,) = rows_of(episode(([1], [2, 3], 0.5), ([1, 2, 3, 9], [4], -1.0)), 0.0)
    assert row.rewards.tolist() == [0, 0, 0.5, 0, -1.0]


def test_what_a_turn_without_tokens_earned_goes_to_the_turn_before():
    (row,) = rows_of(episode(([1], [2, 3], 0.5), ([], [], 2.0)), 0.0)
    assert row.rewards.tolist() == [0, 0, 2.5]


def test_gae_runs_on_over_the_rows_of_a_conversation_that_began_afresh():
    played = episode(([1, 2], [3], 0.0), ([5], [6, 7], 1.0))
    rows = rows_of(played, 0.0)
    assert len(rows) == 2
    values = [np.zeros(len(row.ids), np.float32) for row in rows]
    options = ppo.Options(whiten=False, gamma=0.5, lam=1.0)
    found = ppo.estimate(rows, values, {}, options)
    assert [row.advantages.tolist() for row in found.rows] == [[0, 0, 0.25], [0, 0.5, 1.0]]


def test_by_turns_all_tokens_of_a_turn_share_its_advantage():
    (row,) = rows_of(episode(([1], [2, 3], 0.1), ([1, 2, 3, 9], [4, 5], 1.0)), 0.0)
    values = np.array([9, 0.3, 7, 9, 0.55, 8], np.float32)
    options = ppo.Options(level="turn", whiten=False, gamma=0.95, lam=0.9)
    found = ppo.estimate([row], [values], {}, options)
    close(found.rows[0].advantages, [0, 0.70725, 0.70725, 0, 0.45, 0.45])
    close(found.returns[0], [0, 1.00725, 1.00725, 0, 1.0, 1.0])


def test_only_an_episode_that_was_cut_short_goes_on_with_a_value():
    played = [episode(([1], [2], 1.0), key="a/0"), episode(([1], [2], 1.0), key="b/0")]
    rows = [row for item in played for row in rows_of(item, 0.0)]
    values = [np.zeros(2, np.float32)] * 2
    found = ppo.estimate(rows, values, {"b/0": 3.0}, ppo.Options(whiten=False))
    assert [row.advantages[1] for row in found.rows] == [1.0, 4.0]


def test_advantages_are_whitened_over_the_whole_batch_and_returns_are_not():
    rng = np.random.default_rng(1)
    rows, values = [], []
    for number in range(5):
        turns = ([1], [2] * int(rng.integers(1, 4)), float(rng.normal()))
        rows += rows_of(episode(turns, key=f"g/{number}"), 0.0)
        values.append(rng.normal(size=len(rows[-1].ids)).astype(np.float32))
    found = ppo.estimate(rows, values, {}, ppo.Options())
    plain = ppo.estimate(rows, values, {}, ppo.Options(whiten=False))
    flat = np.concatenate([row.advantages[row.mask] for row in found.rows])
    assert flat.mean() == pytest.approx(0, abs=1e-6)
    assert flat.std(ddof=1) == pytest.approx(1, abs=1e-6)
    for one, other in zip(found.returns, plain.returns, strict=True):
        assert np.array_equal(one, other)


def test_failed_episodes_give_no_rows_and_a_step_of_nothing_estimates_nothing():
    failed = replace(episode(([1], [2], 1.0)), status="failed")
    found = ppo.credit([failed], ppo.Options())
    assert found.rows == []
    assert ppo.estimate([], [], {}, ppo.Options()).rows == []


# Losses.


def test_junk_off_the_mask_changes_neither_loss_nor_gradient():
    rng = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 7, generator=rng) < 0.6
    values, old, returns = (torch.randn(3, 7, generator=rng) for _ in range(3))
    grads = []
    for junk in (0.0, float("nan"), float("inf")):
        given = [torch.where(mask, each, junk) for each in (values, old, returns)]
        given[0].requires_grad_()
        totals = Totals(float(mask.sum()), 3.0)
        ppo.value_loss(*given, mask, totals, ppo.Options()).value.backward()
        grads.append(given[0].grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_the_entropy_bonus_has_the_gradient_of_the_entropy():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 2, 3])
    _, entropy = token_log_probs(logits, ids, 1.0, entropy_gradient=True)
    entropy.sum().backward()
    plain = logits.detach().float().requires_grad_()
    torch.distributions.Categorical(logits=plain).entropy().sum().backward()
    close(logits.grad.float(), plain.grad, atol=1e-5)
    assert not token_log_probs(logits, ids, 1.0)[1].requires_grad


# Settings.


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"env": "pz/Countdown-v0", "steps": 1, "algorithm": "ppo", **changes})


def test_a_group_of_one_is_for_algorithms_with_a_critic():
    algorithm_options(settings(group_size=1))
    with pytest.raises(ConfigError, match=r"`group_size` is 1, and grpo compares"):
        algorithm_options(settings(group_size=1, algorithm="grpo"))


def test_kl_is_in_the_reward_or_in_the_loss_and_a_target_needs_a_weight():
    with pytest.raises(ConfigError, match="count it twice"):
        algorithm_options(settings(kl_reward=0.05, options={"beta": 0.1}))
    with pytest.raises(ConfigError, match="`kl_target`"):
        algorithm_options(settings(kl_target=0.1))
