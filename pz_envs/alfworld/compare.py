"""The two engines side by side: one game, the same commands, every difference is an error.

Compared after every command: the text, the list of admissible commands in its order, and whether
the game is won. Commands mix the planner's, so that games are won and things are treated, with
random ones of every kind, and with some that the game does not know.
"""

from __future__ import annotations

import random

from pz_envs.alfworld.native import NOTHING, Household, Record, World
from pz_envs.workers import Worker

_ODD = ("look around", "Look", " look ", "examine fridge 99", "xyzzy", "go to", "help", "inventory")


def reference_engine(timeout_s: float = 300.0) -> Worker:
    """Return a child process with the reference engine's ``begin`` and ``play``."""
    return Worker("pz_envs.alfworld.reference:Engine", {}, timeout_s=timeout_s)


def compare(reference: Worker, record: Record, steps: int, seed: int) -> tuple[int, str | None]:
    """Play at most ``steps`` commands on both engines.

    Args:
        reference: a ``reference_engine()``.
        record: a game with the texts of its file (``household.with_original_texts``).
        steps: the game may be won earlier.
        seed: decides the commands.

    Returns:
        How many states were compared, and the first difference, or None.

    Raises:
        NotCoveredError: the native engine does not cover the file.
        EnvError: the reference engine failed.
        InfraError: its process died or took too long.
    """
    rng = random.Random(seed)
    household = Household(World(record.domain, record.problem, record.grammar))
    said: str | None = household.begin()
    theirs = reference.call("begin", record.domain, record.problem, record.grammar)
    command = "(start)"
    for step in range(steps + 1):
        ours = [said, list(household.admissible()), household.won]
        if ours != theirs:
            return step, f"step {step}, {command!r}:\n  native    {ours}\n  reference {theirs}"
        if household.won or step == steps:
            break
        command = _command(rng, household)
        said = household.play(command) or NOTHING
        theirs = reference.call("play", command)
    return step + 1, None


def _command(rng: random.Random, household: Household) -> str:
    draw = rng.random()
    if draw < 0.08:
        return rng.choice(_ODD)
    plan = household.plan() if draw < 0.5 else None
    if plan:
        return plan[0]
    kinds: dict[str, list[str]] = {}
    for command in household.admissible():
        kinds.setdefault(command.split()[0], []).append(command)
    return rng.choice(kinds[rng.choice(sorted(kinds))])
