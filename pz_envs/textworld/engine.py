"""One TextWorld game in one interpreter: start, step, save, load, and the expert's next command.

``Engine`` runs the story file in jericho's Frotz and speaks only numbers, strings, bytes and lists
of them, so the same object serves in process and inside a worker. It asks the game itself for the
score (``tw-extra-infos``), and for its actions only when admissible commands are wanted. Every
command passes Jericho's input rules and may not use TextWorld's own framework commands. What
TextWorld adds for machines, the title picture, the prompt, the status line and the question after
the end are taken out of the text; runs of empty lines become one.
"""

from __future__ import annotations

import functools
import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pz_envs.errors import DataError, EnvError, require
from pz_envs.jericho.commands import refusal, refused_verbs, tidy
from pz_envs.textworld.games import Story, read_story
from pz_envs.textworld.tracking import EVENT, Tracker

_SEED = 1234  # of the interpreter; TextWorld's games draw no random numbers
_ANY_FILE = __file__.encode()
"""What Frotz is told to open: it wants a file, but reads the bytes that it is given; of a name that
begins with `tw-` it would think something of its own."""

_REFUSED = refused_verbs("", length=9)
_FRAMEWORK = re.compile(r"(?i)\btw-|\brestrict\b")
_LONGEST_READ = 10_000
_KEPT = 16
_SNAPSHOT = struct.Struct("<IIII")

_SCORE = re.compile(r"<score>\n\s*(-?\d+)\s*</score>")
_INFOS = re.compile(r"<(score|moves)>\n[^<]*</\1>")
_FINAL = re.compile(r"You scored (-?\d+) out of")
_PICTURE = re.compile(r"\A(?:[ |\\/_$<>]*\n)+")
_PROMPT = re.compile(r"\n>[^\n]*\Z")
_QUESTION = re.compile(r"\s+Would you like to RESTART,[^\n]*\Z")
_CENTRED = re.compile(r"^ +(?=\*\*\* )", re.M)
_GAP = re.compile(r"\n{3,}")
_WON, _LOST = "*** The End ***", "*** You lost! ***"


class Report(NamedTuple):
    """What a start, a command or a load led to.

    ``accepted`` is False when the input rules refused the command or the game took no turn for it.
    ``expert`` is the walkthrough's next command while the episode follows it. ``commands`` is None
    unless the engine was asked to list them.
    """

    text: str
    score: int
    over: bool
    won: bool
    accepted: bool
    expert: str | None
    commands: tuple[str, ...] | None


class Beginning(NamedTuple):
    """The first report, with what holds for the whole game."""

    report: Report
    max_score: int
    objective: str


@dataclass(slots=True)
class _Game:
    story: Story
    walkthrough: tuple[str, ...]
    tracker: Tracker | None


