"""ScienceWorld: the table, the engine's process, episodes that nothing disturbs, experts."""

from __future__ import annotations

import contextlib
import gc
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pz_envs.checks import check_env
from pz_envs.datasets import find_file
from pz_envs.errors import ConfigError, EnvError, InfraError
from pz_envs.scienceworld import jvm
from pz_envs.scienceworld.env import MAX_LENGTH, ScienceWorldEnv
from pz_envs.scienceworld.simulator import Simulator
from pz_envs.scienceworld.tasks import TASKS, episodes


def java(test: Any) -> Any:
    """Mark a test that needs Java; it shares one process, since starting one takes seconds."""
    missing = jvm.missing_engine()
    for mark in (
        pytest.mark.java,
        pytest.mark.skipif(missing is not None, reason=str(missing)),
        pytest.mark.usefixtures("house"),
    ):
        test = mark(test)
    return test


_WALK = (
    *("open door to kitchen", "go to kitchen", "look around", "wait1", "open door to outside"),
    *("go to outside", "look around", "wait", "look around", "inventory", "wait1", "look around"),
)
_OWNER = (
    "import json, sys, time\n"
    "from pz_envs.scienceworld.env import ScienceWorldEnv\n"
    "env = ScienceWorldEnv('find-animal', admissible_commands=True)\n"
    "events = [env.reset(seed=5)] + [env.step(command) for command in json.loads(sys.argv[1])]\n"
    "print(json.dumps([env._simulator.jvm.pid, events]), flush=True)\n"
    "time.sleep(600)\n"
)


@pytest.fixture(scope="module")
def house() -> Iterator[ScienceWorldEnv]:
    env = ScienceWorldEnv("find-living-thing")
    env.reset(seed=0)
    yield env
    env.close()


def _play(env: ScienceWorldEnv, seed: int, commands: tuple[str, ...] = _WALK) -> list[Any]:
    return [env.reset(seed=seed), *(env.step(command) for command in commands)]


