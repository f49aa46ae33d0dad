"""Leaderboards: ranks, files that are the same bytes from the same cells, and pages that open."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pz_bench import report
from pz_bench.report import grouping, html, markdown, numbers, plots, tables
from pz_envs.errors import ConfigError

COUNTDOWN, ZORK, DETECTIVE = "pz/Countdown-v0", "pz/Zork1-v0", "pz/Detective-v0"


@pytest.fixture
def cells(make_cell):
    """Two families, three environments; Zork1 was not run; one seed of zeroshot is unfinished."""
    made = []
    for seed in (0, 1):
        made += [
            make_cell("random", COUNTDOWN, [0, 0, 0, 0], seed=seed),
            make_cell("expert", COUNTDOWN, [1, 1, 1, 1], seed=seed),
            make_cell("zeroshot", COUNTDOWN, [0, 0, 1, 0], seed=seed, model="tiny", tokens=20),
            make_cell(
                "grpo",
                COUNTDOWN,
                [1, 0, 1, 1],
                seed=seed,
                model="tiny",
                tokens=16,
                train={"steps": 60},
            ),
            make_cell("random", DETECTIVE, [0.1, 0.2], seed=seed, most=360),
            make_cell("expert", DETECTIVE, [1, 1], seed=seed, most=360),
            make_cell(
                "zeroshot", DETECTIVE, [0.1, 0.3][: 2 - seed], seed=seed, model="tiny", tokens=400,
                episodes=2, most=360, status="done" if seed == 0 else "partial",
            ),
        ]  # fmt: skip
        made += [
            make_cell(
                algorithm,
                ZORK,
                [],
                seed=seed,
                episodes=2,
                status="not_run",
                reason="The story file zork1.z5 is not here.",
                command="pz-envs data get zork_mit",
            )
            for algorithm in ("random", "expert")
        ]
    return made


@pytest.fixture
def played(cells):
    """Only environments on which the anchors are complete."""
    return [cell for cell in cells if cell.spec.env != ZORK]


@pytest.fixture
def board(cells):
    return report.build(cells, "small", "A small suite")


def row_of(board, label):
    return next(row for row in board.rows if row.label == label)


def test_columns_follow_the_catalogue_and_rows_their_names(board):
    assert [each.short for each in board.environments] == ["Countdown", "Detective", "Zork1"]
    assert [row.label for row in board.rows] == [
        "grpo · tiny",
        "zeroshot · tiny",
        "expert",
        "random",
    ]


def test_a_row_that_lacks_an_environment_has_no_rank_and_says_why(board):
    assert all(row.rank is None and row.macro is None for row in board.rows)
    assert row_of(board, "expert").reason == "not run: Zork1"
    assert row_of(board, "grpo · tiny").reason == "not planned: Detective, Zork1"
    assert row_of(board, "zeroshot · tiny").reason == "unranked: Detective; not planned: Zork1"


def test_the_macro_mean_counts_families_once_and_ranks_complete_rows(make_cell):
    values = {"a.py:One": (0.5, 0.2, 0.4), "b.py:Two": (1.0, 0.0, 0.1), "random": (0, 0, 0)}
    made = [
        make_cell(name, env, [value] * 4, seed=seed)
        for name, row in values.items()
        for env, value in zip((COUNTDOWN, ZORK, DETECTIVE), row, strict=True)
        for seed in (0, 1)
    ]
    board = report.build(made, "suite")
    # One: Countdown counts successes, and 0.5 is none: (0 + (.2 + .4) / 2) / 2
    assert [(row.label, row.rank, row.macro.mean) for row in board.rows] == [
        ("b.py:Two", 1, 0.525),
        ("a.py:One", 2, 0.15),
        ("random", None, 0.0),
    ]
    assert row_of(board, "b.py:Two").macro.low <= 0.525 <= row_of(board, "b.py:Two").macro.high


def test_trained_rows_are_compared_with_their_own_starting_model(cells, make_cell):
    other = [make_cell("zeroshot", COUNTDOWN, [1, 1, 1, 1], seed=s, model="big") for s in (0, 1)]
    found = report.build([*cells, *other], "small").comparisons
    trained = [each for each in found if each.kind == "trained"]
    assert [(each.row, each.against, each.difference) for each in trained] == [
        ("grpo · tiny", "zeroshot · tiny", 0.5)
    ]
    assert (trained[0].instances, trained[0].seeds, trained[0].p) == (4, 2, 0.5)
    assert [each.environment for each in found if each.kind == "anchors"] == [COUNTDOWN, DETECTIVE]


def test_unranked_rows_are_not_compared(played):
    partial = [
        replace(cell, status="partial", episodes=cell.episodes[:3])
        if cell.spec.algorithm == "grpo"
        else cell
        for cell in played
    ]
    found = report.build(partial, "small").comparisons
    assert {each.kind for each in found} == {"anchors"}


def test_two_settings_in_one_place_are_two_rows_named_by_what_differs(make_cell):
    made = [
        make_cell(
            "best-of-n", COUNTDOWN, [1, 0], model="tiny", agent_kwargs={"n": n, "temperature": 1}
        )
        for n in (4, 8)
    ]
    assert [row.label for row in report.build(made, "suite").rows] == [
        "best-of-n · tiny (n=4)",
        "best-of-n · tiny (n=8)",
    ]


def test_settings_that_differ_between_environments_stay_one_row(make_cell):
    made = [
        make_cell("zeroshot", COUNTDOWN, [1, 0], model="tiny", agent_kwargs={"template": "a"}),
        make_cell("zeroshot", ZORK, [1, 0], model="tiny", agent_kwargs={"template": "b"}),
    ]
    (row,) = report.build(made, "suite").rows
    assert (row.label, row.rank, row.settings) == ("zeroshot · tiny", 1, "template=a | template=b")


def test_models_of_one_name_stay_apart(make_cell):
    made = [
        make_cell("zeroshot", COUNTDOWN, [1, 0], model=f"openai:qwen@http://{host}/v1")
        for host in ("one", "two")
    ]
    labels = [row.label for row in report.build(made, "suite").rows]
    assert len(set(labels)) == 2
    assert all(re.fullmatch(r"zeroshot · openai:qwen #[0-9a-f]{4}", label) for label in labels)


def test_an_environment_with_arguments_is_its_own_column(make_cell):
    made = [
        make_cell("random", COUNTDOWN, [1, 0]),
        make_cell("random", COUNTDOWN, [1, 0], env_kwargs={"tries": 3}),
    ]
    board = report.build(made, "suite")
    assert [each.short for each in board.environments] == ["Countdown", "Countdown (tries=3)"]


def test_of_two_cells_in_one_place_the_fuller_counts_and_the_other_is_named(make_cell):
    made = [make_cell("random", COUNTDOWN, [0, 0]), make_cell("random", COUNTDOWN, [1, 1, 1])]
    board = report.build(made, "suite")
    assert row_of(board, "random").scores[0].value == 1.0
    assert board.left_out == (
        "random on pz/Countdown-v0, seed 0: done, 2 episodes, "
        f"left out for {made[1].id}, a cell of the same place that is fuller",
    )


def test_an_unknown_environment_is_an_error(make_cell):
    with pytest.raises(ConfigError, match="pz/Zrk1-v0"):
        report.build([make_cell("random", "pz/Zrk1-v0", [1])], "suite")


def test_the_same_cells_in_any_order_give_the_same_bytes(cells, tmp_path):
    shuffled = list(cells)
    random.Random(4).shuffle(shuffled)
    first = report.write(report.build(cells, "small"), tmp_path / "one")
    second = report.write(report.build(shuffled, "small"), tmp_path / "two")
    assert [path.name for path in first] == [
        "small.md",
        "small.csv",
        "small.json",
        "small.html",
        "small-scores.svg",
        "small-scores.png",
        "small-cost.svg",
        "small-cost.png",
    ]
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name


def test_no_file_holds_a_date_or_a_folder_of_this_machine(make_cell, tmp_path):
    failed = make_cell(
        "zeroshot",
        COUNTDOWN,
        [],
        status="failed",
        model="/home/ann/models/qwen",
        reason="ModelError: /home/ann/models/qwen has no config.json",
    )
    done = make_cell("/home/ann/mine.py:Mine", COUNTDOWN, [1, 0])
    for path in report.write(report.build([failed, done], "suite"), tmp_path):
        content = path.read_bytes()
        assert b"/home" not in content, path.name
        assert not re.search(rb"20\d\d-\d\d-\d\d", content), path.name


def test_a_changed_record_changes_every_table(cells):
    changed = list(cells)
    first = changed[0].episodes[0]
    solved = replace(first, success=True, score=1.0, score_norm=1.0)
    changed[0] = replace(changed[0], episodes=(solved, *changed[0].episodes[1:]))
    before, after = report.build(cells, "small"), report.build(changed, "small")
    assert row_of(after, "random").score(COUNTDOWN).value == 0.125
    for render in (report.as_csv, report.as_json, markdown.render, html.render):
        assert render(before) != render(after)


def test_csv_has_a_line_for_each_score_and_each_macro_mean(played):
    board = report.build(played, "small")
    lines = list(csv.DictReader(io.StringIO(report.as_csv(board))))
    assert len(lines) == sum(1 + len(row.scores) for row in board.rows)
    by_place = {(line["label"], line["environment"]): line for line in lines}
    grpo = by_place["grpo · tiny", COUNTDOWN]
    assert (grpo["value"], grpo["seeds"], grpo["trained"]) == ("0.75", "0 1", "True")
    assert float(by_place["expert", "macro mean"]["value"]) == 1.0
    assert by_place["grpo · tiny", "macro mean"]["value"] == ""


def test_json_holds_the_numbers_that_the_table_shows(board):
    read = json.loads(report.as_json(board))
    assert (read["suite"], read["title"]) == ("small", "A small suite")
    shown = tables.headline(board)
    for line, row in zip(shown.rows, read["rows"], strict=True):
        assert line[1].text == row["label"]
        found = {score["environment"]: score for score in row["scores"]}
        for cell, environment in zip(line[3:], read["environments"], strict=True):
            score = found.get(environment["name"])
            if score is None or score["value"] is None:
                assert cell.sort is None
            else:
                assert cell.sort == score["value"]
                assert numbers.percent(score["value"]) in cell.text


def test_what_was_not_run_is_never_shown_as_zero(board):
    for row in tables.headline(board).rows:
        assert row[5].text in ("not run", "–")
    text = markdown.render(board)
    expected = "The story file zork1.z5 is not here. | `pz-envs data get zork_mit` |"
    assert f"| Zork1 | expert, random | {expected}" in text


def test_tiny_rows_are_labelled_for_what_they_are(board):
    note = "tiny: machinery check, not a research result"
    assert note in markdown.render(board)
    assert note in html.render(board)
    assert note in terminal_text(board)


def test_complete_rows_have_aggregates_over_the_whole_suite(played, make_cell):
    done = [cell for cell in played if cell.spec.algorithm in ("random", "expert")]
    for seed in (0, 1):
        for algorithm, wins, share in (("good", [1, 1, 1, 0], 0.9), ("bad", [0, 0, 0, 1], 0.1)):
            done.append(make_cell(f"m:{algorithm}", COUNTDOWN, wins, seed=seed))
            done.append(make_cell(f"m:{algorithm}", DETECTIVE, [share, share], seed=seed, most=360))
    board = report.build(done, "small")
    good, bad = row_of(board, "m:good"), row_of(board, "m:bad")
    assert good.task_mean == pytest.approx((0.75 + 0.9) / 2)
    assert good.standing.low == 1
    assert bad.standing.high == 2
    assert good.aggregate.iqm == pytest.approx((0.75 + 0.9) / 2)
    assert good.aggregate.provisional  # two seeds
    table = tables.aggregates(board)
    assert [row[0].text for row in table.rows] == [row.label for row in board.rows]
    for page in (markdown.render(board), html.render(board)):
        assert "Over the whole suite" in page
        assert "provisional" in page


def test_improvement_by_retries_stands_beside_success_steps_and_attempts(make_cell):
    made = []
    for env, most in ((COUNTDOWN, 1), (DETECTIVE, 360)):
        plain = make_cell("opmd", env, [0, 1], model="tiny", most=most, train={"steps": 9})
        retried = make_cell("r3l", env, [0, 1], model="tiny", most=most, train={"steps": 9})
        metrics = {"steps": 9, "improve": 0.25, "improve_per_base": 0.125}
        made += [plain, replace(retried, train_metrics=metrics)]
    board = report.build(made, "small")
    table = tables.retries(board)
    assert [head.text for head in table.headers[2:]] == ["Success", "Steps", "Attempts", "Improve"]
    texts = {(row[0].text, row[1].text): [cell.text for cell in row[2:]] for row in table.rows}
    assert texts["Countdown", "r3l · tiny"] == ["50.0", "–", "4", "25.0 (12.5)"]
    assert texts["Detective", "r3l · tiny"][1:] == ["4", "–", "25.0 (12.5)"]
    assert texts["Detective", "opmd · tiny"][-1] == "–"
    for page in (markdown.render(board), html.render(board)):
        assert "25.0 (12.5)" in page
    without = report.build(made[::2], "small")
    assert not tables.retries(without).rows


def test_p_values_are_corrected_over_the_comparisons_of_a_kind(make_cell):
    made = []
    for env, most in ((COUNTDOWN, 1), (DETECTIVE, 360)):
        made.append(make_cell("zeroshot", env, [0, 0, 0, 0, 1], model="tiny", most=most))
        made.append(
            make_cell("grpo", env, [1, 1, 1, 1, 1], model="tiny", most=most, train={"steps": 9})
        )
    found = report.build(made, "small").comparisons
    assert [each.p for each in found] == [0.125, 0.125]
    assert [each.p_holm for each in found] == [0.25, 0.25]
    assert not any(each.stands_out for each in found)
    assert [each.improvement for each in found] == [0.9, 0.9]
    assert all(each.detectable > 0 for each in found)


def difference(make_cell, left, right):
    """The board and the only comparison of a trained row with its starting model."""
    made = [
        make_cell("zeroshot", DETECTIVE, right, model="tiny", most=360),
        make_cell("grpo", DETECTIVE, left, model="tiny", most=360, train={"steps": 9}),
    ]
    board = report.build(made, "small")
    (found,) = board.comparisons
    return board, found


def test_bold_needs_an_interval_and_a_corrected_p_that_agree(make_cell):
    board, found = difference(make_cell, [0.5, 0.51, 0.52, 0.53], [0.1, 0.1, 0.1, 0.1])
    assert found.low > 0  # four instances: the interval excludes 0, p is 1/8
    assert found.p_holm == 0.125
    assert not any(cell.strong for row in tables.comparisons(board).rows for cell in row)
    many = np.linspace(0.5, 0.6, 8)
    board, found = difference(make_cell, many.tolist(), [0.1] * 8)
    assert found.stands_out
    assert tables.comparisons(board).rows[0][3].strong


def test_equal_differences_show_a_dash_for_the_interval(make_cell):
    board, found = difference(make_cell, [0.5] * 4, [0.1] * 4)
    assert (found.difference, found.low, found.high, found.detectable) == (0.4, None, None, None)
    (row,) = tables.comparisons(board).rows
    assert [row[column].text for column in (3, 4, 8)] == ["+40.0", "–", "–"]
    assert not row[3].strong
    assert "points [–]" in terminal_text(board)


def test_what_always_went_the_same_way_has_a_macro_interval_all_the_same(make_cell):
    made = [
        make_cell("expert", env, [1, 1, 1, 1], seed=seed, most=most)
        for env, most in ((COUNTDOWN, 1), (DETECTIVE, 360))
        for seed in (0, 1)
    ]
    board = report.build(made, "small")
    macro = row_of(board, "expert").macro
    # Wilson's 4 of 4 ends at 4 / (4 + 1.96²) = 0.5101; two of them: 1 - 0.4899 / sqrt(2)
    assert (macro.mean, macro.high) == (1.0, 1.0)
    assert macro.low == pytest.approx(0.6536, abs=1e-4)


def test_the_settings_say_from_which_data_the_tasks_came(make_cell):
    cell = make_cell("random", "pz/ALFWorld-v0", [1, 0])
    published = replace(cell, data={"games_valid_seen.tar.xz": "0123456789abcdef"})
    for one, text in ((published, "games_valid_seen.tar.xz 01234567"), (cell, "generated")):
        assert tables.settings(report.build([one], "small")).rows[0][-1].text == text
    countdown = report.build([make_cell("random", COUNTDOWN, [1, 0])], "small")
    assert tables.settings(countdown).rows[0][-1].text == "–"


def test_the_markdown_page_is_the_golden_one(make_cell):
    made = [
        make_cell("random", COUNTDOWN, [0, 0, 0, 0]),
        make_cell("expert", COUNTDOWN, [1, 1, 1, 1]),
        make_cell("zeroshot", COUNTDOWN, [0, 0, 1, 0], model="tiny", tokens=2000),
    ]
    page = markdown.render(report.build(made, "golden", "Golden | page"), ["golden-scores.svg"])
    assert page == (Path(__file__).parent / "golden_leaderboard.md").read_text("utf-8")


def test_every_link_of_the_markdown_page_leads_somewhere(board):
    page = markdown.render(board)
    targets = re.findall(r"\]\(#([^)]+)\)", page)
    assert {"score-countdown", "score-jericho", "score-macro", "statistics"} <= set(targets)
    for target in targets:
        assert f'<a id="{target}"></a>' in page


def test_labels_cannot_break_the_tables(make_cell):
    made = [make_cell("random", COUNTDOWN, [1, 0], env_kwargs={"source": "a|b\n<script>"})]
    board = report.build(made, "suite")
    assert "a\\|b \\<script>" in markdown.render(board)
    assert "<script>" not in html.render(board).replace("<script>\ndocument", "")


class Page(HTMLParser):
    """What a page would load, its ids and its tables' sizes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.counts: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("src", "srcset", "data", "action", "poster"):
                self.loads.append(value or "")
            elif name in ("href", "xlink:href"):
                (self.links if tag == "a" else self.loads).append(value or "")


