"""From cells to a leaderboard: rows, columns, ranks, comparisons, and what is missing.

Rows are algorithm x model, columns are environments; the macro mean over families ranks rows that
are complete over the whole suite. The result is plain data: every file and the terminal show it,
none computes. The same cells in any order give the same leaderboard.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pz_bench import anchors, ranking, scores, stats
from pz_bench.cell import CellResult, canonical, is_trained
from pz_bench.ranking import Aggregate, Standing
from pz_bench.report import curves, grouping
from pz_bench.report.draws import Draws
from pz_bench.scores import Comparison, Score
from pz_envs import catalog
from pz_envs.families import FAMILIES

THRESHOLDS = tuple(round(0.02 * step, 2) for step in range(51))
"""Scores at which a performance profile is taken."""


@dataclass(frozen=True, slots=True)
class Environment:
    """A column: one environment of the suite and what its number means.

    ``data`` says what was played, one entry for each difference: files by name with the beginning
    of their hash, ``generated`` in place of published files, or nothing where none are published.
    """

    name: str
    id: str
    short: str
    family: str
    family_title: str
    metric: scores.Metric
    score_definition: str
    success_definition: str
    turns_name: str
    seeds: tuple[int, ...]
    data: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Macro:
    """The mean over families (each family the mean of its environments), in 0..1.

    Its interval combines those of the environments; there is none where one of them has none.
    """

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class FamilyMean:
    """The mean over the environments of one family that has several, in 0..1."""

    family: str
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    ``rank`` counts complete rows that are no anchors, ``standing`` is how sure it is; ``reason``
    says why a row is not complete, and then ``macro``, ``task_mean`` (each environment counting
    once), ``aggregate`` and ``profile`` (over seeds x environments) are None. ``scores`` has one
    entry for each environment the row was planned on, in the order of the columns; ``families`` one
    for each family with several environments on all of which the row is ranked, in a suite of
    several families.
    """

    label: str
    algorithm: str
    model: str | None
    settings: str
    anchor: bool
    trained: bool
    tiny: bool
    rank: int | None
    reason: str | None
    macro: Macro | None
    scores: tuple[Score, ...]
    standing: Standing | None = None
    task_mean: float | None = None
    aggregate: Aggregate | None = None
    families: tuple[FamilyMean, ...] = ()
    profile: tuple[float, ...] | None = None

    def score(self, environment: str) -> Score | None:
        """Return the score on the environment of that name, None when it was never planned."""
        return next((each for each in self.scores if each.environment == environment), None)


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """Everything a report shows; made of plain values, ready for ``dataclasses.asdict``.

    ``published`` are other people's figures on these environments, ``curves`` what training
    measured. ``Row.profile`` has the share of runs above each of ``thresholds``.
    """

    suite: str
    title: str
    level: float
    resamples: int
    environments: tuple[Environment, ...]
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    left_out: tuple[str, ...]
    versions: Mapping[str, tuple[str, ...]]
    thresholds: tuple[float, ...] = THRESHOLDS
    published: tuple[anchors.Published, ...] = ()
    curves: tuple[curves.Curve, ...] = ()

    @property
    def not_run(self) -> tuple[tuple[str, Score], ...]:
        """(row's label, score) of everything that was planned and not run."""
        return tuple(
            (row.label, score)
            for row in self.rows
            for score in row.scores
            if score.status == "not_run"
        )

    @property
    def families(self) -> tuple[str, ...]:
        """Families of the suite, in the order of the catalogue."""
        return tuple(dict.fromkeys(environment.family for environment in self.environments))


def build(
    results: Sequence[CellResult],
    suite: str,
    title: str = "",
    training: Mapping[str, curves.Training] | None = None,
) -> Leaderboard:
    """Return the leaderboard of ``results``, whatever their order.

    Args:
        results: the cells of the suite, the ones not run among them.
        suite: the suite's name; files are called after it.
        title: a heading for people; the suite's name by default.
        training: cell id -> the steps of its training, where there were any.

    Raises:
        ConfigError: a cell's environment is not in the catalogue.
    """
    cells, left_out = grouping.one_per_slot(results)
    columns = grouping.grouped(cells, grouping.column)
    seeds = {name: tuple(sorted({cell.spec.seed for cell in columns[name]})) for name in columns}
    ids = Counter(columns[name][0].spec.env for name in columns)
    environments = sorted(
        (
            _environment(name, columns[name], seeds[name], ids[columns[name][0].spec.env] == 1)
            for name in columns
        ),
        key=_catalog_order,
    )
    lines = {
        label: grouping.grouped(line, grouping.column) for label, line in grouping.labelled(cells)
    }
    drawn = {label: Draws(lines[label], environments) for label in lines}
    played = {name: scores.played_by_most(columns[name]) for name in columns}
    rows = [
        _row(label, lines[label], environments, drawn[label], played) for label in sorted(lines)
    ]
    return Leaderboard(
        suite=suite,
        title=title or suite,
        level=stats.LEVEL,
        resamples=stats.RESAMPLES,
        environments=tuple(environments),
        rows=_ranked(rows, drawn),
        comparisons=tuple(_comparisons(rows, lines, environments)),
        left_out=tuple(left_out),
        versions=_versions(cells),
        published=anchors.published(each.name for each in environments),
        curves=tuple(_curves(lines, environments, training or {})),
    )


