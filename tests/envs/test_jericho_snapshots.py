"""A restored game goes on exactly as the original did: 1,000 pairs over every story file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from jericho.defines import BINDINGS_DICT

from pz_envs import datasets
from pz_envs.errors import EnvError
from pz_envs.jericho.env import JerichoEnv
from pz_envs.jericho.games import GAMES, find_game

pytestmark = pytest.mark.data

PRESENT = [game.name for game in GAMES if datasets.find_story(game.md5) is not None]
if not PRESENT:
    pytest.skip("no story files", allow_module_level=True)
PAIRS = -(-1000 // len(PRESENT))
COSMETIC = {"anchor", "partyfoul", "sherlock", "theatre"}
"""Games that pad text by the cursor's position, which the interpreter's state leaves out."""

_COMMANDS = [
    *("n", "s", "e", "w", "ne", "nw", "se", "sw", "u", "d", "in", "out"),
    *("look", "inventory", "take all", "drop all", "wait", "help", "enter", "q"),
]

Step = tuple[str, float, bool, bool, float]


def _play(env: JerichoEnv, commands: list[str], *, cosmetic: bool) -> list[Step]:
    steps: list[Step] = []
    for command in commands:
        observation, reward, terminated, _, info = env.step(command)
        text = " ".join(observation.split()) if cosmetic else observation
        steps.append((text, reward, terminated, info["valid"], info["score"]))
        if terminated:
            break
    return steps


@pytest.mark.parametrize("name", PRESENT)
def test_a_restored_game_goes_on_as_the_original_did(name: str) -> None:
    game = find_game(name)
    walkthrough = BINDINGS_DICT[game.md5].get("walkthrough", "look").split("/")
    pool = [command for command in walkthrough if command.strip()] + _COMMANDS * 3
    if name == "gold":  # where its menus break lines depends on the cursor, as in those above
        pool = [command for command in pool if command != "help"]
    random = np.random.Generator(np.random.Philox(key=len(name)))
    original = JerichoEnv(name, isolated=False)
    other = JerichoEnv(name, isolated=False)
    other.reset(seed=99)
    expert = bool(random.integers(2))
    original.reset(seed=1, options={"expert": expert})
    for pair in range(PAIRS):
        if pair % 9 == 8:
            original.reset(seed=pair)
        walk = [str(command) for command in random.choice(pool, 3)]
        if pair % 3 == 0 and (hint := original.expert_action()) is not None:
            walk = [hint, hint]
        ended = _play(original, walk, cosmetic=True)[-1][2]
        if ended:
            original.reset(seed=pair)
        kept = original.snapshot()
        ahead = [str(command) for command in random.choice(pool, 4)]
        hint = original.expert_action()
        expected = _play(original, ahead, cosmetic=name in COSMETIC)
        env = original if pair % 2 else other
        if pair % 4 == 1:
            env.reset(seed=pair)
        env.restore(kept)
        assert env.expert_action() == hint
        assert env.snapshot() == kept
        assert _play(env, ahead, cosmetic=name in COSMETIC) == expected
        if expected[-1][2]:
            original.reset(seed=pair)


def test_a_snapshot_crosses_into_another_process() -> None:
    env = JerichoEnv("zork1", isolated=False)
    env.reset(seed=5)
    for command in ("s", "e", "open window", "w", "w", "take lamp"):
        env.step(command)
    kept = env.snapshot()
    ahead = ["light lamp", "move rug", "open trap door", "d", "n", "n", "wait"]
    expected = _play(env, ahead, cosmetic=False)
    child = JerichoEnv("zork1")
    observation, info = child.restore(kept)
    assert observation == "Taken."
    assert info["steps"] == 6
    assert _play(child, ahead, cosmetic=False) == expected
    child.close()


def test_a_snapshot_holds_json_and_memory_but_no_pickle() -> None:
    env = JerichoEnv("zork1", isolated=False)
    env.reset(seed=5)
    kept = env._save()
    length = int.from_bytes(kept[:4], "little")
    header = json.loads(kept[16 : 16 + length])
    assert header[0] == find_game("zork1").md5
    assert len(kept) < 50_000


@pytest.mark.parametrize("damage", [b"", b"x", b"\0" * 40])
def test_foreign_bytes_are_refused(damage: bytes) -> None:
    env = JerichoEnv("zork1", isolated=False)
    env.reset(seed=5)
    with pytest.raises(EnvError):
        env.restore(damage)
    with pytest.raises(EnvError):
        env._load(damage, {})
    assert env.step("look")[4]["valid"]


def test_a_snapshot_of_another_game_is_refused() -> None:
    if "detective" not in PRESENT:
        pytest.skip("no story file of detective")
    env = JerichoEnv("detective", isolated=False)
    env.reset(seed=5)
    kept = env.snapshot()
    zork = JerichoEnv("zork1", isolated=False)
    zork.reset(seed=5)
    with pytest.raises(EnvError, match="md5"):
        zork.restore(kept)
    assert zork.step("look")[0].startswith("West of House")


def test_memory_of_another_size_is_refused() -> None:
    env = JerichoEnv("zork1", isolated=False)
    env.reset(seed=5)
    kept = env._save()
    head, ram, stack, text = (int.from_bytes(kept[at : at + 4], "little") for at in (0, 4, 8, 12))
    sizes = b"".join(size.to_bytes(4, "little") for size in (head, ram + 1, stack - 1, text))
    with pytest.raises(EnvError, match="damaged"):
        env._load(sizes + kept[16:], {})
    assert env.step("look")[0].startswith("West of House")


def test_a_halted_interpreter_can_be_restored() -> None:
    env = JerichoEnv("zork1", isolated=False)
    env.reset(seed=5)
    kept = env.snapshot()
    assert env._engine is not None
    env._engine._halted.value = 1
    assert env.step("look")[2]
    env.restore(kept)
    assert env.step("look")[0].startswith("West of House")
