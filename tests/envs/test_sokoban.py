"""Sokoban: rules by hand, levels from files, and a solver held against exhaustive search."""

from __future__ import annotations

import gzip
import itertools
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from pz_envs import ConfigError, DataError
from pz_envs.checks import check_env
from pz_envs.datasets import find_file
from pz_envs.seeding import generator
from pz_envs.sokoban.deadlocks import is_deadlock, live_cells
from pz_envs.sokoban.env import COMMANDS, SokobanEnv
from pz_envs.sokoban.generator import Knobs, generate, pull_depths
from pz_envs.sokoban.levels import Level, Split, load_levels, parse_level, split_of
from pz_envs.sokoban.solver import Boxes, reachable, solve, walkable

_LEVEL = """
#######
#@$ . #
# $ . #
#     #
#######
"""
_SPLITS: tuple[Split, ...] = ("train", "valid", "test")


@pytest.fixture
def level_file(tmp_path: Path) -> str:
    path = tmp_path / "mine.txt"
    path.write_text(f"; 0\n{_LEVEL.strip()}\n\n; second\n#####\n#@$.#\n#####\n")
    return str(path)


def _drawn(*rows: str) -> str:
    return "\n".join(rows)


# Rules.


def test_a_game_goes_by_the_rules(level_file: str) -> None:
    env = SokobanEnv(source=level_file)
    observation, info = env.reset(options={"index": 0})
    assert observation == _LEVEL.strip()
    assert (info["task_id"], info["max_score"], info["score"]) == ("sokoban/mine/0", 2.0, 0.0)
    assert info["admissible_commands"] == ("down", "right")
    assert env.step("right")[0] == _drawn("#######", "# @$. #", "# $ . #", "#     #", "#######")
    observation, reward, terminated, _, info = env.step("right")
    assert observation.splitlines()[1] == "#  @* #"
    assert (reward, terminated, info["score"], info["score_norm"]) == (1.0, False, 1.0, 0.5)
    observation, reward, _, _, info = env.step("right")
    assert observation.splitlines()[1] == "#   +$#"
    assert (reward, info["score"]) == (-1.0, 0.0)
    assert info["extra"] == {"deadlock": True, "pushes": 3}  # the box is in a corner
    before = observation
    observation, reward, terminated, _, info = env.step("right")
    assert observation == f"You cannot go right.\n{before}"
    assert (reward, terminated, info["valid"], info["format_error"]) == (0.0, False, False, False)
    assert env.step("up")[4]["valid"] is False
    assert env.expert_action() is None


def test_two_boxes_are_not_pushed_and_none_is_pulled(tmp_path: Path) -> None:
    path = tmp_path / "row.txt"
    path.write_text("########\n#@$$ ..#\n#      #\n########\n")
    env = SokobanEnv(source=str(path))
    start, info = env.reset(seed=0)
    assert info["admissible_commands"] == ("down",)
    observation, _, _, _, info = env.step("right")
    assert (observation, info["valid"]) == (f"You cannot go right.\n{start}", False)
    for step in ("down", "right", "up"):
        observation, _, _, _, info = env.step(step)
    assert info["valid"] is False  # the box above stands against the wall
    assert env.step("down")[4]["valid"] is False
    observation = env.step("left")[0]
    assert observation.splitlines()[1] == "# $$ ..#"


def test_the_last_box_ends_the_game(level_file: str) -> None:
    env = SokobanEnv(source=level_file)
    observation, _ = env.reset(options={"index": 1})
    assert observation == "#####\n#@$.#\n#####"
    observation, reward, terminated, truncated, info = env.step("right")
    assert observation == "#####\n# @*#\n#####\nSolved."
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
    assert (info["score_norm"], info["admissible_commands"]) == (1.0, None)
    assert env.expert_action() is None


def test_gym_sokobans_rewards_are_an_option_and_leave_the_score_alone(level_file: str) -> None:
    env = SokobanEnv(source=level_file, reward="gym-sokoban")
    env.reset(options={"index": 0})
    rewards = [env.step(step)[1] for step in ("right", "right", "right", "left", "nowhere", "")]
    assert rewards == pytest.approx([-0.1, 0.9, -1.1, -0.1, -0.1, -0.1])
    env.reset(options={"index": 1})
    _, reward, _, _, info = env.step("right")
    assert reward == pytest.approx(10.9)
    assert info["score"] == 1.0