def _environment(
    name: str, cells: Sequence[CellResult], seeds: tuple[int, ...], only_one: bool
) -> Environment:
    cell = cells[0]
    row = catalog.find(cell.spec.env)
    family = FAMILIES[row.family]
    return Environment(
        name=name,
        id=row.id,
        short=grouping.short_name(cell, only_one),
        family=family.name,
        family_title=family.title,
        metric=row.metric,
        score_definition=family.score,
        success_definition=family.success,
        turns_name=family.turns,
        seeds=seeds,
        data=_data(cells, "generated" if row.dataset else ""),
    )


def _data(cells: Sequence[CellResult], without: str) -> tuple[str, ...]:
    """Return the different data that cells with episodes played; ``without`` where there is none.

    Hashes are cut to eight digits.
    """
    found = {
        ", ".join(f"{file} {cell.data[file][:8]}" for file in sorted(cell.data)) or without
        for cell in cells
        if cell.episodes
    }
    return tuple(sorted(filter(None, found)))


def _catalog_order(environment: Environment) -> tuple[int, str]:
    return (_positions()[environment.id], environment.name)


@functools.cache
def _positions() -> Mapping[str, int]:
    return {row.id: position for position, row in enumerate(catalog.rows())}


def _row(
    label: str,
    cells: Mapping[str, list[CellResult]],
    environments: Sequence[Environment],
    draws: Draws,
    played: Mapping[str, Mapping[str, str]],
) -> Row:
    spec = next(iter(cells.values()))[0].spec
    own = tuple(
        scores.score(
            cells[each.name], catalog.find(each.id), each.name, each.seeds, played[each.name]
        )
        for each in environments
        if each.name in cells
    )
    reason = _row_reason(own, environments)
    every = {canonical(grouping.settings(cell)): cell for line in cells.values() for cell in line}
    texts = (grouping.settings_text(grouping.settings(every[key])) for key in sorted(every))
    return Row(
        label=label,
        algorithm=scores.portable(spec.player),
        model=grouping.model_name(spec.model),
        settings=" | ".join(filter(None, texts)),
        anchor=spec.algorithm in scores.ANCHORS,
        trained=bool(spec.train) or is_trained(spec.algorithm),
        tiny=spec.model == "tiny",
        rank=None,
        reason=reason,
        macro=None if reason else _macro(own, environments),
        scores=own,
        task_mean=None if reason else _task_mean(own),
        aggregate=None if reason else _aggregate(draws, environments),
        families=tuple(_family_means(own, environments)),
        profile=None if reason else _profile(draws, environments),
    )


def _family_means(
    own: Sequence[Score], environments: Sequence[Environment]
) -> Iterator[FamilyMean]:
    ranked = {score.environment for score in own if score.status == "ranked"}
    families = Counter(each.family for each in environments)
    for family, size in families.items():
        if (
            len(families) < 2
            or size < 2
            or not ranked.issuperset(each.name for each in environments if each.family == family)
        ):
            continue
        members = {each.name for each in environments if each.family == family}
        found = [score for score in own if score.environment in members]
        yield FamilyMean(family, *_mean_of(found, [1 / size] * size))


def _profile(draws: Draws, environments: Sequence[Environment]) -> tuple[float, ...] | None:
    """Return the share of runs (seed x environment) above each threshold; None for one column."""
    if len(environments) < 2:
        return None
    found = ranking.performance_profile(draws.seed_means(), THRESHOLDS)
    return tuple(scores.rounded(share) for share in found)


def _curves(
    lines: Mapping[str, Mapping[str, list[CellResult]]],
    environments: Sequence[Environment],
    training: Mapping[str, curves.Training],
) -> Iterator[curves.Curve]:
    for environment in environments:
        for label in sorted(lines):
            cells = lines[label].get(environment.name, [])
            seeds = [training.get(cell.id, ()) for cell in cells]
            found = curves.curve(label, environment.name, environment.metric, seeds)
            if found is not None:
                yield found


def _row_reason(own: Sequence[Score], environments: Sequence[Environment]) -> str | None:
    """Return why a row has no macro mean: each environment it lacks, by kind of lack."""
    found = {score.environment: score.status for score in own}
    lacks: dict[str, list[str]] = {}
    for environment in environments:
        status = found.get(environment.name, "not planned")
        if status != "ranked":
            lacks.setdefault(status.replace("_", " "), []).append(environment.short)
    return "; ".join(f"{lack}: {', '.join(names)}" for lack, names in lacks.items()) or None


def _macro(own: Sequence[Score], environments: Sequence[Environment]) -> Macro:
    families = {each.name: each.family for each in environments}
    sizes = Counter(families[score.environment] for score in own)
    shares = [1 / len(sizes) / sizes[families[score.environment]] for score in own]
    return Macro(*_mean_of(own, shares))


