from __future__ import annotations

import copy
import inspect
import math
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs pz-agents[train]")

import trl
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)

from pz_agents.algorithms import grpo, load_algorithm
from pz_agents.algorithms.losses import Loss
from pz_agents.algorithms.rows import TrainRow
from pz_agents.errors import ModelError
from pz_agents.training.settings import TrainSettings
from pz_agents.training.trl_learner import EpisodeTrainer, Learner

VOCABULARY = 16


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def micro_model(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    return Qwen2ForCausalLM(config).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    words = WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="w0", eos_token="w1", unk_token="w0"
    )


def settings(**changes) -> TrainSettings:
    given = {"env": "pz/Countdown-v0", "steps": 3, "learning_rate": 1e-2, **changes}
    return TrainSettings(**given)


def with_log_probs_of(model, rows, temperature=1.0) -> list[TrainRow]:
    """The rows with the log-probs of ``model``, each taken alone and without padding."""
    found = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor(row.ids[None]).long()).logits[0] / temperature
        ids = torch.tensor(row.ids[1:, None]).long()
        every = torch.log_softmax(logits, -1)[:-1].gather(-1, ids)[:, 0]
        log_probs = np.concatenate([[0.0], every.numpy()])
        log_probs = np.where(row.mask, log_probs, 0.0).astype(np.float32)
        found.append(replace(row, log_probs=log_probs))
    return found


def rows_for(model, count=6, seed=0, temperature=1.0) -> list[TrainRow]:
    """Random multi-turn rows whose log-probs are the model's own."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        ids = rng.integers(2, VOCABULARY, size=rng.integers(6, 14)).astype(np.int32)
        mask = rng.random(len(ids)) < 0.6
        mask[: rng.integers(1, 4)] = False
        mask[-1] = True
        zeros = np.zeros(len(ids), np.int32)
        advantages = np.where(mask, rng.normal(), 0.0).astype(np.float32)
        rows.append(
            TrainRow(
                ids, mask, zeros.astype(np.float32), zeros, zeros, advantages, f"t{index}", "g"
            )
        )
    return with_log_probs_of(model, rows, temperature)


def trl_batch(rows: list[TrainRow]) -> dict[str, torch.Tensor]:
    """The rows in TRL's own format: prompts padded left, what follows them padded right."""
    starts = [row.prompt_length for row in rows]
    width = max(starts)
    length = max(len(row.ids) - start for row, start in zip(rows, starts, strict=True))
    shapes = {"prompt_ids": width, "prompt_mask": width}
    integers = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")
    batch = {
        name: torch.zeros(
            len(rows), shapes.get(name, length), dtype=torch.long if name in integers else None
        )
        for name in (*integers, "old_per_token_logps", "advantages")
    }
    for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
        batch["prompt_ids"][place, width - start :] = torch.from_numpy(row.ids[:start])
        batch["prompt_mask"][place, width - start :] = 1
        rest = slice(0, len(row.ids) - start)
        batch["completion_ids"][place, rest] = torch.from_numpy(row.ids[start:])
        batch["completion_mask"][place, rest] = 1
        batch["tool_mask"][place, rest] = torch.from_numpy(row.mask[start:]).long()
        batch["old_per_token_logps"][place, rest] = torch.from_numpy(row.log_probs[start:])
        batch["advantages"][place, rest] = torch.from_numpy(row.advantages[start:])
    batch["num_items_in_batch"] = batch["tool_mask"].sum().float()
    return batch


def loss_of(**options):
    return partial(grpo.loss, options=grpo.Options(**options))


