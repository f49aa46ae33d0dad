"""The losses of DAPO, OPMD, RAFT and GRPO's relatives: golden cases, anchors, invariances."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pz_agents.algorithms import corrections, grpo, load_algorithm, opmd, raft
from pz_agents.algorithms.credit import (
    baseline_advantages,
    group_advantages,
    overlong_penalty,
    reweighted,
    varied,
)
from pz_agents.algorithms.losses import (
    Tokens,
    Totals,
    aggregate,
    clipped_policy_loss,
    kl_estimate,
    policy_gradient_loss,
    ratio,
    sequence_ratio,
)
from pz_envs.errors import ConfigError

GOLDEN = Path(os.environ.get("PZ_DATA", "/nonexistent")).parent / "golden" / "trainer_losses.json"
needs_golden = pytest.mark.skipif(not GOLDEN.is_file(), reason="needs the golden cases by PZ_DATA")
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Any]]:
    return {case["id"]: case for case in json.loads(GOLDEN.read_text())["cases"]}


@pytest.fixture
def batch(golden) -> dict[str, Tensor]:
    inputs = golden["common_batch"]["inputs"]
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in inputs.items()}
    tensors["mask"] = tensors["mask"].bool()
    tensors["logp"].requires_grad_()
    return tensors


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(
        torch.as_tensor(actual).detach().numpy(), np.asarray(expected), atol=1e-6, rtol=0
    )


def totals_of(mask: Tensor) -> Totals:
    return Totals(float(mask.sum()), float(mask.any(-1).sum()), 8.0)


def tokens_of(batch, advantages=None, **changes) -> Tokens:
    """Return the common batch as a loss sees it, each row with its advantage."""
    rows = batch["adv_seq"] if advantages is None else torch.as_tensor(advantages)
    given = {
        "log_probs": batch["logp"],
        "old_log_probs": batch["logp_old"],
        "advantages": rows[:, None].expand_as(batch["logp"]),
        "mask": batch["mask"],
        "totals": totals_of(batch["mask"]),
        **changes,
    }
    return Tokens(**given)


def loss_of(name: str, tokens: Tokens, **options: Any) -> Tensor:
    algorithm = load_algorithm(name)
    values = {**algorithm.defaults.model_dump(), **options}
    return algorithm.loss(tokens, type(algorithm.defaults)(**values)).value


# Golden cases.


@needs_golden
def test_dapo_matches_the_golden_case(golden, batch):
    expected = golden["dapo_clip_higher"]["expected_f64"]
    value = loss_of("dapo", tokens_of(batch))
    close(value, expected["token_mean"])
    value.backward()
    close(batch["logp"].grad, expected["grad_wrt_logp_token_mean"])


@needs_golden
def test_dual_clip_matches_the_golden_case(golden, batch):
    expected = golden["dual_clip"]["expected_f64"]
    batch["logp_old"][1, 1] = -4.0
    tokens = tokens_of(batch)
    close(loss_of("grpo", tokens, clip_high=0.28), expected["token_mean_no_dual"])
    close(loss_of("grpo", tokens, clip_high=0.28, dual_clip=3.0), expected["token_mean_dual_c3"])


@needs_golden
def test_gspo_matches_the_golden_case(golden, batch):
    expected = golden["gspo"]["expected_f64"]
    ratios = sequence_ratio(batch["logp"], batch["logp_old"], batch["mask"])
    close(ratios[:, 0], expected["seq_ratio"])
    close(loss_of("gspo", tokens_of(batch)), expected["loss"])


@pytest.mark.parametrize(("surrogate", "stopped"), [("clip", 1.0), ("cispo", 0.0)])
def test_only_a_clip_that_stops_a_gradient_is_reported(surrogate, stopped):
    now = torch.full((1, 2), -2.0, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    tokens = Tokens(now, torch.full((1, 2), -1.0), -torch.ones(1, 2), mask, totals_of(mask))
    found = grpo.loss(tokens, grpo.Options.model_validate({"surrogate": surrogate}))
    found.value.backward()
    assert bool((now.grad == 0).all()) is bool(stopped)
    assert float(found.stats["clip_low"]) == stopped


@needs_golden
def test_cispo_matches_the_golden_case(golden, batch):
    close(loss_of("cispo", tokens_of(batch)), golden["cispo"]["expected_f64"]["token_mean"])


@needs_golden
@pytest.mark.parametrize(
    ("scale", "epsilon", "name"),
    [("leave_one_out", 1e-4, "rloo"), ("group", 1e-6, "grpo_verl_ddof1_eps1e6")],
)
def test_other_group_advantages_match_the_golden_case(golden, scale, epsilon, name):
    case = golden["group_advantage"]
    rewards = np.ravel(case["inputs"]["rewards"])
    result = group_advantages(
        rewards, list(np.repeat(["a", "b", "c"], 4)), scale=scale, epsilon=epsilon
    )
    close(result.values, np.ravel(case["expected_f64"][name]))


@needs_golden
def test_the_overlong_punishment_matches_the_golden_case(golden):
    case = golden["dapo_overlong"]
    params = case["params"]
    close(
        overlong_penalty(case["inputs"]["lengths"], params["L_max"], params["L_cache"]),
        case["expected_f64"]["penalty"],
    )


@needs_golden
def test_groups_kept_by_dynamic_sampling_match_the_golden_case(golden):
    case = golden["dapo_dynamic_sampling"]
    accuracy = np.array(case["inputs"]["acc"])
    names = [f"g{row}" for row, _ in np.ndindex(*accuracy.shape)]
    keep = varied(accuracy.ravel(), names).reshape(accuracy.shape)
    assert keep.all(1).tolist() == keep.any(1).tolist() == case["expected_f64"]["keep"]


@needs_golden
def test_reinforce_with_a_mean_baseline_matches_the_golden_case(golden, batch):
    case = golden["reinforce_mean_baseline"]
    values = group_advantages(case["inputs"]["rewards"], ["g"] * 3, scale="none").values
    tokens = tokens_of(batch, values)
    per_token = policy_gradient_loss(tokens.log_probs, tokens.advantages, tokens.mask)
    for how in ("token_mean", "seq_mean_token_sum", "seq_mean_token_mean"):
        close(aggregate(per_token, tokens.mask, how, tokens.totals), case["expected_f64"][how])
    aggregate(per_token, tokens.mask, "token_mean", tokens.totals).backward()
    close(batch["logp"].grad, case["expected_f64"]["grad_token_mean"])


@needs_golden
@pytest.mark.parametrize(("name", "id"), [("raft", "raft"), ("raft-pp", "raft_pp")])
def test_raft_matches_the_golden_cases(golden, batch, name, id):
    case = golden[id]
    rewards, expected = case["inputs"]["rewards"], case["expected_f64"]
    chosen = raft.accepted(rewards, ["g"] * 3, raft.Options())
    assert chosen.tolist() == golden["raft"]["expected_f64"]["accepted"]
    mask = batch["mask"] & torch.tensor(chosen)[:, None]
    tokens = tokens_of(batch, np.ones(3), mask=mask, totals=totals_of(mask))
    for how in ("token_mean", "seq_mean_token_mean"):
        close(loss_of(name, tokens, aggregation=how), expected[how])
    loss_of(name, tokens).backward()
    if "grad_token_mean" in expected:
        close(batch["logp"].grad, expected["grad_token_mean"])
    best = raft.accepted(rewards, ["g"] * 3, raft.Options(rule="best_of_group"))
    assert best.nonzero()[0].tolist() == [golden["raft"]["expected_f64"]["best_of_group_index"]]


@needs_golden
def test_raft_that_accepts_nothing_matches_the_golden_case(golden, batch):
    case = golden["raft_empty"]
    assert not raft.accepted(case["inputs"]["rewards"], ["g"] * 3, raft.Options()).any()
    mask = torch.zeros_like(batch["mask"])
    value = loss_of("raft", tokens_of(batch, np.ones(3), mask=mask, totals=Totals(0.0, 0.0)))
    value.backward()
    close(value, case["expected_f64"]["loss"])
    assert torch.count_nonzero(batch["logp"].grad) == 0


@needs_golden
def test_simple_opmd_matches_the_golden_case(golden, batch):
    case = golden["opmd_simple"]
    rewards, tau = case["inputs"]["group_rewards"], case["params"]["tau"]
    expected = case["expected_f64"]
    for baseline, name in (("mean", "mean"), ("log_mean_exp", "logavgexp")):
        result = baseline_advantages(rewards, ["g"] * 3, baseline=baseline, tau=tau)
        close(np.array(rewards) - result.values, [expected[f"baseline_{name}"]] * 3)
        close(loss_of("opmd", tokens_of(batch, result.values), tau=tau), expected[f"loss_{name}"])
    values = baseline_advantages(rewards, ["g"] * 3).values
    close(loss_of("opmd", tokens_of(batch, values)), expected["loss_mean_tau1"])
    alone = baseline_advantages([0.7], ["g"], singletons=True)
    close(0.7 - alone.values, [expected["single_rollout_baseline"]])


@needs_golden
def test_squared_opmd_matches_the_golden_case(golden, batch):
    case = golden["opmd_squared"]
    rewards, tau = case["inputs"]["group_rewards"], case["params"]["tau"]
    values = baseline_advantages(rewards, ["g"] * 3, baseline="log_mean_exp", tau=tau).values
    tokens = tokens_of(batch, values, reference_log_probs=batch["logp_ref"])
    rest = opmd.residuals(tokens.log_probs, batch["logp_ref"], tokens.advantages, tokens.mask, tau)
    close(rest, case["expected_f64"]["residual"])
    value = loss_of("opmd", tokens, form="squared", tau=tau, beta=0.0)
    close(value, case["expected_f64"]["loss"])


@needs_golden
def test_pairwise_opmd_matches_the_golden_case(golden, batch):
    case = golden["opmd_pairwise"]
    tau = case["params"]["tau"]
    values = baseline_advantages(case["inputs"]["group_rewards"], ["g"] * 3).values
    tokens = tokens_of(batch, values, reference_log_probs=batch["logp_ref"], groups=torch.zeros(3))
    value = loss_of("opmd", tokens, form="pairwise", tau=tau, beta=0.0)
    close(value, case["expected_f64"]["loss"])


@needs_golden
def test_opmd_with_k2_matches_the_golden_case(golden, batch):
    case = golden["opmd_k2_reg"]
    values = baseline_advantages(case["inputs"]["group_rewards"], ["g"] * 3).values
    tokens = tokens_of(batch, values, reference_log_probs=batch["logp_ref"])
    close(loss_of("opmd", tokens, **case["params"]), case["expected_f64"]["total"])


@needs_golden
def test_reweighted_advantages_match_the_golden_case(golden):
    case = golden["r3l_advantage"]
    rewards = case["inputs"]["base"] + case["inputs"]["retry"]
    alpha = case["params"]["alpha"]
    names = ["g"] * len(rewards)
    options = {"success_advantage": alpha, "alpha": alpha}
    result = reweighted(baseline_advantages(rewards, names), rewards, names, **options)
    expected = case["expected_f64"]
    close(result.values, expected["adv_base"] + expected["adv_retry"])
    alone = baseline_advantages([1.0], ["m"], singletons=True)
    meta = reweighted(alone, [1.0], ["m"], **options)
    close(meta.values, [expected["meta_adv"]])


@needs_golden
def test_r3ls_loss_on_attempts_is_opmds_without_tau_as_in_the_golden_case(golden, batch):
    inputs = golden["r3l_loss"]["inputs"]
    mask = torch.tensor(inputs["pivot_mask"]).bool()
    tokens = tokens_of(batch, inputs["adv"], mask=mask, totals=totals_of(mask))
    close(loss_of("opmd", tokens, tau=0.0), golden["r3l_loss"]["expected_f64"]["explore"])


@needs_golden
def test_rollout_corrections_match_the_golden_case(golden, batch):
    case = golden["rollout_correction"]
    params, expected = case["params"], case["expected_f64"]
    mask, totals = batch["mask"], totals_of(batch["mask"])
    learner, engine = batch["logp_old"], batch["logp_rollout"]
    advantages = batch["adv_seq"][:, None].expand_as(engine)
    ratios = ratio(batch["logp"], learner, mask)
    per_token = clipped_policy_loss(ratios, advantages, mask, 0.2, 0.2)

    def bounds(name):
        return {"low": params[name][0], "high": params[name][1]}

    rules = [
        ("none", {}, "none"),
        ("token_truncate", {"high": params["token_trunc"]}, "token_truncate"),
        ("token_mask", bounds("token_mask"), "token_mask_icepop"),
        ("seq_truncate", {"high": params["seq_cap"]}, "sequence_truncate"),
        ("seq_mask", {"high": params["seq_cap"]}, "sequence_mask"),
        ("geo", bounds("geo"), "geo_filter_x_token_tis"),
    ]
    for how, limits, name in rules:
        weights = corrections.rollout_weights(learner, engine, mask, how, **limits)
        close(aggregate(per_token * weights, mask, "token_mean", totals), expected[name])
        assert (weights[~mask] == 1).all()
    measured = corrections.mismatch(learner, engine, mask, totals)
    close(measured.kl, expected["mismatch_kl_k3"])
    effective = corrections.effective_share(float(measured.ratio), float(measured.square))
    close(torch.tensor(effective), expected["ess_token"])


@needs_golden
def test_rows_left_out_for_being_off_policy_match_the_golden_case(golden, batch):
    case = golden["offpolicy_seq_mask"]
    advantages = torch.tensor(case["inputs"]["adv_seq_override"])[:, None].expand(3, 6)
    kept = corrections.keeps_row(
        batch["logp"], batch["logp_rollout"], advantages, batch["mask"], case["params"]["delta"]
    )
    close(kept.double(), case["expected_f64"]["keep"])


@needs_golden
def test_truncated_sampling_biases_every_ratio_as_in_the_golden_case(golden):
    case = golden["truncated_sampling_bias"]
    kept = case["inputs"]["kept"]
    learner = torch.tensor(case["inputs"]["p"], dtype=torch.float64).log()
    engine = torch.log_softmax(learner[kept], -1)
    everywhere = torch.ones(len(kept), dtype=torch.bool)
    close(ratio(learner[kept], engine, everywhere), case["expected_f64"]["naive_ratio"])
    same_support = torch.log_softmax(learner[kept], -1)
    close(ratio(same_support, engine, everywhere), case["expected_f64"]["correct_ratio"])


# Numbers on which four public code bases agree.

ANCHOR = {
    "logp": [[-0.5, -1, -2, -0.1], [-0.3, -0.7, -1.5, -3]],
    "logp_old": [[-0.6, -0.9, -1.5, -0.4], [-0.3, -1.2, -1.4, -2]],
    "mask": [[1, 1, 0, 1], [1, 1, 0, 0]],
    "adv_seq": [1.5, -0.5],
}
GRAD_CLIP = [[-0.33155128, -0.27145123, 0, 0], [0.1, 0.16487213, 0, 0]]


@pytest.mark.parametrize(
    ("name", "options", "expected", "gradient"),
    [
        ("grpo", {}, -0.6981303738, GRAD_CLIP),
        ("grpo", {"aggregation": "seq_mean_token_mean"}, -0.4714119252, None),
        ("grpo", {"aggregation": "seq_mean_token_sum"}, -1.7453259344, None),
        ("dapo", {}, -0.7221303738, GRAD_CLIP),
        ("opmd", {}, 0.19, [[-0.15, -0.15, 0, -0.15], [0.05, 0.05, 0, 0]]),
        ("opmd", {"tau": 0.0}, 0.38, None),
        ("opmd", {"aggregation": "seq_mean_token_mean"}, 0.1375, None),
        ("gspo", {}, -0.4292936458, [[0, 0, 0, 0], [0.16050318, 0.16050318, 0, 0]]),
        ("cispo", {"clip_high": 0.28}, 0.3560268631, None),
        ("raft", {}, 0.52, [[-0.2, -0.2, 0, -0.2], [-0.2, -0.2, 0, 0]]),
    ],
)
def test_losses_match_the_public_code_bases(name, options, expected, gradient):
    batch = {key: torch.tensor(value, dtype=torch.float64) for key, value in ANCHOR.items()}
    batch["mask"] = batch["mask"].bool()
    batch["logp"].requires_grad_()
    value = loss_of(name, tokens_of(batch, np.ones(2) if name == "raft" else None), **options)
    np.testing.assert_allclose(value.detach(), expected, atol=1e-9)
    if gradient is not None:
        value.backward()
        np.testing.assert_allclose(batch["logp"].grad, gradient, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "expected"), [("k1", 0.0016), ("k2", 0.00036), ("k3", 0.000314714433)]
)
def test_kl_estimates_match_the_public_code_bases(kind, expected):
    batch = {key: torch.tensor(value, dtype=torch.float64) for key, value in ANCHOR.items()}
    mask = batch["mask"].bool()
    values = kl_estimate(batch["logp"], batch["logp_old"], mask, kind)
    mean = aggregate(values, mask, "token_mean", totals_of(mask))
    np.testing.assert_allclose(0.01 * mean, expected, atol=1e-12)


W = [1, 0.6, -0.1, 0.2, 0, 0.6, -0.1, 0.3]
ALL_BUT_FIRST = [0.8625, -0.4125, -0.1125, -0.3125, 0.8625, -0.4125, -0.0125]


@pytest.mark.parametrize(
    ("rewards", "values", "expected"),
    [
        ([1, 0, 0, 0.5], "grpo", [1.3055797, -0.7833478, -0.7833478, 0.2611159]),
        ([1, 0, 0, 0.5], "mean", [0.625, -0.375, -0.375, 0.125]),
        ([1, 0, 0, 0.5], "lae", [0.5351655, -0.4648345, -0.4648345, 0.0351655]),
        (W, "mean", [0.6875, 0.2875, -0.4125, -0.1125, -0.3125, 0.2875, -0.4125, -0.0125]),
        (W, 1.0, [1.0, *ALL_BUT_FIRST]),
        (W, 3.0, [3.0, *ALL_BUT_FIRST]),
        ([1] * 4, 1.0, [1.0] * 4),
        ([1] * 4, 3.0, [3.0] * 4),
        ([1] * 4, "mean", [0.0] * 4),
        ([0] * 4, 3.0, [0.0] * 4),
        ([0.5], 1.0, [1.5]),
        ([1], 1.0, [1.0]),
        ([1], 3.0, [3.0]),
    ],
)
def test_advantages_match_the_public_code_bases(rewards, values, expected):
    names = ["g"] * len(rewards)
    if values == "grpo":
        result = group_advantages(rewards, names, epsilon=1e-6)
    else:
        baseline = "log_mean_exp" if values == "lae" else "mean"
        result = baseline_advantages(rewards, names, baseline=baseline, singletons=True)
    if isinstance(values, float):
        result = reweighted(result, rewards, names, success_advantage=values, alpha=3.0)
    np.testing.assert_allclose(result.values, expected, atol=1e-7)
    assert result.used.any() == any(expected)


# What holds of every loss.

EVERY_LOSS = [
    ("grpo", {"dual_clip": 3.0, "off_policy_delta": 0.05}),
    ("dapo", {}),
    ("opmd", {"beta": 0.1}),
    ("opmd", {"form": "squared", "beta": 0.1}),
    ("opmd", {"form": "pairwise", "beta": 0.1}),
    ("raft", {}),
    ("raft-pp", {}),
    ("dr-grpo", {}),
    ("rloo", {}),
    ("gspo", {}),
    ("cispo", {}),
]


def random_tokens(seed: int, rows: slice = slice(None)) -> Tokens:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return -torch.rand(6, 7, generator=generator, dtype=torch.float64)

    log_probs, old, reference = draw(), draw(), draw()
    mask = torch.rand(6, 7, generator=generator) < 0.6
    mask[0] = False
    advantages = torch.randn(6, 1, generator=generator, dtype=torch.float64).expand(6, 7)
    return Tokens(
        log_probs[rows].requires_grad_(),
        old[rows],
        advantages[rows].clone(),
        mask[rows],
        totals_of(mask),
        reference[rows],
        torch.tensor([0, 0, 0, 1, 1, 1])[rows],
    )


@pytest.mark.parametrize(("name", "options"), EVERY_LOSS)
@pytest.mark.parametrize("junk", [-9.0, 1e30, float("inf"), float("nan")])
def test_junk_at_masked_positions_changes_no_bit_of_any_loss(name, options, junk):
    clean, dirty = random_tokens(2), random_tokens(2)
    with torch.no_grad():
        for tensor in (
            dirty.log_probs,
            dirty.old_log_probs,
            dirty.advantages,
            dirty.reference_log_probs,
        ):
            tensor[~dirty.mask] = junk
    values = [loss_of(name, tokens, **options) for tokens in (clean, dirty)]
    for value in values:
        value.backward()
    assert values[0] != 0
    assert torch.equal(values[0], values[1])
    assert torch.equal(clean.log_probs.grad, dirty.log_probs.grad)


@pytest.mark.parametrize(
    # Cispo's weight is a ratio that gets no gradient, so that its loss is no integral of it.
    ("name", "options"),
    [row for row in EVERY_LOSS if row[0] != "cispo"],
)
def test_gradients_of_every_loss_agree_with_finite_differences(name, options):
    tokens = random_tokens(5)

    def value(log_probs: Tensor) -> Tensor:
        return loss_of(name, replace(tokens, log_probs=log_probs), **options)

    assert torch.autograd.gradcheck(value, (tokens.log_probs,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"), [row for row in EVERY_LOSS if row[1].get("form") != "pairwise"]
)
@pytest.mark.parametrize("cuts", [[0, 1, 6], [0, 2, 3, 5, 6]])
def test_any_split_into_micro_batches_gives_the_same_loss(name, options, cuts):
    whole = loss_of(name, random_tokens(1), **options)
    parts = [
        loss_of(name, random_tokens(1, slice(a, b)), **options) for a, b in itertools.pairwise(cuts)
    ]
    torch.testing.assert_close(sum(parts), whole, atol=1e-12, rtol=0)


def test_pairwise_opmd_refuses_a_batch_that_was_split():
    with pytest.raises(ConfigError, match="set `max_tokens_per_microbatch` to 0"):
        loss_of("opmd", random_tokens(1, slice(0, 3)), form="pairwise")


def test_pairwise_opmd_compares_only_rollouts_of_one_group():
    tokens = random_tokens(1)
    rest = opmd.residuals(
        tokens.log_probs, tokens.reference_log_probs, tokens.advantages, tokens.mask, 1.0
    )
    pairs = [(1, 2), (3, 4), (3, 5), (4, 5)]
    expected = sum((rest[i] - rest[j]) ** 2 for i, j in pairs) / len(pairs)
    torch.testing.assert_close(
        loss_of("opmd", tokens, form="pairwise", beta=0.0), expected, atol=1e-12, rtol=0
    )


def test_a_row_that_is_off_policy_is_left_out_without_raising_the_rest():
    tokens = random_tokens(3)
    kept = corrections.keeps_row(
        tokens.log_probs, tokens.old_log_probs, tokens.advantages, tokens.mask, 0.05
    )
    assert 0 < kept.sum() < 6
    without = replace(tokens, mask=tokens.mask & kept[:, None])
    torch.testing.assert_close(
        loss_of("grpo", tokens, off_policy_delta=0.05), loss_of("grpo", without)
    )
