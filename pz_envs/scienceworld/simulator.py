"""One simulated house inside the shared Java process.

The engine was written for one house a process: random numbers, the counter that numbers objects and
the simplifications are global to it. Each simulator keeps its own and puts them in place before its
turn, so an episode goes as if it were alone, however many others take turns with it.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from pz_envs.errors import EnvError
from pz_envs.scienceworld.gateway import Connection, Long, Ref
from pz_envs.scienceworld.jvm import Jvm, lease, release

_INTERFACE = "scienceworld.runtime.pythonapi.PythonInterface"
_GOLD_S = 600.0  # the engine finds its solution by playing, which takes seconds in long tasks


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a loaded task says: its description, its forms of action, the first look around."""

    description: str
    actions: tuple[str, ...]
    first: Answer


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command led to; ``points`` are the engine's, at most 100, negative when all is lost.

    ``moves`` counts the engine's time.
    """

    text: str
    points: int
    completed: bool
    moves: int


class Simulator:
    """A house, a task and an agent in it; ``link`` is its connection to the shared ``jvm``.

    Args:
        heap_mb: heap of the Java process, should this simulator be the one that starts it.
        timeout_s: seconds that a call may take; then the Java process is killed.

    Raises:
        ConfigError: Java or a package is missing, or Java already runs with another heap.
        InfraError: Java did not start.
    """

    def __init__(self, heap_mb: int, timeout_s: float) -> None:
        self._simplifications = ""
        self._count = 0
        self.jvm = lease(heap_mb)
        try:
            with self._guarded("connect"):
                self.link = self.jvm.connect(timeout_s)
                self._server = self.link.make(_INTERFACE)
                self._random = self.link.make("java.util.Random")
        except BaseException:
            release(self.jvm)
            raise
        self._end = weakref.finalize(
            self, _close, self.jvm, self.link, (self._server, self._random)
        )
        self._end.atexit = False  # then the Java process ends as a whole

    @property
    def lost(self) -> bool:
        """Whether the Java process is gone, and the house with it."""
        return self.jvm.ended

    def close(self) -> None:
        """Free the house; Java ends soon after its last simulator."""
        self._end()

    def load(self, task: str, variation: int, simplifications: str, gold: bool = False) -> None:
        """Build a task's house; with ``gold`` the engine solves it first.

        Raises:
            EnvError: the engine refused or failed.
            InfraError: the Java process died or took too long, here and in all methods below.
        """
        with self._turn("load"):
            self.link.call(self._server, "load", task, variation, simplifications, gold)
            problem = self.link.text(self._server, "errorStr")
            if problem:
                raise EnvError(f"the engine cannot load {task}, variation {variation}: {problem}")
            self._simplifications = self.link.text(self.jvm.simplifier, "getSimplificationsUsed")

    def begin(self) -> Beginning:
        """Look around for the first time, as the original's ``reset`` does."""
        with self._turn("begin"):
            description = self.link.text(self._server, "getTaskDescription")
            actions = self._lines("getPossibleActions")
            return Beginning(description, actions, self.step("look around"))

    def step(self, command: str) -> Answer:
        """Send one command, on one line."""
        with self._turn("step"):
            text = self.link.text(self._server, "step", command)
            points = round(100 * self.link.number(self._server, "getScore"))
            completed = bool(self.link.call(self._server, "getCompleted"))
            moves = int(self.link.number(self._server, "getNumMoves"))
        return Answer(text, points, completed, moves)

    def commands(self) -> tuple[str, ...]:
        """Return every valid command; which wording it picks is fixed, and leaves no trace."""
        with self._turn("commands"):
            jvm = self.jvm
            self.link.call(jvm.scratch_random, "setSeed", Long(0))
            jvm.turn = None  # should what follows fail half way
            self.link.call(jvm.random_field, "set", jvm.random, jvm.scratch_random)
            found = self._lines("getValidActionObjectCombinations")
            self.link.call(jvm.random_field, "set", jvm.random, self._random)
            jvm.turn = weakref.ref(self)
        return tuple(dict.fromkeys(found))

    def gold(self) -> tuple[str, ...]:
        """Return the solution that ``load`` with ``gold`` found."""
        with self._turn("gold"):
            return self._lines("getGoldActionSequence")

    def _lines(self, method: str) -> tuple[str, ...]:
        """Call a method that returns a Java list of strings, fetched in one piece."""
        found = self.link.ref(self._server, method)
        text = self.link.text("z:java.lang.String", "join", "\n", found)
        self.link.free(found)
        return tuple(text.split("\n")) if text else ()

    @contextlib.contextmanager
    def _turn(self, what: str) -> Iterator[None]:
        """Hold the lock, with this simulator's globals in place."""
        with self._guarded(what):
            jvm = self.jvm
            last = None if jvm.turn is None else jvm.turn()
            if last is not self:
                jvm.turn = None
                if last is not None:
                    last._count = int(self.link.number(jvm.counter, "count"))
                self.link.call(jvm.random_field, "set", jvm.random, self._random)
                self.link.call(jvm.counter, "count_$eq", Long(self._count))
                self.link.call(jvm.simplifier, "parseSimplificationStr", self._simplifications)
                jvm.turn = weakref.ref(self)
            yield

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Hold the lock and turn a lost connection into a lost Java process."""
        jvm = self.jvm
        with jvm.lock:
            if jvm.dead:
                raise jvm.lost("is gone")
            try:
                yield
            except TimeoutError:
                raise jvm.lost(
                    f"did not answer `{what}` within {self.link.timeout_s:g} s and was killed (a "
                    f"full heap looks like that too: heap_mb={jvm.heap_mb} holds about "
                    f"{jvm.heap_mb // 13} environments)"
                ) from None
            except OSError:
                raise jvm.lost(f"died during `{what}`") from None
            except BaseException as error:
                if not isinstance(error, Exception):
                    jvm.lost("was interrupted")  # an answer may be under way: nothing to go on with
                raise


@functools.lru_cache(maxsize=2048)
def gold_actions(task: str, variation: int, simplifications: str, heap_mb: int) -> tuple[str, ...]:
    """Return the engine's own solution of a variation; takes from a tenth of a second to many.

    Raises:
        EnvError: the engine found none.
        InfraError: the Java process died or took longer than ten minutes.
    """
    simulator = Simulator(heap_mb, _GOLD_S)
    try:
        simulator.load(task, variation, simplifications, gold=True)
        return simulator.gold()
    finally:
        simulator.close()


def _close(jvm: Jvm, link: Connection, refs: tuple[Ref, ...]) -> None:
    """Free a simulator's objects and give its process back; must not fail."""
    if not jvm.ended and jvm.users > 1:
        link.timeout_s = 5.0
        with contextlib.suppress(OSError):
            for ref in refs:
                link.free(ref)
    link.close()
    release(jvm)
