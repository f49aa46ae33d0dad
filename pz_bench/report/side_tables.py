"""Tables that stand beside the main ones: families, samples of mathematics, published figures."""

from __future__ import annotations

from pz_bench import anchors
from pz_bench.report.leaderboard import Environment, FamilyMean, Leaderboard
from pz_bench.report.numbers import ABSENT, interval_title, percent, value
from pz_bench.report.tables import Cell, Header, Table, row_label
from pz_bench.report.wording import link, metric_name


def samples(board: Leaderboard) -> Table:
    """Return mean@k and unbiased pass@k of each mathematics set; empty without several seeds."""
    found = [
        (environment, row, score)
        for environment in board.environments
        for row in board.rows
        if (score := row.score(environment.name)) is not None and score.pass_at
    ]
    counts = sorted({k for _, _, score in found for k, _ in score.pass_at})
    lines = []
    for environment, row, score in found:
        shares = dict(score.pass_at)
        mean = f"{percent(score.value or 0.0)} (k = {len(score.seeds)})"
        lines.append(
            (
                Cell(environment.short, environment.short, kind="label"),
                row_label(row),
                Cell(mean, score.value, kind="value"),
                *(_share(shares.get(k)) for k in counts),
            )
        )
    heads = (
        Header("Test set"),
        Header("Algorithm · model"),
        Header("mean@k", "Mean over k samples of each question, percent"),
        *(Header(f"pass@{k}", "Unbiased, percent") for k in counts),
    )
    return Table(heads, tuple(lines))


def families(board: Leaderboard) -> Table:
    """Return the means over families that have several environments, one column a family."""
    names = list(dict.fromkeys(each.family for row in board.rows for each in row.families))
    titles = {each.family: each.family_title for each in board.environments}
    lines = []
    for row in board.rows:
        own = {each.family: each for each in row.families}
        if own:
            found = (own.get(name) for name in names)
            lines.append((row_label(row), *(_family(each) for each in found)))
    heads = (Header(titles[name], "Mean of its environments", f"score-{name}") for name in names)
    return Table((Header("Algorithm · model"), *heads), tuple(lines))


def published(board: Leaderboard, environment: Environment) -> Table:
    """Return other people's figures on one environment; empty where none are known."""
    found = [each for each in board.published if each.environment == environment.name]
    success = any(each.success is not None for each in found)
    lines = tuple(
        (
            Cell("published", kind="missing"),
            Cell(each.system, each.system, kind="label"),
            Cell(percent(each.value).replace("-", "−"), each.value, kind="value"),
            Cell(each.printed, each.printed, kind="text"),
            *([_share(each.success)] if success else []),
            Cell(each.source, each.source),
        )
        for each in found
    )
    heads = (
        Header("#", "Published figures have no rank"),
        Header("System"),
        Header(metric_name(environment), "Percent, as our own", link(environment)),
        Header("As printed", "In the unit of the source"),
        *([Header("Success", "Percent")] if success else []),
        Header("Source", "", "published"),
    )
    return Table(heads, lines)


def published_sources(board: Leaderboard) -> list[str]:
    """Return a sentence a source: what it is, its protocol, how its figures were checked."""
    return [
        f"{each.key}: {each.source}. Protocol: {each.protocol}. Checked: {each.verified}."
        for each in anchors.sources(board.published)
    ]


def _family(found: FamilyMean | None) -> Cell:
    if found is None:
        return Cell("not ranked", None, kind="missing")
    text = value(found.mean, found.low, found.high)
    return Cell(text, found.mean, interval_title(found.low, found.high), "value")


def _share(share: float | None) -> Cell:
    if share is None:
        return Cell(ABSENT, None, kind="missing")
    return Cell(percent(share), share, kind="value")
