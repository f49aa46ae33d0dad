"""Weights to engines through a process group of their own: NCCL between GPUs, gloo elsewhere.

The learner is its rank 0. Weights arrive in an engine's memory beside those that it serves, and are
put in their place only when all of them are there, so that what breaks on the way leaves the engine
with what it had. A group that has broken, or lost an engine, is left; the next weights make one.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pz_agents.runtime import Call, Handle, LostError, Runtime
from pz_agents.training.group import Group, backend_for, name_of
from pz_envs.errors import PzError


class Broadcast:
    """The learner's side; ``close`` leaves the group, and ``send`` makes another.

    Args:
        runtime: where the engines live.
        seconds: that anything may take before it counts as broken.
    """

    def __init__(self, runtime: Runtime, seconds: float) -> None:
        self._runtime = runtime
        self._seconds = seconds
        self._calls: list[Call] = []
        self._group: Group | None = None

    def send(
        self, engines: Sequence[Handle], state: Mapping[str, Tensor], version: int
    ) -> list[Call]:
        """Send weights to all engines; returns their calls, which end when these are in place.

        Args:
            engines: the same as the last time, unless it was closed meanwhile.
            state: a ``state_dict``.
            version: of the weights.

        Raises:
            LostError: they did not arrive everywhere.
        """
        try:
            if self._group is None:
                self._group = self._met(engines, next(iter(state.values())))
            kinds = [
                [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
                for name, tensor in state.items()
            ]
            self._begin(engines, "receive", [[kinds, version]] * len(engines))
            self._group.send(list(state.values()))
            return self._calls
        except (PzError, RuntimeError) as error:
            reason = str(error)
        # Only now nothing holds the group any more; those that are left hear that it has gone.
        self.close()
        for call in self._calls:
            with contextlib.suppress(PzError):
                call.result()
        raise LostError(f"the engines did not get weights through a group: {reason}")

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.close(abort=True)
            self._group = None

    def _met(self, engines: Sequence[Handle], sent: Tensor) -> Group:
        self._begin(engines, "device", [[]] * len(engines))
        devices = [name_of(sent.device), *(call.result() for call in self._calls)]
        backend, size, host = backend_for(devices), len(devices), self._runtime.host()
        meeting = socket.create_server((host, 0))
        port = meeting.getsockname()[1]
        joining = [[rank, size, host, port, backend, self._seconds] for rank in range(1, size)]
        self._begin(engines, "join", joining)
        group = Group(0, size, host, meeting, backend, self._seconds, self._watch)
        for call in self._calls:
            call.result()
        return group

    def _begin(self, engines: Sequence[Handle], method: str, args: Sequence[Sequence[Any]]) -> None:
        self._calls = [
            self._runtime.call(engine, method, *each, timeout=self._seconds)
            for engine, each in zip(engines, args, strict=True)
        ]

    def _watch(self, broken: RuntimeError | None) -> None:
        """Raise what an engine failed with, if one has."""
        for call in self._calls:
            if call.done():
                call.result()
