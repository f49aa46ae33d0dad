from __future__ import annotations

import gc
import gzip
import importlib.util
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest

from pz_envs.checks import FUZZ, check_env
from pz_envs.errors import ConfigError, DataError, EnvError
from pz_envs.mathqa import judge
from pz_envs.mathqa.env import MathEnv
from pz_envs.mathqa.generator import LEVELS, TEMPLATES, generate
from pz_envs.mathqa.grading import MAX_ANSWER, Grader, read_number
from pz_envs.mathqa.sets import SETS, Problem, load_path, load_set
from pz_envs.seeding import generator

_HERE = [
    ("aime24", "test", 30),
    ("amc23", "test", 40),
    ("math500", "test", 500),
    ("minerva_math", "test", 272),
    ("gsm8k", "train", 7473),
    ("gsm8k", "test", 1319),
    pytest.param("dapo_math_17k", "train", 16_955, marks=pytest.mark.slow),
    ("dapo_math_17k", "test", 300),
]


def _need_math_verify() -> None:
    if importlib.util.find_spec("math_verify") is None:  # importing it here would take a second
        pytest.skip("math-verify is not installed")


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    _need_math_verify()
    grader = Grader()
    yield grader
    grader.close()


def _published(name: str, split: str) -> tuple[Problem, ...]:
    try:
        return load_set(name, split)
    except DataError as error:
        pytest.skip(str(error))


# Numbers.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,000", 1000),
        ("10,\\!080", 10_080),
        ("11,\\! 111,\\! 111,\\! 100", 11_111_111_100),
        ("$-\\frac{35}{9}$", Fraction(-35, 9)),
        ("\\frac43", Fraction(4, 3)),
        ("\\dfrac{17}{50}", Fraction(17, 50)),
        ("1\\frac{4}{5}", Fraction(9, 5)),
        ("-137 1/2", Fraction(-275, 2)),
        (".35625", Fraction(57, 160)),
        ("-1./3", Fraction(-1, 3)),
        ("4.5e33", Fraction(45 * 10**32)),
        ("2.26 \\times 10^{-10}", Fraction(226, 10**12)),
        ("\\$32,\\!348", 32_348),
        ("The final answer is: **42**.", 42),
        ("x = 7", 7),
        ("12 apples per day", 12),
        ("－１２", -12),
        ("025", 25),
    ],
)
def test_numbers_are_read_exactly(text: str, value: Fraction | int) -> None:
    number = read_number(text)
    assert number is not None
    assert number.value == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1/0",
        "\\frac{1}{0}",
        "1,00",
        "1 2",
        "2x",
        "5 million",
        "1+1",
        "--1",
        "4 pi",
        "x",
        "1e9999",
    ],
)
def test_what_is_no_number_is_not_read_as_one(text: str) -> None:
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("\\frac12", "0.5", True),
        ("1/2", "\\frac{1}{2}", True),
        ("1/2", "50\\%", True),
        ("50", "50\\%", True),
        ("50\\%", "0.5\\%", False),
        ("1/3", "0.333333", True),
        ("1/3", "0.33333", False),
        ("1/3", "333333/1000000", False),
        ("1000", "1,000", True),
        ("204", "204.0001", False),
        ("2.26e-10", "1e-10", False),
        ("4.5e33", "4.5 \\times 10^{33}", True),
        ("27", "27.0", True),
        ("0", "0.0", True),
        ("0", "0.0000001", False),
        ("-3", "3", False),
    ],
)
def test_numbers_compare_by_the_stated_rule(gold: str, answer: str, right: bool) -> None:
    verdict = Grader(exact=True).grade(gold, answer)
    assert (verdict.right, verdict.how) == (right, "number")


# Equivalence.


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("\\text{(C)}", "C", True),
        ("\\text{(C)}", "(B)", False),
        ("\\text{Evelyn}", "evelyn", True),
        ("p - q", "-q + p", True),
        ("p - q", "q - p", False),
        ("3, 5, 7", "7, 3, 5", True),
        ("1,-2", "\\{-2, 1\\}", True),
        ("1,-2", "1, 2", False),
        ("(3,4]", "\\left(3, 4\\right]", True),
        ("(3,4]", "[3,4]", False),
        ("(6,31,-1)", "(6, 31, -1)", True),
        ("(6,31,-1)", "(31, 6, -1)", False),
        ("(0,9) \\cup (9,36)", "(9,36) \\cup (0,9)", True),
        ("(0,9) \\cup (9,36)", "(0,36)", False),
        ("1 \\pm \\sqrt{19}", "1+\\sqrt{19}, 1-\\sqrt{19}", True),
        ("70 \\sqrt{2}", "\\sqrt{9800}", True),
        ("90^\\circ", "90", True),
        ("x=5", "5", True),
        ("5", "x = 5", True),
        ("5", "5, 7", False),
        ("5", "\\frac{1}{5} E_{1}+\\frac{5}{1} E_{2}", False),
        (
            "\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}",
            "\\begin{pmatrix}-1/3\\\\ 2/3\\end{pmatrix}",
            True,
        ),
        (
            "\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}",
            "\\begin{pmatrix}1/3\\\\2/3\\end{pmatrix}",
            False,
        ),
        ("16", "2^4", True),
        ("5.4 \\text{ cents}", "5.4", True),
    ],
)
def test_equal_forms_are_equal_and_others_not(
    grader: Grader, gold: str, answer: str, right: bool
) -> None:
    assert grader.grade(gold, answer).right is right


