"""What one update is made of: micro-batches, the head, memory, corrections, KL in the reward."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learner_cases import gradients, loss_of, network, own_log_probs, random_rows, settings, updater
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
)

from pz_agents.algorithms import corrections
from pz_agents.algorithms.losses import Tokens, Totals, clipped_policy_loss, ratio
from pz_agents.algorithms.rows import TrainRow, rows_of
from pz_agents.errors import ModelError
from pz_agents.sdk.types import Sample, Step, Trajectory
from pz_agents.training.batching import (
    group_numbers,
    head_is_plain,
    log_probs_of,
    micro_batch,
    micro_batches,
)
from pz_agents.training.settings import TrainSettings, algorithm_options
from pz_envs.errors import ConfigError

GOLDEN = Path(os.environ.get("PZ_DATA", "/nonexistent")).parent / "golden" / "trainer_losses.json"
needs_golden = pytest.mark.skipif(not GOLDEN.is_file(), reason="needs the golden cases by PZ_DATA")
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def golden():
    return {case["id"]: case for case in json.loads(GOLDEN.read_text())["cases"]}


def whole(rows):
    return micro_batch(rows, np.arange(len(rows)), group_numbers(rows))


# Micro-batches


def cost_of(lengths, parts) -> int:
    return sum(len(p) * max(lengths[i] for i in p) + 128 for p in parts)


@given(st.lists(st.integers(1, 900), min_size=1, max_size=7), st.integers(1, 2000))
def test_micro_batches_cost_the_least_of_all_cuts_that_fit(lengths, budget):
    parts = micro_batches(lengths, budget)
    order = [i for part in parts for i in part]
    assert sorted(order) == list(range(len(lengths)))
    sizes = [len(part) * max(lengths[i] for i in part) for part in parts]
    assert all(size <= budget or len(part) == 1 for size, part in zip(sizes, parts, strict=True))
    ordered = sorted(lengths, reverse=True)
    assert [lengths[i] for i in order] == ordered
    costs = []
    for chosen in itertools.product([False, True], repeat=len(lengths) - 1):
        ends = [i + 1 for i, cut in enumerate(chosen) if cut] + [len(lengths)]
        cuts = [range(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        if all(len(cut) * ordered[cut[0]] <= budget or len(cut) == 1 for cut in cuts):
            costs.append(cost_of(ordered, cuts))
    assert cost_of(lengths, parts) == min(costs)


def test_without_a_budget_all_rows_go_together_and_no_rows_make_no_micro_batch():
    assert [list(part) for part in micro_batches([3, 9, 5], 0)] == [[1, 2, 0]]
    assert micro_batches([], 0) == micro_batches([], 100) == []


def test_little_is_padding_when_lengths_are_log_normal():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.0, 0.65, 256), 8, 256).astype(int).tolist()
    padded = sum(len(part) * lengths[part[0]] for part in micro_batches(lengths, 4096))
    assert 1 - sum(lengths) / padded <= 0.08
    assert 1 - sum(lengths) / (256 * max(lengths)) > 0.5


def test_micro_batches_hold_each_token_where_its_row_says():
    rows = random_rows()
    batch = micro_batch(rows, np.array([4, 1, 2]), group_numbers(rows))
    assert batch.ids.shape == (3, 12)
    for place, number in enumerate((4, 1, 2)):
        row = rows[number]
        assert batch.ids[place, : len(row.ids)].tolist() == row.ids.tolist()
        assert batch.ids[place][batch.mask[place]].tolist() == row.ids[row.mask].tolist()
        sampled = batch.log_probs[place][batch.mask[place]]
        np.testing.assert_array_equal(sampled.numpy(), row.log_probs[row.mask])
        advantages = batch.advantages[place][batch.mask[place]]
        np.testing.assert_array_equal(advantages.numpy(), row.advantages[row.mask])
    assert batch.groups.tolist() == [2, 0, 1]


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "const"])
def test_loss_and_gradient_do_not_depend_on_micro_batches_or_the_order_of_rows(aggregation):
    module = network()
    rows = random_rows(lengths=np.random.default_rng(1).integers(4, 60, size=24))
    values, found, figures = [], [], []
    for budget, order in ((0, 1), (1, 1), (100, 1), (400, -1), (8192, -1)):
        one = updater(
            module, loss=loss_of(aggregation=aggregation), max_tokens_per_microbatch=budget
        )
        values.append(one.accumulate(one.step_rows(rows[::order])))
        found.append(gradients(module))
        figures.append(one.before_update())
        module.zero_grad()
    assert [f["micro_batches"] for f in figures][:2] == [1, 24]
    assert figures[0]["padding"] > figures[3]["padding"] > figures[1]["padding"] == 0
    for value, gradient, figure in zip(values[1:], found[1:], figures[1:], strict=True):
        torch.testing.assert_close(value, values[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(gradient, found[0], atol=1e-6, rtol=1e-4)
        for name in ("ratio", "approx_kl", "clip_low", "entropy", "mismatch_kl", "engine_gap"):
            assert figure[name] == pytest.approx(figures[0][name], abs=1e-5)


def test_the_same_rows_give_the_same_bits_twice():
    found = []
    for _ in range(2):
        module = network()
        one = updater(module, max_tokens_per_microbatch=30)
        one.accumulate(one.step_rows(random_rows()))
        found.append(gradients(module))
    assert torch.equal(*found)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_do_not_depend_on_the_padding_around_a_row(temperature):
    module = network()
    rows = own_log_probs(module, random_rows(), temperature)
    with torch.no_grad():
        found, _ = log_probs_of(module, whole(rows), temperature, plain_head=True)
    batch = whole(rows)
    torch.testing.assert_close(found, batch.log_probs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("junk", [1e30, float("inf"), float("nan")])
def test_junk_off_the_mask_and_ids_behind_a_row_change_no_bit(monkeypatch, junk):
    def spoiled(rows, numbers, groups, device=None):
        batch = micro_batch(rows, numbers, groups, device)
        for place, number in enumerate(numbers):
            batch.ids[place, len(rows[number].ids) :] = 77
            batch.log_probs[place][~batch.mask[place]] = junk
            batch.advantages[place][~batch.mask[place]] = junk
        return batch

    values, found = [], []
    for spoil in (False, True):
        module = network()
        if spoil:
            monkeypatch.setattr("pz_agents.training.update.micro_batch", spoiled)
        one = updater(
            module,
            reference=network(1),
            loss=loss_of(beta=0.1),
            correction="token_mask",
            max_tokens_per_microbatch=30,
        )
        values.append(one.accumulate(one.step_rows(random_rows())))
        found.append(gradients(module))
    assert torch.equal(*values)
    assert torch.equal(*found)


# The head


def test_the_head_at_trained_positions_alone_gives_the_same_as_everywhere():
    module, rows = network(), random_rows()
    assert head_is_plain(module)
    results = []
    for plain in (False, True):
        log_probs, entropy = log_probs_of(module, whole(rows), 0.7, plain_head=plain)
        module.zero_grad()
        log_probs.sum().backward()
        results.append((log_probs.detach(), entropy, gradients(module)))
    for everywhere, gathered in zip(*results, strict=True):
        torch.testing.assert_close(gathered, everywhere, atol=2e-6, rtol=1e-4)


def test_an_architecture_that_caps_its_logits_gets_all_of_them():
    torch.manual_seed(0)
    module = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            sliding_window=64,
            final_logit_softcapping=0.3,
        )
    ).eval()
    assert not head_is_plain(module)
    rows = own_log_probs(module, random_rows())
    one = updater(module, max_tokens_per_microbatch=30)
    one.accumulate(one.step_rows(rows))
    assert one.before_update()["engine_gap"] <= 1e-5


# Memory


class Memory:
    """Makes the CPU's allocator refuse, for real, where more than ``tokens`` go in together."""

    def __init__(self, module, tokens: int, *, backward: bool = False, from_part: int = 0) -> None:
        self.tokens, self.calls = tokens, 0
        self._from, self._backward = from_part, backward
        module.model.layers[1].register_forward_hook(self._look)

    def _look(self, layer, inputs, output):
        states = output[0] if isinstance(output, tuple) else output
        self.calls += 1
        if states.shape[0] * states.shape[1] > self.tokens and self.calls > self._from:
            if self._backward:
                states.register_hook(self._refuse)
            else:
                self._refuse(states)

    @staticmethod
    def _refuse(tensor) -> None:
        torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("backward", [False, True])
