"""Generated households: the environment without data, wording, files, and the planner."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest

from pz_envs.alfworld.env import ALFWorldEnv
from pz_envs.alfworld.games import load_games
from pz_envs.alfworld.household import (
    KINDS,
    TASK_TYPES,
    generate,
    with_original_texts,
    write_game,
)
from pz_envs.alfworld.native import Household, Record, World
from pz_envs.checks import check_env
from pz_envs.errors import ConfigError

needs_alfworld = pytest.mark.skipif(
    importlib.util.find_spec("alfworld") is None,
    reason="alfworld is not installed: pip install --no-deps alfworld==0.4.2",
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PZ_CACHE", str(tmp_path / "cache"))


def _world(record: Record) -> World:
    return World(record.domain, record.problem, record.grammar)


def test_the_environment_without_data_passes_the_conformance_suite() -> None:
    report = check_env(lambda: ALFWorldEnv(source="generated"))
    assert {"going back", "expert", "fuzzed replies", "random action"} <= set(report.passed)


def test_the_splits_are_sorted_complete_and_share_no_game() -> None:
    problems: set[str] = set()
    for split, count in (("train", 3600), ("valid_seen", 150), ("valid_unseen", 150)):
        games = load_games(split, "generated")  # type: ignore[arg-type]
        names = [game.name for game in games.games]
        assert len(names) == len(set(names)) == count
        assert names == sorted(names)
        assert {game.task_type for game in games.games} == set(TASK_TYPES)
        problems |= {games.record(game).problem for game in games.games[:: count // 10]}
    assert len(problems) == 30


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_a_game_is_begun_unsolved_and_won_by_its_walkthrough_alone(task_type: str) -> None:
    for number in range(25):
        record = generate(task_type, "valid_seen", number)
        world = _world(record)
        household = Household(world)
        assert not household.won
        assert 3 <= len(record.walkthrough) <= 12
        for command in record.walkthrough:
            assert not household.won
            assert household.play(command) is not None
        assert household.won
        assert 8 <= len(world.place) <= 60
        verb = task_type.split("_")[1]
        if verb in ("clean", "heat", "cool"):
            assert any(command.startswith(f"{verb} ") for command in record.walkthrough)


def test_the_same_number_is_the_same_game() -> None:
    for task_type in TASK_TYPES:
        assert generate(task_type, "train", 7) == generate(task_type, "train", 7)
        assert generate(task_type, "train", 7) != generate(task_type, "train", 8)
    with pytest.raises(ConfigError, match="allowed are look_at_obj_in_light"):
        generate("pick_and_eat", "train", 0)


def test_every_kind_of_thing_is_asked_for_and_fits_where_it_lies() -> None:
    asked = set()
    for number in range(25):
        for task_type in TASK_TYPES:
            record = generate(task_type, "train", number)
            asked |= {name for name in KINDS if f" {name.lower()} " in f"{record.task} "}
    assert len(asked) >= 0.75 * len(KINDS)
    world = _world(record)
    for thing, receptacle in world.start["inreceptacle"]:
        assert world.fit(thing, receptacle) is not None


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_the_planner_wins_from_any_state(task_type: str) -> None:
    rng = random.Random(task_type)
    for number in range(8):
        household = Household(_world(generate(task_type, "train", number)))
        for _ in range(10):
            if not household.won:
                household.play(rng.choice(household.admissible()))
        left = 100
        while not household.won:
            plan = household.plan()
            assert plan is not None
            assert 0 < len(plan) < left
            left = len(plan)
            assert household.play(plan[0]) is not None


@needs_alfworld
@pytest.mark.parametrize("recorded", [[], ["go to moon 1"], ["look"]])
def test_a_game_with_no_good_walkthrough_is_planned(tmp_path: Path, recorded: list[str]) -> None:
    record = generate(TASK_TYPES[5], "train", 3)
    path = tmp_path / "pick_two_obj_and_place-1" / "trial" / "game.tw-pddl"
    write_game(path, record)
    content = json.loads(path.read_text())
    del content["walkthrough"]
    if recorded:
        content["walkthrough"] = recorded
    path.write_text(json.dumps(content))
    env = ALFWorldEnv(source=str(tmp_path))
    env.reset(seed=0)
    terminated, info = False, {}
    while not terminated:
        _, _, terminated, _, info = env.step(env.expert_action() or "")
    assert info["success"]
    assert info["steps"] == len(record.walkthrough) + (recorded == ["look"])


@needs_alfworld
def test_own_wording_is_what_the_alfworld_package_says() -> None:
    rng = random.Random(1)
    compared = 0
    for number in range(3):
        for task_type in TASK_TYPES:
            record = generate(task_type, "valid_unseen", number)
            ours, theirs = (
                Household(_world(each)) for each in (record, with_original_texts(record))
            )
            assert ours.begin() == theirs.begin()
            for _ in range(100):
                assert ours.admissible() == theirs.admissible()
                busy = [
                    c for c in ours.admissible() if not c.startswith("go") or rng.random() < 0.3
                ]
                command = rng.choice(busy)
                said = ours.play(command), theirs.play(command)
                assert said[0] == said[1] or command == "help"
                assert ours.won == theirs.won
                compared += 1
    assert compared == 1800


@needs_alfworld
def test_a_written_game_is_read_back_as_it_was(tmp_path: Path) -> None:
    for number, task_type in enumerate(TASK_TYPES):
        record = generate(task_type, "train", number)
        write_game(tmp_path / f"{task_type}-x" / "trial" / "game.tw-pddl", record)
    env = ALFWorldEnv(source=str(tmp_path))
    assert len(env) == len(TASK_TYPES)
    for index in range(len(env)):
        observation, info = env.reset(options={"index": index})
        record = generate(TASK_TYPES[index], "train", index)
        assert observation == Household(_world(record)).begin()
        assert (info["instruction"], info["extra"]["generated"]) == (record.task, False)
        assert info["extra"]["wording"] == "move X to Y"
        for command in record.walkthrough:
            info = env.step(command)[4]
        assert info["success"]
