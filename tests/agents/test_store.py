"""The experience store and its codec."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pz_agents.rollout import ExperienceStore
from pz_agents.rollout.codec import decode, encode, trajectory_from_json, trajectory_to_json
from pz_agents.sdk import Sample, Step, Trajectory
from pz_envs.errors import DataError, InfraError


def sample(prompt, tokens, log_probs=None, **fields):
    if log_probs is None:
        log_probs = [-0.25] * len(tokens)
    return Sample(
        np.array(prompt, np.int32),
        np.array(tokens, np.int32),
        np.array(log_probs, np.float32),
        **fields,
    )


def trajectory(key="k", group="g", samples=(), **fields):
    steps = tuple(
        Step(f"see {n}", f"do {n}", 0.5, float(n), True, False, item, {"n": n})
        for n, item in enumerate(samples)
    )
    known = {
        "env_id": "pz/Countdown-v0",
        "env_seed": 5,
        "task_id": "t",
        "attempt": 0,
        "final_observation": "the end",
        "reward": 1.0,
        "score": 1.0,
        "max_score": 2.0,
        "score_norm": 0.5,
        "success": False,
        "terminated": True,
        "truncated": "",
    }
    return Trajectory(key=key, group_id=group, steps=steps, **{**known, **fields})


def plain(item):
    """Every bit of a trajectory, comparable."""

    def bits(array):
        return (array.dtype.str, array.shape, array.tobytes())

    def of_sample(one):
        if one is None:
            return None
        arrays = (bits(one.prompt_ids), bits(one.token_ids), bits(one.log_probs))
        return (*arrays, one.finish, one.version, one.temperature)

    fields = {name: getattr(item, name) for name in Trajectory.__slots__ if name != "steps"}
    steps = [
        {
            name: of_sample(step.sample) if name == "sample" else getattr(step, name)
            for name in Step.__slots__
        }
        for step in item.steps
    ]
    return json.dumps([fields, steps], default=repr)


ids = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=6)
samples = st.none() | st.builds(
    lambda prompt, pairs, finish, version, temperature: sample(
        prompt,
        [token for token, _ in pairs],
        [value for _, value in pairs],
        finish=finish,
        version=version,
        temperature=temperature,
    ),
    ids,
    st.lists(
        st.tuples(st.integers(0, 2**31 - 1), st.floats(width=32, allow_nan=False)), max_size=5
    ),
    st.sampled_from(["stop", "length"]),
    st.integers(0, 2**40),
    st.floats(0, 2),
)
trajectories = st.builds(
    lambda key, group, items, reward, observation, error: trajectory(
        key, group, items, reward=reward, final_observation=observation, error=error
    ),
    st.text(max_size=4),
    st.text(max_size=4),
    st.lists(samples, max_size=4),
    st.floats(allow_nan=False),
    st.text(st.characters(), max_size=8),
    st.none() | st.text(max_size=8),
)


@given(trajectories)
@settings(max_examples=150, deadline=None)
def test_the_codec_returns_every_bit(item):
    assert plain(decode(encode(item))) == plain(item)


@given(trajectories)
@settings(max_examples=50, deadline=None)
def test_the_json_form_returns_every_value(item):
    assert plain(trajectory_from_json(json.loads(json.dumps(trajectory_to_json(item))))) == plain(
        item
    )


def test_lists_of_commands_are_not_stored():
    bare = trajectory(samples=[None, sample([1], [2], [0.5])])
    listed = replace(
        bare, steps=tuple(replace(step, admissible_commands=("go",)) for step in bare.steps)
    )
    assert encode(listed) == encode(bare)
    assert trajectory_to_json(listed) == trajectory_to_json(bare)
    assert [step.admissible_commands for step in decode(encode(listed)).steps] == [None, None]


def test_nan_log_probs_keep_their_bits():
    odd = np.array([0x7FC00001, 0xFFC00000, 0x80000000], np.uint32).view(np.float32)
    item = trajectory(samples=[sample([1], [1, 2, 3], odd)])
    assert decode(encode(item)).steps[0].sample.log_probs.tobytes() == odd.tobytes()


def test_a_growing_conversation_is_stored_once():
    rng = np.random.default_rng(0)
    context, turns = list(rng.integers(0, 30_000, 50)), []
    for _ in range(100):
        reply = list(rng.integers(0, 30_000, 10))
        turns.append(sample(context, reply))
        context = [*context, *reply, *rng.integers(0, 30_000, 20)]
    item = trajectory(samples=turns)
    assert plain(decode(encode(item))) == plain(item)
    assert len(encode(item)) < 60_000
    assert item.prompt_tokens * 4 > 500_000


@pytest.mark.parametrize(
    "bad",
    [
        Sample(np.array([1]), np.array([1], np.int32), np.array([0], np.float32)),
        Sample(np.array([1], np.int32), np.array([1], np.int32), np.array([0.0])),
        Sample(np.array([1], np.int32), np.array([1, 2], np.int32), np.array([0], np.float32)),
        Sample([1], np.array([1], np.int32), np.array([0], np.float32)),
    ],
)
def test_arrays_of_another_kind_are_refused_by_name(bad):
    with pytest.raises(DataError, match="episode k"):
        encode(trajectory(samples=[bad]))


def test_notes_that_are_not_json_are_refused_by_name():
    step = Step("see", "do", 0.0, 0.0, True, False, None, {"env": object()})
    item = trajectory()
    item = Trajectory(
        **{name: getattr(item, name) for name in Trajectory.__slots__ if name != "steps"},
        steps=(step,),
    )
    with pytest.raises(DataError, match=r"notes must be JSON"):
        encode(item)


def test_damaged_bytes_are_a_data_error():
    blob = encode(trajectory(samples=[sample([1, 2], [3])]))
    for broken in (b"", blob[: len(blob) // 2], b"junk" * 50):
        with pytest.raises(DataError):
            decode(broken)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "experience.db"


def group(name, size=2):
    return [trajectory(f"{name}/{n}", name, [sample([n], [n])]) for n in range(size)]


def states(store):
    """The number of groups by state, without the states that no group is in."""
    return {k: n for k, n in store.counts().items() if n and k != "trajectories"}


def test_groups_are_leased_once_in_order_and_whole(path):
    with ExperienceStore(path) as store:
        store.append([*group("a"), *group("b"), *group("c", 3)], step=0)
        first, second = store.lease(2), store.lease(2)
        assert first.group_ids == ("a", "b")
        assert [item.key for item in first.groups[1]] == ["b/0", "b/1"]
        assert second.group_ids == ("c",)
        assert store.lease(1).groups == ()
        assert plain(second.groups[0][2]) == plain(group("c", 3)[2])


@pytest.mark.parametrize(("policy", "names"), [("fifo", ("a", "b")), ("latest", ("d", "c"))])
def test_policies_choose_which_groups(path, policy, names):
    with ExperienceStore(path) as store:
        for name in "abcd":
            store.append(group(name), step=0)
        assert store.lease(2, policy).group_ids == names


def test_the_uniform_policy_is_decided_by_its_seed_and_reaches_every_group(path):
    seen = []
    with ExperienceStore(path) as store:
        for name in "abcd":
            store.append(group(name), step=0)
        for seed in [*range(40), 0]:
            lease = store.lease(1, "uniform", seed=seed)
            seen.append(lease.group_ids[0])
            store.release(lease)
    assert set(seen) == set("abcd")
    assert seen[0] == seen[-1]


def test_release_gives_back_and_ack_does_not(path):
    with ExperienceStore(path) as store:
        store.append([*group("a"), *group("b")], step=0)
        lease = store.lease(1)
        store.release(lease)
        again = store.lease(1)
        assert again.group_ids == lease.group_ids == ("a",)
        store.ack(again, step=1)
        store.release(again)
        assert store.lease(5).group_ids == ("b",)


def test_ack_twice_is_once_and_a_lost_lease_is_an_error(path):
    with ExperienceStore(path) as store:
        store.append(group("a"), step=0)
        lost = store.lease(1)
        store.release(lost)
        with pytest.raises(DataError, match="released or rolled back"):
            store.ack(lost, step=1)
        lease = store.lease(1)
        store.ack(lease, step=1)
        store.ack(lease, step=1)
        assert states(store) == {"consumed": 1}
        assert store.counts()["trajectories"] == 2


def test_an_episode_delivered_twice_is_stored_once(path):
    with ExperienceStore(path) as store:
        store.append(group("a"), step=0)
        store.append(group("a"), step=0)
        store.ack(store.lease(1), step=1)
        store.append(group("a"), step=0)
        assert store.counts()["trajectories"] == 2
        with pytest.raises(DataError, match="a/2 comes too late for group a"):
            store.append(group("a", 3), step=0)


def test_a_bad_trajectory_leaves_nothing_of_its_batch(path):
    bad = trajectory("z", "z", [Sample([1], [1], [0])])
    with ExperienceStore(path) as store:
        with pytest.raises(DataError):
            store.append([*group("a"), bad], step=0)
        assert store.counts()["trajectories"] == 0


def test_a_trajectory_without_a_group_is_its_own(path):
    with ExperienceStore(path) as store:
        store.append([trajectory("x", ""), trajectory("y", "")], step=0)
        assert store.lease(5).group_ids == ("x", "y")


def test_rollback_returns_what_later_steps_consumed_and_forgets_what_later_weights_played(path):
    with ExperienceStore(path) as store:
        for step, name in enumerate("abc"):
            store.append(group(name), step=step)
            store.ack(store.lease(1), step=step + 1)
        store.rollback(1)
        assert states(store) == {"new": 1, "consumed": 1}
        assert store.lease(5).group_ids == ("b",)
        store.append(group("c"), step=2)
        assert store.lease(5).group_ids == ("c",)


def test_priority_prefers_newer_weights_and_each_use_costs_two_steps(path):
    with ExperienceStore(path) as store:
        for step, name in enumerate("abcd"):
            store.append(group(name), step=step)
        first = store.lease(2, "priority")
        assert first.group_ids == ("d", "c")
        store.ack(first, step=4, max_uses=2)
        assert store.lease(3, "priority").group_ids == ("b", "d", "a")


def test_a_group_is_used_as_often_as_it_may_be_and_once_a_step(path):
    with ExperienceStore(path) as store:
        store.append([*group("a"), *group("b")], step=0)
        for step in (1, 2, 3):
            lease = store.lease(5)
            assert lease.group_ids == ("a", "b")
            assert store.lease(5).group_ids == ()
            store.ack(lease, step, max_uses=3)
            assert store.unspent() == (0 if step == 3 else 2)
        assert states(store) == {"consumed": 2}
        store.rollback(1)
        assert states(store) == {"new": 2}
        for step in (2, 3):
            store.ack(store.lease(5), step, max_uses=3)
        assert states(store) == {"consumed": 2}


def test_stale_groups_are_dropped_and_counted_and_a_rollback_brings_them_back(path):
    with ExperienceStore(path) as store:
        for step, name in enumerate("abcd"):
            store.append(group(name), step=step)
        assert store.lease(5, played=range(1, 3)).group_ids == ("b", "c")
        store.rollback(3)
        # Weights of step 3 are of a history that the run left.
        assert store.drop_stale(range(1, 3), step=3) == 2
        assert states(store) == {"new": 2, "dropped": 2}
        assert store.drop_stale(range(1, 3), step=3) == 0
        store.rollback(2)
        assert states(store) == {"new": 3}
        assert store.lease(5).group_ids == ("a", "b", "c")


def test_an_unknown_policy_is_refused_by_name(path):
    with ExperienceStore(path) as store, pytest.raises(DataError, match=r"'oldest'.*priority"):
        store.lease(1, "oldest")


def test_the_same_content_gives_the_same_snapshot_bytes_whatever_happened_on_the_way(tmp_path):
    copies = []
    for number, detour in enumerate((False, True)):
        with ExperienceStore(tmp_path / str(number) / "e.db") as store:
            store.append(group("a"), step=0)
            store.ack(store.lease(1), step=1)
            if detour:
                store.append([*group("x", 30), *group("b")], step=1)
                store.ack(store.lease(2), step=2)
                store.release(store.lease(1))
                store.rollback(0)
                store.ack(store.lease(1), step=1)
            store.append([*group("b"), *group("c")], step=1, batch=2)
            store.ack(store.lease(1), step=2)
            held = store.lease(1)
            copies.append(tmp_path / f"{number}.db")
            store.snapshot(copies[-1])
            store.snapshot(tmp_path / f"{number}.left.db", unspent=True)
            store.release(held)
    assert copies[0].read_bytes() == copies[1].read_bytes()
    left = [tmp_path / f"{number}.left.db" for number in (0, 1)]
    assert left[0].read_bytes() == left[1].read_bytes()
    with ExperienceStore(left[0]) as store:
        assert states(store) == {"new": 1}
        assert [item.key for item in store.trajectories()] == ["c/0", "c/1"]
        assert store.batches == 2


def test_how_long_an_episode_took_is_not_stored(path):
    with ExperienceStore(path) as store:
        store.append([trajectory(seconds=3.5)], step=0)
        assert [item.seconds for item in store.trajectories()] == [0.0]


def test_an_explorer_and_a_trainer_share_the_file_and_each_keeps_its_like_out(path):
    with ExperienceStore(path, "trainer") as trainer, ExperienceStore(path, "explorer") as explorer:
        explorer.append([*group("a"), *group("b")], step=0, batch=1)
        lease = trainer.lease(1)
        with pytest.raises(InfraError, match="as its explorer"):
            ExperienceStore(path, "explorer")
        with pytest.raises(InfraError, match="as its trainer"):
            ExperienceStore(path, "trainer")
        explorer.close()
        # An explorer that comes and goes takes no lease from the trainer.
        with ExperienceStore(path, "explorer") as again:
            assert again.batches == 1
            assert again.unspent() == 2
            again.append(group("c"), step=0, batch=2)
        trainer.ack(lease, step=1)
        assert states(trainer) == {"new": 2, "consumed": 1}


def test_a_damaged_file_that_another_process_uses_stays_where_it_is(path):
    with ExperienceStore(path) as store:
        for name in "abcdefghij":
            store.append(group(name, 20), step=0)
    with ExperienceStore(path, "trainer"):
        data = bytearray(path.read_bytes())
        data[4096:8192] = b"\xa5" * 4096
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"damaged .* in use: .* as its trainer"):
            ExperienceStore(path, "explorer")
        assert path.exists()
        path.unlink()


def test_leases_of_a_dead_session_return_when_the_store_is_opened(path):
    script = (
        "import os, sys\n"
        "from pz_agents.rollout import ExperienceStore\n"
        "store = ExperienceStore(sys.argv[1])\n"
        "assert store.lease(1).group_ids == ('a',)\n"
        "os._exit(9)\n"
    )
    with ExperienceStore(path) as store:
        store.append(group("a"), step=0)
    subprocess.run([sys.executable, "-c", script, path], check=False, timeout=60)
    with ExperienceStore(path) as store:
        assert store.lease(1).group_ids == ("a",)


def test_one_writer_only(path):
    with ExperienceStore(path), pytest.raises(InfraError, match=f"process {os.getpid()}"):
        ExperienceStore(path)
    ExperienceStore(path).close()


def test_a_snapshot_is_a_whole_store(path, tmp_path):
    copy = tmp_path / "deep" / "copy.db"
    with ExperienceStore(path) as store:
        store.append([*group("a"), *group("b")], step=0)
        store.ack(store.lease(1), step=1)
        store.snapshot(copy)
        store.append(group("c"), step=1)
    assert [file.name for file in copy.parent.iterdir()] == ["copy.db"]
    with ExperienceStore(copy) as store:
        assert states(store) == {"new": 1, "consumed": 1}
        assert [item.key for item in store.trajectories()] == ["a/0", "a/1", "b/0", "b/1"]


@pytest.mark.parametrize("damage", ["header", "middle"])
def test_a_damaged_file_is_moved_aside_and_reported(path, damage, caplog):
    with ExperienceStore(path) as store:
        for name in "abcdefghij":
            store.append(group(name, 20), step=0)
    data = bytearray(path.read_bytes())
    where = 0 if damage == "header" else 4096
    data[where : where + 4096] = b"\xa5" * 4096
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"is damaged .* was moved to .*\.corrupt-"):
        ExperienceStore(path)
    assert "is damaged" in caplog.text
    (aside,) = path.parent.glob("*.corrupt-*")
    assert aside.read_bytes() == bytes(data)
    with ExperienceStore(path) as store:
        assert store.counts()["trajectories"] == 0


def test_a_store_of_another_version_is_left_alone(path):
    ExperienceStore(path).close()
    script = "import sqlite3, sys; d = sqlite3.connect(sys.argv[1]); "
    script += "d.execute(\"UPDATE meta SET v = '99'\"); d.commit()"
    subprocess.run([sys.executable, "-c", script, path], check=True, timeout=60)
    with pytest.raises(DataError, match="schema version 99"):
        ExperienceStore(path)
    assert path.exists()


WRITER = """
import sys
import numpy as np
sys.path.insert(0, {folder!r})
from pz_agents.rollout import ExperienceStore
from test_store import group
store = ExperienceStore(sys.argv[1])
for number in range(10**9):
    name = f"{{sys.argv[2]}}-{{number}}"
    store.append(group(name, 4), step=number)
    print(name, flush=True)
    if number % 3 == 2:
        lease = store.lease(2)
        store.ack(lease, step=number)
        print("acked", *lease.group_ids, flush=True)
"""


def test_kill_9_in_the_middle_loses_nothing_that_was_committed(path):
    script = WRITER.format(folder=str(Path(__file__).parent))
    appended, acked = set(), set()
    for session in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", script, path, f"s{session}"], stdout=subprocess.PIPE, text=True
        )
        try:
            lines = [child.stdout.readline() for _ in range(30)]
            time.sleep(0.003 * session)
        finally:
            child.send_signal(signal.SIGKILL)
            lines += child.stdout.readlines()
            child.wait()
            child.stdout.close()
        for line in lines:
            first, *rest = line.split()
            (acked if first == "acked" else appended).update(rest or [first])
        with ExperienceStore(path) as store:
            stored = [item.key for item in store.trajectories()]
            counts = store.counts()
            left = store.lease(10**6)
        groups = {key.rsplit("/", 1)[0] for key in stored}
        assert len(acked) >= 5 * (session + 1)
        assert appended <= groups
        assert len(stored) == len(set(stored)) == 4 * len(groups)
        assert counts["leased"] == 0
        assert not acked & set(left.group_ids)
        assert counts["consumed"] - len(acked) in range(0, 2 * (session + 1) + 1)
