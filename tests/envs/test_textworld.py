"""TextWorld: our engine beside TextWorld's own, games by seed and by path, and files gone bad."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pz_envs import ConfigError, DataError, EnvError, InfraError
from pz_envs.checks import check_env
from pz_envs.seeding import generator
from pz_envs.textworld.env import TextWorldEnv
from pz_envs.textworld.games import Options, build, cached_path, prepare, read_story

textworld = pytest.importorskip("textworld")

# One game serves most tests: making one takes seconds.
_SMALL: dict[str, Any] = {"challenge": "cooking", "games": 1, "rooms": 1, "recipe": 1}


def _options(challenge: str = "cooking", **changes: Any) -> Options:
    kwargs: dict[str, Any] = {
        "split": "train",
        "level": None,
        "recipe": (1, 1),
        "rooms": 1,
        "skills": ("take", "open", "cook", "cut"),
        "route": False,
    }
    return Options(challenge, **(kwargs | changes))  # type: ignore[arg-type]


def _unpacked(folder: Path, packed: Path, name: str = "game.z8") -> Path:
    """Write a game of the cache as TextWorld would: a story file and its description."""
    path = folder / name
    with zipfile.ZipFile(packed) as archive:
        path.write_bytes(archive.read("game.z8"))
        path.with_suffix(".json").write_bytes(archive.read("game.json"))
    return path


@pytest.fixture(scope="module")
def packed() -> Path:
    return prepare(_options().spec(0))


@pytest.fixture
def story(packed: Path, tmp_path: Path) -> Path:
    return _unpacked(tmp_path, packed)


@pytest.fixture(scope="module")
def env() -> Iterator[TextWorldEnv]:
    made = TextWorldEnv(**_SMALL, isolated=False)
    yield made
    made.close()


def _walkthrough(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        found: list[str] = json.loads(archive.read("game.json"))["metadata"]["walkthrough"]
    return found


# Beside TextWorld's own engine.


def _words(text: str) -> str:
    """Return the words of TextWorld's answer, without prompt, status line and question."""
    text = text.rpartition("\n>")[0] or text
    return " ".join(text.split("Would you like to RESTART")[0].split())


def _play_beside(path: Path, seed: int, steps: int, *, listing: bool) -> int:
    """Win, then play at random, in both engines and compare all that they say; returns ends."""
    infos = textworld.EnvInfos(
        feedback=True, score=True, max_score=True, won=True, lost=True, admissible_commands=True
    )
    theirs = textworld.start(str(path), infos)
    ours = TextWorldEnv(game=path, admissible_commands=listing, isolated=False)
    rng = generator("beside", seed)
    walkthrough = [*textworld.Game.load(str(path.with_suffix(".json"))).walkthrough]
    odd = ("dance", "take unicorn", "look", "go up", "x floor", "eat", "take all", "score")
    ended, over = 0, True
    for _ in range(steps):
        if over:
            state = theirs.reset()
            observation, info = ours.reset(seed=0)
            title = _words(state.feedback).removesuffix(" ".join(observation.split()))
            assert set(title) <= set(" |\\/_$<>")
            way, over = list(walkthrough), False
            assert info["max_score"] == state.max_score
        draw = int(rng.integers(10))
        if way and (draw < 5 or not ended):
            command = way.pop(0)
        elif draw < 8:
            command = str(rng.choice(state.admissible_commands))
        else:
            command = str(rng.choice(odd))
        before = state.score
        state, _, over = theirs.step(command)
        observation, reward, ended_here, _, info = ours.step(command)
        assert " ".join(observation.split()) == _words(state.feedback), command
        won = bool(state.won)
        assert (ended_here, info["success"]) == (over, won), command
        if not (over and not won):  # TextWorld does not read the score of a lost game's last turn
            assert (info["score"], reward) == (state.score, state.score - before), command
        if listing:
            assert info["admissible_commands"] == (
                () if over else tuple(state.admissible_commands)
            ), command
        ended += over
    return ended


@pytest.mark.parametrize("listing", [False, True])
def test_every_answer_is_textworlds_own(story: Path, listing: bool) -> None:
    assert _play_beside(story, 0, 90, listing=listing) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("challenge", ["cooking", "treasure", "coin"])
def test_every_answer_is_textworlds_own_in_larger_games(challenge: str, tmp_path: Path) -> None:
    packed = prepare(_options(challenge, split="valid", recipe=(1, 3), rooms=6).spec(0))
    assert _play_beside(_unpacked(tmp_path, packed), 1, 120, listing=True) >= 1


# Episodes.


