"""The language model's training: its losses, its weights, what it touches, resuming, learning."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from pz_agents.algorithms.losses import soft_cross_entropy
from pz_agents.errors import ModelError
from pz_agents.models import load_model
from pz_agents.models.recipe import Recipe
from pz_agents.models.scripted import ScriptedModel
from pz_agents.models.tiny import tiny_config, tiny_tokenizer
from pz_agents.models.transformers import TransformersModel
from pz_agents.priorzero.language import (
    Decision,
    LanguageLearner,
    LanguageLearnerSettings,
    normalised,
)
from pz_agents.priorzero.language_batch import lay_out, log_probs_of
from pz_agents.priorzero.prior import LanguagePrior, LanguageSettings, Moment
from pz_agents.priorzero.warmup import Lesson, WarmupRecipe, lessons_of, ranks, warm_up
from pz_agents.search.priors import softmax
from pz_envs.datasets import find_file

pytestmark = pytest.mark.timeout(240)

GOLDEN = Path(os.environ.get("PZ_DATA", "/nonexistent")).parent / "golden" / "trainer_losses.json"
needs_golden = pytest.mark.skipif(not GOLDEN.is_file(), reason="needs the golden cases by PZ_DATA")

STATES = (
    ("A dark hall. A lamp lies here.", ("go", "go north", "take lamp")),
    ("A kitchen.", ("eat", "open window", "up", "west")),
    ("A cave full of bats.", ("north", "south")),
    ("A shop.", ("buy map", "sell lamp", "east", "east again", "look")),
)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_model(folder: Path, **changes) -> Path:
    torch.manual_seed(0)
    recipe = Recipe(layers=2, hidden=32, feed_forward=32, context=256)
    config = tiny_config(recipe)
    for name, value in changes.items():
        setattr(config, name, value)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer(recipe.context).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("language") / "model")


@pytest.fixture(scope="module")
def sliding(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sliding") / "model"
    kinds = ["sliding_attention", "full_attention"]
    return save_model(path, use_sliding_window=True, sliding_window=8, layer_types=kinds)


def fresh(folder: Path) -> TransformersModel:
    return TransformersModel(folder, device="cpu")


def decisions(model, *, seed: int = 0, count: int = 8) -> list[Decision]:
    prior = LanguagePrior(model, LanguageSettings())
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        observation, commands = STATES[number % len(STATES)]
        moment = Moment(f"{observation} {number}", "", commands)
        visits = random.integers(0, 9, len(commands)) + np.eye(len(commands))[0]
        played = int(random.integers(len(commands)))
        advantage = float(random.normal())
        made.append(prior.decision(prior.prefix(moment), commands, visits, played, advantage))
    return made


def learner(model, *, temperature: float = 1.0, reduction="mean", **changes) -> LanguageLearner:
    settings = LanguageLearnerSettings(
        **{"learning_rate": 1e-3, "kl": 0.0, "max_grad_norm": 1e9, **changes}
    )
    return LanguageLearner(model, settings, seed=1, reduction=reduction, temperature=temperature)


def gradients(one: LanguageLearner, lessons) -> tuple[torch.Tensor, dict[str, float]]:
    """The gradient of the first update, as one vector, and the call's figures."""
    seen: list[torch.Tensor] = []

    def look(optimizer, *_):
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        seen.append(torch.cat([each.reshape(-1).clone() for each in flat]))

    handle = one.optimizer.register_step_pre_hook(look)
    figures = one.learn(lessons)
    handle.remove()
    return seen[0], figures


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.network.state_dict().items()}


