"""Engines that several workers ask at once: their calls, their batches, and their weights.

Faults of engines are in ``test_faults_ray.py``, the runtimes' contract in ``test_runtime.py``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fleet_toy
import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs pz-agents[train]")

from pz_agents.models import load_model
from pz_agents.models.adapters import add_adapter, merged_state
from pz_agents.models.protocol import GenerateRequest
from pz_agents.models.sharing import Batcher, Gate
from pz_agents.models.transformers import TransformersModel
from pz_agents.rollout import ExperienceStore
from pz_agents.runtime import LostError, Resources, connect, open_runtime
from pz_agents.training import modes
from pz_agents.training.fleet import Fleet
from pz_agents.training.group import Group, checksum
from pz_agents.training.settings import TrainSettings
from pz_agents.training.worker import Engine, load_files, pack_files, plain_request
from pz_envs.errors import ConfigError

pytestmark = pytest.mark.timeout(600)

SMALL = Resources(cpus=0.1)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weights(micro) -> list[TransformersModel]:
    """Two models of one architecture whose weights differ."""
    first, second = load_model(str(micro)), load_model(str(micro))
    with torch.no_grad():
        for number, parameter in enumerate(second.network.parameters()):
            noise = torch.Generator().manual_seed(number)
            parameter += 0.3 * torch.randn(parameter.shape, generator=noise)
    return [first, second]


def requests(model: Any, seeds: range) -> list[GenerateRequest]:
    return [GenerateRequest(model.encode(f"Go {seed % 7}."), 6, seed) for seed in seeds]


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "waited too long"
        time.sleep(0.001)


# The runtime's part.


def test_an_object_serves_as_many_calls_at_once_as_it_was_spawned_for(runtime):
    (several,) = runtime.spawn("engine_toy:Meeting", 1, SMALL, {"count": 4}, concurrency=4)
    (single,) = runtime.spawn("engine_toy:Meeting", 1, SMALL)
    with ThreadPoolExecutor(6) as pool:
        remote = connect(several.address)
        others = [pool.submit(remote.call, "meet", timeout=120) for _ in range(2)]
        calls = [runtime.call(several, "meet", timeout=120) for _ in range(2)]
        assert [call.result() for call in calls] == [other.result() for other in others]
        remote = connect(single.address)
        told = [pool.submit(remote.call, "most", 0.02, timeout=120) for _ in range(6)]
        assert {each.result() for each in told} == {1}


def test_how_long_a_call_has_been_served_is_told_beside_it(runtime):
    (handle,) = runtime.spawn("engine_toy:Meeting", 1, SMALL)
    assert runtime.busy(handle).result() == 0.0
    call = runtime.call(handle, "most", 3600, timeout=3600)
    ages = [runtime.busy(handle).result()]
    while ages[-1] < 0.05:
        ages.append(runtime.busy(handle).result())
    assert ages == sorted(ages)
    assert not call.done()


# The engine's part.


def test_requests_that_come_while_a_batch_is_sampled_are_the_next_batch(micro, weights):
    class Held(TransformersModel):
        def generate(self, requests):
            sizes.append(len(requests))
            entered.set()
            assert go.wait(60)
            return super().generate(requests)

    sizes: list[int] = []
    entered, go = threading.Event(), threading.Event()
    model = Held(micro)
    batcher = Batcher(model)
    asked = [requests(model, range(start, start + 2)) for start in (0, 2, 4)]
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(batcher.generate, asked[0])]
        assert entered.wait(60)
        answers += [pool.submit(batcher.generate, each) for each in asked[1:]]
        wait_for(lambda: batcher._waiting.qsize() == 4)
        go.set()
        found = [each.result() for each in answers]
    assert sizes == [2, 4]
    for each, expected in zip(found, map(weights[0].generate, asked), strict=True):
        for one, two in zip(each, expected, strict=True):
            assert one.token_ids.tolist() == two.token_ids.tolist()
            assert abs(one.log_probs - two.log_probs).max() < 1e-5


def test_who_changes_something_waits_for_its_users_and_goes_before_later_ones():
    gate, order = Gate(), []

    def change() -> None:
        with gate.changing():
            order.append("change")

    def use() -> None:
        with gate.using():
            order.append("use")

    changer, later = threading.Thread(target=change), threading.Thread(target=use)
    with gate.using():
        use_beside = threading.Thread(target=use)
        use_beside.start()
        use_beside.join(60)
        changer.start()
        wait_for(lambda: gate._changes, 10.0)
        later.start()
        later.join(0.1)
        assert order == ["use"]
    changer.join(60)
    later.join(60)
    assert order == ["use", "change", "use"]


def test_every_answer_is_wholly_of_the_version_it_names_while_weights_change(micro, weights):
    engine = Engine(str(micro), 1, 0)
    packed = [pack_files(model.network.save_pretrained) for model in weights]
    asked = requests(weights[0], range(4))
    expected = [[each.token_ids.tolist() for each in model.generate(asked)] for model in weights]
    assert expected[0] != expected[1]
    prefix, candidate = asked[0].prompt_ids, weights[0].encode("ab")
    scores = [model.score(prefix, [candidate])[0] for model in weights]
    engine.load(packed[0], 0)
    over = threading.Event()

    def ask() -> list[int]:
        seen = []
        while not over.is_set() or len(seen) < 3:
            answers = engine.generate([plain_request(each) for each in asked], 0)
            (version,) = {answer["version"] for answer in answers}
            tokens = [np.frombuffer(each["token_ids"], np.int32).tolist() for each in answers]
            assert tokens == expected[version % 2]
            seen.append(version)
        return seen

    def score() -> None:
        while not over.is_set():
            found = np.frombuffer(engine.score(prefix.tobytes(), [candidate.tobytes()], 0)[0], "f4")
            assert min(abs(found - each).max() for each in scores) < 1e-5

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        scoring = pool.submit(score)
        try:
            for version in range(1, 7):
                engine.load(packed[version % 2], version)
        finally:
            over.set()
        scoring.result()
        for each in asking:
            seen = each.result()
            assert seen == sorted(seen)
            assert seen[-1] == 6


# Whole runs.

GROUPS, ATTEMPTS = 3, 4


def settings(model: Path | str, **changes: Any) -> TrainSettings:
    given = {
        "env": "pz/Countdown-v0",
        "model": str(model),
        "steps": 2,
        "groups_per_step": GROUPS,
        "group_size": ATTEMPTS,
        "learning_rate": 1e-3,
        "max_new_tokens": 6,
        "max_turns": 4,
        "save_every": 2,
        "resources": {"worker": {"cpus": 0.1}, "engine": {"cpus": 0.1}},
        **changes,
    }
    return TrainSettings(**given)


@pytest.fixture
def _toy(monkeypatch):
    monkeypatch.setattr("pz_agents.training.fleet.WORKER", "fleet_toy:Worker")
    monkeypatch.setattr("pz_envs.catalog.make_env", fleet_toy.make_env)
    # Drawing takes longer than the rest of so small a run.
    monkeypatch.setattr("pz_agents.training.run.plot_metrics", lambda metrics, path: [])


@pytest.fixture(scope="module")
def in_turn(micro, tmp_path_factory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("in-turn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pz_envs.catalog.make_env", fleet_toy.make_env)
        patch.setattr("pz_agents.training.run.plot_metrics", lambda metrics, path: [])
        modes.train_both(settings(micro), folder)
    return folder


def played(folder: Path) -> dict[Any, Any]:
    """What was played in a run, but for log-probs, which other batches round differently."""
    with ExperienceStore(folder / "experience.db") as store:
        return {
            item.key: [
                (
                    step.observation,
                    step.action,
                    step.reward,
                    step.sample.token_ids.tolist(),
                    step.sample.version,
                )
                for step in item.steps
            ]
            for item in store.trajectories()
        }


@pytest.mark.slow
@pytest.mark.usefixtures("_toy")
def test_one_engine_of_three_workers_samples_what_one_process_samples(
    runtime_name, micro, in_turn, tmp_path
):
    chosen = settings(micro, runtime=runtime_name, workers=3, engines=1)
    modes.train_both(chosen, tmp_path / "run")
    assert played(tmp_path / "run") == played(in_turn)
    assert fleet_toy.weights_apart(tmp_path / "run", in_turn) < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("_toy")
def test_weights_through_a_group_play_what_weights_in_files_play(
    runtime_name, micro, in_turn, tmp_path, caplog
):
    chosen = settings(micro, runtime=runtime_name, workers=1, engines=1, weights="group")
    modes.train_both(chosen, tmp_path / "run")
    assert "files" not in caplog.text
    assert played(tmp_path / "run") == played(in_turn)
    assert fleet_toy.weights_apart(tmp_path / "run", in_turn) < 1e-5


def test_a_group_needs_engines(micro):
    with pytest.raises(ConfigError, match="there are none"):
        settings(micro, weights="group")


# Weights through a group.


@pytest.mark.slow
def test_every_bit_arrives_through_a_group_whatever_happens_to_its_engines(
    runtime, runtime_name, micro, weights, monkeypatch, caplog
):
    monkeypatch.setattr("pz_agents.training.fleet.WORKER", "engine_toy:Idle")
    monkeypatch.setattr("pz_agents.training.fleet.ENGINE", "engine_toy:Told")
    fleet = Fleet(settings(micro, runtime=runtime_name, engines=2, weights="group"), runtime)
    engines = fleet.handles[1:]
    adapted = load_model(str(micro))
    add_adapter(adapted.network, 2, seed=0)
    with torch.no_grad():
        for name, parameter in adapted.network.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    from_files = load_model(str(micro))
    load_files(from_files, pack_files(adapted.network.save_pretrained), 0)
    digests = [checksum(model.network) for model in (*weights, from_files)]
    assert len(set(digests)) == 3

    def publish(model: Any, version: int) -> None:
        state = partial(merged_state, model.network)
        fleet.publish(model.network.save_pretrained, version, version, state)

    def told(version: int) -> list[list[Any]]:
        give_up = time.monotonic() + 120
        while True:
            fleet.finished(0.0)
            with contextlib.suppress(LostError):
                found = [connect(each.address).call("told", timeout=60) for each in engines]
                if {version} == {each[0] for each in found}:
                    return found
            assert time.monotonic() < give_up, "the weights do not come"
            time.sleep(0.05)

    publish(weights[0], 1)
    assert told(1) == [[1, digests[0], 1, 0]] * 2
    publish(adapted, 2)
    assert told(2) == [[2, digests[2], 2, 0]] * 2
    os.kill(runtime.pid(engines[0]), signal.SIGKILL)
    while not fleet.replaced:
        fleet.finished(0.0)
    assert told(2) == [[2, digests[2], 0, 1], [2, digests[2], 2, 0]]
    publish(weights[1], 3)
    assert told(3) == [[3, digests[1], 1, 1], [3, digests[1], 3, 0]]
    assert "files" not in caplog.text
    publish(weights[0], 4)
    assert [each[:2] for each in told(4)] == [[4, digests[0]]] * 2
    assert "files" in caplog.text
    publish(weights[1], 5)
    assert [each[:2] for each in told(5)] == [[5, digests[1]]] * 2
    assert fleet.replaced == 2
    publish(weights[0], 6)
    assert [each[:2] for each in told(6)] == [[6, digests[0]]] * 2
    fleet.close()


@pytest.mark.gpu
def test_tensors_arrive_over_nccl():
    if torch.cuda.device_count() < 2 or not torch.distributed.is_nccl_available():
        pytest.skip("needs two GPUs")
    sent = [torch.arange(1000.0, device="cuda"), torch.ones(3, 5, device="cuda")]
    with contextlib.closing(open_runtime("local")) as runtime:
        (member,) = runtime.spawn("engine_toy:Member", 1)
        meeting = socket.create_server((runtime.host(), 0))
        place = [runtime.host(), meeting.getsockname()[1], "nccl"]
        call = runtime.call(member, "receive", *place, [list(each.shape) for each in sent])
        group = Group(0, 2, runtime.host(), meeting, "nccl", 120.0)
        group.send(sent)
        assert call.result() == [float(each.sum()) for each in sent]
        group.close()