def test_out_of_memory_halves_the_micro_batches_and_changes_no_bit_of_the_result(backward):
    rows = random_rows(lengths=(10,) * 8)
    found = []
    for budget, limit in ((80, 25), (20, None)):
        module = network()
        if limit:
            # The second micro-batch is the one that fails: the first has left its gradients.
            Memory(module, limit, backward=backward)
        one = updater(module, max_tokens_per_microbatch=budget)
        value = one.accumulate(one.step_rows(rows))
        metrics = one.before_update()
        found.append((value, gradients(module), metrics["micro_batches"], metrics["loss"]))
        assert one.out_of_memory == (2 if limit else 0)
        assert one.budget == 20
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2:] == found[1][2:]


def test_gradients_of_micro_batches_before_the_one_that_failed_are_dropped():
    rows = random_rows(lengths=(10,) * 8)
    module, other = network(), network()
    Memory(module, 15, backward=True, from_part=2)
    one = updater(module, max_tokens_per_microbatch=20)
    one.accumulate(one.step_rows(rows))
    plain = updater(other, max_tokens_per_microbatch=10)
    plain.accumulate(plain.step_rows(rows))
    assert one.out_of_memory == 1
    assert torch.equal(gradients(module), gradients(other))


def test_memory_that_does_not_hold_one_row_ends_the_run_with_advice():
    module = network()
    Memory(module, 5)
    one = updater(module)
    with pytest.raises(ModelError, match=r"one row of 12 tokens; .* set: .*lora_rank=16"):
        one.accumulate(one.step_rows(random_rows()))


