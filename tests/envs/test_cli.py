"""The command line in its own process: what it prints and how it exits."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import pz_envs
from pz_envs import catalog, datasets
from pz_envs.cli import app
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
    playable = {line.split()[0] for line in lines[:-1] if line.endswith(" playable")}
    assert {row.id for row in pz_envs.rows() if row.dataset is None and not row.extra} <= playable
    assert lines[-1] == f"{len(playable)} of {len(pz_envs.rows())} playable"
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


def _doctor(**environment: str) -> tuple[int, dict[str, dict[str, str]]]:
    done = _run("doctor", "--json", **environment)
    return done.returncode, {row["name"]: row for row in json.loads(done.stdout)}


def test_doctor_names_missing_data_and_missing_java_with_what_mends_them(
    nothing: dict[str, str],
) -> None:
    _, found = _doctor(**nothing, PATH="", JAVA_HOME="")
    assert found["java"]["state"] != "ok"
    assert found["java"]["mend"] == "sudo apt-get install openjdk-17-jre-headless"
    for name in datasets.DATASETS:
        row = found[f"data {name}"]
        assert row["state"] == "optional"
        assert row["detail"].startswith("0 of ")
        assert row["mend"] == f"pz-envs data get {name}"
    assert found["play countdown"]["state"] == "ok"
    lines = _run("doctor", **nothing, PATH="", JAVA_HOME="").stdout
    assert "pz-envs data get countdown" in lines
    assert "sudo apt-get install openjdk-17-jre-headless" in lines


def test_doctor_fails_when_jericho_is_here_and_no_game_is(nothing: dict[str, str]) -> None:
    pytest.importorskip("jericho")
    code, found = _doctor(**nothing)
    assert code == 1
    assert found["play jericho"]["state"] == "missing"
    assert "pz-envs data get" in found["play jericho"]["detail"]


def test_doctor_names_a_data_root_that_is_no_folder(tmp_path: Path) -> None:
    code, found = _doctor(PZ_DATA=str(tmp_path / "nowhere"))
    assert code == 1
    assert found["data"]["state"] == "missing"
    assert found["data"]["mend"] == "unset PZ_DATA"


@pytest.mark.data
def test_doctor_is_content_without_a_compiler_when_a_game_is_here() -> None:
    if find_file("jericho", "detective.z5") is None:
        pytest.skip("the jericho data set is not here")
    _, found = _doctor(PATH="")
    assert found["gcc"]["state"] == "optional"
    assert "apt-get install gcc" in found["gcc"]["mend"]
    if importlib.util.find_spec("jericho") is not None:
        assert found["play jericho"]["state"] == "ok"


def test_check_reports_rules_and_what_it_could_not_check(nothing: dict[str, str]) -> None:
    done = _run("check", "pz/Countdown-v0", "pz/NumberLine-v0", "-j", "2", **nothing)
    assert done.returncode == 0, done.stdout
    for env_id in ("pz/Countdown-v0", "pz/NumberLine-v0"):
        assert re.search(rf"^{env_id}: \d+ rules hold", done.stdout, re.MULTILINE)
    assert "2 ids hold, 0 failed, 0 are not here" in done.stdout
    assert re.search(r"gymcards\D+1\D+0\D+0\D", done.stdout)
    done = _run("check", "pz/Detective-v0", **nothing)
    assert done.returncode == 1
    assert "not here" in done.stdout


def test_check_all_passes_over_what_is_not_here(
    nothing: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in nothing.items():
        monkeypatch.setenv(name, value)
    some = (pz_envs.find("pz/NumberLine-v0"), pz_envs.find("pz/Detective-v0"))
    monkeypatch.setattr(catalog, "rows", lambda: some)
    done = CliRunner().invoke(app, ["check", "--all", "-j", "1"])
    assert done.exit_code == 0, done.output
    assert "pz/Detective-v0: not here. " in done.output
    assert "1 ids hold, 0 failed, 1 are not here" in done.output