def _gone(pid: int, within_s: float = 60.0) -> bool:
    """Whether a process ends in time; one that ended and was not reaped is still there."""
    end = time.monotonic() + within_s
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _engines() -> set[int]:
    """The Java processes that are children of this one, zombies included."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
            if name == "java" and int(rest.split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
    return found


# The table.


def test_the_table_agrees_with_the_published_splits() -> None:
    path = find_file("scienceworld", "tasks_and_splits.json.gz")
    if path is None:
        pytest.skip("no tasks_and_splits.json.gz; set PZ_DATA")
    published = json.loads(gzip.decompress(path.read_bytes()))["tasks"]
    assert set(published) == set(TASKS)
    for name, facts in published.items():
        task = TASKS[name]
        assert task.variations == facts["max_variations"]
        assert [task.number] == facts["id"]
        assert list(task.in_split("train")) == facts["train"]
        assert list(task.in_split("dev")) == facts["dev"]
        assert list(task.in_split("test")) == facts["test"]


def test_splits_have_their_published_sizes() -> None:
    sizes = {"train": 3592, "dev": 1796, "test": 1819, "all": 7207}
    sizes |= {"fork_train": 2294, "fork_test": 1308}
    assert {split: len(episodes(None, split)) for split in sizes} == sizes  # type: ignore[arg-type]
    trained = {task.name for task, _ in episodes(None, "fork_train")}
    tested = {task.name for task, _ in episodes(None, "fork_test")}
    assert len(trained) == 17
    assert len(tested) == 13
    assert not trained & tested


def test_task_names_make_distinct_ids() -> None:
    assert TASKS["identify-life-stages-1"].camel == "IdentifyLifeStages1"
    assert len({task.camel for task in TASKS.values()}) == 30


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"task": "boyl"}, "Did you mean `boil`"),
        ({"split": "valid"}, "Allowed: train"),
        ({"task": "freeze", "split": "fork_train"}, "does not play `freeze`"),
        ({"simplifications": "esay"}, "Did you mean `easy`"),
        ({"task": "power-component", "simplifications": ["noElectricalAction"]}, "electrical"),
        ({"heap_mb": 1}, "64 MiB"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ScienceWorldEnv(**arguments)


# What is missing.


def test_without_java_the_error_is_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(ConfigError, match="apt-get install default-jre-headless"):
        jvm.java_path()


@pytest.mark.parametrize("package", ["scienceworld", "py4j"])
def test_without_a_package_the_error_is_the_command(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    complaint = jvm.missing_engine()
    assert complaint is not None
    assert "pip install 'pz-envs[scienceworld]'" in complaint


def test_the_table_needs_no_engine() -> None:
    look = "import sys, pz_envs.scienceworld.env; print([m for m in sys.modules if 'py4j' in m])"
    done = subprocess.run(
        [sys.executable, "-c", look], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


# Episodes.


@java
def test_the_first_words_are_the_room_and_the_task(house: ScienceWorldEnv) -> None:
    observation, info = house.reset(seed=0, options={"index": 0})
    assert observation.startswith("This room is called")
    assert "Your task is to find a(n) living thing" in info["instruction"]
    assert "focus on OBJ" in info["instruction"]
    assert info["task_id"] == "scienceworld/find-living-thing/0"
    assert info["admissible_commands"] is None


@java
def test_an_index_outside_the_split_is_refused(house: ScienceWorldEnv) -> None:
    with pytest.raises(ConfigError, match="0 to 149"):
        house.reset(seed=0, options={"index": 150})


@java
def test_the_expert_earns_every_point_once(house: ScienceWorldEnv) -> None:
    _, info = house.reset(seed=0, options={"index": 1})
    total = 0.0
    while not info["success"]:
        command = house.expert_action()
        assert command is not None
        _, reward, terminated, _, info = house.step(command)
        total += reward
        assert info["score"] == pytest.approx(max(total, 0.0))
    assert terminated
    assert total == pytest.approx(1.0)
    assert house.expert_action() is None


@java
def test_the_expert_is_silent_off_its_path(house: ScienceWorldEnv) -> None:
    house.reset(seed=0, options={"index": 1})
    house.step("look around")
    assert house.expert_action() is None


@java
def test_a_fatal_mistake_costs_all_and_scores_nothing(house: ScienceWorldEnv) -> None:
    _, before = house.reset(seed=0)
    _, reward, terminated, _, info = house.step("focus on air")
    assert reward == pytest.approx(-1.0 - before["score"])
    assert terminated
    assert (info["score"], info["score_norm"], info["success"]) == (0.0, 0.0, False)
    assert info["extra"]["points"] == -100


@java
@pytest.mark.parametrize(
    "reply",
    [
        "frobnicate the grue",
        "9",
        "打开厨房的门",
        "open\0door",
        "x" * (MAX_LENGTH + 1),
        "look around " * 100_000,
        "<action>look\0around</action>",
        "<action></action>",
        "<think>" * 1000,
        "\ud800",
        "look\\naround",
    ],
)
def test_what_is_no_command_changes_nothing(house: ScienceWorldEnv, reply: str) -> None:
    _, before = house.reset(seed=0)
    pid = house._simulator.jvm.pid if house._simulator else None
    _, reward, terminated, _, info = house.step(reply)
    assert (info["valid"], reward, terminated) == (False, 0.0, False)
    assert info["extra"] == before["extra"]
    assert house._simulator is not None
    assert house._simulator.jvm.pid == pid
    assert house.step("look around")[4]["valid"]


@java
def test_several_lines_are_one_command(house: ScienceWorldEnv) -> None:
    first, _ = house.reset(seed=0)
    assert house.step("<action>look\n around</action>")[0] == first


@java
def test_an_ambiguous_command_is_settled_by_a_number() -> None:
    env = ScienceWorldEnv("boil")
    env.reset(seed=0, options={"index": 0})
    question, _, _, _, info = env.step("open door")
    assert "0:\topen door between kitchen and hallway" in question
    assert info["valid"]
    assert env.step("0")[0] == "The door is now open."
    env.close()


@java
def test_episodes_in_turns_go_as_alone() -> None:
    kinds: dict[str, dict[str, Any]] = {
        "find-animal": {},
        "mendelian-genetics-known-plant": {},
        "boil": {"simplifications": "easy"},
    }
    environments = {name: ScienceWorldEnv(name, **kind) for name, kind in kinds.items()}
    alone = {name: _play(env, 7) for name, env in environments.items()}
    turns: dict[str, list[Any]] = {
        name: [env.reset(seed=7)] for name, env in reversed(environments.items())
    }
    for command in _WALK:
        for name, env in environments.items():
            turns[name].append(env.step(command))
    for env in environments.values():
        env.close()
    assert turns == alone


@java
def test_commands_are_listed_on_request_and_leave_no_trace() -> None:
    plain, listing = ScienceWorldEnv("boil"), ScienceWorldEnv("boil", admissible_commands=True)
    quiet, told = _play(plain, 3), _play(listing, 3)
    commands = told[-1][-1]["admissible_commands"]
    assert len(set(commands)) == len(commands) > 100
    assert "look around" in commands
    for one, other in zip(quiet, told, strict=True):
        one[-1]["admissible_commands"] = other[-1]["admissible_commands"] = None
    assert quiet == told
    for command in commands[:: len(commands) // 5]:
        _play(listing, 3)
        assert listing.step(command)[4]["valid"], command
    plain.close()
    listing.close()


@java
def test_simplifications_reach_the_engine() -> None:
    env = ScienceWorldEnv("boil", simplifications=["teleportAction"])
    env.reset(seed=0)
    assert env.step("teleport to kitchen")[4]["valid"]
    env.close()


@java
@pytest.mark.slow
def test_it_conforms() -> None:
    report = check_env(lambda: ScienceWorldEnv("find-non-living-thing"))
    assert {"info", "same seed", "going back", "fuzzed replies", "expert"} <= set(report.passed)


# The Java process.


@java
def test_text_travels_unharmed(house: ScienceWorldEnv) -> None:
    house.reset(seed=0)
    assert house._simulator is not None
    link = house._simulator.link
    text = "a\\nb\n\r\t\\ 'ü' 中 \0 🙂 " + "x" * 1_000_000
    built = link.make("java.lang.StringBuilder", text)
    assert link.text(built, "toString") == text
    link.free(built)
    with pytest.raises(EnvError, match="NumberFormatException"):
        link.call("z:java.lang.Integer", "parseInt", "seven")
    assert link.call("z:java.lang.Integer", "parseInt", "7") == 7


@java
def test_one_process_serves_all_and_another_heap_is_refused(house: ScienceWorldEnv) -> None:
    house.reset(seed=0)
    running = _engines()
    assert len(running) == 1
    others = [ScienceWorldEnv("boil") for _ in range(3)]
    for env in others:
        env.reset(seed=1)
    assert _engines() == running
    wide = ScienceWorldEnv("boil", heap_mb=700)
    with pytest.raises(ConfigError, match="heap_mb=1024"):
        wide.reset(seed=0)
    for env in (*others, wide):
        env.close()
    assert _engines() == running


@java
@pytest.mark.slow
def test_a_killed_engine_costs_the_episodes_and_no_more(house: ScienceWorldEnv) -> None:
    house.reset(seed=0)
    other = ScienceWorldEnv("boil")
    other.reset(seed=0)
    assert house._simulator is not None
    pid = house._simulator.jvm.pid
    os.kill(pid, signal.SIGKILL)
    for env in (house, other):
        with pytest.raises(InfraError, match=r"reset\(\) goes on"):
            env.step("look around")
        with pytest.raises(EnvError, match="call reset"):
            env.step("look around")
    for env in (house, other):
        _, info = env.reset(seed=0)
        assert info["extra"]["engine_restarts"] == 1
        assert env.step("look around")[4]["valid"]
    other.close()
    assert len(_engines()) == 1
    assert _gone(pid)


@java
@pytest.mark.slow
def test_an_engine_that_hangs_is_killed(house: ScienceWorldEnv) -> None:
    house.reset(seed=0)
    assert house._simulator is not None
    simulator: Simulator = house._simulator
    pid = simulator.jvm.pid
    os.kill(pid, signal.SIGSTOP)
    simulator.link.timeout_s = 0.5
    with pytest.raises(InfraError, match="did not answer `step` within"):
        house.step("look around")
    assert _gone(pid)
    house.reset(seed=0)
    assert house.step("look around")[4]["valid"]


@java
@pytest.mark.slow
def test_the_process_ends_with_its_last_environment(house: ScienceWorldEnv) -> None:
    house.reset(seed=0)
    assert house._simulator is not None
    first = house._simulator.jvm.pid
    house.close()
    house.close()
    assert _gone(first)
    env = ScienceWorldEnv("boil", heap_mb=300)
    env.reset(seed=0)
    (second,) = _engines()
    del env
    gc.collect()
    assert _gone(second)
    house.reset(seed=0)


@java
@pytest.mark.slow
def test_a_killed_owner_leaves_no_engine_and_played_the_same(house: ScienceWorldEnv) -> None:
    house.reset(seed=0)
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, json.dumps(_WALK)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    pid, theirs = json.loads(owner.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert _gone(pid)
    env = ScienceWorldEnv("find-animal", admissible_commands=True)
    assert json.loads(json.dumps(_play(env, 5))) == theirs
    env.close()


@java
@pytest.mark.slow
def test_a_forked_child_leaves_its_parents_engine_alone(house: ScienceWorldEnv) -> None:
    house.reset(seed=0)
    assert house._simulator is not None
    pid = house._simulator.jvm.pid
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with contextlib.suppress(InfraError):
                house.step("look around")
                code = 2
            if code == 1:
                house.reset(seed=0)
                assert house._simulator is not None
                code = 0 if house._simulator.jvm.pid != pid else 3
                house.close()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert house.step("look around")[4]["valid"]


# Against what nobody here wrote.


@java
@pytest.mark.slow
def test_it_says_what_the_original_package_says(monkeypatch: pytest.MonkeyPatch) -> None:
    original = pytest.importorskip("scienceworld")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Xmx512m")
    env = ScienceWorldEnv("boil", split="all")
    observation, info = env.reset(seed=0, options={"index": 2})
    theirs = original.ScienceWorldEnv("boil")
    try:
        theirs.load("boil", 2, "", generateGoldPath=False)
        expected, facts = theirs.reset()
        assert observation == expected
        assert facts["taskDesc"].removeprefix("Task Description:\n") in info["instruction"]
        points = 0
        for _ in range(8):
            command = env.expert_action()
            assert command is not None
            expected, gain, over, facts = theirs.step(command)
            observation, reward, terminated, _, info = env.step(command)
            points += gain
            assert (observation, terminated) == (expected, over)
            assert reward == pytest.approx(gain / 100)
            assert info["extra"]["points"] == facts["score"] == points
            assert info["extra"]["moves"] == facts["moves"]
    finally:
        theirs.close()
        theirs._gateway.java_process.wait(60)
    env.close()


@java
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "use-thermometer",
        "power-component",
        "find-animal",
        "chemistry-mix",
        "lifespan-longest-lived-then-shortest-lived",
        "identify-life-stages-2",
    ],
)
def test_the_engines_own_solution_scores_100(name: str) -> None:
    env = ScienceWorldEnv(name, split="all")
    _, info = env.reset(seed=0, options={"index": 0})
    while (command := env.expert_action()) is not None:
        info = env.step(command)[4]
    assert info["extra"]["points"] == 100
    assert info["success"]
    env.close()
