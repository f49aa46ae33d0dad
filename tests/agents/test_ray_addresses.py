"""Which cluster is joined, that nobody waits for one that is not there, and one that is lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import pytest

from pz_agents import cli
from pz_agents.runtime import cluster, open_runtime
from pz_envs.errors import ConfigError, InfraError

pytestmark = pytest.mark.timeout(300)

HTTP2 = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


@pytest.fixture
def noted(tmp_path, monkeypatch):
    """A machine on which `ray start` was never called, and where it would note a cluster."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


@contextlib.contextmanager
def listening(says: bytes | None):
    """Listen on a port of this machine, answering whoever comes with ``says``; None: never."""
    with socket.create_server(("", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(64)
                        connection.sendall(says or b"")

        if says is not None:
            threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)


def unused() -> str:
    with socket.create_server(("", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_auto_is_the_cluster_of_the_variable_or_else_of_ray_start(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster.find("auto", "10.0.0.2:6379") == "10.0.0.1:6379"
    assert cluster.find("10.0.0.3:6379", "10.0.0.2:6379") == "10.0.0.3:6379"
    monkeypatch.delenv("RAY_ADDRESS")
    assert cluster.find("auto", "10.0.0.2:6379") == "10.0.0.2:6379"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(ConfigError, match="RAY_ADDRESS says `local`"):
        cluster.find("auto", None)
    with pytest.raises(ConfigError, match="`somewhere`, which is not HOST:PORT"):
        cluster.find("somewhere", None)


def test_a_head_answers_or_it_is_said_why_not():
    with listening(HTTP2) as address:
        assert cluster.silence(address, 30.0) == ""
        cluster.check(address)
    with listening(b"HTTP/1.1 400 Bad Request\r\n") as address:
        assert cluster.silence(address, 30.0) == "something else listens there"
    with listening(None) as address:  # as a process that is stopped
        assert cluster.silence(address, 0.2) == "silent for 0.2 s"
    with pytest.raises(ConfigError, match=r"no Ray answers at 127.*refused.*ray start --head"):
        cluster.check(unused())


def test_a_head_that_is_silent_for_long_is_lost_for_good(monkeypatch):
    monkeypatch.setattr(cluster, "LOST_SECONDS", 0.3)
    with listening(HTTP2) as address:
        head = cluster.Head(address)
        head.check(now=True)
    head.check()  # asked a moment ago
    with pytest.raises(InfraError, match=f"{address} is lost: .*The same command goes on"):
        head.check(now=True)
    with pytest.raises(InfraError, match="is lost"):
        head.check()


def test_auto_joins_no_ray_of_another_command(noted):
    ray = pytest.importorskip("ray", reason="needs pz-agents[ray]")
    environment = {key: value for key, value in os.environ.items() if key != "RAY_TMPDIR"}
    other = subprocess.Popen(
        [sys.executable, "-c", OWN],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(ConfigError, match=r"`ray:auto` finds no cluster.*ray start --head"):
            open_runtime("ray:auto")
    finally:
        other.communicate("end\n", timeout=90)
    assert other.returncode == 0
    assert not ray.is_initialized()


OWN = """
from pz_agents.runtime import open_runtime
runtime = open_runtime("ray", cpus=1)
print("open", flush=True)
input()
runtime.close()
"""


def test_where_nobody_listens_the_command_says_so_and_exits_2(noted, tmp_path, monkeypatch, capsys):
    pytest.importorskip("ray", reason="needs pz-agents[ray]")
    port = unused().rpartition(":")[2]
    noted.write_text(f"127.0.0.1:{port}")
    words = ["train", "--env", "pz/Countdown-v0", "--steps", "1", "--out", str(tmp_path / "run")]
    for name in (f"ray:127.0.0.1:{port}", "ray:auto"):
        monkeypatch.setattr(sys, "argv", ["pz-agents", *words, "--runtime", name])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert f":{port} (Connection refused)" in capsys.readouterr().err


REWARD = """
import time
from pathlib import Path

HELD = Path(__file__).with_name("held")
calls = 0


def pay(prompts, completions, **columns):
    '''0 to 4; in the second step it waits while there is a file `held`.'''
    global calls
    calls += 1
    if calls == 2 and HELD.exists():
        HELD.with_name("reached").touch()
        while HELD.exists():
            time.sleep(0.05)
    return [float(sum(map(ord, str(each))) % 5) for each in completions]
"""

TRAIN = """
import sys
from pz_agents import cli
from pz_agents.runtime import cluster
cluster.LOST_SECONDS = 3.0
sys.argv[0] = "pz-agents"
cli.main()
"""


@contextlib.contextmanager
def head(environment: dict[str, str], port: str, log: Path):
    """A cluster of this machine, killed with all its processes at the end."""
    folder = tempfile.mkdtemp(prefix="pz-", dir="/tmp")  # sockets have short names only
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    command += ["--port", port, "--node-ip-address", "127.0.0.1", "--temp-dir", folder]
    command += ["--num-cpus", "1", "--object-store-memory", "100000000", "--disable-usage-stats"]
    command += ["--include-dashboard", "false", "--min-worker-port", "0", "--max-worker-port", "0"]
    with log.open("w") as file:
        started = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        wait_for(lambda: "Ray runtime started" in log.read_text(), started)
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(condition, process, seconds=120.0):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_whose_cluster_is_lost_stops_with_its_last_whole_step_and_goes_on(
    micro, tmp_path, monkeypatch
):
    pytest.importorskip("ray", reason="needs pz-agents[ray]")
    pytest.importorskip("trl", reason="needs pz-agents[train]")
    (tmp_path / "reward.py").write_text(REWARD)
    held = tmp_path / "held"
    held.touch()
    port, out = unused().rpartition(":")[2], tmp_path / "run"
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listen on the loopback alone
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    words = ["--env", "pz/Countdown-v0", "--model", str(micro), "--steps", "3", "--out", str(out)]
    for setting in (
        "groups_per_step=1",
        "group_size=2",
        "max_new_tokens=4",
        "max_turns=2",
        f"reward_function={tmp_path / 'reward.py'}:pay",
    ):
        words += ["--set", setting]
    with head(environment, port, tmp_path / "head.log") as cluster_head:
        command = [sys.executable, "-c", TRAIN, "train", *words]
        process = subprocess.Popen(
            [*command, "--runtime", f"ray:127.0.0.1:{port}"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            wait_for((tmp_path / "reached").exists, process)
            os.killpg(cluster_head.pid, signal.SIGKILL)
            held.unlink()
            _, told = process.communicate(timeout=120)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 1, told
    assert f"error: the Ray cluster at 127.0.0.1:{port} is lost" in told
    assert [path.name for path in (out / "checkpoints").glob("step*")] == ["step_000002"]
    lines = (out / "metrics.jsonl").read_text()
    assert lines.count("\n") == 2
    # The same command, for speed without a cluster; where a run plays may change.
    monkeypatch.setattr(sys, "argv", ["pz-agents", "train", *words, "--runtime", "local"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert (out / "metrics.jsonl").read_text().startswith(lines)
    assert (out / "metrics.jsonl").read_text().count("\n") == 3
