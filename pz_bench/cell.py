"""One cell of the matrix: what is measured, under which name, and what came of it.

A cell is one (algorithm, environment, model, seed) with its budget. Its id is a hash of everything
that can change the number: the settings, the weights' and the data's identity, the package
versions and the source of an agent that comes from a file. Titles, job counts and folders are not
in it. Two machines that would measure the same number give the cell the same id.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pydantic

from pz_agents.config import Settings, parse_settings
from pz_agents.sdk.types import Ids, Trajectory
from pz_bench.data import data_identity, hash_of
from pz_bench.steps import to_records
from pz_envs.errors import ConfigError, DataError, did_you_mean
from pz_envs.files import sha256_file
from pz_envs.seeding import derive_seed

Status = Literal["done", "partial", "failed", "not_run"]
Identity = Mapping[str, Any]


class CellSpec(Settings):
    """What one cell measures; everything here can change the number."""

    algorithm: str
    """A built-in agent, an entry point, `package.module:Name`, `path/file.py:Name`, or the name of
    a training algorithm, which is trained first."""

    env: str
    """A Gymnasium id of pz_envs."""

    model: str | None = None
    """The language model; None for agents without one."""

    seed: int = pydantic.Field(default=0, ge=0)
    """Moves the agent's own randomness and the training; the instances are the same for all."""

    episodes: int = pydantic.Field(default=5, ge=1)
    """Evaluation episodes."""

    max_turns: int = pydantic.Field(default=100, ge=1)
    """Turns an episode may take."""

    max_tokens: int = pydantic.Field(default=100_000, ge=1)
    """Tokens a model may read and write in an episode."""

    max_seconds: float = pydantic.Field(default=600.0, gt=0)
    """Wall-clock seconds an episode may take."""

    max_invalid_streak: int = pydantic.Field(default=10, ge=1)
    """Refused actions in a row that end an episode."""

    max_repeats: int = pydantic.Field(default=20, ge=1)
    """Repetitions of one action in one situation that end an episode."""

    agent_kwargs: Mapping[str, Any] = {}
    """Arguments for the agent's constructor."""

    env_kwargs: Mapping[str, Any] = {}
    """Arguments for the environment, beside those of its catalogue row."""

    train: Mapping[str, Any] = {}
    """Training settings (`pz_agents.training.run.TrainSettings`) of a trained algorithm."""

    @property
    def id(self) -> str:
        """The cell's id on this machine, now; a stored cell keeps the id it was stored under."""
        return cell_id(identity(self))

    @property
    def player(self) -> str:
        """Who plays, as a table shows it: an agent from a file by file name, not by folder."""
        if self.algorithm.startswith("external:"):
            words = self.algorithm.removeprefix("external:").split(" ")
            names = (Path(word).name if Path(word).is_file() else word for word in words)
            return f"external:{' '.join(names)}"
        location, colon, name = self.algorithm.rpartition(":")
        is_file = colon and location.endswith(".py")
        return f"{Path(location).name}:{name}" if is_file else self.algorithm

    @property
    def title(self) -> str:
        """One line that names the cell to a person."""
        model = f" {self.model}" if self.model else ""
        return f"{self.player}{model} on {self.env}, seed {self.seed}"

    @property
    def slot(self) -> tuple[str, ...]:
        """The place in a table that this cell fills; a newer cell of the same slot replaces it."""
        kwargs = json.dumps([self.agent_kwargs, self.env_kwargs, self.train], sort_keys=True)
        return (self.player, self.model or "", self.env, str(self.seed), kwargs)


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """One evaluated episode, as a line of ``episodes.jsonl``.

    ``reward`` sums the step rewards; ``score`` is in the family's own units; ``seconds`` is wall
    clock. A failed episode (``status`` ``failed``) has score 0, success False and stays in every
    denominator. ``steps`` are JSON objects: observation, action, reward, score, valid,
    format_error, the number of sampled tokens, and where there are any: the admissible commands
    (packed, see ``pz_bench.steps``), the agent's notes, the sampled tokens as text (``pieces``)
    and their log-probs.
    """

    episode: int
    env_seed: int
    task_id: str
    success: bool
    score: float
    max_score: float
    score_norm: float
    reward: float
    turns: int
    invalid: int
    format_errors: int
    sampled_tokens: int
    prompt_tokens: int
    truncated: str
    terminated: bool
    status: str
    error: str | None
    seconds: float
    steps: tuple[dict[str, Any], ...] = ()
    final_observation: str = ""


