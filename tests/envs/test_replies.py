"""Replies: what counts as a command, and that no text can do harm."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pz_envs.replies import parse_reply

_TAGS = ("<think>", "</think>", "<action>", "</action>", "<answer>", "</answer>", "\\boxed{")
_PIECES = st.sampled_from(
    [*_TAGS, "{", "}", "\\{", "\\", " ", "\n", "go north", "打开门", "\ud800", "\0", "<", "/>"]
)


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("<action>go north</action>", "go north"),
        ("  <ACTION > go north\n</Action>", "go north"),
        ("<think>maybe <action>go south</action></think><action>go north</action>", "go north"),
        ("the template opened it</think>\n<action>go north</action>", "go north"),
        ("<think>a<think>b</think>c</think><action>go north</action>", "go north"),
        ("<action>go north</action><think>and then", "go north"),
        ("<action>向北走</action>", "向北走"),
    ],
)
def test_a_tagged_command_is_read_without_complaint(text: str, command: str) -> None:
    for reply_format in ("auto", "tags"):
        reply = parse_reply(text, "action", reply_format)
        assert (reply.command, reply.problem) == (command, None)


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("go north", "go north"),
        ("  打开门 \n", "打开门"),
        ("<think>hm</think>\n\ngo north", "go north"),
        ("I should leave.\n\ngo north\n", "go north"),
        ("```\n1+2\n```", "1+2"),
        ("a < b", "a < b"),
    ],
)
def test_untagged_text_is_its_last_line_in_auto_and_nothing_in_tags(
    text: str, command: str
) -> None:
    reply = parse_reply(text, "action")
    assert (reply.command, reply.problem) == (command, None)
    strict = parse_reply(text, "action", "tags")
    assert strict.command is None
    assert strict.problem == "it has no <action>...</action> tag"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("<think>all is done</think>", "empty"),
        ("<action></action>", "empty"),
        ("<action> \n </action>", "empty"),
        ("<action>go north", "never closed"),
        ("<think>go north", "<think> is never closed"),
        ("<think><action>go north</action>", "<think> is never closed"),
    ],
)
def test_a_reply_without_a_command_says_why(text: str, problem: str) -> None:
    reply = parse_reply(text, "action")
    assert reply.command is None
    assert problem in str(reply.problem)


@pytest.mark.parametrize(
    ("text", "command", "problem"),
    [
        ("<action>a</action><action>b</action>", "b", "2 <action> tags"),
        ("<action><action>a</action></action>", "a", "nested"),
        ("<action>a</action> and <action>b", "a", "never closed"),
    ],
)
def test_repeated_and_nested_tags_are_used_and_reported(
    text: str, command: str, problem: str
) -> None:
    reply = parse_reply(text, "action", "tags")
    assert reply.command == command
    assert problem in str(reply.problem)


@pytest.mark.parametrize(
    ("text", "command"),
    [
        (r"So it is \boxed{(1+2)*3}.", "(1+2)*3"),
        (r"\boxed{1} or rather \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"<answer>\boxed{3}</answer>", "3"),
        (r"<answer>4</answer> \boxed{3}", "4"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"{ an open brace, then \boxed{3}", "3"),
        (r"\boxed{a \} b}", r"a \} b"),
    ],
)
def test_a_box_stands_for_the_answer_tag(text: str, command: str) -> None:
    reply = parse_reply(text, "answer", "tags")
    assert (reply.command, reply.problem) == (command, None)


def test_an_unbalanced_box_is_no_answer_and_a_box_is_no_action() -> None:
    assert parse_reply(r"\boxed{1+{2}", "answer").command is None
    assert parse_reply(r"\boxed{3}", "action", "tags").command is None


@given(st.lists(_PIECES, max_size=40).map("".join) | st.text())
def test_any_text_gives_a_command_or_a_problem(text: str) -> None:
    for tag in ("action", "answer"):
        for reply_format in ("auto", "tags"):
            reply = parse_reply(text, tag, reply_format)
            assert reply.command is not None or reply.problem
            if reply.command is not None:
                assert reply.command == reply.command.strip() != ""
                assert reply.command in text.replace("</think>", "") or "think>" in text.lower()


@given(st.text(alphabet=st.characters(exclude_characters="<>\\{}"), min_size=1))
def test_what_is_between_tags_comes_back_stripped(text: str) -> None:
    reply = parse_reply(f"<think>no</think> so <action>{text}</action>.", "action", "tags")
    assert reply.command == (text.strip() or None)


@pytest.mark.parametrize(
    "piece",
    [
        *_TAGS,
        "{",
        "}",
        "\n",
        "<",
        "<answer>x</answer>",
        "<think></think>",
        "x",
        " ",
        "<think ",
        "\\",
    ],
)
def test_a_megabyte_is_read_in_linear_time(piece: str) -> None:
    text = piece * (1_000_000 // len(piece))
    started = time.perf_counter()
    parse_reply(text, "answer")
    assert time.perf_counter() - started < 5
