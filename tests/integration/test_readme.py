"""What the README shows does what it says: its snippets are run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pz_agents.sdk import check_agent, load_agent
from pz_bench.matrix import load_matrix

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_environment_snippet_runs():
    (snippet,) = (text for text in snippets("python") if "gym.make" in text)
    done = subprocess.run(
        [sys.executable, "-c", snippet], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Numbers: ")


@pytest.mark.parametrize("name", ["agent", "MyAgent"])
def test_the_agents_are_agents(name, tmp_path):
    (snippet,) = (text for text in snippets("python") if f" {name}(" in text or f" {name}:" in text)
    path = tmp_path / "my_agent.py"
    path.write_text(snippet)
    check_agent(load_agent(f"{path}:{name}"), "pz/NumberLine-v0")


def test_the_matrix_is_a_matrix(tmp_path):
    (snippet,) = snippets("yaml")
    path = tmp_path / "matrix.yaml"
    path.write_text(snippet)
    matrix = load_matrix(str(path))
    assert matrix.name == "mine"
    assert len(matrix.rows) == 2


def test_the_commands_exist():
    verbs = {line.split()[0] for text in snippets("bash") for line in text.splitlines() if line}
    assert {"make", "pz-envs", "pz-bench", "pz-agents"} <= verbs
    for line in (line for text in snippets("bash") for line in text.splitlines()):
        program, *rest = line.split("#")[0].split()[:2] or [""]
        if program.startswith("pz-") and rest:
            tool = Path(sys.executable).with_name(program)
            done = subprocess.run(
                [tool, rest[0], "--help"], capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 0, line
