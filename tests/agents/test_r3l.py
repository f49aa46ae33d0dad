"""R3L's credit, loss, figures and presets: golden cases and hand-computed ones."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pz_agents.algorithms import load_algorithm, r3l
from pz_agents.algorithms.credit import separate_means
from pz_agents.algorithms.losses import Tokens, Totals
from pz_agents.algorithms.rows import TrainRow
from pz_agents.sdk.types import Sample, Step, Trajectory
from pz_agents.training.settings import TrainSettings, algorithm_options

GOLDEN = Path(os.environ.get("PZ_DATA", "/nonexistent")).parent / "golden" / "trainer_losses.json"
needs_golden = pytest.mark.skipif(not GOLDEN.is_file(), reason="needs the golden cases by PZ_DATA")
pytestmark = pytest.mark.timeout(120)

TOKEN_MEAN = r3l.Options(aggregation="token_mean")


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Any]]:
    return {case["id"]: case for case in json.loads(GOLDEN.read_text())["cases"]}


def episode(
    key: str,
    reward: float,
    *,
    kind: str = "base",
    turns: int = 1,
    pivot: int | None = None,
    of: str = "",
    planned: int | None = None,
    copied: Trajectory | None = None,
    **changes: Any,
) -> Trajectory:
    """Return an episode of one growing conversation; with ``copied``, it begins like that one."""
    history = np.array([1], np.int32)
    steps: list[Step] = []
    for turn in range(turns):
        if copied is not None and turn < (pivot or 0):
            step = copied.steps[turn]
        else:
            tokens = np.array([10 + turn, 20, 30 + len(key)], np.int32)
            sample = Sample(history, tokens, np.full(3, -1.0, np.float32))
            notes = {}
            if of and turn == (pivot or 0):
                notes = {"retry_of": of, "planned": pivot if planned is None else planned}
            step = Step("", "a", 0.0, 0.0, True, False, sample, notes)
        steps.append(step)
        assert step.sample is not None
        history = np.concatenate([step.sample.prompt_ids, step.sample.token_ids, [7]])
        history = history.astype(np.int32)
    given = {
        "key": key,
        "env_id": "toy",
        "env_seed": 0,
        "task_id": "t",
        "group_id": key.split("/")[0],
        "attempt": 0,
        "steps": tuple(steps),
        "final_observation": "",
        "reward": reward,
        "score": reward,
        "max_score": 1.0,
        "score_norm": max(reward, 0.0),
        "success": reward >= 1,
        "terminated": True,
        "truncated": "",
        "kind": kind,
        **changes,
    }
    return Trajectory(**given)


def retry_of(base: Trajectory, reward: float, pivot: int = 0, **changes: Any) -> Trajectory:
    given = {"kind": "retry", "turns": len(base.steps), "pivot": pivot, **changes}
    return episode(f"{base.key}-again", reward, of=base.key, copied=base, **given)


def meta_of(base: Trajectory, kind: str, **changes: Any) -> Trajectory:
    given = {"outcome": "failure", "problem": ""}
    found = episode(f"{base.key}-{kind}", 1.0, kind=kind, of=base.key, **changes)
    notes = {**found.steps[0].notes, **given}
    return replace(found, steps=(replace(found.steps[0], notes=notes), *found.steps[1:]))


def advantages_of(rows) -> dict[str, float]:
    return {row.trajectory_id: round(float(row.advantages[row.mask][0]), 6) for row in rows}


def loss_of(rows: list[TrainRow], options: r3l.Options, log_prob=-1.0) -> float:
    """Return the loss of ``rows`` if every token has the given log-prob."""
    width = max(len(row.ids) for row in rows)

    def padded(name: str, fill: float) -> torch.Tensor:
        values = [np.pad(getattr(row, name), (0, width - len(row.ids))) for row in rows]
        return torch.tensor(np.array(values)) + fill

    mask = padded("mask", 0).bool()
    tokens = Tokens(
        log_probs=torch.full(mask.shape, log_prob, dtype=torch.float64),
        old_log_probs=padded("log_probs", 0.0).double(),
        advantages=padded("advantages", 0.0).double(),
        mask=mask,
        totals=Totals(float(mask.sum()), float(mask.any(-1).sum()), float(width)),
    )
    return float(r3l.loss(tokens, options).value)


# Golden cases.


@needs_golden
def test_advantages_match_the_golden_case(golden):
    case = golden["r3l_advantage"]
    bases = [episode(f"g/{n}", value) for n, value in enumerate(case["inputs"]["base"])]
    retries = [
        retry_of(base, value) for base, value in zip(bases, case["inputs"]["retry"], strict=True)
    ]
    expected = case["expected_f64"]
    found = r3l.attempt_advantages([*bases, *retries], r3l.Options())
    np.testing.assert_allclose(found.values, [*expected["adv_base"], *expected["adv_retry"]])
    assert (found.groups, found.usable) == (1, 1)
    meta = [meta_of(bases[0], kind) for kind in r3l.META]
    options = r3l.Options(meta="advantage")
    rows = r3l.credit([*bases, *retries, *meta], options).rows
    assert [advantages_of(rows)[item.key] for item in meta] == [expected["meta_adv"]] * 2
    positive = found.values[found.values > 0].sum()
    assert positive / -found.values[found.values < 0].sum() == pytest.approx(
        expected["pos_over_neg_mass"]
    )


@needs_golden
def test_the_loss_matches_the_golden_case(golden):
    case, batch = golden["r3l_loss"], golden["common_batch"]["inputs"]
    inputs, expected = case["inputs"], case["expected_f64"]
    options = r3l.Options(aggregation="token_mean", meta_weight=case["params"]["w_meta"])
    meta = inputs["meta_logp"] + [-9.0] * 3
    mask = torch.tensor([*inputs["pivot_mask"], [1.0] * 3 + [0.0] * 3]).bool()
    log_probs = torch.tensor([*batch["logp"], meta], dtype=torch.float64)
    factors = separate_means(
        mask.sum(-1).numpy(), np.array([False, False, False, True]), options.meta_weight
    )
    values = torch.tensor([*inputs["adv"], 1.0]) * torch.tensor(factors)

    def loss(weights: torch.Tensor, rows: slice) -> float:
        kept = mask[rows]
        tokens = Tokens(
            log_probs=log_probs[rows],
            old_log_probs=torch.full_like(log_probs[rows], torch.nan),
            advantages=weights[rows, None].expand(kept.shape),
            mask=kept,
            totals=Totals(float(kept.sum()), float(kept.any(-1).sum())),
        )
        return float(r3l.loss(tokens, options).value)

    assert loss(values, slice(None)) == pytest.approx(expected["total"], abs=1e-6)
    plain = torch.tensor([*inputs["adv"], 1.0], dtype=torch.float64)
    assert loss(plain, slice(0, 3)) == pytest.approx(expected["explore"], abs=1e-6)
    assert loss(plain, slice(3, 4)) == pytest.approx(expected["meta_nll"], abs=1e-6)


# Anchors that four code bases agree on, to 1e-10.


@pytest.mark.parametrize(
    ("rewards", "success", "expected"),
    [
        (
            [1, 0.6, -0.1, 0.2, 0, 0.6, -0.1, 0.3],
            3.0,
            [3.0, 0.8625, -0.4125, -0.1125, -0.3125, 0.8625, -0.4125, -0.0125],
        ),
        (
            [1, 0.6, -0.1, 0.2, 0, 0.6, -0.1, 0.3],
            1.0,
            [1.0, 0.8625, -0.4125, -0.1125, -0.3125, 0.8625, -0.4125, -0.0125],
        ),
        ([1, 1, 1, 1], 3.0, [3.0] * 4),
        ([1, 1, 1, 1], 1.0, [1.0] * 4),
        ([0, 0, 0, 0], 3.0, [0.0] * 4),
    ],
)
def test_reweighting_matches_the_published_codes(rewards, success, expected):
    attempts = [episode(f"g/{n}", value) for n, value in enumerate(rewards)]
    found = r3l.attempt_advantages(attempts, r3l.Options(success_advantage=success))
    np.testing.assert_allclose(found.values, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"tau": 1.0}, 0.19), ({"tau": 0.0}, 0.38), ({"tau": 1.0, "seq": True}, 0.1375)],
)
def test_the_loss_matches_the_published_codes(options, expected):
    how = "seq_mean_token_mean" if options.pop("seq", False) else "token_mean"
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0]]).bool()
    log_probs = torch.tensor(
        [[-0.5, -1, -2, -0.1], [-0.3, -0.7, -1.5, -3]], dtype=torch.float64, requires_grad=True
    )
    tokens = Tokens(
        log_probs=log_probs,
        old_log_probs=torch.zeros(2, 4, dtype=torch.float64),
        advantages=torch.tensor([[1.5], [-0.5]]).expand(2, 4),
        mask=mask,
        totals=Totals(5.0, 2.0),
    )
    value = r3l.loss(tokens, r3l.Options(aggregation=how, **options)).value
    assert value.item() == pytest.approx(expected, abs=1e-10)
    value.backward()
    if how == "token_mean":
        scale = 1 + options["tau"]
        rows = torch.tensor([[-0.3, -0.3, 0, -0.3], [0.1, 0.1, 0, 0]], dtype=torch.float64)
        torch.testing.assert_close(log_probs.grad, rows / scale)


def test_the_k2_term_is_weighed_by_beta():
    tokens = Tokens(
        log_probs=torch.tensor([[-1.0, -2.0]]),
        old_log_probs=torch.zeros(1, 2),
        advantages=torch.zeros(1, 2),
        mask=torch.ones(1, 2).bool(),
        totals=Totals(2.0, 1.0),
        reference_log_probs=torch.tensor([[-1.5, -1.0]]),
    )
    value = r3l.loss(tokens, r3l.Options(beta=0.01, aggregation="token_mean")).value
    assert float(value) == pytest.approx(0.01 * (0.125 + 0.5) / 2)


# The pivot.


def test_only_turns_from_the_pivot_on_are_trained_in_both_attempts():
    base = episode("g/0", 0.0, turns=4)
    retry = retry_of(base, 1.0, pivot=2)
    rows = {row.trajectory_id: row for row in r3l.credit([base, retry], TOKEN_MEAN).rows}
    for row in rows.values():
        assert sorted(set(row.turns[row.mask].tolist())) == [2, 3]
        assert sorted(set(row.turns.tolist())) == [-1, 0, 1, 2, 3]
        assert not row.advantages[~row.mask].any()


def test_without_the_pivot_mask_every_turn_is_trained():
    base = episode("g/0", 0.0, turns=4)
    options = r3l.Options(pivot_mask=False)
    rows = r3l.credit([base, retry_of(base, 1.0, pivot=2)], options).rows
    assert [sorted(set(row.turns[row.mask].tolist())) for row in rows] == [[0, 1, 2, 3]] * 2


def test_the_mask_ends_where_the_attempts_part_whatever_the_notes_say():
    base = episode("g/0", 0.0, turns=4)
    retry = retry_of(base, 1.0, pivot=3)
    other = retry.steps[1].sample
    changed = replace(retry.steps[1], sample=replace(other, token_ids=other.token_ids[::-1].copy()))
    retry = replace(retry, steps=(retry.steps[0], changed, *retry.steps[2:]))
    assert r3l.first_turns([base, retry]) == [1, 1]


def test_replies_that_happen_to_be_the_same_after_the_pivot_are_still_trained():
    base = episode("g/0", 0.0, turns=3)
    retry = replace(base, key="g/0-again", kind="retry", reward=1.0, success=True)
    marked = replace(base.steps[1], notes={"retry_of": base.key, "planned": 1})
    retry = replace(retry, steps=(base.steps[0], marked, base.steps[2]))
    assert r3l.first_turns([base, retry]) == [1, 1]


def test_a_retry_that_failed_or_left_no_attempt_masks_nothing():
    base = episode("g/0", 0.0, turns=3)
    failed = retry_of(base, 0.0, pivot=2, status="failed")
    assert r3l.first_turns([base, failed]) == [0, 0]
    assert r3l.first_turns([retry_of(base, 0.0, pivot=2)]) == [0]


# Meta rows, options, figures.


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "const"])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_the_meta_term_is_a_mean_of_its_own_times_its_weight(aggregation, tau):
    base = episode("g/0", 0.0, turns=3)
    retry = retry_of(base, 1.0, pivot=1)
    meta = [meta_of(base, "reflection"), meta_of(base, "guided", turns=2)]
    options = r3l.Options(aggregation=aggregation, tau=tau, meta_weight=0.25)
    without = loss_of(r3l.credit([base, retry], options).rows, options)
    found = r3l.credit([base, retry, *meta], options)
    width = max(len(row.ids) for row in found.rows)
    tokens = [3, 6]
    nll = {
        "token_mean": 1.0,
        "seq_mean_token_mean": 1.0,
        "const": float(np.mean(tokens)) / width,
    }
    assert found.stats["meta_rows"] == 2
    assert loss_of(found.rows, options) == pytest.approx(
        without + 0.25 * nll[aggregation], abs=1e-5
    )


def test_meta_rows_alone_and_none_at_all_are_no_trouble():
    base = episode("g/0", 0.0)
    rows = r3l.credit([base, meta_of(base, "reflection")], TOKEN_MEAN).rows
    assert loss_of(rows, TOKEN_MEAN) == pytest.approx(0.1)
    off = r3l.Options(meta="off")
    assert r3l.credit([base, meta_of(base, "reflection")], off).rows == []
    assert r3l.credit([], r3l.Options()).rows == []


def test_rejected_reflections_are_not_trained():
    base = episode("g/0", 0.0)
    rejected = replace(meta_of(base, "reflection"), status="rejected")
    assert r3l.credit([base, rejected], TOKEN_MEAN).rows == []


def test_retries_below_the_mean_can_be_left_out():
    base = episode("g/0", 1.0)
    retry = retry_of(base, 0.0)
    kept = r3l.credit([base, retry], TOKEN_MEAN).rows
    assert advantages_of(kept) == {"g/0": 3.0, "g/0-again": -0.5}
    left = r3l.credit([base, retry], r3l.Options(negative_retries=False)).rows
    assert advantages_of(left) == {"g/0": 3.0}


def test_without_reweighting_advantages_are_rewards_against_the_mean():
    base = episode("g/0", 0.0)
    options = r3l.Options(success_advantage=None)
    assert advantages_of(r3l.credit([base, retry_of(base, 1.0)], options).rows) == {
        "g/0": -0.5,
        "g/0-again": 0.5,
    }


def test_figures_count_retries_improvements_and_tokens():
    first, second, third = (episode(f"g/{n}", 0.4, turns=2) for n in range(3))
    solved = episode("h/0", 1.0)
    played = [
        first,
        second,
        third,
        solved,
        retry_of(first, 1.0, pivot=1),
        retry_of(second, 0.4, pivot=0, planned=1),
        retry_of(third, 0.0, status="failed"),
        meta_of(first, "reflection"),
        meta_of(first, "guided", turns=2),
        replace(meta_of(second, "reflection"), status="rejected", kind="scripted-reflection"),
    ]
    stats = r3l.credit(played, r3l.Options()).stats
    expected = {
        "groups": 2,
        "usable_groups": 2,
        "zero_advantage_groups": 0,
        "reward": (3 * 0.4 + 1) / 4,
        "success": 0.25,
        "turns": 7 / 4,
        "base_attempts": 4,
        "retries": 3,
        "improve": 1 / 3,
        "improve_per_base": 1 / 4,
        "retry_success": 1 / 3,
        "retry_gain": (0.6 + 0 - 0.4) / 3,
        "replay_diverged": 1,
        "reflections": 2,
        "scripted_reflections": 1,
        "reflection_failures": 0,
        "meta_rows": 2,
        "base_tokens": 3 * 7,
        "retry_tokens": 3 * (1 + 2 + 2),
        "reflection_tokens": 3 * 2,
        "sampled_tokens": 21 + 15 + 6,
        "tokens_per_retry": 5,
        "retry_token_share": 21 / 42,
    }
    assert {name: stats[name] for name in expected} == pytest.approx(expected)


def test_groups_without_any_advantage_are_counted_as_a_share():
    played = [episode("g/0", 0.0), episode("h/0", 0.0), episode("h/1", 1.0)]
    stats = r3l.credit(played, r3l.Options()).stats
    assert stats["zero_advantage_groups"] == 0.5


@pytest.mark.parametrize("preset", r3l.PRESETS)
def test_every_preset_is_an_algorithm_with_its_published_settings(preset):
    name = "r3l" if preset == "paper" else f"r3l-{preset.replace('_', '-')}"
    algorithm = load_algorithm(name)
    values = algorithm.defaults.model_dump()
    assert {key: values[key] for key in r3l.PRESETS[preset]} == dict(r3l.PRESETS[preset])
    changed = TrainSettings(
        env="pz/Countdown-v0", steps=1, algorithm=name, options={"alpha": 5, "reflector": "expert"}
    )
    assert algorithm_options(changed).model_dump() == {
        **values,
        "alpha": 5.0,
        "reflector": "expert",
    }


def test_the_presets_differ_where_the_published_codes_do():
    success = {name: preset["success_advantage"] for name, preset in r3l.PRESETS.items()}
    assert success == {"paper": 3.0, "trinity_fork": 3.0, "trinity_release": 1.0}
    assert r3l.PRESETS["paper"]["tau"] == 0
    assert r3l.PRESETS["trinity_fork"]["fill_groups"] is True
