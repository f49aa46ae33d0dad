"""``unizero``: plays what a run learned, by search without noise.

It loads a run's folder, keeps each live episode's context in a slot of its own, and answers all
turns that it is given with one batched search.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from pz_agents.config import parse_settings
from pz_agents.errors import AgentError
from pz_agents.priorzero.actor import Actor
from pz_agents.priorzero.settings import UniZeroSettings
from pz_agents.sdk.types import Action, Episode, Trajectory, Turn
from pz_agents.training import checkpoint
from pz_agents.worldmodel.network import WorldModel
from pz_agents.worldmodel.texts import Texts
from pz_envs.errors import ConfigError, DataError
from pz_envs.seeding import generator


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
            raise ConfigError(f"unizero: slots must be at least 1; got {slots}")
        policy = _policy_folder(Path(folder))
        settings, weights, listed = _read(policy)
        if simulations is not None:
            search = {**settings.search.model_dump(), "simulations": simulations}
            values = {**settings.model_dump(), "search": search}
            settings = parse_settings(UniZeroSettings, values, "unizero")
        model = WorldModel(settings.network)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise DataError(f"{policy / 'model.pt'} is of another model: {error}") from None
        self._texts = Texts(settings.network.buckets)
        self._actor = Actor(
            model.eval(),
            self._texts,
            settings,
            slots=slots,
            explore=False,
            commands=[self._texts.intern(command) for command in listed],
        )
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
        positions = [
            self._actor.position(
                self._slot_of(turn.episode.key),
                turn.observation,
                turn.info,
                self._before.get(turn.episode.key),
            )
            for turn in turns
        ]
        streams = [generator(turn.seed, "search") for turn in turns]
        answers = []
        for turn, choice in zip(turns, self._actor.choose(positions, streams), strict=True):
            self._before[turn.episode.key] = choice.command
            notes: dict[str, Any] = {"value": choice.value, **choice.statistics}
            answers.append(Action(self._texts.string(choice.command), notes=notes))
        return answers

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


def _policy_folder(folder: Path) -> Path:
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


def _read(policy: Path) -> tuple[UniZeroSettings, dict[str, torch.Tensor], list[str]]:
    try:
        saved = json.loads((policy / "config.json").read_text("utf-8"))
        listed = json.loads((policy / "commands.json").read_text("utf-8"))
        weights = torch.load(policy / "model.pt", weights_only=True, map_location="cpu")
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise DataError(f"{policy} is no whole policy: {error}") from None
    settings = parse_settings(UniZeroSettings, {**saved, "preset": ""}, str(policy))
    return settings, weights, listed