def test_the_expert_wins_with_the_whole_score(env: TextWorldEnv, packed: Path) -> None:
    first, info = env.reset(seed=0)
    assert first.startswith("You are hungry!")
    assert "$$" not in first
    total, steps = 0.0, []
    while (action := env.expert_action()) is not None:
        observation, reward, over, _, info = env.step(action)
        total += reward
        steps.append(action)
    assert steps == _walkthrough(packed)
    assert (over, info["success"], info["score_norm"]) == (True, True, 1.0)
    assert total == info["score"] == info["max_score"] > 1
    assert observation.endswith("turns.")
    with pytest.raises(EnvError, match="reset"):
        env.step("look")


def test_a_lost_game_ends_without_success(env: TextWorldEnv, packed: Path) -> None:
    env.reset(seed=0)
    for action in _walkthrough(packed):
        _, _, over, _, info = env.step(action)
        if action.startswith("cook"):
            score = info["score"]
            observation, reward, over, _, info = env.step(action)  # burns it
            break
    assert "*** You lost! ***" in observation
    assert (over, info["success"], reward, info["score"]) == (True, False, 0.0, score)
    assert env.expert_action() is None


@pytest.mark.parametrize(
    ("command", "valid"),
    [
        ("look", True),
        ("INVENTORY", True),
        ("go nowhere", False),
        ("go north-north-west", False),
        ("open cookbook", True),
        ("dance", False),
        ("take", False),
        ("score", False),
        ("save", False),
        ("undo", False),
        ("look. quit", False),
        ("tw-print max_score", False),
        ("look then tw-extra-infos description", False),
        ("restrict commands", False),
        ("look\0", True),
        ("\\look", True),
        ("🙂", False),
        ("look " * 30, False),
    ],
)
def test_a_command_is_valid_when_the_game_takes_a_turn(
    env: TextWorldEnv, command: str, valid: bool
) -> None:
    env.reset(seed=0)
    observation, reward, over, _, info = env.step(command)
    assert (info["valid"], reward, over) == (valid, 0.0, False), observation
    assert "<score>" not in observation


def test_leaving_the_walkthrough_ends_the_experts_advice(env: TextWorldEnv) -> None:
    env.reset(seed=0)
    first = env.expert_action()
    env.step(f"<action>{first}</action>")
    assert env.expert_action() is not None
    env.step("wait")
    assert env.expert_action() is None


def test_isolated_and_listing_change_nothing_else(env: TextWorldEnv, packed: Path) -> None:
    script = ["wait", *_walkthrough(packed)[:6], "dance"]
    with_commands = TextWorldEnv(**_SMALL, isolated=False, admissible_commands=True)
    isolated = TextWorldEnv(**_SMALL)

    def play(played: TextWorldEnv) -> list[Any]:
        events: list[Any] = [played.reset(seed=4), *map(played.step, script)]
        for event in events:
            event[-1].pop("admissible_commands")
        return events

    expected = play(env)
    assert play(with_commands) == expected
    assert play(isolated) == expected
    isolated.close()


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"isolated": False, "admissible_commands": True, "reply_format": "tags"}],
    ids=["isolated", "listing"],
)
def test_it_passes_the_conformance_suite(kwargs: dict[str, Any], packed: Path) -> None:
    report = check_env(lambda: TextWorldEnv(**_SMALL, **kwargs), seeds=(0,))
    assert "going back" in report.passed


def test_a_snapshot_goes_on_in_another_environment_even_from_the_end(
    env: TextWorldEnv, packed: Path
) -> None:
    way = _walkthrough(packed)
    listing: dict[str, Any] = {"isolated": False, "admissible_commands": True}
    one, other = TextWorldEnv(**_SMALL, **listing), TextWorldEnv(**_SMALL, **listing)
    one.reset(seed=0)
    for action in way[:4]:
        one.step(action)
    saved = one.snapshot()
    after = [one.step(action) for action in way[4:]]
    assert after[-1][4]["success"]
    ended = one.snapshot()
    for going_on in (one, other):
        going_on.restore(saved)
        assert going_on.expert_action() == way[4]
        assert going_on.snapshot() == saved
        assert [going_on.step(action) for action in way[4:]] == after
    other.reset(seed=0)
    assert other.restore(ended)[1]["success"]
    with pytest.raises(EnvError, match="reset"):
        other.step("look")
    env.reset(seed=0)
    env.restore(saved)  # what was not asked for need not be in a state
    one.reset(seed=0)
    with pytest.raises(EnvError, match="without admissible commands"):
        one.restore(env.snapshot())
    assert one.step(way[0])[4]["valid"]  # the episode goes on


