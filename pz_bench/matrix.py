"""From a matrix file to cells: algorithms x environments x models x seeds, row by row.

A matrix is a small YAML or TOML file. Each row multiplies its lists; what a row leaves out comes
from ``defaults``, then from the environment's catalogue row. Environment ids may be globs. Models
multiply only algorithms that play with one, and training settings reach only trained algorithms,
so a row may mix them. Built-in matrices are files in ``pz_bench/matrices``, chosen by name.
"""

from __future__ import annotations

import copy
import fnmatch
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic
import yaml

from pz_agents.config import Settings, parse_settings
from pz_bench.budget import Limits, Price
from pz_bench.cell import CellSpec, check_algorithm, is_trained, training_settings, uses_model
from pz_envs.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from pz_envs.catalog import EnvRow

BUILT_IN = Path(__file__).parent / "matrices"


class Budget(Settings):
    """What a row may set for its cells; what is left out is decided one level up."""

    episodes: int | None = pydantic.Field(default=None, ge=1)
    """Evaluation episodes a cell."""

    max_turns: int | None = pydantic.Field(default=None, ge=1)
    """Turns an episode may take; otherwise the environment's own."""

    max_tokens: int | None = pydantic.Field(default=None, ge=1)
    """Tokens a model may read and write in an episode."""

    max_seconds: float | None = pydantic.Field(default=None, gt=0)
    """Wall-clock seconds an episode may take."""

    max_invalid_streak: int | None = pydantic.Field(default=None, ge=1)
    """Refused actions in a row that end an episode."""

    max_repeats: int | None = pydantic.Field(default=None, ge=1)
    """Repetitions of one action in one situation that end an episode."""

    agent_kwargs: Mapping[str, Any] | None = None
    """Arguments for the agent's constructor."""

    env_kwargs: Mapping[str, Any] | None = None
    """Arguments for the environment."""

    train: Mapping[str, Any] | None = None
    """Training settings; only trained algorithms take them."""


class Row(Budget):
    """One product of lists."""

    algorithms: tuple[str, ...] = pydantic.Field(min_length=1)
    """Agents and training algorithms."""

    environments: tuple[str, ...] = pydantic.Field(min_length=1)
    """Environment ids, globs over them (`pz/Countdown*`) or whole families (`family:jericho`)."""

    models: tuple[str, ...] = ()
    """Language models, for the algorithms that need one."""

    seeds: tuple[int, ...] | None = None
    """Instead of the matrix's seeds."""


class Exclude(Settings):
    """Cells to leave out: those that every given glob matches."""

    algorithm: str = "*"
    """Glob over algorithms."""

    env: str = "*"
    """Glob over environment ids."""

    model: str = "*"
    """Glob over models; an agent without one is the empty string."""


class Adjust(Budget):
    """A budget for those cells that every given glob matches; it wins over the row's."""

    algorithm: str = "*"
    """Glob over algorithms."""

    env: str = "*"
    """Glob over environment ids."""

    model: str = "*"
    """Glob over models; an agent without one is the empty string."""

    seeds: tuple[int, ...] | None = None
    """Instead of the row's and the matrix's seeds."""


class Matrix(Settings):
    """A whole matrix file."""

    name: str
    """The suite's name: its leaderboard is written under it."""

    title: str = ""
    """A heading for people."""

    seeds: tuple[int, ...] = pydantic.Field(default=(0,), min_length=1)
    """The seeds every cell is measured with."""

    defaults: Budget = Budget()
    """For what a row leaves out."""

    rows: tuple[Row, ...] = pydantic.Field(min_length=1)
    """The products."""

    adjust: tuple[Adjust, ...] = ()
    """What some models, algorithms or environments change, in order; later ones win."""

    exclude: tuple[Exclude, ...] = ()
    """Cells to leave out."""

    limits: Limits = Limits()
    """What all cells may spend together; no cell is started that would go beyond it."""

    prices: Mapping[str, Price] = {}
    """Dollars for a million tokens, by glob over models."""


