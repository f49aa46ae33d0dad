"""The table: ids, registration, and what is said when something is missing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import pytest

import pz_envs
from pz_envs import ConfigError, TextEnv, catalog, datasets
from pz_envs.countdown.env import CountdownEnv


def test_every_row_is_registered_once_with_no_step_limit() -> None:
    before = dict(gymnasium.registry)
    pz_envs.register_all()
    assert dict(gymnasium.registry) == before
    for row in pz_envs.rows():
        spec = gymnasium.registry[row.id]
        assert spec.max_episode_steps is None
        assert spec.entry_point == row.entry_point
        assert spec.kwargs == row.kwargs


def test_the_table_holds_every_id_of_every_family() -> None:
    rows = pz_envs.rows()
    families = [row.family for row in rows]
    assert {name: families.count(name) for name in pz_envs.FAMILIES} == {
        "countdown": 1,
        "jericho": 57,
        "webshop": 1,
        "scienceworld": 31,
        "textworld": 4,
        "sokoban": 1,
        "gymcards": 4,
        "math": 9,
        "alfworld": 1,
    }
    assert len({row.id for row in rows}) == len(rows)
    ids = {row.id for row in rows}
    assert {"pz/Countdown-v0", "pz/Zork1-v0", "pz/Detective-v0", "pz/Pentari-v0"} <= ids
    for row in rows:
        family = pz_envs.FAMILIES[row.family]
        assert row.extra in (None, family.extra)
        graded = row.family in ("jericho", "webshop", "scienceworld", "textworld")
        assert row.metric == ("score_norm" if graded else "success")
    assert [row.id for row in rows if not row.expert] == ["pz/Sherbet-v0"]
    assert pz_envs.find("pz/Lostpig-v0").expert_score == 6
    assert pz_envs.find("pz/Zork1-v0").expert_score is None


def test_an_unknown_id_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"No environment `pz/Zrk1-v0`.*Did you mean `pz/Zork1-v0`"
    ):
        pz_envs.find("pz/Zrk1-v0")
    with pytest.raises(ConfigError, match=r"Did you mean `pz/Countdown-v0`"):
        pz_envs.find("pz/countdown-v0")
    assert pz_envs.find("pz_envs:pz/Countdown-v0").id == "pz/Countdown-v0"


def test_make_env_is_bare_and_adds_the_split() -> None:
    train = pz_envs.make_env("pz/Countdown-v0", split="train")
    test = pz_envs.make_env("pz/Countdown-v0", split="eval", admissible_commands=False)
    assert type(train) is type(test) is CountdownEnv
    assert train.reset(seed=0)[0] != test.reset(seed=0)[0]
    with pytest.raises(ConfigError, match="'train', 'eval' and None"):
        pz_envs.make_env("pz/Countdown-v0", split="test")  # type: ignore[arg-type]


def test_make_env_refuses_an_unknown_argument_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no argument `trys`.*Did you mean `tries`"):
        pz_envs.make_env("pz/Countdown-v0", trys=2)


@pytest.mark.parametrize("form", ["pz/Countdown-v0", "pz_envs:pz/Countdown-v0"])
def test_gymnasium_makes_it_in_both_forms(form: str) -> None:
    env = gymnasium.make(form, tries=2)
    assert isinstance(env.unwrapped, TextEnv)
    observation, _ = env.reset(seed=3)
    assert observation.startswith("Numbers: ")
    assert env.step("1+1")[2] is False
    env.close()


def test_countdown_needs_nothing_and_a_game_its_story(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    empty = tmp_path
    monkeypatch.setenv("PZ_CACHE", str(empty))
    monkeypatch.setenv("PZ_DATA", str(empty))
    found = SimpleNamespace(submodule_search_locations=[])
    monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda name: found)
    lacks = {row.id: pz_envs.missing(row) for row in pz_envs.rows()}
    assert lacks["pz/Countdown-v0"] is None
    assert "pz-envs data get zork_mit" in str(lacks["pz/Zork1-v0"])
    assert "pz-envs data get jericho/detective.z5" in str(lacks["pz/Detective-v0"])
    trinity = str(lacks["pz/Trinity-v0"])
    assert "no free source" in trinity
    assert str(empty / "data" / "jericho") in trinity
    story = b"a stand-in for the MIT release"
    monkeypatch.setattr(catalog, "MIT_ZORK1_MD5", hashlib.md5(story).hexdigest())
    (empty / "jericho").mkdir()
    (empty / "jericho" / "zork1.z3").write_bytes(story)
    assert pz_envs.missing(pz_envs.find("pz/Zork1-v0")) is None


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda name: None)
    lack = pz_envs.missing(pz_envs.find("pz/Detective-v0"))
    assert lack is not None
    assert "pip install 'pz-envs[jericho]'" in lack


@pytest.mark.data
def test_with_the_real_stories_the_games_are_playable() -> None:
    pytest.importorskip("jericho")
    if datasets.find_file("jericho", "detective.z5") is None:
        pytest.skip("the jericho data set is not here")
    playable = [row.id for row in pz_envs.rows() if pz_envs.missing(row) is None]
    assert len(playable) >= 41
    assert {"pz/Zork1-v0", "pz/Detective-v0", "pz/Pentari-v0"} <= set(playable)
