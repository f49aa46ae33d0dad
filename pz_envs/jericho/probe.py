"""Try commands on a live Jericho engine and take them back, at little more than their own cost.

A probe remembers one state and restores it after every attempt from buffers it keeps. It also
restores what Jericho's state tuple leaves out: the cached score and move count of games that read
them from the status line. Chance is held still: every attempt from a remembered state starts from
the same fixed random number.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from pz_envs.jericho import zloop
from pz_envs.jericho.objects import ObjectTable

_RANDOM_NUMBER = 20_241_121
_TAKEN = b"(Taken)"
_CHANGES = ("move_diff_cnt", "attr_diff_cnt", "attr_clr_cnt", "ram_diff_cnt")


class Outcome(NamedTuple):
    """What an attempt did."""

    effect: bytes | None
    """Identity of what it did; None when it did nothing.

    Two commands with the same identity leave the same world (object tree without Jericho's noise,
    special memory), score and ending. A command that took something on the way ("(Taken)") does
    not count, as in Jericho: taking is a command of its own.
    """
    refused: bool
    """It did nothing and took no turn."""
    reply: object
    """Equal for equal replies."""


_CHANGED, _REFUSED = 1, 2


class Probe:
    """The interpreter behind one ``jericho.FrotzEnv``; not for use by two threads at once.

    Args:
        frotz: the engine.
        compiled: use the compiled loop where the machine can build it.
    """

    def __init__(self, frotz: Any, *, compiled: bool = True) -> None:
        self._frotz = frotz
        self._lib = frotz.frotz_lib
        self._native = zloop.loop() if compiled else None
        self._names: dict[int, str] = {}
        self._identity = b""
        self._bind()

    def _bind(self) -> None:
        """Find the interpreter's variables and make the buffers."""
        lib = self._lib
        self._pointers = [ctypes.c_void_p.in_dll(lib, name) for name in ("pcp", "sp", "fp")]
        self._zmp = ctypes.c_void_p.in_dll(lib, "zmp")
        self._opcode = ctypes.c_ubyte.in_dll(lib, "next_opcode")
        self._frames = ctypes.c_ushort.in_dll(lib, "frame_count")
        self._cached = [ctypes.c_int.in_dll(lib, name) for name in ("score", "move_count")]
        self._changes = [ctypes.c_int.in_dll(lib, name) for name in _CHANGES]
        self._known = max(0, lib.get_num_world_objs())
        self._raw = self._raw_tree() if not self._known else None
        self._tree_size = ctypes.sizeof(self._frotz.get_world_objects())
        size = self._raw[1] if self._raw else self._tree_size + lib.get_special_ram_size()
        self._tree = (ctypes.c_ubyte * ((size + 8) // 8 * 8))()
        self._loop = zloop.bind(lib) if self._native is not None else None
        if self._loop is None:
            self._native = None

    def objects(self) -> ObjectTable:
        """Return the object tree of the engine's present state, noise and all."""
        version, start = self._table_start()
        size = 9 if version <= 3 else 14
        table = ctypes.string_at(self._memory() + start, self._known * size)
        return ObjectTable(table, version)

    def name(self, number: int) -> str:
        """Return an object's name, which never changes."""
        if number not in self._names:
            found = self._frotz.get_object(number)
            self._names[number] = found.name if found is not None else ""
        return self._names[number]

    def _table_start(self) -> tuple[int, int]:
        header = ctypes.string_at(self._memory(), 64)
        return header[0], int.from_bytes(header[10:12], "big") + (62 if header[0] <= 3 else 126)

    def _raw_tree(self) -> tuple[int, int]:
        """Return start and size of the object table, for a story that Jericho does not know."""
        version, start = self._table_start()
        at = start + (7 if version <= 3 else 12)
        first_properties = ctypes.string_at(self._memory() + at, 2)
        return start, max(0, int.from_bytes(first_properties, "big") - start)

    def _memory(self) -> int:
        return int(self._zmp.value or 0)

    @contextmanager
    def remembered(self) -> Iterator[None]:
        """Remember the engine's state for the attempts inside, and leave it exactly as found."""
        state = self._frotz.get_state()
        cached = [variable.value for variable in (*self._cached, *self._changes)]
        self._remember(state)
        try:
            yield
        finally:
            if self._lib.halted():
                self._revive()
            self._frotz.set_state(state)
            for variable, value in zip((*self._cached, *self._changes), cached, strict=True):
                variable.value = value

    def _remember(self, state: tuple[Any, ...]) -> None:
        ram, stack, *_, rng, _ = state
        self._state = state
        # Addresses in arrays that the state keeps alive.
        self._ram, self._stack = ram.ctypes.data, stack.ctypes.data
        self._sizes = ram.nbytes, stack.nbytes
        self._opcode_value, self._frames_value = self._opcode.value, self._frames.value
        self._random = (_RANDOM_NUMBER, *rng[1:])
        self.score: int = self._lib.get_score()
        self.moves: int = self._lib.get_moves()
        self._point()
        self.world = self.digest()
        self._identity = b""
        self.restore()

    def _point(self) -> None:
        """Note where the remembered state's registers point in the interpreter's memory."""
        self._values = [pointer.value for pointer in self._pointers]
        if self._loop is None:
            return
        loop = self._loop
        loop.saved_memory, loop.saved_stack = self._ram, self._stack
        loop.memory_size, loop.stack_size = self._sizes
        loop.saved_pc, loop.saved_sp, loop.saved_fp = self._values
        loop.random_a, loop.random_interval, loop.random_counter = self._random
        loop.score, loop.moves = self.score, self.moves
        loop.world_buffer = ctypes.addressof(self._tree)
        loop.object_count = self._known + 1
        loop.objects_size, loop.world_size = self._tree_size, len(self._tree)
        loop.raw_start, loop.raw_size = self._raw or (0, 0)
        loop.saved_opcode, loop.saved_frame_count = self._opcode_value, self._frames_value

    def _revive(self) -> None:
        """Start a halted interpreter again; its memory moves, so everything is found anew."""
        self._frotz.reset()
        self._bind()
        self._frotz.set_state(self._state)
        self._point()
        self.restore()

    def restore(self) -> None:
        """Return to the remembered state."""
        if self._native is not None:
            self._native.zloop_restore(self._loop)
            return
        lib = self._lib
        lib.setRAM(self._ram)
        lib.setStack(self._stack)
        lib.setRng(*self._random)
        for pointer, value in zip(self._pointers, self._values, strict=True):
            pointer.value = value
        self._opcode.value = self._opcode_value
        self._frames.value = self._frames_value

    def run(self, command: str) -> bytes:
        """Give ``command`` in the remembered state and return the game's reply.

        The engine stays in the state after the command until ``restore``, which the caller owes.
        """
        line = command.encode("ascii", "ignore") + b"\n"
        if self._native is not None:
            return bytes(self._native.zloop_step(self._loop, line))
        return bytes(self._lib.step(line))

    def ask(self, command: str) -> tuple[bytes, bool]:
        """Return the reply to ``command`` and whether it took no turn; the state is restored."""
        reply = self.run(command)
        refused = self._lib.get_moves() == self.moves
        self._take_back()
        return reply, refused

    def attempt(self, commands: Sequence[str]) -> list[Outcome]:
        """Try every command from the remembered state and restore it."""
        self._identity = self._identity or self.identity()
        if self._native is None:
            return [self._attempt(command) for command in commands]
        outcomes: list[Outcome] = []
        while len(outcomes) < len(commands):
            rest = commands[len(outcomes) :]
            codes = (ctypes.c_ubyte * len(rest))()
            replies = (ctypes.c_uint64 * len(rest))()
            worlds = (ctypes.c_uint64 * (2 * len(rest)))()
            lines = "".join([f"{command}\n\0" for command in rest]).encode("ascii", "replace")
            done = self._native.zloop_try(self._loop, lines, len(rest), codes, replies, worlds)
            effects: list[bytes | None] = [None] * done
            flags = bytes(codes[:done])
            for index in (index for index, code in enumerate(flags) if code == _CHANGED):
                world = bytes(memoryview(worlds)[2 * index : 2 * index + 2])
                effects[index] = world if world != self._identity else None
            refused = [code == _REFUSED for code in flags]
            outcomes += map(Outcome._make, zip(effects, refused, replies[:done], strict=True))
            if done < len(rest):
                outcomes.append(Outcome(None, False, None))
                self._revive()
        return outcomes

    def _attempt(self, command: str) -> Outcome:
        lib = self._lib
        reply = self.run(command)
        effect, refused = None, False
        if not lib.halted():
            changed = (
                lib.get_score() != self.score
                or lib.world_changed()
                or lib.game_over() > 0
                or lib.victory() > 0
            )
            refused = not changed and lib.get_moves() == self.moves
            if changed and _TAKEN not in reply:
                identity = self.identity()
                effect = identity if identity != self._identity else None
        self._take_back()
        return Outcome(effect, refused, reply)

    def _take_back(self) -> None:
        if self._lib.halted():
            self._revive()
        else:
            self.restore()

    def identity(self) -> bytes:
        """Return a hash of the present world, score and ending, for this probe alone."""
        lib = self._lib
        if self._native is not None:
            words = (ctypes.c_uint64 * 2)()
            self._native.zloop_identity(self._loop, words)
            return bytes(words)
        over = lib.game_over() > 0 or lib.victory() > 0
        score = int(lib.get_score())
        return self.digest() + score.to_bytes(4, "little", signed=True) + bytes((over,))

    def digest(self) -> bytes:
        """Return a hash of the world: the clean object tree and Jericho's special memory."""
        tree = ctypes.addressof(self._tree)
        if self._native is not None:
            self._native.zloop_world(self._loop)
        elif self._raw is not None:
            ctypes.memmove(tree, self._memory() + self._raw[0], self._raw[1])
        else:
            lib = self._lib
            ctypes.memset(tree, 0, len(self._tree))
            lib.get_world_objects(ctypes.cast(tree, lib.get_world_objects.argtypes[0]), 1)
            lib.get_special_ram(tree + self._tree_size)
        return hashlib.blake2b(self._tree, digest_size=16).digest()
