"""The language model's prior at a root: prompts, scores, ranked lists, failures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from pz_agents.errors import ModelError
from pz_agents.models.recipe import Recipe
from pz_agents.models.scripted import ScriptedModel
from pz_agents.models.tiny import tiny_config, tiny_tokenizer
from pz_agents.models.transformers import TransformersModel
from pz_agents.priorzero.prior import LanguagePrior, LanguageSettings, Moment, read_ranking
from pz_agents.priorzero.prompt import messages_of, prompt_ids
from pz_agents.search.priors import PriorSettings, mix_prior, softmax

pytestmark = pytest.mark.timeout(120)

COMMANDS = ("go", "go north", "take lamp", "look")
HISTORY = (("A cellar.", "up", 0.0), ("A kitchen.", "take knife", 5.0))
MOMENT = Moment("A dark hall. A lamp lies here.", "Find the treasure.", COMMANDS, HISTORY, seed=7)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> TransformersModel:
    folder = tmp_path_factory.mktemp("prior") / "model"
    torch.manual_seed(0)
    recipe = Recipe(layers=2, hidden=32, feed_forward=32, context=512)
    Qwen2ForCausalLM(tiny_config(recipe)).save_pretrained(folder)
    tiny_tokenizer(recipe.context).save_pretrained(folder)
    return TransformersModel(folder, device="cpu")


class Broken(ScriptedModel):
    """Fails whatever it is asked, as a lost server does."""

    def generate(self, requests):
        raise ModelError("the server is gone")

    def score(self, prefix_ids, candidates):
        raise ModelError("the server is gone")


class Nan(ScriptedModel):
    """Has diverged."""

    def score(self, prefix_ids, candidates):
        return [np.full(len(each), np.nan, np.float32) for each in candidates]


# The prompt


def text_of(messages) -> str:
    return "\n".join(message["content"] for message in messages)


def test_a_chat_prompt_tells_rules_turns_observation_and_commands():
    messages = messages_of("A hall.", "Find gold.", COMMANDS, HISTORY)
    assert [message["role"] for message in messages] == ["system", "user"]
    text = text_of(messages)
    wanted = ("Find gold.", "A cellar.", "take knife", "Reward: 5", "A hall.", "go; go north;")
    assert all(each in text for each in wanted)
    assert text.index("A cellar.") < text.index("A kitchen.") < text.index("A hall.")


def test_each_way_of_asking_says_how_to_reply():
    plain = text_of(messages_of("A hall.", "", COMMANDS, ()))
    thinking = text_of(messages_of("A hall.", "", COMMANDS, (), reasoning=True))
    ranking = text_of(messages_of("A hall.", "", COMMANDS, (), top=5))
    assert "HISTORY" not in plain
    assert "Reasoning:" in thinking
    assert "Reasoning:" not in plain
    assert "the 5 best" in ranking


def test_what_does_not_fit_leaves_out_the_oldest_turns_first():
    history = [(f"Room {n}. " + "x" * 200, f"step {n}", 0.0) for n in range(16)]

    def shown(context: int) -> str:
        model = ScriptedModel(["-"], max_context=context, template="chat")
        ids = prompt_ids(model, "A hall.", "", COMMANDS, history, room=50)
        assert len(ids) + 50 <= context
        return model.decode(ids)

    assert "Room 0." in shown(10_000)
    less = shown(2_000)
    assert "Room 0." not in less
    assert "Room 15." in less
    assert "A hall." in less


def test_a_prompt_that_cannot_fit_is_refused():
    model = ScriptedModel(["-"], max_context=100, template="chat")
    with pytest.raises(ModelError, match="100 tokens"):
        prompt_ids(model, "A hall.", "", COMMANDS, (), room=50)


def test_a_compact_prompt_is_the_last_commands_and_the_observation():
    messages = messages_of("A hall.", "Find gold.", COMMANDS, HISTORY, compact=True)
    assert [dict(each) for each in messages] == [
        {"role": "user", "content": "> up\n> take knife\nA hall."}
    ]


# Scores


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scores_are_those_of_separate_full_forward_passes(model, reduction):
    prior = LanguagePrior(model, LanguageSettings(reduction=reduction))
    (opinion,) = prior.judge([MOMENT])
    for score, ids in zip(opinion.scores, prior.candidates(COMMANDS), strict=True):
        row = torch.from_numpy(np.concatenate([opinion.prefix_ids, ids]).astype(np.int64))
        with torch.no_grad():
            logits = model.network(row[None]).logits[0]
        log_probs = torch.log_softmax(logits[:-1], -1).gather(1, row[1:, None])[-len(ids) :]
        expected = log_probs.mean() if reduction == "mean" else log_probs.sum()
        assert score == pytest.approx(float(expected), abs=1e-4)
    assert opinion.statistics["ok"] == 1.0
    assert opinion.statistics["retries"] == 0.0
    assert 0.0 <= opinion.statistics["entropy"] <= np.log(len(COMMANDS)) + 1e-9


def test_with_its_terminator_a_command_is_not_the_beginning_of_another(model):
    prior = LanguagePrior(model, LanguageSettings())
    go, go_north = prior.candidates(["go", "go north"])
    assert go[-1] == go_north[-1] == model.end_of_turn_id
    assert list(go[:-1]) == list(go_north[: len(go) - 1])
    assert go[-1] != go_north[len(go) - 1]


def test_the_prefix_is_the_one_that_was_judged_and_ends_with_the_label(model):
    prior = LanguagePrior(model, LanguageSettings(history=1))
    (opinion,) = prior.judge([MOMENT])
    np.testing.assert_array_equal(opinion.prefix_ids, prior.prefix(MOMENT))
    assert model.decode(opinion.prefix_ids).endswith("Action:")
    assert "take knife" in model.decode(opinion.prefix_ids)
    assert "> up" not in model.decode(opinion.prefix_ids)


def test_an_injected_prior_is_the_softmax_of_the_scores(model):
    (opinion,) = LanguagePrior(model, LanguageSettings()).judge([MOMENT])
    mixed = mix_prior(np.full(4, 0.25), opinion.scores, PriorSettings(mode="replace"))
    np.testing.assert_array_equal(mixed, softmax(opinion.scores))


def test_scores_are_remembered_until_the_weights_change(model):
    calls = []

    class Counting(ScriptedModel):
        def score(self, prefix_ids, candidates):
            calls.append(len(candidates))
            return super().score(prefix_ids, candidates)

    counting = Counting(["-"])
    prior = LanguagePrior(counting, LanguageSettings())
    first = prior.judge([MOMENT, MOMENT])
    first[0].scores[:] = 0.0
    assert prior.judge([MOMENT])[0].scores.sum() != 0.0
    assert calls == [4]
    counting.version += 1
    prior.judge([MOMENT])
    assert calls == [4, 4]


def test_a_state_without_commands_has_an_opinion_about_nothing(model):
    (opinion,) = LanguagePrior(model, LanguageSettings()).judge([Moment("The end.", "", ())])
    assert opinion.scores.shape == (0,)
    assert opinion.statistics["ok"] == 1.0


def test_thoughts_come_first_and_end_before_the_answer():
    model = ScriptedModel([" The lamp is useful.\nAction: take lamp"])
    prior = LanguagePrior(model, LanguageSettings(reasoning=True))
    (opinion,) = prior.judge([MOMENT])
    text = model.decode(opinion.prefix_ids)
    assert text.endswith("Reasoning: The lamp is useful.\n\nAction:")
    assert opinion.scores.shape == (4,)
    decision = prior.decision(opinion.prefix_ids, COMMANDS, np.array([1, 2, 3, 4]), 2, 0.5)
    np.testing.assert_array_equal(decision.prefix_ids, opinion.prefix_ids)
    assert [list(each) for each in decision.candidates] == [
        list(each) for each in prior.candidates(COMMANDS)
    ]


# Ranked lists


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("1. take lamp\n2. go north\n3. look", [0, 2 / 6, 3 / 6, 1 / 6]),
        ("Let me think.\n 1) Take Lamp.\n 2) `go`", [1 / 3, 0, 2 / 3, 0]),
        ("1. take the lamp\n2. walk north", [0, 1 / 3, 2 / 3, 0]),
        ("1. look\n2. look\n3. take lamp", [0, 0, 1 / 3, 2 / 3]),
        ("1. sing\n2. look", [0, 0, 0, 1]),
    ],
)
def test_a_ranked_list_is_read(text, weights):
    np.testing.assert_allclose(softmax(read_ranking(text, COMMANDS)), weights, atol=1e-8)


@pytest.mark.parametrize("text", ["", "take lamp", "1. sing\n2. dance", "1.\n2."])
def test_a_list_without_any_command_is_a_failure(text):
    assert read_ranking(text, COMMANDS) is None


def test_a_generated_ranking_is_an_opinion():
    prior = LanguagePrior(ScriptedModel(["1. look\n2. go"]), LanguageSettings(kind="generate"))
    (opinion,) = prior.judge([MOMENT])
    np.testing.assert_allclose(softmax(opinion.scores), [1 / 3, 0, 0, 2 / 3], atol=1e-8)


def test_a_list_to_imitate_names_the_most_visited():
    model = ScriptedModel(["-"])
    prior = LanguagePrior(model, LanguageSettings(kind="generate", top=2))
    decision = prior.decision(prior.prefix(MOMENT), COMMANDS, np.array([1, 0, 5, 3]), 3, 1.0)
    assert model.decode(decision.ranking) == "1. take lamp\n2. look"
    assert decision.ranking[-1] == model.end_of_turn_id
    assert model.decode(decision.candidates[decision.played]) == "1. look\n"


# Failures


def test_another_seed_is_tried_after_a_reply_that_cannot_be_read():
    seeds = []

    def reply(prompt: str, seed: int) -> str:
        seeds.append(seed)
        return "no idea" if len(seeds) < 3 else "1. look"

    prior = LanguagePrior(ScriptedModel(reply), LanguageSettings(kind="generate"))
    (opinion,) = prior.judge([MOMENT])
    assert opinion.scores is not None
    assert opinion.statistics["retries"] == 2.0
    assert len(set(seeds)) == 3


def test_a_prior_that_never_answers_is_counted_and_leaves_the_world_model_alone():
    prior = LanguagePrior(ScriptedModel(["no idea"]), LanguageSettings(kind="generate"))
    opinions = prior.judge([MOMENT, MOMENT])
    assert [each.scores for each in opinions] == [None, None]
    assert all(each.statistics["ok"] == 0.0 for each in opinions)
    assert all(each.statistics["retries"] == 2.0 for each in opinions)
    world = np.array([0.1, 0.2, 0.3, 0.4])
    assert mix_prior(world, opinions[0].scores, PriorSettings()) is world


@pytest.mark.parametrize("settings", [{}, {"reasoning": True}, {"kind": "generate"}])
def test_a_broken_model_is_never_fatal(settings, caplog):
    prior = LanguagePrior(Broken(["-"]), LanguageSettings(**settings))
    (opinion,) = prior.judge([MOMENT])
    assert opinion.scores is None
    prior.judge([MOMENT])
    assert caplog.text.count("the server is gone") == 1


def test_scores_that_are_no_numbers_are_a_failure():
    (opinion,) = LanguagePrior(Nan(["-"]), LanguageSettings()).judge([MOMENT])
    assert opinion.scores is None


@pytest.mark.parametrize("settings", [{}, {"reasoning": True, "max_new_tokens": 40}])
def test_one_prompt_that_does_not_fit_spoils_no_other(settings):
    prior = LanguagePrior(ScriptedModel(["-"], max_context=120), LanguageSettings(**settings))
    huge = Moment("A hall.", "", ("x" * 200,))
    failed, fine = prior.judge([huge, Moment("A hall.", "", COMMANDS)])
    assert failed.scores is None
    assert fine.scores is not None


def test_no_attempt_begins_after_the_time_is_up():
    asked = []

    def reply(prompt: str, seed: int) -> str:
        asked.append(seed)
        return "no idea"

    settings = LanguageSettings(kind="generate", seconds=1e-9, tries=3)
    (opinion,) = LanguagePrior(ScriptedModel(reply), settings).judge([MOMENT])
    assert opinion.scores is None
    assert len(asked) == 1


def test_what_is_generated_follows_from_the_moments_seed(model):
    prior = LanguagePrior(model, LanguageSettings(reasoning=True, max_new_tokens=12))
    one, again, other = (
        prior.judge([moment])[0].prefix_ids.tolist()
        for moment in (MOMENT, MOMENT, Moment("A dark hall.", "", COMMANDS, seed=8))
    )
    assert one == again
    assert one != other
