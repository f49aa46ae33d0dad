"""Several learner ranks: what one process learns, they learn; and what happens when one is lost."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import fleet_toy
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("trl", reason="needs pz-agents[train]")

from pz_agents.models import load_model
from pz_agents.runtime import LostError, open_runtime
from pz_agents.training import checkpoint, ranks
from pz_agents.training.group import backend_for
from pz_agents.training.modes import train_both
from pz_agents.training.monitors import read_metrics
from pz_agents.training.peer import pack, unpack, updaters_of
from pz_agents.training.placement import rank_count, resources_of, take_places
from pz_agents.training.ranks import Team, balanced
from pz_agents.training.run import MOST_RESTARTS, train
from pz_agents.training.settings import TrainSettings, algorithm_options
from pz_envs.errors import ConfigError, InfraError
from tests.support.learner_cases import gradients, random_rows

pytestmark = pytest.mark.timeout(600)

MANY = (9, 5, 12, 7, 6, 12, 30, 8)
FEW = (9, 5, 7)

TOY = '''
import os

from pz_agents.training.peer import Peer

HERE = os.path.dirname(__file__)


def first_to_ask(mark):
    try:
        os.close(os.open(os.path.join(HERE, mark), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def pay(prompts, completions, **columns):
    """0 to 4, by the characters of what was said."""
    return [float(sum(map(ord, str(each))) % 5) for each in completions]


class DyingPeer(Peer):
    """Dies twice: before the second step's first update, and after the fourth's first."""

    def learn(self, name, packed, state):
        updater = self._updaters[name]
        second_step = state["updates"] == updater.settings.updates_per_step
        if second_step and first_to_ask("before"):
            os.kill(os.getpid(), 9)
        before = updater.before_update

        def dying():
            figures = before()
            if name == "policy" and updater.updates == 7 and first_to_ask("between"):
                os.kill(os.getpid(), 9)
            return figures

        updater.before_update = dying
        try:
            return super().learn(name, packed, state)
        finally:
            updater.before_update = before
'''

DEAD = '''
import os


class Where:
    """Says which GPUs it was given."""

    def __init__(self, number):
        pass

    def gpus(self):
        return os.environ["CUDA_VISIBLE_DEVICES"]


class DeadPeer:
    """Dies whenever it is asked."""

    def __init__(self, settings, number):
        pass

    def device(self):
        os.kill(os.getpid(), 9)
'''


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A module that the ranks can import; returns its file."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "pz_rank_toy.py").write_text(TOY)
    (folder / "pz_rank_dead.py").write_text(DEAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder / "pz_rank_toy.py"


@pytest.fixture
def dying(toy, monkeypatch):
    """Rank 1 dies twice, in the run that the test makes."""
    for mark in ("before", "between"):
        toy.with_name(mark).unlink(missing_ok=True)
    monkeypatch.setattr(ranks, "FACTORY", "pz_rank_toy:DyingPeer")


def settings_of(model, toy, **changes) -> TrainSettings:
    given = {
        "env": "pz/Countdown-v0",
        "algorithm": "ppo",
        "options": {"critic_update_steps": 3, "critic_learning_rate": 1e-3, "beta": 0.05},
        "model": str(model),
        "steps": 4,
        "groups_per_step": 3,
        "group_size": 4,
        "max_new_tokens": 8,
        "max_turns": 2,
        "learning_rate": 1e-3,
        "policy_update_steps": 2,
        "save_every": 2,
        "reward_function": f"{toy}:pay",
    }
    return TrainSettings(**{**given, **changes})


# Who takes which rows.


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=60), st.integers(1, 9))
def test_rows_go_longest_first_to_the_rank_with_the_least_squares(lengths, parts):
    shares = balanced(lengths, parts)
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(lengths)))
    assert sum(len(share) > 0 for share in shares) == min(parts, len(lengths))
    assert max(lengths) == lengths[shares[0][0]]
    loads = [sum(lengths[number] ** 2 for number in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths) ** 2


def test_shares_of_a_known_batch():
    shares = balanced([3, 5, 1, 4, 3], 2)
    # 25 | 16, 16 + 9, and of the equals the first is asked first: 25 + 9, then 25 + 1.
    assert [share.tolist() for share in shares] == [[1, 4], [3, 0, 2]]


def test_ranks_that_share_a_gpu_or_have_none_are_joined_by_gloo():
    assert backend_for(["cpu", "cpu"]) == "gloo"
    assert backend_for(["GPU-1", "GPU-1"]) == "gloo"
    nccl = "nccl" if torch.distributed.is_nccl_available() else "gloo"
    assert backend_for(["GPU-1", "GPU-2"]) == nccl


# The updates of two ranks against those of one.


@pytest.fixture(scope="module")
def team(micro, toy):
    """Ranks 0 and 1 of a run; rank 0's networks are brought along by each test."""
    chosen = settings_of(micro, toy, learner_ranks=2, kl_reward=0.0)
    with (
        contextlib.closing(open_runtime("local")) as runtime,
        contextlib.closing(Team(chosen, runtime)) as opened,
    ):
        yield opened