def test_the_page_loads_nothing_from_anywhere(board):
    text = html.render(board)
    page = Page(text)
    assert all(load == "data:," or load.startswith("#") for load in page.loads)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "http://" not in text
    assert "https://" not in text


def test_the_page_s_links_and_drawings_refer_to_what_is_there_once(board):
    page = Page(html.render(board))
    assert len(page.ids) == len(set(page.ids))
    for target in (*page.links, *page.loads):
        if target.startswith("#"):
            assert target[1:] in page.ids


def test_the_page_has_both_colour_schemes_a_phone_s_width_and_the_plots(board):
    text = html.render(board)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    drawn = [plots.score_panel(board, each) for each in board.environments]
    costs = [plots.cost_panel(board, each) for each in board.environments]
    expected = sum(panel is not None for panel in (*drawn, *costs))
    assert Page(text).counts["svg"] == expected == 4
    assert "currentColor" in text


def test_plots_of_a_suite_without_any_result_are_left_out(make_cell):
    board = report.build([make_cell("random", ZORK, [], status="not_run", reason="No file.")], "no")
    assert plots.files(board) == {}
    assert list(report.files(board)) == ["no.md", "no.csv", "no.json", "no.html"]


def terminal_text(board, width=120):
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(report.render_terminal(board))
    return console.export_text()


