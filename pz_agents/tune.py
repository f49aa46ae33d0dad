"""Search over the settings of a training run with Ray Tune.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pz_agents.training.settings import TrainSettings, resolved
from pz_envs.errors import ConfigError, did_you_mean
from pz_envs.files import write_atomic

__all__ = ["Draw", "Trial", "parse_draw", "run_trial", "table", "tune"]

TABLE = "trials.csv"
MEAN_STEPS = 20
"""Steps over which ``mean_reward``, the default figure of merit, is taken."""

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
    metric: str = "mean_reward",
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
        ConfigError: a setting does not exist, ray is not installed, or the search in ``folder``
            was another one.
    """
    from pz_agents.runtime.ray import search

    folder = folder.resolve()
    for key, draw in searched.items():
        # A wrong name or a value out of range is said here, not by every trial.
        for value in draw.arguments if draw.kind in ("choice", "grid") else draw.arguments[:1]:
            trial_settings(base, {key: value})
    described = {
        "base": dict(base),
        "search": {key: [draw.kind, list(draw.arguments)] for key, draw in searched.items()},
        "trials": trials,
        "seed": seed,
    }
    _remember(folder / "search.json", described)
    found = search(
        "pz_agents.tune:run_trial",
        {"base": dict(base), "folder": str(folder)},
        searched,
        folder / "ray",
        samples=trials,
        runtime=runtime,
        concurrent=concurrent,
        seed=seed,
    )
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
    from pz_agents.training.modes import train_both
    from pz_agents.training.monitors import read_metrics

    folder = Path(fixed["folder"]) / "trials" / name
    settings = trial_settings(fixed["base"], drawn)
    lines = read_metrics(folder / "metrics.jsonl")
    rewards = deque([line["reward"] for line in lines], MEAN_STEPS)

    def figures(metrics: Mapping[str, Any]) -> dict[str, float]:
        plain = {key: float(value) for key, value in metrics.items() if _is_number(value)}
        return plain | {"mean_reward": sum(rewards) / max(len(rewards), 1)}

    def on_progress(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        rewards.append(metrics["reward"])
        report(figures(metrics))

    train_both(settings, folder, on_progress=on_progress)
    if lines and lines[-1]["step"] >= settings.steps:
        report(figures(lines[-1]))  # it was finished, but nobody had been told


def trial_settings(base: Mapping[str, Any], drawn: Mapping[str, Any]) -> TrainSettings:
    """Return ``base`` with drawn values in place, by dotted name.

    Raises:
        ConfigError: a setting does not exist or has a wrong value.
    """
    from pz_agents.config import parse_settings

    values: dict[str, Any] = json.loads(json.dumps(base))
    for key, value in drawn.items():
        *parents, last = key.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    settings = parse_settings(TrainSettings, values, "tune")
    resolved(settings)
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
