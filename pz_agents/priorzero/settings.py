"""What a UniZero or PriorZero run is told, and which settings may change when it is resumed.

The defaults are UniZero's for text games; PriorZero's are its paper's (``presets``). A run plays
one game or several; everything but the language model's part is common to both algorithms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import pydantic

from pz_agents.config import Settings, parse_settings
from pz_agents.models.protocol import LanguageModel
from pz_agents.priorzero import presets
from pz_agents.priorzero.language_settings import LanguageLearnerSettings
from pz_agents.priorzero.prior import LanguagePrior, LanguageSettings
from pz_agents.search.planner import SearchSettings
from pz_agents.search.priors import PriorSettings
from pz_agents.training.monitors import MonitorName
from pz_agents.worldmodel.learner import LearnerSettings
from pz_agents.worldmodel.network import NetworkSettings
from pz_agents.worldmodel.replay import ReplaySettings
from pz_envs.errors import ConfigError

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


class UniZeroSettings(Settings):
    """Everything a run depends on."""

    known: ClassVar[Mapping[str, presets.Preset]] = presets.UNIZERO
    foundation: ClassVar[presets.Preset] = {}
    free: ClassVar[frozenset[str]] = FREE_TO_CHANGE

    algorithm: Literal["unizero"] = "unizero"
    """This one."""

    preset: str = ""
    """Names of `presets`, with commas between, that supply the settings not given here."""

    env: str
    """A Gymnasium id of pz_envs whose episodes list their admissible commands."""

    envs: tuple[str, ...] = ()
    """Further games that the same models play and learn."""

    env_kwargs: Mapping[str, Any] = {}
    """Keyword arguments of the environments."""

    start_from: str = ""
    """The folder of another run, whose weights this one begins with; its game may be another."""

    seed: int = pydantic.Field(default=0, ge=0)
    """Decides weights, episodes, search and batches."""

    steps: int = pydantic.Field(ge=1)
    """Steps of the run; in each, episodes are collected and then learned from."""

    episodes_per_step: int = pydantic.Field(default=8, ge=1)
    """Episodes collected a step, of each game."""

    slots: int = pydantic.Field(default=8, ge=1)
    """Episodes of a game alive at once; their searches are one batch."""

    max_turns: int = pydantic.Field(default=50, ge=1)
    """Turns after which an episode is cut off."""

    replay_ratio: float = pydantic.Field(default=0.25, gt=0)
    """The world model's updates a collected turn."""

    wm_every: int = pydantic.Field(default=1, ge=1)
    """Steps between the world model's turns to learn; it then makes up for all of them."""

    off_policy: int = pydantic.Field(default=0, ge=0)
    """Batches by which collection leads training: what a step collects is learned from so many
    steps later. 0: at once."""

    temperature: float = pydantic.Field(default=0.25, ge=0)
    """While collecting, commands are drawn from visits^(1 / temperature)."""

    read_instruction: bool = False
    """Whether a state's text begins with the task's instruction; for families whose goal stands
    nowhere else."""

    text_encoder: str = ""
    """A frozen encoder of the Hugging Face kind that reads the states, by folder or hub id; empty:
    hashed n-grams, learned."""

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

    @property
    def games(self) -> tuple[str, ...]:
        """All games, each once."""
        return tuple(dict.fromkeys((self.env, *self.envs)))

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_from_presets(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        name = str(cls.model_fields["algorithm"].default)
        return presets.composed(cls.known, cls.foundation, values, name)


class GuidedSettings(UniZeroSettings):
    """UniZero's settings, a language model that guides the search, and when which half learns."""

    language: LanguageSettings | None = LanguageSettings()
    """The language model, and how it is asked; None: pure UniZero."""

    phase: Literal["parallel", "sequential", "alternating"] = "alternating"
    """``parallel``: both learn in a step, from what they were at its beginning; ``sequential``: the
    world model first, and the language model by what that has become; ``alternating``: the language
    model stays frozen for ``phase_updates`` updates of the world model, and then has a step to
    itself, in which nothing is collected."""

    phase_updates: int = pydantic.Field(default=2000, ge=1)
    """The world model's updates in a stretch of ``alternating``; whole steps."""

    wm_llm_ratio: float = pydantic.Field(default=0.5, gt=0, le=1)
    """The world model's share of all updates."""

    llm_every: int = pydantic.Field(default=1, ge=1)
    """As ``wm_every``, for the language model; not in ``alternating``."""

    @property
    def trains_language(self) -> bool:
        """Whether the language model learns at all."""
        return self.language is not None and self.wm_llm_ratio < 1

    @property
    def updates_per_rollout(self) -> int:
        """Updates that the language model takes at once; 0: as many as are due, at least one."""
        return 0

    def prior(self, model: LanguageModel) -> LanguagePrior:
        """Return what asks ``model`` for its opinion."""
        return LanguagePrior(model, self.language or LanguageSettings())

    @pydantic.model_validator(mode="after")
    def _check_frequencies(self) -> Self:
        if self.phase == "alternating" and self.llm_every != 1:
            raise ConfigError(
                f"llm_every={self.llm_every} has no meaning in phase `alternating`, where "
                "`phase_updates` says when the language model learns; leave it out, or take "
                "phase=parallel or sequential"
            )
        return self


class PriorZeroSettings(GuidedSettings):
    """A world model guided by a language model, which is trained on what the searches find."""

    known: ClassVar[Mapping[str, presets.Preset]] = presets.PRIORZERO
    foundation: ClassVar[presets.Preset] = presets.FOUNDATION

    algorithm: Literal["priorzero"] = "priorzero"  # type: ignore[assignment]
    """This one."""

    language_learner: LanguageLearnerSettings | None = LanguageLearnerSettings()
    """How it is trained; None: it stays as it is."""

    @property
    def trains_language(self) -> bool:
        """Whether the language model learns at all."""
        return super().trains_language and self.language_learner is not None


def check_resumable(saved: Mapping[str, Any], settings: UniZeroSettings, folder: str) -> None:
    """Compare the settings a run was started with to those it is to go on with; steps may grow.

    Raises:
        ConfigError: a setting that weights depend on has changed; the message names it.
    """
    kind = type(settings)
    if saved.get("algorithm") != settings.algorithm:
        raise ConfigError(
            f"`algorithm` was {saved.get('algorithm')!r} when the run in {folder} began and is "
            f"{settings.algorithm!r} now; set it back, or train into another folder."
        )
    known = {key: value for key, value in saved.items() if key in kind.model_fields}
    then = dict(_flat(parse_settings(kind, {**known, "preset": ""}, folder)))
    now = dict(_flat(settings))
    free = kind.free | ({"steps"} if settings.steps >= then["steps"] else frozenset())
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