def test_the_terminal_shows_the_table_the_comparisons_and_what_was_not_run(board):
    text = terminal_text(board)
    assert "A small suite" in text
    assert re.search(r"grpo · tiny\s+not ranked\s+75\.0 ± \d", text)
    assert "Countdown: grpo · tiny against zeroshot · tiny +50.0 points" in text
    assert "Not run: Zork1 (expert, random)" in text
    assert "pz-envs data get zork_mit" in text
    assert "Not ranked: Detective (zeroshot · tiny): seed 1: 1 of 2 episodes" in text


def test_many_environments_turn_the_terminal_s_table(make_cell):
    games = ["Zork1", "Zork2", "Zork3", "Detective", "Pentari", "Library", "Karn"]
    made = [make_cell("random", f"pz/{game}-v0", [0.1, 0.2]) for game in games]
    text = terminal_text(report.build(made, "games"), width=60)
    assert re.search(r"Environment\s+random", text)
    assert len(re.findall(r"15\.0 ± 45\.\d", text)) == 7


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, "–"),
        (0, "0"),
        (3.5, "3.5"),
        (100.0, "100"),
        (1234.5, "1\u202f234"),
        (2e6, "2\u202f000\u202f000"),
    ],
)
def test_amounts_are_short(number, text):
    assert numbers.amount(number) == text


def test_signs_and_p_values():
    assert [numbers.signed(each) for each in (0.263, -0.05, 0.0, -0.0001)] == [
        "+26.3",
        "−5.0",
        "0.0",
        "0.0",
    ]
    assert [numbers.p_value(each) for each in (0.0001, 0.0624, 1.0)] == [
        "< 0.001",
        "0.062",
        "1.000",
    ]


def test_settings_text_is_ordered_and_plain():
    text = grouping.settings_text({"b": [1, 2], "a": "x", "c": {"z": 1, "y": True}})
    assert text == 'a=x, b=[1, 2], c={"y": true, "z": 1}'
