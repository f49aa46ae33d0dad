"""One game in one interpreter: start, step, save, load, and the expert's next command.

``Engine`` wraps a raw ``jericho.FrotzEnv`` and speaks only numbers, strings and bytes, so the same
object serves in process and inside a worker. Every command passes the input rules here; what they
refuse never reaches the interpreter. The reports' scores are the engine's own bookkeeping: after a
restored state the interpreter's own answer would still be the old one until the next command.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pz_envs.errors import DataError, EnvError, require
from pz_envs.jericho.commands import RefusedVerbs, refusal, refused_verbs, tidy, was_refused
from pz_envs.jericho.games import GAMES, MIT_ZORK1_MD5

_READ_CHAR = 246
"""The Z-machine's opcode number while a game waits for a single key."""

_KEYS = {"enter": "", "return": "", "space": " "}
_KEY_COMMANDS = ("enter", "q")
_LONGEST_READ = 10_000
_LONGEST_TEXT = 8192  # the interpreter's buffer for a game's answer
_FIRST_SEED = 1000
_SEEDS = 2**31 - 1 - _FIRST_SEED
_SNAPSHOT = struct.Struct("<IIII")

_ZORK1_MD5 = next(game.md5 for game in GAMES if game.name == "zork1")

_OPENING_CUT = frozenset({"theatre"})
"""Games whose opening text jericho cuts at a quoted ``>``; the first room is looked up for them."""

_ZORK1_STATUS = re.compile(r"\A>[^\n]*Moves: *-?\d+ *\n")
_ZORK1_WON = "Inside the Barrow"
_ZORK1_OVER = "****  You have died  ****"


class Report(NamedTuple):
    """What a start, a command or a load led to.

    ``accepted`` is False when the input rules or the game's parser refused the command. ``expert``
    is the walkthrough's next command while the episode follows it. ``commands`` is None unless the
    engine was asked to list them and had the time.
    """

    text: str
    score: int
    over: bool
    won: bool
    accepted: bool
    expert: str | None
    commands: tuple[str, ...] | None


