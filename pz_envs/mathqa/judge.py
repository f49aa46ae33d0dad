r"""Symbolic equivalence by math-verify, in one child process that all graders of a process share.

Environments step in worker threads, where math-verify's own timeouts (signals) cannot work, and
computer algebra can run for ever inside C code. So the child limits its own processor time for
every question, which a busy machine does not change; a child that exceeds it dies and the next
question starts another. One child takes some 70 MB and 1.5 s to start; it ends with its last user.
Only LaTeX is extracted, and only as a whole: math-verify's extractor of plain expressions evaluates
them, and a part of an answer that cannot be read must not stand for all of it.
"""

from __future__ import annotations

import functools
import os
import resource
import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import Any

from pz_envs.errors import EnvError, InfraError, require
from pz_envs.workers import Worker

CPU_SECONDS = 3
"""Processor time that one comparison may take."""

_WALL_SECONDS = 120.0  # for a child that waits rather than computes; a busy machine is slow
_MEMORY_MB = 1024
_REMEMBERED = 10_000


class Judge:
    """The child's side: parses and compares LaTeX."""

    def __init__(self) -> None:
        module = require("math_verify", "pz-envs[math]")
        self._verify = module.verify
        config = [module.LatexExtractionConfig(boxed_match_priority=0)]

        @functools.lru_cache(maxsize=256)
        def parse(latex: str) -> Any:
            box = "\\boxed{" + latex + "}"
            return module.parse(box, config, extraction_mode="first_match", parsing_timeout=None)

        self._parse = parse
        parse("1")  # builds the grammar's tables, outside of any question's time

    def ready(self) -> bool:
        """Return True: the child runs and has its library."""
        return True

    def equal(self, gold: str, answer: str) -> bool:
        """Return whether math-verify takes ``answer`` for ``gold``; may end this process."""
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        soft = int(time.process_time()) + 1 + CPU_SECONDS
        if hard != resource.RLIM_INFINITY:
            soft = min(soft, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
        try:
            parsed = self._parse(gold), self._parse(answer)
            return bool(self._verify(*parsed, timeout_seconds=None))
        finally:
            resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))


@dataclass(slots=True)
class _Child:
    """The child of one process, how many share it, and what it has said."""

    worker: Worker
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
    known: dict[tuple[str, str], bool | None] = field(default_factory=dict)


_children: dict[int, _Child] = {}  # by process id: a fork must not speak on its parent's socket
_guard = threading.RLock()


class SharedJudge:
    """One user's share in the child of this process; may be used from any thread."""

    def __init__(self) -> None:
        self._owner = 0
        self._leave: weakref.finalize[Any, SharedJudge] | None = None

    def equal(self, gold: str, answer: str) -> bool | None:
        """Return whether two LaTeX answers are equal; None when that could not be found out.

        Raises:
            ConfigError: math-verify is not installed.
            InfraError: the child cannot be started.
        """
        child = self._join()
        with child.lock:
            question = (gold, answer)
            if question not in child.known:
                if len(child.known) >= _REMEMBERED:
                    child.known.clear()
                child.known[question] = _ask(child.worker, gold, answer)
            return child.known[question]

    def close(self) -> None:
        """Leave; the child ends with its last user."""
        if self._leave is not None:
            self._leave()
            self._leave = None

    def _join(self) -> _Child:
        process = os.getpid()
        with _guard:
            if process not in _children:
                worker = Worker(
                    "pz_envs.mathqa.judge:Judge",
                    {},
                    timeout_s=_WALL_SECONDS,
                    memory_mb=_MEMORY_MB,
                )
                _children.setdefault(process, _Child(worker))
            child = _children[process]
            if self._leave is None or self._owner != process:
                child.users += 1
                self._owner = process
                self._leave = weakref.finalize(self, _left, process)
            return child


def _ask(worker: Worker, gold: str, answer: str) -> bool | None:
    worker.call("ready")  # what fails here is the machine, not the answer
    try:
        return bool(worker.call("equal", gold, answer))
    except (InfraError, EnvError):
        return None


def _left(process: int) -> None:
    if os.getpid() != process:
        return
    with _guard:
        child = _children[process]
        child.users -= 1
        if child.users == 0:
            del _children[process]
            child.worker.close()
