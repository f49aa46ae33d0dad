"""Vector environments and the pool: Gymnasium's semantics, failures, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

import pz_envs
from pz_envs import ConfigError, EnvError, InfraError
from pz_envs.checks import _children
from pz_envs.pool import AsyncPool
from pz_envs.vector import PoolVectorEnv, batch_infos

COUNTDOWN = "pz/Countdown-v0"

# What a test wants of an environment, decided by the action's text.
_MOODY = '''
import os, time
import numpy as np
from pz_envs.countdown.env import CountdownEnv

class Moody(CountdownEnv):
    def _advance(self, command):
        word, _, rest = command.partition(" ")
        if word == "sleep":
            time.sleep(float(rest))
        elif word == "raise":
            raise ValueError("no such luck")
        elif word == "exit":
            os._exit(7)
        elif word == "wait":
            while not os.path.exists(rest):
                time.sleep(0.02)
        return super()._advance(command)

class Barren(CountdownEnv):
    """Its second reset ends the process."""
    resets = 0
    def _start(self, seed, options):
        Barren.resets += 1
        if Barren.resets > 1 or options.get("again"):
            os._exit(7)
        return super()._start(seed, options)

class Pictured(CountdownEnv):
    def _info(self, outcome, *, format_error):
        info = super()._info(outcome, format_error=format_error)
        info["extra"]["image"] = np.full((2, 3, 3), self._steps, np.uint8)
        return info

def broken():
    raise ValueError("cannot be made")
'''


@pytest.fixture(autouse=True)
def moody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "moody_envs.py").write_text(textwrap.dedent(_MOODY))
    monkeypatch.syspath_prepend(str(tmp_path))


@contextmanager
def vector(env_id: str = COUNTDOWN, **kwargs: Any) -> Iterator[PoolVectorEnv]:
    made = gymnasium.make_vec(env_id, **kwargs)
    assert isinstance(made, PoolVectorEnv)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def pool(env: str = "moody_envs:Moody", num_envs: int = 2, **kwargs: Any) -> Iterator[AsyncPool]:
    made = AsyncPool(env, num_envs, **{"tries": 9, **kwargs})
    try:
        yield made
    finally:
        made.close()


def plain(value: Any) -> Any:
    """Return arrays as lists, so that two results compare."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    return plain(value.tolist()) if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_it_plays_the_episodes_of_gymnasiums_own_vector_environment(mode: AutoresetMode) -> None:
    def one() -> gymnasium.Env[str, str]:
        return gymnasium.make("pz/EZPoints-v0")

    theirs: VectorEnv[Any, Any, Any] = SyncVectorEnv([one] * 5, autoreset_mode=mode)
    with vector("pz/EZPoints-v0", num_envs=5, processes=2, autoreset_mode=mode) as ours:
        assert ours.metadata["autoreset_mode"] is mode
        assert plain(ours.reset(seed=7)) == plain(theirs.reset(seed=7))
        ended = 0
        for number in range(6):
            actions = ["1" if (number + i) % 3 else "=" for i in range(5)]
            got, expected = ours.step(actions), theirs.step(actions)
            assert plain(got) == plain(expected)
            over = got[2] | got[3]
            ended += int(over.sum())
            if mode is AutoresetMode.DISABLED and over.any():
                mask = {"reset_mask": over}
                assert plain(ours.reset(options=dict(mask))) == plain(
                    theirs.reset(options=dict(mask))
                )
        assert ended >= 5
        assert plain(ours.reset()) == plain(theirs.reset())
        seeds = [5, 4, None, 2, 1]
        assert plain(ours.reset(seed=seeds)) == plain(theirs.reset(seed=seeds))
    theirs.close()


def test_same_step_is_the_default_and_keeps_the_last_observation() -> None:
    with vector("pz/EZPoints-v0", num_envs=2) as env:
        assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
        (first, _), _ = env.reset(seed=0)
        observations, rewards, terminated, truncated, infos = env.step(["=", "<action>"])
        assert terminated.tolist() == [True, False]
        assert not truncated.any()
        assert rewards.tolist() == [-1.0, -1.0]
        assert observations[0].startswith("Cards: ")
        assert observations[0] != first
        assert infos["final_obs"].tolist() == [f"That is no formula with a value. {first}", None]
        assert infos["_final_info"].tolist() == [True, False]
        assert infos["final_info"]["steps"].tolist() == [1, 0]
        assert infos["steps"].tolist() == [0, 1]
        assert infos["format_error"].tolist() == [False, True]


