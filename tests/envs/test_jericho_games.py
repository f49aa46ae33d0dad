"""The table of games and the checks of story files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jericho
import pytest
from jericho.defines import BINDINGS_DICT

from pz_envs import datasets
from pz_envs.errors import ConfigError, DataError
from pz_envs.jericho.env import JerichoEnv
from pz_envs.jericho.games import GAMES, MIT_ZORK1_MD5, find_game
from pz_envs.jericho.story import find_story

_C_NAMES = {"905": "nine05", "acorncourt": "acorn", "tryst205": "tryst"}
ZORK1 = find_game("zork1")


def _real(name: str) -> Path:
    path = datasets.find_story(find_game(name).md5)
    if path is None:
        pytest.skip(f"no story file of {name}")
    return path


def test_the_table_is_what_the_installed_jericho_supports() -> None:
    assert {game.md5 for game in GAMES} == set(BINDINGS_DICT)
    library = jericho.jericho._load_frotz_lib()
    for game in GAMES:
        bindings = BINDINGS_DICT[game.md5]
        assert game.name == bindings["name"]
        assert game.file == bindings["rom"]
        assert game.has_walkthrough == ("walkthrough" in bindings)
        c_name = _C_NAMES.get(game.name, game.name)
        assert game.max_score == getattr(library, f"{c_name}_max_score")()


def test_names_and_id_parts_are_unique() -> None:
    assert len(GAMES) == 57
    assert len({game.name for game in GAMES}) == 57
    assert len({game.camel for game in GAMES}) == 57
    assert ZORK1.camel == "Zork1"
    assert find_game("detective").camel == "Detective"


def test_the_table_needs_no_jericho() -> None:
    script = (
        "import sys; sys.modules['jericho'] = None\n"
        "from pz_envs.jericho import GAMES\n"
        "assert len(GAMES) == 57\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_jericho_the_error_is_the_command_that_installs_it() -> None:
    path = _real("zork1")
    script = (
        "import sys; sys.modules['jericho'] = None\n"
        "from pz_envs import ConfigError\n"
        "from pz_envs.jericho.env import JerichoEnv\n"
        "try:\n"
        f"    JerichoEnv('zork1', story={str(path)!r})\n"
        "except ConfigError as error:\n"
        "    assert \"pip install 'pz-envs[jericho]'\" in str(error), error\n"
        "else:\n"
        "    raise AssertionError('no error')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_unknown_game_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"No game `zrk1`\. Did you mean `zork1`\?"):
        JerichoEnv("zrk1")


def _header(version: int, size: int = 4096, length: int = 0) -> bytes:
    data = bytearray(size)
    data[0] = version
    data[0x1A:0x1C] = length.to_bytes(2, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.z5", b"", "it is empty"),
        ("short.z5", b"\x05\x00\x01", "3 bytes"),
        ("v6.z6", _header(6), "first byte is 6"),
        ("glulx.ulx", b"Glul" + bytes(100), "Glulx"),
        ("blorb.zblorb", b"FORM" + bytes(100), "Blorb"),
        ("text.z5", b"<html>not a story</html>" * 9, "first byte is 60"),
        ("truncated.z5", _header(5, 4096, 20_000), "truncated: 4096 bytes of the 80000"),
        ("tw-game.z8", _header(8), "another game"),
        ("random.z3", _header(3), "another game"),
    ],
)
def test_a_file_that_is_no_story_is_a_data_error(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=complaint) as caught:
        JerichoEnv("zork1", story=path)
    assert ZORK1.md5 in str(caught.value)


def test_a_damaged_copy_of_the_right_story_is_a_data_error(tmp_path: Path) -> None:
    data = bytearray(_real("zork1").read_bytes())
    damaged = tmp_path / "zork1.z5"
    damaged.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="truncated"):
        JerichoEnv("zork1", story=damaged)
    data[30_000] ^= 0xFF
    damaged.write_bytes(data)
    with pytest.raises(DataError, match="another release"):
        JerichoEnv("zork1", story=str(damaged))
    with pytest.raises(DataError, match="another game"):
        JerichoEnv("detective", story=_real("zork1"))


@pytest.mark.parametrize("story", ["/nowhere/zork1.z5", "/", "\ud800.z5", "a\0b"])
def test_a_path_that_cannot_be_read_is_a_data_error(story: str) -> None:
    with pytest.raises(DataError, match="cannot read"):
        JerichoEnv("zork1", story=story)


def test_the_right_story_is_accepted_under_any_name(tmp_path: Path) -> None:
    copy = tmp_path / "tw-odd name.bin"
    copy.write_bytes(_real("zork1").read_bytes())
    env = JerichoEnv("zork1", story=copy, isolated=False)
    observation, info = env.reset(seed=1)
    assert "West of House" in observation
    assert env.step("north")[4]["valid"]
    assert info["max_score"] == 350


def test_a_story_that_is_nowhere_names_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PZ_DATA", str(tmp_path))
    monkeypatch.setenv("PZ_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="pz-envs data get jericho"):
        JerichoEnv("detective")


def test_the_mit_release_stands_in_for_a_missing_zork1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mit = datasets.find_story(MIT_ZORK1_MD5)
    if mit is None:
        pytest.skip("no copy of release 119")
    assert find_story(ZORK1).is_mit_zork1 == (datasets.find_story(ZORK1.md5) is None)
    folder = tmp_path / "jericho" / "zork_mit"
    folder.mkdir(parents=True)
    (folder / "zork1.z3").write_bytes(mit.read_bytes())
    monkeypatch.setenv("PZ_DATA", str(tmp_path))
    monkeypatch.setenv("PZ_CACHE", str(tmp_path / "cache"))
    assert find_story(ZORK1).is_mit_zork1
    with pytest.raises(DataError):
        find_story(find_game("zork2"))
