"""Every story file that is here, played through by its expert."""

from __future__ import annotations

import json

import pytest

from pz_envs import datasets
from pz_envs.jericho.env import JerichoEnv
from pz_envs.jericho.games import GAMES, MIT_ZORK1_MD5, Game

pytestmark = pytest.mark.data

_BY_FILE = {game.file: game for game in GAMES}


def _recorded() -> dict[str, int]:
    path = datasets.find_file("jericho", "ROMS.json")
    if path is None:
        return {}
    roms = json.loads(path.read_text())["roms"]
    return {rom["rom"]: rom["walkthrough_best_score"] for rom in roms}


_RECORDED = _recorded()


def test_records_are_of_known_games() -> None:
    if not _RECORDED:
        pytest.skip("no ROMS.json")
    assert len(_RECORDED) == 40
    assert set(_RECORDED) <= set(_BY_FILE)


@pytest.mark.parametrize("file", sorted(_RECORDED))
def test_the_expert_reaches_the_recorded_score(file: str) -> None:
    game: Game = _BY_FILE[file]
    env = JerichoEnv(game.name, isolated=False)
    _, info = env.reset(seed=0, options={"expert": True})
    assert info["score"] == game.start_score
    score, best, refused, steps = info["score"], info["score"], 0, 0
    terminated = False
    while (command := env.expert_action()) is not None:
        _, reward, terminated, _, info = env.step(command)
        score += reward
        best = max(best, info["score"])
        refused += not info["valid"]
        steps += 1
    assert best == info["score"] == score == _RECORDED[file]
    assert terminated
    assert refused <= 1
    assert info["success"] == (game.name != "anchor")
    assert info["score_norm"] == _RECORDED[file] / game.max_score
    assert steps > 10


def test_release_119_gives_the_recorded_score_events() -> None:
    story = datasets.find_story(MIT_ZORK1_MD5)
    trace = datasets.find_file("jericho", "zork_mit/zork1_walkthrough_trace.json")
    if story is None or trace is None:
        pytest.skip("no copy of release 119 with its trace")
    record = json.loads(trace.read_text())["r119_MIT"]
    env = JerichoEnv("zork1", story=story, isolated=False)
    observation, info = env.reset(seed=0, options={"expert": True})
    assert observation.endswith("There is a small mailbox here.")
    assert info["task_id"] == "zork1-r119"
    events, terminated = [], False
    for number in range(1, record["steps"] + 1):
        command = env.expert_action()
        assert command is not None
        assert not terminated
        observation, reward, terminated, _, info = env.step(command)
        assert not observation.startswith(">")
        assert "Moves:" not in observation
        assert info["valid"]
        if reward:
            events.append([number, command, info["score"]])
    assert len(events) == 43
    assert [(n, c.lower(), s) for n, c, s in events] == [
        (n, c.lower(), s) for n, c, s in record["score_events"]
    ]
    assert terminated
    assert info["success"]
    assert info["score"] == record["final"] == 350


@pytest.mark.parametrize("which", ["classic", "mit"])
def test_both_releases_of_zork1_end_with_death(which: str) -> None:
    md5 = MIT_ZORK1_MD5 if which == "mit" else _BY_FILE["zork1.z5"].md5
    story = datasets.find_story(md5)
    if story is None:
        pytest.skip(f"no {which} release")
    env = JerichoEnv("zork1", story=story, isolated=False)
    env.reset(seed=4)
    way = "s. e. open window. w. w. move rug. open trap door. d. n. n. wait. wait. wait. wait"
    terminated, rewards = False, []
    for command in way.split(". "):
        observation, reward, terminated, _, info = env.step(command)
        rewards.append(reward)
        if terminated:
            break
    assert terminated
    assert not info["success"]
    assert "You have died" in observation
    assert rewards[-1] == -10
    assert info["score"] == sum(rewards) == 25
