"""Playing by hand: from a pipe, and in a terminal with Tab and history."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pz_envs import make_env

_SECONDS = 120
_PLAY = "from pz_envs.cli import main; main()"


def _play(*words: str, typed: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _PLAY, "play", *words],
        input=typed.encode("utf-8", "surrogateescape"),
        capture_output=True,
        timeout=_SECONDS,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def _puzzle(seed: int) -> tuple[str, str]:
    """Return Countdown's observation and its expert's answer."""
    env = make_env("pz/Countdown-v0")
    observation, _ = env.reset(seed=seed)
    answer = env.expert_action()
    assert answer is not None
    return observation, answer


def test_lines_from_a_pipe_step_undo_and_quit() -> None:
    puzzle, answer = _puzzle(3)
    typed = "/commands\n/undo\n1+1\n2\n/undo\n/hint\n/quit\n9+9\n"
    lines = _play("pz/Countdown-v0", "--seed", "3", typed=typed).splitlines()
    assert lines[lines.index(puzzle) :] == [
        puzzle,
        "> /commands",
        "No list of commands is known here.",
        "> /undo",
        "There is nothing to undo.",
        "> 1+1",
        "It uses 1 1.",
        "It is over.",
        "> 2",
        "The episode is over: /undo, /restart or /quit",
        "> /undo",
        puzzle,
        "> /hint",
        answer,
        "> /quit",
        "score 0 of 1 after 0 steps",
    ]


def test_the_end_of_the_input_is_the_end_and_a_win_is_told() -> None:
    _, answer = _puzzle(3)
    shown = _play("pz/Countdown-v0", "--seed", "3", typed=f"{answer}\n")
    assert "[reward +1; score 1 of 1]\nYou won.\n" in shown
    assert shown.endswith("score 1 of 1 after 1 steps\n")


def test_a_slash_that_is_no_word_of_ours_goes_to_the_environment() -> None:
    shown = _play("pz/Points24-v0", typed="/\n/restart\n/help\n")
    assert "Formula: /\n" in shown
    assert shown.count("Formula: (empty)") == 2
    assert "/hint      show what the expert would do" in shown


def test_commands_are_listed_where_they_are_known() -> None:
    assert "> /commands\nstand\nhit\n" in _play("pz/Blackjack-v0", typed="/commands\n")
    none = _play("pz/Blackjack-v0", "--no-commands", typed="/commands\n")
    assert "No list of commands is known here." in none


def test_a_transcript_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "played.txt"
    puzzle, _ = _puzzle(3)
    typed = "1+1\n\udcff\n"
    for _ in range(2):
        _play("pz/Countdown-v0", "--seed", "3", "--transcript", str(path), typed=typed)
    text = path.read_text()
    assert text.count("# pz/Countdown-v0, seed 3\n") == 2
    assert text.count(f"\n{puzzle}\n> 1+1\nIt uses 1 1.\nIt is over.\n> ?\n") == 2
    assert "\x1b" not in text


def test_a_transcript_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    where = str(tmp_path / "none" / "t.txt")
    done = subprocess.run(
        [sys.executable, "-c", _PLAY, "play", "pz/Countdown-v0", "--transcript", where],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    assert done.returncode == 2
    assert "cannot write the transcript" in done.stderr


class _Terminal:
    """A program in a terminal of its own."""

    def __init__(self, cache: Path, *words: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PLAY, "play", *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "PZ_CACHE": str(cache), "TERM": "xterm", "NO_COLOR": ""},
            start_new_session=True,
        )
        os.close(theirs)
        self._seen = ""

    def expect(self, pattern: str) -> str:
        """Read until ``pattern`` appears in what is new; returns and forgets it all."""
        end = time.monotonic() + _SECONDS
        while not re.search(pattern, self._seen):
            assert time.monotonic() < end, f"{pattern!r} is not in {self._seen!r}"
            if select.select([self._ours], [], [], 1)[0]:
                try:
                    self._seen += os.read(self._ours, 65536).decode(errors="replace")
                except OSError:
                    pytest.fail(f"ended before {pattern!r}: {self._seen!r}")
        seen, self._seen = self._seen, ""
        return seen

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def test_in_a_terminal_tab_completes_a_command_and_the_history_stays(tmp_path: Path) -> None:
    pytest.importorskip("readline")
    terminal = _Terminal(tmp_path, "pz/Blackjack-v0")
    try:
        terminal.expect("You: .*\r?\n> ")
        terminal.type("sta\t\n")
        shown = terminal.expect("stand\r?\nYou .*Dealer: [\\s\\S]*> ")
        assert "\x1b[1" in shown  # the end is bold
        terminal.type("/quit\n")
        terminal.expect("after 1 steps")
        assert terminal.process.wait(_SECONDS) == 0
    finally:
        terminal.close()
    assert "stand" in (tmp_path / "play_history").read_text()
    terminal = _Terminal(tmp_path, "pz/Blackjack-v0")
    try:
        terminal.expect("> ")
        terminal.type("\x1b[A\x1b[A\n")  # two lines up: before /quit came stand
        terminal.expect("Dealer: .*You: [\\s\\S]*> $")
        terminal.type("\x04")
        terminal.expect("after 1 steps")
    finally:
        terminal.close()
