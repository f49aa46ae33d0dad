"""Few-shot, ReAct, Reflexion and self-consistency: what is asked, what is played, what it costs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from pz_agents.errors import AgentError
from pz_agents.models import load_model
from pz_agents.models.protocol import Completion, GenerateRequest
from pz_agents.models.scripted import ScriptedModel
from pz_agents.prompting import ZeroShot
from pz_agents.prompting.fewshot import FewShot, expert_examples
from pz_agents.prompting.react import ReAct, as_tagged
from pz_agents.prompting.reflexion import Reflexion
from pz_agents.prompting.several import BestOfN, SelfConsistency
from pz_agents.rollout import EpisodeSpec, Limits, run_episodes
from pz_agents.sdk import Agent, Episode, Trajectory, Turn, check_agent, load_agent
from pz_envs import make_env
from pz_envs.catalog import find, missing
from pz_envs.errors import ConfigError
from pz_envs.replies import parse_reply
from pz_envs.textenv import Outcome, TextEnv

COUNTDOWN = "pz/Countdown-v0"
LINE = "pz/NumberLine-v0"
NAMES = ("few-shot", "react", "reflexion", "self-consistency", "best-of-n")


class Noted(ScriptedModel):
    """Counts what it is asked and what it says."""

    def __init__(self, replies, **options) -> None:
        super().__init__(replies, **options)
        self.requests: list[GenerateRequest] = []
        self.completions: list[Completion] = []

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        completions = super().generate(requests)
        self.requests += requests
        self.completions += completions
        return completions

    @property
    def read(self) -> int:
        return sum(len(request.prompt_ids) for request in self.requests)

    @property
    def sampled(self) -> int:
        return sum(len(completion.token_ids) for completion in self.completions)

    def prompt(self, number: int) -> list[tuple[str, str]]:
        shown = self.messages(self.requests[number].prompt_ids)
        return [(message["role"], message["content"]) for message in shown]


def play(
    agent: Agent, env_id: str = COUNTDOWN, episodes: int = 1, **limits: int
) -> list[Trajectory]:
    played = run_episodes(
        agent,
        [EpisodeSpec(str(number), env_id, number) for number in range(episodes)],
        make_env=lambda name: make_env(name, split="eval", admissible_commands=True),
        limits=Limits(**{"turns": 4, **limits}),
        seed=0,
    )
    return sorted(played, key=lambda item: int(item.key))


def turn_of(env_id: str = COUNTDOWN, seed: int = 0, index: int = 0) -> Turn:
    env = make_env(env_id)
    observation, info = env.reset(seed=seed)
    return Turn(Episode("e", env_id, seed, env=env), index, observation, info, 0.0, seed=1)


# All of them.


@pytest.mark.parametrize("name", NAMES)
def test_each_plays_countdown_with_tiny(name: str) -> None:
    agent = load_agent(name, model=load_model("tiny"))
    trajectories = play(agent, episodes=3)
    assert [item.status for item in trajectories] == ["ok"] * 3
    assert all(item.sampled_tokens > 0 for item in trajectories)
    again = play(load_agent(name, model=load_model("tiny")), episodes=3)
    assert [[step.action for step in item.steps] for item in again] == [
        [step.action for step in item.steps] for item in trajectories
    ]


@pytest.mark.parametrize("name", NAMES)
def test_each_keeps_the_contract_of_agents(name: str) -> None:
    model = ScriptedModel(["<action>left</action>", "Thought: a\nAction: right"])
    check_agent(load_agent(name, model=model), LINE)


@pytest.mark.parametrize("name", NAMES)
def test_every_token_read_and_sampled_is_counted(name: str) -> None:
    model = Noted(["<answer>1+1</answer>", "no answer", "<answer>2*3</answer>"], template="chat")
    (trajectory,) = play(load_agent(name, model=model))
    assert trajectory.sampled_tokens == model.sampled
    assert trajectory.prompt_tokens == model.read


# Self-consistency.


class Spoken(ScriptedModel):
    """Says its replies in turn, whatever the seed."""

    def __init__(self, replies: Sequence[str]) -> None:
        super().__init__(lambda text, seed: next(left))
        left = iter(replies)


def voted(replies: Sequence[str], env_id: str = COUNTDOWN) -> tuple[str, Mapping[str, int]]:
    [action] = SelfConsistency(Spoken(replies), n=len(replies)).act([turn_of(env_id)])
    return action.text, action.notes


def test_the_majority_is_of_answers_not_of_words() -> None:
    replies = [
        "<answer>9</answer>",
        "<think>a</think><answer>1 + 2</answer>",
        "<think>b</think><answer>1+2</answer>",
    ]
    text, notes = voted(replies)
    assert text == replies[1]
    assert notes["votes"] == 2
    assert notes["other_tokens"] == len(replies[0]) + 1 + len(replies[2]) + 1


@pytest.mark.parametrize(
    ("replies", "chosen", "votes"),
    [
        (["3", "0.5", "1/2"], 1, 2),
        (["1,000", "7", "1000.0"], 0, 2),
        (["5", "6"], 0, 1),
        (["x", "1/0", "1/0"], 1, 2),
        (["1e999999999", "2", "2"], 1, 2),
    ],
)
def test_numbers_agree_by_value_and_a_tie_goes_to_the_first(
    replies: list[str], chosen: int, votes: int
) -> None:
    tagged = [f"<answer>{reply}</answer>" for reply in replies]
    text, notes = voted(tagged)
    assert (text, notes["votes"]) == (tagged[chosen], votes)


def test_commands_agree_whatever_their_case_and_spaces() -> None:
    replies = ["<action>+</action>", "<action>Go  north</action>", "<action>go north</action>"]
    text, notes = voted(replies, LINE)
    assert (text, notes["votes"]) == (replies[1], 2)


def test_replies_without_a_tag_have_no_vote() -> None:
    text, notes = voted(["well", "well", "<answer>4</answer>"])
    assert (text, notes["votes"]) == ("<answer>4</answer>", 1)
    text, notes = voted(["well", "hm"])
    assert (text, notes["votes"]) == ("well", 0)


def test_candidates_are_counted_against_the_limit_on_tokens() -> None:
    model = Noted(["<action>x</action>"])
    (trajectory,) = play(SelfConsistency(model, n=5), LINE, turns=9, tokens=100)
    assert trajectory.truncated == "tokens"
    assert trajectory.sampled_tokens == model.sampled == 5 * 19 * len(trajectory.steps)


def test_best_of_n_tells_what_its_candidates_cost() -> None:
    model = Noted(["<answer>1</answer>"])
    [action] = BestOfN(model, n=3).act([turn_of()])
    assert action.notes["other_tokens"] == 2 * 19
    assert action.notes["other_prompt_tokens"] == 2 * len(model.requests[0].prompt_ids)


# ReAct.


@pytest.mark.parametrize(
    ("reply", "sent"),
    [
        (
            "Thought: It is dark.\nAction: light lamp",
            "<think>It is dark.</think>\n<action>light lamp</action>",
        ),
        (
            "Thought: a\nb\naction : <action>go</action>\nObservation: won\nAction: stop",
            "<think>a\nb</think>\n<action>go</action>",
        ),
        ("Thought: </think> hm\nAction: wait", "<think>hm</think>\n<action>wait</action>"),
        ("<think>x</think><action>go</action>", "<think>x</think><action>go</action>"),
        ("Thought: nothing to do", "<think>nothing to do</think>"),
        ("Thought: a\nObservation: b\nAction: c", "<think>a</think>"),
        ("", "<think></think>"),
    ],
)
def test_thought_and_action_reach_the_environment_in_its_tags(reply: str, sent: str) -> None:
    assert as_tagged(reply, "action") == sent


def test_what_is_all_thought_is_a_format_error() -> None:
    env = make_env(COUNTDOWN)
    env.reset(seed=0)
    *_, info = env.step(as_tagged("Thought: 1+1 looks good", "answer"))
    assert info["format_error"]


def test_react_asks_for_both_lines_and_keeps_its_thoughts_in_view() -> None:
    model = Noted(["Thought: to the right.\nAction: stay"], template="chat")
    play(ReAct(model), LINE, turns=3)
    (role, system), *turns = model.prompt(2)
    assert role == "system"
    assert "Thought: what the last observation tells you" in system
    assert "<think>" not in system
    assert [role for role, _ in turns] == ["user", "assistant"] * 2 + ["user"]
    assert [text for role, text in turns if role == "assistant"] == [
        "Thought: to the right.\nAction: stay"
    ] * 2
    assert all(text.endswith("Thought: and then Action:") for role, text in turns if role == "user")


def test_the_history_of_react_can_be_bounded() -> None:
    model = Noted(["Thought: a\nAction: stay"], template="chat")
    play(ReAct(model, history=0), LINE, turns=3)
    assert [role for role, _ in model.prompt(2)] == ["system", "user"]


# Few-shot.


def test_the_examples_are_an_experts_on_other_instances() -> None:
    model = Noted(["<answer>1</answer>"], template="chat")
    (trajectory,) = play(FewShot(model, examples=2))
    (_, system), (_, user) = model.prompt(0)
    assert system.count("Example ") == 2
    shown = trajectory.steps[0].notes["examples"]
    assert len(set(shown)) == 2
    assert trajectory.task_id not in shown
    assert trajectory.steps[0].observation in user
    assert trajectory.steps[0].observation not in system
    for number in (0, 1):
        example = next(item for item in _pool(COUNTDOWN, 3) if item.task_id == shown[number])
        (turn,) = example.turns
        assert f"{turn.observation}\nReply: <answer>{turn.command}</answer>" in system


def _pool(env_id: str, number: int, turns: int = 12):
    found = expert_examples(find(env_id), turns, commands=False)
    return [next(found) for _ in range(number)]


def test_the_examples_of_an_environment_are_always_the_same() -> None:
    assert _pool(LINE, 3) == _pool(LINE, 3)
    assert len({item.task_id for item in _pool(LINE, 3)}) == 3


def test_what_the_expert_did_solves_its_example() -> None:
    (example, *_) = _pool(COUNTDOWN, 1)
    env = make_env(COUNTDOWN, split="train")
    for seed in range(1000):
        if env.reset(seed=seed)[1]["task_id"] == example.task_id:
            break
    numbers = sorted(int(n) for n in _numbers(example.turns[0].observation))
    assert sorted(int(n) for n in _numbers(example.turns[0].command)) == numbers


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text.split("Target")[0])


def test_an_instance_is_never_an_example_for_itself() -> None:
    own = _pool(LINE, 1)[0]
    agent = FewShot(ScriptedModel(["x"], template="chat"), examples=1)
    first = turn_of(LINE)
    info = {**first.info, "task_id": own.task_id}
    [action] = agent.act([Turn(first.episode, 0, "see", info, 0.0, 1)])
    assert action.notes["examples"] == [_pool(LINE, 2)[1].task_id]


@pytest.mark.skipif(missing(find("pz/Detective-v0")) is not None, reason="no story file is here")
def test_a_games_examples_are_other_games() -> None:
    pool = _pool("pz/Detective-v0", 2, turns=2)
    assert pool[0].task_id == "detective"
    assert pool[1].task_id != "detective"


def test_numbered_commands_are_shown_as_numbers_in_examples_too() -> None:
    model = Noted(["<action>1</action>"])  # its template is the compact one
    play(FewShot(model, examples=1), LINE, turns=1)
    ((_, system), (_, user)) = model.prompt(0)
    assert "\n1 " in user
    replies = [line for line in system.splitlines() if line.startswith("Reply: ")]
    assert replies
    assert all(parse_reply(line[7:], "action", "tags").command.isdigit() for line in replies)


def test_examples_take_no_more_than_half_of_the_room() -> None:
    model = Noted(["<answer>1</answer>"], max_context=900)
    (trajectory,) = play(FewShot(model, examples=8, max_new_tokens=50))
    (_, system), _ = model.prompt(0)
    assert 0 < len(system) <= 425
    assert 1 <= len(trajectory.steps[0].notes["examples"]) < 8


def test_no_expert_anywhere_is_said() -> None:
    agent = FewShot(ScriptedModel(["x"]), examples=1)
    agent._pools[COUNTDOWN] = ()
    with pytest.raises(AgentError, match="few-shot finds no expert's episode"):
        agent.act([turn_of()])


# Reflexion.


class Guess(TextEnv):
    """Three guesses at a colour; the episode ends with the third."""

    family = "guess"

    def _start(self, seed, options):
        self._task_id, self._max_score, self._instruction = f"guess-{seed}", 1.0, "Guess."
        self.guesses = 0
        return Outcome("Which colour?", 0.0)

    def _advance(self, command):
        self.guesses += 1
        right = command == "blue"
        return Outcome(
            "Yes." if right else "No.",
            float(right),
            success=right,
            terminated=right or self.guesses == 2,
        )


def reflexion(model: ScriptedModel, episodes: int = 1, **options: int) -> list[Trajectory]:
    played = run_episodes(
        Reflexion(model, **options),
        [EpisodeSpec(str(number), "pz/Guess-v0", number, attempt=0) for number in range(episodes)],
        make_env=lambda name: Guess(),
        limits=Limits(turns=5),
        seed=0,
        concurrency=2,
    )
    return sorted(played, key=lambda item: int(item.key))


def mind(text: str, seed: int) -> str:
    if text.endswith("New plan:"):
        return "Red was wrong; say blue."
    return "<action>blue</action>" if "say blue" in text else "<action>red</action>"


def test_a_lesson_is_read_in_the_next_attempt_and_success_ends_the_episode() -> None:
    model = Noted(mind, template="chat")
    (trajectory,) = reflexion(model, attempts=4)
    assert trajectory.success
    assert trajectory.score == 1.0
    assert [step.action for step in trajectory.steps] == ["<action>red</action>"] * 2 + [
        "<action>blue</action>"
    ]
    first, second = (step.notes for step in trajectory.steps if step.notes)
    assert (first["attempt"], first["attempt_score"], first["attempt_success"]) == (0, 0.0, False)
    assert (second["attempt"], second["attempt_success"]) == (1, True)
    assert second["reflection"] == "Red was wrong; say blue."
    asked = model.prompt(2)
    assert [role for role, _ in asked] == ["system", "user"]
    assert asked[1][1] == (
        "Rules: Guess.\nStep 0\nObservation: Which colour?\nReply: <action>red</action>\n"
        "Step 1\nObservation: No.\nReply: <action>red</action>\n"
        "End: No.\nFeedback: no success, reward 0, steps 2, the episode ended\n\nNew plan:"
    )
    assert "You wrote then:\n\nRed was wrong; say blue.\n\nUse it" in model.prompt(3)[0][1]
    assert "You wrote then" not in model.prompt(0)[0][1]


def test_every_attempt_and_every_reflection_is_counted() -> None:
    model = Noted(mind, template="chat")
    (trajectory,) = reflexion(model, attempts=4)
    assert len(model.requests) == 4  # two guesses, a reflection, a guess
    assert trajectory.sampled_tokens == model.sampled
    assert trajectory.prompt_tokens == model.read


def test_attempts_end_and_the_newest_lessons_stay() -> None:
    count = iter(range(100))

    def stubborn(text: str, seed: int) -> str:
        return f"lesson {next(count)}" if text.endswith("New plan:") else "<action>red</action>"

    model = Noted(stubborn, template="chat")
    (trajectory,) = reflexion(model, attempts=5, memory=2)
    assert not trajectory.success
    assert len(trajectory.steps) == 10
    attempts = [step.notes for step in trajectory.steps if "attempt" in step.notes]
    assert [notes["attempt"] for notes in attempts] == [0, 1, 2, 3, 4]
    system = model.prompt(-1)[0][1]
    assert "lesson 2\n\nlesson 3" in system
    assert "lesson 1" not in system


def test_the_first_attempt_is_the_episode_that_zeroshot_plays() -> None:
    def moody(text: str, seed: int) -> str:
        return f"<action>red {seed % 1000}</action>"

    together = reflexion(Noted(moody, template="chat"), episodes=5, attempts=2)
    alone = run_episodes(
        ZeroShot(Noted(moody, template="chat")),
        [EpisodeSpec(str(number), "pz/Guess-v0", number) for number in range(5)],
        make_env=lambda name: Guess(),
        limits=Limits(turns=5),
        seed=0,
        concurrency=2,
    )
    plain = sorted(alone, key=lambda item: int(item.key))
    for tried, zero in zip(together, plain, strict=True):
        own = tried.steps[: len(zero.steps)]
        assert [step.action for step in own] == [step.action for step in zero.steps]
        for mine, theirs in zip(own, zero.steps, strict=True):
            assert np.array_equal(mine.sample.prompt_ids, theirs.sample.prompt_ids)
        assert own[0].notes["attempt_score"] == zero.score_norm
        assert tried.steps[len(zero.steps)].action != own[0].action  # another stream


def test_an_attempt_that_breaks_fails_the_episode() -> None:
    class Breaking(Guess):
        def _advance(self, command):
            raise RuntimeError("boiler")

    (trajectory,) = run_episodes(
        Reflexion(ScriptedModel(mind), attempts=3),
        [EpisodeSpec("0", "pz/Guess-v0", 0)],
        make_env=lambda name: Breaking(),
        limits=Limits(),
        seed=0,
    )
    assert trajectory.status == "failed"
    assert "boiler" in (trajectory.error or "")


@pytest.mark.parametrize(
    ("agent", "options"),
    [
        (Reflexion, {"attempts": 0}),
        (Reflexion, {"memory": 0}),
        (FewShot, {"examples": 0}),
        (FewShot, {"turns": 0}),
        (SelfConsistency, {"temperature": 0}),
        (ReAct, {"history": -2}),
    ],
)
def test_settings_out_of_range_are_refused(agent, options) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        agent(ScriptedModel(["x"]), **options)
