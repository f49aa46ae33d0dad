"""Credit, programs and names of DAPO, OPMD, RAFT and GRPO's relatives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pz_agents.algorithms import ALGORITHMS, dapo, grpo, load_algorithm, opmd, raft
from pz_agents.rollout import Limits, RolloutContext, Task
from pz_agents.sdk.types import Sample, Step, Trajectory
from pz_agents.training.settings import TrainSettings, algorithm_options
from pz_envs.errors import ConfigError
from pz_envs.textenv import Outcome, TextEnv

pytestmark = pytest.mark.timeout(120)


def rollout(reward, key, *, tokens=3, truncated="", finish="stop", status="ok") -> Trajectory:
    sample = Sample(
        np.array([1], np.int32),
        np.arange(tokens, dtype=np.int32),
        np.full(tokens, -1.0, np.float32),
        finish,
    )
    group, attempt = key.rsplit("/", 1)
    return Trajectory(
        key=key,
        env_id="toy",
        env_seed=0,
        task_id="t",
        group_id=group,
        attempt=int(attempt),
        steps=(Step("", "a", reward, reward, True, False, sample),),
        final_observation="",
        reward=reward,
        score=reward,
        max_score=1.0,
        score_norm=max(reward, 0.0),
        success=reward >= 1,
        terminated=not truncated,
        truncated=truncated,
        status=status,
    )


def advantages_by_key(rows) -> dict[str, float]:
    return {row.trajectory_id: float(row.advantages[-1]) for row in rows}


def test_dapo_punishes_sampled_tokens_and_not_the_environments_words():
    options = dapo.Options(scale="none", overlong_limit=10, overlong_cache=4)
    played = [rollout(1.0, "g/0", tokens=6), rollout(1.0, "g/1", tokens=9), rollout(0.0, "g/2")]
    long_prompt = replace(played[0].steps[0].sample, prompt_ids=np.ones(500, np.int32))
    played[0] = replace(played[0], steps=(replace(played[0].steps[0], sample=long_prompt),))
    found = advantages_by_key(dapo.credit(played, options).rows)
    shaped = np.array([1.0, 0.25, 0.0])
    np.testing.assert_allclose(list(found.values()), shaped - shaped.mean(), atol=1e-6)


def test_dapo_refuses_a_punishment_that_begins_before_the_first_token():
    options = {"overlong_limit": 10, "overlong_cache": 11}
    with pytest.raises(ConfigError, match="overlong_cache to at most 10"):
        algorithm_options(
            TrainSettings(env="pz/Countdown-v0", steps=1, algorithm="dapo", options=options)
        )
    assert dapo.Options(overlong_limit=10, overlong_cache=10).overlong_cache == 10


def test_dapo_judges_groups_by_the_reward_before_the_punishment():
    played = [rollout(1.0, "g/0", tokens=2), rollout(1.0, "g/1", tokens=9)]
    found = dapo.credit(played, dapo.Options(overlong_limit=10, overlong_cache=4))
    assert found.rows == []
    assert (found.stats["groups"], found.stats["usable_groups"]) == (1, 0)


@pytest.mark.parametrize("cut", [{"truncated": "turns"}, {"finish": "length"}])
def test_overlong_filtering_leaves_out_the_row_but_not_its_reward(cut):
    played = [rollout(0.0, "g/0", **cut), rollout(1.0, "g/1"), rollout(0.0, "g/2")]
    plain = advantages_by_key(dapo.credit(played, dapo.Options()).rows)
    found = dapo.credit(played, dapo.Options(filter_overlong=True))
    assert advantages_by_key(found.rows) == {key: plain[key] for key in ("g/1", "g/2")}
    assert found.stats["overlong"] == pytest.approx(1 / 3)


def test_an_episode_cut_for_repeating_itself_is_not_overlong():
    assert not dapo.is_overlong(rollout(0.0, "g/0", truncated="repeats"))


def test_reweighting_makes_groups_of_successes_worth_training_on():
    played = [rollout(1.0, f"win/{n}") for n in range(2)] + [rollout(0.0, "lost/0")] * 2
    plain = opmd.credit(played, opmd.Options())
    assert (plain.rows, plain.stats["usable_groups"]) == ([], 0)
    amplified = opmd.credit(played, opmd.Options(success_advantage=3.0))
    assert advantages_by_key(amplified.rows) == {"win/0": 3.0, "win/1": 3.0}
    assert (amplified.stats["groups"], amplified.stats["usable_groups"]) == (2, 1)


def test_a_group_of_one_is_left_out_of_opmd_unless_asked_for():
    assert opmd.credit([rollout(0.5, "g/0")], opmd.Options()).rows == []
    asked = opmd.credit([rollout(0.5, "g/0")], opmd.Options(singletons=True))
    assert advantages_by_key(asked.rows) == {"g/0": 0.5}


def test_opmd_without_tau_refuses_what_needs_it():
    with pytest.raises(ConfigError, match="`tau` is 0"):
        opmd.Options(tau=0.0, baseline="log_mean_exp")


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ({}, {"a/1", "a/2"}),
        ({"threshold": 0.5}, {"a/0", "a/1", "a/2", "b/1"}),
        ({"rule": "best_of_group"}, {"a/1", "b/1"}),
        ({"rule": "top_frac", "top_frac": 0.5}, {"a/0", "a/1", "a/2"}),
        ({"rule": "top_frac", "top_frac": 0.01}, {"a/1"}),
    ],
)
def test_raft_accepts_by_its_rule_and_the_first_of_equals(rule, kept):
    played = [
        rollout(0.5, "a/0"),
        rollout(1.0, "a/1"),
        rollout(1.0, "a/2"),
        rollout(0.0, "b/0"),
        rollout(0.5, "b/1"),
        rollout(9.0, "b/2", status="failed"),
    ]
    found = raft.credit(played, raft.Options(**rule))
    assert set(advantages_by_key(found.rows)) == kept
    assert set(advantages_by_key(found.rows).values()) == {1.0}
    assert found.stats["accepted"] == len(kept) / 6


class Coin(TextEnv):
    """Pays 1 for the reply ``yes``; in every third seed it pays nothing at all."""

    family = "toy"

    def _start(self, seed, options):
        self._task_id, self._max_score, self._pays = f"coin-{seed}", 1.0, seed % 3 > 0
        return Outcome("Well?", 0.0)

    def _advance(self, command):
        won = command == "yes" and self._pays
        return Outcome("Done.", float(won), float(won), terminated=True, success=won)


class Wavering:
    """Says yes on even attempts and no on odd ones."""

    def act(self, turns):
        return ["yes" if turn.episode.attempt % 2 == 0 else "no" for turn in turns]


def context(options=None, agent=None) -> RolloutContext:
    return RolloutContext(
        agent=agent or Wavering(),
        make_env=lambda env_id: Coin(),
        limits=Limits(turns=1),
        seed=0,
        group_size=4,
        options=options,
    )


TASKS = [Task("toy", seed, f"step1/task{seed}") for seed in range(6)]


def groups_of(played) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for item in played:
        found.setdefault(item.group_id, []).append(item.reward)
    return found


def test_dynamic_sampling_plays_until_each_task_has_a_group_to_learn_from():
    played = list(dapo.program(context(dapo.Options()), TASKS))
    groups = groups_of(played)
    assert all(len(rewards) == 4 for rewards in groups.values())
    assert len({item.key for item in played}) == len(played)
    usable = [name for name, rewards in groups.items() if len(set(rewards)) > 1]
    assert len(usable) == len(TASKS)
    assert {name.split("/refill")[0] for name in usable} == {task.group_id for task in TASKS}
    assert "step1/task0/refill01" in groups
    assert "step1/task1/refill01" not in groups
    found = dapo.credit(played, dapo.Options())
    assert found.stats["usable_groups"] == len(TASKS)
    assert found.stats["groups"] == len(groups)


def test_dynamic_sampling_plays_the_same_tasks_again_in_the_same_run():
    runs = [
        sorted((item.key, item.env_seed) for item in dapo.program(context(), TASKS))
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_dynamic_sampling_ends_after_its_last_round(caplog):
    class Firm:
        def act(self, turns):
            return ["no"] * len(turns)

    options = dapo.Options(max_rounds=3)
    groups = groups_of(dapo.program(context(options, Firm()), TASKS))
    assert len(groups) == 3 * len(TASKS)
    assert "6 of 6 groups still earn all the same after 3 rounds" in caplog.text
    stop = dapo.Options(max_rounds=2, when_short="stop")
    with pytest.raises(ConfigError, match="raise `group_size` or `max_rounds`"):
        list(dapo.program(context(stop, Firm()), TASKS))


def test_without_dynamic_sampling_every_task_is_played_once():
    options = dapo.Options(dynamic_sampling=False)
    assert len(groups_of(dapo.program(context(options), TASKS))) == len(TASKS)


def test_raft_marks_what_it_will_not_train_on():
    played = list(raft.program(context(raft.Options()), TASKS))
    assert len(played) == 4 * len(TASKS)
    assert {item.status for item in played if item.reward == 1} == {"ok"}
    assert {item.status for item in played if item.reward == 0} == {"rejected"}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_loads_and_takes_its_own_options(name):
    algorithm = load_algorithm(name)
    settings = TrainSettings(env="pz/Countdown-v0", steps=1, algorithm=name)
    assert algorithm_options(settings) == algorithm.defaults


def test_a_variant_keeps_its_own_defaults_beside_a_users_option():
    settings = TrainSettings(
        env="pz/Countdown-v0", steps=1, algorithm="gspo", options={"beta": 0.01}
    )
    options = algorithm_options(settings)
    assert isinstance(options, grpo.Options)
    assert (options.beta, options.importance, options.clip_high) == (0.01, "sequence", 4e-4)


def test_a_cap_that_cispo_would_not_use_is_refused():
    with pytest.raises(ConfigError, match=r"dual_clip 3\.0 does nothing with surrogate cispo"):
        algorithm_options(
            TrainSettings(
                env="pz/Countdown-v0", steps=1, algorithm="cispo", options={"dual_clip": 3.0}
            )
        )


@pytest.mark.parametrize(("name", "value"), [("top_p", 0.9), ("top_k", 20), ("min_p", 0.1)])
def test_truncated_sampling_while_training_is_refused_with_the_reason(name, value):
    with pytest.raises(ConfigError, match=rf"`{name}` \({value}\).*ratio is too low"):
        TrainSettings(env="pz/Countdown-v0", steps=1, **{name: value})
