"""An agent that is a program of its own: any language, any framework, one process an episode.

Named ``external:COMMAND``, e.g. ``external:python my_agent.py``. Each turn the program reads one
line of JSON on its standard input, ``{"observation", "info", "reward", "turn", "seed", "done"}``,
and answers with one line on its standard output, ``{"action": "go north"}``; other lines are taken
for its log. After the last turn comes a line with ``"done": true``, then the end of the input. It
asks its language model through ``OPENAI_BASE_URL`` with ``OPENAI_API_KEY`` (``OPENAI_MODEL`` is
the name): a recording proxy, so what it samples is kept with its tokens. A program that does not
answer in time is killed with all that it started, and its episode fails.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import os
import queue
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

from pz_agents.errors import AgentError
from pz_agents.models.protocol import LanguageModel
from pz_agents.sdk.proxy import Recording, RecordingProxy, recorded_action
from pz_agents.sdk.types import Action, Trajectory, Turn

PREFIX = "external:"

_LOG_TAIL = 600
_LINES_KEPT = 5

_logger = logging.getLogger(__name__)


def external(command: str) -> Callable[..., ExternalAgent]:
    """Return what makes the agent of ``command``, as ``load_agent`` calls it."""

    def make(
        model: LanguageModel, turn_seconds: float = 120.0, exit_seconds: float = 5.0
    ) -> ExternalAgent:
        return ExternalAgent(command, model, turn_seconds=turn_seconds, exit_seconds=exit_seconds)

    return make


def command_files(command: str) -> list[Path]:
    """Return the files that decide how the program of ``command`` plays, as far as it names them.

    The first word is taken for an interpreter, unless it stands alone.
    """
    words = _words(command)
    return [Path(word) for word in words[1:] or words if Path(word).is_file()]


class ExternalAgent:
    """Plays through a program; see the module.

    Args:
        command: its words, as in a shell but without one.
        model: what the proxy serves to it.
        turn_seconds: how long an answer may take, the first one's start of the program included.
        exit_seconds: how long the program may take to end after its episode.

    Raises:
        AgentError: there is no such program.
    """

    needs_admissible_commands: ClassVar[bool] = True

    def __init__(
        self,
        command: str,
        model: LanguageModel,
        *,
        turn_seconds: float = 120.0,
        exit_seconds: float = 5.0,
    ) -> None:
        self._words = _words(command)
        if shutil.which(self._words[0]) is None:
            raise AgentError(
                f"No program `{self._words[0]}` for the agent {PREFIX}{command}. Give one that is "
                "on PATH, or its path"
            )
        self._turn_seconds = turn_seconds
        self._exit_seconds = exit_seconds
        self._model_name = model.name
        self._programs: dict[str, _Program] = {}
        self._proxy = RecordingProxy(model)
        self._end = weakref.finalize(self, _close, self._proxy, self._programs)

    def act(self, turns: Sequence[Turn]) -> list[Action]:
        """Return each program's answer; all think at once.

        Raises:
            AgentError: a program ended, or did not answer in time. The others' answers are kept
                for when they are asked again.
        """
        for turn in turns:
            self._program(turn).tell(turn)
        deadline = time.monotonic() + self._turn_seconds
        failures: list[AgentError] = []
        actions: list[Action] = []
        for turn in turns:
            try:
                actions.append(self._program(turn).answer(turn, deadline))
            except AgentError as error:
                failures.append(error)
        if failures:
            raise failures[0]
        return actions

    def end(self, trajectory: Trajectory) -> None:
        """Tell the program how the episode ended, and end it."""
        program = self._programs.pop(trajectory.key, None)
        if program is not None:
            last = {
                "observation": trajectory.final_observation,
                "reward": trajectory.steps[-1].reward if trajectory.steps else 0.0,
                "score": trajectory.score,
                "success": trajectory.success,
                "done": True,
            }
            program.end(last, self._exit_seconds)

    def close(self) -> None:
        """Kill the programs that are left and stop the proxy."""
        self._end()

    def _program(self, turn: Turn) -> _Program:
        key = turn.episode.key
        if key not in self._programs:
            self._programs[key] = _Program(
                self._words, self._proxy.open(), self._model_name, self._turn_seconds
            )
        return self._programs[key]


class _Program:
    """One process, and the session of the proxy that belongs to it."""

    def __init__(
        self, words: Sequence[str], recording: Recording, model: str, seconds: float
    ) -> None:
        self._recording = recording
        self._seconds = seconds
        self._told = -1
        self._action: Action | None = None
        self._failed: AgentError | None = None
        self._ignored: collections.deque[str] = collections.deque(maxlen=_LINES_KEPT)
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed by end)
        variables = {
            "OPENAI_BASE_URL": recording.url,
            "OPENAI_API_KEY": recording.key,
            "OPENAI_MODEL": model,
        }
        try:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=os.environ | variables,
                start_new_session=True,
            )
        except OSError as error:
            raise AgentError(f"`{shlex.join(words)}` cannot be started: {error}") from error
        self._what = f"`{shlex.join(words)}`"
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()

    def tell(self, turn: Turn) -> None:
        """Send the turn, once however often it is asked."""
        if turn.index == self._told or self._failed is not None:
            return
        self._told, self._action = turn.index, None
        self._recording.begin(turn.seed)
        self._send(
            {
                "observation": turn.observation,
                "info": {name: _json(value) for name, value in turn.info.items()},
                "reward": turn.reward,
                "turn": turn.index,
                "seed": turn.seed,
                "done": False,
            }
        )

    def answer(self, turn: Turn, deadline: float) -> Action:
        """Wait for the answer to ``turn``, or return it again.

        Raises:
            AgentError: there is none; the program is gone then.
        """
        while self._action is None:
            if self._failed is not None:
                raise self._failed
            try:
                line = self._lines.get(timeout=max(deadline - time.monotonic(), 0.001))
            except queue.Empty:
                self._fail(f"did not answer turn {turn.index} within {self._seconds:g} s")
                continue
            if line is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=5)
                self._fail(f"ended in turn {turn.index} (exit code {self._process.poll()})")
                continue
            text = _action_in(line)
            if text is None:
                self._ignored.append(line.strip()[:200])
            else:
                self._action = recorded_action(text, self._recording.take())
        return self._action

    def end(self, last: Any, seconds: float) -> None:
        """Say good-bye, wait a moment, and kill what is still there."""
        self._recording.close()
        if self._failed is None:
            self._send(last)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=0 if self._failed is not None else seconds)
        self.kill()
        self._log.close()

    def kill(self) -> None:
        """End the program and everything that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the end of its output tells of its end
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _listen(self, stream: IO[bytes]) -> None:
        for line in stream:
            self._lines.put(line.decode("utf-8", "replace"))
        self._lines.put(None)

    def _fail(self, what: str) -> None:
        self.kill()
        self._recording.close()
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _LOG_TAIL))
        log = self._log.read().decode("utf-8", "replace").strip()
        said = " | ".join(self._ignored)
        self._failed = AgentError(
            f'{self._what} {what}; it must write {{"action": "..."}} on one line.'
            + (f" It wrote: {said}." if said else "")
            + (f" Its errors end: {log}" if log else "")
        )


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise AgentError(f"`{PREFIX}{command}` cannot be read: {error}") from error
    if not words:
        raise AgentError(f"`{PREFIX}` names no program. Write {PREFIX}python my_agent.py")
    return words


def _action_in(line: str) -> str | None:
    """Return the action that ``line`` says, or None for any other line."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    action = message.get("action") if isinstance(message, dict) else None
    return action if isinstance(action, str) else None


def _json(value: Any) -> Any:
    """Return ``value``, or what it reads like where JSON cannot say it."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return str(value)
    return value


def _close(proxy: RecordingProxy, programs: dict[str, _Program]) -> None:
    for program in programs.values():
        program.kill()
    programs.clear()
    proxy.close()