class Engine:
    """The game that was started last.

    Args:
        commands: list the admissible commands in every report.

    Raises:
        ConfigError: jericho is not installed.
    """

    def __init__(self, *, commands: bool) -> None:
        jericho = require("jericho", "pz-envs[textworld]")
        self._listing = commands
        # The constructor would look the file up and warn that jericho cannot see its score.
        self._frotz = jericho.FrotzEnv.__new__(jericho.FrotzEnv)
        self._frotz.frotz_lib = self._lib = jericho.jericho._load_frotz_lib()
        self._frotz.is_fully_supported = False
        self._open = functools.lru_cache(_KEPT)(self._read)
        self._game: _Game | None = None
        self._score = 0
        self._over = self._won = False
        self._followed: int | None = None

    def start(self, path: str) -> Beginning:
        """Begin the game of a file.

        Raises:
            DataError: the file is missing, damaged, not one of TextWorld's, or without the
                description that the list of commands needs.
        """
        text = self._load_game(path)
        if _SCORE.search(self._send("tw-extra-infos score")) is None:
            raise DataError(
                f"{path} is no game of TextWorld (it does not know `tw-extra-infos`). "
                "Games of other makers that pz plays: pz-envs list jericho"
            )
        most = self._send("tw-print max_score").strip().split("\n")[0]
        if not most.isdecimal() or int(most) == 0:
            raise DataError(
                f"{path} says that its maximum score is {most!r:.40}; needed is 1 or more"
            )
        game = self._playing()
        if game.tracker is not None:
            self._send("tw-trace-actions")
            game.tracker.reset()
        self._score = 0
        self._over = self._won = False
        self._followed = 0
        description = game.story.description or {}
        objective = str(description.get("objective") or "")
        return Beginning(self._report(_clean(text), accepted=True), int(most), objective)

    def step(self, text: str) -> Report:
        """Apply one command; any text is survived.

        Raises:
            EnvError: the game is over or not begun.
        """
        game = self._playing()
        if self._over:
            raise EnvError("the game is over; call start() before step()")
        command = tidy(text[:_LONGEST_READ])
        problem = refusal(command, _REFUSED)
        if problem is None and _FRAMEWORK.search(command):
            problem = "Commands of TextWorld's own framework are not allowed here."
        if problem is not None:
            return self._report(problem, accepted=False)
        if self._followed is not None:
            follows = command.lower() == (self._expert() or "").lower()
            self._followed = self._followed + 1 if follows else None
        raw = self._send(command)
        self._won = _WON in raw
        self._over = self._won or _LOST in raw
        scores = _SCORE.findall(raw) or (_FINAL.findall(raw) if self._over else ())
        if scores:
            self._score = int(scores[-1])
        if game.tracker is not None:
            game.tracker.follow(raw)
            raw = EVENT.sub("", raw)
        return self._report(_clean(raw), accepted=bool(scores) or self._over)

    def save(self) -> bytes:
        """Return the whole state: memory, stack, registers and bookkeeping."""
        game = self._playing()
        ram, stack, pc, sp, fp, frames, opcode, rng, narrative = self._frotz.get_state()
        registers = [int(value) for value in (pc, sp, fp, frames, opcode, *rng)]
        own = [self._score, self._over, self._won, self._followed]
        facts = None if game.tracker is None else game.tracker.save()
        header = json.dumps([game.story.digest, registers, own, facts]).encode()
        parts = (header, ram.tobytes(), stack.tobytes(), narrative or b"")
        return _SNAPSHOT.pack(*map(len, parts)) + b"".join(parts)

    def load(self, path: str, state: bytes) -> Report:
        """Go to a saved state of the game of a file; the report's text is empty.

        Raises:
            EnvError: the state is of another story file, or no state at all.
            DataError: see ``start``.
        """
        import numpy

        sizes = _SNAPSHOT.unpack_from(state) if len(state) >= _SNAPSHOT.size else (0, 0, 0, 0)
        if not sizes[0] or sum(sizes) + _SNAPSHOT.size != len(state):
            raise EnvError(f"{len(state)} bytes that no TextWorld engine saved cannot be loaded")
        parts, start = [], _SNAPSHOT.size
        for size in sizes:
            parts.append(state[start : start + size])
            start += size
        digest, registers, own, facts = json.loads(parts[0])
        game = self._open(path)
        if digest != game.story.digest:
            raise EnvError(
                f"this state is of a game with digest {digest}, not of {path} "
                f"({game.story.digest}); restore it in an environment made with the same options"
            )
        if game.tracker is not None and facts is None:
            raise EnvError(
                "this state was saved without admissible commands, which this environment "
                "lists; restore it in one with admissible_commands=False"
            )
        if self._game is not game:
            self._load_game(path)
        if sizes[1:3] != (self._lib.getRAMSize(), self._lib.getStackSize()):
            raise EnvError(f"this state is damaged: its parts have {sizes} bytes; take a new one")
        if game.tracker is not None:
            game.tracker.load(facts)
        pc, sp, fp, frames, opcode, *rng = registers
        ram, stack = (numpy.frombuffer(part, numpy.uint8).copy() for part in parts[1:3])
        self._frotz.set_state((ram, stack, pc, sp, fp, frames, opcode, tuple(rng), parts[3]))
        self._score, self._over, self._won, self._followed = own
        return self._report("", accepted=True)

    def _load_game(self, path: str) -> str:
        """Put a game into the interpreter; returns its opening text."""
        game = self._open(path)
        rom = game.story.rom
        if self._game is not None:
            self._lib.shutdown()
        self._game = game
        opening: bytes = self._lib.setup(_ANY_FILE, _SEED, rom, len(rom))
        return opening.decode("cp1252", "replace")

    def _read(self, path: str) -> _Game:
        story = read_story(Path(path))
        description = story.description
        recorded = (description or {}).get("metadata", {}).get("walkthrough") or []
        tracker = None
        if self._listing:
            if description is None:
                raise DataError(
                    f"{path} has no .json beside it, which admissible_commands=True needs; copy it "
                    "there, or make the environment without admissible commands"
                )
            try:
                tracker = Tracker(description)
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{Path(path).with_suffix('.json')} does not describe a TextWorld game "
                    f"({type(error).__name__}: {error})"
                ) from error
        return _Game(story, tuple(tidy(str(command)) for command in recorded), tracker)

    def _playing(self) -> _Game:
        if self._game is None:
            raise EnvError("no game was started; call start()")
        return self._game

    def _send(self, command: str) -> str:
        answer: bytes = self._lib.step(command.encode("ascii") + b"\n")
        return answer.decode("cp1252", "replace")

    def _expert(self) -> str | None:
        """Return the walkthrough's next command while it has been followed."""
        walkthrough = self._playing().walkthrough
        if self._followed is None or self._over or self._followed >= len(walkthrough):
            return None
        return walkthrough[self._followed]

    def _report(self, text: str, *, accepted: bool) -> Report:
        tracker = self._playing().tracker
        commands = None
        if tracker is not None:
            commands = () if self._over else tracker.commands()
        return Report(text, self._score, self._over, self._won, accepted, self._expert(), commands)


def _clean(text: str) -> str:
    """Return a game's text as a player should read it."""
    text = _PICTURE.sub("", _INFOS.sub("", _PROMPT.sub("", text)))
    text = _CENTRED.sub("", _QUESTION.sub("", text))
    return _GAP.sub("\n\n", text).strip()