def test_an_engine_that_dies_costs_the_episode_and_no_more(packed: Path) -> None:
    env = TextWorldEnv(**_SMALL)
    first = env.reset(seed=0)
    assert env._worker is not None
    assert env._worker.pid is not None
    os.kill(env._worker.pid, signal.SIGKILL)
    with pytest.raises(InfraError, match="reset"):
        env.step("look")
    with pytest.raises(EnvError, match="reset"):
        env.step("look")
    again = env.reset(seed=0)
    assert again[0] == first[0]
    assert again[1]["extra"] == {"engine_restarts": 1}
    env.close()


@pytest.mark.parametrize("kwargs", [{"isolated": True}, {"isolated": False}])
def test_a_state_that_is_none_is_refused(kwargs: dict[str, Any], packed: Path) -> None:
    env = TextWorldEnv(**_SMALL, **kwargs)
    env.reset(seed=0)
    path = str(packed)
    with pytest.raises(EnvError, match="no TextWorld engine saved"):
        env._call("load", path, b"123")
    state = env._call("save")
    with pytest.raises(EnvError, match="no TextWorld engine saved"):
        env._call("load", path, state[:-1])
    digest = read_story(packed).digest.encode()
    with pytest.raises(EnvError, match="made with the same options"):
        env._call("load", path, state.replace(digest, digest[::-1]))
    env.close()


# Sets of games.


def test_games_of_the_splits_and_settings_are_apart() -> None:
    specs = [
        json.dumps(_options(challenge, split=split).spec(index), sort_keys=True)
        for challenge in ("cooking", "treasure", "coin")
        for split in ("train", "valid", "test")
        for index in range(50)
    ]
    assert len(set(specs)) == len(specs)
    seeds = [
        {_options("coin", split=split).spec(index)["seed"] for index in range(1000)}
        for split in ("train", "valid", "test")
    ]
    assert len(set().union(*seeds)) == 3000
    levels = [_options("treasure", level=(3, 5)).spec(i)["settings"]["level"] for i in range(4)]
    assert levels == [3, 4, 5, 3]
    mixed = [_options("mixed").spec(index) for index in range(6)]
    assert [spec["challenge"] for spec in mixed] == ["cooking", "treasure", "coin"] * 2
    assert mixed[4] == _options("treasure").spec(1)


def test_the_seed_decides_the_game_and_an_index_picks_it(packed: Path) -> None:
    env = TextWorldEnv(**(_SMALL | {"games": 5}), isolated=False)
    assert env.reset(options={"index": 0})[1]["task_id"] == f"textworld/{packed.stem}"
    with pytest.raises(ConfigError, match="0 to 4"):
        env.reset(options={"index": 5})


