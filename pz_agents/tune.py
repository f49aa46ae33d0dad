"""Search over the settings of a training run, of any algorithm, with Ray Tune.

Every trial is a training run of its own in ``OUT/trials/NAME``, with some settings drawn and the
rest as given; so it can be looked at, resumed and evaluated like any other. The same command goes
on with a search that was cut short: finished trials are kept and unfinished ones resume from their
checkpoints. A setting's range is written ``KEY=KIND(ARGUMENTS)``, which is read by the small
grammar below and never evaluated.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pz_envs.errors import ConfigError, did_you_mean
from pz_envs.files import write_atomic

__all__ = ["Draw", "Trial", "parse_draw", "run_trial", "table", "tune"]

TABLE = "trials.csv"
MEAN_REWARD = "mean_reward"
MEAN_STEPS = 20
"""Steps over which ``mean_reward``, the default figure of merit, is taken."""

_METRIC = "metric"
_REFUSED = "refused"
"""Files of a search that its trials read and write: the metric, and why there is no such."""
_EVALUATED = ("eval_", "evaluator_step/")
_NOT_IN_EVERY_STEP = (*_EVALUATED, "train/")
"""How names begin that a run's first step need not have."""

_KINDS = {
    "uniform": "LOW, HIGH",
    "loguniform": "LOW, HIGH",
    "randint": "LOW, HIGH (HIGH itself is not drawn)",
    "lograndint": "LOW, HIGH",
    "choice": "A, B, ...",
    "grid": "A, B, ... (each is tried, with as many trials as --trials says)",
}
_FORM = re.compile(r"([a-z]+)\((.*)\)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Draw:
    """How a setting's value is drawn: a kind of ``parse_draw`` and its arguments."""

    kind: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one trial: its drawn settings by dotted name and its last figures."""

    name: str
    drawn: Mapping[str, Any]
    metrics: Mapping[str, float]
    error: str | None = None


def parse_draw(text: str) -> tuple[str, Draw]:
    """Read ``KEY=KIND(ARGUMENTS)``, e.g. ``learning_rate=loguniform(1e-6, 1e-3)``.

    The kinds are uniform, loguniform, randint, lograndint (LOW and HIGH each), choice and grid
    (any number of values). Arguments are YAML values with commas between.

    Raises:
        ConfigError: it is not of that form, or the arguments do not fit the kind.
    """
    key, equals, rest = text.partition("=")
    found = _FORM.fullmatch(rest.strip())
    if not equals or not all(key.split(".")) or found is None:
        raise ConfigError(
            f"--search {text}: write KEY=KIND(ARGUMENTS), e.g. "
            "learning_rate=loguniform(1e-6,1e-3) or group_size=choice(4,8,16)"
        )
    kind = found[1]
    if kind not in _KINDS:
        allowed = ", ".join(f"{name}({arguments})" for name, arguments in _KINDS.items())
        raise ConfigError(
            f"--search {text}: no kind `{kind}`.{did_you_mean(kind, _KINDS)} Allowed: {allowed}"
        )
    try:
        arguments = tuple(map(_number, yaml.safe_load(f"[{found[2]}]")))
    except yaml.YAMLError as error:
        raise ConfigError(f"--search {text}: not YAML values ({error})") from error
    _check(text, kind, arguments)
    return key, Draw(kind, arguments)


def tune(
    base: Mapping[str, Any],
    searched: Mapping[str, Draw],
    folder: Path,
    *,
    trials: int = 8,
    metric: str = MEAN_REWARD,
    mode: Literal["max", "min"] = "max",
    runtime: str = "ray",
    concurrent: int = 0,
    seed: int = 0,
) -> list[Trial]:
    """Run a search, or go on with it, and return the trials, best first.

    Args:
        base: settings of every trial.
        searched: how the others are drawn, by dotted name.
        folder: of the search; the table goes to ``trials.csv`` there.
        trials: how many; for each point of a grid, where there are grids.
        metric: a name in ``metrics.jsonl``, or ``mean_reward``.
        mode: whether more of it is better, or less.
        runtime: ``ray`` or ``ray:ADDRESS``.
        concurrent: most trials at once; 0: as many as there is room for.
        seed: of what is drawn.

    Raises:
        ConfigError: a setting does not exist or a range leaves what it may be, ray is not
            installed, the search in ``folder`` was another one, or runs have no such metric.
        InfraError: the cluster was lost; the same call goes on.
    """
    from pz_agents.runtime.ray import search

    folder = folder.resolve()
    check(base, searched, metric)
    described = {
        "base": dict(base),
        "search": {key: [draw.kind, list(draw.arguments)] for key, draw in searched.items()},
        "trials": trials,
        "seed": seed,
    }
    _remember(folder / "search.json", described)
    write_atomic(folder / _METRIC, metric)
    refused = folder / _REFUSED
    refused.unlink(missing_ok=True)
    found = search(
        "pz_agents.tune:run_trial",
        {"base": dict(base), "folder": str(folder)},
        searched,
        folder / "ray",
        samples=trials,
        runtime=runtime,
        concurrent=concurrent,
        seed=seed,
        stopped_by=refused,
    )
    if refused.exists():
        raise ConfigError(refused.read_text("utf-8"))
    known = sorted({name for trial in found for name in trial.metrics})
    if known and metric not in known:
        raise ConfigError(_no_metric(metric, known))
    sign = -1.0 if mode == "max" else 1.0
    ordered = sorted(
        found, key=lambda trial: (sign * _figure(trial.metrics, metric, sign), trial.name)
    )
    write_atomic(folder / TABLE, table(ordered, metric))
    return ordered


def run_trial(
    fixed: Mapping[str, Any],
    drawn: Mapping[str, Any],
    name: str,
    report: Callable[[Mapping[str, float]], None],
) -> None:
    """Train one trial in its folder; what runs in Ray's processes.

    Args:
        fixed: ``base`` settings and the search's ``folder``.
        drawn: settings of this trial.
        name: of the trial and its folder; the same when it is resumed.
        report: told the figures after every step.
    """
    from pz_agents.training.modes import train_any
    from pz_agents.training.monitors import read_metrics

    search = Path(fixed["folder"])
    folder = search / "trials" / name
    settings = trial_settings(fixed["base"], drawn)
    wanted = (search / _METRIC).read_text("utf-8")
    latest: dict[str, float] = {}
    rewards: deque[float] = deque(maxlen=MEAN_STEPS)

    def figures(metrics: Mapping[str, Any]) -> dict[str, float]:
        """Return the last value of each; not every step has them all."""
        latest.update({key: float(value) for key, value in metrics.items() if _is_number(value)})
        if "reward" in metrics:
            rewards.append(metrics["reward"])
        return latest | {MEAN_REWARD: sum(rewards) / max(len(rewards), 1)}

    def refuse(known: Iterable[str]) -> None:
        message = _no_metric(wanted, known)
        write_atomic(search / _REFUSED, message)
        raise ConfigError(message)

    def on_progress(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        now = figures(metrics)
        if wanted not in now and (step == steps or not wanted.startswith(_NOT_IN_EVERY_STEP)):
            refuse(now)
        report(now)

    lines = read_metrics(folder / "metrics.jsonl")
    for line in lines:
        figures(line)
    before = len(rewards), latest.get("step")
    train_any(settings, folder, on_progress=on_progress)
    if lines and (len(rewards), latest.get("step")) == before:
        report(figures({}))  # it was finished, but nobody had been told


def check(base: Mapping[str, Any], searched: Mapping[str, Draw], metric: str) -> None:
    """Say of a search what every one of its trials would say: each setting at its range's ends.

    Args:
        base: settings of every trial.
        searched: how the others are drawn.
        metric: the figure of merit.

    Raises:
        ConfigError: a setting does not exist or has a wrong value, or nothing is evaluated and the
            metric is of evaluations.
    """
    values = {key: _tried(draw) for key, draw in searched.items()}
    first = {key: tried[0] for key, tried in values.items()}
    for key in searched:
        for value in values[key]:
            try:
                settings = trial_settings(base, {**first, key: value})
            except ConfigError as error:
                raise ConfigError(f"--search {key}, with {value!r} of its range: {error}") from None
            if metric.startswith(_EVALUATED) and not settings.eval_episodes:
                raise ConfigError(
                    f"--metric {metric} is of evaluations, and `eval_episodes` is 0; set it too"
                )


def trial_settings(base: Mapping[str, Any], drawn: Mapping[str, Any]) -> Any:
    """Return ``base`` with drawn values in place, by dotted name, as its algorithm's settings.

    Raises:
        ConfigError: a setting does not exist or has a wrong value.
    """
    from pz_agents.training.modes import settings_of
    from pz_agents.training.settings import TrainSettings, algorithm_options

    values: dict[str, Any] = json.loads(json.dumps(base))
    for key, value in drawn.items():
        *parents, last = key.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"`{parent}` is a single value; it has no `{last}`")
        inner[last] = value
    settings = settings_of(values, "tune")
    if isinstance(settings, TrainSettings):
        algorithm_options(settings)
    return settings


def table(trials: Sequence[Trial], metric: str) -> str:
    """Return the trials as CSV: name, drawn settings, the figure of merit, steps, error."""
    keys = sorted({key for trial in trials for key in trial.drawn})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", *keys, metric, "steps", "error"])
    for trial in trials:
        values = [trial.drawn.get(key, "") for key in keys]
        figure, steps = trial.metrics.get(metric, ""), int(trial.metrics.get("step", 0))
        writer.writerow([trial.name, *values, figure, steps, trial.error or ""])
    return text.getvalue()


def _tried(draw: Draw) -> list[Any]:
    """Return values that stand for all: every one of a list, else the ends and one between."""
    if draw.kind in ("choice", "grid"):
        return list(draw.arguments)
    low, high = draw.arguments
    if "int" in draw.kind:
        return [low, high - 1]
    return [low, high, low + (high - low) * 0.381966]


def _no_metric(metric: str, known: Iterable[str]) -> str:
    names = sorted(known)
    return (
        f"--metric {metric}: these runs have no such figure.{did_you_mean(metric, names)} They "
        f"have: {', '.join(names)}. Give one of them; the same command goes on with the search"
    )


def _remember(path: Path, described: Mapping[str, Any]) -> None:
    """Write down what is searched, or compare it with what was."""
    now = json.loads(json.dumps(described))
    if path.exists():
        then = json.loads(path.read_text("utf-8"))
        for key in now:
            if then.get(key) != now[key]:
                raise ConfigError(
                    f"`{key}` of the search in {path.parent} was {then.get(key)} and is "
                    f"{now[key]} now; set it back, or search in another folder"
                )
        return
    write_atomic(path, json.dumps(now, indent=1))


def _figure(metrics: Mapping[str, float], metric: str, sign: float) -> float:
    value = metrics.get(metric, math.nan)
    return value if value == value else sign * math.inf


def _check(text: str, kind: str, arguments: Sequence[Any]) -> None:
    if kind in ("choice", "grid"):
        if not arguments:
            raise ConfigError(f"--search {text}: {kind} needs at least one value")
        return
    whole = kind in ("randint", "lograndint")
    fit = len(arguments) == 2 and all(
        isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        for value in arguments
    )
    if not fit or arguments[0] >= arguments[1] or ("log" in kind and arguments[0] <= 0):
        what = "two whole numbers" if whole else "two numbers"
        above = ", both above 0" if "log" in kind else ""
        raise ConfigError(f"--search {text}: {kind} takes {what}, LOW below HIGH{above}")


def _number(value: Any) -> Any:
    """Return a YAML value; 1e-6 is a number here, as it is for Python."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
