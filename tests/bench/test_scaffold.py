"""`pz-bench init agent`: what it writes works unchanged, in its own test and in a table."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pz_agents.sdk import load_agent, needs_model
from pz_bench.cli import main
from pz_bench.scaffold import write_agent
from pz_envs.errors import ConfigError

PZ_BENCH = Path(sys.executable).with_name("pz-bench")


def run(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    ours = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    command = [str(word) for word in words]
    return subprocess.run(command, cwd=cwd, env=ours, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("with_model", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_agent_unchanged_passes_its_own_test_and_appears_in_a_table(tmp_path, with_model):
    model = ["--with-model"] if with_model else []
    made = run(PZ_BENCH, "init", "agent", "rover", *model, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    folder = tmp_path / "rover"
    tested = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ".", cwd=folder)
    assert tested.returncode == 0, tested.stdout
    assert "1 passed" in tested.stdout
    agent = "./rover.py:Rover"
    model = ["--model", "tiny"] if with_model else []
    measured = run(
        PZ_BENCH, "run", "-a", agent, *model, "-e", "pz/NumberLine-v0", "-n", 2, "-j", 1,
        "--suite", "mine", cwd=folder,
    )  # fmt: skip
    assert measured.returncode == 0, measured.stderr
    table = (folder / "leaderboards" / "mine.md").read_text()
    assert "rover.py:Rover" in table
    cells = json.loads(run(PZ_BENCH, "ls", "--json", cwd=folder).stdout)
    assert [(cell["status"], cell["episodes"]) for cell in cells] == [("done", 2)]


def test_what_was_written_is_told_as_json(tmp_path, capsys):
    assert main(["init", "agent", "rover", "--in", str(tmp_path), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["written"]
    assert str(tmp_path / "rover" / "rover.py") in written
    assert all(Path(path).is_file() for path in written)


def test_its_entry_point_names_the_agent_that_was_written(tmp_path, monkeypatch):
    agent, *_ = write_agent("rover", tmp_path)
    project = tomllib.loads((agent.parent / "pyproject.toml").read_text())
    (name, target), *others = project["project"]["entry-points"]["pz_agents.agents"].items()
    assert not others
    assert name == "rover"
    monkeypatch.syspath_prepend(agent.parent)
    assert type(load_agent(target)).__name__ == "Rover"
    del sys.modules["rover"]


def test_its_readme_shows_commands_that_fit_it(tmp_path):
    agent, *_ = write_agent("rover", tmp_path, with_model=True)
    assert needs_model(f"{agent}:Rover")
    readme = (agent.parent / "README.md").read_text()
    assert "pz-bench run -a ./rover.py:Rover --model tiny -e" in readme
    assert "$" not in readme


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("My Agent", "small letters"),
        ("1st", "small letters"),
        ("../out", "small letters"),
        ("random", "already"),
        ("json", "already"),
        ("numpy", "already"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused(tmp_path, name, complaint):
    with pytest.raises(ConfigError, match=complaint):
        write_agent(name, tmp_path)
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    agent, *_ = write_agent("rover", tmp_path)
    agent.write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        write_agent("rover", tmp_path)
    assert agent.read_text() == "mine"
