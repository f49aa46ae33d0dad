"""Prompts, conversations and the agents that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pz_agents.algorithms.rows import rows_of
from pz_agents.errors import ModelError
from pz_agents.models.protocol import Completion, GenerateRequest
from pz_agents.models.scripted import ScriptedModel
from pz_agents.prompting import TEMPLATES, BestOfN, Conversation, ZeroShot, find_template
from pz_agents.prompting.presets import PRESETS
from pz_agents.prompting.templates import clip, user_text
from pz_agents.rollout.episode import EpisodeSpec
from pz_agents.rollout.loop import Limits, run_episodes
from pz_agents.sdk.types import Episode, Trajectory, Turn
from pz_envs import FAMILIES, make_env, missing, rows
from pz_envs.countdown.env import CountdownEnv
from pz_envs.errors import ConfigError

CHAT = TEMPLATES["chat"]
COMPACT = TEMPLATES["compact"]


def turn_of(
    observation: str = "You are here.",
    index: int = 0,
    key: str = "e",
    commands: Sequence[str] | None = None,
    env: CountdownEnv | None = None,
    seed: int = 1,
) -> Turn:
    info = {"admissible_commands": commands, "instruction": "The rules."}
    episode = Episode(key=key, env_id="pz/Test-v0", env_seed=0, env=env)
    return Turn(episode, index, observation, info, 0.0, seed)


def reply_of(model: ScriptedModel, text: str, *, stop: bool = True) -> Completion:
    ids = model.encode(text)
    ids = np.append(ids, model.end_of_turn_id).astype(np.int32) if stop else ids
    zeros = np.zeros(len(ids), np.float32)
    return Completion(ids, zeros, text, "stop" if stop else "length", 0)


def said(model: ScriptedModel, ids: np.ndarray) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in model.messages(ids)]


def test_the_chat_prompt_has_rules_format_observation_and_commands() -> None:
    model = ScriptedModel(["x"])
    turn = turn_of(commands=("north", "take lamp"), env=CountdownEnv())
    (role, system), (_, user) = said(model, Conversation(model, CHAT, 9).prompt_ids(turn))
    assert role == "system"
    assert system.startswith("The rules.")
    assert "<think>" in system
    assert "<answer>...</answer>" in system  # the environment's own tag
    assert user == "You are here.\n\nCommands that do something here: north; take lamp"


class _Family(CountdownEnv):
    """Of whichever family it is told."""

    def __init__(self, family: str, tag: str) -> None:
        super().__init__()
        self.family = family  # type: ignore[misc]
        self.reply_tag = tag  # type: ignore[misc]


@pytest.mark.parametrize("family", sorted({*FAMILIES, *PRESETS}))
def test_chat_speaks_as_the_preset_of_every_family_says(family: str) -> None:
    preset = PRESETS[family]
    model = ScriptedModel(["x"])
    turn = turn_of("It is {dark}.", commands=("a b", "c"), env=_Family(family, preset.tag))
    (_, system), (_, user) = said(model, Conversation(model, CHAT, 9).prompt_ids(turn))
    assert system.startswith("The rules.")
    assert preset.advice in system
    assert not preset.reminder or f"<{preset.tag}>...</{preset.tag}>" in preset.reminder
    assert f"<{preset.tag}>...</{preset.tag}>" in system
    listed = preset.commands.format(commands=preset.separator.join(("a b", "c")))
    assert user == preset.user.format(observation="It is {dark}.") + listed + preset.reminder


def _made() -> list[str]:
    """Return the first id of each family that is playable here."""
    found: dict[str, str] = {}
    for row in rows():
        if row.family not in found and missing(row) is None:
            found[row.family] = row.id
    return list(found.values())


@pytest.mark.parametrize("env_id", _made())
def test_a_reply_in_the_format_that_a_preset_asks_for_is_one_that_its_family_reads(
    env_id: str,
) -> None:
    env = make_env(env_id, reply_format="tags")
    try:
        assert env.reply_tag == PRESETS[env.family].tag
        _, info = env.reset(seed=0)
        commands = info["admissible_commands"] or ("1",)
        reply = f"<think>It is so.</think>\n<{env.reply_tag}>{commands[0]}</{env.reply_tag}>"
        assert not env.step(reply)[4]["format_error"]
    finally:
        env.close()


def test_a_second_attempt_has_the_format_and_the_layout_of_the_first() -> None:
    model = ScriptedModel(["x"])
    turn = turn_of(commands=("a", "b"), env=_Family("alfworld", "action"))
    told = replace(CHAT, system=f"{CHAT.system}\n\nLook for {{{{system}}}} and {{{{user}}}} first.")
    first = said(model, Conversation(model, CHAT, 9).prompt_ids(turn))
    second = said(model, Conversation(model, told, 9).prompt_ids(turn))
    assert second[0][1] == f"{first[0][1]}\n\nLook for {{system}} and {{user}} first."
    assert second[1:] == first[1:]


@pytest.mark.parametrize(("history", "most"), [(None, 8), (3, 3), (-1, 11)])
def test_the_history_is_the_familys_unless_one_is_asked_for(history: int | None, most: int) -> None:
    agent = ZeroShot(ScriptedModel(["<action>up</action>"]), template="chat", history=history)
    env = _Family("sokoban", "action")
    seen = 0
    for index in range(12):
        [action] = agent.act([turn_of(f"room {index}", index, env=env)])
        assert action.sample is not None
        shown = said(agent.model, action.sample.prompt_ids)  # type: ignore[arg-type]
        seen = max(seen, sum(role == "user" for role, _ in shown) - 1)
    assert seen == most


def test_the_compact_prompt_is_the_observation_and_the_commands_that_fit() -> None:
    assert user_text(COMPACT, " A room. ", None) == "A room."
    assert user_text(COMPACT, "A room.", ("n", "go up")) == "A room.\n1 n\n2 go up"
    many = [f"command {i}" for i in range(100)]
    text = user_text(COMPACT, "x" * 5000, many)
    assert text.startswith("...xxx")
    assert len(text) <= 120 + 120 + 1
    assert text.endswith("\n9 command 8")


@pytest.mark.parametrize(
    ("reply", "sent"),
    [
        ("<action>2</action>", "<action>go up</action>"),
        ("<think>1</think><action> 1 </action>", "<action>n</action>"),
        ("<action>0</action>", None),
        ("<action>3</action>", None),
        ("<action>\u0662</action>", None),
        ("<action>go up</action>", None),
        ("2", None),
        ("", None),
    ],
)
def test_the_number_of_a_listed_command_stands_for_it(reply: str, sent: str | None) -> None:
    model = ScriptedModel([reply])
    [action] = ZeroShot(model).act([turn_of(commands=("n", "go up"))])
    assert action.text == (reply if sent is None else sent)
    assert action.sample is not None
    assert model.decode(action.sample.token_ids) == reply
    [plain] = ZeroShot(model, template="chat").act([turn_of(commands=("n", "go up"))])
    assert plain.text == reply


def test_braces_in_an_observation_are_only_text() -> None:
    assert user_text(CHAT, "{commands} {0} {", None) == "{commands} {0} {"


@given(st.text(max_size=50), st.integers(0, 60))
def test_clipping_keeps_the_end_within_the_limit(text: str, limit: int) -> None:
    clipped = clip(text, limit)
    assert len(clipped) <= limit or clipped == text
    assert len(text) <= limit or text.endswith(clipped.removeprefix("..."))


def test_an_unknown_template_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean `compact`"):
        find_template("compac")


def test_a_conversation_appends_exactly_what_was_sampled() -> None:
    model = ScriptedModel(["x"])
    conversation = Conversation(model, CHAT, 9)
    first = conversation.prompt_ids(turn_of("one"))
    reply = reply_of(model, "\udcff <action>go</action>")
    conversation.add_reply(reply)
    second = conversation.prompt_ids(turn_of("two", 1))
    held = np.concatenate([first, reply.token_ids])
    assert second[: len(held)].tolist() == held.tolist()
    assert said(model, second)[-1] == ("user", "two")


def test_a_reply_cut_short_is_closed_before_the_next_turn() -> None:
    model = ScriptedModel(["x"])
    conversation = Conversation(model, CHAT, 9)
    conversation.prompt_ids(turn_of("one"))
    conversation.add_reply(reply_of(model, "unfinished", stop=False))
    shown = said(model, conversation.prompt_ids(turn_of("two", 1)))
    assert shown[1:] == [("user", "one"), ("assistant", "unfinished"), ("user", "two")]


@pytest.mark.parametrize("history", [0, 1, 2, 5])
def test_no_more_past_turns_are_shown_than_the_history_allows(history: int) -> None:
    model = ScriptedModel(["x"])
    conversation = Conversation(model, replace(COMPACT, history=history), 9)
    most = 0
    for index in range(12):
        shown = said(model, conversation.prompt_ids(turn_of(f"turn {index}", index)))
        assert shown[-1] == ("user", f"turn {index}")
        users = [text for role, text in shown if role == "user"]
        assert users == [f"turn {i}" for i in range(index + 1 - len(users), index + 1)]
        most = max(most, len(users) - 1)
        conversation.add_reply(reply_of(model, f"reply {index}"))
    assert most == history


def test_a_full_context_starts_afresh_from_the_newest_turns() -> None:
    model = ScriptedModel(["x"], max_context=400)
    conversation = Conversation(model, CHAT, 40)
    fresh = 0
    previous = np.empty(0, np.int32)
    for index in range(20):
        prompt = conversation.prompt_ids(turn_of(f"turn {index}", index))
        assert len(prompt) <= 360
        shown = said(model, prompt)
        assert shown[0][0] == "system"
        assert shown[-1] == ("user", f"turn {index}")
        fresh += previous.tolist() != prompt[: len(previous)].tolist()
        reply = reply_of(model, f"<action>{index}</action>")
        conversation.add_reply(reply)
        previous = np.concatenate([prompt, reply.token_ids])
    assert 1 <= fresh <= 10


def test_an_observation_longer_than_the_context_is_cut() -> None:
    model = ScriptedModel(["x"], max_context=400)
    prompt = Conversation(model, CHAT, 40).prompt_ids(turn_of("long " * 500 + "END"))
    assert len(prompt) <= 360
    assert said(model, prompt)[-1][1].endswith("END")


def test_a_system_message_that_leaves_no_room_is_refused() -> None:
    model = ScriptedModel(["x"], max_context=120)
    with pytest.raises(ModelError, match="compact"):
        Conversation(model, CHAT, 40).prompt_ids(turn_of())
    with pytest.raises(ModelError, match="max_new_tokens=110"):
        Conversation(model, CHAT, 110)


class Counting(ScriptedModel):
    """Counts calls of ``generate``."""

    calls = 0

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self.calls += 1
        return super().generate(requests)


def test_zero_shot_asks_once_for_all_turns_and_records_what_was_sampled() -> None:
    model = Counting(lambda prompt, seed: f"<action>{prompt.split()[-1]} {seed}</action>")
    agent = ZeroShot(model, temperature=0.5)
    turns = [turn_of(f"see {key}", key=key, seed=i) for i, key in enumerate("abc")]
    actions = agent.act(turns)
    assert model.calls == 1
    assert [a.text for a in actions] == [f"<action>{k} {i}</action>" for i, k in enumerate("abc")]
    for turn, action in zip(turns, actions, strict=True):
        assert action.sample is not None
        assert said(model, action.sample.prompt_ids) == [("user", turn.observation)]
        assert model.decode(action.sample.token_ids) == action.text
        assert action.sample.temperature == 0.5


def test_zero_shot_forgets_an_episode_that_ended() -> None:
    agent = ZeroShot(ScriptedModel(["<action>x</action>"]), template="chat")
    agent.act([turn_of("a cave")])
    agent.end(Trajectory("e", "", 0, "", "", 0, (), "", 0, 0, 1, 0, False, True, ""))
    [action] = agent.act([turn_of("two", 1)])
    assert action.sample is not None
    assert "a cave" not in agent.model.decode(action.sample.prompt_ids)


@pytest.mark.parametrize(("template", "rows"), [("chat", 1), ("compact", 3)])
def test_an_episode_becomes_training_rows_with_every_sampled_token(
    template: str, rows: int
) -> None:
    model = ScriptedModel(lambda prompt, seed: f"<answer>{seed % 7}+1</answer>")
    agent = ZeroShot(model, template=template)
    [trajectory] = run_episodes(
        agent,
        [EpisodeSpec("e", "pz/Countdown-v0", 3)],
        make_env=lambda env_id: CountdownEnv(tries=3),
        limits=Limits(turns=5),
        seed=0,
    )
    made = rows_of(trajectory, 1.0)
    assert len(trajectory.steps) == 3
    assert len(made) == rows
    assert sum(int(row.mask.sum()) for row in made) == trajectory.sampled_tokens > 0


def test_a_completion_that_cannot_be_trained_on_leaves_no_sample() -> None:
    class Silent(ScriptedModel):
        def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
            none = np.empty(0, np.float32)
            whole = super().generate(requests)
            return [replace(c, token_ids=none.astype(np.int32), log_probs=none) for c in whole]

    model = Silent(["<action>go</action>"])
    agent = ZeroShot(model, template="chat")
    assert [a.sample for a in agent.act([turn_of("one")])] == [None]
    agent.act([turn_of("two", 1)])
    shown = said(model, agent._conversations["e"].prompt_ids(turn_of("three", 2)))
    assert ("assistant", "<action>go</action>") in shown


class Weighted(ScriptedModel):
    """Gives each reply the log-prob that its own text names."""

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        return [
            replace(c, log_probs=np.full(len(c.token_ids), float(c.text.split("|")[1]), np.float32))
            for c in super().generate(requests)
        ]


def test_best_of_n_plays_the_likeliest_well_formed_reply() -> None:
    replies = ["no tags|-0.1", "<action>a|-2.0|</action>", "<action>b|-1.0|</action>"]
    model = Weighted(replies)
    [action] = BestOfN(model, n=40).act([turn_of()])
    assert action.text == replies[2]
    assert 0 < action.notes["well_formed"] < 40
    assert action.sample is not None
    assert model.decode(action.sample.token_ids) == action.text


def test_best_of_n_without_a_well_formed_reply_plays_the_likeliest() -> None:
    [action] = BestOfN(Weighted(["a|-2.0", "b|-1.0"]), n=20).act([turn_of()])
    assert action.text == "b|-1.0"
    assert action.notes["well_formed"] == 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"history": -2}, "history"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"template": "nope"}, "Allowed"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        ZeroShot(ScriptedModel(["x"]), **options)  # type: ignore[arg-type]


def test_best_of_n_refuses_what_would_make_its_samples_equal() -> None:
    with pytest.raises(ConfigError, match="temperature=0"):
        BestOfN(ScriptedModel(["x"]), n=2, temperature=0)
    with pytest.raises(ConfigError, match="n=0"):
        BestOfN(ScriptedModel(["x"]), n=0)