def close(left: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((left - right).norm()) <= tolerance * max(float(right.norm()), 1e-3)


# The soft cross-entropy


@pytest.fixture(scope="module")
def golden() -> dict[str, dict]:
    return {case["id"]: case for case in json.loads(GOLDEN.read_text())["cases"]}


@needs_golden
@pytest.mark.parametrize("variant", ["sum", "mean", "alpha0.5", "mean_T2"])
def test_soft_cross_entropy_matches_the_golden_case(golden, variant):
    case = golden["soft_ce_visits"]
    expected = case["expected_f64"]["variants"][variant]
    temperature = 2.0 if variant == "mean_T2" else 1.0
    scores = torch.tensor([expected["scores"]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([case["expected_f64"]["target"]])
    loss = soft_cross_entropy(scores / temperature, targets, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-6)
    assert scores.grad[0].tolist() == pytest.approx(expected["grad_wrt_scores"], abs=1e-6)


@needs_golden
def test_commands_that_may_not_be_played_take_no_part(golden):
    case = golden["soft_ce_illegal"]
    values = [-math.inf if value is None else value for value in case["inputs"]["scores"]]
    scores = torch.tensor([values], requires_grad=True)
    visits = torch.tensor([case["inputs"]["visits"]], dtype=torch.float32)
    loss = soft_cross_entropy(scores, visits / visits.sum(), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(case["expected_f64"]["loss"], abs=1e-6)
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[0, 2] == 0.0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_learners_loss_is_that_of_the_prior_that_plays(folder, reduction, temperature):
    model = fresh(folder)
    lessons = decisions(model)
    prior = LanguagePrior(model, LanguageSettings(reduction=reduction))
    expected, agreed = [], []
    for number, each in enumerate(lessons):
        observation, commands = STATES[number % len(STATES)]
        (opinion,) = prior.judge([Moment(f"{observation} {number}", "", commands)])
        shares = each.visits / each.visits.sum()
        policy = softmax(opinion.scores, temperature)
        expected.append(-(shares * np.log(policy)).sum())
        agreed.append(each.visits[policy.argmax()] == each.visits.max())
    one = learner(model, reduction=reduction, temperature=temperature, rft_weight=0.0)
    figures = one.learn(lessons)
    assert figures["llm_sft_loss"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert figures["llm_agreement"] == pytest.approx(np.mean(agreed))
    assert "llm_rft_loss" not in figures


def test_a_ranked_list_is_imitated_token_by_token(folder):
    model = fresh(folder)
    prior = LanguagePrior(model, LanguageSettings(kind="generate", max_new_tokens=40))
    observation, commands = STATES[0]
    prefix = prior.prefix(Moment(observation, "", commands))
    lesson = prior.decision(prefix, commands, np.array([2.0, 0.0, 7.0]), 2, 0.0)
    expected = -model.score(prefix, [lesson.ranking])[0].mean()
    figures = learner(model, microbatch=1).learn([lesson])
    assert figures["llm_sft_loss"] == pytest.approx(float(expected), abs=1e-4)


# Layouts


def test_trees_and_rows_give_the_log_probs_of_separate_passes(folder, sliding):
    for path in (folder, sliding):
        model = fresh(path)
        lessons = decisions(model, count=4)
        groups = [list(each.candidates) for each in lessons]
        layout = lay_out(model.network, [each.prefix_ids for each in lessons], groups)
        assert (layout.mask is None) == (path is sliding)
        found = log_probs_of(model.network, layout, plain_head=path is folder, autocast=None)
        expected = [
            torch.from_numpy(each)
            for lesson in lessons
            for each in model.score(lesson.prefix_ids, lesson.candidates)
        ]
        torch.testing.assert_close(found.detach(), torch.cat(expected), atol=1e-4, rtol=0)


def test_models_without_a_tree_mask_learn_too(sliding):
    model = fresh(sliding)
    lessons = decisions(model, count=4)
    one = learner(model, rft_weight=0.0)
    first = one.learn(lessons)["llm_sft_loss"]
    for _ in range(5):
        last = one.learn(lessons)["llm_sft_loss"]
    assert last < first


# Weights that reach the gradient


def test_a_loss_weight_scales_its_gradient(folder):
    lessons = decisions(fresh(folder))
    sft, _ = gradients(learner(fresh(folder), sft_weight=0.5, rft_weight=0.0), lessons)
    twice, _ = gradients(learner(fresh(folder), sft_weight=1.0, rft_weight=0.0), lessons)
    rft, _ = gradients(learner(fresh(folder), sft_weight=0.0, rft_weight=0.3), lessons)
    thrice, _ = gradients(learner(fresh(folder), sft_weight=0.0, rft_weight=0.9), lessons)
    both, figures = gradients(learner(fresh(folder), sft_weight=0.5, rft_weight=0.3), lessons)
    assert min(float(sft.norm()), float(rft.norm())) > 0.0
    assert torch.equal(twice, 2 * sft)
    assert close(thrice, 3 * rft)
    assert close(both, sft + rft)
    total = 0.5 * figures["llm_sft_loss"] + 0.3 * figures["llm_rft_loss"]
    assert figures["llm_total_loss"] == pytest.approx(total, abs=1e-6)


def test_the_policy_gradient_is_that_of_the_played_tokens_alone(folder):
    lessons = decisions(fresh(folder))
    found, figures = gradients(learner(fresh(folder), sft_weight=0.0, rft_weight=1.0), lessons)
    network = fresh(folder).network
    tokens = sum(len(each.candidates[each.played]) for each in lessons)
    expected = 0.0
    for each in lessons:
        ids = np.concatenate([each.prefix_ids, each.candidates[each.played]]).astype(np.int64)
        row = torch.from_numpy(ids)
        log_probs = torch.log_softmax(network(row[None]).logits[0, :-1], -1)
        chosen = log_probs.gather(1, row[1:, None])[len(each.prefix_ids) - 1 :]
        expected = expected - each.advantage * chosen.sum() / tokens
    expected.backward()
    manual = torch.cat([p.grad.reshape(-1) for p in network.parameters()])
    assert figures["llm_rft_loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert close(found, manual, 1e-4)


def test_no_other_commands_logits_get_a_policy_gradient(folder):
    model = fresh(folder)
    (lesson, *_) = decisions(model)

    def logit_gradients(**changes) -> torch.Tensor:
        one = learner(fresh(folder), **changes)
        kept: list[torch.Tensor] = []
        head = one.model.network.get_output_embeddings()
        handle = head.register_forward_hook(lambda *args: (kept.append(args[2]), None)[1])
        args_retain = head.register_forward_hook(lambda *args: args[2].retain_grad())
        one.learn([lesson])
        handle.remove()
        args_retain.remove()
        return kept[0].grad

    without = logit_gradients(rft_weight=0.0)
    moved = logit_gradients(rft_weight=0.3) - without
    touched = moved.abs().sum(-1) > 1e-9
    played = lesson.candidates[lesson.played]
    assert int(touched.sum()) == len(played) < len(touched)
    # A log-prob's gradient is positive at its own token alone, and the loss's has its sign turned.
    raised = (-moved * np.sign(lesson.advantage))[touched].argmax(-1)
    assert sorted(raised.tolist()) == sorted(played.tolist())


@pytest.mark.parametrize("rft", ["reinforce", "clipped"])
def test_micro_batches_change_nothing(folder, rft):
    lessons = decisions(fresh(folder), count=7)
    changes = {"kl": 0.1, "rft": rft, "accumulate": 8, "critic": "world_model"}
    whole, figures = gradients(learner(fresh(folder), microbatch=8, **changes), lessons)
    for microbatch in (1, 2, 3):
        split, others = gradients(learner(fresh(folder), microbatch=microbatch, **changes), lessons)
        assert close(split, whole)
        for name, value in figures.items():
            assert others[name] == pytest.approx(value, abs=1e-5), name


def test_at_the_first_update_the_clipped_loss_is_the_plain_one(folder):
    lessons = decisions(fresh(folder))
    plain, _ = gradients(learner(fresh(folder), sft_weight=0.0), lessons)
    clipped, figures = gradients(learner(fresh(folder), sft_weight=0.0, rft="clipped"), lessons)
    assert close(clipped, plain)
    assert figures["llm_ratio"] == pytest.approx(1.0, abs=1e-5)


def test_later_updates_of_a_call_are_clipped_against_its_beginning(folder):
    model = fresh(folder)
    one = learner(model, rft="clipped", sft_weight=0.0, microbatch=1, accumulate=1)
    lessons = decisions(model) * 2
    figures = one.learn(lessons)
    assert figures["llm_updates"] == len(lessons)
    assert abs(figures["llm_ratio"] - 1.0) > 1e-4


def test_turns_without_a_reward_have_no_part_in_the_policy_gradient(folder):
    lessons = decisions(fresh(folder))
    idle = [replace(each, advantage=0.0) for each in decisions(fresh(folder), seed=5)]
    paid, _ = gradients(learner(fresh(folder), sft_weight=0.0, accumulate=16), lessons)
    mixed, _ = gradients(learner(fresh(folder), sft_weight=0.0, accumulate=16), lessons + idle)
    assert close(mixed, paid)


def test_advantages_are_normalised_over_the_whole_call():
    found = normalised(np.array([1.0, 2.0, 6.0]))
    assert found.mean() == pytest.approx(0.0, abs=1e-12)
    assert found.std() == pytest.approx(1.0)
    assert normalised(np.array([3.0])).tolist() == [0.0]


def test_the_kl_is_to_the_start_and_holds_the_model_there(folder):
    lessons = decisions(fresh(folder))

    def drift(kl: float) -> list[float]:
        one = learner(fresh(folder), kl=kl, rft_weight=0.0, learning_rate=3e-3)
        return [one.learn(lessons)["llm_kl"] for _ in range(6)]

    free, held = drift(1e-6), drift(20.0)
    assert free[0] == pytest.approx(0.0, abs=1e-6)
    assert free[-1] > 5 * held[-1] > 0.0


# Adapters


def test_an_adapter_learns_alone_and_its_folder_plays_as_it_does(folder, tmp_path):
    model = fresh(folder)
    before = weights(model)
    lessons = decisions(model)
    one = learner(model, lora_rank=4, kl=0.1, learning_rate=1e-2)
    first = one.learn(lessons)
    assert first["llm_kl"] == pytest.approx(0.0, abs=1e-6)
    assert one.learn(lessons)["llm_kl"] > 1e-6
    for name, tensor in weights(model).items():
        if "lora_" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer.", ".")])
    one.save(tmp_path)
    assert (tmp_path / "model" / "adapter_config.json").is_file()
    loaded = load_model(str(tmp_path / "model"), device="cpu")
    (lesson, *_) = lessons
    for mine, theirs in zip(
        model.score(lesson.prefix_ids, lesson.candidates),
        loaded.score(lesson.prefix_ids, lesson.candidates),
        strict=True,
    ):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


# What may go wrong


def test_an_update_that_is_not_finite_changes_nothing(folder):
    model = fresh(folder)
    one = learner(model)
    lessons = [replace(each, advantage=math.nan) for each in decisions(model)]
    before = weights(model)
    figures = one.learn(lessons)
    assert figures["llm_skipped_updates"] == 1
    assert figures["llm_updates"] == 0
    assert model.version == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    assert not one.optimizer.state
    for _ in range(3):
        one.learn(lessons)
    with pytest.raises(ModelError, match="in a row were not finite"):
        one.learn(lessons)


def test_with_nothing_to_learn_nothing_moves(folder):
    model = fresh(folder)
    one = learner(model)
    before = weights(model)
    empty = [replace(each, advantage=0.0, visits=each.visits * 0) for each in decisions(model)]
    assert one.learn([]) == {}
    assert one.learn(empty)["llm_skipped_updates"] == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def test_when_memory_runs_out_the_update_is_made_in_smaller_parts(folder, monkeypatch):
    from pz_agents.priorzero import language

    lessons = decisions(fresh(folder))
    whole, _ = gradients(learner(fresh(folder)), lessons)

    def lay_out_if_small(network, prefixes, candidates):
        if len(prefixes) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return lay_out(network, prefixes, candidates)

    monkeypatch.setattr(language, "lay_out", lay_out_if_small)
    split, _ = gradients(learner(fresh(folder)), lessons)
    assert close(split, whole)
    monkeypatch.setattr(language, "lay_out", lambda *_: lay_out_if_small(None, [0] * 3, ()))
    with pytest.raises(ModelError, match="one decision"):
        learner(fresh(folder)).learn(lessons)


def test_a_model_that_is_not_in_this_process_cannot_be_trained():
    with pytest.raises(ModelError, match="cannot be trained here"):
        LanguageLearner(ScriptedModel(["-"]), LanguageLearnerSettings(), seed=0)


# Going on


@pytest.mark.parametrize("rank", [0, 4])
def test_a_resumed_learner_goes_on_bit_for_bit(folder, tmp_path, rank):
    def begin() -> tuple[TransformersModel, LanguageLearner]:
        model = fresh(folder)
        return model, learner(model, lora_rank=rank, kl=0.1, rft="clipped", accumulate=1)

    straight, one = begin()
    lessons = decisions(straight)
    one.learn(lessons)
    one.save(tmp_path)
    expected = one.learn(lessons)
    resumed, other = begin()
    other.load(tmp_path)
    assert other.learn(lessons) == expected
    after = weights(resumed)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(straight).items())


def test_what_plays_plays_with_the_new_weights(folder):
    model = fresh(folder)
    prior = LanguagePrior(model, LanguageSettings())
    moment = Moment(*STATES[0][:1], "", STATES[0][1])
    before = prior.judge([moment])[0].scores
    learner(model).learn(decisions(model))
    assert model.version == 1
    assert np.abs(prior.judge([moment])[0].scores - before).max() > 1e-4


# Learning


def taught(folder: Path, *, shuffled: bool) -> float:
    """KL(visits || prior) on a fixed little set after 90 updates; the control shuffles targets."""
    model = fresh(folder)
    one = learner(model, rft_weight=0.0, sft_weight=1.0, learning_rate=1e-2, max_grad_norm=1.0)
    lessons = decisions(model, count=8)
    random = np.random.default_rng(3)
    for _ in range(90):
        shown = [
            replace(each, visits=random.permutation(each.visits)) if shuffled else each
            for each in lessons
        ]
        one.learn(shown)
    for group in one.optimizer.param_groups:
        group["lr"] = 0.0
    return one.learn(lessons)["llm_sft_kl"]


def test_the_prior_learns_the_visits(folder):
    kl = taught(folder, shuffled=False)
    assert kl <= 0.01


def test_shuffled_visits_teach_nothing(folder):
    assert taught(folder, shuffled=True) >= 0.1


# A model from scratch


def invented_lessons(seed: int, count: int) -> list[Lesson]:
    """Places of two commands each, of which the one that takes something is right."""
    random = np.random.default_rng(seed)
    things = ("lamp", "knife", "rope", "egg", "coin", "map")
    lessons = []
    for _ in range(count):
        thing, way = random.choice(things), random.choice(["north", "south", "west"])
        commands = (f"go {way}", f"take {thing}")
        if random.random() < 0.5:
            commands = commands[::-1]
        moment = Moment(f"A place. You see a {thing} here.", "", commands)
        lessons.append(Lesson(moment, commands.index(f"take {thing}")))
    return lessons


def test_a_model_from_scratch_learns_to_rank_and_is_a_prior_like_any_other(tmp_path):
    recipe = WarmupRecipe(layers=1, hidden=32, words=400, context=256, epochs=4, rate=1e-2)
    losses: list[float] = []
    warm_up(
        tmp_path / "model",
        invented_lessons(0, 64),
        recipe,
        on_progress=lambda done, updates, loss: losses.append(loss),
    )
    assert len(losses) == 16
    assert losses[-1] < losses[0]
    model = load_model(str(tmp_path / "model"), device="cpu")
    assert model.template == "compact"
    found = ranks(LanguagePrior(model, LanguageSettings()), invented_lessons(1, 40))
    assert found["uniform_top1"] == 0.5
    assert found["top1"] >= 0.9
    assert found["rank"] <= 1.1
    assert found["states"] == 40.0


def test_the_warm_up_is_the_same_for_the_same_seed(tmp_path):
    recipe = WarmupRecipe(layers=1, hidden=32, words=300, context=256, epochs=1)
    for name in ("one", "other"):
        warm_up(tmp_path / name, invented_lessons(0, 16), recipe)
    one, other = (weights(fresh(tmp_path / name)) for name in ("one", "other"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.data
@pytest.mark.skipif(
    find_file("jericho", "detective.z5") is None, reason="needs detective.z5 (PZ_DATA)"
)
def test_lessons_are_the_states_of_a_walkthrough_with_its_commands():
    pytest.importorskip("jericho")
    lessons = lessons_of("pz/Detective-v0", 6)
    assert len(lessons) >= 4
    assert all(0 <= lesson.played < len(lesson.moment.commands) for lesson in lessons)
    turns = [len(lesson.moment.history) for lesson in lessons]
    assert turns == sorted(set(turns))
    first, last = lessons[0], lessons[-1]
    played = last.moment.history[len(first.moment.history)]
    assert played[0] == first.moment.observation
    assert played[1] == first.moment.commands[first.played]
