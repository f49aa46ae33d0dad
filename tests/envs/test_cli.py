"""The command line in its own process: what it prints and how it exits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pz_envs
from pz_envs.datasets import find_file


def _run(*words: str, typed: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from pz_envs.cli import main; main()", *words],
        input=typed,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.fixture
def nothing(tmp_path: Path) -> dict[str, str]:
    """Variables of a machine without data."""
    (tmp_path / "data").mkdir()
    return {"PZ_DATA": str(tmp_path / "data"), "PZ_CACHE": str(tmp_path / "cache")}


def test_help_names_every_verb() -> None:
    done = _run("--help")
    assert done.returncode == 0
    for verb in ("list", "play", "data", "doctor", "check"):
        assert f"\n  {verb} " in done.stdout


def test_list_says_what_is_playable_and_what_is_missing(nothing: dict[str, str]) -> None:
    done = _run("list", **nothing)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["pz/Countdown-v0", "countdown", "playable"]
    without_data = [row for row in pz_envs.rows() if row.dataset is None]
    assert lines[-1] == f"{len(without_data)} of {len(pz_envs.rows())} playable"
    assert any(line.startswith("pz/Zork1-v0") and "pz-envs data get" in line for line in lines)


def test_list_as_json_can_be_cut_to_a_family() -> None:
    table = json.loads(_run("list", "--family", "countdown", "--json").stdout)
    assert table == [
        {"id": "pz/Countdown-v0", "family": "countdown", "metric": "success", "missing": None}
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("list", "--family", "jerico"), "Did you mean `jericho`"),
        (("play", "pz/Countdwn-v0"), "Did you mean `pz/Countdown-v0`"),
        (("data", "get", "countdwn"), "Did you mean `countdown`"),
        (("check",), "pz-envs check pz/Countdown-v0"),
        (("chekc",), "No such command"),
        (("play", "pz/Countdown-v0", "--seed", "-1"), "--seed"),
    ],
)
def test_wrong_usage_exits_2_and_says_why(words: tuple[str, ...], said: str) -> None:
    done = _run(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_of_the_machine_is_one_line_and_exits_1(tmp_path: Path) -> None:
    done = _run("data", "path", PZ_DATA=str(tmp_path / "nowhere"))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: PZ_DATA is ")


def test_play_steps_undoes_and_quits() -> None:
    done = _run("play", "pz/Countdown-v0", "--seed", "3", typed="?\n:undo\n1+1\n2\n:undo\n:quit\n")
    assert done.returncode == 0, done.stderr
    shown = done.stdout.replace("> ", "").splitlines()
    start = shown.index("no list of commands here") - 1
    puzzle = shown[start]
    assert puzzle.startswith("Numbers: ")
    assert shown[start + 2 :] == [
        "nothing to undo",
        "It uses 1 1.",
        "It is over.",
        "the episode is over; :undo or :quit",
        puzzle,
        "score 0 of 1 after 0 steps",
    ]


def test_play_ends_with_the_input_and_tells_of_success() -> None:
    from pz_envs import make_env

    env = make_env("pz/Countdown-v0")
    env.reset(seed=3)
    done = _run("play", "pz/Countdown-v0", "--seed", "3", typed=f"{env.expert_action()}\n")
    assert done.returncode == 0
    assert "[reward +1; score 1 of 1]\nYou won." in done.stdout


def test_play_says_how_to_get_a_missing_story(nothing: dict[str, str]) -> None:
    pytest.importorskip("jericho")
    done = _run("play", "pz/Detective-v0", **nothing)
    assert done.returncode == 1
    assert "pz-envs data get jericho/detective.z5" in done.stderr


def test_data_lists_and_shows_its_folder(nothing: dict[str, str]) -> None:
    done = _run("data", "list", **nothing)
    assert "zork_mit" in done.stdout
    assert "0/1 files here" in done.stdout
    assert "MIT" in done.stdout
    assert _run("data", "path", **nothing).stdout.strip() == nothing["PZ_DATA"]


def test_doctor_fails_when_jericho_is_here_and_no_game_is(nothing: dict[str, str]) -> None:
    pytest.importorskip("jericho")
    done = _run("doctor", **nothing)
    assert done.returncode == 1
    assert "MISSING  jericho games" in done.stdout
    assert "pz-envs data get zork_mit" in done.stdout


@pytest.mark.data
def test_doctor_is_content_without_a_compiler_when_a_game_is_here() -> None:
    if find_file("jericho", "detective.z5") is None:
        pytest.skip("the jericho data set is not here")
    done = _run("doctor", PATH="")
    assert done.returncode == 0, done.stdout
    assert "-        gcc" in done.stdout
    assert "apt-get install gcc" in done.stdout


def test_check_reports_rules_and_what_it_could_not_check(nothing: dict[str, str]) -> None:
    done = _run("check", "pz/Countdown-v0", **nothing)
    assert done.returncode == 0
    assert "rules hold" in done.stdout
    done = _run("check", "pz/Detective-v0", **nothing)
    assert done.returncode == 1
    assert "not checked" in done.stdout
