"""What a run does when the machine fails: kills, a full disk, a cut network, damaged files.

The faults are made, not imitated: real signals, a real file system without room, a real proxy
that closes its connections. Those of single parts are tested beside the parts; docs/reliability.md
lists them all.
"""

from __future__ import annotations

import contextlib
import gc
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs pz-agents[train]")

from pz_agents.models import load_model
from pz_agents.rollout import EpisodeSpec, ExperienceStore, Limits, run_episodes
from pz_agents.runtime import LostError
from pz_agents.sdk.loading import load_agent
from pz_agents.sdk.types import Action
from pz_agents.training import checkpoint
from pz_agents.training.monitors import read_metrics
from pz_agents.training.run import train
from pz_agents.training.settings import TrainSettings
from pz_agents.training.worker import Engine, pack_files
from pz_envs.errors import DataError, InfraError
from pz_envs.seeding import derive_seed
from pz_envs.textenv import Outcome, TextEnv
from tests.support.network import VARIABLES, Proxy, serving

pytestmark = pytest.mark.timeout(600)

GROUPS = 2


class ParityEnv(TextEnv):
    """Pays 1 for a reply of an even number of characters, other than none."""

    family = "toy"

    def _start(self, seed, options):
        self._max_score, self._task_id = 1.0, f"parity-{seed % 7}"
        return Outcome(f"Go {seed % 7}.", 0.0)

    def _advance(self, command):
        reward = float(len(command) % 2 == 0)
        return Outcome("Done.", reward, reward, terminated=True, success=reward == 1)


@pytest.fixture(autouse=True)
def _toy_env_and_one_thread(monkeypatch):
    monkeypatch.setattr("pz_envs.catalog.make_env", lambda env_id, **kwargs: ParityEnv())
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def settings(model: Path | str, **changes: Any) -> TrainSettings:
    given = {
        "env": "pz/Countdown-v0",
        "model": str(model),
        "steps": 4,
        "groups_per_step": GROUPS,
        "group_size": 4,
        "learning_rate": 1e-3,
        "max_new_tokens": 6,
        "max_turns": 4,
        "save_every": 1,
        **changes,
    }
    return TrainSettings(**given)


def weights(folder: Path) -> bytes:
    return (folder / "policy" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def straight(micro, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pz_envs.catalog.make_env", lambda env_id, **kwargs: ParityEnv())
        train(settings(micro), folder)
    return folder


# E24: damaged checkpoints.


def test_damage_to_any_file_of_a_real_checkpoint_is_noticed_and_the_older_one_taken(
    straight, tmp_path, caplog
):
    newest = checkpoint.newest(straight / "checkpoints")
    names = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    assert len(names) >= 7
    for number, name in enumerate(names):
        copy = tmp_path / str(number)
        shutil.copytree(straight / "checkpoints", copy)
        path = copy / newest.name / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data if number % 2 else data[:-1])
        caplog.clear()
        assert checkpoint.step_of(checkpoint.newest(copy)) == 3
        assert str(name) in caplog.text
        if number == 0:
            for other in checkpoint.steps_in(copy):
                (other / "training_state.pt").write_bytes(b"")
            with pytest.raises(DataError, match=r"training_state\.pt"):
                checkpoint.newest(copy)


# E25: a full disk.


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A file system of its own with so little room."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
    )
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        gc.collect()
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Take the disk's room but for ``leave`` bytes."""
    path = folder / "filler"
    with open(path, "wb") as file:
        file.write(b"\0" * max(shutil.disk_usage(folder).free - leave, 0))
    return path


def test_without_room_for_a_checkpoint_the_run_goes_on_and_saves_when_there_is(
    micro, straight, tmp_path, caplog
):
    seen = {}

    def on_progress(step, steps, metrics):
        if step == 1:
            seen["filler"] = fill(disk, 150_000)
        elif step == 3:
            seen["kept"] = [path.name for path in checkpoint.steps_in(disk / "run/checkpoints")]
            seen["filler"].unlink()

    disk = tmp_path / "disk"
    with small_disk(disk, "24m"):
        train(settings(micro, keep_checkpoints=1), disk / "run", on_progress=on_progress)
        assert seen["kept"] == ["step_000001"]
        assert caplog.text.count("no room for a checkpoint") == 2
        assert weights(disk / "run") == weights(straight)
        assert checkpoint.problems(disk / "run" / "policy") == []


