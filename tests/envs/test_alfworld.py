"""ALFWorld: the reference engine's transcripts, every walkthrough, sources, and the environment."""

from __future__ import annotations

import gzip
import json
import random
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pz_envs.alfworld.env import ALFWorldEnv
from pz_envs.alfworld.games import load_games, missing_games, open_game
from pz_envs.alfworld.household import TASK_TYPES
from pz_envs.alfworld.native import NOTHING, Household, World
from pz_envs.alfworld.pddl import Facts, compile_formula, parse, read_existential
from pz_envs.checks import check_env
from pz_envs.datasets import find_file
from pz_envs.errors import ConfigError, DataError
from pz_envs.seeding import generator

_GOLDEN = Path(__file__).with_name("golden_alfworld.json.gz")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """What the reference engine (textworld 1.7.0, alfworld 0.4.2) answered, and the games."""
    content: dict[str, Any] = json.loads(gzip.decompress(_GOLDEN.read_bytes()))
    archive = find_file("alfworld", "games_train.tar.xz")
    if archive is None:
        pytest.skip("no games_train.tar.xz; set PZ_DATA")
    missing = {game["id"]: game for game in content["games"]}
    with tarfile.open(archive) as members:
        for member in members:
            name = "/".join(Path(member.name).parts[-4:-1])
            if member.name.endswith("game.tw-pddl") and name in missing:
                file = members.extractfile(member)
                assert file is not None
                data = json.load(file)
                game = missing.pop(name)
                game["data"] = _older(data) if game["older"] else data
            if not missing:
                break
    assert not missing
    return content


def _older(data: dict[str, Any]) -> dict[str, Any]:
    """Return a game as alfworld 0.3 wrote it: "put X in/on Y", no help, another arrival text."""
    grammar, domain = data["grammar"], data["pddl_domain"]
    for new, old in (
        ("You arrive at {r.name}.", "You arrive at {lend.name}."),
        ("You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}."),
        ("move {o} to {r}", "put {o} in/on {r}"),
    ):
        assert new in grammar
        grammar = grammar.replace(new, old)
    domain = domain[: domain.index("(:action help")].rstrip() + "\n)\n"
    domain = domain.replace("(receptacleType ?r SinkType)", "")
    walkthrough = [re.sub(r"^move (.*) to ", r"put \1 in/on ", c) for c in data["walkthrough"]]
    grammar = grammar[: grammar.index("action help {")].rstrip() + "\n"
    return data | {"grammar": grammar, "pddl_domain": domain, "walkthrough": walkthrough}


