"""Cells on a Ray cluster: each in an actor with its own resources, writing the same files.

An actor starts the very process that the runner starts on one machine, in the cell's folder, so
that locks, logs, progress and resumption are the same; folder, data and cache must be where every
node sees them. Ray keeps a cell waiting until a node has room for it. An actor that is lost with
its node is a crash like any other: the cell is tried once more, and goes on where its files end.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pz_agents.runtime import LostError, Resources, Runtime
from pz_bench.estimate import estimate
from pz_bench.runner import Job, cell_command, cell_environment

if TYPE_CHECKING:
    from pz_bench.cell import CellSpec

_HOST = "pz_bench.ray_cells:CellHost"
_LOST = -9
_TURN_SECONDS = 0.5
_LOOK_SECONDS = 0.05
_FOREVER = 1e9


class CellHost:
    """Runs one cell's process, where Ray has put this actor."""

    def __init__(self, number: int) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(
        self, folder: str, arguments: list[str], cwd: str, environment: Mapping[str, str]
    ) -> None:
        """Start the process; it ends with this actor, however that ends.

        Args:
            folder: of the cell.
            arguments: more for its command line.
            cwd: the runner's folder: agents may be named by a path from there.
            environment: variables that must be as the runner has them.
        """
        with open(Path(folder) / "log.txt", "ab") as log:
            self._process = subprocess.Popen(
                cell_command(folder, arguments),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=cwd,
                env={**cell_environment(), **environment},
                start_new_session=True,
            )

    def wait(self) -> int | None:
        """Wait a little; returns the exit code, or None while the process runs."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(_TURN_SECONDS)
        return None

    def terminate(self) -> None:
        """Ask the process to save its state and end."""
        assert self._process is not None
        self._process.terminate()


class RemoteProcess:
    """One cell's process on the cluster, as the runner sees it; see ``runner.Process``."""

    def __init__(
        self, runtime: Runtime, folder: Path, arguments: Sequence[str], resources: Resources
    ) -> None:
        self._runtime = runtime
        (self._handle,) = runtime.spawn(_HOST, 1, resources)
        kept = {name: value for name, value in os.environ.items() if name.startswith("PZ_")}
        self._started: Any = runtime.call(
            self._handle,
            "start",
            str(folder.resolve()),
            list(arguments),
            os.getcwd(),
            kept,
            timeout=_FOREVER,
        )
        self._waiting = self._wait()
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs or waits for room."""
        if self._code is not None or not self._waiting.done():
            return self._code
        try:
            self._started.result()
            self._code = self._waiting.result()
        except LostError:
            self._code = _LOST
        else:
            if self._code is None:
                self._waiting = self._wait()
        return self._code

    def terminate(self) -> None:
        """Ask the process to save its state; one that waits for room ends at once."""
        if self._started.done():
            self._runtime.call(self._handle, "terminate", timeout=_FOREVER)
        else:
            self.kill()

    def wait(self, seconds: float) -> None:
        """Wait for the end, at most so long."""
        until = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)

    def kill(self) -> None:
        """End the actor and with it the process."""
        self._runtime.kill(self._handle)
        self._code = _LOST if self._code is None else self._code

    def _wait(self) -> Any:
        return self._runtime.call(self._handle, "wait", timeout=_FOREVER)


class Launcher:
    """Starts the runner's processes on a cluster.

    Args:
        runtime: of the cluster.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._total = runtime.total()

    def __call__(self, folder: Path, arguments: Sequence[str], job: Job | None) -> RemoteProcess:
        """Start a cell's process, or without a job one that builds a model."""
        folder.mkdir(parents=True, exist_ok=True)
        needed = Resources() if job is None else resources(job.spec, self._total)
        return RemoteProcess(self._runtime, folder, arguments, needed)


def resources(spec: CellSpec, total: Resources) -> Resources:
    """Return what a cell is given: a core, and the GPUs that its model's size asks for.

    Args:
        spec: of the cell.
        total: what the cluster has; more would be waited for without end.
    """
    return Resources(cpus=1.0, gpus=min(float(estimate(spec).gpus), total.gpus))
