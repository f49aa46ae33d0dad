"""The rollout loop, over real Countdown episodes and over an environment that breaks on demand."""

import gc
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest

from pz_agents.errors import AgentError
from pz_agents.rollout import EpisodeSpec, Limits, RolloutContext, Task, run_episodes, single
from pz_agents.sdk import Action, Sample, load_agent
from pz_envs.countdown.env import CountdownEnv
from pz_envs.errors import ConfigError, DataError, InfraError
from pz_envs.seeding import derive_seed, generator
from pz_envs.textenv import Outcome, TextEnv


@dataclass
class Faults:
    """What a Corridor does wrong, and what was seen of it."""

    step_seconds: float = 0.0
    tail_seconds: float = 0.0
    raises: bool = False
    hang: threading.Event | None = None
    made: int = 0
    closed: int = 0
    alive: set = field(default_factory=set)


class Corridor(TextEnv):
    """Walk ``length`` steps with "go"; anything else is invalid. Breaks as its faults say."""

    family = "corridor"
    can_snapshot = False

    def __init__(self, faults=None, length=5):
        super().__init__()
        self.faults = faults or Faults()
        self.length = length
        self.faults.made += 1
        self.faults.alive.add(id(self))

    def _start(self, seed, options):
        self.place = 0
        self.rng = generator("corridor", seed)
        self._task_id = f"corridor-{seed}"
        self._max_score = float(self.length)
        return Outcome("start", 0.0, admissible_commands=("go", "stay"))

    def _advance(self, command):
        faults = self.faults
        time.sleep(faults.step_seconds)
        if faults.tail_seconds and self.rng.random() < 0.1:
            time.sleep(faults.tail_seconds)
        if command == "hang":
            faults.hang.wait(20)
        if faults.raises and command == "go" and self.rng.random() < 0.5:
            raise RuntimeError("the floor gave way")
        moved = command == "go"
        self.place += moved
        done = self.place == self.length
        return Outcome(
            f"place {self.place}",
            float(self.place),
            reward=float(moved),
            terminated=done,
            success=done,
            valid=command in ("go", "stay"),
            admissible_commands=("go", "stay"),
        )

    def close(self):
        self.faults.closed += 1
        self.faults.alive.discard(id(self))


class Scripted:
    """Answers with ``reply(turn)`` and remembers how it was called."""

    def __init__(self, reply=lambda turn: "go", seconds=0.0):
        self.reply = reply
        self.seconds = seconds
        self.batches = []
        self.open = set()
        self.ended = []

    def start(self, episodes):
        self.open |= {episode.key for episode in episodes}

    def act(self, turns):
        self.batches.append([turn.episode.key for turn in turns])
        assert {turn.episode.key for turn in turns} <= self.open
        time.sleep(self.seconds)
        return [self.reply(turn) for turn in turns]

    def end(self, trajectory):
        self.open.remove(trajectory.key)
        self.ended.append(trajectory.key)


def specs(count, env_id="corridor"):
    return [EpisodeSpec(f"e{number}", env_id, number) for number in range(count)]


def play(agent, count=4, *, make_env=None, limits=None, seed=0, concurrency=16):
    return list(
        run_episodes(
            agent,
            specs(count),
            make_env=make_env or (lambda env_id: Corridor()),
            limits=limits or Limits(),
            seed=seed,
            concurrency=concurrency,
        )
    )


def told(trajectory):
    """Everything of a trajectory that must not depend on scheduling."""
    steps = tuple(
        (step.observation, step.action, step.reward, step.score, step.valid, step.format_error)
        for step in trajectory.steps
    )
    return (
        trajectory.key,
        trajectory.env_seed,
        trajectory.task_id,
        steps,
        trajectory.final_observation,
        trajectory.reward,
        trajectory.score_norm,
        trajectory.success,
        trajectory.terminated,
        trajectory.truncated,
        trajectory.status,
        trajectory.error,
    )


def by_key(trajectories):
    return sorted(told(trajectory) for trajectory in trajectories)


def countdown(env_id):
    return CountdownEnv(tries=4)


def random_numbers(turn):
    """Draws from the turn's seed, as every agent must."""
    return f"<answer>{generator(turn.seed).integers(1000)}</answer>"


def test_the_expert_solves_every_countdown_puzzle():
    trajectories = play(load_agent("expert"), 20, make_env=countdown)
    assert len(trajectories) == 20
    assert all(item.success and item.terminated and item.score_norm == 1 for item in trajectories)


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs():
    first, again = (play(Scripted(random_numbers), 12, make_env=countdown) for _ in range(2))
    assert by_key(first) == by_key(again)
    other = play(Scripted(random_numbers), 12, make_env=countdown, seed=1)
    assert by_key(first) != by_key(other)