def test_a_cache_named_by_a_relative_path_is_found_by_the_engine(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PZ_CACHE", os.path.relpath(packed.parents[1]))
    env = TextWorldEnv(**_SMALL)
    assert env.reset(seed=0)[1]["task_id"] == f"textworld/{packed.stem}"
    env.close()


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"challenge": "cook"}, "Did you mean `cooking`"),
        ({"split": "eval"}, "Allowed: train, valid, test"),
        ({"games": 0}, "1 to 1000000"),
        ({"challenge": "treasure", "level": 31}, "highest <= 30"),
        ({"challenge": "treasure", "level": (5, 4)}, "lowest <= highest"),
        ({"challenge": "coin", "level": 151}, "100 rooms"),
        ({"challenge": "coin", "level": (90, 234)}, "100 rooms"),
        ({"challenge": "coin", "level": 301}, "100 rooms"),
        ({"challenge": "coin", "level": 0}, "100 rooms"),
        ({"challenge": "cooking", "level": 3}, "recipe, rooms and skills"),
        ({"level": (1, 2, 3)}, "one number"),
        ({"level": "ab"}, "one number"),
        ({"recipe": 6}, "most <= 5"),
        ({"rooms": 5}, "1, 6, 9, 12"),
        ({"skills": ("cook", "cutting")}, "'cutting'"),
    ],
)
def test_a_wrong_argument_is_named(kwargs: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        TextWorldEnv(**kwargs)


def test_without_textworld_the_command_that_installs_it_is_named() -> None:
    code = (
        "import sys\n"
        "sys.modules['textworld'] = None\n"
        "from pz_envs.textworld.env import TextWorldEnv\n"
        "try:\n    TextWorldEnv('coin')\n"
        "except Exception as error:\n    sys.stdout.write(f'{type(error).__name__}: {error}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ConfigError")
    assert "pip install 'pz-envs[textworld]'" in done.stdout


def test_making_an_environment_imports_no_textworld(packed: Path) -> None:
    code = (
        "import sys\n"
        "from pz_envs.textworld.env import TextWorldEnv\n"
        f"env = TextWorldEnv(**{_SMALL!r}, isolated=False)\n"
        "env.reset(seed=0); env.step('look')\n"
        "sys.stdout.write(str('textworld' in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False"


@pytest.mark.slow
@pytest.mark.parametrize("challenge", ["cooking", "treasure", "coin"])
@pytest.mark.parametrize("index", [0, 1])
def test_the_expert_wins_games_of_every_challenge(challenge: str, index: int) -> None:
    env = TextWorldEnv(challenge, isolated=False, split="valid", admissible_commands=True)  # type: ignore[arg-type]
    observation, info = env.reset(options={"index": index})
    assert "Would you like" not in observation
    while (action := env.expert_action()) is not None:
        _, _, over, _, info = env.step(action)
    assert over
    assert info["success"]
    assert info["score"] == info["max_score"]


@pytest.mark.slow
def test_a_game_is_made_once_by_all_who_ask_and_again_the_same_when_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PZ_CACHE", str(tmp_path))
    spec = _options("coin", level=(3, 3)).spec(0)
    path = cached_path(spec)
    times = []

    def ask() -> None:
        prepare(spec)
        times.append(path.stat().st_mtime_ns)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(times) == 3
    assert len(set(times)) == 1
    made = path.read_bytes()
    path.write_bytes(made[: len(made) // 2])
    assert prepare(spec) == path
    assert path.read_bytes() == made
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.slow
def test_what_textworld_cannot_make_is_an_error_that_says_so() -> None:
    spec = _options("coin").spec(0)
    with pytest.raises(EnvError, match=r"20 seeds failed.*Expected level"):
        build(spec | {"settings": {"level": 1000}})


# Files.


def test_a_story_file_is_played_by_path(story: Path, packed: Path) -> None:
    renamed = story.rename(story.with_name("tw-cooking-mine.z8"))
    story.with_suffix(".json").rename(renamed.with_suffix(".json"))
    env = TextWorldEnv(game=str(renamed), admissible_commands=True)
    _, info = env.reset(seed=3)
    assert info["task_id"] == "textworld/tw-cooking-mine"
    assert "meal" in info["instruction"]
    assert "inventory" in info["admissible_commands"]
    for action in _walkthrough(packed):
        assert env.expert_action() == action
        info = env.step(action)[4]
    assert info["success"]
    env.close()


def test_without_a_description_there_are_score_and_end_but_no_expert(
    story: Path, packed: Path
) -> None:
    story.with_suffix(".json").unlink()
    env = TextWorldEnv(game=story, isolated=False)
    _, info = env.reset(seed=0)
    assert info["max_score"] > 1
    assert env.expert_action() is None
    for action in _walkthrough(packed):
        info = env.step(action)[4]
    assert (info["success"], info["score_norm"]) == (True, 1.0)
    listing = TextWorldEnv(game=story, admissible_commands=True)
    with pytest.raises(DataError, match=r"no \.json beside it"):
        listing.reset(seed=0)
    listing.close()


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (Path.unlink, "No such file"),
        (_cut, "truncated or damaged"),
        (_flip, "truncated or damaged"),
        (lambda path: path.write_bytes(b""), "no Z-machine story file of version 8"),
        (lambda path: path.write_bytes(b"\5" * 999), "version 8"),
        (lambda path: path.write_bytes(b"\x08" + bytes(99)), "truncated or damaged"),
        (lambda path: path.with_suffix(".json").write_text("{"), "is no JSON"),
        (lambda path: path.with_suffix(".json").write_text("[1]"), "does not describe"),
        (
            lambda path: path.with_suffix(".json").write_text('{"KB": 1, "metadata": 2}'),
            "does not describe",
        ),
        (lambda path: path.with_suffix(".json").write_bytes(b"\xff\xfe\xfd"), "is no JSON"),
    ],
)
def test_a_file_gone_bad_is_named_before_anything_runs(story: Path, spoil: Any, said: str) -> None:
    spoil(story)
    with pytest.raises(DataError, match=said):
        TextWorldEnv(game=story)


def test_a_description_of_something_else_is_named(story: Path) -> None:
    story.with_suffix(".json").write_text('{"KB": {}}')
    env = TextWorldEnv(game=story, admissible_commands=True, isolated=False)
    with pytest.raises(DataError, match="does not describe a TextWorld game"):
        env.reset(seed=0)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EnvError, match=r"Glulx.*compile_game"):
        TextWorldEnv(game=tmp_path / "game.ulx")
    with pytest.raises(DataError, match=r"is a \.z8 file"):
        TextWorldEnv(game=tmp_path / "game.z5")


@pytest.mark.data
def test_a_story_of_another_maker_is_refused() -> None:
    from pz_envs.datasets import find_file

    path = find_file("jericho", "lostpig.z8")
    if path is None:
        pytest.skip("lostpig.z8 is not here")
    env = TextWorldEnv(game=path)
    with pytest.raises(DataError, match="no game of TextWorld"):
        env.reset(seed=0)
    env.close()
