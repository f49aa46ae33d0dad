"""Several learner ranks: each learns from its share of every step's rows, all get the same weights.

Rank 0 is the process of the run, the only one that writes; the others are objects of a runtime
with the same networks and optimizers. An update's rows go to the ranks longest first, each to the
one with the least sum of squared lengths. Losses are divided by what the whole update holds, so
the ranks' gradients add up to those of one process, up to rounding; every rank then clips and
steps alike. A rank that is lost ends the step; the run goes on from a checkpoint (``run.py``).
"""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pz_agents.algorithms.rows import TrainRow
from pz_agents.runtime import Call, LostError, Runtime
from pz_agents.training.batching import StepRows
from pz_agents.training.group import Group, backend_for, checksum, device_name
from pz_agents.training.peer import pack, pack_rows, parted
from pz_agents.training.placement import rank_count, resources_of
from pz_agents.training.settings import TrainSettings
from pz_agents.training.update import Updater
from pz_envs.errors import InfraError, PzError

FACTORY = "pz_agents.training.peer:Peer"

_READY_SECONDS = 600.0
_GRACE_SECONDS = 5.0
_LOOK_SECONDS = 0.001
_MINE = ("loss", "tokens", "grad_norm", "learning_rate")
"""Figures of an update that are the same on every rank."""