def test_next_step_answers_the_action_after_an_end_with_the_reset() -> None:
    with vector("pz/EZPoints-v0", num_envs=2, autoreset_mode="NextStep") as env:
        env.reset(seed=0)
        observations, _, terminated, _, infos = env.step(["=", "+"])
        assert observations[0].startswith("That is no formula")
        assert terminated.tolist() == [True, False]
        assert "final_obs" not in infos
        observations, rewards, terminated, _, infos = env.step(["ignored", "+"])
        assert observations[0].startswith("Cards: ")
        assert (rewards.tolist(), terminated.tolist()) == ([0.0, 0.0], [False, False])
        assert infos["steps"].tolist() == [0, 2]


def test_without_autoreset_a_step_after_the_end_is_refused() -> None:
    with vector(num_envs=2, autoreset_mode=AutoresetMode.DISABLED) as env:
        env.reset(seed=0)
        env.step(["1+1", "1+1"])
        env.reset(seed=5, options={"reset_mask": np.array([False, True])})
        with pytest.raises(EnvError, match="environment 0 is over"):
            env.step(["1+1", "1+1"])
        with pytest.raises(EnvError, match="reset_mask"):
            env.reset(options={"reset_mask": np.array([False, False])})


def test_texts_are_batched_as_tuples_and_the_spaces_know_them() -> None:
    with vector(num_envs=3) as env:
        assert env.single_observation_space == pz_envs.TextSpace()
        observations, _ = env.reset(seed=0)
        assert type(observations) is tuple
        assert env.observation_space.contains(observations)
        actions = env.action_space.sample()
        assert env.action_space.contains(actions)
        assert env.step(actions)[1].shape == (3,)
        assert env.spec is not None
        assert env.spec.id == COUNTDOWN


def test_the_number_of_processes_changes_no_episode() -> None:
    played = []
    for processes in (1, 3):
        with vector(num_envs=4, processes=processes, tries=3) as env:
            events = [plain(env.reset(seed=11))]
            events += [plain(env.step(["1", "", "2", "é\ud800"])) for _ in range(7)]
            played.append(events)
    assert played[0] == played[1]


def test_the_registered_spec_can_be_written_as_json() -> None:
    spec = gymnasium.spec("pz/Detective-v0")
    assert gymnasium.envs.registration.EnvSpec.from_json(spec.to_json()) == spec


def test_arguments_are_those_of_the_environment_and_wrong_ones_are_refused() -> None:
    with vector(num_envs=1, tries=2, render_mode="ansi") as env:
        observations, _ = env.reset(seed=1)
        assert env.render() == observations
        assert not env.step(["1+1"])[2][0]
    with pytest.raises(EnvError, match="trys"):
        gymnasium.make_vec(COUNTDOWN, num_envs=1, trys=2)
    with pytest.raises(ConfigError, match="JSON"):
        gymnasium.make_vec(COUNTDOWN, num_envs=1, tries={1})
    with pytest.raises(ConfigError, match="num_envs=0"):
        gymnasium.make_vec(COUNTDOWN, num_envs=0)
    with pytest.raises(ConfigError, match="allowed are NextStep, SameStep, Disabled"):
        gymnasium.make_vec(COUNTDOWN, num_envs=1, autoreset_mode="Never")
    with pytest.raises(EnvError, match="cannot be made: ValueError: cannot be made"):
        AsyncPool("moody_envs:broken", 2)
    with pytest.raises(ConfigError, match="Did you mean `pz/Countdown-v0`"):
        AsyncPool("pz/Countdwn-v0", 2)


def test_wrong_actions_are_refused_before_anything_is_sent() -> None:
    with vector("pz/EZPoints-v0", num_envs=2) as env:
        with pytest.raises(EnvError, match="has not begun"):
            env.step(["1", "1"])
        env.reset(seed=0)
        wrong: list[tuple[Any, str]] = [(["1"], "1 actions"), ("11", "one str"), ([1, 2], "a str")]
        for actions, said in wrong:
            with pytest.raises(EnvError, match=said):
                env.step(actions)
        with pytest.raises(EnvError, match="3 seeds were given for 2"):
            env.reset(seed=[1, 2, 3])
        with pytest.raises(ConfigError, match="options must be plain"):
            env.reset(options={"index": {1}})
        assert env.step(["+", "+"])[4]["steps"].tolist() == [1, 1]


# The form without a barrier.


