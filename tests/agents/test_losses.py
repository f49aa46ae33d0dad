from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pz_agents.algorithms.losses import (
    Tokens,
    Totals,
    aggregate,
    clipped_policy_loss,
    kl_estimate,
    predictions,
    ratio,
    ratio_stats,
    token_log_probs,
)

GOLDEN = Path(os.environ.get("PZ_DATA", "/nonexistent")).parent / "golden" / "trainer_losses.json"
needs_golden = pytest.mark.skipif(not GOLDEN.is_file(), reason="needs the golden cases by PZ_DATA")
pytestmark = pytest.mark.timeout(120)

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "const")


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Any]]:
    cases = json.loads(GOLDEN.read_text())["cases"]
    return {case["id"]: case for case in cases}


@pytest.fixture
def batch(golden: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    inputs = golden["common_batch"]["inputs"]
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in inputs.items()}
    tensors["mask"] = tensors["mask"].bool()
    tensors["adv"] = tensors["adv_seq"][:, None].expand_as(tensors["logp"])
    return tensors


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(
        torch.as_tensor(actual).detach().numpy(), np.asarray(expected), atol=1e-6, rtol=0
    )


def totals_of(mask: Tensor, length: float = 8.0) -> Totals:
    return Totals(float(mask.sum()), float(mask.any(-1).sum()), length)


def policy_loss(batch: dict[str, Tensor], logp: Tensor, high: float) -> Tensor:
    ratios = ratio(logp, batch["logp_old"], batch["mask"])
    return clipped_policy_loss(ratios, batch["adv"], batch["mask"], 0.2, high)


@needs_golden
def test_token_log_probs_and_entropy_match_the_golden_case(golden):
    case = golden["token_logprob_entropy"]
    chosen, entropy = token_log_probs(
        torch.tensor(case["inputs"]["logits"]),
        torch.tensor(case["inputs"]["ids"]),
        case["params"]["temperature"],
    )
    close(chosen, case["expected_f64"]["logp"])
    close(entropy, case["expected_f64"]["entropy"])


@needs_golden
def test_kl_estimators_match_the_golden_case(golden, batch):
    expected = golden["kl_estimators"]["expected_f64"]
    totals = totals_of(batch["mask"])
    logp = batch["logp"].requires_grad_()
    for kind in ("k1", "k2", "k3"):
        values = kl_estimate(logp, batch["logp_ref"], batch["mask"], kind)
        close(aggregate(values, batch["mask"], "token_mean", totals), expected[kind])
    values = kl_estimate(logp, batch["logp_ref"], batch["mask"], "k3")
    mean = aggregate(values, batch["mask"], "seq_mean_token_mean", totals)
    close(mean, expected["k3_seq_mean"])
    aggregate(values, batch["mask"], "token_mean", totals).backward()
    close(logp.grad, expected["grad_k3_wrt_logp_token_mean"])


@needs_golden
def test_symmetric_clip_and_all_aggregations_match_the_golden_case(golden, batch):
    expected = golden["ppo_clip_sym_aggregations"]["expected_f64"]
    mask, totals = batch["mask"], totals_of(batch["mask"])
    logp = batch["logp"].requires_grad_()
    ratios = ratio(logp, batch["logp_old"], mask)
    close(torch.where(mask, ratios, 0.0), expected["ratio"])
    per_token = policy_loss(batch, logp, 0.2)
    close(per_token, expected["per_token"])
    names = (*AGGREGATIONS[:3], "dr_grpo_const")
    for how, name in zip(AGGREGATIONS, names, strict=True):
        close(aggregate(per_token, mask, how, totals), expected[name])
    aggregate(per_token, mask, "token_mean", totals).backward()
    close(logp.grad, expected["grad_wrt_logp_token_mean"])
    tokens = Tokens(logp, batch["logp_old"], batch["adv"], mask, totals)
    stats = ratio_stats(tokens, ratios, 0.2, 0.2)
    close(stats["clip_low"], expected["clip_low_frac"])
    close(stats["clip_high"], expected["clip_high_frac"])
    close(stats["approx_kl"], expected["approx_kl_k1"])


