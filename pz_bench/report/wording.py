"""The sentences of a leaderboard: what its numbers are called, how they are defined, and notes."""

from __future__ import annotations

from pz_bench import scores
from pz_bench.ranking import ENOUGH_SEEDS
from pz_bench.report.leaderboard import Environment, Leaderboard
from pz_bench.report.numbers import ABSENT


def definitions(board: Leaderboard) -> list[tuple[str, str, str]]:
    """Return (link, title, text) of the macro mean, of each family's score and of statistics."""
    found = [
        (
            "score-macro",
            "Macro mean",
            "Mean over families of the mean over each family's environments, so that a family "
            "counts once however many environments it has. Only rows that are complete over the "
            "whole suite have one.",
        )
    ]
    for family in board.families:
        own = [each for each in board.environments if each.family == family]
        metrics = " and ".join(sorted({metric_name(each).lower() for each in own}))
        text = (
            f"Shown: {metrics}. Score: {own[0].score_definition} "
            f"Success: {own[0].success_definition}"
        )
        found.append((f"score-{family}", own[0].family_title, text))
    found.append(("statistics", "Statistics", " ".join(_statistics(board))))
    return found


def notes(board: Leaderboard) -> list[str]:
    """Return the sentences that stand under the headline table."""
    found = [
        "Numbers are percent, ± the larger side of the 95 % interval.",
        "A failed episode counts as 0.",
    ]
    if any(score.status == "unranked" for row in board.rows for score in row.scores):
        found.append("In parentheses: not ranked, for the reasons listed below.")
    if board.not_run:
        found.append("Not run is not zero: the commands that would run it are listed below.")
    if any(row.score(each.name) is None for row in board.rows for each in board.environments):
        found.append(f"{ABSENT}: not in the suite for this row.")
    if any(row.aggregate is not None and row.aggregate.provisional for row in board.rows):
        found.append(f"*: provisional, from fewer than {ENOUGH_SEEDS} seeds.")
    if any(row.anchor for row in board.rows):
        found.append(
            "Anchors show the range and have no rank: random acts at random, expert plays the "
            "known solution."
        )
    if board.published:
        found.append(
            "Figures marked published are other people's, under their own protocols; they stand "
            "under each environment's table and have no rank."
        )
    found += [
        f"{each.short} is {each.name}." for each in board.environments if each.name != each.id
    ]
    if any(row.tiny for row in board.rows):
        found.append(f"Rows marked {scores.TINY_LABEL}.")
    return found


def metric_name(environment: Environment) -> str:
    """Return what the number of a column is called."""
    return "Success rate" if environment.metric == "success" else "Normalised score"


def link(environment: Environment) -> str:
    """Return the name of the definition of the environment's score."""
    return f"score-{environment.family}"


def _statistics(board: Leaderboard) -> list[str]:
    return [
        "All rows and seeds of an environment play the same instances; a row that played other "
        "tasks, as its data files differed, is not ranked and its instances are not paired.",
        "Success rates have Wilson intervals over seeds × instances; because seeds share "
        "instances, the trials are divided by the design effect of instances or seeds as "
        "clusters, whichever is larger. Outcomes that are all equal count once an instance.",
        "Other means have percentile intervals of a bootstrap that draws seeds, then instances "
        f"shared by the drawn seeds ({board.resamples} replicates, fixed streams), stretched about "
        "the mean as Student's interval is wider than the normal one. Points that are all equal "
        "have Wilson's interval, as if their mean were a success rate over the instances.",
        "The interval of a mean over environments combines theirs: distances to each end are added "
        "in squares.",
        "Comparisons are paired: the difference on shared instances, with Student's interval over "
        "the variances of instances and of each side's seeds and Satterthwaite's degrees of "
        "freedom; p is the two-sided sign-flip permutation p-value over instances, "
        "corrected by Holm's method over all comparisons of one kind; "
        "P(better) counts a tie as one half; the detectable difference is (z.975 + z.8) standard "
        "errors. A difference is bold when its interval excludes 0 and the corrected p is below "
        "0.05; it has no interval when all paired differences are equal.",
        "Rank intervals are of the rank of the macro mean over the same bootstrap draws; the IQM "
        "is the mean of the middle half of all seed means, with a bootstrap stratified by "
        "environment.",
        "A score is not ranked when seeds or episodes are missing or when more than "
        f"{100 * scores.MAX_FAILURES:.0f} % of its episodes failed.",
    ]
