"""The input rules as pure functions, and against every game's own words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jericho.defines import BINDINGS_DICT

from pz_envs.jericho.commands import (
    MAX_LENGTH,
    RefusedVerbs,
    refusal,
    refused_verbs,
    tidy,
    was_refused,
)
from pz_envs.jericho.games import GAMES

GRAMMAR = "die/q/quit;pause/save/suspen;l/look;save OBJ;purloin OBJ;script on;take OBJ"
INFORM = refused_verbs(GRAMMAR, 9)
INFOCOM = refused_verbs("l/look;restor/resume;rescue/save;save OBJ;record", 6)


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("  go \t north\r\n", "go north"),
        ("look\nnorth", "look north"),
        ("lo\0ok", "lo ok"),
        ("\\x\\look", "x look"),
        ("take “lamp” – now", 'take "lamp" - now'),
        ("prendre l’épée", "prendre l'epee"),
        ("🙂 look", "look"),
        ("\ud800", ""),
        ("look\u2028north", "look north"),
        ("\x1b[2Jlook\x7f", "[2Jlook"),
    ],
)
def test_a_command_becomes_one_printable_line(text: str, command: str) -> None:
    assert tidy(text) == command


@given(st.text(st.characters(codec=None, categories=None)))
def test_nothing_but_printable_ascii_is_left_of_any_text(text: str) -> None:
    command = tidy(text)
    assert command.isascii()
    assert command.isprintable()
    assert "\\" not in command
    assert command == " ".join(command.split())
    assert tidy(command) == command


@pytest.mark.parametrize(
    "command",
    [
        *("save", "SAVE", "save.", "save the game", "restore", "restart", "quit", "Q", "q.", "die"),
        *("script", "script on", "transcript", "transcript off", "unscript", "noscript"),
        *("recording", "recording on", "replay", "look. save", "take lamp then quit", "oops save"),
        *("o save", "troll, restart", "pause", "undo", "take all and script", "save save"),
        *("purloin lamp", "gonear lamp", "#record", "$ve", "transcripts"),
        "x" * (MAX_LENGTH + 1),
        "",
    ],
)
def test_a_refused_command_is_found_however_it_is_put(command: str) -> None:
    assert refusal(command, INFORM) is not None


@pytest.mark.parametrize(
    "command",
    [
        "look",
        "undo rope",
        "take lamp",
        "save cat",
        "say hello",
        "quiet",
        "x" * MAX_LENGTH,
        "open script drawer",
    ],
)
def test_ordinary_commands_pass(command: str) -> None:
    assert refusal(command, INFORM) is None


def test_words_are_compared_at_the_length_the_dictionary_keeps() -> None:
    assert refusal("restoration", INFOCOM) is not None
    assert refusal("resumed", INFOCOM) is not None
    assert refusal("rescue", INFOCOM) is not None
    assert refusal("rescue ford", INFOCOM) is None
    assert refusal("record", INFOCOM) is None
    assert refusal("quiz", INFOCOM) is None
    assert refusal("restoration", INFORM) is None


def test_no_walkthrough_needs_a_refused_command() -> None:
    for game in GAMES:
        bindings = BINDINGS_DICT[game.md5]
        refused = refused_verbs(bindings["grammar"], bindings["max_word_length"])
        assert {"save", "restar"[:6], "quit", "q"} <= {
            word[:6] for word in refused.alone | refused.always
        }
        for command in bindings.get("walkthrough", "").split("/"):
            if command.strip():
                assert refusal(tidy(command), refused) is None, (game.name, command)


def test_a_game_without_debugging_verbs_keeps_their_words() -> None:
    refused: RefusedVerbs = refused_verbs("l/look;climb OBJ", 9)
    assert refusal("tree", refused) is None
    assert refusal("random", refused) is None


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ('I don\'t know the word "flarb".', True),
        ("That's not a verb I recognise.", True),
        ("You can't see any such thing.", True),
        ("Grunk not know what that mean.", True),
        ("[!: Verb error. (This generally means ...", True),
        ("What do you want to open?", True),
        ("Which do you mean, the red book or the blue book?", True),
        ("Taken.\n\nWhat do you want to do now", False),
        ("You can't go that way.", False),
        ("West of House\nYou are standing in an open field.", False),
    ],
)
def test_a_parsers_refusal_is_told_from_an_answer(answer: str, refused: bool) -> None:
    assert was_refused(answer) is refused
