"""ALFWorld's two engines side by side: text, admissible commands and win, command by command.

A sample; ``benchmarks/alfworld_compare.py`` takes any number of files.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pz_envs.alfworld.compare import compare, reference_engine
from pz_envs.alfworld.env import ALFWorldEnv
from pz_envs.alfworld.games import load_games
from pz_envs.alfworld.household import TASK_TYPES, generate, with_original_texts, write_game
from pz_envs.alfworld.native import NOTHING, Record
from pz_envs.alfworld.reference import ReferenceHousehold, evaluate
from pz_envs.datasets import find_file
from pz_envs.errors import ConfigError, DataError, EnvError
from pz_envs.workers import Worker

needs_reference = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("alfworld", "fast_downward")),
    reason="alfworld or fast-downward is not installed: pip install 'pz-envs[alfworld]'",
)


def _small(task_type: str) -> Record:
    """Return a generated game of little furniture, with the texts of the alfworld package."""
    games = (generate(task_type, "train", number) for number in range(12))
    return with_original_texts(min(games, key=lambda game: len(game.problem)))


@pytest.fixture(scope="module")
def reference() -> Iterator[Worker]:
    """One process with the reference engine."""
    with reference_engine() as worker:
        yield worker


@needs_reference
@pytest.mark.slow
@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_a_generated_game_is_the_same_on_both_engines(reference: Worker, task_type: str) -> None:
    states, difference = compare(reference, _small(task_type), steps=10, seed=1)
    assert difference is None
    assert states >= 3


@needs_reference
@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_a_published_game_is_the_same_on_both_engines(reference: Worker, number: int) -> None:
    if find_file("alfworld", "games_valid_seen.tar.xz") is None:
        pytest.skip("the ALFWorld games of valid_seen are not here")
    games = load_games("valid_seen")
    smallest = sorted(games.games, key=lambda game: len(games.record(game).problem))
    states, difference = compare(
        reference, games.record(smallest[10 * number]), steps=15, seed=number
    )
    assert difference is None
    assert states >= 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small generated games as files; the first has a domain that only the reference plays."""
    root = tmp_path_factory.mktemp("games")
    other, known = (
        root / name / "trial" / "game.tw-pddl"
        for name in ("pick_and_place_simple-1", "pick_clean_then_place_in_recep-2")
    )
    for path, task_type in ((other, TASK_TYPES[1]), (known, TASK_TYPES[2])):
        path.parent.mkdir(parents=True)
        write_game(path, _small(task_type))
    data = json.loads(other.read_text())
    domain = data["pddl_domain"].replace("(:action SliceObject", "(:action CutObject")
    grammar = data["grammar"].replace("action SliceObject", "action CutObject")
    other.write_text(json.dumps(data | {"pddl_domain": domain, "grammar": grammar}))
    return root


@needs_reference
@pytest.mark.slow
def test_a_file_that_the_native_engine_does_not_cover_is_played_on_the_reference(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    env = ALFWorldEnv(source=str(folder))
    _, info = env.reset(options={"index": 0})
    assert info["extra"]["engine"] == "reference"
    assert "PDDL domain is not one that the native engine covers" in info["extra"]["not_covered"]
    assert "is played on the reference engine" in caplog.text
    assert info["instruction"].startswith("Your task is to: put some")
    observation, _, _, _, info = env.step("open the pod bay doors")
    assert (observation, info["valid"]) == (NOTHING, False)
    info = env.step(info["admissible_commands"][0])[4]
    saved, expected = env.snapshot(), info["admissible_commands"]
    _win_by_expert(env)
    assert env.restore(saved)[1]["admissible_commands"] == expected
    _win_by_expert(env)
    env.reset(options={"index": 1})
    assert env.step("look")[4]["extra"]["engine"] == "native"
    with pytest.raises(EnvError, match="restore it in an environment with the same engine"):
        ALFWorldEnv(source=str(folder), engine="reference").restore(env.snapshot())
    env.close()


@needs_reference
@pytest.mark.slow
def test_a_process_serves_so_many_games_and_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pz_envs.alfworld.reference._GAMES_A_PROCESS", 2)
    record = _small(TASK_TYPES[1])
    household = ReferenceHousehold()
    seen = []
    for _ in range(3):
        household.open(record)
        household.begin()
        seen.append(household.pid)
    assert seen[0] == seen[1] != seen[2]
    household.close()
    for process in seen:
        assert process is not None
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def _win_by_expert(env: ALFWorldEnv) -> None:
    for _ in range(30):
        command = env.expert_action()
        assert command is not None
        _, reward, terminated, _, info = env.step(command)
        if terminated:
            break
    assert (reward, info["success"], env.expert_action()) == (1.0, True, None)


@needs_reference
@pytest.mark.slow
def test_the_reference_can_be_asked_for_and_plays_generated_games_too() -> None:
    env = ALFWorldEnv(source="generated", engine="reference", task_types="look_at_obj_in_light")
    native = ALFWorldEnv(source="generated", task_types="look_at_obj_in_light")
    observation, info = env.reset(seed=4)
    expected, native_info = native.reset(seed=4)
    assert (observation, info["admissible_commands"]) == (
        expected,
        native_info["admissible_commands"],
    )
    assert info["extra"] == native_info["extra"] | {"engine": "reference"}
    _win_by_expert(env)
    env.close()


@needs_reference
@pytest.mark.slow
def test_the_reference_evaluates_nothing_and_survives_a_refusal(
    folder: Path, reference: Worker
) -> None:
    path = next(folder.rglob("*-2/trial/game.tw-pddl"))
    data = json.loads(path.read_text())
    bad = data["grammar"].replace("{r.indefinite} ", "{exec('1')} ")
    assert bad != data["grammar"]
    with pytest.raises(DataError, match="unknown expression"):
        reference.call("begin", data["pddl_domain"], data["pddl_problem"], bad)
    texts = (data["pddl_domain"], data["pddl_problem"], data["grammar"])
    assert "Your task is to" in reference.call("begin", *texts)[0]
    assert reference.restarts == 0


@needs_reference
def test_without_the_reference_engine_the_error_says_how_to_install_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name == "fast_downward" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    message = r"native engine covers .*`fast_downward`.*pip install 'pz-envs\[alfworld\]'"
    with pytest.raises(ConfigError, match=message):
        ALFWorldEnv(source=str(folder)).reset(options={"index": 0})
    with pytest.raises(ConfigError, match=r"pip install 'pz-envs\[alfworld\]'"):
        ALFWorldEnv(source="generated", engine="reference").reset(seed=0)
    with pytest.raises(ConfigError, match="allowed are native, reference"):
        ALFWorldEnv(source="generated", engine="fast")  # type: ignore[arg-type]


class _Named:
    name, indefinite, _secret = "mug 1", "a", "hidden"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("o.indefinite + ' ' + o.name", "a mug 1"),
        ("o.name or o.indefinite", "mug 1"),
        ("'' or o.name", "mug 1"),
    ],
)
def test_expressions_of_the_grammar_are_read(expression: str, value: str) -> None:
    assert evaluate(expression, {"o": _Named()}) == value


@pytest.mark.parametrize(
    "expression",
    ["exec('1')", "o._secret", "o.name.upper()", "o.__class__", "x.name", "1", "o.name[0]", "a b"],
)
def test_an_expression_that_does_more_is_refused(expression: str) -> None:
    with pytest.raises(DataError, match="unknown expression"):
        evaluate(expression, {"o": _Named()})
