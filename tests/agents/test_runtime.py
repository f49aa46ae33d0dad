"""The runtimes' contract, the rules around them, and searches over settings with Ray Tune.

What whole runs do over both runtimes is in ``test_faults_ray.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs pz-agents[train]")

from pz_agents import cli
from pz_agents.config import parse_settings
from pz_agents.errors import ModelError
from pz_agents.runtime import Handle, LostError, Resources, connect, open_runtime
from pz_agents.training import modes
from pz_agents.training.fleet import capacity
from pz_agents.training.monitors import read_metrics
from pz_agents.training.settings import TrainSettings
from pz_agents.tune import parse_draw, tune
from pz_envs.errors import ConfigError, InfraError

pytestmark = pytest.mark.timeout(600)

HALF = Resources(cpus=0.1)


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
    handles = runtime.spawn("fleet_toy:Thing", 2, HALF, {"base": 100})
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
    (handle,) = runtime.spawn("fleet_toy:Thing", 1, HALF)
    value = {"a": [1, 2.5, None, True, "é"], "b": b"\x00\xff" * 1000}
    assert runtime.call(handle, "back", value).result() == value
    shared = runtime.share(b"w" * 3_000_000)
    assert runtime.call(handle, "size", shared).result() == 3_000_000


def test_one_object_asks_another_by_its_address(runtime):
    # At once: the second may still be starting.
    first, second = runtime.spawn("fleet_toy:Thing", 2, HALF)
    assert runtime.call(first, "ask", second.address).result() == [1, 10]
    assert connect(second.address).call("add", 1) == [1, 11]


def test_errors_of_pz_arrive_as_what_they_are_and_the_object_lives_on(runtime):
    (handle,) = runtime.spawn("fleet_toy:Thing", 1, HALF)
    with pytest.raises(ModelError, match="no such model"):
        runtime.call(handle, "raise_model_error").result()
    with pytest.raises(InfraError, match=r"`raise_key_error` of thing-0 failed: KeyError"):
        runtime.call(handle, "raise_key_error").result()
    assert runtime.call(handle, "add", 1).result() == [0, 1]
    (broken,) = runtime.spawn("fleet_toy:Thing", 1, HALF, {"base": -1})
    with pytest.raises(ModelError, match="base is -1"):
        runtime.call(broken, "add", 1).result()


def test_a_killed_process_is_told_of_once_and_another_takes_its_address(runtime):
    (handle,) = runtime.spawn("fleet_toy:Thing", 1, HALF, {"base": 5})
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
    slow, quick = runtime.spawn("fleet_toy:Thing", 2, HALF)
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


# The search over settings.


def settings(model: Path | str, **changes: Any) -> TrainSettings:
    given = {
        "env": "pz/Countdown-v0",
        "model": str(model),
        "steps": 2,
        "groups_per_step": 1,
        "group_size": 4,
        "learning_rate": 1e-3,
        "max_new_tokens": 6,
        "max_turns": 4,
        "save_every": 1,
        **changes,
    }
    return TrainSettings(**given)


def test_a_setting_that_does_not_exist_is_refused_before_any_trial(tmp_path):
    base = {"env": "pz/Countdown-v0", "steps": 1}
    with pytest.raises(ConfigError, match="learning_rat"):
        tune(base, dict([parse_draw("learning_rat=uniform(0.1,0.2)")]), tmp_path)
    assert list(tmp_path.iterdir()) == []


REWARD = '''
import os
import time
from pathlib import Path

HELD = Path(__file__).with_name("held")
calls = 0


def pay(prompts, completions, **columns):
    """0 to 4; in the second step it never returns while there is a file `held`."""
    global calls
    calls += 1
    if calls == 2 and HELD.exists():
        HELD.with_name(f"reached-{os.getpid()}").touch()
        while HELD.exists():
            time.sleep(0.05)
    return [float(sum(map(ord, str(each))) % 5) for each in completions]
'''


@pytest.mark.slow
def test_a_search_that_sigterm_ends_in_its_trials_goes_on_where_it_was_left(
    micro, tmp_path, monkeypatch
):
    pytest.importorskip("ray.tune", reason="needs pz-agents[ray]")
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "held").touch()
    base = settings(micro, reward_function=f"{tmp_path / 'reward.py'}:pay").model_dump(mode="json")
    (tmp_path / "run.json").write_text(json.dumps(base))
    out = tmp_path / "search"
    words = ["pz-agents", "tune", "--search", "learning_rate=grid(1e-4, 1e-3)", "--trials", "1"]
    words += ["--concurrent", "1", "--config", str(tmp_path / "run.json"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    searched = dict([parse_draw(words[3])])
    over = threading.Event()

    def end_it() -> None:
        while not over.wait(0.05):
            if any(tmp_path.glob("reached-*")):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def status() -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    def lines(name: str) -> list[dict[str, Any]]:
        return read_metrics(out / "trials" / name / "metrics.jsonl")

    with contextlib.closing(open_runtime("ray", cpus=2)):
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        sender = threading.Thread(target=end_it)
        sender.start()
        try:
            assert status() == 143
        finally:
            over.set()
            sender.join()
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
        begun = {path.name: lines(path.name) for path in (out / "trials").iterdir()}
        assert any(begun.values())
        assert all(len(done) <= 1 for done in begun.values())
        (tmp_path / "held").unlink()
        assert status() == 0
        table = (out / "trials.csv").read_text()
        base = json.loads((out / "search.json").read_text())["base"]
        first = tune(base, searched, out, trials=1)
        assert (out / "trials.csv").read_text() == table, "finished trials are kept as they were"
    assert sorted(trial.drawn["learning_rate"] for trial in first) == [1e-4, 1e-3]
    assert [trial.error for trial in first] == [None, None]
    assert [trial.metrics["step"] for trial in first] == [2, 2]
    for trial in first:
        assert [line["step"] for line in lines(trial.name)] == [1, 2]
        assert lines(trial.name)[: len(begun.get(trial.name, []))] == begun.get(trial.name, [])
        saved = json.loads((out / "trials" / trial.name / "config.json").read_text())
        assert saved["learning_rate"] == trial.drawn["learning_rate"]
    assert table.splitlines()[0] == "trial,learning_rate,mean_reward,steps,error"
    assert len(table.splitlines()) == 3
    with pytest.raises(ConfigError, match="`trials` of the search"):
        tune(base, searched, out, trials=2)