@dataclass(frozen=True, slots=True)
class CellResult:
    """A cell and what is known of it.

    ``reason`` says why a cell failed or was not run, ``command`` what to type about it.
    ``episodes`` are in order of their number. ``id`` is the one the cell is stored under. ``data``
    has the hashes of the files that were played, by name; empty where the program makes the tasks.
    """

    spec: CellSpec
    status: Status
    reason: str | None = None
    command: str | None = None
    episodes: tuple[EpisodeRecord, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    train_metrics: Mapping[str, Any] | None = None
    id: str = ""
    data: Mapping[str, str] = field(default_factory=dict)


def env_seed(env_id: str, episode: int) -> int:
    """Return the seed of instance ``episode``, the same for every algorithm and cell seed."""
    return derive_seed("eval", env_id, episode) % 2**31


def record(
    episode: int, trajectory: Trajectory, decode: Callable[[Ids], str] | None = None
) -> EpisodeRecord:
    """Return what is kept of a finished episode; ``decode`` turns a token into text."""
    steps = to_records(trajectory.steps, decode)
    return EpisodeRecord(
        episode=episode,
        env_seed=trajectory.env_seed,
        task_id=trajectory.task_id,
        success=bool(trajectory.success),
        score=float(trajectory.score),
        max_score=float(trajectory.max_score),
        score_norm=float(trajectory.score_norm),
        reward=float(trajectory.reward),
        turns=len(steps),
        invalid=sum(not step.valid for step in trajectory.steps),
        format_errors=sum(step.format_error for step in trajectory.steps),
        sampled_tokens=trajectory.sampled_tokens,
        prompt_tokens=trajectory.prompt_tokens,
        truncated=trajectory.truncated,
        terminated=bool(trajectory.terminated),
        status=trajectory.status,
        error=trajectory.error,
        seconds=round(trajectory.seconds, 6),
        steps=steps,
        final_observation=trajectory.final_observation,
    )


def to_line(episode: EpisodeRecord) -> str:
    """Return the record as one line of JSON, newline included."""
    return canonical(asdict(episode)) + "\n"


def from_line(line: str | bytes) -> EpisodeRecord:
    """Read ``to_line`` back.

    Raises:
        DataError: the line is no complete record.
    """
    try:
        values = json.loads(line)
        known = {each.name for each in fields(EpisodeRecord)}
        if not isinstance(values, dict) or not set(values) <= known:
            raise ValueError("not an episode record")
        values["steps"] = tuple(values["steps"])
        return EpisodeRecord(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"broken episode line: {error}") from None


def canonical(value: Any) -> str:
    """Return the one JSON text of ``value``: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def cell_id(parts: Identity) -> str:
    """Return the id that ``identity``'s parts decide: 16 hex digits."""
    return hashlib.blake2b(canonical(parts).encode(), digest_size=8).hexdigest()


def identity(spec: CellSpec) -> dict[str, Any]:
    """Return everything that can change the cell's number, ready for ``cell_id``.

    Raises:
        ConfigError: the environment, the algorithm or the model does not exist.
    """
    settings = spec.model_dump(mode="json")
    settings["algorithm"] = spec.player
    if is_trained(spec.algorithm):
        from pz_agents.algorithms import load_trainer
        from pz_agents.training import settings as training_defaults

        free = (load_trainer(spec.algorithm) or training_defaults).FREE_TO_CHANGE
        training = training_settings(spec).model_dump(mode="json")
        settings["train"] = {k: v for k, v in training.items() if k not in free}
    return {
        "spec": settings,
        "model": None if spec.model is None else _model_identity(spec.model),
        "data": _data(spec),
        "agent": _source_hash(spec.algorithm),
        "versions": {
            **dict(_versions(spec.env, spec.model is not None, is_trained(spec.algorithm))),
            **_agent_version(spec.algorithm),
        },
    }


@functools.cache
def code_version() -> str:
    """Return the hash of the sources of our three packages as they lie here: 16 hex digits.

    It is recorded with a cell and is no part of its id: most changes of code change no number.
    """
    digest = hashlib.blake2b(digest_size=8)
    for package in ("pz_envs", "pz_agents", "pz_bench"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations if spec else None) or ():
            for path in sorted(Path(folder).rglob("*.py")):
                name = f"{package}/{path.relative_to(folder).as_posix()}"
                digest.update(f"{name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def is_trained(algorithm: str) -> bool:
    """Return whether ``algorithm`` is one that is trained before it is evaluated."""
    return algorithm in _trained_names()


def training_settings(spec: CellSpec) -> Any:
    """Return how a trained cell is trained: ``spec.train`` over what the cell itself decides.

    Raises:
        ConfigError: ``spec.train`` has an unknown or wrong setting, or one the cell decides.
    """
    from pz_agents.algorithms import load_trainer
    from pz_agents.training.settings import TrainSettings

    trainer = load_trainer(spec.algorithm)
    decided: dict[str, Any] = {"algorithm": spec.algorithm, "env": spec.env, "seed": spec.seed}
    if trainer is None:
        decided["model"] = spec.model
    for key in decided.keys() & spec.train.keys():
        raise ConfigError(f"{spec.title}: `train.{key}` is the cell's own; set it in the row")
    values = {"env_kwargs": spec.env_kwargs, **spec.train, **decided}
    return parse_settings(
        trainer.Settings if trainer else TrainSettings, values, f"{spec.title}: train"
    )


def uses_model(algorithm: str) -> bool:
    """Return whether ``algorithm`` plays with a language model."""
    from pz_agents.algorithms import TRAINERS
    from pz_agents.sdk.loading import needs_model

    return algorithm not in TRAINERS and (is_trained(algorithm) or needs_model(algorithm))


def check_algorithm(algorithm: str) -> None:
    """Raise ConfigError, with the nearest name, when ``algorithm`` is no agent and no trainer."""
    from pz_agents.sdk.loading import agent_names

    known = dict.fromkeys((*agent_names(), *_trained_names()))
    if ":" not in algorithm and algorithm not in known:
        hint = did_you_mean(algorithm, known)
        raise ConfigError(
            f"No algorithm `{algorithm}`.{hint} Known: {', '.join(known)}; or name your own as "
            "package.module:Name or path/file.py:Name."
        )


@functools.cache
def _trained_names() -> tuple[str, ...]:
    from pz_agents.algorithms import ALGORITHMS, TRAINERS

    return (*ALGORITHMS, *TRAINERS)


@functools.cache
def _model_identity(model: str) -> str:
    from pz_agents.models import model_identity

    return model_identity(model)


def _data(spec: CellSpec) -> dict[str, str]:
    """Return the hashes of the files that are played, and of others that training plays."""
    found = data_identity(spec.env, spec.env_kwargs)
    trained_on = data_identity(spec.env, spec.train.get("env_kwargs", spec.env_kwargs))
    other = {name: each for name, each in trained_on.items() if found.get(name) != each}
    return found | {f"train {name}": each for name, each in other.items()}


def _installed_agent(algorithm: str) -> importlib.metadata.EntryPoint | None:
    from pz_agents.sdk.loading import installed_agent

    return None if is_trained(algorithm) else installed_agent(algorithm)


def _agent_version(algorithm: str) -> dict[str, str]:
    """Return the version of the distribution that an installed agent comes in."""
    entry = _installed_agent(algorithm)
    return {} if entry is None or entry.dist is None else {entry.dist.name: entry.dist.version}


def _source_hash(algorithm: str) -> str | None:
    """Return the sha256 of the file an agent is defined in, None for a name of ours.

    Of an installed agent (an entry point), that of its module, of every file of it if it is a
    package. Of a program (``external:COMMAND``), that of the files its command names.
    """
    if algorithm.startswith("external:"):
        from pz_agents.sdk.external import command_files

        hashes = [sha256_file(path) for path in command_files(algorithm.removeprefix("external:"))]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()
    entry = _installed_agent(algorithm)
    location, colon, _ = (algorithm if entry is None else entry.value).rpartition(":")
    if not colon:
        return None
    path = Path(location)
    if path.suffix != ".py":
        try:
            found = importlib.util.find_spec(location)
        except ModuleNotFoundError:
            found = None
        if found is None or found.origin is None:
            raise ConfigError(f"No module `{location}` for the agent `{algorithm}`.")
        path = Path(found.origin)
        if entry is not None and found.submodule_search_locations:
            return hash_of(path.parent, "*.py")
    if not path.is_file():
        raise ConfigError(f"No file {path} for the agent `{algorithm}`.")
    return sha256_file(path)


@functools.cache
def _versions(env_id: str, with_model: bool, trained: bool) -> tuple[tuple[str, str], ...]:
    from pz_envs.catalog import extra_module, find

    packages = ["pz-envs", "pz-agents", "pz-bench"]
    engine = find(env_id).extra
    packages += [extra_module(engine)] if engine else []
    packages += ["torch", "transformers"] if with_model else []
    packages += ["trl"] if trained else []
    return tuple((name, _version(name)) for name in packages)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