@pytest.mark.parametrize("concurrency", [2, 16])
def test_concurrency_does_not_change_what_happens(concurrency):
    one = play(Scripted(random_numbers), 24, make_env=countdown, concurrency=1)
    many = play(Scripted(random_numbers), 24, make_env=countdown, concurrency=concurrency)
    assert by_key(one) == by_key(many)


def test_quick_environments_give_a_model_the_same_batches_in_every_run():
    def thinks(turn):
        time.sleep(0.005)  # an agent that answers at once is asked without waiting
        return random_numbers(turn)

    agents = [Scripted(thinks) for _ in range(2)]
    for agent in agents:
        play(agent, 24, make_env=countdown, concurrency=8)
    assert agents[0].batches == agents[1].batches
    assert agents[0].batches[0] == [f"e{number}" for number in range(8)]


def test_a_turn_names_its_stream_its_episode_and_the_reward_just_earned():
    seen = []

    def reply(turn):
        seen.append((turn.episode.key, turn.index, turn.seed, turn.reward, turn.observation))
        return "go"

    play(Scripted(reply), 1, seed=7)
    assert seen[0] == ("e0", 0, derive_seed(7, "turn", "e0", 0), 0.0, "start")
    assert seen[1] == ("e0", 1, derive_seed(7, "turn", "e0", 1), 1.0, "place 1")


def test_steps_tell_the_whole_episode():
    (trajectory,) = play(Scripted(lambda turn: "stay" if turn.index == 1 else "go"), 1)
    assert [step.action for step in trajectory.steps] == ["go", "stay", "go", "go", "go", "go"]
    assert [step.observation for step in trajectory.steps[:3]] == ["start", "place 1", "place 1"]
    assert trajectory.final_observation == "place 5"
    assert (trajectory.reward, trajectory.score, trajectory.max_score) == (5.0, 5.0, 5.0)
    assert trajectory.success
    assert trajectory.terminated
    assert trajectory.truncated == ""


def test_samples_travel_untouched():
    samples = {}

    def reply(turn):
        ids = np.array([turn.index, 7], dtype=np.int32)
        sample = Sample(ids, ids, np.array([-0.1, -np.inf], dtype=np.float32), version=3)
        samples[turn.index] = sample
        return Action("go", sample, {"why": "because"})

    (trajectory,) = play(Scripted(reply), 1)
    assert [step.sample for step in trajectory.steps] == [samples[i] for i in range(5)]
    assert trajectory.steps[0].notes == {"why": "because"}
    assert trajectory.sampled_tokens == 10


def tokens(turn):
    ids = np.zeros(40, dtype=np.int32)
    return Action("stay", Sample(ids, ids, ids.astype(np.float32)))


@pytest.mark.parametrize(
    ("limit", "reply", "steps", "limits"),
    [
        ("turns", lambda turn: "stay", 6, Limits(turns=6)),
        ("tokens", tokens, 3, Limits(tokens=100)),
        ("invalid", lambda turn: f"jump {turn.index}", 4, Limits(invalid_streak=4)),
        ("repeats", lambda turn: "stay", 5, Limits(repeats=5)),
    ],
)
def test_every_limit_ends_the_episode_and_says_which_it_was(limit, reply, steps, limits):
    (trajectory,) = play(Scripted(reply), 1, limits=limits)
    assert trajectory.truncated == limit
    assert len(trajectory.steps) == steps
    assert trajectory.status == "ok"
    assert not trajectory.terminated


def test_the_wall_clock_ends_an_episode():
    (trajectory,) = play(
        Scripted(lambda turn: "stay", seconds=0.05), 1, limits=Limits(seconds=0.3, repeats=99)
    )
    assert trajectory.truncated == "time"
    assert 2 <= len(trajectory.steps) <= 6


def test_the_callers_own_time_is_on_nobodys_clock():
    agent = Scripted(lambda turn: "go" if turn.episode.key == "e0" or turn.index > 6 else "stay")
    seen = []
    episodes = run_episodes(
        agent,
        specs(2),
        make_env=lambda env_id: Corridor(),
        limits=Limits(seconds=0.5),
        seed=0,
    )
    for trajectory in episodes:
        seen.append(trajectory)
        time.sleep(0.7)
    assert [item.truncated for item in seen] == ["", ""]
    assert seen[1].seconds < 0.5


def test_a_streak_is_broken_by_a_valid_or_another_action():
    def reply(turn):
        return "jump" if turn.index % 3 else "stay"

    (trajectory,) = play(Scripted(reply), 1, limits=Limits(turns=12, invalid_streak=3, repeats=3))
    assert trajectory.truncated == "turns"


