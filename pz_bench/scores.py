"""From finished cells to the numbers of a leaderboard: one place where every score is defined.

A score belongs to one row (algorithm, model, settings) on one environment and is taken over all
episodes of all seeds. A failed episode counts as 0 in every denominator. Numbers that may not be
ranked (missing seeds, unfinished cells, too many failures) are still shown, with the reason; what
was not run has no number at all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pz_bench import ranking, stats
from pz_bench.cell import CellResult, EpisodeRecord, canonical
from pz_envs.catalog import EnvRow

MAX_FAILURES = 0.02
"""Largest share of failed episodes with which a score is still ranked."""

BEST_STEPS = 100
"""Within how many steps the best score of an episode is looked for."""

_FILE = "file "
_SAME = 1e-9

TINY_LABEL = "tiny: machinery check, not a research result"
ANCHORS = ("random", "expert")
STARTING_POINT = "zeroshot"

Metric = Literal["success", "score_norm"]


@dataclass(frozen=True, slots=True)
class Score:
    """What one row reached on one environment.

    ``value``, ``low`` and ``high`` are the environment's metric in 0..1 with its 95 % interval
    (none for a single episode); ``interval`` is how it was made (``wilson`` also of points that
    are all equal, as if they were successes). ``success_rate`` and
    ``invalid_share`` (of turns), ``format_error_share`` (of turns) are in 0..1. ``score`` is the
    mean in the family's own units and ``max_score`` the most that can be had. ``turns``,
    ``sampled_tokens``, ``prompt_tokens`` and ``seconds`` are means an episode. ``improve`` and
    ``improve_per_base`` are the shares of retries, and of base attempts, that a retry bettered
    while training, a mean over seeds. ``best`` is, in games that count points, the mean of the
    highest score shown within the first 100 steps of an episode, in the family's own units; None
    where steps were not recorded. ``pass_at`` has (k, unbiased pass@k) of mathematics, each seed a
    sample of the instances that all seeds played. Numbers are None where no episode was played.
    ``planned`` is the number of episodes a seed.
    """

    environment: str
    status: Literal["ranked", "unranked", "not_run"]
    reason: str | None
    command: str | None
    metric: Metric
    value: float | None = None
    low: float | None = None
    high: float | None = None
    interval: Literal["wilson", "bootstrap"] | None = None
    success_rate: float | None = None
    score: float | None = None
    max_score: float | None = None
    turns: float | None = None
    invalid_share: float | None = None
    format_error_share: float | None = None
    sampled_tokens: float | None = None
    prompt_tokens: float | None = None
    seconds: float | None = None
    improve: float | None = None
    improve_per_base: float | None = None
    best: float | None = None
    pass_at: tuple[tuple[int, float], ...] = ()
    episodes: int = 0
    failures: int = 0
    seeds: tuple[int, ...] = ()
    planned: int = 0
    max_turns: int = 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """``row`` minus ``against`` on the instances both played, in units of the metric (0..1).

    ``kind`` ``trained``: against zero-shot play of its own starting model; ``anchors``: expert
    minus random, the room there is. ``p`` is the two-sided sign-flip permutation p-value,
    ``p_holm`` the same corrected over all comparisons of its kind in the leaderboard.
    ``improvement`` is P(row > against) + half P(equal), ``detectable`` the smallest true
    difference that this many seeds and instances would find four times in five. ``low``, ``high``
    and ``detectable`` are None where nothing varied.
    """

    kind: Literal["trained", "anchors"]
    environment: str
    row: str
    against: str
    difference: float
    low: float | None
    high: float | None
    p: float
    p_holm: float
    improvement: float
    detectable: float | None
    instances: int
    seeds: int
    against_seeds: int

    @property
    def stands_out(self) -> bool:
        """Whether the interval excludes 0 and the corrected p is below 0.05; tables show it."""
        apart = self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)
        return apart and self.p_holm < 1 - stats.LEVEL


def matrix(cells: Sequence[CellResult], metric: Metric) -> stats.Floats:
    """Return [S, I] of ``metric``: seeds in order by instances in order of their env seed.

    NaN where an episode was not played; cells without any episode are left out.
    """
    return stats.stack(_by_instance(cells, metric))


def score(
    cells: Sequence[CellResult],
    row: EnvRow,
    name: str,
    seeds: Sequence[int],
    played: Mapping[str, str] | None = None,
) -> Score:
    """Return the score of one row of the table on one environment.

    Args:
        cells: its cells, one a seed.
        row: the environment's catalogue row, which says what the metric is.
        name: how the table calls the environment; also names the bootstrap's stream.
        seeds: those that a complete row has.
        played: what the rows of the column played (``played_by_most``); a row that played anything
            else is not ranked. None asks only that its own seeds agree.
    """
    cells = sorted(cells, key=lambda cell: cell.spec.seed)
    not_run = all(cell.status == "not_run" and not cell.episodes for cell in cells)
    reasons = _not_run_reasons(cells) if not_run else _reasons(cells, seeds, played or {})
    reason = portable("; ".join(reasons)) if reasons else None
    commands = [cell.command for cell in cells if _is_open(cell) and cell.command]
    command = portable(commands[0]) if commands else None
    episodes = [episode for cell in cells for episode in cell.episodes]
    planned = max(cell.spec.episodes for cell in cells)
    max_turns = max(cell.spec.max_turns for cell in cells)
    if not episodes:
        status: Literal["unranked", "not_run"] = (
            "not_run" if all(cell.status == "not_run" for cell in cells) else "unranked"
        )
        return Score(
            name, status, reason, command, row.metric, planned=planned, max_turns=max_turns
        )
    values = matrix(cells, row.metric)
    interval, method = _interval(values, row.metric, name)
    turns = sum(episode.turns for episode in episodes)
    return Score(
        environment=name,
        status="unranked" if reasons else "ranked",
        reason=reason,
        command=command,
        metric=row.metric,
        value=rounded(float(np.nanmean(values))),
        low=None if interval is None else rounded(interval.low),
        high=None if interval is None else rounded(interval.high),
        interval=method,
        success_rate=_mean(episodes, lambda each: _value(each, "success")),
        score=_mean(episodes, lambda each: each.score if each.status == "ok" else 0.0),
        max_score=rounded(max(episode.max_score for episode in episodes)),
        turns=_mean(episodes, lambda each: each.turns),
        invalid_share=rounded(sum(each.invalid for each in episodes) / max(1, turns)),
        format_error_share=rounded(sum(each.format_errors for each in episodes) / max(1, turns)),
        sampled_tokens=_mean(episodes, lambda each: each.sampled_tokens),
        prompt_tokens=_mean(episodes, lambda each: each.prompt_tokens),
        seconds=_mean(episodes, lambda each: each.seconds),
        improve=_trained_mean(cells, "improve"),
        improve_per_base=_trained_mean(cells, "improve_per_base"),
        best=_best(episodes) if row.metric == "score_norm" else None,
        pass_at=_pass_at(values) if row.family == "math" else (),
        episodes=len(episodes),
        failures=_failures(episodes),
        seeds=tuple(cell.spec.seed for cell in cells if cell.episodes),
        planned=planned,
        max_turns=max_turns,
    )


@dataclass(frozen=True, slots=True)
class Paired:
    """What ``compare`` finds; see ``Comparison`` for the fields."""

    difference: stats.Difference
    improvement: float
    instances: int


def compare(
    left: Sequence[CellResult], right: Sequence[CellResult], metric: Metric
) -> Paired | None:
    """Return the paired difference left - right and on how many instances it rests.

    The interval ends at -1 and 1, as differences of shares do. Only instances that every seed of
    both sides played are used, and of these only such as were the same task for all; None when
    there is none, or when the two played other data.
    """
    left_rows, right_rows = _by_instance(left, metric), _by_instance(right, metric)
    if not left_rows or not right_rows:
        return None
    found = [_played(cell) for cell in (*left, *right)]
    differing = {key for key, values in _by_key(found).items() if len(set(values)) > 1}
    if any(key.startswith(_FILE) for key in differing):
        return None
    common = set.intersection(*(set(row) for row in (*left_rows, *right_rows)))
    shared = sorted(seed for seed in common if str(seed) not in differing)
    if not shared:
        return None
    mine = [[row[key] for key in shared] for row in left_rows]
    theirs = [[row[key] for key in shared] for row in right_rows]
    difference = stats.paired_difference(mine, theirs)
    if difference.low is not None and difference.high is not None:
        low, high = max(-1.0, difference.low), min(1.0, difference.high)
        difference = difference._replace(low=low, high=high)
    return Paired(difference, ranking.probability_of_improvement(mine, theirs), len(shared))


def played_by_most(cells: Sequence[CellResult]) -> dict[str, str]:
    """Return what most cells of one environment played: file -> hash, instance -> task.

    Where as many played one as another, cells with data files of their own decide.
    """
    ordered = sorted(cells, key=lambda cell: (not cell.data, cell.id))
    values = _by_key([_played(cell) for cell in ordered])
    return {key: Counter(each).most_common(1)[0][0] for key, each in values.items()}


def rounded(value: float) -> float:
    """Round to the six decimals that every file and table shows or shortens."""
    return round(float(value), 6) + 0.0


def rounded_or_none(value: float | None) -> float | None:
    """Round as ``rounded`` does what is there."""
    return None if value is None else rounded(value)


def portable(text: str) -> str:
    """Return ``text`` with the folders of absolute paths cut to ``…``: they name one machine."""
    return re.sub(r"(?<![\w.:/~…])/(?:[^\s/'\"`:;,]+/)+", "…/", text)


def _value(episode: EpisodeRecord, metric: Metric) -> float:
    return float(getattr(episode, metric)) if episode.status == "ok" else 0.0


def _by_instance(cells: Sequence[CellResult], metric: Metric) -> list[Mapping[int, float]]:
    ordered = sorted(cells, key=lambda cell: cell.spec.seed)
    return [
        {episode.env_seed: _value(episode, metric) for episode in cell.episodes}
        for cell in ordered
        if cell.episodes
    ]


def _interval(
    values: stats.Floats, metric: Metric, stream: str
) -> tuple[stats.Interval | None, Literal["wilson", "bootstrap"] | None]:
    """Return the interval of the mean and how it was made; None for a single value.

    Points that are all equal have a bootstrap without width, which would say that nothing else can
    happen. They get Wilson's interval as if their mean were a rate of successes: of all numbers in
    0..1 with one mean, zeros and ones vary most.
    """
    if np.count_nonzero(~np.isnan(values)) < 2:
        return None, None
    mean = min(1.0, max(0.0, float(np.nanmean(values))))
    if metric == "success":
        trials = stats.effective_trials(values)
    elif np.nanmax(values) - np.nanmin(values) < _SAME:
        trials = stats.units(values)
    else:
        low, high = stats.bootstrap_interval(values, stream=stream)
        return stats.Interval(max(0.0, low), min(1.0, high)), "bootstrap"
    return stats.wilson(mean * trials, trials), "wilson"


def _played(cell: CellResult) -> dict[str, str]:
    """Return the hashes of the cell's data files by name and its tasks by the instance's seed."""
    files = {f"{_FILE}{name}": digest for name, digest in cell.data.items()}
    good = (episode for episode in cell.episodes if episode.status == "ok")
    return files | {str(episode.env_seed): episode.task_id for episode in good}


def _by_key(found: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for each in found:
        for key, value in each.items():
            values.setdefault(key, []).append(value)
    return values


def _other_data(cells: Sequence[CellResult], played: Mapping[str, str]) -> str | None:
    """Return why the cells may not stand in one column: their data differ among them or from it."""
    found = [_played(cell) for cell in cells]
    own = _by_key(found)
    files = sorted(key.removeprefix(_FILE) for key in own if key.startswith(_FILE))
    by = f" ({', '.join(files)})" if files else ""
    if any(len(set(values)) > 1 for values in own.values()):
        return f"the seeds played different tasks: their data differ{by}"
    if any(played.get(key, values[0]) != values[0] for key, values in own.items()):
        return f"played other tasks than the other rows: the data differ{by}"
    return None


def _mean(episodes: Sequence[EpisodeRecord], of: Callable[[EpisodeRecord], float]) -> float:
    return rounded(sum(of(episode) for episode in episodes) / len(episodes))


def _best(episodes: Sequence[EpisodeRecord]) -> float | None:
    """Return the mean of the highest score within ``BEST_STEPS`` steps, failed episodes as 0."""
    good = [episode for episode in episodes if episode.status == "ok"]
    if not good or not all(episode.steps for episode in good):
        return None
    highest = (max(step["score"] for step in each.steps[:BEST_STEPS]) for each in good)
    return rounded(sum(highest) / len(episodes))


def _pass_at(values: stats.Floats) -> tuple[tuple[int, float], ...]:
    """Return (k, pass@k) for k of 1, 2, 4 ... and the number of seeds; empty for one seed."""
    whole = values[:, ~np.isnan(values).any(axis=0)]
    seeds, instances = whole.shape
    if seeds < 2 or instances == 0:
        return ()
    powers = [2**power for power in range(seeds.bit_length()) if 2**power < seeds]
    return tuple((k, rounded(ranking.pass_at(whole, k))) for k in (*powers, seeds))


def _trained_mean(cells: Sequence[CellResult], name: str) -> float | None:
    found = [(cell.train_metrics or {}).get(name) for cell in cells]
    values = [value for value in found if value is not None]
    return rounded(sum(values) / len(values)) if values else None


def _failures(episodes: Sequence[EpisodeRecord]) -> int:
    return sum(episode.status != "ok" for episode in episodes)


def _is_open(cell: CellResult) -> bool:
    return cell.status != "done" or len(cell.episodes) < cell.spec.episodes


def _reasons(
    cells: Sequence[CellResult], seeds: Sequence[int], played: Mapping[str, str]
) -> list[str]:
    """Return why the score may not be ranked, one phrase a cause; empty when it may."""
    reasons = []
    causes: dict[str, list[int]] = {}
    for cell in cells:
        if _is_open(cell):
            causes.setdefault(_cause(cell), []).append(cell.spec.seed)
    absent = sorted(set(seeds) - {cell.spec.seed for cell in cells})
    if absent:
        causes["no cell"] = absent
    for cause, missing in causes.items():
        reasons.append(cause if len(missing) == len(seeds) else f"{_seeds(missing)}: {cause}")
    episodes = [episode for cell in cells for episode in cell.episodes]
    failures = _failures(episodes)
    if failures > MAX_FAILURES * len(episodes):
        reasons.append(
            f"{failures} of {len(episodes)} episodes failed "
            f"({100 * failures / len(episodes):.1f} %, at most {100 * MAX_FAILURES:.0f} % allowed)"
        )
    if len({_without_seed(cell) for cell in cells}) > 1:
        reasons.append("the seeds were run with different settings")
    other_data = _other_data(cells, played)
    return [*reasons, other_data] if other_data else reasons


def _not_run_reasons(cells: Sequence[CellResult]) -> list[str]:
    return list(dict.fromkeys(_first_line(cell) for cell in cells if _first_line(cell)))


def _without_seed(cell: CellResult) -> str:
    spec = cell.spec.model_copy(update={"seed": 0, "algorithm": cell.spec.player})
    return canonical(spec.model_dump(mode="json"))


def _cause(cell: CellResult) -> str:
    said = f": {_first_line(cell)}" if _first_line(cell) else ""
    if cell.status == "not_run":
        return f"not run{said}"
    if cell.status == "failed":
        return f"failed{said}"
    return f"{len(cell.episodes)} of {cell.spec.episodes} episodes{said}"


def _first_line(cell: CellResult) -> str:
    return (cell.reason or "").strip().partition("\n")[0]


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
