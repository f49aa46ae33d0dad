"""``unizero`` and ``priorzero``: play what a run learned, without noise.

They load a run's folder, keep each live episode's context in a slot of its own, and answer all
turns of a game that they are given with one batched search. A game that the run never saw is
played too: transfer to it is what can be measured so.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch

from pz_agents.algorithms import load_trainer
from pz_agents.config import parse_settings
from pz_agents.errors import AgentError
from pz_agents.models import load_model
from pz_agents.priorzero.actor import Actor, Mode
from pz_agents.priorzero.encoder import FrozenEncoder
from pz_agents.priorzero.guidance import trained_model
from pz_agents.priorzero.prior import LanguagePrior
from pz_agents.priorzero.settings import GuidedSettings, UniZeroSettings
from pz_agents.sdk.types import Action, Episode, Trajectory, Turn
from pz_agents.search.priors import root_notes
from pz_agents.training import checkpoint
from pz_agents.worldmodel.network import WorldModel
from pz_agents.worldmodel.texts import Texts
from pz_envs.errors import ConfigError, DataError
from pz_envs.seeding import generator


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """What a policy's folder holds: settings, and the commands of each game that was played."""

    folder: Path
    settings: UniZeroSettings
    commands: Mapping[str, Sequence[str]]


class UniZeroAgent:
    """Plays the most visited command of each search.

    Args:
        folder: of a run, finished or not, or of its policy.
        simulations: of each search; None: as many as in training.
        slots: most episodes alive at once.

    Raises:
        ConfigError: there is nothing trained in ``folder``, or an argument is out of range.
        DataError: what is there cannot be read.
    """

    needs_admissible_commands: ClassVar[bool] = True

    def __init__(self, *, folder: str, simulations: int | None = None, slots: int = 64) -> None:
        if slots < 1:
            raise ConfigError(f"slots must be at least 1; got {slots}")
        policy = read_policy(policy_folder(Path(folder)))
        settings = policy.settings
        if simulations is not None:
            search = {**settings.search.model_dump(), "simulations": simulations}
            values = {**settings.model_dump(), "search": search, "preset": ""}
            settings = parse_settings(type(settings), values, "simulations")
        self._policy = Policy(policy.folder, settings, policy.commands)
        self._model, self._texts = world_model(settings)
        load_weights(self._model, policy.folder)
        self._model.eval()
        self._actors: dict[str, Actor] = {}
        self._prior: LanguagePrior | None = None
        self._alone = False
        self._most = slots
        self._free = list(reversed(range(slots)))
        self._slots: dict[str, int] = {}
        self._before: dict[str, int] = {}

    def start(self, episodes: Sequence[Episode]) -> None:
        """Give each episode a slot.

        Raises:
            AgentError: more episodes are alive than there are slots.
        """
        for episode in episodes:
            self._slot_of(episode.key)

    def act(self, turns: Sequence[Turn]) -> list[Action]:
        """Return the searched command of each turn.

        Raises:
            AgentError: an environment does not list its commands, or there is no slot left.
        """
        answers: dict[str, Action] = {}
        for env in dict.fromkeys(turn.episode.env_id for turn in turns):
            actor = self._actor_of(env)
            mine = [turn for turn in turns if turn.episode.env_id == env]
            positions = [
                actor.position(
                    self._slot_of(turn.episode.key),
                    turn.observation,
                    turn.info,
                    self._before.get(turn.episode.key),
                )
                for turn in mine
            ]
            streams = [generator(turn.seed, "search") for turn in mine]
            choices = actor.choose(positions, streams)
            for turn, position, choice in zip(mine, positions, choices, strict=True):
                self._before[turn.episode.key] = choice.command
                commands = [self._texts.string(each) for each in position.commands]
                notes: dict[str, Any] = {"value": choice.value, **choice.statistics}
                if len(choice.visits):
                    notes |= root_notes(commands, choice.visits, choice.prior)
                answers[turn.episode.key] = Action(commands[choice.place], notes=notes)
        return [answers[turn.episode.key] for turn in turns]

    def end(self, trajectory: Trajectory) -> None:
        """Free the episode's slot."""
        self._before.pop(trajectory.key, None)
        slot = self._slots.pop(trajectory.key, None)
        if slot is not None:
            self._free.append(slot)

    def _slot_of(self, key: str) -> int:
        if key not in self._slots:
            if not self._free:
                raise AgentError(
                    f"unizero has {len(self._slots)} slots and all are taken; give it more with "
                    "the argument `slots`, or play fewer episodes at once"
                )
            self._slots[key] = self._free.pop()
        return self._slots[key]

    def _actor_of(self, env: str) -> Actor:
        """Return who plays a game; a game that was not trained on has no commands yet."""
        if env not in self._actors:
            listed = map(self._texts.intern, self._policy.commands.get(env, ()))
            self._actors[env] = Actor(
                self._model,
                self._texts,
                self._policy.settings,
                slots=self._most,
                explore=False,
                commands=list(listed),
                prior=self._prior,
                alone=self._alone,
            )
        return self._actors[env]