@needs_golden
def test_asymmetric_clip_matches_the_golden_case(golden, batch):
    expected = golden["dapo_clip_higher"]["expected_f64"]
    logp = batch["logp"].requires_grad_()
    per_token = policy_loss(batch, logp, 0.28)
    close(per_token, expected["per_token"])
    loss = aggregate(per_token, batch["mask"], "token_mean", totals_of(batch["mask"]))
    close(loss, expected["token_mean"])
    loss.backward()
    close(logp.grad, expected["grad_wrt_logp_token_mean"])


@needs_golden
def test_micro_batch_shares_match_the_golden_case(golden, batch):
    expected = golden["microbatch_invariance"]["expected_f64"]
    per_token, mask = policy_loss(batch, batch["logp"], 0.28), batch["mask"]
    parts = [
        aggregate(per_token[rows], mask[rows], "token_mean", totals_of(mask))
        for rows in golden["microbatch_invariance"]["inputs"]["micro_batches"]
    ]
    close(torch.stack(parts), expected["parts"])
    close(sum(parts), expected["total"])
    assert abs(float(sum(parts)) - expected["wrong_mean_of_means"]) > 0.05


@needs_golden
def test_kl_in_the_loss_matches_the_golden_case(golden, batch):
    case = golden["grpo_full_kl_in_loss"]
    mask, totals = batch["mask"], totals_of(batch["mask"])
    kl = kl_estimate(batch["logp"], batch["logp_ref"], mask)
    policy = policy_loss(batch, batch["logp"], 0.2)
    per_token = policy + case["params"]["beta"] * kl
    for how in ("seq_mean_token_mean", "token_mean"):
        close(aggregate(per_token, mask, how, totals), case["expected_f64"][how])
    ratios = ratio(batch["logp"], batch["logp_old"], mask)
    corrected = policy + case["params"]["beta"] * kl * ratios
    close(
        aggregate(corrected, mask, "token_mean", totals),
        case["expected_f64"]["token_mean_bias_corrected_kl"],
    )


@needs_golden
def test_negative_log_likelihood_over_accepted_rows_matches_the_golden_case(golden, batch):
    case = golden["raft"]["expected_f64"]
    mask = batch["mask"] & torch.tensor(case["accepted"]).bool()[:, None]
    for how in ("token_mean", "seq_mean_token_mean"):
        close(aggregate(-batch["logp"], mask, how, totals_of(mask)), case[how])


@needs_golden
def test_gradient_clipping_is_torchs_and_matches_the_golden_case(golden):
    case = golden["max_grad_norm"]
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    weight.grad = torch.tensor(case["inputs"]["grad"], dtype=torch.float64)
    norm = torch.nn.utils.clip_grad_norm_([weight], case["params"]["max_grad_norm"])
    close(norm, case["expected_f64"]["norm"])
    close(weight.grad, case["expected_f64"]["clipped"])


@needs_golden
def test_two_updates_end_to_end_match_the_golden_case(golden):
    case = golden["e2e_bigram_two_epochs"]
    params, inputs, expected = case["params"], case["inputs"], case["expected_f64"]
    weights = torch.tensor(inputs["W"], dtype=torch.float64, requires_grad=True)
    ids = torch.tensor(inputs["tokens"])
    mask = torch.tensor(inputs["target_mask"]).bool()
    advantages = torch.tensor(inputs["adv"], dtype=torch.float64)[:, None].expand(mask.shape)
    optimizer = torch.optim.AdamW(
        [weights],
        lr=params["lr"],
        weight_decay=params["weight_decay"],
        betas=tuple(params["betas"]),
        eps=params["eps"],
    )

    def forward() -> Tensor:
        log_softmax = torch.log_softmax(predictions(weights[ids], 3), -1)
        return log_softmax.gather(-1, ids[:, 1:, None]).squeeze(-1)

    old = forward().detach()
    close(old, expected["logp_old"])
    for update in ("1", "2"):
        ratios = ratio(forward(), old, mask)
        per_token = clipped_policy_loss(ratios, advantages, mask, 0.2, 0.28)
        loss = aggregate(per_token, mask, "token_mean", totals_of(mask))
        close(loss, expected[f"loss_step{update}"])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([weights], params["max_grad_norm"])
        close(norm, expected[f"grad_norm_step{update}"])
        optimizer.step()
        close(weights, expected[f"W_after_step{update}"])


