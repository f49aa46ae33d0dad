"""Reward functions and reward models: what they see, what they pay, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from pz_agents.errors import AgentError, ModelError, WrongModelError
from pz_agents.models import load_model
from pz_agents.models.tiny import tiny_tokenizer
from pz_agents.sdk.types import Sample, Step, Trajectory
from pz_agents.training.critic import classifier, value_network
from pz_agents.training.player import check
from pz_agents.training.rewards import MAX_SCORE, RewardModel, Rewards, call_rewards, load_function
from pz_agents.training.settings import TrainSettings
from pz_envs.errors import ConfigError

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def policy(micro):
    return load_model(str(micro), device="cpu")


@pytest.fixture(scope="module")
def judge(micro, policy, tmp_path_factory) -> Path:
    """A reward model of random weights whose scores are some tens."""
    folder = tmp_path_factory.mktemp("judge")
    module = value_network(policy.network, "")
    torch.manual_seed(3)
    torch.nn.init.normal_(module.score.weight, std=2.0)
    module.save_pretrained(folder)
    tiny_tokenizer(128).save_pretrained(folder)
    return folder


def episode(policy, replies, key="g/0", **changes: Any) -> Trajectory:
    steps = []
    for reply in replies:
        ids = policy.encode(reply)
        sample = Sample(policy.encode("Go."), ids, np.full(len(ids), -1.0, np.float32))
        steps.append(Step("Go.", reply.upper(), 0.25, 0.25, True, False, sample))
    given: dict[str, Any] = {
        "key": key,
        "env_id": "toy",
        "env_seed": 0,
        "task_id": "t",
        "group_id": "g",
        "attempt": 0,
        "steps": tuple(steps),
        "final_observation": "",
        "reward": 0.25 * len(steps),
        "score": 0.0,
        "max_score": 1.0,
        "score_norm": 0.0,
        "success": False,
        "terminated": True,
        "truncated": "",
        **changes,
    }
    return Trajectory(**given)


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"env": "pz/Countdown-v0", "steps": 1, **changes})


def lengths(completions, **columns):
    return [float(len(text)) for text in completions]


def first_only(prompts, completions):
    return [1.0, *[None] * (len(completions) - 1)]


async def later(completions):
    return [2.0] * len(completions)


def rewards(policy, name: str, **changes: Any) -> Rewards:
    return Rewards(settings(reward_function=f"{__file__}:{name}", **changes), policy)


def test_a_function_sees_replies_as_they_were_sampled_and_pays_the_last_turn(policy):
    (paid,) = rewards(policy, "lengths")([episode(policy, ["north", "up"])])
    assert [step.reward for step in paid.steps] == [0.0, 8.0]  # "north", a line break, "up"
    assert paid.reward == 8.0


def test_the_environments_reward_stays_by_its_weight(policy):
    (paid,) = rewards(policy, "lengths", env_reward=2.0)([episode(policy, ["north", "up"])])
    assert [step.reward for step in paid.steps] == [0.5, 8.5]
    assert paid.reward == 9.0


def test_no_answer_takes_the_episode_out_and_says_so(policy):
    played = [episode(policy, ["a"], key=f"g/{n}") for n in range(2)]
    paid = rewards(policy, "first_only")(played)
    assert [item.status for item in paid] == ["ok", "failed"]
    assert "no reward" in paid[1].error


def test_a_function_may_be_asynchronous(policy):
    (paid,) = rewards(policy, "later")([episode(policy, ["a"])])
    assert paid.reward == 2.0


def test_an_episode_that_failed_before_its_first_turn_is_left_alone(policy):
    failed = replace(episode(policy, []), status="failed", error="broken")
    good = episode(policy, ["ab"])
    assert [item.reward for item in rewards(policy, "lengths")([failed, good])] == [0.0, 2.0]


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (lambda completions: [1.0], r"must return 2 numbers, one a completion; got \[1.0\]"),
        (lambda completions: [1.0, float("nan")], "returned nan"),
        (lambda completions: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_what_is_no_reward_is_refused(function, complaint):
    with pytest.raises(AgentError, match=complaint):
        call_rewards(function, {"completions": ["a", "b"], "prompts": ["p", "q"]})


def test_a_function_that_is_not_there_is_named():
    with pytest.raises(AgentError, match=r"has no `lenghts`.*lengths"):
        load_function(f"{__file__}:lenghts")
    with pytest.raises(ConfigError, match="names no function"):
        load_function("lengths")
    with pytest.raises(ConfigError, match="is a float and no function"):
        load_function("math:pi")


TALKS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": "b" * length}]
    for text, length in (("Go.", 3), ("Longer than the other.", 9), ("Go", 1))
]


def test_a_reward_models_score_is_transformers_own_clipped(judge):
    model = RewardModel(judge, torch.device("cpu"))
    network = AutoModelForSequenceClassification.from_pretrained(judge)
    tokenizer = tiny_tokenizer(128)
    expected = []
    for talk in TALKS:
        ids = tokenizer.encode(
            tokenizer.apply_chat_template(talk, tokenize=False), add_special_tokens=False
        )
        with torch.no_grad():
            expected.append(network(torch.tensor([ids])).logits.item())
    clipped = np.clip(expected, -MAX_SCORE, MAX_SCORE)
    assert len(set(clipped.tolist())) > 1
    np.testing.assert_allclose(model.scores(TALKS), clipped, atol=1e-4)


def test_scores_do_not_depend_on_what_is_scored_together(judge):
    together = RewardModel(judge, torch.device("cpu")).scores(TALKS)
    alone = RewardModel(judge, torch.device("cpu"), budget=1).scores(TALKS)
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_a_function_and_a_model_add_up(policy, judge):
    played = [episode(policy, ["a", "b"]), episode(policy, ["ccc"], key="g/1")]
    one = rewards(policy, "lengths")(played)
    other = Rewards(settings(reward_model=str(judge)), policy)(played)
    both = rewards(policy, "lengths", reward_model=str(judge))(played)
    expected = [left.reward + right.reward for left, right in zip(one, other, strict=True)]
    assert [item.reward for item in both] == pytest.approx(expected)
    assert other[0].reward != other[1].reward


def test_a_language_model_is_no_reward_model(policy, micro):
    with pytest.raises(ModelError, match="no reward model"):
        Rewards(settings(reward_model=str(micro)), policy)


# Which folders are classifiers, told before a run begins.


@pytest.mark.parametrize("setting", ["critic_model", "reward_model"])
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nofolder", "No model `nofolder`"),
        ("nobody/no-such-model", "hf download nobody/no-such-model"),
        ("openai:x@http://127.0.0.1:1/v1", "No model `openai:x"),
    ],
)
def test_a_critic_or_reward_model_that_is_not_there_is_told_without_asking_a_hub(
    policy, micro, setting, spec, words
):
    options = {"critic_model": spec} if setting == "critic_model" else {}
    others = {"reward_model": spec} if setting == "reward_model" else {}
    chosen = settings(algorithm="ppo", model=str(micro), options=options, **others)
    with pytest.raises(ConfigError, match=words) as caught:
        check(chosen, plays=False)
    assert "scripted:" not in str(caught.value)  # what a policy may be, and a classifier may not
    if setting == "critic_model":
        with pytest.raises(WrongModelError, match=words):
            value_network(policy.network, spec)


def test_a_reward_model_must_have_a_head_with_one_score(policy, micro, judge, tmp_path):
    def told(folder) -> str:
        with pytest.raises(WrongModelError) as caught:
            check(settings(model=str(micro), reward_model=str(folder)), plays=False)
        return str(caught.value)

    assert "`tiny` is a language model" in told("tiny")
    assert "Did you mean" not in told("tiny")
    assert "num_labels=1" in told("tiny")  # how to make one
    assert "no reward model" in told(micro)
    module = classifier(judge)
    module.score = torch.nn.Linear(32, 3, bias=False)
    module.config.num_labels = 3
    module.save_pretrained(tmp_path)
    assert "gives 3 scores, not one" in told(tmp_path)
    classifier(judge).save_pretrained(tmp_path)
    assert "no tokenizer" in told(tmp_path)  # transformers would make an empty one
    check(settings(model=str(micro), reward_model=str(judge)), plays=False)


def test_a_critic_may_begin_from_tiny(policy, micro, monkeypatch):
    monkeypatch.setattr("pz_agents.models.tiny.tiny_folder", lambda: micro)
    check(settings(algorithm="ppo", model=str(micro), options={"critic_model": "tiny"}))
    module = value_network(policy.network, "tiny")
    assert not module.score.weight.any()
