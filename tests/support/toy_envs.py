"""Environments that a model of random weights can learn in seconds."""

from __future__ import annotations

from pz_envs.textenv import Outcome, TextEnv


class Bandit(TextEnv):
    """One pull: characters fall into four classes by their code, and class 2 pays."""

    family = "toy"

    def _start(self, seed, options):
        self._task_id, self._max_score = "bandit", 1.0
        return Outcome("Pull.", 0.0)

    def _advance(self, command):
        won = ord(command[0]) % 4 == 2
        return Outcome("Done.", float(won), float(won), terminated=True, success=won)


class Echo(TextEnv):
    """Three turns, each asking for a character whose code is even (A) or odd (B)."""

    family = "toy"

    def _start(self, seed, options):
        self._task_id, self._max_score = "echo", 3.0
        self._wanted = [(seed >> turn) % 2 for turn in range(3)]
        self._turn, self._right = 0, 0
        return Outcome("AB"[self._wanted[0]], 0.0)

    def _advance(self, command):
        right = ord(command[0]) % 2 == self._wanted[self._turn]
        self._right += right
        self._turn += 1
        over = self._turn == 3
        return Outcome(
            "." if over else "AB"[self._wanted[self._turn]],
            float(self._right),
            float(right),
            terminated=over,
            success=self._right == 3,
        )