def matrix_names() -> tuple[str, ...]:
    """Return the names of the built-in matrices."""
    return tuple(sorted(path.stem for path in BUILT_IN.glob("*.yaml")))


def load_matrix(source: str, overrides: Sequence[str] = ()) -> Matrix:
    """Read a matrix by built-in name or file path, then apply ``--set`` overrides.

    Args:
        source: a name of ``matrix_names()`` or a ``.yaml``, ``.yml`` or ``.toml`` file.
        overrides: ``path=value`` texts, see ``apply_override``.

    Raises:
        ConfigError: no such matrix, not readable, or a key or value in it is wrong.
    """
    return parse_matrix(_read(_locate(source)), overrides, source)


def parse_matrix(values: Mapping[str, Any], overrides: Sequence[str], source: str) -> Matrix:
    """Apply ``--set`` overrides to what was read from ``source`` and check it.

    Raises:
        ConfigError: a key or value is wrong; unknown keys come with the nearest right one.
    """
    for override in overrides:
        values = apply_override(values, override)
    return parse_settings(Matrix, values, source)


def apply_override(values: Mapping[str, Any], override: str) -> dict[str, Any]:
    """Return ``values`` with one ``path=value`` set.

    A path that begins with a key of the matrix (``seeds``, ``defaults.episodes``,
    ``rows.0.models``) is set there; any other (``episodes``, ``train.steps``) is set in every row.
    The value is read as YAML.

    Raises:
        ConfigError: no ``=``, or the path leads nowhere.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: write it as path=value, e.g. --set episodes=8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML ({error})") from None
    result = copy.deepcopy(dict(values))
    if keys[0] in Matrix.model_fields:
        _put(result, keys, value, override)
        return result
    if keys[0] not in Row.model_fields:
        known = (*Matrix.model_fields, *Row.model_fields)
        hint = did_you_mean(keys[0], known)
        raise ConfigError(
            f"--set {override}: unknown key `{keys[0]}`.{hint} Known: {', '.join(known)}"
        )
    for row in result.get("rows", ()):
        _put(row, keys, value, override)
    return result


def expand(matrix: Matrix) -> list[CellSpec]:
    """Return the matrix's cells in reading order, each once.

    Raises:
        ConfigError: an algorithm, environment or model is wrong, or nothing is left.
    """
    cells: dict[str, CellSpec] = {}
    for number, row in enumerate(matrix.rows):
        for spec in _expand_row(matrix, row, f"{matrix.name}: rows.{number}"):
            place = (spec.algorithm, spec.env, spec.model or "")
            if not any(_covers(exclude, place) for exclude in matrix.exclude):
                cells.setdefault(spec.model_dump_json(), spec)
    if not cells:
        raise ConfigError(f"{matrix.name}: every cell is excluded; drop some of `exclude`")
    return list(cells.values())


def _expand_row(matrix: Matrix, row: Row, where: str) -> list[CellSpec]:
    environments = _environments(row.environments, where)
    specs = []
    for algorithm in map(_absolute, row.algorithms):
        check_algorithm(algorithm)
        trained = is_trained(algorithm)
        models = _models(algorithm, row.models, where)
        for env_id, env_turns in environments:
            for model in models:
                place = (algorithm, env_id, model or "")
                adjust = [each for each in matrix.adjust if _covers(each, place)]
                values = {"max_turns": env_turns} | _budget(matrix.defaults, row, *adjust)
                if not trained:
                    values.pop("train", None)
                values |= {"algorithm": algorithm, "env": env_id, "model": model}
                chosen = matrix.seeds if row.seeds is None else row.seeds
                for each in adjust:
                    chosen = chosen if each.seeds is None else each.seeds
                for seed in chosen:
                    spec = parse_settings(CellSpec, values | {"seed": seed}, where)
                    if trained:
                        training_settings(spec)
                    specs.append(spec)
    return specs


def _budget(*levels: Budget) -> dict[str, Any]:
    """Return the settings of all levels, later ones over earlier; mappings merge key by key."""
    merged: dict[str, Any] = {}
    for level in levels:
        for key in Budget.model_fields:
            above = getattr(level, key)
            if isinstance(above, Mapping):
                merged[key] = {**merged.get(key, {}), **above}
            elif above is not None:
                merged[key] = above
    return merged


def _environments(patterns: Sequence[str], where: str) -> list[tuple[str, int]]:
    """Return (id, the catalogue's turns) for every id that a pattern names, each once."""
    from pz_envs import catalog

    found: dict[str, int] = {}
    for pattern in patterns:
        if pattern.startswith("family:"):
            rows = _family(pattern.removeprefix("family:"), where)
        elif any(sign in pattern for sign in "*?["):
            rows = [row for row in catalog.rows() if fnmatch.fnmatchcase(row.id, pattern)]
            if not rows:
                raise ConfigError(f"{where}: no environment matches `{pattern}`; try pz-envs list")
        else:
            rows = [catalog.find(pattern)]
        found |= {row.id: row.max_turns for row in rows}
    return list(found.items())


def _family(name: str, where: str) -> list[EnvRow]:
    from pz_envs import catalog
    from pz_envs.families import FAMILIES

    if name not in FAMILIES:
        hint = did_you_mean(name, FAMILIES)
        raise ConfigError(f"{where}: no family `{name}`.{hint} Known: {', '.join(FAMILIES)}")
    return [row for row in catalog.rows() if row.family == name]


def _absolute(algorithm: str) -> str:
    """Return ``path/file.py:Name`` with a full path, so that a cell can be resumed anywhere."""
    location, colon, name = algorithm.rpartition(":")
    if not colon or not location.endswith(".py"):
        return algorithm
    return f"{Path(location).expanduser().resolve()}:{name}"


def _models(algorithm: str, models: Sequence[str], where: str) -> Sequence[str | None]:
    if not uses_model(algorithm):
        return (None,)
    if not models:
        raise ConfigError(
            f"{where}: `{algorithm}` needs a model; add e.g. models: [tiny] (or --model tiny)"
        )
    return models


def _covers(entry: Exclude | Adjust, place: tuple[str, str, str]) -> bool:
    """Return whether every glob of ``entry`` matches (algorithm, environment, model)."""
    globs = (entry.algorithm, entry.env, entry.model)
    return all(map(fnmatch.fnmatchcase, place, globs))


def _locate(source: str) -> Path:
    path = Path(source)
    if path.suffix in {".yaml", ".yml", ".toml"}:
        if path.is_file():
            return path
        raise ConfigError(
            f"No matrix file {path}. Built in: {', '.join(matrix_names())}, e.g. "
            "pz-bench plan --matrix core"
        )
    if source not in matrix_names():
        hint = did_you_mean(source, matrix_names())
        raise ConfigError(
            f"No matrix `{source}`.{hint} Built in: {', '.join(matrix_names())}; "
            "or give a .yaml or .toml file."
        )
    return BUILT_IN / f"{source}.yaml"


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a matrix is a mapping with `name` and `rows`")
    return {"name": path.stem} | values


def _put(values: Any, keys: Sequence[str], value: Any, override: str) -> None:
    """Set ``value`` in nested mappings and lists, making mappings on the way."""
    for key in keys[:-1]:
        if isinstance(values, list):
            values = values[_index(values, key, override)]
        elif isinstance(values, dict):
            values[key] = {} if values.get(key) is None else values[key]
            values = values[key]
    if isinstance(values, list):
        values[_index(values, keys[-1], override)] = value
    elif isinstance(values, dict):
        values[keys[-1]] = value
    else:
        raise ConfigError(f"--set {override}: `{'.'.join(keys[:-1])}` holds no keys")


def _index(values: Sequence[Any], key: str, override: str) -> int:
    if key.isdigit() and int(key) < len(values):
        return int(key)
    raise ConfigError(f"--set {override}: `{key}` is no index below {len(values)}")