def test_another_error_of_the_network_is_not_taken_for_memory():
    module = network()
    one = updater(module)
    rows = random_rows()
    rows[0].ids[0] = 100_000
    with pytest.raises(IndexError):
        one.accumulate(one.step_rows(rows))


def test_a_resumed_learner_keeps_to_the_tokens_that_fitted():
    module = network()
    Memory(module, 25)
    one = updater(module)
    one.accumulate(one.step_rows(random_rows()))
    again = updater(network())
    again.load_state(one.state(), one.optimizer.state_dict())
    assert again.budget == one.budget < 8192
    assert again.state() == one.state()


# Samplers that are not the learner


def shifted(rows, by=0.5, seed=3) -> list[TrainRow]:
    rng = np.random.default_rng(seed)
    return [
        replace(
            row,
            log_probs=np.where(
                row.mask, row.log_probs + rng.normal(0, by, len(row.ids)), 0.0
            ).astype(np.float32),
        )
        for row in rows
    ]


@pytest.mark.parametrize("how", get_args(corrections.Correction)[1:])
def test_a_correction_weighs_each_token_and_takes_the_ratio_to_the_learners_own(how):
    module = network()
    own = own_log_probs(module, random_rows())
    rows = shifted(own)
    one = updater(module, correction=how, max_tokens_per_microbatch=30)
    value = one.accumulate(one.step_rows(rows))
    found, metrics = gradients(module), one.before_update()

    module.zero_grad()
    batch, learner = whole(rows), whole(own).log_probs
    now, _ = log_probs_of(module, batch, 1.0, plain_head=True)
    weights = corrections.rollout_weights(learner, batch.log_probs, batch.mask, how)
    per_token = clipped_policy_loss(
        ratio(now, learner, batch.mask), batch.advantages, batch.mask, 0.2, 0.2
    )
    expected = (per_token * weights)[batch.mask].sum() / batch.mask.sum()
    expected.backward()
    torch.testing.assert_close(value, expected.detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found, gradients(module), atol=1e-6, rtol=1e-4)
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["correction"] == pytest.approx(float(weights[batch.mask].mean()), abs=1e-5)


def test_how_far_the_sampler_was_is_measured_before_anything_is_cut():
    module = network()
    own = own_log_probs(module, random_rows())
    rows = shifted(own)
    one = updater(module, max_tokens_per_microbatch=30)
    one.accumulate(one.step_rows(rows))
    metrics = one.step_metrics([one.before_update()])
    batch, learner = whole(rows), whole(own).log_probs
    moved = (learner - batch.log_probs)[batch.mask]
    assert metrics["mismatch_max_ratio"] == pytest.approx(float(moved.abs().max().exp()), rel=1e-4)
    k3 = (moved.exp() - 1 - moved).mean()
    assert metrics["mismatch_kl"] == pytest.approx(float(k3), rel=1e-4)
    assert metrics["engine_gap"] == pytest.approx(float(moved.abs().max()), rel=1e-4)
    rho = moved.exp()
    share = float(rho.sum() ** 2 / (len(rho) * (rho**2).sum()))  # over all micro-batches
    assert metrics["effective_sample_size"] == pytest.approx(share, rel=1e-4)
    assert share < 0.99


def test_later_passes_are_compared_with_the_weights_of_the_first():
    module = network()
    rows = shifted(own_log_probs(module, random_rows()))
    one = updater(module, correction="token_truncate", iterations=2)
    step = one.step_rows(rows)
    ratios = []
    for _ in range(2):
        one.accumulate(step)
        ratios.append(one.before_update()["ratio"])
        one.optimizer.step()
        module.zero_grad()
    assert ratios[0] == pytest.approx(1.0, abs=1e-5)
    assert abs(ratios[1] - 1.0) > 1e-3