@pytest.mark.parametrize(
    "reply",
    [
        "right",
        "R",
        "r",
        "Right!",
        "move right",
        "push RIGHT",
        "go  right.",
        "step r",
        "<action>right</action>",
        "<think>up?</think>\nright",
    ],
)
def test_a_step_may_be_said_in_these_ways(level_file: str, reply: str) -> None:
    env = SokobanEnv(source=level_file)
    env.reset(options={"index": 1})
    assert env.step(reply)[4]["success"]


@pytest.mark.parametrize(
    "reply", ["rightly", "right right", "move", "push the box right", "east", "→", "rr", "1", "()"]
)
def test_anything_else_is_invalid_and_changes_nothing(level_file: str, reply: str) -> None:
    env = SokobanEnv(source=level_file)
    start, _ = env.reset(options={"index": 1})
    observation, reward, terminated, _, info = env.step(reply)
    assert observation.endswith(f"allowed are up, down, left, right.\n{start}")
    assert (reward, terminated, info["valid"], info["steps"]) == (0.0, False, False, 1)


def test_the_text_view_says_where_everything_is(level_file: str) -> None:
    env = SokobanEnv(source=level_file, view="text")
    env.reset(options={"index": 0})
    env.step("right")
    assert env.step("right")[0] == (
        "The room has 5 rows and 7 columns, counted from the top left. "
        "You are at row 2, column 4. Boxes on targets: row 2 column 5. "
        "Other boxes: row 3 column 3. Free targets: row 3 column 5. "
        "Columns with walls: row 1: 1-7; row 2: 1, 7; row 3: 1, 7; row 4: 1, 7; row 5: 1-7."
    )


def test_a_snapshot_keeps_level_boxes_and_pushes(level_file: str) -> None:
    env, other = SokobanEnv(source=level_file), SokobanEnv()
    env.reset(options={"index": 0})
    env.step("right")
    saved = env.snapshot()
    after = env.step("right")
    other.reset(seed=1)
    assert other.restore(saved)[1]["extra"]["pushes"] == 1
    assert other.snapshot() == saved
    assert other.step("right") == after
    while (action := other.expert_action()) is not None:
        info = other.step(action)[4]
    assert info["success"]


@pytest.mark.parametrize("view", ["symbols", "text"])
def test_sokoban_passes_the_conformance_suite(view: str, level_file: str) -> None:
    check_env(lambda: SokobanEnv(view=view, split="test"))  # type: ignore[arg-type]
    check_env(lambda: SokobanEnv(view=view, source=level_file))  # type: ignore[arg-type]


# Exhaustive search.

_ROOMS = (
    "######\n# .  #\n#@$$ #\n#  . #\n######",
    "#######\n#@ #  #\n# $ . #\n# .$###\n#  ####\n#######",
    "#######\n#. #  #\n# $$  #\n#  #@ #\n#.   ##\n#######",
    "######\n#@.. #\n#$$$.#\n#    #\n######",
    "########\n#.@ $  #\n##### ##\n#####  #\n########",
)


def _positions(level: Level) -> list[tuple[int, Boxes]]:
    """Every placement of player and boxes on the floor."""
    floor = sorted(walkable(level))
    return [
        (player, frozenset(boxes))
        for boxes in itertools.combinations(floor, len(level.boxes))
        for player in floor
        if player not in boxes
    ]


def _solvable(level: Level) -> dict[tuple[int, Boxes], int]:
    """Fewest pushes from every position that can be solved, by going back over single steps."""
    before: dict[tuple[int, Boxes], list[tuple[tuple[int, Boxes], int]]] = {}
    positions = _positions(level)
    for player, boxes in positions:
        for step in (-level.width, level.width, -1, 1):
            cell, beyond = player + step, player + 2 * step
            if cell in level.walls:
                continue
            if cell not in boxes:
                before.setdefault((cell, boxes), []).append(((player, boxes), 0))
            elif beyond not in level.walls and beyond not in boxes:
                pushed = (cell, boxes - {cell} | {beyond})
                before.setdefault(pushed, []).append(((player, boxes), 1))
    fewest = {position: 0 for position in positions if position[1] == level.targets}
    queue = deque(fewest)
    while queue:
        position = queue.popleft()
        for previous, cost in before.get(position, ()):
            pushes = fewest[position] + cost
            if pushes < fewest.get(previous, 10**6):
                fewest[previous] = pushes
                queue.append(previous)
    return fewest


