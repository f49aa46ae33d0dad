"""The environment contract, seen through the smallest family: a counter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import pytest

from pz_envs import INFO_KEYS, EnvError, Outcome, Snapshot, TextEnv, TextSpace, text_env


class Counter(TextEnv):
    """Counts ``up`` commands to three; the seed sets the start."""

    family: ClassVar[str] = "counter"
    can_snapshot: ClassVar[bool] = True

    def _start(self, seed: int, options: Mapping[str, Any]) -> Outcome:
        self._task_id, self._max_score, self._instruction = f"counter/{seed % 2}", 3.0, "Say up."
        self._count = seed % 2
        return self._now(valid=True)

    def _advance(self, command: str) -> Outcome:
        valid = command == "up"
        self._count += valid
        return self._now(valid=valid, reward=float(valid))

    def _now(self, *, valid: bool, reward: float = 0.0) -> Outcome:
        done = self._count == 3
        return Outcome(
            f"count {self._count}", self._count, reward, done, done, valid, ("up", "wait")
        )

    def _save(self) -> bytes:
        return bytes([self._count])

    def _load(self, engine: bytes, header: Mapping[str, Any]) -> None:
        self._count = engine[0]


def test_an_episode_reports_steps_scores_and_success() -> None:
    env = Counter()
    observation, info = env.reset(seed=1)
    assert set(info) == set(INFO_KEYS)
    start = info["score"]
    assert observation == f"count {start}"
    for step in range(1, 4 - int(start)):
        observation, reward, terminated, truncated, info = env.step("<action>up</action>")
        assert (reward, truncated, info["steps"], info["valid"]) == (1.0, False, step, True)
    assert terminated
    assert info["success"]
    assert info["score_norm"] == 1.0


def test_an_unreadable_reply_is_an_invalid_step_that_touches_nothing() -> None:
    env = Counter()
    _, before = env.reset(seed=0)
    observation, reward, terminated, _, info = env.step("<action>up")
    assert observation == "Your reply could not be read: <action> is never closed."
    assert (reward, terminated, info["valid"], info["format_error"]) == (0.0, False, False, True)
    assert info["score"] == before["score"]
    assert info["admissible_commands"] == before["admissible_commands"]


def test_a_repeated_tag_is_a_format_error_that_still_acts() -> None:
    env = Counter()
    env.reset(seed=0)
    _, reward, _, _, info = env.step("<action>wait</action><action>up</action>")
    assert (reward, info["valid"], info["format_error"]) == (1.0, True, True)


def test_step_needs_a_live_episode() -> None:
    env = Counter()
    with pytest.raises(EnvError, match="call reset"):
        env.step("up")
    with pytest.raises(EnvError, match="call reset"):
        env.snapshot()
    env.reset(seed=0)
    while not env.step("up")[2]:
        pass
    with pytest.raises(EnvError, match="call reset"):
        env.step("up")


def test_resets_without_a_seed_follow_the_last_seed() -> None:
    def tasks(env: Counter) -> list[str]:
        env.reset(seed=5)
        return [env.reset()[1]["task_id"] for _ in range(12)]

    first = tasks(Counter())
    assert first == tasks(Counter())
    assert len(set(first)) == 2


def test_restore_goes_back_exactly_even_in_another_environment() -> None:
    env, other = Counter(), Counter()
    env.reset(seed=0)
    env.step("up")
    saved = env.snapshot()
    after = env.step("up")
    other.reset(seed=1)
    for where in (env, other):
        _, info = where.restore(saved)
        assert info["steps"] == 1
        assert info["admissible_commands"] == ("up", "wait")
        assert where.snapshot() == saved
        assert where.step("up") == after


@pytest.mark.parametrize("flip", [1, 16, 128, 255])
def test_a_snapshot_damaged_at_any_byte_is_refused(flip: int) -> None:
    env = Counter()
    env.reset(seed=0)
    whole = env.snapshot()
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= flip
        with pytest.raises(EnvError, match="snapshot"):
            env.restore(bytes(data))
    for length in range(len(whole)):
        with pytest.raises(EnvError, match="snapshot"):
            env.restore(whole[:length])


def test_a_snapshot_of_another_family_is_refused() -> None:
    env = Counter()
    env.reset(seed=0)
    foreign = Snapshot({"family": "chess"}, b"").to_bytes()
    with pytest.raises(EnvError, match="chess"):
        env.restore(foreign)


def test_replay_repeats_a_record_and_names_the_step_that_differs() -> None:
    env = Counter()
    start = int(env.reset(seed=0)[1]["score"])
    record = [("up", f"count {start + 1}"), ("wait", f"count {start + 1}")]
    _, info = env.replay(record, seed=0)
    assert info["steps"] == 2
    with pytest.raises(EnvError, match="diverged at step 1 \\('wait'\\)"):
        env.replay([("wait", "count 9")], seed=0)


def test_render_gives_the_last_observation_in_ansi_only() -> None:
    silent, loud = Counter(), Counter(render_mode="ansi")
    for env in (silent, loud):
        env.reset(seed=0)
        observation = env.step("up")[0]
    assert silent.render() is None
    assert loud.render() == observation


def test_text_space_holds_any_text_and_samples_the_same_from_a_seed() -> None:
    space = TextSpace(max_length=40)
    assert all(text in space for text in ("", "go north\n", "打开门", "\ud800", "\0"))
    assert "x" * 41 not in space
    assert 3 not in space
    first, second = TextSpace(seed=3), TextSpace(seed=3)
    samples = [first.sample() for _ in range(5)]
    assert samples == [second.sample() for _ in range(5)]
    assert all(sample in space for sample in samples)
    assert space == TextSpace(max_length=40) != TextSpace()


def test_text_env_looks_under_wrappers() -> None:
    env = Counter()
    wrapped = gymnasium.wrappers.TimeLimit(env, 5)
    assert text_env(wrapped) is env
    with pytest.raises(EnvError, match="CartPole"):
        text_env(gymnasium.make("CartPole-v1"))
