"""What a UniZero run is told, its presets, and which settings may change when it is resumed.

The defaults are UniZero's for text games; ``quick`` is a small network that learns a small game on
one CPU core within minutes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import pydantic

from pz_agents.config import Settings, parse_settings
from pz_agents.search.planner import SearchSettings
from pz_agents.search.priors import PriorSettings
from pz_agents.training.monitors import MonitorName
from pz_agents.worldmodel.learner import LearnerSettings
from pz_agents.worldmodel.network import NetworkSettings
from pz_agents.worldmodel.replay import ReplaySettings
from pz_envs.errors import ConfigError, did_you_mean

FREE_TO_CHANGE = frozenset(
    {
        "preset",
        "save_every",
        "keep_checkpoints",
        "eval_every",
        "eval_episodes",
        "monitor",
        "threads",
    }
)
"""Settings that a resumed run may change, because no weight depends on them."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "standard": {},
    "quick": {
        "steps": 30,
        "max_turns": 30,
        "network": {"embed": 96, "heads": 4, "buckets": 4096, "dropout": 0.0},
        "learner": {"learning_rate": 1e-3, "batch_windows": 32},
        "search": {"simulations": 16},
    },
}
"""Settings by name; what a user gives goes over them."""


class UniZeroSettings(Settings):
    """Everything a run depends on."""

    algorithm: Literal["unizero"] = "unizero"
    """This one."""

    preset: str = ""
    """A name in `PRESETS` that supplies the settings not given here."""

    env: str
    """A Gymnasium id of pz_envs whose episodes list their admissible commands."""

    env_kwargs: Mapping[str, Any] = {}
    """Keyword arguments of the environment."""

    seed: int = pydantic.Field(default=0, ge=0)
    """Decides weights, episodes, search and batches."""

    steps: int = pydantic.Field(ge=1)
    """Steps of the run; in each, episodes are collected and then learned from."""

    episodes_per_step: int = pydantic.Field(default=8, ge=1)
    """Episodes collected a step."""

    slots: int = pydantic.Field(default=8, ge=1)
    """Episodes alive at once; their searches are one batch."""

    max_turns: int = pydantic.Field(default=50, ge=1)
    """Turns after which an episode is cut off."""

    replay_ratio: float = pydantic.Field(default=0.25, gt=0)
    """Updates a collected turn."""

    temperature: float = pydantic.Field(default=0.25, ge=0)
    """While collecting, commands are drawn from visits^(1 / temperature)."""

    read_instruction: bool = False
    """Whether a state's text begins with the task's instruction; for families whose goal stands
    nowhere else."""

    network: NetworkSettings = NetworkSettings()
    """The world model's sizes."""

    learner: LearnerSettings = LearnerSettings()
    """Its updates and losses."""

    replay: ReplaySettings = ReplaySettings()
    """What is remembered and how it is drawn."""

    search: SearchSettings = SearchSettings()
    """The tree search."""

    branching: int = pydantic.Field(default=20, ge=1)
    """Commands offered below the root, where the admissible ones are unknown."""

    root: PriorSettings = PriorSettings()
    """Noise at the root while collecting."""

    eval_every: int = pydantic.Field(default=10, ge=1)
    """Steps between evaluations; the last step is always evaluated."""

    eval_episodes: int = pydantic.Field(default=4, ge=0)
    """Held-out episodes of an evaluation, without noise, playing the most visited command."""

    save_every: int = pydantic.Field(default=10, ge=1)
    """Steps between checkpoints; the last step is always saved."""

    keep_checkpoints: int = pydantic.Field(default=2, ge=1)
    """Newest checkpoints to keep; the best evaluated one is kept beside them."""

    monitor: MonitorName = "none"
    """Where figures go beside `metrics.jsonl`."""

    threads: int = pydantic.Field(default=1, ge=1)
    """Torch's CPU threads."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, Mapping) else None
        if not name:
            return values
        if name not in PRESETS:
            raise ConfigError(
                f"No preset `{name}` of unizero.{did_you_mean(str(name), PRESETS)} "
                f"Known: {', '.join(PRESETS)}"
            )
        return _over(PRESETS[name], values)


def check_resumable(saved: Mapping[str, Any], settings: UniZeroSettings, folder: str) -> None:
    """Compare the settings a run was started with to those it is to go on with; steps may grow.

    Raises:
        ConfigError: a setting that weights depend on has changed; the message names it.
    """
    known = {key: value for key, value in saved.items() if key in UniZeroSettings.model_fields}
    then = dict(_flat(parse_settings(UniZeroSettings, {**known, "preset": ""}, folder)))
    now = dict(_flat(settings))
    free = FREE_TO_CHANGE | ({"steps"} if settings.steps >= then["steps"] else frozenset())
    for path in sorted(then.keys() | now.keys()):
        old, new = then.get(path), now.get(path)
        if old != new and path.partition(".")[0] not in free:
            raise ConfigError(
                f"`{path}` was {old!r} when the run in {folder} began and is {new!r} now; set it "
                "back, or train into another folder."
            )


def _flat(settings: Settings) -> Iterator[tuple[str, Any]]:
    def walk(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return walk(settings.model_dump(mode="json"), "")


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``below`` with ``above`` laid over it, mappings merged."""
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping):
            merged[key] = _over(below[key], above[key])
    return merged