@needs_golden
def test_the_decoupled_objective_matches_the_golden_case(golden):
    inputs = golden["common_batch"]["inputs"]
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in inputs.items()}
    mask = tensors["mask"].bool()
    old, engine = tensors["logp_old"], tensors["logp_rollout"]
    cap = golden["decoupled_ppo"]["params"]["cap"]
    weights = corrections.rollout_weights(old, engine, mask, "token_truncate", high=cap)
    totals = Totals(float(mask.sum()), 3.0)
    advantages = tensors["adv_seq"][:, None] * weights
    found = loss_of()(Tokens(tensors["logp"], old, advantages, mask, totals)).value
    expected = golden["decoupled_ppo"]["expected_f64"]["token_mean"]
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_the_setting_allows_every_correction_and_only_where_it_has_a_meaning():
    allowed = get_args(get_type_hints(TrainSettings)["correction"])
    assert allowed == get_args(corrections.Correction)
    assert set(corrections.BOUNDS) == set(allowed)
    opmd = settings(algorithm="opmd", correction="token_mask", options={"form": "squared"})
    with pytest.raises(ConfigError, match="the form `squared` of opmd has none a token"):
        algorithm_options(opmd)


# KL in the reward


def test_kl_in_the_reward_takes_off_what_each_episode_moved_from_the_reference():
    module, reference = network(), network(1)
    rows = own_log_probs(module, random_rows())
    one = updater(module, reference=reference, kl_reward=0.25, max_tokens_per_microbatch=24)
    # The first four rows are one of an episode each, the last two are of the same.
    cut = (rows[:1], rows[1:2], rows[2:3], rows[3:5])
    episodes = [episode(part, reward) for part, reward in zip(cut, (1, 0, 0.5, 1), strict=True)]
    found = one.with_kl_in_rewards(episodes)
    there = own_log_probs(reference, [row for item in episodes for row in rows_of(item, 0.0)])
    here = [row for item in episodes for row in rows_of(item, 0.0)]
    moved = [float((a.log_probs - b.log_probs).sum()) for a, b in zip(here, there, strict=True)]
    expected = [moved[0], moved[1], moved[2], moved[3] + moved[4]]
    assert [item.reward for item in found] == pytest.approx(
        [item.reward - 0.25 * each for item, each in zip(episodes, expected, strict=True)],
        abs=1e-4,
    )
    tokens = sum(int(row.mask.sum()) for row in here)
    assert one.kl_figures == {"kl": pytest.approx(sum(moved) / tokens), "kl_weight": 0.25}
    assert one.step_rows(rows).reference is None


def test_a_group_whose_rewards_are_equal_does_not_seem_to_differ_by_its_kl():
    module, reference = network(), network(1)
    rows = own_log_probs(module, random_rows())
    one = updater(module, reference=reference, kl_reward=0.25)
    equal = [episode(rows[:1], 1.0, "all"), episode(rows[1:2], 1.0, "all")]
    mixed = [episode(rows[2:3], 1.0, "some"), episode(rows[3:5], 0.0, "some")]
    found = [item.reward for item in one.with_kl_in_rewards([*equal, *mixed])]
    assert found[:2] == [1.0, 1.0]
    assert found[2] != 1.0
    assert found[3] != 0.0


def episode(rows, reward=1.0, group="g") -> Trajectory:
    """An episode of one turn a row, none of which continues another."""
    steps = []
    for row in rows:
        start = row.prompt_length
        sample = Sample(row.ids[:start], row.ids[start:], row.log_probs[start:])
        steps.append(Step("seen", "said", 0.0, 0.0, True, False, sample))
    first = rows[0].trajectory_id
    ends = (reward, 0.0, 1.0, 0.0, False, True, "")
    return Trajectory(first, "env", 0, "task", group, 0, tuple(steps), "", *ends)


@pytest.mark.parametrize("algorithm", ["raft", "raft-pp", "opmd-reweight", "r3l"])
def test_kl_in_the_reward_is_refused_where_the_reward_itself_selects(algorithm):
    with pytest.raises(ConfigError, match=f"{algorithm} selects what it learns from"):
        algorithm_options(settings(kl_reward=0.1, algorithm=algorithm))


def test_rows_far_from_what_sampled_them_are_left_out_with_a_correction_too():
    module = network()
    rows = [
        replace(row, log_probs=row.log_probs + 4.0 * row.mask, advantages=-1.0 * row.mask)
        for row in own_log_probs(module, random_rows())
    ]
    for correction in ("none", "seq_truncate"):
        one = updater(module, loss=loss_of(off_policy_delta=0.05), correction=correction)
        one.accumulate(one.step_rows(rows))
        assert one.before_update()["off_policy"] == pytest.approx(1.0)


def test_kl_in_the_reward_and_in_the_loss_is_refused():
    both = settings(kl_reward=0.1, options={"beta": 0.04})
    with pytest.raises(ConfigError, match=r"`kl_reward` \(0\.1\) .* `beta` \(0\.04\) .* twice"):
        algorithm_options(both)
    for fine in ({"kl_reward": 0.1}, {"options": {"beta": 0.04}}):
        algorithm_options(settings(**fine))