class Engine:
    """A loaded game.

    Args:
        story: path of a checked story file (``story.find_story``).
        md5: the md5 that was checked; the bytes that are loaded must still have it.
        commands: list the admissible commands in every report, in this mode; None does not. Zork I
            release 119 has none: jericho cannot see its world change.
        timeout_s: seconds after which listing the commands gives up.

    Raises:
        ConfigError: jericho is not installed.
        DataError: the story file changed since it was checked.
    """

    def __init__(
        self,
        story: str,
        md5: str,
        *,
        commands: Literal["fast", "exact"] | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        rom = Path(story).read_bytes()
        if hashlib.md5(rom).hexdigest() != md5:
            raise DataError(f"{story} changed while it was in use; make the environment again")
        self._mit = md5 == MIT_ZORK1_MD5
        known_as = _ZORK1_MD5 if self._mit else md5
        game = next(game for game in GAMES if game.md5 == known_as)
        self._game = game
        self._md5 = md5
        bindings = _bindings(game.md5)
        self._walkthrough_seed = int(bindings["seed"])
        self._walkthrough = _walkthrough(game.md5)
        self._read = functools.lru_cache(4096)(functools.partial(_read, _refused(game.md5)))
        self._frotz = _load(story, rom, bindings)
        self._lib = self._frotz.frotz_lib
        # jericho's states leave out which window is written to and counters read from the screen.
        self._window = ctypes.c_int.in_dll(self._lib, "cwin")
        self._status = [ctypes.c_int.in_dll(self._lib, name) for name in ("score", "move_count")]
        self._operands = (ctypes.c_uint16 * 8).in_dll(self._lib, "zargs")
        screen = ctypes.c_void_p.in_dll(self._lib, "screen_buffer_ptr").value
        assert screen is not None
        self._screen = (ctypes.c_char * 2).from_address(screen)
        self._opcode = ctypes.c_ubyte.in_dll(self._lib, "next_opcode")
        self._halted = ctypes.c_int.in_dll(self._lib, "emulator_halted")
        self._get_score, self._get_moves, self._has_won, self._is_over = (
            ctypes.CFUNCTYPE(kind)((name, self._lib))
            for name, kind in (
                ("get_score", ctypes.c_short),
                ("get_moves", ctypes.c_int),
                ("victory", ctypes.c_int),
                ("game_over", ctypes.c_int),
            )
        )
        self._memory = ctypes.create_string_buffer(self._lib.getRAMSize())
        self._lister: Any = None
        if commands is not None:
            self._frotz.act_gen = _templates(game.md5)
            self._lister = _lister(self._frotz, md5, commands, timeout_s)
        self._score = 0
        self._moves = 0
        self._over = self._won = False
        self._followed: int | None = None
        self._commands: tuple[str, ...] | None = None

    @property
    def awaits_key(self) -> bool:
        """Whether the game waits for a single key (a menu, "press any key"), not for a line."""
        return self._opcode.value == _READ_CHAR

    def start(self, seed: int, expert: bool) -> Report:
        """Begin an episode.

        Args:
            seed: any non-negative integer; it is mapped past the interpreter's special seeds (0,
                −1, and those below 1000, which count instead of being random).
            expert: use the seed that the walkthrough was recorded with instead.
        """
        self._frotz.seed(self._walkthrough_seed if expert else _FIRST_SEED + seed % _SEEDS)
        text, _ = self._frotz.reset()
        if self._game.name in _OPENING_CUT:
            state = self._frotz.get_state()
            room = self._lib.step(b"look\n").decode("cp1252", "replace")
            self._frotz.set_state(state)
            text = f"{text.rstrip()}...\n\n{room.strip()}"
        self._over = self._won = False
        self._score, self._moves = self._counters()
        self._followed = 0
        self._list_commands()
        return self._report(_clean(text), accepted=True)

    def step(self, text: str) -> Report:
        """Apply one command; any text is survived.

        While the game waits for a single key (a menu, "press any key"), the command's first
        character is that key; ``enter`` and ``space`` stand for themselves.

        Raises:
            EnvError: the game is over.
        """
        if self._over:
            raise EnvError("the game is over; call start() before step()")
        if len(text) > _LONGEST_READ:
            text = text[:_LONGEST_READ]
        command, problem = self._read(text)
        line = command
        if command and self._opcode.value == _READ_CHAR:
            line = _KEYS.get(command.lower(), command[0])
        elif problem is not None:
            return self._report(problem, accepted=False)
        follows = self._followed is not None and command == self._expert()
        # jericho drops the first character of an answer: of an empty one, that is what ends it,
        # and some older text would show.
        self._screen.raw = b"\0\0"
        raw: str = self._lib.step(line.encode("ascii") + b"\n").decode("cp1252", "replace")
        score, moves = self._counters()
        if self._mit:
            raw = _ZORK1_STATUS.sub("", raw)
            self._won = _ZORK1_WON in raw
            self._over = self._won or _ZORK1_OVER in raw
        else:
            self._won = self._has_won() > 0
            self._over = self._won or self._is_over() > 0 or self._halted.value > 0
        unmoved = moves == self._moves and score == self._score and not self._over
        self._score = score
        self._moves = moves
        if self._followed is not None:
            self._followed = self._followed + 1 if follows else None
        if self._lister is not None:
            self._list_commands()
        answer = _clean(raw)
        return self._report(answer, accepted=not (unmoved and was_refused(answer)))

    def save(self) -> bytes:
        """Return the whole state: memory, stack, registers, random generator and bookkeeping."""
        ram, stack, pc, sp, fp, frames, opcode, rng, narrative = self._frotz.get_state()
        registers = [int(value) for value in (pc, sp, fp, frames, opcode, *rng)]
        status = [counter.value for counter in self._status]
        hidden = [self._window.value, *status]
        own = [self._score, self._moves, self._over, self._won, self._followed]
        header = json.dumps([self._md5, registers, hidden, own]).encode()
        parts = (header, ram.tobytes(), stack.tobytes(), narrative or b"")
        return _SNAPSHOT.pack(*map(len, parts)) + b"".join(parts)

    def load(self, state: bytes) -> Report:
        """Go back to a saved state, of this process or another, also after another start.

        The report's text is empty: what was last read is not part of the state.

        Raises:
            EnvError: the state is of another story file, or no state at all.
        """
        import numpy

        sizes = _SNAPSHOT.unpack_from(state) if len(state) >= _SNAPSHOT.size else (0, 0, 0, 0)
        if not sizes[0] or sum(sizes) + _SNAPSHOT.size != len(state):
            raise EnvError(f"{len(state)} bytes that no Jericho engine saved cannot be loaded")
        parts: list[bytes] = []
        start = _SNAPSHOT.size
        for size in sizes:
            parts.append(state[start : start + size])
            start += size
        md5, registers, hidden, own = json.loads(parts[0])
        if md5 != self._md5:
            raise EnvError(f"this state is of a story file with md5 {md5}, not of {self._md5}")
        if sizes[1:3] != (len(self._memory), self._lib.getStackSize()) or sizes[3] >= _LONGEST_TEXT:
            raise EnvError(f"this state is damaged: its parts have {sizes} bytes; take a new one")
        if self._halted.value > 0:
            self._frotz.reset()
        pc, sp, fp, frames, opcode, *rng = registers
        ram, stack = (numpy.frombuffer(part, numpy.uint8).copy() for part in parts[1:3])
        self._frotz.set_state((ram, stack, pc, sp, fp, frames, opcode, tuple(rng), parts[3]))
        window, *status = hidden
        for counter, value in zip(self._status, status, strict=True):
            counter.value = value
        self._select_window(window)
        self._score, self._moves, self._over, self._won, self._followed = own
        self._list_commands()
        return self._report("", accepted=True)

    def _counters(self) -> tuple[int, int]:
        """Return the game's own score and move counters."""
        if not self._mit:
            return self._get_score(), self._get_moves()
        self._lib.getRAM(self._memory)
        (globals_at,) = struct.unpack_from(">H", self._memory, 0x0C)
        score, moves = struct.unpack_from(">hH", self._memory, globals_at + 2)
        return score, moves

    def _expert(self) -> str | None:
        """Return the walkthrough's next command.

        Its empty lines are key presses where a key is awaited; elsewhere they mean nothing.
        """
        if self._followed is None or self._over:
            return None
        while self._followed < len(self._walkthrough):
            command = self._walkthrough[self._followed]
            if command:
                return command
            if self.awaits_key:
                return "enter"
            self._followed += 1
        return None

    def _list_commands(self) -> None:
        if self._lister is None:
            return
        if self._over:
            self._commands = ()
        elif self.awaits_key:
            self._commands = _KEY_COMMANDS
        else:
            window = self._window.value
            self._commands = self._lister.commands()
            self._select_window(window)

    def _select_window(self, window: int) -> None:
        """Write to this window, as the game's own instruction would have it."""
        if window != self._window.value:
            self._operands[0] = window
            self._lib.z_set_window()

    def _report(self, text: str, *, accepted: bool) -> Report:
        return Report(
            text, self._score, self._over, self._won, accepted, self._expert(), self._commands
        )


def _read(refused: RefusedVerbs, text: str) -> tuple[str, str | None]:
    """Return a text as a tidy command, and why it is refused as a line, if it is."""
    command = tidy(text)
    return command, refusal(command, refused)


def _clean(text: str) -> str:
    """Return a game's text without blank ends, the prompt, and a status line behind the prompt."""
    text = text.strip()
    answer, prompt, behind = text.rpartition("\n>")
    return answer.rstrip() if prompt and "\n" not in behind else text


def _load(story: str, rom: bytes, bindings: dict[str, Any]) -> Any:
    """Return a ``FrotzEnv``, without the parts of its constructor that are slow or warn.

    The constructor works out action templates (up to 70 ms) that only the listing of commands
    needs, and warns about Zork I release 119, whose score is read elsewhere. Its private copy of
    the interpreter is loaded from a temporary folder; the current folder is not changed.
    """
    jericho = require("jericho", "pz-envs[jericho]")
    env = jericho.FrotzEnv.__new__(jericho.FrotzEnv)
    env.frotz_lib = jericho.jericho._load_frotz_lib()
    env.is_fully_supported = hashlib.md5(rom).hexdigest() != MIT_ZORK1_MD5
    env._cache = {story: (rom, bindings, None)}
    env.load(story, _FIRST_SEED)
    return env


@functools.lru_cache(maxsize=64)
def _templates(md5: str) -> Any:
    """Return jericho's action templates of a game; they depend on its grammar alone."""
    jericho = require("jericho", "pz-envs[jericho]")
    return jericho.template_action_generator.TemplateActionGenerator(_bindings(md5))


def _lister(frotz: Any, md5: str, mode: Literal["fast", "exact"], timeout_s: float) -> Any:
    from pz_envs.jericho.admissible import AdmissibleCommands, CommandCache

    cache = CommandCache()
    return AdmissibleCommands(frotz, story_md5=md5, mode=mode, cache=cache, timeout_s=timeout_s)


def _bindings(md5: str) -> dict[str, Any]:
    found: dict[str, Any] = require("jericho.defines", "pz-envs[jericho]").BINDINGS_DICT[md5]
    return found


@functools.lru_cache(maxsize=64)
def _walkthrough(md5: str) -> tuple[str, ...]:
    recorded = _bindings(md5).get("walkthrough", "")
    return tuple(tidy(command) for command in recorded.split("/"))


@functools.lru_cache(maxsize=64)
def _refused(md5: str) -> RefusedVerbs:
    bindings = _bindings(md5)
    return refused_verbs(bindings["grammar"], bindings["max_word_length"])
