"""The tables of a leaderboard as text; Markdown, HTML and the terminal lay out the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pz_bench import scores
from pz_bench.ranking import Aggregate
from pz_bench.report.leaderboard import Environment, Leaderboard, Row
from pz_bench.report.numbers import (
    ABSENT,
    amount,
    interval_title,
    p_value,
    percent,
    signed,
    span,
    value,
)
from pz_bench.report.wording import link, metric_name
from pz_bench.scores import Comparison, Score

Kind = Literal["label", "value", "unranked", "missing", "text"]

NOT_RUN = "not run"
_IMPROVE = (
    "Share of retries that bettered the attempt they repeat while training, percent; in "
    "parentheses the share of all base attempts"
)
_DATA = (
    "Files that the tasks came from and the beginning of each one's hash; – where the program "
    "makes all of them"
)
_BEST = "Highest score within 100 steps of an episode, mean; the score beside it is the final one"


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell: what is shown, what it sorts by, what a pointer over it explains."""

    text: str
    sort: float | str | None = None
    title: str = ""
    kind: Kind = "text"
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Header:
    """A column's head; ``link`` is the name of the definition it leads to."""

    text: str
    title: str = ""
    link: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Heads and lines of equal length."""

    headers: tuple[Header, ...]
    rows: tuple[tuple[Cell, ...], ...]


def headline(board: Leaderboard) -> Table:
    """Return rows = algorithm x model, columns = rank, macro mean, environments."""
    best = _best(board)
    lines = []
    for row in board.rows:
        line = [_rank(row), row_label(row), _macro(row, best.get("macro"))]
        line += [
            _score(row.score(each.name), best.get(each.name), row) for each in board.environments
        ]
        lines.append(tuple(line))
    heads = [
        Header("#", "Rank by macro mean, among complete rows that are no anchors"),
        Header("Algorithm · model"),
        Header("Macro mean", "Mean over families, percent", "score-macro"),
    ]
    heads += [_head(each) for each in board.environments]
    return Table(tuple(heads), tuple(lines))


def aggregates(board: Leaderboard) -> Table:
    """Return what is known of complete rows over the whole suite; empty for one environment."""
    heads = (
        Header("Algorithm · model"),
        Header("Macro mean", "Each family counting once, percent", "score-macro"),
        Header("Task mean", "Each environment counting once, percent", "score-macro"),
        Header("IQM", "Interquartile mean over seeds x environments, percent", "statistics"),
        Header("Rank", "95 % interval", "statistics"),
        Header("Tie group", "Rows of a group cannot be told from its first", "statistics"),
    )
    lines = [
        (
            row_label(row),
            _macro(row, None),
            Cell(percent(row.task_mean), row.task_mean, kind="value"),
            _iqm(row.aggregate),
            *_standing(row),
        )
        for row in board.rows
        if row.task_mean is not None and row.aggregate is not None
    ]
    return Table(heads, tuple(lines))


def details(board: Leaderboard, environment: Environment) -> Table:
    """Return everything known of each row on one environment."""
    best = _best(board).get(environment.name)
    improve = any(score.improve is not None for score in _scores_of(board, environment))
    high = any(score.best is not None for score in _scores_of(board, environment))
    heads = (
        Header("Algorithm · model"),
        Header(
            metric_name(environment),
            "Percent, ± the larger side of the 95 % interval",
            link(environment),
        ),
        Header("95 % interval", "Percent"),
        Header("Success", "Share of episodes that succeed, percent"),
        Header("Score", "Mean of the family's own score, of the most there is"),
        *([Header("Best in 100", _BEST)] if high else []),
        Header(environment.turns_name, "Turns, mean an episode"),
        *([Header("Improve", _IMPROVE)] if improve else []),
        Header("Invalid", "Share of turns whose action was not legal, percent"),
        Header("Sampled tokens", "Mean an episode"),
        Header("Prompt tokens", "Mean an episode, counted once a request"),
        Header("Failed", "Failed episodes; each counts as 0"),
        Header("Episodes", "Episodes played, over all seeds"),
        Header("Seeds"),
    )
    lines = []
    for row in board.rows:
        score = row.score(environment.name)
        if score is not None:
            lines.append(
                (row_label(row), _score(score, best, row), *_numbers(score, improve, high))
            )
    return Table(heads, tuple(lines))


def retries(board: Leaderboard) -> Table:
    """Return success, steps or attempts, and improvement side by side; empty without retries."""
    heads = (
        Header("Environment"),
        Header("Algorithm · model"),
        Header("Success", "Share of episodes that succeed, percent"),
        Header("Steps", "Turns in the environment, mean an episode"),
        Header("Attempts", "Answers to one question, mean an episode"),
        Header("Improve", _IMPROVE),
    )
    lines = []
    for environment in board.environments:
        for row in board.rows:
            score = row.score(environment.name)
            if score is None or score.value is None:
                continue
            turns = Cell(amount(score.turns), score.turns, kind="value")
            absent = Cell(ABSENT, None, kind="missing")
            steps = environment.turns_name == "Steps"
            success = score.success_rate or 0.0
            lines.append(
                (
                    Cell(environment.short, environment.short, kind="label"),
                    row_label(row),
                    Cell(percent(success), success, kind="value"),
                    *((turns, absent) if steps else (absent, turns)),
                    _improve(score),
                )
            )
    tried = any(score.improve is not None for row in board.rows for score in row.scores)
    return Table(heads, tuple(lines) if tried else ())


def comparisons(board: Leaderboard) -> Table:
    """Return the paired differences, in points of a hundred."""
    heads = (
        Header("Environment"),
        Header("Algorithm · model"),
        Header("against"),
        Header("Difference", "Percentage points, paired on shared instances", "statistics"),
        Header("95 % interval", "Percentage points", "statistics"),
        Header("p", "Two-sided sign-flip permutation test over instances", "statistics"),
        Header("p (Holm)", "Corrected over the comparisons of its kind", "statistics"),
        Header("P(better)", "Chance that a run beats a run of the other, percent", "statistics"),
        Header("Detectable", "True difference found 4 times in 5, points", "statistics"),
        Header("Instances"),
        Header("Seeds"),
    )
    short = {each.name: each.short for each in board.environments}
    lines = []
    for each in board.comparisons:
        title = _why_bold(each)
        lines.append(
            (
                Cell(short[each.environment], short[each.environment], kind="label"),
                Cell(each.row, each.row),
                Cell(each.against, each.against),
                Cell(signed(each.difference), each.difference, title, "value", each.stands_out),
                Cell(span(each.low, each.high), each.low, title, "value"),
                Cell(p_value(each.p), each.p, kind="value"),
                Cell(p_value(each.p_holm), each.p_holm, kind="value"),
                Cell(percent(each.improvement), each.improvement, kind="value"),
                Cell(
                    ABSENT if each.detectable is None else percent(each.detectable),
                    each.detectable,
                    kind="value",
                ),
                Cell(str(each.instances), each.instances, kind="value"),
                Cell(f"{each.seeds} and {each.against_seeds}", each.seeds, kind="value"),
            )
        )
    return Table(heads, tuple(lines))


def _why_bold(each: Comparison) -> str:
    if each.low is None or each.high is None:
        return "All paired differences are equal: no interval"
    excludes = each.low > 0 or each.high < 0
    interval = f"The interval {'excludes' if excludes else 'includes'} 0"
    return f"{interval}; bold: it does, and p (Holm) is below 0.05"


def unranked(board: Leaderboard) -> Table:
    """Return what is shown without a rank, with the reason and the command that would mend it."""
    short = {each.name: each.short for each in board.environments}
    lines = [
        (
            Cell(short[score.environment], short[score.environment], kind="label"),
            Cell(row.label, row.label),
            Cell(score.reason or "", score.reason),
            Cell(score.command or "", score.command),
        )
        for row in board.rows
        for score in row.scores
        if score.status == "unranked"
    ]
    return Table(_heads("Environment", "Algorithm · model", "Reason", "Command"), tuple(lines))


def not_run(board: Leaderboard) -> Table:
    """Return what was planned and not run: one line for rows that share reason and command."""
    short = {each.name: each.short for each in board.environments}
    groups: dict[tuple[str, str, str], list[str]] = {}
    for label, score in board.not_run:
        key = (short[score.environment], score.reason or "", score.command or "")
        groups.setdefault(key, []).append(label)
    lines = [
        (
            Cell(name, name, kind="label"),
            Cell(", ".join(labels), labels[0]),
            Cell(reason, reason),
            Cell(command, command),
        )
        for (name, reason, command), labels in groups.items()
    ]
    return Table(_heads("Environment", "Algorithm · model", "Reason", "Command"), tuple(lines))


def settings(board: Leaderboard) -> Table:
    """Return with which seeds, how many episodes and how many turns each column was played."""
    lines = []
    for environment in board.environments:
        found = _scores_of(board, environment)
        lines.append(
            (
                Cell(environment.name, environment.name, kind="label"),
                Cell(", ".join(map(str, environment.seeds)), kind="value"),
                Cell(_range([score.planned for score in found]), kind="value"),
                Cell(_range([score.max_turns for score in found]), kind="value"),
                Cell("; ".join(environment.data) or ABSENT, "; ".join(environment.data)),
            )
        )
    heads = _heads("Environment", "Seeds", "Episodes a seed", "Turns at most")
    return Table((*heads, Header("Data", _DATA)), tuple(lines))


def _heads(*texts: str) -> tuple[Header, ...]:
    return tuple(Header(text) for text in texts)


def _head(environment: Environment) -> Header:
    title = f"{environment.name}: {metric_name(environment).lower()}, percent"
    return Header(environment.short, title, link(environment))


def _best(board: Leaderboard) -> dict[str, float]:
    """Return the best ranked number of each column in which two or more rows compete.

    Anchors do not compete.
    """
    found: dict[str, list[float]] = {}
    for row in board.rows:
        if row.anchor:
            continue
        if row.macro is not None:
            found.setdefault("macro", []).append(row.macro.mean)
        for score in row.scores:
            if score.status == "ranked" and score.value is not None:
                found.setdefault(score.environment, []).append(score.value)
    return {column: max(values) for column, values in found.items() if len(values) > 1}


def _rank(row: Row) -> Cell:
    if row.anchor:
        return Cell("anchor", 1e6, "Shows the range; has no rank", "missing")
    if row.rank is None:
        return Cell(ABSENT, 1e9, row.reason or "", "missing")
    if row.standing is None:
        return Cell(str(row.rank), row.rank, kind="value")
    low, high, group = row.standing
    title = f"95 % interval of the rank {low} to {high}; tie group {group}"
    return Cell(str(row.rank), row.rank, title, "value")


def _iqm(found: Aggregate) -> Cell:
    title = f"{found.seeds} seeds"
    text = value(found.iqm, found.low, found.high)
    if found.provisional:
        return Cell(f"{text}*", found.iqm, f"{title}: provisional", "value")
    return Cell(text, found.iqm, title, "value")


def _standing(row: Row) -> tuple[Cell, Cell]:
    if row.standing is None:
        text = "anchor" if row.anchor else ABSENT
        return Cell(text, None, kind="missing"), Cell(ABSENT, None, kind="missing")
    low, high, group = row.standing
    text = str(low) if low == high else f"{low} to {high}"
    return Cell(text, low, kind="value"), Cell(str(group), group, kind="value")


def row_label(row: Row) -> Cell:
    """Return the cell that names a row, with its settings for a pointer over it."""
    notes = [scores.TINY_LABEL] if row.tiny else []
    notes += [f"settings: {row.settings}"] if row.settings else []
    return Cell(row.label, row.label, "; ".join(notes), "label")


def _macro(row: Row, best: float | None) -> Cell:
    if row.macro is None:
        return Cell("not ranked", None, row.reason or "", "missing")
    macro = row.macro
    strong = not row.anchor and macro.mean == best and macro.mean > 0
    text = value(macro.mean, macro.low, macro.high)
    return Cell(text, macro.mean, interval_title(macro.low, macro.high), "value", strong)


def _score(score: Score | None, best: float | None, row: Row) -> Cell:
    if score is None:
        return Cell(ABSENT, None, "Not in the suite for this row", "missing")
    if score.status == "not_run":
        return Cell(NOT_RUN, None, score.reason or "", "missing")
    if score.value is None:
        return Cell("no result", None, score.reason or "", "missing")
    text = value(score.value, score.low, score.high)
    if score.status == "unranked":
        return Cell(f"({text})", score.value, score.reason or "", "unranked")
    strong = not row.anchor and score.value == best and score.value > 0
    return Cell(text, score.value, interval_title(score.low, score.high), "value", strong)


def _numbers(score: Score, improve: bool, high: bool) -> tuple[Cell, ...]:
    if score.value is None:
        return tuple(Cell(ABSENT, kind="missing") for _ in range(10 + improve + high))
    interval = (
        ABSENT
        if score.low is None or score.high is None
        else f"{percent(score.low)} to {percent(score.high)}"
    )
    success, invalid = score.success_rate or 0.0, score.invalid_share or 0.0
    return (
        Cell(interval, score.low, kind="value"),
        Cell(percent(success), success, kind="value"),
        Cell(f"{amount(score.score, 2)} of {amount(score.max_score)}", score.score, kind="value"),
        *([Cell(amount(score.best, 2), score.best, kind="value")] if high else []),
        Cell(amount(score.turns), score.turns, kind="value"),
        *([_improve(score)] if improve else []),
        Cell(percent(invalid), invalid, kind="value"),
        Cell(amount(score.sampled_tokens), score.sampled_tokens, kind="value"),
        Cell(amount(score.prompt_tokens), score.prompt_tokens, kind="value"),
        Cell(str(score.failures), score.failures, kind="value"),
        Cell(amount(score.episodes), score.episodes, kind="value"),
        Cell(", ".join(map(str, score.seeds)), len(score.seeds), kind="value"),
    )


def _improve(score: Score) -> Cell:
    if score.improve is None or score.improve_per_base is None:
        return Cell(ABSENT, None, "No retries", "missing")
    text = f"{percent(score.improve)} ({percent(score.improve_per_base)})"
    return Cell(text, score.improve, kind="value")


def _scores_of(board: Leaderboard, environment: Environment) -> list[Score]:
    found = (row.score(environment.name) for row in board.rows)
    return [score for score in found if score is not None]


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return amount(low) if low == high else f"{amount(low)} to {amount(high)}"
