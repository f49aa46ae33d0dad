"""The ScienceWorld environment: one variation of a task an episode, in the original's words.

Observations, points and the end are the engine's own. What the original returns from every step and
few ask for (the room, the inventory, thousands of valid commands) is fetched on request only. The
seed picks the variation, and a variation always goes the same way: see ``simulator`` and ``jvm``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from pz_envs.errors import ConfigError, EnvError, InfraError
from pz_envs.scienceworld.simulator import Answer, Simulator, gold_actions
from pz_envs.scienceworld.tasks import Split, Task, episodes, simplification_text
from pz_envs.textenv import Outcome, ReplyFormat, TextEnv

MAX_LENGTH = 200
"""Longest command that reaches the engine; its own longest are about half of that."""

_REFUSALS = ("No known action matches that input.", "Unknown action.", "ERROR:")

_INSTRUCTION = """\
You are an agent in ScienceWorld, a simulated house for science experiments. Each turn you read \
what happened and reply with one command.
{description}
Forms of commands (OBJ stands for an object or a place that you have read of):
{actions}
When a command is ambiguous, the answer is a numbered list: reply with a number. To focus on the \
wrong thing loses the task.
Put the command into <action> tags, for example <action>open door to kitchen</action>."""


class ScienceWorldEnv(TextEnv):
    """A ScienceWorld task: boil, grow, measure, find, mix, cross.

    ``score`` is the engine's points over 100, and 0 where they are negative (a fatal mistake);
    ``reward`` is what this step changed in points, over 100; ``success`` is 100 points. The episode
    ends when the task is completed or lost. ``info["extra"]`` holds task, variation,
    simplifications, the engine's points and moves, and how many Java processes this environment
    has lost.

    Args:
        task: a task's name, such as ``"boil"`` (``tasks.TASKS``); None is all 30.
        split: ``"train"``, ``"dev"``, ``"test"`` (official), ``"all"``, or ``"fork_train"``,
            ``"fork_test"`` (R3L's). ``reset(options={"index": i})`` picks an episode by its place
            in the split, else the seed does.
        simplifications: ``"easy"``, or some of ``tasks.SIMPLIFICATIONS``.
        admissible_commands: list all valid commands in ``info``: thousands, at tens of
            milliseconds a step.
        heap_mb: Java's heap in MiB at most, which all environments of a process share; one takes
            about 13.
        timeout_s: seconds that the engine may take for one call; then its process is killed.
        reply_format: see ``TextEnv``.
        render_mode: see ``TextEnv``.

    Raises:
        ConfigError: an argument is out of range; in ``reset``, Java or a package is missing.
    """

    family: ClassVar[str] = "scienceworld"

    def __init__(
        self,
        task: str | None = None,
        *,
        split: Split = "train",
        simplifications: str | Sequence[str] = (),
        admissible_commands: bool = False,
        heap_mb: int = 1024,
        timeout_s: float = 60.0,
        reply_format: ReplyFormat = "auto",
        render_mode: str | None = None,
    ) -> None:
        super().__init__(reply_format=reply_format, render_mode=render_mode)
        if heap_mb < 64 or timeout_s <= 0:
            raise ConfigError(
                f"heap_mb={heap_mb}, timeout_s={timeout_s}: allowed are 64 MiB and more, and "
                "timeouts above 0"
            )
        self._episodes = episodes(task, split)
        self._simplifications = {
            entry.name: simplification_text(simplifications, entry)
            for entry in dict.fromkeys(entry for entry, _ in self._episodes)
        }
        self._lists = admissible_commands
        self._heap_mb = heap_mb
        self._timeout_s = timeout_s
        self._simulator: Simulator | None = None
        self._playing: tuple[Task, int] = self._episodes[0]
        self._history: list[str] = []
        self._points = 0
        self._restarts = 0

    def __len__(self) -> int:
        """Return how many episodes the split has."""
        return len(self._episodes)

    def expert_action(self) -> str | None:
        """Return the next command of the engine's own solution while the episode has followed it.

        None once the episode has left it. The first call for a variation lets the engine solve it,
        beside the running episode.
        """
        if self._outcome is None or self._outcome.terminated:
            return None
        task, variation = self._playing
        gold = gold_actions(task.name, variation, self._simplifications[task.name], self._heap_mb)
        done = len(self._history)
        return gold[done] if done < len(gold) and gold[:done] == tuple(self._history) else None

    def random_action(self, rng: np.random.Generator) -> str | None:
        """Return a random valid command."""
        if self._outcome is None or self._outcome.terminated:
            return None
        commands = self._outcome.admissible_commands or self._running().commands()
        return commands[int(rng.integers(len(commands)))]

    def close(self) -> None:
        """Free the house; Java ends soon after its last environment."""
        self._outcome = None
        if self._simulator is not None:
            self._simulator.close()
            self._simulator = None
        super().close()

    def _start(self, seed: int, options: Mapping[str, Any]) -> Outcome:
        index = options.get("index")
        if index is None:
            index = seed % len(self._episodes)
        if not isinstance(index, int) or not 0 <= index < len(self._episodes):
            raise ConfigError(f"index={index!r}: allowed are 0 to {len(self._episodes) - 1}")
        self._outcome = None
        if self._simulator is not None and self._simulator.lost:
            self._restarts += 1
            self.close()
        if self._simulator is None:
            self._simulator = Simulator(self._heap_mb, self._timeout_s)
        task, variation = self._playing = self._episodes[index]
        self._simulator.load(task.name, variation, self._simplifications[task.name])
        beginning = self._simulator.begin()
        self._history = []
        self._points = 0
        self._task_id = f"scienceworld/{task.name}/{variation}"
        self._max_score = 1.0
        self._instruction = _INSTRUCTION.format(
            description=beginning.description, actions="\n".join(beginning.actions)
        )
        return self._outcome_of(beginning.first)

    def _advance(self, command: str) -> Outcome:
        last = self._outcome
        assert last is not None
        command = " ".join(command.split())
        problem = _refused(command)
        if problem is not None:
            return self._unreadable(last, f"That is no command: {problem}.")
        try:
            answer = self._running().step(command)
            self._history.append(command)
            return self._outcome_of(answer)
        except (EnvError, InfraError):
            self._outcome = None  # the house is in no known state: only reset() can go on
            raise

    def _running(self) -> Simulator:
        if self._simulator is None:
            raise EnvError("no ScienceWorld episode has begun; call reset() first")
        return self._simulator

    def _outcome_of(self, answer: Answer) -> Outcome:
        task, variation = self._playing
        gain = answer.points - self._points
        self._points = answer.points
        over = answer.completed or answer.points < 0
        listed = self._lists and not over
        return Outcome(
            answer.text,
            score=max(answer.points, 0) / 100,
            reward=gain / 100,
            terminated=over,
            success=answer.points >= 100,
            valid=not answer.text.startswith(_REFUSALS),
            admissible_commands=self._running().commands() if listed else None,
            extra={
                "task": task.name,
                "variation": variation,
                "simplifications": self._simplifications[task.name],
                "points": answer.points,
                "moves": answer.moves,
                "engine_restarts": self._restarts,
            },
        )


def _refused(command: str) -> str | None:
    """Return why a command may not reach the engine, or None."""
    if len(command) > MAX_LENGTH:
        return f"it has {len(command)} characters, at most {MAX_LENGTH} are allowed"
    if not (command.isascii() and command.isprintable()):
        return "only printable ASCII characters on one line are allowed"
    return None