def learn(model, rows_by_step, tmp_path, *, loss=None, **changes):
    """Run the learner over given rows; return it and the metrics of each step."""
    learner = Learner(model, tokenizer(), settings(**changes), loss or loss_of())
    seen = []

    def after_step(step, metrics):
        seen.append(dict(metrics))
        return True

    learner.run(1, len(rows_by_step), lambda step: rows_by_step[step - 1], after_step, tmp_path)
    return learner, seen


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(left, right):
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_trl_still_has_every_name_and_argument_we_rely_on():
    say = "TRL {} changed {}; adapt pz_agents/training/trl_learner.py and pin the version."

    def arguments_of(name):
        method = getattr(trl.GRPOTrainer, name, None)
        return list(inspect.signature(inspect.unwrap(method)).parameters) if method else None

    # What we override, and for the comparisons with its own loss what the batch is given to.
    expected = {
        "training_step": ["self", "model", "inputs", "num_items_in_batch"],
        "_generate_and_score_completions": ["self", "inputs"],
        "_compute_loss": ["self", "model", "inputs"],
        "_send_telemetry": ["self"],
    }
    for name, arguments in expected.items():
        found = arguments_of(name)
        assert found == arguments, say.format(trl.__version__, f"GRPOTrainer.{name}: {found}")
    init = arguments_of("__init__")
    for name in (
        "model",
        "reward_funcs",
        "args",
        "train_dataset",
        "processing_class",
        "optimizers",
    ):
        assert name in init, say.format(trl.__version__, f"GRPOTrainer(..., {name}=)")
    for name in ("add_callback", "remove_callback", "train"):
        assert arguments_of(name), say.format(trl.__version__, f"GRPOTrainer.{name}")
    for name in ("on_pre_optimizer_step", "on_step_end"):
        method = getattr(TrainerCallback, name, None)
        found = list(inspect.signature(method).parameters) if method else None
        what = f"TrainerCallback.{name}: {found}"
        assert found == ["self", "args", "state", "control", "kwargs"], say.format(
            trl.__version__, what
        )
    fields = trl.GRPOConfig.__dataclass_fields__
    names = re.findall(r"^ {16}(\w+)=", inspect.getsource(Learner._arguments), re.MULTILINE)
    assert {"max_steps", "steps_per_generation", "num_generations", "beta"} <= set(names)
    for name in names:
        assert name in fields, say.format(trl.__version__, f"GRPOConfig.{name}")
    source = inspect.getsource(trl.GRPOTrainer._compute_loss)
    for key in trl_batch(rows_for(micro_model())):
        assert f'"{key}"' in source, say.format(trl.__version__, f"batch key {key}")