@pytest.mark.data
@pytest.mark.parametrize(("name", "split", "size"), _HERE)
def test_gold_answers_are_right_and_shifted_numbers_wrong(
    grader: Grader, name: str, split: str, size: int
) -> None:
    problems = _published(name, split)
    assert len(problems) == size
    assert len({problem.id for problem in problems}) == size
    for problem in problems[:: max(1, size // 250)]:
        assert grader.grade(problem.answer, problem.answer).right
        number = read_number(problem.answer)
        if number is not None:
            for shifted in (number.value + 1, number.value * Fraction(1001, 1000) or 1):
                assert not grader.grade(problem.answer, str(shifted)).right, problem


def _check_symbolic(grader: Grader, problems: tuple[Problem, ...], step: int) -> None:
    symbolic = judge.SharedJudge()
    formulas = [p.answer for p in problems if read_number(p.answer) is None]
    assert len(formulas) >= 80
    for gold in formulas[::step]:
        assert symbolic.equal(gold, gold) is True, gold
        for wrong in (f"{gold} + 1", "7919"):
            assert not grader.grade(gold, wrong).right, (gold, wrong)
    symbolic.close()


@pytest.mark.data
def test_a_sample_of_formulas_grades_right_and_perturbed_ones_wrong(grader: Grader) -> None:
    _check_symbolic(grader, _published("math500", "test"), 20)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["math500", "minerva_math"])
def test_every_formula_grades_right_and_perturbed_ones_wrong(grader: Grader, name: str) -> None:
    _check_symbolic(grader, _published(name, "test"), 1)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(("name", "split", "size"), _HERE)
def test_the_expert_wins_every_published_problem(name: str, split: str, size: int) -> None:
    _published(name, split)
    env = MathEnv(dataset=name, split=split)
    for index in range(size):
        env.reset(seed=0, options={"index": index})
        answer = env.expert_action()
        assert answer is not None
        assert env.step(f"<answer>{answer}</answer>")[4]["success"], index
    env.close()


# Hostile answers.


@pytest.mark.parametrize(
    "answer",
    [
        "9" * (MAX_ANSWER - 1),
        "(" * 400,
        "\\sqrt{" * 70 + "5" + "}" * 70,
        "5} \\boxed{7",
        "-" * 200 + "1",
        "\0\x01\x1f",
        "\ud800",
        "打开门，然后向北走",
        "\\" * 499,
        "__import__('os').system('true')",
    ],
)
def test_an_odd_answer_is_only_wrong(grader: Grader, answer: str) -> None:
    assert not grader.grade("x^2+7", answer).right


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["9^{9^{9^{9}}}", "999999999!", "\\prod_{n=1}^{10^8} n"])
def test_an_answer_that_never_ends_is_stopped_and_the_next_one_graded(
    grader: Grader, answer: str
) -> None:
    assert grader.grade("x^2+7", answer).how == "failed"
    started = time.perf_counter()
    assert grader.grade("x^2+7", answer).how == "failed"
    assert time.perf_counter() - started < 0.1  # what was found out once is remembered
    assert grader.grade("x^2+7", "7+x^2").right


def test_threads_share_one_grading_process(grader: Grader) -> None:
    def grade(number: int) -> bool:
        assert threading.current_thread() is not threading.main_thread()
        return grader.grade(f"x+{number}", f"{number}+x").right

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(grade, range(16)))


@pytest.mark.parametrize(
    "reply", [*FUZZ, "<answer>" * 100_000, "<answer>" + "1" * 1_000_000 + "</answer>"]
)
def test_a_hostile_reply_is_a_quick_wrong_step(reply: str) -> None:
    env = MathEnv(tries=2)
    env.reset(seed=1)
    started = time.perf_counter()
    _, reward, terminated, _, info = env.step(reply)
    assert time.perf_counter() - started < 2
    assert (reward, terminated, info["success"]) == (0.0, False, False)