@pytest.fixture
def both(team, micro, toy):
    """The networks of rank 0, joined by rank 1, and the same networks on their own."""
    chosen = settings_of(micro, toy)
    joined, alone = (updaters_of(chosen, load_model(str(micro))) for _ in range(2))
    for updater in (joined, alone):
        assert set(updater) == {"policy", "critic"}
    # What the ranks loaded themselves is not what counts.
    with torch.no_grad():
        for name, updater in joined.items():
            for number, parameter in enumerate(updater.module.parameters()):
                parameter += 0.01 * torch.randn(parameter.shape, generator=seeded(number))
            alone[name].module.load_state_dict(updater.module.state_dict())
    team.join(joined)
    return joined, alone


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def taken(updater, rows, targets=None):
    """Take a step; returns every update's loss and gradients, and the step's metrics."""
    torch.manual_seed(5)
    step = updater.step_rows(rows, targets)
    found, updates = [], []
    for _ in range(updater.settings.updates_per_step):
        if not step.size:
            step.updates += 1
            updates.append({})
            continue
        loss = float(updater.accumulate(step))
        found.append((loss, gradients(updater.module).clone()))
        updates.append(updater.before_update())
        updater.optimizer.step()
        updater.module.zero_grad(set_to_none=True)
    return found, updater.step_metrics(updates)


def assert_same_updates(joined, alone):
    (first, first_metrics), (second, second_metrics) = joined, alone
    assert len(first) == len(second) > 0
    for (loss, grads), (expected, wanted) in zip(first, second, strict=True):
        assert loss == pytest.approx(expected, abs=1e-6)
        assert float((grads - wanted).norm()) <= 1e-5 * float(wanted.norm())
    # Each rank cuts its own rows, and a value that moved little counts as clipped by a rounding.
    for name in set(second_metrics) - {"micro_batches", "padding", "value_clip"}:
        assert first_metrics[name] == pytest.approx(second_metrics[name], abs=2e-6), name


def targets_for(rows, values):
    rng = np.random.default_rng(3)
    returns = [np.where(row.mask, rng.normal(), 0.0).astype(np.float32) for row in rows]
    return {"values": values, "returns": returns}


@pytest.mark.parametrize("lengths", [MANY, FEW], ids=len)
def test_two_ranks_learn_what_one_learns(team, both, lengths):
    joined, alone = both
    rows = random_rows(lengths)
    values = [updaters["critic"].values(rows) for updaters in both]
    for own, other in zip(*values, strict=True):
        np.testing.assert_allclose(own, other, atol=1e-5)
    targets = targets_for(rows, values[1])
    for _ in range(3):
        assert_same_updates(
            taken(joined["critic"], rows, targets), taken(alone["critic"], rows, targets)
        )
        assert_same_updates(taken(joined["policy"], rows), taken(alone["policy"], rows))
    team.check()
    for name in ("policy", "critic"):
        assert joined[name].state() == alone[name].state()
        weights, wanted = (updaters[name].module.state_dict() for updaters in both)
        for key, tensor in wanted.items():
            torch.testing.assert_close(weights[key], tensor, atol=1e-5, rtol=0)


def test_a_rank_that_joins_goes_on_with_the_optimizer_s_moments(team, both):
    joined, alone = both
    rows = random_rows(MANY)
    for updaters in both:
        updater = updaters["policy"]
        team_of, group, updater.team, updater.group = updater.team, updater.group, None, None
        taken(updater, rows)
        updater.team, updater.group = team_of, group
    team.join(joined)
    assert_same_updates(taken(joined["policy"], rows), taken(alone["policy"], rows))
    team.check()