@pytest.mark.parametrize(
    ("name", "options", "theirs"),
    [
        ("grpo", {}, {"loss_type": "dapo"}),
        ("grpo", {"aggregation": "seq_mean_token_mean"}, {"loss_type": "grpo"}),
        ("grpo", {"dual_clip": 1.3}, {"loss_type": "dapo", "delta": 1.3}),
        (
            "grpo",
            {"off_policy_delta": 0.05},
            {"loss_type": "dapo", "off_policy_mask_threshold": 0.05},
        ),
        ("dr-grpo", {}, {"loss_type": "dr_grpo"}),
        ("dapo", {}, {"loss_type": "dapo", "epsilon_high": 0.28}),
        ("cispo", {"clip_high": 0.1}, {"loss_type": "cispo", "epsilon_high": 1.1}),
        (
            "gspo",
            {"clip_low": 0.05, "clip_high": 0.1},
            {
                "loss_type": "grpo",
                "importance_sampling_level": "sequence",
                "epsilon": 0.05,
                "epsilon_high": 0.1,
            },
        ),
    ],
)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_loss_and_gradient_equal_trls_own_on_random_tensors(tmp_path, name, options, theirs, beta):
    model = micro_model()
    algorithm = load_algorithm(name)
    changes = {**options, "beta": beta} if name != "dapo" else options
    beta = changes.get("beta", 0.0)
    ours = type(algorithm.defaults)(**{**algorithm.defaults.model_dump(), **changes})
    reference = micro_model(seed=1) if beta else None
    run = settings(max_turns=1, max_new_tokens=9, max_tokens_per_microbatch=24)
    loss = partial(algorithm.loss, options=ours)
    learner = Learner(model, tokenizer(), run, loss, reference)
    arguments = learner._arguments(1, tmp_path)
    for field, value in theirs.items():
        assert hasattr(arguments, field)
        setattr(arguments, field, value)
    arguments.max_completion_length = 9
    arguments.use_bias_correction_kl = False
    trainer = EpisodeTrainer(
        model=model,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=arguments,
        train_dataset=trl.trainer.grpo_trainer.Dataset.from_dict({"prompt": [""]}),
        processing_class=tokenizer(),
    )
    trainer.beta = beta
    trainer.current_gradient_accumulation_steps = 1
    rows = rows_for(model)
    rng = np.random.default_rng(1)
    for row in rows:
        row.log_probs[row.mask] += 0.3 * rng.normal(size=row.mask.sum()).astype(np.float32)
    batch = trl_batch(rows)
    if reference is not None:
        batch["ref_per_token_logps"] = trl_batch(with_log_probs_of(reference, rows))[
            "old_per_token_logps"
        ]

    def gradients():
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        return found

    model.train()
    value = trl.GRPOTrainer._compute_loss(trainer, model, batch)
    value.backward()
    expected = gradients()
    found = learner.accumulate(learner.step_rows(rows))
    assert abs(value.item()) > 1e-4
    torch.testing.assert_close(found, value.detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradients(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_update_on_policy_has_ratio_one_and_clips_nothing(tmp_path, temperature):
    model = micro_model()
    rows = rows_for(model, temperature=temperature)
    _, (metrics,) = learn(model, [rows], tmp_path, temperature=temperature)
    assert abs(metrics["ratio"] - 1.0) <= 1e-5
    assert metrics["engine_gap"] <= 1e-4
    assert metrics["clip_low"] == metrics["clip_high"] == 0.0
    assert abs(metrics["approx_kl"]) <= 1e-6


def test_later_passes_over_the_same_rows_move_the_ratio(tmp_path):
    model = micro_model()
    learner, (metrics,) = learn(model, [rows_for(model)], tmp_path, iterations=3)
    assert learner.updates == 3
    assert metrics["engine_gap"] <= 1e-4
    assert metrics["clip_low"] + metrics["clip_high"] > 0.0


def poisoned_loss(at_update, poison):
    calls = iter(range(100))

    def loss(tokens):
        value, stats = loss_of()(tokens)
        return Loss(poison(value) if next(calls) == at_update else value, stats)

    return loss


@pytest.mark.parametrize(
    "poison",
    [
        lambda value: value * float("nan"),
        lambda value: value + float("inf"),
        lambda value: value * 1e38 * 1e38,
    ],
)
def test_an_update_that_is_not_finite_is_skipped_and_changes_no_bit(tmp_path, poison):
    states = []

    class Watching(Learner):
        def before_update(self):
            moments = copy.deepcopy(self.optimizer.state_dict()["state"])
            states.append((weights(self.module), moments))
            return super().before_update()

    model = micro_model()
    rows = rows_for(model)
    learner = Watching(model, tokenizer(), settings(), poisoned_loss(1, poison))
    metrics = []

    def after_step(step, values):
        metrics.append(values)
        return True

    learner.run(1, 3, lambda step: rows, after_step, tmp_path)
    assert (learner.updates, learner.skipped) == (2, 1)
    assert_same(states[1][0], states[2][0])
    assert states[1][1].keys() == states[2][1].keys() != set()
    for number, moments in states[1][1].items():
        assert_same(moments, states[2][1][number])
    assert not torch.equal(
        states[2][0]["model.norm.weight"], model.state_dict()["model.norm.weight"]
    )
    assert [values["skipped_updates"] for values in metrics] == [0, 1, 1]


def test_a_nan_reward_reaching_the_rows_skips_the_update(tmp_path):
    model = micro_model()
    rows = rows_for(model)
    rows[0].advantages[rows[0].mask] = np.nan
    before = weights(model)
    learner, _ = learn(model, [rows], tmp_path)
    assert learner.skipped == 1
    assert_same(before, weights(model))


def test_five_updates_in_a_row_that_are_not_finite_end_the_run(tmp_path):
    model = micro_model()
    rows = rows_for(model)
    rows[0].advantages[rows[0].mask] = np.inf
    with pytest.raises(ModelError, match="5 updates in a row were not finite"):
        learn(model, [rows] * 8, tmp_path, steps=8)


def test_a_step_without_rows_takes_no_update(tmp_path):
    model = micro_model()
    before = weights(model)
    learner, metrics = learn(model, [[], []], tmp_path)
    assert (learner.updates, learner.skipped) == (0, 2)
    assert metrics[0]["tokens"] == 0.0
    assert_same(before, weights(model))


def test_momentum_does_not_move_weights_in_a_step_without_rows(tmp_path):
    model = micro_model()
    rows = rows_for(model)
    after_first = []

    def collect(step):
        after_first.append(weights(model))
        return rows if step == 1 else []

    learner = Learner(model, tokenizer(), settings(), loss_of())
    learner.run(1, 2, collect, lambda step, metrics: True, tmp_path)
    assert_same(after_first[1], weights(model))


def test_a_run_stops_when_told_and_goes_on_bit_for_bit(tmp_path):
    straight = micro_model()
    steps = [rows_for(micro_model(), seed=number) for number in range(4)]
    changes = {"steps": 4, "schedule": "cosine", "warmup_updates": 1}
    learn(straight, steps, tmp_path, **changes)

    halved = micro_model()
    first = Learner(halved, tokenizer(), settings(**changes), loss_of())
    first.run(1, 4, lambda step: steps[step - 1], lambda step, metrics: step < 2, tmp_path)
    assert first.updates == 2

    resumed = micro_model(seed=1)
    resumed.load_state_dict(halved.state_dict())
    second = Learner(resumed, tokenizer(), settings(**changes), loss_of())
    second.load_state(first.state(), first.optimizer.state_dict())
    second.run(3, 4, lambda step: steps[step - 1], lambda step, metrics: True, tmp_path)
    assert_same(weights(straight), weights(resumed))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, None]),
    ],
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(tmp_path, schedule, expected):
    model = micro_model()
    rows = rows_for(model)
    _, metrics = learn(model, [rows] * 6, tmp_path, steps=6, schedule=schedule, warmup_updates=2)
    for step, fraction in zip(metrics, expected, strict=True):
        if fraction is not None:
            assert step["learning_rate"] == pytest.approx(1e-2 * fraction)
