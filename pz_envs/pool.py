"""Many environments over few processes, without a barrier: ``AsyncPool``.

Actions go to whichever environments the caller likes, and whatever is ready comes back. Each
process holds several environments and each environment steps on a thread of its own, so those that
wait do so at the same time. Episodes depend on seeds alone, not on the number of processes or on
scheduling. A step that raises, or a process that dies or hangs, costs the episodes concerned
(``truncated``, with ``info["extra"]["error"]``) and nothing else; the process is started again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from pz_envs import errors
from pz_envs.catalog import find
from pz_envs.errors import ConfigError, EnvError, InfraError
from pz_envs.pool_child import from_wire
from pz_envs.textenv import Info
from pz_envs.worker_child import encode, receive

_START_S = 180.0
_SEND_S = 60.0
_CLOSE_S = 10.0
_LOOK_S = 1.0
_BARREN_STARTS = 3
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from pz_envs.pool_child import main; main(*map(int, sys.argv[2:]))"
)
_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",  # else every thread keeps a heap of its own
}


class Batch(NamedTuple):
    """What ``AsyncPool.recv`` returns, in order of arrival; ``n`` is how many were ready.

    ids: [n] int64, which environments; observations: n texts; rewards: [n] float64;
    terminated, truncated: [n] bool, all False after a reset; infos: n dictionaries.
    """

    ids: NDArray[np.int64]
    observations: tuple[str, ...]
    rewards: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    infos: tuple[Info, ...]


class _Event(NamedTuple):
    number: int
    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: Info


@dataclass(slots=True)
class _Request:
    """What an environment was last asked; ``error`` is why the step before this reset failed."""

    action: str | None
    seed: int | None
    options: Mapping[str, Any] | None
    sent: float
    error: str | None = None


@dataclass(slots=True)
class _Seat:
    """One environment as the pool knows it."""

    number: int
    shard: _Shard
    stream: np.random.Generator | None = None
    next_seed: int = 0
    observation: str = ""
    info: Info | None = None
    over: bool = False
    lost: str | None = None
    request: _Request | None = None


@dataclass(slots=True, eq=False)
class _Shard:
    """One process and the environments that it holds: ``first`` and the ``count - 1`` after it."""

    first: int
    count: int
    process: subprocess.Popen[bytes] | None = None
    connection: socket.socket | None = None
    barren: int = 0


class AsyncPool:
    """Environments in other processes, to be sent to and received from in any order.

    An environment is sent nothing while its answer is out. ``autoreset_mode`` says what follows
    the end of an episode: with ``SAME_STEP`` the next one begins at once (the observation is its
    first, ``info["final_obs"]`` and ``info["final_info"]`` are the last of the old one); with
    ``NEXT_STEP`` the next action is ignored and answered by the reset; with ``DISABLED`` the
    environment waits for ``reset``.

    Args:
        env: an id of the table, or ``"package.module:name"`` of what returns a ``TextEnv``.
        num_envs: how many environments.
        processes: how many processes hold them; by default the number of usable cores.
        autoreset_mode: an ``AutoresetMode`` or its value.
        timeout_s: seconds that an answer may take before the environment's process is killed.
        **kwargs: for each environment, as for ``gymnasium.make``; only what JSON can say.

    Raises:
        ConfigError: no such id, or an argument is out of range.
        DataError: a data file that the environment needs is not here.
    """

    def __init__(
        self,
        env: str,
        num_envs: int,
        *,
        processes: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        timeout_s: float = 300.0,
        **kwargs: Any,
    ) -> None:
        self.env = find(env).id if "/" in env else env
        if num_envs < 1 or (processes is not None and processes < 1):
            raise ConfigError(
                f"num_envs={num_envs}, processes={processes}: allowed are 1 and above"
            )
        self.num_envs = num_envs
        try:
            self.autoreset_mode = AutoresetMode(autoreset_mode)
        except ValueError:
            allowed = ", ".join(mode.value for mode in AutoresetMode)
            raise ConfigError(f"autoreset_mode={autoreset_mode!r}: allowed are {allowed}") from None
        self.timeout_s = timeout_s
        self.restarts = 0
        self._kwargs = kwargs
        self._selector = selectors.DefaultSelector()
        self._ready: list[_Event] = []
        self._looked = time.monotonic()
        bounds = np.linspace(0, num_envs, min(processes or _cores(), num_envs) + 1).astype(int)
        self._shards = [
            _Shard(int(first), int(end - first)) for first, end in itertools.pairwise(bounds)
        ]
        self._seats = [
            _Seat(number, shard)
            for shard in self._shards
            for number in range(shard.first, shard.first + shard.count)
        ]
        self._end = weakref.finalize(self, _kill, os.getpid(), self._shards)
        try:
            for shard in self._shards:
                self._launch(shard)
            for shard in self._shards:
                self._await(shard)
        except BaseException:
            self._end()
            raise

    @property
    def waiting(self) -> int:
        """How many answers are still to come."""
        return len(self._ready) + sum(seat.request is not None for seat in self._seats)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: Mapping[str, Any] | None = None,
        ids: Sequence[int] | None = None,
    ) -> None:
        """Ask for new episodes; the answers come from ``recv``.

        Args:
            seed: an int gives environment ``i`` the seed ``seed + i``; a sequence one to each of
                ``ids``; None goes on with each environment's own stream.
            options: as for an environment's ``reset``.
            ids: which environments; None is all.

        Raises:
            EnvError: an environment's answer is still out, or the numbers of seeds and ids differ.
            ConfigError: ``options`` are not plain data.
        """
        seats = self._chosen(ids)
        if seed is None or isinstance(seed, int | np.integer):
            seeds = [None if seed is None else int(seed) + seat.number for seat in seats]
        else:
            seeds = list(seed)
        if len(seeds) != len(seats):
            raise EnvError(f"{len(seeds)} seeds were given for {len(seats)} environments")
        try:
            encode(options)
        except TypeError as error:
            raise ConfigError(f"options must be plain JSON data ({error})") from error
        for seat, own in zip(seats, seeds, strict=True):
            if own is not None:
                seat.stream = np_random(own)[0]
                seat.next_seed = own
            elif seat.stream is None:
                seat.stream = np_random()[0]
                _draw(seat)
            seat.lost = None
        self._ask([(seat, self._reset_request(seat, options)) for seat in seats])

    def send(self, actions: Sequence[str], ids: Sequence[int] | None = None) -> None:
        """Send one reply to each environment of ``ids`` (None: to all); does not wait.

        Raises:
            EnvError: the numbers differ, an action is no str, an environment's answer is still out,
                or its episode has not begun or is over (and nothing resets it).
        """
        seats = self._chosen(ids)
        if isinstance(actions, str) or len(actions) != len(seats):
            given = "one str" if isinstance(actions, str) else len(actions)
            raise EnvError(f"{given} actions were given for {len(seats)} environments")
        now = time.monotonic()
        requests = []
        for seat, action in zip(seats, actions, strict=True):
            if not isinstance(action, str):
                raise EnvError(f"an action must be a str, not {action!r:.80}")
            if seat.info is None:
                raise EnvError(f"environment {seat.number} has not begun; call reset() first")
            if not seat.over:
                again = self.autoreset_mode is AutoresetMode.SAME_STEP
                seed = seat.next_seed if again else None
                requests.append((seat, _Request(str(action), seed, None, now)))
            elif self.autoreset_mode is AutoresetMode.NEXT_STEP:
                requests.append((seat, self._reset_request(seat, None)))
            else:
                raise EnvError(f"the episode of environment {seat.number} is over; reset() it")
        self._ask(requests)

    def recv(self, min_ready: int = 1) -> Batch:
        """Wait until ``min_ready`` answers are there; returns all that are.

        Raises:
            EnvError: fewer answers than that are to come, or an environment cannot be reset.
            InfraError: the machine cannot run an environment's process.
        """
        if not 1 <= min_ready <= self.waiting:
            raise EnvError(f"recv({min_ready}): {self.waiting} answers are to come; send() first")
        self._listen(0.0)
        while len(self._ready) < min_ready:
            self._listen(_LOOK_S)
        events, self._ready = self._ready, []
        numbers, observations, rewards, terminated, truncated, infos = zip(*events, strict=True)
        return Batch(
            np.array(numbers, np.int64),
            observations,
            np.array(rewards, np.float64),
            np.array(terminated, np.bool_),
            np.array(truncated, np.bool_),
            infos,
        )

    def close(self) -> None:
        """Close every environment and end the processes; closing twice is fine."""
        if not self._end.alive:
            return
        self._selector.close()
        for shard in self._shards:
            if shard.connection is not None:
                shard.connection.close()
        end = time.monotonic() + _CLOSE_S
        for shard in self._shards:
            if shard.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    shard.process.wait(max(0.0, end - time.monotonic()))
        self._end()

    def _chosen(self, ids: Sequence[int] | None) -> list[_Seat]:
        """Return the seats of ``ids``, none of which may be busy."""
        if not self._end.alive:
            raise EnvError("the pool is closed; make another")
        numbers = range(self.num_envs) if ids is None else [int(number) for number in ids]
        unread = {event.number for event in self._ready}
        for number in numbers:
            if not 0 <= number < self.num_envs:
                raise EnvError(f"no environment {number}; there are 0 to {self.num_envs - 1}")
            if self._seats[number].request is not None or number in unread:
                raise EnvError(f"environment {number} has not answered yet; recv() first")
        if len(set(numbers)) != len(numbers):
            raise EnvError("an environment is named twice")
        return [self._seats[number] for number in numbers]

    def _reset_request(
        self, seat: _Seat, options: Mapping[str, Any] | None, error: str | None = None
    ) -> _Request:
        return _Request(None, seat.next_seed, options, time.monotonic(), error)

    def _ask(self, requests: Sequence[tuple[_Seat, _Request]]) -> None:
        """Send requests, one frame to a process; what a lost episode is asked fails at once."""
        frames: dict[_Shard, list[list[Any]]] = {}
        for seat, request in requests:
            if request.action is not None and seat.lost is not None:
                self._fail(seat, request, seat.lost)
                continue
            seat.request = request
            wire = [seat.number - seat.shard.first, request.action, request.seed, request.options]
            frames.setdefault(seat.shard, []).append(wire)
        for shard, frame in frames.items():
            assert shard.connection is not None
            try:
                shard.connection.settimeout(_SEND_S)
                shard.connection.sendall(encode(frame))
            except OSError:
                self._restart(shard, "died")

    def _fail(self, seat: _Seat, request: _Request, error: str) -> None:
        """Report a step as failed; in ``SAME_STEP`` once the next episode has begun."""
        seat.lost = None
        if request.seed is not None:
            self._ask([(seat, self._reset_request(seat, None, error))])
        else:
            seat.request = None
            seat.over = True
            self._ready.append(self._failure(seat, error))

    def _failure(self, seat: _Seat, error: str) -> _Event:
        assert seat.info is not None
        extra = {**seat.info["extra"], "error": error}
        info = {**seat.info, "valid": False, "extra": extra}
        return _Event(seat.number, seat.observation, 0.0, False, True, info)

    def _listen(self, timeout: float) -> None:
        """Take in what has arrived within ``timeout`` seconds; look after what takes too long."""
        arrived = self._selector.select(timeout)
        for key, _ in arrived:
            shard: _Shard = key.data
            if shard.connection is not key.fileobj:
                continue
            try:
                number, step, fresh = _received(shard.connection, _SEND_S)
            except OSError:
                self._restart(shard, "died")
            else:
                shard.barren = 0
                self._take(self._seats[shard.first + number], step, fresh)
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._looked, late = now, now - self.timeout_s
        for shard in self._shards:
            seats = self._seats[shard.first : shard.first + shard.count]
            if any(seat.request is not None and seat.request.sent < late for seat in seats):
                self._restart(shard, f"did not answer within {self.timeout_s:g} s")

    def _take(self, seat: _Seat, step: Any, fresh: Any) -> None:
        """Turn an answer into an event."""
        request = seat.request
        assert request is not None
        seat.request = None
        event: _Event | None = None
        if step is not None and step[0] == "failed":
            event = self._failure(seat, step[2])
        elif step is not None:
            _, observation, reward, terminated, truncated, info = step
            seat.observation, seat.info = observation, from_wire(info)
            event = _Event(seat.number, observation, reward, terminated, truncated, seat.info)
        elif request.error is not None:
            event = self._failure(seat, request.error)
        seat.over = event is not None and (event.terminated or event.truncated)
        if fresh is None:
            assert event is not None
            self._ready.append(event)
            return
        if fresh[0] == "broken":
            _, kind, message = fresh
            seat.info = None
            raise getattr(errors, kind)(message)
        _, seat.observation, info = fresh
        seat.info = from_wire(info)
        seat.over = False
        _draw(seat)
        if event is None:
            self._ready.append(_Event(seat.number, seat.observation, 0.0, False, False, seat.info))
        else:
            final = {"final_obs": event.observation, "final_info": event.info}
            self._ready.append(
                event._replace(observation=seat.observation, info={**seat.info, **final})
            )

    def _launch(self, shard: _Shard) -> None:
        """Start a shard's process; ``_await`` waits until its environments are made."""
        ours, theirs = socket.socketpair()
        path = json.dumps([os.path.abspath(entry) for entry in sys.path])
        command = [sys.executable, "-P", "-c", _CHILD, path, str(theirs.fileno()), str(os.getpid())]
        try:
            shard.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=os.environ | _SETTINGS,
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise InfraError(f"could not start a process for {self.env}: {error}") from error
        finally:
            theirs.close()
        shard.connection = ours
        try:
            first = {"env": self.env, "kwargs": self._kwargs, "count": shard.count}
            ours.settimeout(_START_S)
            ours.sendall(encode(first))
        except TypeError as error:
            raise ConfigError(f"arguments must be plain JSON data ({error})") from error
        except OSError as error:
            raise InfraError(f"the process of {self.env} died when it started") from error

    def _await(self, shard: _Shard) -> None:
        assert shard.connection is not None
        try:
            problem = _received(shard.connection, _START_S)
        except OSError as error:
            raise InfraError(
                f"the process of {self.env} died or hung before its environments were made "
                f"({type(error).__name__}); try it in this process: pz-envs play {self.env}"
            ) from error
        if problem is not None:
            kind, message = problem
            raise getattr(errors, kind)(f"{self.env} cannot be made: {message}")
        self._selector.register(shard.connection, selectors.EVENT_READ, shard)

    def _restart(self, shard: _Shard, why: str) -> None:
        """Start a shard's process again and see to what its environments were doing."""
        assert shard.connection is not None
        assert shard.process is not None
        self._selector.unregister(shard.connection)
        _kill(os.getpid(), [shard])
        ending = f" (signal {-shard.process.returncode})" if shard.process.returncode < 0 else ""
        error = f"the process of this environment {why}{ending}; the episode is lost"
        shard.barren += 1
        if shard.barren > _BARREN_STARTS:
            raise InfraError(
                f"the process of {self.env} {why}{ending} {shard.barren} times without an answer"
            )
        self.restarts += 1
        self._launch(shard)
        self._await(shard)
        resets = []
        for seat in self._seats[shard.first : shard.first + shard.count]:
            request, seat.request = seat.request, None
            if request is None:
                seat.lost = None if seat.over or seat.info is None else error
            elif request.action is not None:
                self._fail(seat, request, error)
            else:
                request.sent = time.monotonic()
                resets.append((seat, request))
        self._ask(resets)


def _draw(seat: _Seat) -> None:
    """Draw the seed of the episode after this one, as ``TextEnv.reset`` without a seed would."""
    assert seat.stream is not None
    seat.next_seed = int(seat.stream.integers(0, 2**31 - 1))


def _received(connection: socket.socket, limit: float) -> Any:
    end = time.monotonic() + limit
    return receive(connection, lambda: end - time.monotonic())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _kill(owner: int, shards: Sequence[_Shard]) -> None:
    """Kill and reap processes; a forked copy of the owner must leave them alone."""
    for shard in shards:
        if shard.connection is not None:
            shard.connection.close()
        if shard.process is not None and os.getpid() == owner:
            shard.process.kill()
            shard.process.wait()