class PriorZeroAgent(UniZeroAgent):
    """Plays by the world model, by the language model, or by both.

    Args:
        folder: of a run, finished or not, or of its policy.
        mode: ``both``: the search with the language model's prior; ``wm``: the search alone;
            ``llm``: the command that the language model scores highest.
        simulations: of each search; None: as many as in training.
        slots: most episodes alive at once.

    Raises:
        ConfigError: there is nothing trained in ``folder``, an argument is not one of those, or the
            run has no language model.
        DataError: what is there cannot be read.
    """

    def __init__(
        self,
        *,
        folder: str,
        mode: str = "both",
        simulations: int | None = None,
        slots: int = 64,
    ) -> None:
        super().__init__(folder=folder, simulations=simulations, slots=slots)
        if mode not in get_args(Mode):
            raise ConfigError(f"priorzero: mode is {', '.join(get_args(Mode))}; got `{mode}`")
        settings = self._policy.settings
        if not isinstance(settings, GuidedSettings) or settings.language is None:
            if mode == "llm":
                raise ConfigError(f"the run in {folder} has no language model; take mode=wm")
            return
        if mode == "wm" or (mode == "both" and settings.root.mode == "off"):
            return
        trained = trained_model(self._policy.folder)
        model = load_model(str(trained or settings.language.model))
        self._prior = settings.prior(model)
        self._alone = mode == "llm"


def world_model(settings: UniZeroSettings) -> tuple[WorldModel, Texts]:
    """Return a fresh world model and what numbers the texts that it reads."""
    network, encode = settings.network, None
    if settings.text_encoder:
        encode = FrozenEncoder(settings.text_encoder)
        network = network.model_copy(update={"text_width": encode.width})
    return WorldModel(network), Texts(network.buckets, encode)


def load_weights(model: WorldModel, policy: Path) -> None:
    """Read a policy's weights into a model of the same sizes.

    Raises:
        DataError: they cannot be read, or are of another model.
    """
    path = policy / "model.pt"
    try:
        model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise DataError(f"{path} is no whole model, or of another size: {error}") from None


def policy_folder(folder: Path) -> Path:
    """Return the policy of a run, finished or not, or of a policy's own folder.

    Raises:
        ConfigError: there is none.
    """
    for policy in (folder, folder / "policy"):
        if (policy / "model.pt").is_file():
            return policy
    newest = checkpoint.newest(folder / "checkpoints")
    if newest is None:
        raise ConfigError(
            f"nothing trained in {folder}: it has no policy/model.pt and no checkpoint. Train "
            "with: pz-agents train --algorithm unizero --env ID --out FOLDER"
        )
    return newest / "policy"


def read_policy(folder: Path) -> Policy:
    """Return a policy's settings and commands.

    Raises:
        DataError: they cannot be read.
    """
    try:
        saved = json.loads((folder / "config.json").read_text("utf-8"))
        listed = json.loads((folder / "commands.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is no whole policy: {error}") from None
    trainer = load_trainer(saved.get("algorithm", ""))
    kind = trainer.Settings if trainer else UniZeroSettings
    return Policy(folder, parse_settings(kind, {**saved, "preset": ""}, str(folder)), listed)