def _mean_of(
    own: Sequence[Score], weights: Sequence[float]
) -> tuple[float, float | None, float | None]:
    """Return the weighted sum of scores with its interval, rounded."""
    values = [score.value or 0.0 for score in own]
    mean = scores.rounded(sum(w * value for w, value in zip(weights, values, strict=True)))
    ends = [
        stats.Interval(score.low, score.high)
        for score in own
        if score.low is not None and score.high is not None
    ]
    if len(ends) < len(own):
        return mean, None, None
    low, high = stats.combined_interval(list(zip(weights, values, ends, strict=True)))
    return mean, scores.rounded(low), scores.rounded(high)


def _task_mean(own: Sequence[Score]) -> float:
    return scores.rounded(sum(score.value or 0.0 for score in own) / len(own))


def _aggregate(draws: Draws, environments: Sequence[Environment]) -> Aggregate | None:
    """Return the IQM over seeds x environments; None for a suite of one environment."""
    if len(environments) < 2:
        return None
    found = ranking.aggregate(draws.seed_means())
    return found._replace(
        iqm=scores.rounded(found.iqm),
        low=scores.rounded(found.low),
        high=scores.rounded(found.high),
    )


def _ranked(rows: Sequence[Row], draws: Mapping[str, Draws]) -> tuple[Row, ...]:
    """Return complete rows by macro mean, then the others by label, anchors last.

    Equal means share a rank.
    """
    complete = sorted(
        (row for row in rows if row.macro is not None),
        key=lambda row: (-_mean(row), row.label),
    )
    compete = [row for row in complete if not row.anchor]
    means = [_mean(row) for row in compete]
    replicates = [draws[row.label].macro() for row in compete]
    standings = ranking.standings(replicates) if len(compete) > 1 else [None] * len(compete)
    placed = {
        row.label: replace(row, rank=1 + means.index(_mean(row)), standing=standing)
        for row, standing in zip(compete, standings, strict=True)
    }
    others = sorted((row for row in rows if row.macro is None), key=_by_label)
    return (*(placed.get(row.label, row) for row in complete), *others)


def _by_label(row: Row) -> tuple[bool, str]:
    return (row.anchor, row.label)


def _mean(row: Row) -> float:
    return row.macro.mean if row.macro is not None else 0.0


def _comparisons(
    rows: Sequence[Row],
    lines: Mapping[str, Mapping[str, list[CellResult]]],
    environments: Sequence[Environment],
) -> list[Comparison]:
    """Return trained rows against their starting models, then the anchors, column by column."""
    trained = [(row, other) for row in rows if row.trained for other in _starting(row, rows, lines)]
    experts = [row for row in rows if row.algorithm == "expert"]
    randoms = [row for row in rows if row.algorithm == "random"]
    anchors = [(row, other) for row in experts for other in randoms]
    found = []
    for environment in environments:
        for row, other in (*trained, *anchors):
            left, right = row.score(environment.name), other.score(environment.name)
            if left is None or right is None or {left.status, right.status} != {"ranked"}:
                continue
            result = scores.compare(
                lines[row.label][environment.name],
                lines[other.label][environment.name],
                environment.metric,
            )
            if result is None:
                continue
            difference = result.difference
            found.append(
                Comparison(
                    kind="trained" if row.trained else "anchors",
                    environment=environment.name,
                    row=row.label,
                    against=other.label,
                    difference=scores.rounded(difference.mean),
                    low=scores.rounded_or_none(difference.low),
                    high=scores.rounded_or_none(difference.high),
                    p=scores.rounded(difference.p),
                    p_holm=1.0,
                    improvement=scores.rounded(result.improvement),
                    detectable=scores.rounded_or_none(ranking.detectable_difference(difference)),
                    instances=result.instances,
                    seeds=len(left.seeds),
                    against_seeds=len(right.seeds),
                )
            )
    return [
        replace(each, p_holm=scores.rounded(corrected))
        for kind in ("trained", "anchors")
        for each, corrected in _corrected([each for each in found if each.kind == kind])
    ]


def _corrected(found: Sequence[Comparison]) -> list[tuple[Comparison, float]]:
    return list(zip(found, ranking.holm([each.p for each in found]), strict=True))


def _starting(
    row: Row, rows: Sequence[Row], lines: Mapping[str, Mapping[str, list[CellResult]]]
) -> list[Row]:
    """Return the rows in which the model that ``row`` was trained from plays zero-shot."""

    def model(each: Row) -> str | None:
        return next(iter(lines[each.label].values()))[0].spec.model

    return [
        other
        for other in rows
        if other.algorithm == scores.STARTING_POINT and model(other) == model(row)
    ]


def _versions(cells: Sequence[CellResult]) -> dict[str, tuple[str, ...]]:
    """Return every version of everything that the played cells recorded, by name."""
    found: dict[str, set[str]] = {}
    for cell in cells:
        if cell.episodes:
            for name, version in cell.versions.items():
                found.setdefault(name, set()).add(str(version))
    return {name: tuple(sorted(found[name])) for name in sorted(found)}
