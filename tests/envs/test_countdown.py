"""Countdown: exact arithmetic, fair puzzles, and an environment that only right answers score."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pz_envs import ConfigError, DataError
from pz_envs.countdown.env import CountdownEnv
from pz_envs.countdown.expression import MAX_DEPTH, ExpressionError, parse_expression
from pz_envs.countdown.puzzles import Knobs, Puzzle, generate, split_of
from pz_envs.countdown.solver import solve
from pz_envs.countdown.tasks import FILES, load_tasks
from pz_envs.datasets import find_file
from pz_envs.seeding import generator

_OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


@st.composite
def _expressions(draw: st.DrawFn, depth: int = 4) -> tuple[str, Fraction | None, tuple[int, ...]]:
    """A fully parenthesised expression, its value (None: division by zero), its numbers."""
    if depth == 0 or draw(st.booleans()):
        number = draw(st.integers(0, 99))
        return str(number), Fraction(number), (number,)
    left, a, first = draw(_expressions(depth=depth - 1))
    right, b, second = draw(_expressions(depth=depth - 1))
    sign = draw(st.sampled_from("+-*/"))
    undefined = a is None or b is None or (sign == "/" and b == 0)
    value = None if undefined else _OPERATIONS[sign](a, b)  # type: ignore[arg-type]
    space = draw(st.sampled_from(["", " "]))
    return f"({left}{space}{sign}{space}{right})", value, first + second


@given(_expressions())
def test_a_built_expression_is_read_back(
    built: tuple[str, Fraction | None, tuple[int, ...]],
) -> None:
    text, value, numbers = built
    if len(text) <= 300:
        read = parse_expression(text)
        assert (read.value, read.numbers) == (value, numbers)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1+2*3", 7),
        ("10-3-2", 5),
        ("2*(3+4)*5", 70),
        ("8/4/2", 1),
        ("1/3*3", 1),
        ("7/2", Fraction(7, 2)),
        ("  ( 1 + 2 )  ", 3),
        ("2×3÷4−1", Fraction(1, 2)),
        ("（1＋2）＊３", 9),
        (r"2 \times 3 \div 6", 1),
        ("1/(2-2)", None),
        ("1/0+5", None),
    ],
)
def test_values_are_exact(text: str, value: Fraction | int | None) -> None:
    assert parse_expression(text).value == value


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "1+", "+1", "-1", "2*-3", "(1", "1)", "()", "1 2", "2(3)", "1.5", "2**3", "2^3"),
        *("5²", "1e3", "x", "1+打", "\0", "\ud800", "1\u00a0?", "9" * 10, "1+" * 400 + "1", "1=1"),
        *("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1), "__import__('os')"),
    ],
)
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(ExpressionError):
        parse_expression(text)


@given(st.text(alphabet="0123456789+-*/() =", max_size=40) | st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ExpressionError):
        read = parse_expression(text, 5)
        assert read.numbers


def test_only_the_target_may_follow_an_equals_sign() -> None:
    assert parse_expression("1+2 = 3", 3).numbers == (1, 2)
    for text in ("1+2=4", "1+2=", "1+2=3=3", "3=1+2"):
        with pytest.raises(ExpressionError):
            parse_expression(text, 3)


@given(st.lists(st.integers(1, 30), min_size=2, max_size=4), st.integers(0, 60))
def test_a_solution_uses_every_number_once_and_is_exact(numbers: list[int], target: int) -> None:
    text = solve(numbers, target)
    if text is not None:
        read = parse_expression(text)
        assert read.value == target
        assert sorted(read.numbers) == sorted(numbers)


def test_the_solver_finds_the_hard_ones_and_knows_the_impossible() -> None:
    assert solve((3, 3, 8, 8), 24) == "8/(3-8/3)"
    assert solve((1, 5, 5, 5), 24) is not None
    assert solve((1, 1, 1), 24) is None
    assert solve((7,), 7) == "7"


def _reachable(numbers: tuple[Fraction, ...]) -> set[Fraction]:
    """Every value that all numbers make: split them in two in every way, join every pair."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for mask in range(1, 2 ** len(numbers) - 1):
        left = tuple(n for i, n in enumerate(numbers) if mask >> i & 1)
        right = tuple(n for i, n in enumerate(numbers) if not mask >> i & 1)
        for a in _reachable(left):
            for b in _reachable(right):
                found |= {a + b, a - b, a * b} | ({a / b} if b else set())
    return found


@pytest.mark.parametrize("numbers", [(2, 5, 7), (1, 1, 6), (3, 4, 4, 9)])
def test_the_solver_reaches_exactly_what_can_be_reached(numbers: tuple[int, ...]) -> None:
    reachable = _reachable(tuple(Fraction(n) for n in numbers))
    for target in range(0, 101):
        assert (solve(numbers, target) is not None) == (target in reachable)