def _files(golden: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for game in golden["games"]:
        yield game["id"], {**game["data"], "solvable": True}


@pytest.fixture(scope="module")
def folder(golden: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden games as the files of a split."""
    root = tmp_path_factory.mktemp("alfworld")
    for name, data in _files(golden):
        split, _, rest = name.partition("/")
        path = root / split.replace("valid_seen", "train") / rest / "game.tw-pddl"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(data))
    return root


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: Any) -> None:
    if request.node.get_closest_marker("data") is None:
        monkeypatch.setenv("PZ_CACHE", str(tmp_path / "cache"))


def test_text_commands_and_end_are_the_reference_engines(golden: dict[str, Any]) -> None:
    compared = 0
    for game, (name, data) in zip(golden["games"], _files(golden), strict=True):
        world = World(data["pddl_domain"], data["pddl_problem"], data["grammar"])
        for play in game["plays"]:
            household = Household(world)
            for step, (command, observation, admissible, won) in enumerate(play):
                said = household.begin() if step == 0 else household.play(command) or NOTHING
                where = f"{name}, step {step}, {command!r}"
                assert said == observation, where
                assert list(household.admissible()) == admissible, where
                assert household.won == won, where
                compared += 1
    assert compared > 700


def test_the_golden_file_shows_all_task_types_both_wordings_and_most_verbs(
    golden: dict[str, Any],
) -> None:
    assert {game["id"].split("/")[1].partition("-")[0] for game in golden["games"]} == set(
        TASK_TYPES
    )
    steps = [step for game in golden["games"] for play in game["plays"] for step in play]
    played = {command.split()[0] for command, said, *_ in steps if command and said != NOTHING}
    verbs = {"go", "open", "close", "take", "move", "clean", "heat", "cool", "use", "look", "slice"}
    assert verbs | {"examine", "inventory", "help"} <= played
    offered = {command.partition(" ")[0] for step in steps for command in step[2]}
    assert {"put", "move"} <= offered


def test_every_golden_game_is_won_by_its_walkthrough(folder: Path) -> None:
    env = ALFWorldEnv(source=str(folder))
    for index in range(len(env)):
        _, info = env.reset(options={"index": index})
        terminated = False
        while not terminated:
            command = env.expert_action() or ""
            assert command in info["admissible_commands"], info["task_id"]
            _, reward, terminated, _, info = env.step(command)
        assert (reward, info["success"], info["score"], info["score_norm"]) == (1.0, True, 1.0, 1.0)
        assert env.expert_action() is None


def test_the_environment_passes_the_conformance_suite(folder: Path) -> None:
    report = check_env(lambda: ALFWorldEnv(source=str(folder)))
    assert {"going back", "expert", "fuzzed replies", "random action"} <= set(report.passed)


def test_extra_states_task_type_wording_and_engine(folder: Path) -> None:
    env = ALFWorldEnv(source=str(folder))
    wordings = set()
    for index in range(len(env)):
        observation, info = env.reset(options={"index": index})
        extra = info["extra"]
        assert extra["engine"] == "native"
        assert info["task_id"].endswith(extra["game"])
        assert extra["game"].startswith(extra["task_type"])
        assert observation.endswith(info["instruction"])
        assert info["instruction"].startswith("Your task is to: ")
        wordings.add(extra["wording"])
        assert extra["help"] == ("help" in info["admissible_commands"])
    assert wordings <= {"put X in/on Y", "move X to Y"}


def test_the_older_wording_is_recognised(golden: dict[str, Any], tmp_path: Path) -> None:
    name, data = next(_files(golden))
    older = data["grammar"].replace("move {o} to {r}", "put {o} in/on {r}")
    path = tmp_path / name / "game.tw-pddl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(data | {"grammar": older}))
    env = ALFWorldEnv(split="valid_seen" if "valid_seen" in name else "train", source=str(tmp_path))
    assert env.reset(seed=0)[1]["extra"]["wording"] == "put X in/on Y"


def test_an_inadmissible_command_is_an_invalid_step_and_changes_nothing(folder: Path) -> None:
    env = ALFWorldEnv(source=str(folder))
    _, before = env.reset(seed=1)
    for command in ("open the door, then leave", "go to nowhere 1", "LOOK"):
        observation, reward, terminated, _, info = env.step(command)
        assert (observation, reward, terminated, info["valid"]) == (NOTHING, 0.0, False, False)
        assert info["admissible_commands"] == before["admissible_commands"]
    assert env.step("look")[4]["valid"]


def test_off_the_walkthrough_the_expert_still_wins(folder: Path) -> None:
    env = ALFWorldEnv(source=str(folder))
    for index in range(len(env)):
        _, info = env.reset(options={"index": index})
        detour = [c for c in info["admissible_commands"] if c.startswith("go to")][-1]
        for command in (detour, "look"):
            info = env.step(command)[4]
        for _ in range(40):
            command = env.expert_action()
            if command is None:
                break
            info = env.step(command)[4]
        assert info["success"], info["task_id"]


def test_a_snapshot_restores_the_household_in_another_environment(folder: Path) -> None:
    env, other = ALFWorldEnv(source=str(folder)), ALFWorldEnv(source=str(folder))
    rng = random.Random(5)
    for index in range(len(env)):
        _, info = env.reset(options={"index": index})
        for _ in range(6):
            info = env.step(rng.choice(info["admissible_commands"]))[4]
        if info["success"]:
            continue
        saved = env.snapshot()
        assert other.restore(saved)[1] == info
        for _ in range(6):
            command = rng.choice(info["admissible_commands"])
            ours, theirs = env.step(command), other.step(command)
            assert ours == theirs
            info = ours[4]
            if ours[2]:
                break
        other.restore(saved)
        assert other.snapshot() == saved


def test_a_snapshot_of_a_game_that_is_not_here_is_refused(folder: Path, tmp_path: Path) -> None:
    env = ALFWorldEnv(source=str(folder))
    games = sorted((folder / "train").iterdir())
    copy = tmp_path / "one" / "train" / games[0].name / "trial_x" / "game.tw-pddl"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(next(games[0].rglob("*.tw-pddl")).read_bytes())
    env.reset(options={"index": len(env) - 1})
    with pytest.raises(DataError, match="No ALFWorld game"):
        ALFWorldEnv(source=str(tmp_path / "one")).restore(env.snapshot())


def test_the_seed_or_the_index_picks_the_game(folder: Path) -> None:
    env = ALFWorldEnv(source=str(folder))
    names = [env.reset(options={"index": index})[1]["task_id"] for index in range(len(env))]
    assert names == sorted(names)
    assert len(set(names)) == len(env)
    assert {env.reset(seed=seed)[1]["task_id"] for seed in range(80)} == set(names)
    for index in (len(env), -1, "first"):
        with pytest.raises(ConfigError, match="allowed are 0 to"):
            env.reset(options={"index": index})


def test_task_types_narrow_the_games(folder: Path) -> None:
    chosen = ALFWorldEnv(source=str(folder), task_types="look_at_obj_in_light")
    assert 0 < len(chosen) < len(ALFWorldEnv(source=str(folder)))
    for seed in range(5):
        info = chosen.reset(seed=seed)[1]
        assert info["extra"]["task_type"] == "look_at_obj_in_light"
    with pytest.raises(ConfigError, match="Did you mean `pick_two_obj_and_place`"):
        ALFWorldEnv(source=str(folder), task_types=["pick_two_obj"])


def test_commands_are_listed_only_when_asked_for(folder: Path) -> None:
    env = ALFWorldEnv(source=str(folder), admissible_commands=False)
    assert env.reset(seed=0)[1]["admissible_commands"] is None
    command = env.random_action(generator("alfworld"))
    assert command is not None
    assert env.step(command)[4]["valid"]


def test_an_archive_and_a_folder_give_the_same_games(folder: Path, tmp_path: Path) -> None:
    packed, zipped = tmp_path / "games.tar.xz", tmp_path / "games.zip"
    files = sorted(folder.rglob("*.tw-pddl"), reverse=True)
    with tarfile.open(packed, "w:xz") as archive, zipfile.ZipFile(zipped, "w") as bundle:
        for file in files:
            name = f"json_2.1.1/{file.relative_to(folder)}"
            archive.add(file, name)
            bundle.write(file, name)
    expected = load_games("train", str(folder))
    for path in (packed, zipped):
        games = load_games("train", str(path))
        assert [game.name for game in games.games] == [game.name for game in expected.games]
        records = [games.record(game) for game in games.games]
        assert records == [expected.record(game) for game in expected.games]
    with pytest.raises(DataError, match="holds 0 ALFWorld games of valid_unseen"):
        load_games("valid_unseen", str(packed))
    for path in (packed, zipped):
        whole = path.read_bytes()
        path.write_bytes(whole[:-3000])
        with pytest.raises(DataError, match=rf"{path.name} cannot be read as an archive"):
            load_games("train", str(path))
        path.write_bytes(whole[:2000] + bytes(500) + whole[2500:])
        with pytest.raises(DataError, match=rf"{path.name} cannot be read as an archive"):
            load_games("train", str(path))


def test_what_alfworld_download_left_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PZ_DATA", str(tmp_path))
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    (tmp_path / "json_2.1.1").symlink_to(folder)
    assert missing_games("train") is None
    assert len(ALFWorldEnv(split="train")) == len(ALFWorldEnv(source=str(folder)))


def test_without_any_data_generated_games_stand_in_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pz_envs.alfworld import games

    monkeypatch.setenv("PZ_DATA", str(tmp_path))
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    games._warn_generated.cache_clear()
    for split in ("train", "valid_seen", "valid_unseen"):
        assert missing_games(split) is None  # type: ignore[arg-type]
        env = ALFWorldEnv(split=split)  # type: ignore[arg-type]
        _, info = env.reset(seed=3)
        assert info["extra"]["generated"]
        assert info["task_id"].endswith(f"/{split}")
    assert caplog.text.count("generated households stand in") == 1


def test_unsolvable_games_are_left_out(golden: dict[str, Any], tmp_path: Path) -> None:
    for number, (_, data) in enumerate(_files(golden)):
        path = tmp_path / "pick_and_place_simple-Mug-None-Desk-1" / str(number) / "game.tw-pddl"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(data | {"solvable": number == 0}))
    assert len(ALFWorldEnv(source=str(tmp_path))) == 1


def test_a_second_start_reads_only_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pz_envs.alfworld import games

    load_games("train", str(folder))
    games._load.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(games, "_members", None)
        assert len(load_games("train", str(folder)).games) > 0
    (cached,) = (tmp_path / "cache" / "alfworld").iterdir()
    games._load.cache_clear()
    cached.write_bytes(cached.read_bytes()[:100])
    assert len(load_games("train", str(folder)).games) > 0


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "is no ALFWorld game file"),
        ("[]", "is no ALFWorld game file"),
        ('{"pddl_domain": "x", "grammar": "no task", "pddl_problem": ""}', "is no ALFWorld game"),
        (
            '{"pddl_domain": "", "grammar": "Your task is to: rest.", "pddl_problem": ""}',
            "pddl_domain is empty",
        ),
    ],
)
def test_a_broken_game_file_is_named(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "task" / "trial" / "game.tw-pddl"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(DataError, match=named):
        ALFWorldEnv(source=str(tmp_path))


@pytest.mark.parametrize(
    ("key", "old", "new", "named"),
    [
        ("pddl_problem", "(:goal", "(:gaol", "no :goal section"),
        ("grammar", "action look", "action lok", "no action `look`"),
        ("grammar", "{r.indefinite} ", "{exec('1')} ", "unknown expression"),
        ("grammar", '"list_appliances": [', '"lists": [', "no rule `list_appliances`"),
    ],
)
def test_a_broken_or_dangerous_file_is_refused_by_name(
    golden: dict[str, Any], tmp_path: Path, key: str, old: str, new: str, named: str
) -> None:
    _, data = next(_files(golden))
    assert old in data[key]
    path = tmp_path / "task" / "trial" / "game.tw-pddl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(data | {key: data[key].replace(old, new)}))
    with pytest.raises(DataError, match=named):
        ALFWorldEnv(source=str(tmp_path)).reset(seed=0)


@pytest.mark.parametrize(
    ("key", "old", "new", "named"),
    [
        ("pddl_domain", "(holdsAny ?a)", "(full ?a)", "domain is not one that the native engine"),
        ("pddl_problem", "(inReceptacle ?", "(when (f) ?", "a form that pz does not know"),
        ("grammar", "You open the {r.name}.", "You open the {r.name}, [b].", "unknown form"),
        ("grammar", '"holdsany(a:agent)"', '"~holdsany(a:agent)"', "unknown condition"),
    ],
)
def test_what_the_native_engine_does_not_cover_is_found_when_a_game_is_opened(
    golden: dict[str, Any], tmp_path: Path, key: str, old: str, new: str, named: str
) -> None:
    _, data = next(_files(golden))
    assert old in data[key]
    path = tmp_path / "task" / "trial" / "game.tw-pddl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(data | {key: data[key].replace(old, new)}))
    games = load_games("train", str(tmp_path))
    opened = open_game(games, games.games[0])
    assert opened.world is None
    assert named in opened.not_covered


def test_missing_games_name_what_is_allowed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="a folder or an archive"):
        ALFWorldEnv(source=str(tmp_path / "nowhere"))
    monkeypatch.setenv("PZ_DATA", str(tmp_path))
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    (tmp_path / "json_2.1.1").symlink_to(folder)  # the train split alone
    with pytest.raises(DataError, match=r"alfworld-download .* games_valid_unseen\.tar\.xz"):
        ALFWorldEnv(split="valid_unseen")
    assert "of valid_seen are not here" in (missing_games("valid_seen") or "")
    with pytest.raises(ConfigError, match="Did you mean `valid_seen`"):
        ALFWorldEnv(split="valid-seen")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("formula", "true"),
    [
        ("(and)", True),
        ("(in a x)", True),
        ("(in a y)", False),
        ("(not (in a y))", True),
        ("(or (in a y) (in b x))", True),
        ("(imply (in a x) (in b y))", False),
        ("(exists (?o - thing) (in ?o y))", True),
        ("(exists (?o - place) (in ?o y))", False),
        ("(exists (?o ?p - thing) (and (in ?o x) (in ?p x) (not (= ?o ?p))))", True),
        ("(exists (?o ?p - thing) (and (in ?o y) (in ?p y) (not (= ?o ?p))))", False),
        ("(exists (?r - place) (exists (?o - thing) (and (red ?o) (in ?o ?r) (= ?r x))))", True),
        ("(forall (?o - thing) (or (in ?o x) (in ?o y)))", True),
        ("(forall (?o - thing) (red ?o))", False),
        ("(exists (?r - place) (forall (?o - thing) (imply (red ?o) (in ?o ?r))))", True),
        ("(exists (?r - place ?q - thing) (not (in ?q ?r)))", True),
    ],
)
def test_goals_mean_what_pddl_says(formula: str, true: bool) -> None:
    objects = {"thing": ("a", "b", "c"), "place": ("x", "y")}
    facts = Facts({"red": {("a",)}})
    view = facts.with_changing({"in": {("a", "x"), ("b", "x"), ("c", "y")}})
    assert compile_formula(parse(formula), objects)(view, {}) is true


@pytest.mark.parametrize(
    ("formula", "read"),
    [
        ("(and (exists (?o - thing) (red ?o)) (exists (?o - place) (in a ?o)))", True),
        ("(exists (?o ?p - thing) (and (red ?o) (not (= ?o ?p))))", True),
        ("(not (red a))", False),
        ("(or (red a) (red b))", False),
        ("(forall (?o - thing) (red ?o))", False),
    ],
)
def test_a_goal_is_read_flat_where_it_only_asks_for_things(formula: str, read: bool) -> None:
    found = read_existential(parse(formula))
    assert (found is not None) is read
    if found is not None:
        names = [term for _, terms in found.atoms for term in terms if term.startswith("?")]
        assert len(found.variables) == 2
        assert set(names) <= set(found.variables)


def _published(split: str) -> None:
    if find_file("alfworld", f"games_{split}.tar.xz") is None:
        pytest.skip(f"the ALFWorld games of {split} are not here")


def _play_walkthroughs(env: ALFWorldEnv, indices: list[int]) -> None:
    for index in indices:
        _, info = env.reset(options={"index": index})
        terminated = False
        while not terminated:
            command = env.expert_action() or ""
            assert command in info["admissible_commands"], info["task_id"]
            _, _, terminated, _, info = env.step(command)
        assert info["success"], info["task_id"]


@pytest.mark.data
def test_published_games_are_all_there_and_twenty_are_won() -> None:
    _published("valid_seen")
    env = ALFWorldEnv(split="valid_seen")
    assert len(env) == 140
    _play_walkthroughs(env, list(range(0, 140, 7)))


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "games", "played"), [("valid_seen", 140, 140), ("train", 3553, 300)]
)
def test_published_games_are_won_by_their_walkthroughs(split: Any, games: int, played: int) -> None:
    _published(split)
    env = ALFWorldEnv(split=split)
    assert len(env) == games
    _play_walkthroughs(env, random.Random(0).sample(range(games), played))


def _wander_then_win(household: Household, rng: random.Random, where: str) -> bool:
    """Take ten random steps, then follow plans; returns False where the game was lost by then."""
    for _ in range(10):
        if not household.won:
            household.play(rng.choice(household.admissible()))
    left = 100
    while not household.won:
        plan = household.plan()
        if plan is None:
            ((_, held),) = household.state()["holds"]
            world = household.world
            assert not any(world.fit(held, receptacle) for receptacle in world.place), where
            return False
        assert 0 < len(plan) < left, where
        left = len(plan)
        assert household.play(plan[0]) is not None, where
    return True


@pytest.mark.data
@pytest.mark.slow
def test_published_games_are_won_from_a_random_state() -> None:
    _published("valid_seen")
    games = load_games("valid_seen")
    rng = random.Random(2)
    won = 0
    for game in games.games:
        world = open_game(games, game).world
        assert world is not None
        won += _wander_then_win(Household(world), rng, game.name)
    assert won >= len(games.games) - 3