def test_no_rows_are_no_update_on_any_rank(team, both):
    joined, alone = both
    for updaters in both:
        step = updaters["policy"].step_rows([])
        for _ in range(updaters["policy"].settings.updates_per_step):
            assert float(updaters["policy"].accumulate(step)) == 0.0
            updaters["policy"].before_update()
    figures = [updaters["policy"].step_metrics([{"loss": 0.0}] * 2) for updaters in both]
    assert figures[0] == figures[1]
    assert joined["policy"].skipped == alone["policy"].skipped == 2
    team.check()


def test_an_update_that_is_not_finite_on_one_rank_is_skipped_on_all(team, both):
    joined, _ = both
    policy = joined["policy"]
    before = [parameter.clone() for parameter in policy.module.parameters()]
    rows = random_rows((30, 20, 10, 10))
    rows = [
        replace(row, advantages=np.where(row.mask, np.float32("inf"), np.float32(0)))
        if len(row.ids) == 20
        else row
        for row in rows
    ]
    policy.settings = policy.settings.model_copy(update={"policy_update_steps": 2})
    taken(policy, rows)
    assert policy.skipped == 1
    assert policy.updates == 1
    assert not all(map(torch.equal, before, policy.module.parameters()))
    team.check()


def test_weights_that_are_no_longer_the_same_are_told_of(team, both):
    joined, _ = both
    team.check()
    with torch.no_grad():
        next(joined["critic"].module.parameters())[0, 0] += 1e-6
    with pytest.raises(InfraError, match="rank 1's critic is no longer rank 0's"):
        team.check()


def test_a_share_arrives_as_it_was_sent(both):
    _, alone = both
    rows = random_rows(MANY)
    critic = alone["critic"]
    step = critic.step_rows(rows, targets_for(rows, critic.values(rows)))
    back = unpack(pack(step))
    for one, other in zip(step.rows, back.rows, strict=True):
        for name in ("ids", "mask", "log_probs", "advantages"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert (back.groups, back.sums, back.sizes) == (step.groups, step.sums, step.sizes)
    for name, values in step.targets.items():
        assert torch.equal(values, back.targets[name])


# Whole runs.


@pytest.fixture(scope="module")
def alone(micro, toy, tmp_path_factory):
    """A run of five steps that one process learns."""
    folder = tmp_path_factory.mktemp("alone")
    train(settings_of(micro, toy, steps=5), folder)
    return folder


def assert_same_run(folder: Path, wanted: Path, steps: int) -> None:
    lines, expected = (read_metrics(each / "metrics.jsonl")[:steps] for each in (folder, wanted))
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    for line, other in zip(lines, expected, strict=True):
        for name in ("loss", "value_loss", "reward", "rows", "tokens", "version", "entropy"):
            assert line[name] == pytest.approx(other[name], abs=1e-6), (line["step"], name)


def assert_same_weights(folder: Path, wanted: Path) -> None:
    from safetensors.torch import load_file

    for name in ("policy", "critic"):
        weights, expected = (
            load_file(checkpoint.newest(each / "checkpoints") / name / "model.safetensors")
            for each in (folder, wanted)
        )
        for key, tensor in expected.items():
            torch.testing.assert_close(weights[key], tensor, atol=1e-5, rtol=0)


def test_a_run_with_two_ranks_of_which_one_dies_twice_and_then_with_one(
    micro, toy, alone, dying, tmp_path, caplog
):
    seen = []
    two = settings_of(micro, toy, learner_ranks=2)
    train(two, tmp_path, on_progress=lambda step, *_: seen.append(step))
    # Lost before any weight had moved: saved where it was. Lost in a step: back to the last save.
    assert seen == [1, 2, 3, 3, 4]
    lost = [record.message for record in caplog.records if "learner rank 1" in record.message]
    assert [f"{number} of 3" in message for number, message in enumerate(lost, 1)] == [True, True]
    assert all("dyingpeer-0 died (signal 9) during `learn`" in message for message in lost)
    assert_same_run(tmp_path, alone, 4)
    # The number of ranks is free to change.
    train(settings_of(micro, toy, steps=5), tmp_path)
    assert_same_run(tmp_path, alone, 5)
    assert_same_weights(tmp_path, alone)


def test_a_rank_that_always_dies_ends_the_run_and_the_run_can_be_resumed(
    micro, toy, alone, tmp_path, monkeypatch, caplog
):
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    monkeypatch.setattr(ranks, "FACTORY", "pz_rank_dead:DeadPeer")
    with pytest.raises(LostError, match=r"learner rank 1: deadpeer-0 died \(signal 9\)"):
        train(settings_of(micro, toy, steps=6, learner_ranks=2), folder)
    assert sum("going on from the last" in each.message for each in caplog.records) == MOST_RESTARTS
    train(settings_of(micro, toy, steps=6), folder)
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def cluster(toy):
    """A Ray that counts two GPUs, which nobody here uses."""
    with fleet_toy.two_gpus(cpus=2):
        yield


def where(runtime, count, asked):
    handles = runtime.spawn("pz_rank_dead:Where", count, asked)
    return [runtime.call(handle, "gpus").result() for handle in handles]


def test_an_engine_and_a_rank_share_each_gpu_and_the_driver_has_the_first(micro, toy, cluster):
    chosen = settings_of(
        micro,
        toy,
        runtime="ray",
        engines=2,
        learner_ranks=0,
        colocate_all=True,
        resources={"engine": {"cpus": 0.5}, "rank": {"cpus": 0.5}},
    )
    with contextlib.closing(open_runtime("ray")) as runtime:
        take_places(chosen, runtime)
        engines = where(runtime, 2, resources_of(chosen, "engine", runtime))
        others = where(
            runtime, rank_count(chosen, runtime) - 1, resources_of(chosen, "rank", runtime)
        )
        assert sorted(engines) == ["0", "1"]
        assert [os.environ["CUDA_VISIBLE_DEVICES"], *others] == engines
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_places_that_a_cluster_has_no_room_for_are_refused(micro, toy, cluster, monkeypatch):
    monkeypatch.setattr("pz_agents.runtime.ray._PLACE_SECONDS", 1.0)
    chosen = settings_of(micro, toy, runtime="ray", engines=3, learner_ranks=3, colocate_all=True)
    with (
        contextlib.closing(open_runtime("ray")) as runtime,
        pytest.raises(ConfigError, match=r"no room for 3 places .* has 2 CPUs and 2 GPUs"),
    ):
        take_places(chosen, runtime)


def test_ranks_on_ray_of_which_one_dies_learn_what_one_process_learns(
    micro, toy, cluster, dying, tmp_path, caplog
):
    grpo = {"algorithm": "grpo", "options": {"beta": 0.05}, "steps": 2}
    share = {"cpus": 0.1}
    on_ray = {"runtime": "ray", "learner_ranks": 0, "resources": {"rank": share, "worker": share}}
    train_both(settings_of(micro, toy, **grpo, **on_ray), tmp_path / "ray")
    assert sum("learner rank 1: the actor died" in each.message for each in caplog.records) == 1
    train(settings_of(micro, toy, **grpo), tmp_path / "one")
    lines, expected = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("ray", "one"))
    assert len(lines) == len(expected) == 2
    for line, other in zip(lines, expected, strict=True):
        assert line["rows"] == other["rows"] > 0
        for name in ("loss", "reward", "tokens", "entropy"):
            assert line[name] == pytest.approx(other[name], abs=1e-6)


