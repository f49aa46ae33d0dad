"""Ctrl-C and SIGTERM: both stop what runs, and the exit status says which one it was.

``KeyboardInterrupt`` stands for Ctrl-C (130) and its subclass ``Terminated`` for SIGTERM (143), so
whoever saves at the one saves at the other. Handlers are put back where a block ends, and only the
main thread has any.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def exit_status(stopped: KeyboardInterrupt) -> int:
    """Return what a process that was stopped exits with: 128 and the signal's number."""
    return 128 + (signal.SIGTERM if isinstance(stopped, Terminated) else signal.SIGINT)


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise ``Terminated`` inside this block, as Ctrl-C raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Interrupt:
    """Turns both signals into a stop between steps, or at once where that is allowed.

    Attributes:
        requested: what is to be raised once a step is whole; None: nothing was asked.
        may_raise: whether a signal raises at once now.
    """

    def __init__(self) -> None:
        self.requested: type[KeyboardInterrupt] | None = None
        self.may_raise = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Let a signal raise at once inside this block.

        When the block raises, ``may_raise`` stays True: the weights are those of a whole step.
        """
        self.may_raise = True
        if self.requested:
            raise self.requested
        yield
        self.may_raise = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        # A second signal does what it did before.
        self._restore()
        if self.may_raise:
            raise self.requested

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    raise Terminated
