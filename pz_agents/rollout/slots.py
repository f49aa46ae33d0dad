"""One live environment and the one thread that makes, resets, steps and closes it.

The rollout loop talks to slots through queues, so that a slow environment holds up nobody. A slot
keeps its environment for the next episode of the same id. An environment that raised is closed
and made anew. A thread cannot be killed: an abandoned slot closes its environment and ends when
the operation it hangs in returns; engines that can hang belong in child processes with timeouts.
An agent may use the environment while its turn is open; the two never run at the same time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

from pz_envs.textenv import Info, TextEnv

if TYPE_CHECKING:
    from pz_agents.rollout.episode import Resume

MakeEnv = Callable[[str], TextEnv]
"""From an environment id to a fresh environment; called from several threads."""

Phase = Literal["make", "reset", "step"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """What came of one operation: ``value`` as ``reset`` or ``step`` returned it, or ``error``."""

    slot: EnvSlot
    phase: Phase
    seconds: float
    value: Any = None
    error: Exception | None = None


class EnvSlot:
    """A place for one live episode; results arrive in the ``outbox`` it was given."""

    def __init__(self, make_env: MakeEnv, outbox: SimpleQueue[Finished]) -> None:
        self.env: TextEnv | None = None
        self.env_id = ""
        self._phase: Phase = "make"
        self._make_env = make_env
        self._outbox = outbox
        self._inbox: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="pz-env", daemon=True)
        self._thread.start()

    def begin(
        self,
        env_id: str,
        env_seed: int,
        options: dict[str, Any] | None,
        resume: Resume | None = None,
    ) -> None:
        """Ask for a new episode, in the environment that is there if its id fits.

        The value that comes of it is (observation, info, whether it began at ``resume``).
        """
        self._inbox.put(lambda: self._begin(env_id, env_seed, options, resume))

    def step(self, text: str) -> None:
        """Ask for one step."""
        self._inbox.put(lambda: self._step(text))

    def retire(self) -> None:
        """Ask the thread to close the environment and end, after what it is doing now."""
        self._inbox.put(None)

    def join(self, timeout: float) -> bool:
        """Wait for a retired slot's thread; returns whether it has ended."""
        self._thread.join(max(timeout, 0.0))
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (operation := self._inbox.get()) is not None:
            started = time.perf_counter()
            try:
                value = operation()
            except Exception as error:  # an environment's fault is its episode's alone
                seconds = time.perf_counter() - started
                self._close_env()
                self._outbox.put(Finished(self, self._phase, seconds, error=error))
            else:
                seconds = time.perf_counter() - started
                self._outbox.put(Finished(self, self._phase, seconds, value))
        self._close_env()

    def _begin(
        self, env_id: str, env_seed: int, options: dict[str, Any] | None, resume: Resume | None
    ) -> Any:
        if self.env is None or self.env_id != env_id:
            self._phase = "make"
            self._close_env()
            self.env = self._make_env(env_id)
            self.env_id = env_id
        self._phase = "reset"
        observation, info = self.env.reset(seed=env_seed, options=options)
        if resume is None:
            return observation, info, False
        found = _resumed(self.env, observation, resume)
        if found is not None:
            return *found, True
        _logger.warning("%s (seed %d): replay diverged; begins afresh", env_id, env_seed)
        return *self.env.reset(seed=env_seed, options=options), False

    def _step(self, text: str) -> Any:
        assert self.env is not None
        self._phase = "step"
        return self.env.step(text)

    def _close_env(self) -> None:
        env, self.env, self.env_id = self.env, None, ""
        if env is None:
            return
        try:
            env.close()
        except Exception:  # closing is the last thing we ask of it
            _logger.warning("%s: close() raised", type(env).__name__, exc_info=True)


def _resumed(env: TextEnv, observation: str, resume: Resume) -> tuple[str, Info] | None:
    """Take ``env`` from its start to ``resume``; None when something else is seen on the way."""
    if resume.snapshot is not None:
        observation, info = env.restore(resume.snapshot)
        return (observation, info) if observation == resume.observation else None
    info = {}
    for step in resume.steps:
        if observation != step.observation:
            return None
        observation, _, over, _, info = env.step(step.action)
        if over:
            return None
    return (observation, info) if observation == resume.observation and info else None
