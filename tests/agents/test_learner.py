from __future__ import annotations

import inspect
import math
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs pz-agents[train]")

import trl
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from pz_agents.algorithms import grpo, load_algorithm
from pz_agents.algorithms.losses import Loss
from pz_agents.algorithms.rows import TrainRow
from pz_agents.errors import ModelError
from pz_agents.training.settings import TrainSettings
from pz_agents.training.trl_learner import EpisodeTrainer, Learner, batch_of, completion_log_probs

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


def rows_for(model, count=6, seed=0, temperature=1.0) -> list[TrainRow]:
    """Random multi-turn rows whose log-probs are the model's own."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        ids = rng.integers(2, VOCABULARY, size=rng.integers(6, 14)).astype(np.int32)
        mask = rng.random(len(ids)) < 0.6
        mask[: rng.integers(1, 4)] = False
        mask[-1] = True
        with torch.no_grad():
            logits = model(torch.tensor(ids[None]).long()).logits[0] / temperature
        every = torch.log_softmax(logits, -1)[:-1].gather(-1, torch.tensor(ids[1:, None]).long())
        log_probs = np.concatenate([[0.0], every[:, 0].numpy()])
        rows.append(
            TrainRow(
                ids=ids,
                mask=mask,
                log_probs=np.where(mask, log_probs, 0.0).astype(np.float32),
                versions=np.zeros(len(ids), np.int32),
                turns=np.zeros(len(ids), np.int32),
                advantages=np.where(mask, rng.normal(), 0.0).astype(np.float32),
                trajectory_id=f"t{index}",
                group_id="g",
            )
        )
    return rows


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
    expected = {
        "_generate_and_score_completions": ["self", "inputs"],
        "_compute_loss": ["self", "model", "inputs"],
        "_prepare_inputs": ["self", "generation_batch"],
        "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    }
    for name, arguments in expected.items():
        method = getattr(trl.GRPOTrainer, name, None)
        found = list(inspect.signature(inspect.unwrap(method)).parameters) if method else None
        assert found == arguments, say.format(trl.__version__, f"GRPOTrainer.{name}: {found}")
    init = inspect.signature(trl.GRPOTrainer.__init__).parameters
    for name in ("model", "args", "train_dataset", "processing_class", "optimizers"):
        assert name in init, say.format(trl.__version__, f"GRPOTrainer(..., {name}=)")
    fields = trl.GRPOConfig.__dataclass_fields__
    for name in (
        "steps_per_generation",
        "num_generations",
        "num_iterations",
        "temperature",
        "beta",
        "disable_dropout",
        "shuffle_dataset",
        "use_cpu",
    ):
        assert name in fields, say.format(trl.__version__, f"GRPOConfig.{name}")
    source = inspect.getsource(trl.GRPOTrainer._compute_loss)
    batch = batch_of(rows_for(micro_model()), pad_id=0, divisor=1)
    for key in batch.keys() - {"num_sequences", "groups"}:
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
    run = settings(max_turns=1, max_new_tokens=9)
    algorithm = load_algorithm(name)
    changes = {**options, "beta": beta} if name != "dapo" else options
    ours = type(algorithm.defaults)(**{**algorithm.defaults.model_dump(), **changes})
    learner = Learner(model, tokenizer(), run, partial(algorithm.loss, options=ours))
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
    trainer.learner, trainer.beta = learner, changes.get("beta", 0.0)
    trainer.current_gradient_accumulation_steps = 1
    batch = batch_of(rows_for(model), pad_id=0, divisor=1)
    noise = torch.Generator().manual_seed(1)
    for key in ("old_per_token_logps", "ref_per_token_logps"):
        shape = batch["old_per_token_logps"].shape
        batch[key] = batch["old_per_token_logps"] + 0.3 * torch.randn(shape, generator=noise)
    model.train()
    values, gradients = [], []
    for compute in (trl.GRPOTrainer._compute_loss, EpisodeTrainer._compute_loss):
        model.zero_grad()
        value = compute(trainer, model, batch)
        value.backward()
        values.append(value.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert abs(values[0].item()) > 1e-4
    torch.testing.assert_close(values[1], values[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)


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


def test_the_update_does_not_depend_on_micro_batches_or_padding_rows(tmp_path):
    results = []
    for micro_batches in (1, 2, 4, 5):
        model = micro_model()
        learn(model, [rows_for(model)], tmp_path, micro_batches=micro_batches, max_grad_norm=1e9)
        results.append(weights(model))
    # Adam's first step is lr * sign(gradient): compare where the sign is certain.
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(other[name], tensor, atol=2e-4, rtol=0)


def test_gradients_do_not_depend_on_micro_batches():
    model = micro_model()
    learner = Learner(model, tokenizer(), settings(), loss_of())
    rows = rows_for(model)
    gradients = []
    for divisor in (1, 3, 4):
        batch = batch_of(rows, pad_id=0, divisor=divisor)
        size = len(batch["advantages"]) // divisor
        model.zero_grad()
        for start in range(0, size * divisor, size):
            part = {k: v[start : start + size] if v.ndim else v for k, v in batch.items()}
            learner._micro_batch_loss(model, part).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-5)


def test_batches_hold_each_token_where_its_row_says():
    rows = rows_for(micro_model(), count=5)
    batch = batch_of(rows, pad_id=0, divisor=4)
    assert len(batch["prompt_ids"]) == 8
    assert batch["num_items_in_batch"] == sum(int(row.mask.sum()) for row in rows)
    assert batch["num_sequences"] == 5
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    real = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1).bool()
    trained = batch["tool_mask"].bool()
    for index, row in enumerate(rows):
        assert ids[index][real[index]].tolist() == row.ids.tolist()
        completion = batch["completion_ids"][index]
        assert completion[trained[index]].tolist() == row.ids[row.mask].tolist()
        old = batch["old_per_token_logps"][index][trained[index]]
        np.testing.assert_array_equal(old.numpy(), row.log_probs[row.mask])
    assert not trained[5:].any()
    assert len(set(batch["groups"][:5].tolist())) == 1
    assert not set(batch["groups"][:5].tolist()) & set(batch["groups"][5:].tolist())


def test_log_probs_do_not_depend_on_the_padding_around_a_row():
    model = micro_model()
    rows = rows_for(model, count=5)
    together = batch_of(rows, pad_id=0, divisor=1)
    with torch.no_grad():
        log_probs, _ = completion_log_probs(model, together, 1.0)
    for index, row in enumerate(rows):
        mask = together["tool_mask"][index].bool()
        np.testing.assert_allclose(
            log_probs[index][mask].numpy(), row.log_probs[row.mask], atol=1e-5
        )


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
        def _before_update(self):
            states.append((weights(self.module), self.optimizer.state_dict()["state"]))
            return super()._before_update()

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
    changes = {"steps": 4, "schedule": "cosine", "warmup_updates": 1, "micro_batches": 2}
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