def test_a_disk_that_is_full_stops_the_run_cleanly_and_it_goes_on_later(micro, straight, tmp_path):
    filler = []

    def on_progress(step, steps, metrics):
        if step == 2 and not filler:
            filler.append(fill(disk, 0))

    disk = tmp_path / "disk"
    with small_disk(disk, "24m"):
        with pytest.raises(InfraError, match=r"disk of .* is full .* the same command goes on"):
            train(settings(micro), disk / "run", on_progress=on_progress)
        newest = checkpoint.newest(disk / "run" / "checkpoints")
        assert newest.name == "step_000002"
        filler[0].unlink()
        train(settings(micro), disk / "run")
        assert weights(disk / "run") == weights(straight)
        lines = read_metrics(disk / "run" / "metrics.jsonl")
        assert [line["step"] for line in lines] == [1, 2, 3, 4]


# E28: weights that do not arrive whole.


def test_an_engine_never_serves_weights_that_did_not_arrive_whole(micro, straight):
    engine, learned = Engine(str(micro), 1, 0), load_model(str(straight / "policy"))
    prompt = learned.encode("Go 3.").astype("int32").tobytes()
    candidate = [learned.encode("ab").astype("int32").tobytes()]
    with pytest.raises(LostError, match="this engine has -1"):
        engine.score(prompt, candidate, 0)
    packed = pack_files(learned.network.save_pretrained)
    assert engine.load(packed, 4) == 4
    served = engine.score(prompt, candidate, 4)
    expected = learned.score(learned.encode("Go 3."), [learned.encode("ab")])
    assert served == [expected[0].tobytes()]
    for broken in (packed[: len(packed) // 2], b"", packed[:-200] + b"\xff" * 200):
        with pytest.raises(Exception, match=r".+"):
            engine.load(broken, 5)
        with pytest.raises(LostError, match="this engine has -1"):
            engine.score(prompt, candidate, 4)
    engine.load(packed, 5)
    assert engine.score(prompt, candidate, 5) == served


# E33: two runs in one folder.


def test_a_second_run_in_the_same_folder_is_refused_and_a_dead_one_is_no_obstacle(micro, tmp_path):
    holder = (
        "import sys, time; from pz_agents.rollout import ExperienceStore;"
        "store = ExperienceStore(sys.argv[1]); print('held', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "experience.db")], stdout=subprocess.PIPE
    )
    try:
        assert child.stdout.readline() == b"held\n"
        told = rf"open in process {child.pid} on {os.uname().nodename} that plays and trains"
        (tmp_path / "config.json").write_text("of the run that goes on")
        half = tmp_path / "checkpoints" / "step_000001"
        half.mkdir(parents=True)
        with pytest.raises(InfraError, match=told):
            train(settings(micro, steps=1), tmp_path)
        assert (tmp_path / "config.json").read_text() == "of the run that goes on"
        assert [each.name for each in half.parent.iterdir()] == ["step_000001"]
        shutil.rmtree(half.parent)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    train(settings(micro, steps=1), tmp_path)


# E19: an environment that hangs.


class HangingEnv(ParityEnv):
    """Task 7's step does not return until it is told to."""

    go_on = threading.Event()

    def _start(self, seed, options):
        self._hangs = seed == derive_seed("toy", 7)
        return super()._start(seed, options)

    def _advance(self, command):
        if self._hangs:
            assert self.go_on.wait(300)
        return super()._advance(command)


def test_while_one_environment_hangs_every_other_episode_ends():
    specs = [EpisodeSpec(str(number), "toy", number) for number in range(40)]
    HangingEnv.go_on.clear()
    played = run_episodes(
        Counts(),
        specs,
        make_env=lambda env_id: HangingEnv(),
        limits=Limits(turns=2),
        seed=0,
        concurrency=2,
    )
    # With nothing but order: it goes on only when the 39 others are over.
    done = [next(played).key for _ in range(39)]
    assert sorted([*done, "7"], key=int) == [spec.key for spec in specs]
    HangingEnv.go_on.set()
    assert [item.key for item in played] == ["7"]


# E21: the network between an agent and its engine.


class Replies(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server that counts the requests it has answered."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        asked = json.loads(self.rfile.read(length))
        self.server.answered.append(asked["seed"])
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "ab"},
        }
        body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        data = json.dumps({**body, "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("seconds", [4.0, pytest.param(30.0, marks=pytest.mark.slow)])
def test_episodes_survive_a_network_that_is_away_for_seconds(monkeypatch, seconds):
    pytest.importorskip("openai", reason="needs pz-agents[openai]")
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    upstream = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Replies)
    upstream.answered = []
    with serving(upstream), serving(Proxy(upstream.server_address[1])) as proxy:
        model = load_model(f"openai:m@http://127.0.0.1:{proxy.port}/v1?retries=12&timeout=20")
        agent = load_agent("zeroshot", model=model, kwargs={"max_new_tokens": 8})
        specs = [EpisodeSpec(str(number), "toy", number) for number in range(40)]
        played = run_episodes(
            agent,
            specs,
            make_env=lambda env_id: ParityEnv(),
            limits=Limits(turns=2),
            seed=0,
            concurrency=4,
        )
        done = [next(played) for _ in range(8)]
        proxy.cut_all()
        back = threading.Timer(seconds, lambda: setattr(proxy, "cut", False))
        back.start()
        began = time.monotonic()
        done += list(played)
        back.join()
        assert time.monotonic() - began >= seconds / 2
    assert [item.status for item in done] == ["ok"] * 40
    assert sorted(int(item.key) for item in done) == list(range(40))
    assert proxy.refused >= 2, "it was tried again and again"
    assert len(set(upstream.answered)) == 40


# E30: a long run.


class Counts:
    """An agent without a model."""

    def act(self, turns):
        return [Action("ab" if turn.seed % 2 else "abc") for turn in turns]


def resources_held() -> tuple[float, int, int]:
    """Return MiB resident, open files and threads of this process."""
    status = Path("/proc/self/status").read_text()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    threads = int(status.split("Threads:")[1].split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")), threads


@pytest.mark.slow
def test_two_thousand_episodes_leave_no_memory_files_or_threads_behind(tmp_path):
    held = []
    with ExperienceStore(tmp_path / "experience.db") as store:
        for step in range(1, 41):
            specs = [
                EpisodeSpec(f"{step}/{n}", "toy", n, group_id=f"{step}/{n // 5}", attempt=n % 5)
                for n in range(50)
            ]
            played = run_episodes(
                Counts(),
                specs,
                make_env=lambda env_id: ParityEnv(),
                limits=Limits(turns=2),
                seed=step,
                concurrency=16,
            )
            store.append(list(played), step - 1)
            store.ack(store.lease(10), step)
            gc.collect()
            held.append(resources_held())
        assert store.counts()["consumed"] == 400
    memory, files, threads = (last - first for first, last in zip(held[9], held[-1], strict=True))
    assert (files, threads) == (0, 0)
    assert memory < 16, "of 1,500 episodes after the first 500"


# E18: the driver of a fleet.


DRIVER = """
import sys, time
from pathlib import Path
from pz_agents.training.modes import train_both
from pz_agents.training.settings import TrainSettings
import pz_agents.training.run
settings = TrainSettings.model_validate_json(sys.argv[1])
folder = Path(sys.argv[2])

def on_progress(step, steps, metrics):
    print(step, flush=True)

train_both(settings, folder, on_progress=on_progress)
"""


PROCESSES = {"local": ["local_child"], "ray": ["raylet", "gcs_server", "ray::Actor"]}
"""Words of the commands of what a driver starts."""

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Two that Ray starts beside each raylet, which give up a minute after it has gone."""


def descendants_of(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found[1:]


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def gone(pid: int) -> bool:
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True


def wait_until_gone(pids: list[int]) -> None:
    give_up = time.monotonic() + 180
    while left := [pid for pid in pids if not gone(pid)]:
        assert time.monotonic() < give_up, list(map(command_of, left))
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["local", "ray"])
def test_a_driver_killed_with_sigkill_takes_all_its_processes_along_and_the_run_goes_on(
    micro, tmp_path, runtime
):
    if runtime == "ray":  # one of the run's own: the raylet, its store and its servers go as well
        pytest.importorskip("ray", reason="needs pz-agents[ray]")
    changes = {"workers": 1, "max_staleness": 1, "group_size": 2, "max_turns": 1}
    chosen = settings(micro, runtime=runtime, **changes)
    command = [sys.executable, "-c", textwrap.dedent(DRIVER)]
    command += [chosen.model_dump_json(), str(tmp_path / "run")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "1\n"
        assert first.stdout.readline() == "2\n"
        processes = {pid: command_of(pid) for pid in descendants_of(first.pid)}
        for name in PROCESSES[runtime]:
            assert any(name in command for command in processes.values()), processes
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.stdout.close()
    agents = [pid for pid, command in processes.items() if command.startswith(AGENTS)]
    wait_until_gone([pid for pid in processes if pid not in agents])
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    with ExperienceStore(tmp_path / "run" / "experience.db") as store:
        counts = store.counts()
        keys = [item.key for item in store.trajectories()]
    assert counts["consumed"] == 4 * GROUPS
    assert counts["leased"] == 0
    assert len(keys) == len(set(keys))
    wait_until_gone(agents)