def test_a_slow_environment_holds_nobody_up(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with pool(num_envs=4, processes=2) as envs:
        envs.reset(seed=0)
        batch = envs.recv(4)
        assert sorted(batch.ids.tolist()) == [0, 1, 2, 3]
        envs.send([f"wait {gate}"], ids=[1])
        others = [0, 2, 3]
        for steps in range(1, 4):
            envs.send(["1"] * 3, ids=others)
            batch = envs.recv(3)
            assert sorted(batch.ids.tolist()) == others
            assert [info["steps"] for info in batch.infos] == [steps] * 3
            assert envs.waiting == 1
        with pytest.raises(EnvError, match="environment 1 has not answered"):
            envs.send(["1"], ids=[1])
        with pytest.raises(EnvError, match="1 answers are to come"):
            envs.recv(2)
        gate.touch()
        assert envs.recv().ids.tolist() == [1]
        assert envs.waiting == 0


def test_environments_of_one_process_wait_at_the_same_time(tmp_path: Path) -> None:
    with pool(num_envs=2, processes=1) as envs:
        envs.reset(seed=0)
        envs.recv(2)
        envs.send([f"wait {tmp_path / 'a'}"], ids=[0])
        envs.send([f"wait {tmp_path / 'b'}"], ids=[1])
        (tmp_path / "b").touch()  # were they one after another, this would never be reached
        assert envs.recv().ids.tolist() == [1]
        (tmp_path / "a").touch()
        assert envs.recv().ids.tolist() == [0]


def test_an_array_under_extra_arrives_as_it_is() -> None:
    with pool("moody_envs:Pictured") as envs:
        envs.reset(seed=0)
        assert envs.recv(2).infos[0]["extra"]["image"].sum() == 0
        envs.send(["1", "1"])
        image = envs.recv(2).infos[1]["extra"]["image"]
        assert (image.shape, image.dtype, image.sum()) == ((2, 3, 3), np.uint8, 18)


# Failures.


def _failure(infos: Sequence[Any], number: int) -> str:
    return str(infos[number]["extra"]["error"])


def test_a_step_that_raises_costs_its_own_episode_only() -> None:
    with pool(autoreset_mode=AutoresetMode.DISABLED) as envs:
        envs.reset(seed=0)
        envs.recv(2)
        envs.send(["raise", "1"])
        batch = envs.recv(2)
        by_id = dict(zip(batch.ids.tolist(), range(2), strict=True))
        assert batch.truncated[by_id[0]]
        assert not batch.truncated[by_id[1]]
        assert not batch.terminated.any()
        assert "ValueError: no such luck" in _failure(batch.infos, by_id[0])
        assert tuple(sorted(batch.infos[0])) == tuple(sorted(pz_envs.INFO_KEYS))
        assert envs.restarts == 0
        envs.reset(ids=[0])
        assert envs.recv().observations[0].startswith("Numbers: ")


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_a_process_that_dies_is_replaced_and_its_episodes_are_reported(mode: str) -> None:
    with pool(num_envs=4, processes=2, autoreset_mode=mode) as envs:
        envs.reset(seed=0)
        first = dict(zip(*(lambda b: (b.ids.tolist(), b.observations))(envs.recv(4)), strict=True))
        envs.send(["1", "exit", "1"], ids=[0, 1, 2])
        batch = envs.recv(3)
        assert envs.restarts == 1
        rows = dict(zip(batch.ids.tolist(), batch.truncated.tolist(), strict=True))
        assert rows[1]
        assert not rows[2]
        info = batch.infos[batch.ids.tolist().index(1)]
        lost = info["final_info"] if mode == "SameStep" else info
        assert "the episode is lost" in lost["extra"]["error"]
        if mode == "SameStep":
            observation = batch.observations[batch.ids.tolist().index(1)]
            assert observation.startswith("Numbers: ")
            assert observation != first[1]
        envs.send(["1"], ids=[2])
        assert envs.recv().infos[0]["steps"] == 2
        envs.send(["1"], ids=[1])
        assert not envs.recv().truncated[0]


def test_an_idle_environment_learns_at_its_next_step_that_its_process_died() -> None:
    with vector("pz/Countdown-v0", num_envs=2, processes=1, tries=9) as env:
        env.reset(seed=0)
        process = env.pool._shards[0].process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        _, _, terminated, truncated, infos = env.step(["1", "1"])
        assert truncated.tolist() == [True, True]
        assert not terminated.any()
        errors = infos["final_info"]["extra"]["error"]
        assert all("died (signal 9)" in error for error in errors)
        assert env.step(["1", "1"])[4]["steps"].tolist() == [1, 1]


def test_the_episodes_after_a_crash_are_those_that_would_have_come_without_it() -> None:
    with pool(processes=1) as sound, pool(processes=1) as crashed:
        seen = []
        for envs, action in ((sound, "raise"), (crashed, "exit")):
            envs.reset(seed=5)
            envs.recv(2)
            envs.send([action, action])
            batch = envs.recv(2)
            order = np.argsort(batch.ids)
            seen.append([batch.observations[i] for i in order])
        assert crashed.restarts == 1
        assert seen[0] == seen[1]


def test_an_environment_that_hangs_is_ended() -> None:
    with pool(num_envs=1, timeout_s=3, autoreset_mode="NextStep") as envs:
        envs.reset(seed=0)
        envs.recv()
        envs.send(["sleep 600"])
        batch = envs.recv()
        assert batch.truncated[0]
        assert "did not answer within 3 s" in _failure(batch.infos, 0)


def test_an_environment_that_never_starts_again_is_an_error() -> None:
    with pool("moody_envs:Barren", num_envs=1) as envs:
        envs.reset(seed=0)
        envs.recv()
        envs.reset(options={"again": True})
        with pytest.raises(InfraError, match="4 times without an answer"):
            envs.recv()


def test_close_leaves_no_process() -> None:
    before = _children()
    env = gymnasium.make_vec("pz/Countdown-v0", num_envs=3, processes=3)
    assert isinstance(env, PoolVectorEnv)
    env.reset(seed=0)
    assert len(_children() - before) == 3
    env.close()
    env.close()
    assert not _children() - before
    with pytest.raises(EnvError, match="closed"):
        env.pool.send(["1"] * 3)


@pytest.mark.slow
def test_close_does_not_wait_for_a_step_that_never_ends() -> None:
    before = _children()
    with pool(num_envs=1) as envs:
        envs.reset(seed=0)
        envs.recv()
        envs.send(["sleep 600"])
    assert not _children() - before


def test_both_forms_of_an_id_and_gymnasiums_own_vector_environment_work() -> None:
    with vector("pz_envs:pz/EZPoints-v0", num_envs=2) as env:
        ours, _ = env.reset(seed=3)
    sync = gymnasium.make_vec("pz/EZPoints-v0", num_envs=2, vectorization_mode="sync")
    assert sync.reset(seed=3)[0] == ours
    sync.close()


def test_the_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pz_envs.pool import AsyncPool\n"
        "pool = AsyncPool('pz/Countdown-v0', 2, processes=2)\n"
        "print(*[shard.process.pid for shard in pool._shards], flush=True); time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.communicate()
    assert len(pids) == 2
    end = time.monotonic() + 60
    while (alive := [pid for pid in pids if _alive(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive


def _alive(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_what_the_page_shows_runs() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "envs" / "vector.md"
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        done = subprocess.run(
            [sys.executable, "-c", snippet], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr


# Every family.


def _representatives() -> list[str]:
    """Return the first id of each family that is playable here."""
    found: dict[str, str] = {}
    for row in pz_envs.rows():
        if row.family not in found and pz_envs.missing(row) is None:
            found[row.family] = row.id
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("env_id", _representatives())
def test_every_family_steps_as_it_does_alone(env_id: str) -> None:
    with vector(env_id, num_envs=3, processes=2) as env:
        observations, _ = env.reset(seed=2)
        stepped = [env.step(["look", "north", "1"]) for _ in range(2)]
    for number, action in enumerate(("look", "north", "1")):
        alone = pz_envs.make_env(env_id)
        try:
            assert alone.reset(seed=2 + number)[0] == observations[number]
            for step in stepped:
                observation, reward, terminated, _, _ = alone.step(action)
                assert (reward, terminated) == (step[1][number], step[2][number])
                if terminated:
                    assert step[4]["final_obs"][number] == observation
                    break
                assert step[0][number] == observation
        finally:
            alone.close()


# Infos.


def test_infos_are_batched_without_loss() -> None:
    batched = batch_infos([{"a": 1, "b": "x", "d": {"e": True}}, None, {"a": 0.5, "b": None}])
    assert plain(batched) == {
        "a": [1.0, 0.0, 0.5],
        "_a": [True, False, True],
        "b": ["x", None, None],
        "_b": [True, False, True],
        "d": {"e": [True, False, False], "_e": [True, False, False]},
        "_d": [True, False, False],
    }
    assert batched["a"].dtype == np.float64
    whole = batch_infos([{"a": 1, "c": (1, 2)}, {"a": 2, "c": [3]}])
    assert whole["a"].dtype == np.int64
    assert whole["c"].tolist() == [(1, 2), [3]]
    assert batch_infos([{"n": 2**60}, {"n": 1}])["n"].tolist() == [2**60, 1]
