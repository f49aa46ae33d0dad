"""One game of a run: its environments, its slots, and the commands offered below its roots.

Several games share models, texts and replay; each has an actor of its own, so that what is imagined
in one game offers no command of another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from pz_agents.priorzero.actor import Actor
from pz_agents.priorzero.collect import Played, Playground, Task
from pz_agents.priorzero.settings import UniZeroSettings
from pz_agents.worldmodel.texts import Texts
from pz_envs.catalog import find
from pz_envs.seeding import derive_seed

MakeActor = Callable[..., Actor]


class Game:
    """See the module.

    Args:
        env: its id.
        number: its place among the run's games.
        settings: of the run.
        texts: numbers the texts.
        make_actor: makes an actor of the keyword arguments ``explore``, ``commands``, ``prior`` and
            ``alone``.
        commands: the commands, by number, that may be offered from the beginning.

    Attributes:
        env: its full id.
        name: its short name, for metrics.
        actor: plays while collecting.
    """

    def __init__(
        self,
        env: str,
        number: int,
        settings: UniZeroSettings,
        texts: Texts,
        make_actor: MakeActor,
        commands: Sequence[int],
    ) -> None:
        row = find(env)
        self.env, self.name = row.id, row.id.rpartition("/")[2].partition("-v")[0]
        self.metric = row.metric
        self._number, self._settings, self._texts = number, settings, texts
        self._playgrounds: dict[str, Playground] = {}
        self.actor = make_actor(explore=True, commands=commands)

    @property
    def commands(self) -> tuple[int, ...]:
        """The commands that its searches know."""
        return self.actor.imagination.commands

    def close(self) -> None:
        """Close the environments."""
        for each in self._playgrounds.values():
            each.close()

    def collect(self, step: int) -> list[Played]:
        """Play the episodes of a step."""
        settings = self._settings
        first = self._number * settings.episodes_per_step
        tasks = [
            Task(
                f"step{step}/episode{number}",
                derive_seed(settings.seed, "collect", step, number) % 2**31,
            )
            for number in range(first, first + settings.episodes_per_step)
        ]
        return self._play(self.actor, "train", tasks)

    def evaluate(self, actor: Actor) -> list[Played]:
        """Play the held-out episodes, the same ones every time."""
        tasks = [
            Task(f"eval/{number}", derive_seed("eval", self.env, number) % 2**31)
            for number in range(self._settings.eval_episodes)
        ]
        return self._play(actor, "eval", tasks)

    def _play(
        self, actor: Actor, split: Literal["train", "eval"], tasks: Sequence[Task]
    ) -> list[Played]:
        from pz_envs.catalog import make_env

        settings = self._settings
        if split not in self._playgrounds:
            make = partial(make_env, split=split, admissible_commands=True, **settings.env_kwargs)
            slots = min(settings.slots, len(tasks))
            self._playgrounds[split] = Playground(self.env, make, slots=slots)
        return self._playgrounds[split].play(
            actor, self._texts, tasks, max_turns=settings.max_turns, seed=settings.seed
        )