@pytest.mark.parametrize("text", _ROOMS)
def test_the_solver_and_the_deadlock_flag_agree_with_exhaustive_search(text: str) -> None:
    level = parse_level(text)
    fewest, live = _solvable(level), live_cells(level)
    neighbours = walkable(level)
    positions = _positions(level)
    flagged = [p for p in positions if is_deadlock(level, live, p[1])]
    assert flagged
    assert not [position for position in flagged if position in fewest]
    solved = {"solved": 0, "unsolvable": 0}
    seen = set()
    for player, boxes in positions[:: max(1, len(positions) // 250)]:
        search = solve(level, player, boxes)
        assert (search.status == "solved") == ((player, boxes) in fewest)
        assert search.pushes == fewest.get((player, boxes), 0)
        solved[search.status] += 1
        seen.add((boxes, min(reachable(neighbours, boxes, player))))
    assert min(solved.values()) > 0
    depths = pull_depths(level, 10**6)
    regions = {(b, min(reachable(neighbours, b, p))): n for (p, b), n in fewest.items()}
    assert depths == regions


def test_a_position_that_is_flagged_in_a_random_room_is_never_solvable() -> None:
    rng = generator("flags")
    flagged = 0
    for seed in range(12):
        level = generate(generator("rooms", seed), "train", Knobs((6, 6), (2, 3)))
        solvable = {boxes for boxes, _ in pull_depths(level, 10**6)}
        live, floor = live_cells(level), sorted(walkable(level))
        for _ in range(300):
            boxes = frozenset(rng.choice(floor, len(level.boxes), replace=False).tolist())
            if is_deadlock(level, live, boxes):
                flagged += 1
                assert boxes not in solvable
    assert flagged > 500


@pytest.mark.parametrize(
    ("text", "dead"),
    [
        ("######\n#@ . #\n#$   #\n######", True),  # corner
        ("######\n#$ . #\n#@   #\n######", True),
        ("#######\n#  @  #\n# $   #\n#   . #\n#######", False),
        ("#######\n#  $@ #\n#     #\n#   . #\n#######", True),  # a wall without a target
        ("#######\n#  $@ #\n#     #\n#.    #\n#######", True),
        ("#######\n#. $@ #\n#     #\n#     #\n#######", False),
        ("########\n#@     #\n#  $$  #\n#  $$  #\n# .... #\n########", True),  # a block of four
        ("########\n#@     #\n#  $$  #\n#  $   #\n# ...  #\n########", False),
        ("########\n#@ ..  #\n#  **  #\n#  **  #\n#  $$  #\n########", True),
        ("#######\n#@*$  #\n#  .  #\n#######", True),  # one of the two is on its target
        ("#######\n#@**  #\n#  $. #\n#######", False),  # below a frozen one, free to the side
        ("########\n#@ $$  #\n#  ..  #\n#      #\n########", True),  # side by side at a wall
    ],
)
def test_known_deadlocks_are_flagged(text: str, dead: bool) -> None:
    level = parse_level(text)
    assert is_deadlock(level, live_cells(level), level.boxes) == dead
    assert (solve(level).status == "unsolvable") == dead


def test_frozen_boxes_on_their_targets_are_no_deadlock() -> None:
    level = parse_level("#######\n#**@  #\n#   $.#\n#     #\n#######")
    assert not is_deadlock(level, live_cells(level), level.boxes)
    assert solve(level).moves == ("down", "right")


def test_the_solver_says_when_its_limit_was_reached() -> None:
    level = parse_level(_ROOMS[2])
    assert solve(level).status == "solved"
    search = solve(level, limit=2)
    assert (search.status, search.moves, search.positions) == ("limit", (), 2)
    many = parse_level("############\n#@         #\n# $$$$$$$$$#\n# .........#\n############")
    assert len(many.boxes) == 9
    assert (solve(many).status, solve(many).pushes) == ("solved", 9)


# Levels of our own.


@pytest.mark.parametrize(
    ("kwargs", "least", "most", "pushes"),
    [
        ({}, 6, 8, 3),
        ({"size": 7, "boxes": 2, "min_pushes": 8}, 7, 7, 8),
        ({"size": (9, 10), "boxes": 4}, 9, 10, 3),
    ],
)
def test_the_expert_solves_generated_levels_with_pushes_as_asked(
    kwargs: dict[str, Any], least: int, most: int, pushes: int
) -> None:
    env = SokobanEnv(**kwargs)
    for seed in range(12):
        observation, info = env.reset(seed=seed)
        rows = observation.splitlines()
        assert all(least <= side <= most for side in (len(rows), len(rows[0])))
        while (action := env.expert_action()) is not None:
            assert action in info["admissible_commands"]
            assert not info["extra"]["deadlock"]
            _, _, _, _, info = env.step(action)
        assert info["success"]
        assert info["extra"]["pushes"] >= pushes


def test_the_same_seed_is_the_same_level_and_another_seed_another() -> None:
    env, other = SokobanEnv(split="test"), SokobanEnv(split="test")
    levels = {env.reset(seed=seed)[0] for seed in range(40)}
    assert len(levels) == 40
    assert env.reset(seed=7) == other.reset(seed=7)


def test_splits_are_disjoint_whatever_way_a_level_is_turned() -> None:
    knobs = Knobs((5, 5), (1, 1), 1)
    drawn = {
        split: {generate(generator("small", i), split, knobs).rows for i in range(60)}
        for split in _SPLITS
    }
    assert min(map(len, drawn.values())) > 5
    for split, levels in drawn.items():
        for rows in levels:
            turned = tuple("".join(column) for column in zip(*reversed(rows), strict=True))
            for form in (rows, rows[::-1], tuple(row[::-1] for row in rows), turned):
                assert split_of(parse_level("\n".join(form))) == split
                assert not [s for s in _SPLITS if s != split and form in drawn[s]]


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"split": "tests"}, "Did you mean `test`"),
        ({"view": "symbol"}, "Did you mean `symbols`"),
        ({"reward": "sparse"}, "boxes, gym-sokoban"),
        ({"size": 4}, "5 <= smallest"),
        ({"size": (8, 7)}, "5 <= smallest"),
        ({"size": (5, 6, 7)}, "smallest and largest"),
        ({"boxes": 0}, "1 <= fewest"),
        ({"min_pushes": 0}, "min_pushes=0"),
        ({"source": "boxoban", "difficulty": "easy"}, "No difficulty 'easy'"),
        ({"source": "boxoban", "difficulty": "medium", "split": "test"}, "Allowed: train, valid"),
    ],
)
def test_a_wrong_argument_is_named(kwargs: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        SokobanEnv(**kwargs)  # type: ignore[arg-type]


def test_knobs_that_leave_no_level_are_refused() -> None:
    with pytest.raises(ConfigError, match="enlarge the room"):
        SokobanEnv(size=5, boxes=1, min_pushes=60).reset(seed=0)


def test_a_level_by_index_needs_a_file(level_file: str) -> None:
    with pytest.raises(ConfigError, match="source='boxoban'"):
        SokobanEnv().reset(options={"index": 0})
    with pytest.raises(ConfigError, match="0 to 1"):
        SokobanEnv(source=level_file).reset(options={"index": 2})


# Files.


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("; 0\n#####\n#@$.#\n#####\n\n; 1\n####\n#@x#\n####\n", 8, "'x' is no symbol"),
        ("#####\n#@$.#\n#####\n#@$ #\n#####\n", 1, "one player, not 2"),
        ("\n\n#####\n# $.#\n#####\n", 3, "one player, not 0"),
        ("#####\n#@$ #\n#####\n", 1, "here are 1 and 0"),
        ("#####\n#@* #\n#####\n", 1, "on a target already"),
        ("#####\n#@$. \n#####\n", 2, "walls do not close"),
        ("#####\n#@$.#\n### #\n", 3, "walls do not close"),
        ("#########\n#@$.#.$ #\n#########\n", 2, "the player can never be"),
        ("##\n@$\n", 1, "3 to 64 cells"),
        ("#@$.#" + "#" * 80, 1, "3 to 64 cells"),
    ],
)
def test_a_broken_level_is_named_with_file_and_line(
    tmp_path: Path, text: str, line: int, said: str
) -> None:
    path = tmp_path / "broken.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"broken\.txt:{line}: .*{said}"):
        SokobanEnv(source=str(path))


