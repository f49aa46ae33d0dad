"""Engines in child processes: answers, failures, limits, and that nothing is left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pz_envs.errors import ConfigError, EnvError, InfraError
from pz_envs.worker_child import encode, receive
from pz_envs.workers import Worker

_ENGINE = """
import os, sys, time

class Toy:
    def __init__(self, start=0):
        self.count = start

    def add(self, amount):
        self.count += amount
        return self.count

    def same(self, value):
        return value

    def hang(self):
        while True:
            pass

    def stop_listening(self):
        time.sleep(3600)

    def crash(self):
        os.abort()

    def raise_config(self):
        from pz_envs.errors import ConfigError
        raise ConfigError("no such thing")

    def raise_other(self):
        return 1 / 0

    def allocate(self, megabytes):
        return len(bytearray(megabytes * 2**20))

    def where(self):
        return [os.getcwd(), os.getpid()]

    def modules(self):
        return sorted(sys.modules)

    def shout(self):
        os.write(1, b"noise")
        return True

def broken():
    raise ValueError("cannot be built")
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "toy_engine.py").write_text(_ENGINE)
    monkeypatch.syspath_prepend(tmp_path)
    return "toy_engine:Toy"


def _gone(pid: int, within_s: float = 10.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_an_engine_keeps_its_state_between_calls(factory: str) -> None:
    with Worker(factory, {"start": 5}) as worker:
        assert worker.call("add", 1) == 6
        assert worker.call("add", 2) == 8
        assert worker.call("shout") is True
        assert worker.restarts == 0


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary(max_size=50),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(_values)
def test_messages_arrive_as_they_were_sent(value: Any) -> None:
    import socket

    left, right = socket.socketpair()
    with left, right:
        left.sendall(encode(value))
        assert receive(right) == value


def test_large_and_odd_values_cross_the_process_border(factory: str) -> None:
    with Worker(factory, {}) as worker:
        for value in ("x" * 3_000_000, b"\0\xff" * 2_000_000, "\ud800\0", {"a": [b"1", None]}):
            assert worker.call("same", value) == value


def test_an_engines_own_error_leaves_it_alive(factory: str) -> None:
    with Worker(factory, {}) as worker:
        worker.call("add", 3)
        with pytest.raises(ConfigError, match="no such thing"):
            worker.call("raise_config")
        with pytest.raises(EnvError, match="ZeroDivisionError"):
            worker.call("raise_other")
        with pytest.raises(EnvError, match="no attribute"):
            worker.call("missing_method")
        assert worker.call("add", 1) == 4


def test_an_engine_that_cannot_be_built_says_why(factory: str) -> None:
    del factory
    with Worker("toy_engine:broken", {}) as worker:
        with pytest.raises(EnvError, match="cannot be built"):
            worker.call("add", 1)
        assert worker.pid is None


def test_a_crashed_engine_is_replaced_and_counted(factory: str) -> None:
    with Worker(factory, {}) as worker:
        worker.call("add", 9)
        with pytest.raises(InfraError, match="signal 6"):
            worker.call("crash")
        assert worker.call("add", 1) == 1
        assert worker.restarts == 1


@pytest.mark.parametrize("method", ["hang", "stop_listening"])
def test_a_hung_engine_is_killed_in_time(factory: str, method: str) -> None:
    with Worker(factory, {}, timeout_s=0.5) as worker:
        worker.call("add", 1, timeout_s=30)
        pid = worker.pid
        began = time.monotonic()
        with pytest.raises(InfraError, match=r"within 0\.5 s"):
            worker.call(method)
        assert time.monotonic() - began < 5
        assert pid is not None
        assert _gone(pid)
        assert worker.call("add", 1, timeout_s=30) == 1
        assert worker.restarts == 1


def test_memory_beyond_the_cap_is_refused(factory: str) -> None:
    with Worker(factory, {}, memory_mb=400) as worker:
        assert worker.call("allocate", 50) == 50 * 2**20
        with pytest.raises(EnvError, match="MemoryError"):
            worker.call("allocate", 500)
        assert worker.call("add", 1) == 1


def test_a_child_lives_in_its_own_folder_and_close_removes_both(factory: str) -> None:
    worker = Worker(factory, {})
    folder, pid = worker.call("where")
    assert folder != os.getcwd()
    assert pid == worker.pid
    worker.close()
    worker.close()
    assert not Path(folder).exists()
    assert _gone(pid)


def test_a_collected_worker_takes_its_child_along(factory: str) -> None:
    worker = Worker(factory, {})
    pid = worker.call("where")[1]
    del worker
    gc.collect()
    assert _gone(pid)


def test_a_child_carries_neither_gymnasium_nor_torch(factory: str) -> None:
    with Worker(factory, {}) as worker:
        with pytest.raises(ConfigError):
            worker.call("raise_config")
        loaded = set(worker.call("modules"))
    assert "pz_envs.errors" in loaded
    assert not loaded & {"gymnasium", "torch", "numpy"}


@pytest.mark.parametrize("method", ["add", "hang"])
def test_a_child_dies_with_a_killed_parent_even_while_it_hangs(factory: str, method: str) -> None:
    script = (
        "import sys, threading\n"
        f"sys.path[:] = {sys.path!r}\n"
        "from pz_envs.workers import Worker\n"
        f"worker = Worker({factory!r}, {{}})\n"
        "print(*worker.call('where'), flush=True)\n"
        f"worker.call({method!r}, *([1] if {method!r} == 'add' else []))\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdin is not None
    folder, pid = parent.stdout.readline().split()
    time.sleep(0.2)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    parent.stdin.close()
    assert _gone(int(pid))
    end = time.monotonic() + 5
    while Path(folder).exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(folder).exists()