# Settings.


def test_a_loss_that_compares_rows_is_refused_on_several_ranks(micro, toy):
    pairs = {"algorithm": "opmd", "options": {"form": "pairwise"}, "learner_ranks": 2}
    with pytest.raises(ConfigError, match="would be on different ranks"):
        algorithm_options(settings_of(micro, toy, **pairs))


@pytest.mark.parametrize("numbers", [(2, 3), (2, 1), (0, 0), (0, 1)])
def test_sharing_every_gpu_takes_as_many_engines_as_ranks(micro, toy, numbers):
    engines, count = numbers
    with pytest.raises(ConfigError, match=r"`colocate_all`.*engines"):
        settings_of(micro, toy, colocate_all=True, engines=engines, learner_ranks=count)


def test_the_number_of_ranks_follows_from_the_gpus_that_are_left(micro, toy):
    class Cluster:
        def total(self):
            return open_runtime("local", cpus=8).total().__class__(cpus=8, gpus=8)

    given = {"learner_ranks": 0, "runtime": "ray", "engines": 2, "workers": 3}
    asked = {"resources": {"engine": {"gpus": 1}}}
    assert rank_count(settings_of(micro, toy, **given, **asked), Cluster()) == 6
    assert rank_count(settings_of(micro, toy, **given), Cluster()) == 8
    assert rank_count(settings_of(micro, toy, learner_ranks=3), Cluster()) == 3
    here = max(torch.cuda.device_count(), 1)
    assert rank_count(settings_of(micro, toy, learner_ranks=0), Cluster()) == here
