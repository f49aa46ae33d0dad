"""Playing an environment by hand in a terminal: ``pz-envs play ID``.

What is typed goes to the environment as it is, but for the words of ``HELP``, which start with a
slash. In a terminal there are colours, a history that is kept, and Tab completes an admissible
command; from a pipe or a file the same lines give the same play. A transcript is appended to and
flushed line by line, so that nothing is lost when the terminal closes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console

from pz_envs.datasets import cache_dir
from pz_envs.errors import ConfigError, EnvError, InfraError
from pz_envs.textenv import Info, TextEnv

if TYPE_CHECKING:
    from types import ModuleType

HELP = {
    "/commands": "list the admissible commands (in a terminal, Tab completes them)",
    "/hint": "show what the expert would do",
    "/undo": "go one step back",
    "/restart": "begin the episode again",
    "/help": "show this",
    "/quit": "leave",
}
"""The words that are not sent to the environment."""

_HISTORY_LINES = 2000


class Screen:
    """Where a play is shown: the terminal and, if there is one, the transcript."""

    def __init__(self, transcript: TextIO | None = None) -> None:
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._transcript = transcript

    def show(self, text: str, style: str = "") -> None:
        """Print a text; ``style`` is for the terminal only."""
        self._console.print(_printable(text), style=style or None)
        self.note(text)

    def note(self, text: str) -> None:
        """Write a line to the transcript alone."""
        if self._transcript is not None:
            self._transcript.write(f"{_printable(text)}\n")
            self._transcript.flush()


class Keyboard:
    """Where replies come from; ``candidates`` are what Tab completes."""

    def __init__(self, readline: ModuleType | None = None) -> None:
        self.candidates: Sequence[str] = ()
        self._terminal = sys.stdin.isatty()
        if readline is not None:
            readline.set_completer_delims("")  # a command has spaces
            readline.set_completer(self._complete)
            libedit = "libedit" in (readline.__doc__ or "")
            readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")

    def ask(self, screen: Screen) -> str | None:
        """Return the next line without blanks around it, or None at the end of the input."""
        try:
            line = input("> " if self._terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            screen.show("")
            return None
        if self._terminal:
            screen.note(f"> {line}")
        else:
            screen.show(f"> {line}")
        return line

    def _complete(self, text: str, state: int) -> str | None:
        lowered = text.lower()
        fitting = [word for word in self.candidates if word.lower().startswith(lowered)]
        return fitting[state] if state < len(fitting) else None


def play(env: TextEnv, *, seed: int, title: str, transcript: Path | None = None) -> None:
    """Play one episode with whoever is at standard input.

    Args:
        env: is played, not closed.
        seed: which episode.
        title: heads the transcript.
        transcript: a file to append to.

    Raises:
        ConfigError: the transcript cannot be written.
    """
    with _opened(transcript) as file, _readline() as readline:
        screen = Screen(file)
        screen.note(f"# {title}, seed {seed}\n")
        _Play(env, seed, screen, Keyboard(readline)).run()


class _Play:
    """One episode."""

    def __init__(self, env: TextEnv, seed: int, screen: Screen, keyboard: Keyboard) -> None:
        self._env = env
        self._seed = seed
        self._screen = screen
        self._keyboard = keyboard
        self._past: list[bytes] = []
        self._over = False
        self._info: Info = {}

    def run(self) -> None:
        self._restart()
        while (line := self._ask()) != "/quit" and line is not None:
            try:
                self._answer(line)
            except (EnvError, InfraError) as error:
                self._over = True
                self._screen.show(f"{error}\n/undo, /restart or /quit", "red")
        info = self._info
        self._screen.show(
            f"score {info['score']:g} of {info['max_score']:g} after {info['steps']} steps", "bold"
        )

    def _ask(self) -> str | None:
        self._keyboard.candidates = (*(self._info["admissible_commands"] or ()), *HELP)
        return self._keyboard.ask(self._screen)

    def _answer(self, line: str) -> None:
        if line == "/commands":
            commands = self._info["admissible_commands"]
            none = "No list of commands is known here."
            self._screen.show(none if commands is None else "\n".join(commands), "cyan")
        elif line == "/hint":
            hint = None if self._over else self._env.expert_action()
            self._screen.show("No hint." if hint is None else hint, "cyan")
        elif line == "/undo":
            self._undo()
        elif line == "/restart":
            self._restart()
        elif line == "/help":
            self._screen.show("\n".join(f"{word:<10} {what}" for word, what in HELP.items()))
        elif self._over:
            self._screen.show("The episode is over: /undo, /restart or /quit", "yellow")
        elif line:
            self._step(line)

    def _restart(self) -> None:
        observation, self._info = self._env.reset(seed=self._seed)
        self._past.clear()
        self._over = False
        self._screen.show(self._info["instruction"], "dim")
        self._screen.show(f"\n{observation}")

    def _undo(self) -> None:
        if not self._env.can_snapshot:
            self._screen.show("This environment cannot go back; /restart begins again.", "yellow")
        elif not self._past:
            self._screen.show("There is nothing to undo.", "yellow")
        else:
            observation, self._info = self._env.restore(self._past.pop())
            self._over = False
            self._screen.show(observation)

    def _step(self, line: str) -> None:
        before = self._env.snapshot() if self._env.can_snapshot else None
        observation, reward, self._over, _, self._info = self._env.step(line)
        if before is not None:
            self._past.append(before)
        info = self._info
        self._screen.show(observation, "" if info["valid"] else "yellow")
        if reward:
            said = f"[reward {reward:+g}; score {info['score']:g} of {info['max_score']:g}]"
            self._screen.show(said, "green" if reward > 0 else "red")
        if self._over:
            won = info["success"]
            self._screen.show("You won." if won else "It is over.", "bold green" if won else "bold")


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # bytes that are no text may have been typed


@contextmanager
def _opened(transcript: Path | None) -> Iterator[TextIO | None]:
    if transcript is None:
        yield None
        return
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(transcript, "a", encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"cannot write the transcript {transcript} ({error.strerror}); name a file in a "
                "folder that exists and can be written"
            ) from error
        yield file


@contextmanager
def _readline() -> Iterator[ModuleType | None]:
    """Yield ``readline`` with its history loaded where a person types, else None."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield None
        return
    try:
        import readline
    except ModuleNotFoundError:  # some builds of Python have none
        yield None
        return
    history = cache_dir() / "play_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield readline
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(history)