def test_the_action_that_ends_the_game_is_no_truncation():
    (trajectory,) = play(Scripted(), 1, limits=Limits(turns=5, repeats=5))
    assert trajectory.terminated
    assert trajectory.truncated == ""


@pytest.mark.parametrize("name", ["turns", "tokens", "seconds", "invalid_streak", "repeats"])
def test_limits_must_be_finite_and_positive(name):
    with pytest.raises(ConfigError, match=name):
        Limits(**{name: float("inf")})
    with pytest.raises(ConfigError, match=name):
        Limits(**{name: 0})


def test_a_step_that_raises_fails_its_episode_alone_and_every_failure_is_counted():
    faults = Faults(raises=True)
    agent = Scripted()
    trajectories = play(
        agent, 60, make_env=lambda env_id: Corridor(faults, length=1), concurrency=4
    )
    failed = [item for item in trajectories if item.status == "failed"]
    assert len(trajectories) == 60
    assert 15 < len(failed) < 45
    assert {item.error for item in failed} == {"RuntimeError: the floor gave way"}
    assert all(item.score_norm == 0 and not item.success for item in failed)
    assert faults.made == faults.closed
    assert faults.made <= 4 + len(failed)
    assert sorted(agent.ended) == sorted(item.key for item in trajectories)


def test_a_reset_that_raises_fails_its_episode():
    class Locked(Corridor):
        def _start(self, seed, options):
            if seed == derive_seed("corridor", 1):
                raise OSError("the door is locked")
            return super()._start(seed, options)

    trajectories = play(Scripted(), 3, make_env=lambda env_id: Locked())
    statuses = {item.key: (item.status, item.error) for item in trajectories}
    assert statuses["e1"] == ("failed", "OSError: the door is locked")
    assert statuses["e0"][0] == statuses["e2"][0] == "ok"


def test_environments_are_reused_and_all_closed():
    faults = Faults()
    play(Scripted(), 30, make_env=lambda env_id: Corridor(faults), concurrency=3)
    assert faults.made == faults.closed == 3


