"""JerichoEnv: what every reproduced failure of a plain wrapper has become, and the contract."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pz_envs import datasets
from pz_envs.errors import ConfigError, EnvError, InfraError
from pz_envs.jericho.engine import Engine
from pz_envs.jericho.env import JerichoEnv
from pz_envs.jericho.games import GAMES, MIT_ZORK1_MD5, find_game

pytestmark = pytest.mark.data

PRESENT = [game.name for game in GAMES if datasets.find_story(game.md5) is not None]
if not PRESENT:
    pytest.skip("no story files", allow_module_level=True)


@pytest.fixture
def isolated() -> Iterator[JerichoEnv]:
    env = JerichoEnv("zork1")
    yield env
    env.close()


@pytest.fixture
def quiet_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, which must still be empty at the end."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


def test_an_episode_speaks_the_contract(isolated: JerichoEnv) -> None:
    observation, info = isolated.reset(seed=3)
    assert observation.endswith("There is a small mailbox here.")
    assert info["score"] == 0
    assert info["max_score"] == 350
    assert info["task_id"] == "zork1"
    assert info["admissible_commands"] is None
    assert info["extra"] == {"engine_restarts": 0}
    assert "Zork I" in info["instruction"]
    assert "<action>" in info["instruction"]
    observation, reward, terminated, truncated, info = isolated.step("<action>n</action>")
    assert observation.startswith("North of House")
    assert (reward, terminated, truncated, info["valid"]) == (0, False, False, True)


@pytest.mark.parametrize("name", PRESENT)
def test_an_episode_begins_in_a_described_room(name: str) -> None:
    env = JerichoEnv(name, isolated=False)
    observation, info = env.reset(seed=1)
    assert observation == observation.strip()
    assert len(observation) > 80
    assert not observation.endswith(">")
    assert info["valid"]
    if name == "theatre":
        assert "Theatre Lobby" in observation


HARMFUL = [
    "\0",
    "look\0north",
    "\\x",
    "\\",
    "\\\\s look",
    "look \\kill",
    *(chr(code) + "look" for code in range(1, 32)),
    "".join(map(chr, range(1, 32))),
    "save",
    "script",
    "restore",
    "restart",
    "quit",
    "recording",
    "look\nsave\n",
    "look\r\nnorth",
    "é" * 150,
    "打开门" * 80,
    "🙂" * 60,
    "\ud800 lone \udfff",
    "x" * 10_000,
    "look " * 3_000,
    "\x7f\x80\x9f\xa0\xad\u2028\ufeff",
]


@pytest.mark.parametrize("name", ["zork1", "detective"])
def test_harmful_input_changes_nothing_and_writes_nothing(name: str, quiet_folder: Path) -> None:
    env = JerichoEnv(name, isolated=False)
    env.reset(seed=8)
    for text in HARMFUL:
        env.reset(seed=8)
        before = env.snapshot()
        expected = env.step("look")[0]
        env.restore(before)
        observation = env.step(text)[0]
        assert observation
        env.restore(before)
        assert env.step("look")[0] == expected, text
    assert list(quiet_folder.iterdir()) == []


@pytest.mark.parametrize("name", PRESENT)
def test_no_form_of_a_refused_verb_reaches_a_game(name: str, quiet_folder: Path) -> None:
    env = JerichoEnv(name, isolated=False)
    env.reset(seed=8)
    assert env._engine is not None
    while env._engine.awaits_key:
        env.step("enter")
    before = env._save()
    for text in ("save", "script", "transcript on", "restore", "restart", "quit", "oops save"):
        observation, reward, terminated, _, info = env.step(text)
        assert "not allowed here" in observation, text
        assert (reward, terminated, info["valid"]) == (0, False, False)
    assert env._save() == before
    assert list(quiet_folder.iterdir()) == []


def test_a_newline_does_not_smuggle_a_second_command(isolated: JerichoEnv) -> None:
    isolated.reset(seed=1)
    isolated.step("<action>north\nnorth\nnorth</action>")
    assert isolated.step("look")[0].startswith("West of House")


_known = ["look", "n", "s", "open mailbox", "take all", "inventory", "help", "y", "1"]
_texts = st.one_of(
    st.text(st.characters(codec=None, categories=None), max_size=60),
    st.text("\\abcdefghijklmnopqrstuvwxyz \n\0.,", max_size=120),
    st.sampled_from(_known),
    st.integers(0, 12_000).map(lambda n: "x" * n),
    st.builds(lambda a, b: a + b, st.sampled_from(["\\", "\0", "\n", "\x1b", "#", "$"]), st.text()),
)


@pytest.mark.parametrize("name", ["zork1", "detective", "905", "curses", "lostpig"])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(texts=st.lists(_texts, max_size=12))
def test_any_text_is_survived_and_the_game_stays_playable(
    name: str, texts: list[str], quiet_folder: Path
) -> None:
    if name not in PRESENT:
        pytest.skip(f"no story file of {name}")
    env = _engine_env(name)
    expected = [env.reset(seed=5)[0], env.step("look")[0], env.step("inventory")[0]]
    env.reset(seed=5)
    start = env.snapshot()
    for text in texts:
        _, reward, terminated, _, info = env.step(text)
        assert info["score"] <= info["max_score"]
        assert isinstance(reward, float)
        if terminated:
            break
    env.restore(start)
    assert [env.step("look")[0], env.step("inventory")[0]] == expected[1:]
    assert [env.reset(seed=5)[0], env.step("look")[0], env.step("inventory")[0]] == expected
    assert list(quiet_folder.iterdir()) == []


_ENVS: dict[str, JerichoEnv] = {}


def _engine_env(name: str) -> JerichoEnv:
    return _ENVS.setdefault(name, JerichoEnv(name, isolated=False))


def test_any_text_is_survived_by_an_isolated_engine(isolated: JerichoEnv) -> None:
    isolated.reset(seed=8)
    expected = isolated.step("look")[0]
    for text in HARMFUL:
        isolated.step(text)
    _, info = isolated.reset(seed=8)
    assert isolated.step("look")[0] == expected
    assert info["extra"]["engine_restarts"] == 0


@pytest.mark.parametrize("name", ["zork1", "detective", "905", "pentari", "murdac", "lostpig"])
def test_words_the_parser_does_not_know_are_invalid(name: str) -> None:
    if name not in PRESENT:
        pytest.skip(f"no story file of {name}")
    env = JerichoEnv(name, isolated=False)
    env.reset(seed=1)
    for command in ("flarb", "xyzzq foo", "take qwertyu"):
        assert not env.step(command)[4]["valid"], command
    assert env.step("look")[4]["valid"]
    assert env.step("inventory")[4]["valid"]


def test_an_unreadable_reply_does_not_move_the_game(isolated: JerichoEnv) -> None:
    isolated.reset(seed=1)
    before = isolated._save()
    _, reward, _, _, info = isolated.step("<action></action>")
    assert info["format_error"]
    assert not info["valid"]
    assert reward == 0
    assert isolated._save() == before


def test_a_menu_takes_single_keys_and_can_be_left() -> None:
    if "curses" not in PRESENT:
        pytest.skip("no story file of curses")
    env = JerichoEnv("curses", isolated=False)
    env.reset(seed=1)
    expected = env.step("look")[0]
    assert "Inform" in env.step("help")[0]
    env.step("look around")
    env.step("enter")
    for _ in range(3):
        env.step("q")
        if env._engine is not None and not env._engine.awaits_key:
            break
    assert env.step("look")[0] == expected


def test_the_interpreters_special_seeds_are_never_used() -> None:
    env = JerichoEnv("zork1", isolated=False)
    assert env._engine is not None
    for seed in (0, 1, 2, 2**31 - 1, 2**40, 10**30):
        env.reset(seed=seed)
        assert 1000 <= env._engine._frotz._seed < 2**31 - 1
    for seed in (0, 1, 2**31 - 1 - 1000, 2**63 - 1):
        env._engine.start(seed, expert=False)
        assert 1000 <= env._engine._frotz._seed < 2**31 - 1
    env.reset(options={"expert": True})
    assert env._engine._frotz._seed == 12


_TRANSCRIPT = (
    "import json, sys\n"
    "from pz_envs.jericho.env import JerichoEnv\n"
    "env = JerichoEnv('zork1', isolated=len(sys.argv) > 2)\n"
    "out = [env.reset(seed=int(sys.argv[1]))[0]]\n"
    "way = 's/e/open window/w/take all/w/take lamp/light lamp/move rug/open trap door/d/n'\n"
    "for command in (way + '/kill troll with knife' * 12).split('/'):\n"
    "    step = env.step(command)\n"
    "    out.append(step[:3])\n"
    "    if step[2]:\n"
    "        break\n"
    "env.close()\n"
    "print(json.dumps(out))\n"
)


def test_a_seed_decides_the_episode_in_any_process_isolated_or_not() -> None:
    def play(*arguments: str) -> object:
        command = [sys.executable, "-c", _TRANSCRIPT, *arguments]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)

    first = play("7")
    assert play("7", "isolated") == first
    others = [play(str(seed)) for seed in (8, 9, 10)]
    assert any(other != first for other in others)


def test_the_expert_is_silent_once_the_walkthrough_is_left(isolated: JerichoEnv) -> None:
    assert isolated.expert_action() is None
    isolated.reset(seed=1, options={"expert": True})
    first = isolated.expert_action()
    assert first == "N"
    isolated.step("quit")
    assert isolated.expert_action() == first
    isolated.step(first)
    kept = isolated.snapshot()
    second = isolated.expert_action()
    assert second is not None
    isolated.step("dance")
    assert isolated.expert_action() is None
    isolated.restore(kept)
    assert isolated.expert_action() == second


def test_an_isolated_expert_reaches_the_end(isolated: JerichoEnv) -> None:
    isolated.reset(seed=1, options={"expert": True})
    while (command := isolated.expert_action()) is not None:
        info = isolated.step(command)[4]
    assert info["score"] == 350
    assert info["success"]


def test_a_crash_costs_the_episode_and_reset_goes_on(isolated: JerichoEnv) -> None:
    isolated.reset(seed=1)
    kept = isolated.snapshot()
    expected = isolated.step("open mailbox")[0]
    assert isolated._worker is not None
    assert isolated._worker.pid is not None
    os.kill(isolated._worker.pid, signal.SIGKILL)
    with pytest.raises(InfraError, match="signal 9"):
        isolated.step("look")
    with pytest.raises(EnvError, match=r"call reset\(\)"):
        isolated.step("look")
    _, info = isolated.reset(seed=1)
    assert info["extra"]["engine_restarts"] == 1
    assert isolated.step("open mailbox")[0] == expected
    isolated.restore(kept)
    assert isolated.step("open mailbox")[0] == expected


def test_a_hang_is_stopped_in_time_and_counted() -> None:
    env = JerichoEnv("zork1", timeout_s=1.0)
    env.reset(seed=1)
    assert env._worker is not None
    assert env._worker.pid is not None
    os.kill(env._worker.pid, signal.SIGSTOP)
    with pytest.raises(InfraError, match="within 1 s"):
        env.step("look")
    _, info = env.reset(seed=1)
    assert info["extra"]["engine_restarts"] == 1
    assert env.step("look")[4]["valid"]
    env.close()


def test_the_raw_engine_would_have_crashed(tmp_path: Path) -> None:
    path = datasets.find_story(find_game("zork1").md5)
    script = (
        "import jericho, sys\n"
        "env = jericho.FrotzEnv(sys.argv[1]); env.reset(); env.step('look' + chr(0) + 'x')\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode < 0


def test_close_leaves_no_process_and_reset_comes_back() -> None:
    env = JerichoEnv("zork1")
    env.reset(seed=1)
    assert env._worker is not None
    pid = env._worker.pid
    assert pid is not None
    env.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert env.reset(seed=1)[1]["extra"]["engine_restarts"] == 0
    env.close()


def test_wrong_arguments_name_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match="fast, exact"):
        JerichoEnv("zork1", admissible_mode="slow")  # type: ignore[arg-type]


def test_an_engine_refuses_to_step_past_the_end() -> None:
    story = datasets.find_story(find_game("905").md5)
    if story is None:
        pytest.skip("no story file of 905")
    engine = Engine(str(story), find_game("905").md5)
    report = engine.start(1, expert=True)
    while report.expert is not None:
        report = engine.step(report.expert)
    assert report.won
    with pytest.raises(EnvError, match="over"):
        engine.step("look")


def test_admissible_commands_are_listed_and_follow_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "detective" not in PRESENT:
        pytest.skip("no story file of detective")
    monkeypatch.setenv("PZ_CACHE", str(tmp_path))
    env = JerichoEnv("detective", admissible_commands=True)
    first = env.reset(seed=1)[1]["admissible_commands"]
    assert isinstance(first, tuple)
    assert "take paper" in first
    kept = env.snapshot()
    assert env.step("save")[4]["admissible_commands"] == first
    after = env.step("take paper")[4]
    assert after["valid"]
    assert "take paper" not in after["admissible_commands"]
    assert env.restore(kept)[1]["admissible_commands"] == first
    env.close()
    plain = JerichoEnv("detective", isolated=False)
    plain.reset(seed=1)
    assert plain.step("take paper")[0].startswith("Taken")


def test_listing_commands_does_not_change_the_game(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PZ_CACHE", str(tmp_path))
    plain = JerichoEnv("zork1", isolated=False)
    listing = JerichoEnv("zork1", isolated=False, admissible_commands=True)
    assert plain.reset(seed=4)[0] == listing.reset(seed=4)[0]
    for command in ("s", "e", "open window", "w", "take all", "w", "move rug"):
        assert plain.step(command)[:3] == listing.step(command)[:3]
    assert plain._save() == listing._save()


def test_release_119_lists_commands_though_jericho_does_not_know_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PZ_CACHE", str(tmp_path))
    story = datasets.find_story(MIT_ZORK1_MD5)
    if story is None:
        pytest.skip("no copy of release 119")
    plain = JerichoEnv("zork1", story=story, isolated=False)
    listing = JerichoEnv("zork1", story=story, isolated=False, admissible_commands=True)
    assert plain.reset(seed=1)[0] == listing.reset(seed=1)[0]
    for command in ("open mailbox", "take leaflet", "n", "e", "open window"):
        assert plain.step(command)[:3] == listing.step(command)[:3]
    assert plain._save() == listing._save()
    listed = listing.reset(seed=1)[1]["admissible_commands"]
    assert {"open mailbox", "north", "south", "west"} <= set(listed)
    assert "take leaflet" not in listed
