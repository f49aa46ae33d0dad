"""Which GPU each process of a run sees: dealt out on one machine, and by a Ray that counts some.

No GPU is used: a process tells which one CUDA would let it have.
"""

from __future__ import annotations

import contextlib
import os

import fleet_toy
import pytest

from pz_agents.hybrid import engines as hybrid
from pz_agents.hybrid.settings import HybridSettings
from pz_agents.runtime import open_runtime
from pz_agents.training.placement import rank_count, resources_of, take_places
from pz_agents.training.settings import TrainSettings
from pz_envs.errors import ConfigError

pytestmark = pytest.mark.timeout(280)

PROBE = """
import os


class Probe:
    def __init__(self, number, **given):
        pass

    def gpus(self):
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")
"""
FACTORY = "pz_places_probe:Probe"


@pytest.fixture(scope="module", autouse=True)
def probe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    (folder / "pz_places_probe.py").write_text(PROBE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(hybrid, "ENGINE", FACTORY)
        yield


@pytest.fixture
def three(monkeypatch):
    """A machine whose GPUs 4, 5 and 6 may be used."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)


@pytest.fixture(scope="module")
def cluster(probe):
    """A Ray that counts two GPUs."""
    with fleet_toy.two_gpus(cpus=4):
        yield


def of_hybrid(**changes):
    given = {"env": "pz/Detective-v0", "preset": "debug"}
    return HybridSettings.model_validate(given | changes)


def of_fleet(**changes):
    return TrainSettings(env="pz/Countdown-v0", algorithm="ppo", steps=1, **changes)


def seen_by_engines(settings, runtime, each):
    """Return what the hybrid's engines see, and which processes they are after a restart."""
    engines = hybrid.Engines(settings, "tiny", runtime, each)
    handles = [seat.handle for seat in engines._seats]
    before = [runtime.call(handle, "gpus").result() for handle in handles]
    runtime.restart(handles[-1])
    assert runtime.call(handles[-1], "gpus").result() == before[-1]
    engines.close()
    return before


def seen(settings, kind, count, runtime):
    handles = runtime.spawn(FACTORY, count, resources_of(settings, kind, runtime))
    return [runtime.call(handle, "gpus").result() for handle in handles]


def test_on_a_cluster_the_hybrids_engine_is_on_another_gpu_than_the_learner(cluster):
    chosen = of_hybrid(runtime="ray", vllm_num_engines=1)
    with contextlib.closing(open_runtime("ray")) as runtime:
        each = hybrid.place(chosen, runtime)
        mine = os.environ["CUDA_VISIBLE_DEVICES"]
        assert sorted([mine, *seen_by_engines(chosen, runtime, each)]) == ["0", "1"]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == mine
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_on_a_cluster_the_hybrids_engines_share_each_its_own_gpu(cluster):
    chosen = of_hybrid(runtime="ray", vllm_num_engines=2, colocate_all=True)
    with contextlib.closing(open_runtime("ray")) as runtime:
        found = seen_by_engines(chosen, runtime, hybrid.place(chosen, runtime))
        assert sorted(found) == ["0", "1"]
        assert found[0] == os.environ["CUDA_VISIBLE_DEVICES"]


def test_a_learner_alone_is_not_where_a_fleets_engine_is(cluster, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    chosen = of_fleet(runtime="ray", engines=1, workers=1, resources={"engine": {"gpus": 1}})
    with contextlib.closing(open_runtime("ray")) as runtime:
        take_places(chosen, runtime)
        found = seen(chosen, "engine", 1, runtime)
        assert sorted([os.environ["CUDA_VISIBLE_DEVICES"], *found]) == ["0", "1"]


def test_on_one_machine_the_hybrids_engines_have_the_gpus_behind_the_learners(three):
    with contextlib.closing(open_runtime("local", cpus=2)) as runtime:
        apart = of_hybrid(vllm_num_engines=2)
        assert seen_by_engines(apart, runtime, hybrid.place(apart, runtime)) == ["5", "6"]
        together = of_hybrid(vllm_num_engines=3, colocate_all=True)
        each = hybrid.place(together, runtime)
        assert seen_by_engines(together, runtime, each) == ["4", "5", "6"]
        with pytest.raises(ConfigError, match="4 GPUs, and runtime local has 3; set vllm_num_eng"):
            hybrid.place(of_hybrid(vllm_num_engines=3), runtime)


def test_on_one_machine_ranks_come_first_and_then_engines(three):
    with contextlib.closing(open_runtime("local", cpus=2)) as runtime:
        chosen = of_fleet(engines=1, workers=2, learner_ranks=0)
        assert rank_count(chosen, runtime) == 2
        assert seen(chosen, "rank", 1, runtime) == ["5"]
        assert seen(chosen, "engine", 1, runtime) == ["6"]
        assert seen(chosen, "worker", 1, runtime) == ["4,5,6"]
        together = of_fleet(engines=3, workers=2, learner_ranks=0, colocate_all=True)
        assert seen(together, "rank", 2, runtime) == ["5", "6"]
        assert seen(together, "engine", 3, runtime) == ["4", "5", "6"]
        with pytest.raises(ConfigError, match="3 `engines` and 1 `learner_ranks` take 4 GPUs"):
            resources_of(of_fleet(engines=3, workers=1), "engine", runtime)