def test_train_and_test_puzzles_are_disjoint_in_any_order_of_numbers() -> None:
    knobs = Knobs(numbers=(3,), max_number=12, max_target=40)
    drawn = {
        split: {
            (tuple(sorted(puzzle.numbers)), puzzle.target)
            for puzzle in (generate(generator(i), split, knobs) for i in range(400))
        }
        for split in ("train", "test")
    }
    assert not drawn["train"] & drawn["test"]
    assert min(map(len, drawn.values())) > 100
    assert split_of(Puzzle((3, 1, 2), 6)) == split_of(Puzzle((1, 2, 3), 6))


@pytest.mark.parametrize(
    "knobs",
    [
        Knobs(),
        Knobs(numbers=(3,), operators="+-"),
        Knobs(numbers=(5, 6), max_number=20, min_target=50, max_target=60),
    ],
)
def test_puzzles_obey_the_knobs_and_can_be_solved(knobs: Knobs) -> None:
    for i in range(15):
        puzzle = generate(generator("knobs", i), "train", knobs)
        assert len(puzzle.numbers) in knobs.numbers
        assert all(1 <= n <= knobs.max_number for n in puzzle.numbers)
        assert knobs.min_target <= puzzle.target <= knobs.max_target
        assert solve(puzzle.numbers, puzzle.target) is not None


def test_knobs_that_leave_no_puzzle_are_refused() -> None:
    with pytest.raises(ConfigError, match="widen"):
        generate(generator(1), "train", Knobs(numbers=(2,), max_number=2, min_target=90))


def test_the_expert_answers_right_and_the_same_seed_is_the_same_puzzle() -> None:
    env, other = CountdownEnv(split="test"), CountdownEnv(split="test")
    tasks = set()
    for seed in range(30):
        observation, info = env.reset(seed=seed)
        assert (observation, info) == other.reset(seed=seed)
        tasks.add(info["task_id"])
        answer = env.expert_action()
        assert answer is not None
        observation, reward, terminated, _, info = env.step(answer)
        assert (observation, reward, terminated) == ("Correct.", 1.0, True)
        assert (info["success"], info["score"], info["score_norm"]) == (True, 1.0, 1.0)
        assert env.expert_action() is None
    assert len(tasks) == 30


@pytest.fixture
def puzzle_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"nums": [44, 19, 35], "target": 98}\n\n{"nums": [3, 3], "target": 0}\n')
    return path


@pytest.mark.parametrize(
    ("reply", "reward", "valid", "format_error", "said"),
    [
        ("44+19+35", 1.0, True, False, "Correct."),
        ("<think>sum</think><answer>44+19+35 = 98</answer>", 1.0, True, False, "Correct."),
        (r"\boxed{44+19+35}", 1.0, True, False, "Correct."),
        ("44+19-35", 0.0, True, False, "It equals 28."),
        ("44/19*35", 0.0, True, False, "It equals 1540/19."),
        ("44+19", 0.0, False, False, "It uses 44 19."),
        ("44+19+35+44-44", 0.0, False, False, "It uses 44 19 35 44 44."),
        ("98", 0.0, False, False, "It uses 98."),
        ("44/(19-19)+35", 0.0, False, False, "It uses 44 19 19 35."),
        ("up", 0.0, False, False, "Not a valid expression: unexpected 'up'."),
        ("<answer>", 0.0, False, True, "Your reply could not be read: <answer> is never closed."),
    ],
)
def test_only_the_right_answer_scores(
    puzzle_file: Path, reply: str, reward: float, valid: bool, format_error: bool, said: str
) -> None:
    env = CountdownEnv(source=str(puzzle_file))
    observation, info = env.reset(seed=0, options={"index": 0})
    assert observation == "Numbers: 44 19 35. Target: 98."
    assert info["task_id"] == "countdown/44-19-35=98"
    observation, paid, terminated, _, info = env.step(reply)
    assert (observation, paid, terminated) == (said, reward, True)
    assert (info["valid"], info["format_error"]) == (valid, format_error)
    assert info["score"] == reward == info["success"]


def test_a_division_by_zero_is_a_wrong_answer(puzzle_file: Path) -> None:
    env = CountdownEnv(source=str(puzzle_file))
    env.reset(options={"index": 1})
    env2 = CountdownEnv(source=str(puzzle_file), tries=2)
    env2.reset(options={"index": 1})
    observation, reward, terminated, _, _ = env2.step("3/(3-3)")
    assert observation.startswith("It uses 3 3 3.")
    assert (reward, terminated) == (0.0, False)
    assert env.step("3-3")[1] == 1.0


def test_several_tries_give_feedback_until_they_are_used_up(puzzle_file: Path) -> None:
    env = CountdownEnv(source=str(puzzle_file), tries=3)
    _, info = env.reset(options={"index": 0})
    assert info["instruction"].endswith("You have 3 tries.")
    observation, _, terminated, _, _ = env.step("44-19+35")
    assert observation == "It equals 60. Numbers: 44 19 35. Target: 98. Tries left: 2."
    assert not terminated
    observation, _, terminated, _, info = env.step("<answer>")
    assert "Tries left: 1." in observation
    assert not terminated
    assert env.expert_action() is not None
    observation, reward, terminated, _, _ = env.step("44+35")
    assert (observation, reward, terminated) == ("It uses 44 35.", 0.0, True)


