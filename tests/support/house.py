"""A house of four rooms that tests of search and learning play in."""

from __future__ import annotations

from pz_envs.errors import EnvError
from pz_envs.textenv import Outcome, TextEnv

ROOMS = ("cellar", "hall", "kitchen", "tower", "garden")
DOORS = ("red", "blue", "green", "white")


class House(TextEnv):
    """Four rooms to the garden; one of four doors leads on, the others shut for good.

    Played at random, an episode passes 1/3 of a room on average and reaches the garden once in 256.
    """

    family = "toy"
    right = (2, 0, 3, 1)

    def __init__(self, breaks=None, lists=True, doors=DOORS):
        """Take what may break, whether commands are listed, and the doors' colours."""
        super().__init__()
        self._breaks, self._lists, self._doors = breaks, lists, doors

    def _start(self, seed, options):
        self._task_id, self._max_score, self._room = "house", 4.0, 0
        return self._seen()

    def _advance(self, command):
        if self._breaks is not None and self._breaks():
            raise EnvError("the engine has gone")
        if command == f"open {self._doors[self.right[self._room]]} door":
            self._room += 1
            return self._seen(over=self._room == 4, reward=1.0)
        return self._seen(over=True)

    def _seen(self, over=False, reward=0.0):
        commands = tuple(f"open {colour} door" for colour in self._doors)
        return Outcome(
            f"You are in the {ROOMS[self._room]}.",
            float(self._room),
            reward,
            terminated=over,
            success=self._room == 4,
            admissible_commands=commands if self._lists else None,
        )
