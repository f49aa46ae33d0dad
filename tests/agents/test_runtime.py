"""The runtimes' contract, and training over both: equal episodes, equal weights, whatever dies.

Everything that needs Ray is in this file, so that one Ray serves it all.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs pz-agents[train]")

from pz_agents import cli
from pz_agents.config import parse_settings
from pz_agents.errors import FailureBudgetError, ModelError
from pz_agents.rollout import ExperienceStore
from pz_agents.runtime import Handle, LostError, Resources, connect, open_runtime
from pz_agents.sdk.types import Sample
from pz_agents.training import checkpoint, modes
from pz_agents.training.fleet import Fleet, capacity
from pz_agents.training.monitors import read_metrics
from pz_agents.training.run import train
from pz_agents.training.settings import TrainSettings
from pz_agents.tune import parse_draw, tune
from pz_envs.errors import ConfigError, InfraError

pytestmark = pytest.mark.timeout(280)

GROUPS, ATTEMPTS = 4, 4
HALF = Resources(cpus=0.1)

TOY = '''
import os
import time

import pz_envs.catalog
from pz_agents.errors import ModelError
from pz_agents.runtime import connect
from pz_agents.training.worker import Engine, RolloutWorker
from pz_envs.textenv import Outcome, TextEnv


ENGINE_MARK = os.path.join(os.path.dirname(__file__), "engine-mark")


def first_to_ask(mark):
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


class ParityEnv(TextEnv):
    """Two turns; pays 1 for a reply of an even number of characters, other than none."""

    family = "toy"

    def __init__(self, fault="", mark="", **kwargs):
        super().__init__()
        self._fault, self._mark = fault, mark

    def _start(self, seed, options):
        self._seed, self._turns, self._total, self._max_score = seed, 0, 0.0, 2.0
        self._task_id = f"parity-{seed % 3}"
        return Outcome(f"Go {seed % 7}.", 0.0)

    def _advance(self, command):
        self._turns += 1
        if "die" in self._fault and self._turns == 2 and first_to_ask(self._mark):
            os.kill(os.getpid(), 9)
        if self._fault == "always" or ("third" in self._fault and self._seed % 3 == 0):
            raise RuntimeError("the engine broke")
        reward = float(len(command) % 2 == 0)
        self._total += reward
        over = self._turns == 2
        return Outcome("Again.", self._total, reward, terminated=over, success=self._total == 2)


def make_env(env_id, **kwargs):
    return ParityEnv(**kwargs)


class Worker(RolloutWorker):
    def __init__(self, **kwargs):
        pz_envs.catalog.make_env = make_env
        super().__init__(**kwargs)


class DyingEngine(Engine):
    """Dies by SIGKILL in the middle of its third request, once."""

    asked = 0

    def generate(self, requests, wanted):
        self.asked += 1
        done = super().generate(requests, wanted)
        if self.asked == 3 and first_to_ask(ENGINE_MARK):
            os.kill(os.getpid(), 9)
        return done


class HangingWorker:
    """Plays nothing; hangs the first time that it is asked."""

    def __init__(self, settings, engines, number):
        self.mark = settings["env_kwargs"]["mark"]

    def play(self, number, places, version, weights):
        if first_to_ask(self.mark):
            time.sleep(3600)
        return []


class Thing:
    def __init__(self, number, base=0):
        if base < 0:
            raise ModelError(f"base is {base}")
        self.number, self.total = number, base

    def add(self, amount):
        self.total += amount
        return [self.number, self.total]

    def size(self, data):
        return len(data)

    def back(self, value):
        return value

    def sleep(self, seconds):
        time.sleep(seconds)
        return seconds

    def stop(self):
        os._exit(3)

    def raise_model_error(self):
        raise ModelError("no such model")

    def raise_key_error(self):
        raise KeyError("x")

    def ask(self, address):
        return connect(address).call("add", 10)
'''


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A module that processes of both runtimes can import."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "pz_toy.py").write_text(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import pz_toy

        yield pz_toy


@pytest.fixture(scope="module", params=["local", "ray"])
def runtime_name(request, toy):
    """Both runtimes; Ray is started once for all the tests of this file."""
    if request.param == "local":
        yield "local"
        return
    pytest.importorskip("ray", reason="needs pz-agents[ray]")
    session = open_runtime("ray", cpus=2)
    yield "ray"
    session.close()


@pytest.fixture
def runtime(runtime_name):
    with contextlib.closing(open_runtime(runtime_name)) as opened:
        yield opened


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(condition, seconds=60.0):
    give_up = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < give_up, "waited too long"
        time.sleep(0.01)
    return found


# The contract.


def test_objects_keep_their_state_and_their_numbers_and_answer_in_order(runtime):
    handles = runtime.spawn("pz_toy:Thing", 2, HALF, {"base": 100})
    calls = [runtime.call(handle, "add", n) for handle in handles for n in (1, 2, 3)]
    totals = [call.result() for call in calls]
    assert totals == [[0, 101], [0, 103], [0, 106], [1, 101], [1, 103], [1, 106]]
    assert all(call.done() for call in calls)
    assert runtime.watch() == []
    pids = [runtime.pid(handle) for handle in handles]
    assert os.getpid() not in pids
    runtime.close()
    wait_for(lambda: not any(map(is_alive, pids)))


def test_plain_data_and_shared_bytes_arrive_as_they_were_sent(runtime):
    (handle,) = runtime.spawn("pz_toy:Thing", 1, HALF)
    value = {"a": [1, 2.5, None, True, "é"], "b": b"\x00\xff" * 1000}
    assert runtime.call(handle, "back", value).result() == value
    shared = runtime.share(b"w" * 3_000_000)
    assert runtime.call(handle, "size", shared).result() == 3_000_000


def test_one_object_asks_another_by_its_address(runtime):
    first, second = runtime.spawn("pz_toy:Thing", 2, HALF)
    runtime.call(second, "add", 0).result()  # it listens: only then may others ask
    assert runtime.call(first, "ask", second.address).result() == [1, 10]
    assert connect(second.address).call("add", 1) == [1, 11]


def test_errors_of_pz_arrive_as_what_they_are_and_the_object_lives_on(runtime):
    (handle,) = runtime.spawn("pz_toy:Thing", 1, HALF)
    with pytest.raises(ModelError, match="no such model"):
        runtime.call(handle, "raise_model_error").result()
    with pytest.raises(InfraError, match=r"`raise_key_error` of thing-0 failed: KeyError"):
        runtime.call(handle, "raise_key_error").result()
    assert runtime.call(handle, "add", 1).result() == [0, 1]
    (broken,) = runtime.spawn("pz_toy:Thing", 1, HALF, {"base": -1})
    with pytest.raises(ModelError, match="base is -1"):
        runtime.call(broken, "add", 1).result()


def test_a_killed_process_is_told_of_once_and_another_takes_its_address(runtime):
    (handle,) = runtime.spawn("pz_toy:Thing", 1, HALF, {"base": 5})
    assert runtime.call(handle, "add", 1).result() == [0, 6]
    call = runtime.call(handle, "sleep", 600)
    before = runtime.pid(handle)
    os.kill(before, signal.SIGKILL)
    with pytest.raises(LostError, match="died"):
        call.result()
    (event,) = wait_for(runtime.watch)
    assert event.handle == handle
    assert runtime.watch() == []
    runtime.restart(handle)
    assert runtime.call(handle, "add", 1).result() == [0, 6]
    assert runtime.pid(handle) != before
    assert connect(handle.address).call("add", 1) == [0, 7]
    runtime.kill(handle)
    with pytest.raises(LostError):
        runtime.call(handle, "add", 1).result()
    assert runtime.watch() == []


def test_a_call_that_takes_too_long_is_lost_and_its_process_killed(runtime):
    slow, quick = runtime.spawn("pz_toy:Thing", 2, HALF)
    assert runtime.call(slow, "add", 1).result() == [0, 1]
    pid = runtime.pid(slow)
    call = runtime.call(slow, "sleep", 600, timeout=1.0)
    with pytest.raises(LostError, match=r"did not answer `sleep` within 1 s and was killed"):
        call.result()
    wait_for(lambda: not is_alive(pid))
    assert runtime.call(quick, "add", 1).result() == [1, 1]


def test_nobody_answers_at_an_address_without_a_process(runtime):
    kind = "ray:pz-none/thing" if "ray" in type(runtime).__name__.lower() else "local:/nowhere"
    with pytest.raises(LostError):
        connect(Handle("x", kind).address).call("add", 1)


def test_there_is_no_other_runtime():
    with pytest.raises(ConfigError, match="no runtime `dask`"):
        open_runtime("dask")


def test_only_one_file_names_ray():
    root = Path(modes.__file__).parents[2]

    def text(path):
        return path.read_text("utf-8")

    users = {
        path.relative_to(root).as_posix()
        for floor in ("pz_envs", "pz_agents", "pz_bench")
        for path in (root / floor).rglob("*.py")
        if any(
            line.strip().startswith(("import ray", "from ray"))
            or ('"ray"' in line and "require" in line)
            for line in path.read_text().splitlines()
        )
    }
    assert users == {"pz_agents/runtime/ray.py"}


# Training.


def settings(model: Path | str, **changes: Any) -> TrainSettings:
    given = {
        "env": "pz/Countdown-v0",
        "model": str(model),
        "steps": 3,
        "groups_per_step": GROUPS,
        "group_size": ATTEMPTS,
        "learning_rate": 1e-3,
        "max_new_tokens": 6,
        "max_turns": 4,
        "save_every": 1,
        "resources": {"worker": {"cpus": 0.1}, "engine": {"cpus": 0.1}},
        **changes,
    }
    return TrainSettings(**given)


@pytest.fixture(autouse=True)
def _toy_fleet_and_one_thread(monkeypatch, toy):
    monkeypatch.setattr("pz_agents.training.fleet.WORKER", "pz_toy:Worker")
    monkeypatch.setattr("pz_envs.catalog.make_env", toy.make_env)
    # Drawing takes longer than the rest of so small a run.
    monkeypatch.setattr("pz_agents.training.run.plot_metrics", lambda metrics, path: [])
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def in_turn(micro, toy, tmp_path_factory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("in-turn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pz_envs.catalog.make_env", toy.make_env)
        patch.setattr("pz_agents.training.run.plot_metrics", lambda metrics, path: [])
        modes.train_both(settings(micro), folder)
    return folder


def stored(folder: Path) -> dict[str, Any]:
    with ExperienceStore(folder / "experience.db") as store:
        return {item.key: item for item in store.trajectories()}


def same_episodes(left: Path, right: Path) -> None:
    """Equal but for log-probs, which batches of other sizes round differently."""
    ours, theirs = stored(left), stored(right)
    assert ours.keys() == theirs.keys()
    for key, item in ours.items():
        other = theirs[key]
        assert (item.reward, item.success, item.status) == (
            other.reward,
            other.success,
            other.status,
        )
        for one, two in zip(item.steps, other.steps, strict=True):
            assert (one.observation, one.action, one.reward) == (
                two.observation,
                two.action,
                two.reward,
            )
            assert isinstance(one.sample, Sample)
            assert one.sample.token_ids.tolist() == two.sample.token_ids.tolist()
            assert one.sample.version == two.sample.version
            assert abs(one.sample.log_probs - two.sample.log_probs).max() < 1e-5


def weights_apart(left: Path, right: Path) -> float:
    from safetensors.torch import load_file

    one, two = (load_file(folder / "policy" / "model.safetensors") for folder in (left, right))
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def uses(folder: Path) -> list[tuple[str, int]]:
    with contextlib.closing(sqlite3.connect(folder / "experience.db")) as db:
        return list(db.execute("SELECT group_id, step FROM uses ORDER BY group_id, step"))


def each_group_was_used_once(folder: Path, steps: int = 3) -> None:
    names = [name for name, _ in uses(folder)]
    assert len(names) == len(set(names)) == steps * GROUPS
    keys = list(stored(folder))
    assert len(keys) == len(set(keys))


class StopHereError(Exception):
    pass


def stop_after_the_first(step, steps, metrics):
    raise StopHereError


def test_workers_play_the_episodes_of_one_process_though_one_is_killed_in_an_episode(
    runtime_name, micro, in_turn, tmp_path, caplog
):
    # E14. The run begins in one process and goes on with workers; the mark makes one of them die
    # by SIGKILL in its second turn.
    mark = tmp_path / "mark"
    faulty = {"env_kwargs": {"fault": "die", "mark": str(mark)}}
    mark.touch()
    with pytest.raises(StopHereError):
        train(settings(micro, **faulty), tmp_path / "run", on_progress=stop_after_the_first)
    mark.unlink()
    chosen = settings(micro, runtime=runtime_name, workers=2, **faulty)
    modes.train_both(chosen, tmp_path / "run")
    assert mark.exists()
    assert caplog.text.count("another plays its share again") == 1
    same_episodes(in_turn, tmp_path / "run")
    assert weights_apart(in_turn, tmp_path / "run") < 1e-5
    versions = [line["version"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert versions == [0.0, 1.0, 2.0], "every step's weights played the next"
    each_group_was_used_once(tmp_path / "run")


def test_an_engine_killed_in_a_request_comes_back_with_the_weights_of_now(
    runtime_name, micro, in_turn, toy, tmp_path, monkeypatch, caplog
):
    # E15. The third request is of the second step: what answers it must have those weights.
    monkeypatch.setattr("pz_agents.training.fleet.ENGINE", "pz_toy:DyingEngine")
    mark = Path(toy.ENGINE_MARK)
    mark.unlink(missing_ok=True)
    modes.train_both(settings(micro, runtime=runtime_name, workers=1, engines=1), tmp_path / "run")
    assert mark.exists()
    assert caplog.text.count("it is replaced") == 1
    same_episodes(in_turn, tmp_path / "run")
    assert weights_apart(in_turn, tmp_path / "run") < 1e-5


def test_where_every_episode_fails_the_run_ends_within_its_budget(micro, tmp_path):
    faulty = {"env_kwargs": {"fault": "always"}, "steps": 50}
    with pytest.raises(FailureBudgetError, match=r"20 episodes in a row failed") as ended:
        modes.train_both(settings(micro, workers=1, **faulty), tmp_path)
    assert "the engine broke" in str(ended.value)

    assert len(stored(tmp_path)) == GROUPS * ATTEMPTS, "the second batch was the last"


def test_one_step_ahead_among_failures_each_group_is_used_once_and_none_is_too_old(
    runtime_name, micro, tmp_path
):
    # E14 and E20, played ahead: a third of the tasks fail, and the worker is killed once.
    mark = tmp_path / "mark"
    faulty = {"env_kwargs": {"fault": "die third", "mark": str(mark)}}
    chosen = settings(micro, runtime=runtime_name, workers=1, max_staleness=1, steps=4, **faulty)
    modes.train_both(chosen, tmp_path / "run")
    assert mark.exists()
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(0 <= line["staleness"] <= 1 for line in lines)
    assert any(line["staleness"] > 0 for line in lines), "something was played ahead"
    assert sum(line["stale_groups"] for line in lines) == 0
    each_group_was_used_once(tmp_path / "run", steps=4)
    played = stored(tmp_path / "run").values()
    failed = [item for item in played if item.status == "failed"]
    assert {i.key for i in failed} == {i.key for i in played if i.task_id == "parity-0"} != set()
    used = {name for name, _ in uses(tmp_path / "run")}
    assert sum(line["failed"] for line in lines) == sum(i.group_id in used for i in failed)


def test_a_worker_that_hangs_is_killed_and_its_share_played_by_another(
    runtime, micro, tmp_path, monkeypatch
):
    # E19.
    monkeypatch.setattr("pz_agents.training.fleet.WORKER", "pz_toy:HangingWorker")
    mark = {"mark": str(tmp_path / "mark")}
    fleet = Fleet(settings(micro, workers=2, env_kwargs=mark, worker_seconds=20.0), runtime)
    fleet.publish(lambda folder: (folder / "x").write_text("w"), version=0, step=0)
    began = time.monotonic()
    assert fleet.play(1) == []
    assert time.monotonic() - began >= 20.0
    # One that starts slowly on a busy machine may be taken for hung as well.
    assert 1 <= fleet.replaced <= 3


@pytest.mark.slow
def test_a_node_that_is_killed_is_replaced_and_the_run_over_two_goes_on(micro, tmp_path):
    pytest.importorskip("ray", reason="needs pz-agents[ray]")
    script = Path(__file__).parents[2] / "benchmarks" / "ray_two_nodes.py"
    command = [sys.executable, str(script), str(micro), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=270)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["steps"] == [1, 2, 3, 4]
    # More than once where Ray placed the engine before it knew that its node had gone.
    assert 1 <= told["replaced"] <= 5
    assert told["before"]["worker"] == told["after"]["worker"]
    assert len({told["before"]["worker"], told["before"]["engine"], told["after"]["engine"]}) == 3


# What needs no process.


def test_admission_is_the_published_formula():
    rows = [
        (0, 0, 8, 0, 0, 64),
        (2, 0, 8, 16, 8, 64),
        (2, 3, 8, 40, 8, 64),
        (4, 10, 32, 352, 100, 128),
    ]
    names = ("staleness", "version", "batch", "accepted", "running", "max_concurrent")
    found = [capacity(**dict(zip(names, row, strict=True))) for row in rows]
    assert found == [8, 0, 0, 28]


def test_a_resumed_run_begins_no_burst():
    # E27: accepted is version * batch where nothing is stored, whatever was played before.
    new = {"max_concurrent": 10**6, "running": 0, "staleness": 2, "batch": 8}
    assert capacity(**new, version=100, accepted=800) == 24
    assert capacity(**new, version=100, accepted=0) == 824, "what a lost counter would begin"
    # A store that still holds more than may be used begins nothing.
    assert capacity(**new, version=100, accepted=800 + 40) == 0


def test_an_adapter_is_published_alone(micro, tmp_path):
    from pz_agents.models import load_model
    from pz_agents.models.adapters import add_adapter
    from pz_agents.training.worker import load_files, pack_files

    policy, other = load_model(str(micro)), load_model(str(micro))
    whole = len(pack_files(policy.network.save_pretrained))
    add_adapter(policy.network, 2, seed=0)
    with torch.no_grad():
        for name, parameter in policy.network.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    packed = pack_files(policy.network.save_pretrained)
    assert len(packed) < whole / 2
    prefix, candidates = policy.encode("Go 3."), [policy.encode("ab"), policy.encode("c")]
    before = other.score(prefix, candidates)
    load_files(other, packed, version=7)
    assert other.version == 7
    for one, two, old in zip(
        policy.score(prefix, candidates), other.score(prefix, candidates), before, strict=True
    ):
        assert abs(one - two).max() < 1e-4 < abs(one - old).max()


def test_settings_of_the_runtime_may_change_and_are_read_from_the_command_line(tmp_path, capsys):
    arguments = ["pz-agents", "train", "--env", "pz/Countdown-v0", "--steps", "1", "--print-config"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*arguments, "--runtime", "ray:auto", "--workers", "3"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code
    told = json.loads(capsys.readouterr().out)
    assert (told["runtime"], told["workers"]) == ("ray:auto", 3)
    with pytest.raises(ConfigError, match="runtime"):
        parse_settings(TrainSettings, {"env": "x", "steps": 1, "runtime": "dask"}, "test")


def test_the_failure_budget_s_exit_code_is_four(micro, tmp_path, monkeypatch, toy):
    monkeypatch.setattr(
        "pz_envs.catalog.make_env", lambda env_id, **kwargs: toy.ParityEnv("always")
    )
    chosen = settings(micro, steps=9).model_dump(mode="json")
    (tmp_path / "run.json").write_text(json.dumps(chosen | {"out": str(tmp_path / "run")}))
    monkeypatch.setattr(sys, "argv", ["pz-agents", "train", "--config", str(tmp_path / "run.json")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 4
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is not None


# The search over settings.


def test_a_setting_that_does_not_exist_is_refused_before_any_trial(tmp_path):
    base = {"env": "pz/Countdown-v0", "steps": 1}
    with pytest.raises(ConfigError, match="learning_rat"):
        tune(base, dict([parse_draw("learning_rat=uniform(0.1,0.2)")]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def told(trials):
    """What of the trials no clock decides."""
    return [
        (each.name, each.drawn, each.metrics["step"], each.metrics["mean_reward"], each.error)
        for each in trials
    ]


@pytest.mark.slow
def test_a_search_trains_its_trials_and_goes_on_where_it_was_left(micro, tmp_path, toy):
    pytest.importorskip("ray.tune", reason="needs pz-agents[ray]")
    base = settings(micro, steps=2, groups_per_step=1).model_dump(mode="json")
    searched = dict([parse_draw("learning_rate=grid(1e-4, 1e-3)")])
    with contextlib.closing(open_runtime("ray", cpus=2)):
        first = tune(base, searched, tmp_path, trials=1)
        again = tune(base, searched, tmp_path, trials=1)
    assert sorted(trial.drawn["learning_rate"] for trial in first) == [1e-4, 1e-3]
    assert [trial.error for trial in first] == [None, None]
    assert [trial.metrics["step"] for trial in first] == [2, 2]
    assert told(again) == told(first)
    for trial in first:
        run = tmp_path / "trials" / trial.name
        assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2]
        saved = json.loads((run / "config.json").read_text())
        assert saved["learning_rate"] == trial.drawn["learning_rate"]
    lines = (tmp_path / "trials.csv").read_text().splitlines()
    assert lines[0] == "trial,learning_rate,mean_reward,steps,error"
    assert len(lines) == 3
    with pytest.raises(ConfigError, match="`trials` of the search"):
        tune(base, searched, tmp_path, trials=2)