def test_a_format_reward_is_paid_once_and_never_scores(puzzle_file: Path) -> None:
    env = CountdownEnv(source=str(puzzle_file), tries=3, format_reward=0.1)
    env.reset(options={"index": 0})
    rewards, infos = [], []
    for reply in ("nonsense", "44-19", "44+19+35"):
        _, reward, _, _, info = env.step(reply)
        rewards.append(reward)
        infos.append(info)
    assert rewards == [0.0, 0.1, 1.0]
    assert [info["score"] for info in infos] == [0.0, 0.0, 1.0]
    env.reset(options={"index": 0})
    assert env.step("44+19+35")[1] == pytest.approx(1.1)


def test_a_snapshot_keeps_the_puzzle_the_tries_and_the_format_reward() -> None:
    env = CountdownEnv(tries=3, format_reward=0.1)
    env.reset(seed=4)
    env.step("1+1")
    saved = env.snapshot()
    wrong = env.step("1+1")
    assert wrong[1] == 0.0
    other = CountdownEnv(tries=3, format_reward=0.1)
    other.restore(saved)
    assert other.snapshot() == saved
    assert other.step("1+1") == wrong
    answer = other.expert_action()
    assert answer is not None
    assert other.step(answer)[1] == 1.0


def test_random_actions_use_every_number_once() -> None:
    env = CountdownEnv()
    rng = generator("random answers")
    for seed in range(50):
        env.reset(seed=seed)
        action = env.random_action(rng)
        assert action is not None
        observation, _, _, _, info = env.step(action)
        assert info["valid"] or observation == "It divides by zero."


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"split": "tests"}, "Did you mean `test`"),
        ({"numbers": 1}, "2 to 6"),
        ({"numbers": ()}, "2 to 6"),
        ({"max_number": 0}, "max_number=0"),
        ({"min_target": 9, "max_target": 8}, "min_target=9"),
        ({"operators": "+^"}, "operators"),
        ({"tries": 0}, "tries=0"),
    ],
)
def test_a_wrong_argument_is_named(kwargs: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace("+", r"\+")):
        CountdownEnv(**kwargs)  # type: ignore[arg-type]


def test_rows_come_by_index_or_by_seed(puzzle_file: Path, tmp_path: Path) -> None:
    packed = tmp_path / "mine.jsonl.gz"
    packed.write_bytes(gzip.compress(puzzle_file.read_bytes()))
    assert load_tasks(str(packed), "train") == load_tasks(str(puzzle_file), "test")
    env = CountdownEnv(source=str(packed))
    seen = {env.reset(seed=seed)[1]["task_id"] for seed in range(20)}
    assert seen == {"countdown/44-19-35=98", "countdown/3-3=0"}
    with pytest.raises(ConfigError, match="0 to 1"):
        env.reset(options={"index": 2})
    with pytest.raises(ConfigError, match="source='tasks'"):
        CountdownEnv().reset(options={"index": 0})


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[1]",
        "{}",
        '{"nums": [1, 2]}',
        '{"nums": 3, "target": 3}',
        "{",
        '{"nums": [],"target": 1}',
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=r"broken\.jsonl"):
        CountdownEnv(source=str(path))


def test_a_missing_file_names_what_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl.*'generated'"):
        CountdownEnv(source=str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "broken.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="cannot be read"):
        CountdownEnv(source=str(tmp_path / "broken.jsonl.gz"))
    monkeypatch.setenv("PZ_CACHE", str(tmp_path))
    monkeypatch.setenv("PZ_DATA", str(tmp_path))
    with pytest.raises(DataError, match="pz-envs data get countdown"):
        CountdownEnv(source="tasks")


def _published(split: str) -> Path:
    path = find_file("countdown", FILES[split])  # type: ignore[index]
    if path is None:
        pytest.skip("the countdown data set is not here")
    return path


@pytest.mark.data
def test_published_rows_play_and_sampled_ones_are_solved() -> None:
    text = gzip.decompress(_published("test").read_bytes()).decode()
    rows = [json.loads(line) for line in text.splitlines()]
    env = CountdownEnv(split="test", source="tasks")
    for index in range(0, len(rows), 20):
        observation, _ = env.reset(options={"index": index})
        numbers = " ".join(map(str, rows[index]["nums"]))
        assert observation == f"Numbers: {numbers}. Target: {rows[index]['target']}."
        answer = env.expert_action()
        assert answer is not None
        assert env.step(answer)[4]["success"]


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_published_row_is_solved(split: str) -> None:
    _published(split)
    env = CountdownEnv(split=split, source="tasks")  # type: ignore[arg-type]
    for index in range({"train": 10_240, "test": 1024}[split]):
        env.reset(options={"index": index})
        answer = env.expert_action()
        assert answer is not None
        assert env.step(answer)[4]["success"]