def random_tokens(seed: int, rows: int = 6, length: int = 7) -> Tokens:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return -torch.rand(rows, length, generator=generator)

    mask = torch.rand(rows, length, generator=generator) < 0.6
    mask[0] = False
    return Tokens(
        log_probs=draw().requires_grad_(),
        old_log_probs=draw(),
        advantages=torch.randn(rows, length, generator=generator),
        mask=mask,
        totals=totals_of(mask),
        reference_log_probs=draw(),
    )


def grpo_value(tokens: Tokens, rows: slice, how: str) -> Tensor:
    mask = tokens.mask[rows]
    logp = tokens.log_probs[rows]
    ratios = ratio(logp, tokens.old_log_probs[rows], mask)
    per_token = clipped_policy_loss(ratios, tokens.advantages[rows], mask, 0.2, 0.2)
    kl = kl_estimate(logp, tokens.reference_log_probs[rows], mask)
    return aggregate(per_token + 0.1 * kl, mask, how, tokens.totals)


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("cuts", [[0, 6], [0, 1, 6], [0, 2, 3, 5, 6], list(range(7))])
def test_any_split_into_micro_batches_gives_the_same_loss_and_gradient(how, cuts):
    whole, split = random_tokens(1), random_tokens(1)
    value = grpo_value(whole, slice(None), how)
    value.backward()
    parts = sum(grpo_value(split, slice(a, b), how) for a, b in itertools.pairwise(cuts))
    parts.backward()
    torch.testing.assert_close(parts, value, atol=1e-6, rtol=0)
    torch.testing.assert_close(split.log_probs.grad, whole.log_probs.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("junk", [0.0, -9.0, 1e30, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("how", AGGREGATIONS)
def test_junk_at_masked_positions_changes_no_bit(junk, how):
    clean, dirty = random_tokens(2), random_tokens(2)
    value = grpo_value(clean, slice(None), how)
    value.backward()
    hole = ~dirty.mask
    for tensor in (dirty.old_log_probs, dirty.advantages, dirty.reference_log_probs):
        tensor[hole] = junk
    with torch.no_grad():
        dirty.log_probs[hole] = junk
    other = grpo_value(dirty, slice(None), how)
    other.backward()
    assert torch.equal(other, value)
    assert torch.equal(dirty.log_probs.grad, clean.log_probs.grad)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_an_empty_mask_gives_zero_with_a_graph_and_zero_gradient(how):
    tokens = random_tokens(3)
    tokens.mask[:] = False
    empty = Tokens(
        tokens.log_probs,
        tokens.old_log_probs,
        tokens.advantages,
        tokens.mask,
        Totals(0.0, 0.0),
        tokens.reference_log_probs,
    )
    value = grpo_value(empty, slice(None), how)
    value.backward()
    assert value.item() == 0.0
    assert torch.count_nonzero(tokens.log_probs.grad) == 0


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_gradients_agree_with_finite_differences(how):
    tokens = random_tokens(4)
    log_probs = tokens.log_probs.detach().double().requires_grad_()

    def value(logp: Tensor) -> Tensor:
        moved = Tokens(
            logp,
            tokens.old_log_probs.double(),
            tokens.advantages.double(),
            tokens.mask,
            tokens.totals,
            tokens.reference_log_probs.double(),
        )
        return grpo_value(moved, slice(None), how)

    assert torch.autograd.gradcheck(value, (log_probs,), eps=1e-6, atol=1e-6)


def test_extreme_ratios_stay_finite():
    mask = torch.ones(1, 2, dtype=torch.bool)
    ratios = ratio(torch.tensor([[0.0, -500.0]]), torch.tensor([[-500.0, 0.0]]), mask)
    assert torch.isfinite(ratios).all()
    close(ratios.log(), [[20.0, -20.0]])


def test_the_shift_pairs_each_token_with_the_logits_before_it():
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    logits = torch.full((1, 5, 6), -50.0)
    for position in range(4):
        logits[0, position, ids[0, position + 1]] = 50.0
    chosen, entropy = token_log_probs(predictions(logits, 4), ids[:, 1:], 1.0)
    close(chosen, torch.zeros(1, 4))
    close(entropy, torch.zeros(1, 4))


def test_log_probs_are_float32_even_of_bfloat16_logits():
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0)).bfloat16()
    chosen, _ = token_log_probs(logits, torch.tensor([1, 2, 3]), 1.0)
    assert chosen.dtype == torch.float32