def test_the_grading_process_ends_with_its_last_user(monkeypatch: pytest.MonkeyPatch) -> None:
    _need_math_verify()
    children: dict[int, judge._Child] = {}
    monkeypatch.setattr(judge, "_children", children)
    first, second = judge.SharedJudge(), judge.SharedJudge()
    assert first.equal("x+1", "1+x")
    assert second.equal("x+2", "2+x")
    (child,) = children.values()
    pid = child.worker.pid
    first.close()
    first.close()
    assert child.worker.pid == pid is not None
    del second
    gc.collect()
    assert not children
    assert not Path(f"/proc/{pid}").exists()


# Procedural problems.


def test_every_template_makes_readable_problems_with_exact_answers() -> None:
    assert len({template.name for template in TEMPLATES}) == len(TEMPLATES)
    seen = set()
    for level in LEVELS:
        assert sum(template.level == level for template in TEMPLATES) >= 6
        for i in range(120):
            problem, given = generate(generator("test", level, i), "train", level)
            assert given == level
            assert "{" not in problem.text
            assert str(Fraction(problem.answer)) == problem.answer
            seen.add(problem.id.split("/")[2].split("-")[0])
    assert seen == {template.name for template in TEMPLATES}


@pytest.mark.parametrize(
    ("name", "values", "answer"),
    [
        ("crates", (25, 4), 7),
        ("discount", (200, 10, 5), 171),
        ("together", (3, 6), 2),
        ("ages", (4, 6, 2), 3),
        ("tickets", (10, 20, 7, 3), 10),
        ("consecutive", (-2, 3), -2),
        ("meeting", (60, 20, 20, 1), 2),
        ("roots", (5, 6), 13),
        ("remainder", (2, 20, 7), 4),
        ("urn", (2, 2), Fraction(2, 3)),
        ("series", (1, 2, 10), 100),
        ("bounces", (2, 1, 2), 6),
    ],
)
def test_answers_agree_with_sums_done_by_hand(
    name: str, values: tuple[int, ...], answer: Fraction | int
) -> None:
    (template,) = (template for template in TEMPLATES if template.name == name)
    assert template.check(*values)
    assert template.answer(*values) == answer


def test_train_and_test_problems_are_disjoint() -> None:
    drawn = {
        split: {generate(generator(i), split, 1)[0].id for i in range(900)}
        for split in ("train", "test")
    }
    assert not drawn["train"] & drawn["test"]
    assert min(map(len, drawn.values())) > 200


def test_the_expert_answers_right_and_the_same_seed_is_the_same_problem() -> None:
    env, other = MathEnv(split="test"), MathEnv(split="test")
    levels = set()
    for seed in range(60):
        observation, info = env.reset(seed=seed)
        assert (observation, info) == other.reset(seed=seed)
        levels.add(info["extra"]["level"])
        answer = env.expert_action()
        assert answer is not None
        observation, reward, terminated, _, info = env.step(answer)
        assert (observation, reward, terminated) == ("Correct.", 1.0, True)
        assert (info["success"], info["score"], info["extra"]["solved_at"]) == (True, 1.0, 1)
        assert env.expert_action() is None
    assert levels == set(LEVELS)


# The episode.