def test_a_missing_or_unreadable_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt.*'boxoban'"):
        SokobanEnv(source=str(tmp_path / "nowhere.txt"))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"#####\n#@$.#\n#####\n")[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        SokobanEnv(source=str(tmp_path / "cut.txt.gz"))
    (tmp_path / "none.txt").write_text("; only a heading\n\n")
    with pytest.raises(DataError, match="holds no Sokoban levels"):
        SokobanEnv(source=str(tmp_path / "none.txt"))
    monkeypatch.setenv("PZ_CACHE", str(tmp_path))
    monkeypatch.setenv("PZ_DATA", str(tmp_path))
    with pytest.raises(DataError, match="pz-envs data get boxoban"):
        SokobanEnv(source="boxoban")


def test_a_crlf_file_and_a_ragged_level_are_read(tmp_path: Path) -> None:
    path = tmp_path / "ragged.txt"
    path.write_bytes(b"  ####\r\n###  #\r\n#@$. #\r\n######\r\n")
    (level,) = load_levels(str(path), "train", "unfiltered")
    assert level.rows == ("  ####", "###  #", "#@$. #", "######")
    assert solve(level).moves == ("right",)


def test_files_named_as_published_are_found_until_a_number_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "boxoban" / "medium" / "valid"
    folder.mkdir(parents=True)
    for number in (0, 1, 3):
        (folder / f"{number:03}.txt").write_text("; 5\n#####\n#@$.#\n#####\n\n")
    monkeypatch.setenv("PZ_DATA", str(tmp_path))
    levels = load_levels("boxoban", "valid", "medium")
    assert [level.name for level in levels] == ["medium_valid_000/5", "medium_valid_001/5"]


def _boxoban(name: str) -> Path:
    path = find_file("boxoban", name)
    if path is None:
        pytest.skip("the Boxoban levels are not here")
    return path


@pytest.mark.data
def test_published_levels_are_read_as_they_stand() -> None:
    text = gzip.decompress(_boxoban("unfiltered_test_000.txt.gz").read_bytes()).decode()
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    levels = load_levels("boxoban", "test", "unfiltered")
    assert len(levels) == 1000
    for number, (level, block) in enumerate(zip(levels, blocks, strict=True)):
        assert level.rows == tuple(block[1:])
        assert level.name == f"unfiltered_test_000/{number}"
        assert (level.width, level.height, len(level.boxes)) == (10, 10, 4)
    hard = [set(load_levels("boxoban", split, "hard")) for split in _SPLITS]
    assert sum(map(len, hard)) == len(set().union(*hard)) == 3332
    assert all(3332 * share / 10 > 150 for share in map(len, hard))


@pytest.mark.data
@pytest.mark.parametrize(
    ("difficulty", "split", "stride"),
    [("unfiltered", "test", 50), ("medium", "valid", 100), ("hard", "test", 40)],
)
def test_the_expert_solves_published_levels(difficulty: str, split: str, stride: int) -> None:
    _boxoban("hard_000.txt.gz")
    env = SokobanEnv(source="boxoban", difficulty=difficulty, split=split)  # type: ignore[arg-type]
    assert env._levels is not None
    for index in range(0, len(env._levels), stride):
        _, info = env.reset(options={"index": index})
        while (action := env.expert_action()) is not None:
            assert not info["extra"]["deadlock"]
            _, _, _, _, info = env.step(action)
        assert info["success"], info["task_id"]


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("difficulty", ["unfiltered", "medium", "hard"])
def test_the_solver_solves_nearly_every_published_level(difficulty: str) -> None:
    _boxoban("hard_000.txt.gz")
    levels = load_levels("boxoban", "valid", difficulty)[:100]  # type: ignore[arg-type]
    statuses = [solve(level).status for level in levels]
    assert "unsolvable" not in statuses
    assert statuses.count("solved") >= 0.99 * len(levels)


def test_random_play_keeps_the_rules_of_score_and_commands() -> None:
    rng = generator("random play")
    env = SokobanEnv(boxes=3, size=8)
    for seed in range(8):
        env.reset(seed=seed)
        for _ in range(60):
            player, boxes = env._player, env._boxes
            assert env._outcome is not None
            listed = env._outcome.admissible_commands
            command = COMMANDS[int(rng.integers(4))]
            _, reward, over, _, info = env.step(command)
            assert listed is not None
            assert info["valid"] == (command in listed)
            assert info["valid"] == ((player, boxes) != (env._player, env._boxes))
            on = len(env._boxes & env._level.targets)
            assert reward == on - len(boxes & env._level.targets)
            assert (info["score"], info["success"]) == (float(on), over)
            if over:
                break