def test_an_environment_is_replaced_when_the_next_episode_is_of_another_id():
    made = []

    def make_env(env_id):
        made.append(env_id)
        return Corridor(length=2)

    mixed = [EpisodeSpec(f"e{number}", "ab"[number // 4], number) for number in range(8)]
    episodes = run_episodes(
        Scripted(), mixed, make_env=make_env, limits=Limits(), seed=0, concurrency=2
    )
    assert {item.env_id for item in episodes} == {"a", "b"}
    assert sorted(made) == ["a", "a", "b", "b"]


def test_a_hung_step_is_abandoned_and_the_others_go_on():
    release = threading.Event()
    faults = Faults(hang=release)
    agent = Scripted(lambda turn: "hang" if turn.episode.key == "e1" else "go")
    began = time.monotonic()
    finished = {}
    episodes = run_episodes(
        agent,
        specs(12),
        make_env=lambda env_id: Corridor(faults),
        limits=Limits(seconds=1.5),
        seed=0,
        concurrency=3,
    )
    for trajectory in episodes:
        finished[trajectory.key] = (time.monotonic() - began, trajectory)
    hung = finished.pop("e1")[1]
    assert hung.status == "failed"
    assert "step did not return within" in hung.error
    assert 1.4 < time.monotonic() - began < 4
    assert len(finished) == 11
    assert all(seconds < 1.3 and item.success for seconds, item in finished.values())
    release.set()
    deadline = time.monotonic() + 5
    while faults.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not faults.alive


def test_slow_environments_hold_up_nobody():
    slow, quick = Faults(step_seconds=0.4), Faults()
    mixed = [EpisodeSpec("slow", "slow", 0), *specs(8, "quick")]
    episodes = run_episodes(
        Scripted(),
        mixed,
        make_env=lambda env_id: Corridor(slow if env_id == "slow" else quick),
        limits=Limits(),
        seed=0,
        concurrency=3,
    )
    assert [item.key for item in episodes][-1] == "slow"


def test_heavy_tails_cost_far_less_than_lockstep():
    faults = Faults(step_seconds=0.002, tail_seconds=0.3)
    began = time.monotonic()
    trajectories = play(
        Scripted(), 48, make_env=lambda env_id: Corridor(faults, length=10), concurrency=16
    )
    seconds = time.monotonic() - began
    # In lockstep nearly each of the 30 rounds has one of its 16 steps in the tail.
    assert len(trajectories) == 48
    assert seconds < 30 * 0.3 / 1.5


def test_concurrent_steps_overlap():
    faults = Faults(step_seconds=0.05)
    began = time.monotonic()
    play(Scripted(), 16, make_env=lambda env_id: Corridor(faults), concurrency=16)
    assert time.monotonic() - began < 16 * 5 * 0.05 / 4


def test_an_agents_exception_fails_only_the_culprit():
    def reply(turn):
        if turn.episode.key == "e2" and turn.index == 3:
            raise ValueError("cannot think")
        return "go"

    agent = Scripted(reply)
    trajectories = {item.key: item for item in play(agent, 5)}
    assert trajectories["e2"].status == "failed"
    assert trajectories["e2"].error == "ValueError: cannot think"
    assert len(trajectories["e2"].steps) == 3
    assert all(trajectories[f"e{number}"].success for number in (0, 1, 3, 4))
    assert not agent.open


def test_an_action_that_is_no_text_fails_its_episode():
    trajectories = play(Scripted(lambda turn: 5 if turn.episode.key == "e0" else "go"), 2)
    errors = {item.key: item.error for item in trajectories}
    assert "act() must return Action or str; got 5" in errors["e0"]
    assert errors["e1"] is None


def test_another_number_of_actions_stops_the_run():
    class Short(Scripted):
        def act(self, turns):
            return super().act(turns)[1:]

    faults = Faults()
    with pytest.raises(AgentError, match="given 3 turns and returned 2"):
        play(Short(), 3, make_env=lambda env_id: Corridor(faults))
    assert faults.made == faults.closed


def test_an_end_that_raises_fails_the_episode():
    class Forgetful(Scripted):
        def end(self, trajectory):
            super().end(trajectory)
            raise KeyError("who was that")

    (trajectory,) = play(Forgetful(), 1)
    assert trajectory.status == "failed"
    assert "end() raised KeyError" in trajectory.error


def test_a_run_in_which_everything_fails_stops_instead_of_spinning():
    class Broken(Corridor):
        def _advance(self, command):
            raise RuntimeError("nothing works")

    agent = Scripted()
    with pytest.raises(InfraError, match=r"24 episodes in a row failed[\s\S]*nothing works"):
        play(agent, 500, make_env=lambda env_id: Broken(), concurrency=4)
    assert 24 <= len(agent.ended) <= 28


def test_a_run_in_which_most_fails_stops_too():
    def reply(turn):
        if int(turn.episode.key[1:]) % 10 < 6:
            raise ValueError("no")
        return "go"

    with pytest.raises(InfraError, match="more than half of the last 256 episodes failed"):
        play(Scripted(reply), 600)


@pytest.mark.parametrize("kind", [ConfigError, DataError])
def test_an_environment_that_cannot_be_made_stops_the_run_with_its_own_error(kind):
    def make_env(env_id):
        raise kind("get the story file first")

    with pytest.raises(kind, match="get the story file"):
        play(Scripted(), 3, make_env=make_env)


def test_two_episodes_of_one_key_are_refused():
    twice = [*specs(1), *specs(1)]
    with pytest.raises(ConfigError, match="'e0'"):
        list(
            run_episodes(
                Scripted(), twice, make_env=lambda env_id: Corridor(), limits=Limits(), seed=0
            )
        )


def test_leaving_early_closes_every_environment_and_ends_every_episode():
    faults = Faults(step_seconds=0.01)
    agent = Scripted()
    endless = (EpisodeSpec(f"e{number}", "corridor", number) for number in range(10**9))
    episodes = run_episodes(
        agent,
        endless,
        make_env=lambda env_id: Corridor(faults),
        limits=Limits(),
        seed=0,
        concurrency=4,
    )
    next(episodes)
    episodes.close()
    assert faults.made == faults.closed
    assert not faults.alive
    assert not agent.open
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name == "pz-env"]


def test_reset_options_reach_the_environment():
    seen = []

    class Curious(Corridor):
        def _start(self, seed, options):
            seen.append(dict(options))
            return super()._start(seed, options)

    agent = Scripted()
    agent.reset_options = {"expert": True}
    play(agent, 1, make_env=lambda env_id: Curious())
    assert seen == [{"expert": True}]


def test_single_plays_a_group_of_each_task():
    context = RolloutContext(
        agent=Scripted(random_numbers),
        make_env=countdown,
        limits=Limits(),
        seed=3,
        concurrency=4,
        group_size=3,
    )
    tasks = [Task("pz/Countdown-v0", 11, "a"), Task("pz/Countdown-v0", 12, "b")]
    trajectories = list(single(context, tasks))
    assert sorted(item.key for item in trajectories) == ["a/0", "a/1", "a/2", "b/0", "b/1", "b/2"]
    for group in "ab":
        members = [item for item in trajectories if item.group_id == group]
        assert len({item.task_id for item in members}) == 1
        assert len({item.steps[0].action for item in members}) > 1
        assert sorted(item.attempt for item in members) == [0, 1, 2]
