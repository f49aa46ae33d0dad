"""Tables beside the main ones: published figures, families, samples, splits, rewards."""

from __future__ import annotations

from pz_bench import anchors, report
from pz_bench.report import html, markdown, plots, side_tables, tables, wording
from pz_envs import catalog

COUNTDOWN, ZORK, DETECTIVE = "pz/Countdown-v0", "pz/Zork1-v0", "pz/Detective-v0"


def row_of(board, label):
    return next(row for row in board.rows if row.label == label)


def test_published_figures_are_of_environments_of_the_table_and_have_no_rank(make_cell):
    made = [make_cell("random", env, [0, 0.1]) for env in (COUNTDOWN, ZORK, DETECTIVE)]
    board = report.build(made, "suite")
    detective = next(each for each in board.environments if each.id == DETECTIVE)
    table = side_tables.published(board, detective)
    rows = {row[1].text: [cell.text for cell in row] for row in table.rows}
    assert rows["DRRN"] == ["published", "DRRN", "54.9", "197.8 of 360 points", "jericho"]
    assert rows["gpt-4.1"][2:] == ["65.6", "65.6 %", "tales"]
    assert not {each.label for each in board.rows} & set(rows)
    assert {each.environment for each in board.published} == {DETECTIVE, ZORK}
    for page in (markdown.render(board), html.render(board)):
        assert "197.8 of 360 points" in page
        assert "arXiv:1909.05398" in page
    assert '<a id="published"></a>' in markdown.render(board)


def test_every_published_figure_names_an_environment_a_source_and_a_share():
    names = {
        *(row.id for row in catalog.rows()),
        "pz/ALFWorld-v0 (split=valid_unseen)",
    }
    found = anchors.published(sorted(names))
    known = {each.key for each in anchors.sources(found)}
    assert len(found) > 500
    assert all(-0.5 <= each.value <= 1 and each.source in known for each in found)
    (webshop,) = (each for each in found if each.system == "Human expert")
    assert (webshop.value, webshop.printed, webshop.success) == (0.821, "82.1 %", 0.596)
    assert not anchors.published(["pz/Zork1-v0 (max_steps=5)"])  # another task, other figures


def test_alfworld_s_seen_and_unseen_games_are_columns_of_their_own(make_cell):
    made = [
        make_cell("random", "pz/ALFWorld-v0", [1, 0], env_kwargs=kwargs)
        for kwargs in ({}, {"split": "valid_unseen"}, {"split": "train", "task_types": "look"})
    ]
    board = report.build(made, "suite")
    assert [each.short for each in board.environments] == [
        "ALFWorld seen",
        "ALFWorld (split=train, task_types=look)",
        "ALFWorld unseen",
    ]
    unseen = "pz/ALFWorld-v0 (split=valid_unseen)"
    assert {each.environment for each in board.published} == {unseen}
    assert f"ALFWorld unseen is {unseen}." in wording.notes(board)
    alone = [report.build([cell], "suite").environments[0].short for cell in made]
    assert alone == ["ALFWorld seen", "ALFWorld unseen", "ALFWorld"]


def test_webshop_shows_reward_success_and_steps(make_cell):
    board = report.build([make_cell("random", "pz/WebShop-v0", [1, 0.5])], "suite")
    table = tables.details(board, board.environments[0])
    shown = {head.text: cell.text for head, cell in zip(table.headers, table.rows[0], strict=True)}
    assert shown["Normalised score"].startswith("75.0")
    assert (shown["Success"], shown["Steps"]) == ("50.0", "4")


def test_mathematics_shows_mean_and_pass_at_k_for_each_test_set(make_cell):
    made = [
        make_cell("zeroshot", env, values, seed=seed, model="tiny")
        for env in ("pz/AIME24-v0", "pz/AMC23-v0")
        for seed, values in enumerate(([1, 0], [0, 0], [1, 0]))
    ]
    board = report.build(made, "suite")
    table = side_tables.samples(board)
    assert [head.text for head in table.headers[2:]] == ["mean@k", "pass@1", "pass@2", "pass@3"]
    assert [row[0].text for row in table.rows] == ["AIME24", "AMC23"]
    assert [cell.text for cell in table.rows[0][2:]] == ["33.3 (k = 3)", "33.3", "50.0", "50.0"]
    for page in (markdown.render(board), html.render(board)):
        assert "Mathematics by samples" in page
    assert "1:0.333333 2:0.5 3:0.5" in report.as_csv(board)


def test_families_of_several_environments_have_a_mean_and_bars(make_cell):
    made = [
        make_cell(name, env, [value, value], seed=seed)
        for name, shift in (("a.py:One", 0.0), ("random", -0.1))
        for env, value in ((ZORK, 0.2), (DETECTIVE, 0.4), (COUNTDOWN, 1.0))
        for seed in (0, 1)
        for value in (value + shift,)
    ]
    board = report.build(made, "suite")
    (family,) = row_of(board, "a.py:One").families
    assert (family.family, family.mean) == ("jericho", 0.3)
    assert len(plots.family_panels(board)) == 1
    assert "By family" in markdown.render(board)