@pytest.fixture
def own_file(tmp_path: Path) -> str:
    path = tmp_path / "mine.jsonl"
    rows = [
        {"problem": "Half of one?", "answer": "\\frac{1}{2}"},
        {"question": "Two and two?", "answer": "Count.\n#### 4"},
        {"problem": "Half of one?", "answer": "\\frac{1}{2}"},
        {"question": "Which?", "final_answer": ["$3$", "5"]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("reply", "right", "valid", "format_error"),
    [
        ("0.5", True, True, False),
        ("<think>1/2?</think><answer> 50\\% </answer>", True, True, False),
        ("So it is $\\boxed{\\frac12}$.", True, True, False),
        ("We halve it.\nAnswer: 1/2", True, True, False),
        ("<answer>\\boxed{2}</answer>", False, True, False),
        ("<answer>1/2", False, False, True),
        ("<answer><answer>1/2</answer></answer>", True, True, True),
        ("", False, False, True),
        ("1" * 501, False, False, False),
    ],
)
def test_only_the_right_answer_scores(
    own_file: str, reply: str, right: bool, valid: bool, format_error: bool
) -> None:
    env = MathEnv(path=own_file)
    observation, info = env.reset(seed=0, options={"index": 0})
    assert (observation, info["task_id"]) == ("Half of one?", "math/mine/0")
    _, reward, terminated, _, info = env.step(reply)
    assert (reward, info["score"], info["success"]) == (float(right), float(right), right)
    assert (info["valid"], info["format_error"], terminated) == (valid, format_error, True)
    env.close()


def test_several_tries_tell_the_first_from_a_later_success(own_file: str) -> None:
    env = MathEnv(path=own_file, tries=3, format_reward=0.1)
    _, info = env.reset(options={"index": 1})
    assert info["instruction"].endswith("You have 3 tries.")
    steps = [env.step(reply) for reply in ("<answer>", "5", "4")]
    assert steps[0][0].startswith("Your reply could not be read")
    assert steps[1][0] == "That is not the answer. Tries left: 1.\n\nTwo and two?"
    assert [step[1] for step in steps] == [0.0, pytest.approx(0.1), 1.0]
    assert [step[4]["extra"]["attempts"] for step in steps] == [1, 2, 3]
    assert [step[4]["extra"]["solved_at"] for step in steps] == [None, None, 3]
    env.reset(options={"index": 1})
    ends = [env.step("6")[2] for _ in range(3)]
    assert ends == [False, False, True]
    with pytest.raises(EnvError, match="reset"):
        env.step("4")


def test_a_snapshot_keeps_the_problem_the_tries_and_the_format_reward() -> None:
    env = MathEnv(tries=3, format_reward=0.1)
    env.reset(seed=4)
    env.step("-1/7")
    saved = env.snapshot()
    wrong = env.step("-1/7")
    assert wrong[1] == 0.0
    other = MathEnv(tries=3, format_reward=0.1)
    other.restore(saved)
    assert other.snapshot() == saved
    assert other.step("-1/7") == wrong
    answer = other.expert_action()
    assert answer is not None
    assert other.step(answer)[4]["extra"]["solved_at"] == 3


def test_the_conformance_suite_passes(own_file: str) -> None:
    assert "going back" in check_env(lambda: MathEnv(tries=2)).passed
    assert "nothing left" in check_env(lambda: MathEnv(path=own_file, reply_format="tags")).passed


# Files.


def test_layouts_are_recognised_and_repeats_left_out(own_file: str, tmp_path: Path) -> None:
    problems = load_path(own_file)
    assert [problem.answer for problem in problems] == ["\\frac{1}{2}", "4", "$3$, 5"]
    packed = tmp_path / "mine.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(own_file).read_bytes()))
    assert load_path(str(packed)) == problems
    rows = [
        {"problem": "P", "answer": 27.0},
        {"problem": "Q", "solution": "So \\boxed{\\frac{1}{2}} it is."},
    ]
    path = tmp_path / "others.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [problem.answer for problem in load_path(str(path))] == ["27", "\\frac{1}{2}"]


def test_a_parquet_file_in_dapo_layout_is_read_without_its_wrapper(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    wrapped = (
        "Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer.\n\nWhat is 1+1?\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    )
    row = {
        "prompt": [{"content": wrapped, "role": "user"}],
        "reward_model": {"ground_truth": "2", "style": "rule"},
    }
    path = tmp_path / "dapo.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row] * 32), path)
    assert load_path(str(path)) == (Problem("math/dapo/0", "What is 1+1?", "2"),)


@pytest.mark.parametrize(
    "line",
    ["", "{", "[1]", '{"problem": "P"}', '{"answer": "1"}', '{"problem": "", "answer": "1"}'],
)
def test_a_broken_file_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=r"broken\.jsonl"):
        load_path(str(path))


@pytest.mark.parametrize("name", ["broken.parquet", "broken.jsonl.gz", "broken.jsonl"])
def test_bytes_that_are_no_file_of_the_kind_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xff\xfe no such file")
    with pytest.raises(DataError, match="cannot be read"):
        load_path(str(path))


def test_a_missing_file_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PZ_CACHE", str(tmp_path))
    monkeypatch.setenv("PZ_DATA", str(tmp_path))
    for name, chosen in SETS.items():
        advice = "pz-envs data get math" if chosen.free else "your own"
        with pytest.raises(DataError, match=advice):
            load_set(name, None)
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        load_path(str(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"dataset": "gsm8"}, "Did you mean `gsm8k`"),
        ({"dataset": "aime24", "split": "train"}, "Allowed: test"),
        ({"split": "tests"}, "Did you mean `test`"),
        ({"level": 6}, "level=6"),
        ({"dataset": "gsm8k", "level": 1}, "only generated"),
        ({"tries": 0}, "tries=0"),
    ],
)
def test_a_wrong_argument_is_named(kwargs: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        MathEnv(**kwargs)  # type: ignore[arg-type]


def test_rows_come_by_index_or_by_seed(own_file: str) -> None:
    env = MathEnv(path=own_file)
    seen = {env.reset(seed=seed)[1]["task_id"] for seed in range(30)}
    assert seen == {f"math/mine/{index}" for index in range(3)}
    with pytest.raises(ConfigError, match="0 to 2"):
        env.reset(options={"index": 3})
    with pytest.raises(ConfigError, match="go by seed"):
        MathEnv().reset(options={"index": 0})