def balanced(lengths: Sequence[int], parts: int) -> list[NDArray[np.intp]]:
    """Return which rows each rank takes: longest first, to the least sum of squared lengths.

    Every rank gets a row where there are enough, rank 0 the longest.

    Args:
        lengths: of the rows, in tokens.
        parts: how many ranks.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for number in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        least = loads.index(min(loads))
        shares[least].append(number)
        loads[least] += int(lengths[number]) ** 2
    return [np.array(share, np.intp) for share in shares]


class Team:
    """The other ranks as rank 0 sees them; ``close`` ends them.

    Args:
        settings: of the run.
        runtime: where they live.

    Attributes:
        size: how many ranks there are, this one included.
        handles: of ranks 1, 2, ...
    """

    def __init__(self, settings: TrainSettings, runtime: Runtime) -> None:
        self._runtime = runtime
        self._seconds = settings.worker_seconds
        self.size = rank_count(settings, runtime)
        plain = settings.model_dump(mode="json") | {"preset": ""}
        self.handles = runtime.spawn(
            FACTORY,
            self.size - 1,
            resources_of(settings, "rank", runtime),
            {"settings": plain},
        )
        self._calls: dict[int, Call] = {}
        self._updaters: Mapping[str, Updater] = {}
        self._group: Group | None = None

    def join(self, updaters: Mapping[str, Updater]) -> None:
        """Bring the other ranks to where ``updaters`` are, and let these hand out their rows.

        Raises:
            LostError: a rank died.
            ModelError: a rank could not load the model.
        """
        mine = device_name(updaters["policy"].module)
        devices = [mine, *self._ask("device", seconds=_READY_SECONDS)]
        host = self._runtime.host()
        meeting = socket.create_server((host, 0))
        port = meeting.getsockname()[1]
        self._begin("join", self.size, host, port, backend_for(devices), self._seconds)
        try:
            self._group = Group(
                0, self.size, host, meeting, backend_for(devices), self._seconds, self._watch
            )
        except RuntimeError as error:
            self._watch(error)
            raise
        for updater in updaters.values():
            self._group.same_state(updater.module, updater.optimizer)
        self._answers()
        self._updaters = updaters
        for updater in updaters.values():
            updater.team, updater.group = self, self._group

    def shared(self, updater: Updater, step: StepRows) -> StepRows:
        """Let every rank begin to learn from its share of ``step``; return this one's."""
        lengths = [len(row.ids) for row in step.rows]
        shares = [
            [part[own] for own in balanced([lengths[n] for n in part], self.size)]
            for part in step.minibatches
        ]
        cut = [_cut(step, [share[rank] for share in shares]) for rank in range(self.size)]
        sent = [[self._name(updater), pack(each), updater.state()] for each in cut[1:]]
        self._begin_each("learn", sent, self._seconds)
        return cut[0]

    def merged(self, updates: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
        """Return the updates' figures over all ranks, whose learning ends here."""
        answers: list[list[dict[str, float]]] = self._answers()
        return [_merged(list(each)) for each in zip(updates, *answers, strict=True)]

    def per_token(self, updater: Updater, rows: Sequence[TrainRow]) -> list[NDArray[np.float32]]:
        """Return ``updater.per_token(rows)``, of which every rank works out its share."""
        shares = balanced([len(row.ids) for row in rows], self.size)
        parts = [[rows[number] for number in share] for share in shares]
        name = self._name(updater)
        self._begin_each("per_token", [[name, pack_rows(part)] for part in parts[1:]])
        found = [updater.per_token(parts[0])]
        for part, blob in zip(parts[1:], self._answers(), strict=True):
            found.append(parted(blob, [len(row.ids) for row in part], np.float32))
        by_row = {
            int(number): figures
            for share, each in zip(shares, found, strict=True)
            for number, figures in zip(share, each, strict=True)
        }
        return [by_row[number] for number in range(len(rows))]

    def check(self) -> None:
        """Compare every rank's weights to rank 0's, to the bit.

        Raises:
            InfraError: they differ.
        """
        mine = {name: checksum(updater.module) for name, updater in self._updaters.items()}
        for rank, theirs in enumerate(self._ask("checksums"), 1):
            for name, digest in mine.items():
                if theirs[name] != digest:
                    raise InfraError(
                        f"learner rank {rank}'s {name} is no longer rank 0's (checksum "
                        f"{theirs[name][:8]}, not {digest[:8]}); the last checkpoint is whole. Run "
                        "the same command again, with `learner_ranks` 1 if it happens again"
                    )

    def close(self) -> None:
        """End the other ranks."""
        for updater in self._updaters.values():
            updater.team = updater.group = None
        for handle in self.handles:
            self._runtime.kill(handle)
        if self._group is not None:
            self._group.close(abort=True)
            self._group = None

    def _name(self, updater: Updater) -> str:
        return next(name for name, each in self._updaters.items() if each is updater)

    def _ask(self, method: str, *args: Any, seconds: float | None = None) -> list[Any]:
        self._begin(method, *args, seconds=seconds)
        return self._answers()

    def _begin(self, method: str, *args: Any, seconds: float | None = None) -> None:
        self._begin_each(method, [args] * len(self.handles), seconds)

    def _begin_each(
        self, method: str, args: Sequence[Sequence[Any]], seconds: float | None = None
    ) -> None:
        limit = seconds or self._seconds
        self._calls = {
            rank: self._runtime.call(handle, method, *each, timeout=limit)
            for rank, (handle, each) in enumerate(zip(self.handles, args, strict=True), 1)
        }

    def _answers(self) -> list[Any]:
        """Wait for the calls under way; any that fails ends the wait."""
        while not all(call.done() for call in self._calls.values()):
            self._watch(None)
            time.sleep(_LOOK_SECONDS)
        self._watch(None)
        answers = [call.result() for call in self._calls.values()]
        self._calls = {}
        return answers

    def _watch(self, broken: RuntimeError | None) -> None:
        """Raise what a rank failed with, if one has.

        Args:
            broken: what an operation of the group failed with; then one certainly has.
        """
        failed = self._failed()
        if not failed and broken is None:
            return
        # The others fail with it: which was first shows a little later.
        until = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < until and not any(
            isinstance(error, LostError) for error in failed.values()
        ):
            time.sleep(_LOOK_SECONDS)
            failed = self._failed()
        if not failed:
            raise LostError(f"the learner ranks lost one another: {broken}") from broken

        def worth(rank: int) -> tuple[bool, bool]:
            return not isinstance(failed[rank], LostError), isinstance(failed[rank], InfraError)

        rank = min(failed, key=worth)
        raise type(failed[rank])(f"learner rank {rank}: {failed[rank]}") from failed[rank]

    def _failed(self) -> dict[int, PzError]:
        found: dict[int, PzError] = {}
        for rank, call in self._calls.items():
            if call.done():
                try:
                    call.result()
                except PzError as error:
                    found[rank] = error
        return found


def _cut(step: StepRows, numbers: Sequence[NDArray[np.intp]]) -> StepRows:
    """Return the rows with these ``numbers``, by mini-batch, as a step of their own."""
    bounds = np.cumsum([0, *map(len, numbers)])
    taken = np.concatenate(numbers)
    return StepRows(
        rows=[step.rows[number] for number in taken],
        groups=[step.groups[number] for number in taken],
        minibatches=[np.arange(*pair) for pair in itertools.pairwise(bounds)],
        sums=step.sums,
        sizes=step.sizes,
        targets={name: values[taken] for name, values in step.targets.items()},
    )


def _merged(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return one update's figures over the ranks from each one's own, rank 0's first."""
    own = dict(shares[0])
    told = [share for share in shares if share]
    for name in own:
        values = [share[name] for share in told if name in share]
        if name in _MINE or not values:
            continue
        if name == "engine_gap":
            own[name] = max(values)
        elif name == "padding":
            own[name] = sum(values) / len(values)
        else:
            own[name] = sum(values)
    return own
