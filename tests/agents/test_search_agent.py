"""Root priors, the true simulator as a search model, and the agent that plays with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pytest

from pz_agents.errors import AgentError, ModelError
from pz_agents.rollout import EpisodeSpec, Limits, run_episodes
from pz_agents.sdk import Episode, Turn, check_agent
from pz_agents.search import (
    MctsAgent,
    Planner,
    PriorSettings,
    SearchSettings,
    SimulatorModel,
    add_noise,
    mix_prior,
    root_statistics,
    softmax,
)
from pz_envs.countdown.env import CountdownEnv
from pz_envs.datasets import find_file
from pz_envs.errors import ConfigError
from pz_envs.jericho.env import JerichoEnv
from pz_envs.seeding import generator
from pz_envs.textenv import Outcome, TextEnv


class Corridor(TextEnv):
    """Walk right; a key on the way opens the door at the end; a pit ends it all.

    Score 1 for the key, 3 more behind the door. The list of commands changes from place to place
    and is empty on the ice, where nothing can be done.
    """

    family: ClassVar[str] = "corridor"
    can_snapshot: ClassVar[bool] = True

    def _start(self, seed: int, options: Mapping[str, Any]) -> Outcome:
        self._task_id, self._max_score, self._instruction = "corridor", 4.0, "Walk."
        self._place, self._key = 0, False
        return self._outcome_here("You are at the start.")

    def _outcome_here(self, text: str, over: bool = False) -> Outcome:
        commands = ["left", "right", *(f"examine stone {i}" for i in range(self._place))]
        if self._place == 1 and not self._key:
            commands.insert(1, "take key")
        if self._place == 2:
            commands += ["jump", "skate", *(["open door"] if self._key else [])]
        won = self._place == 9
        listed = () if self._place == -5 else tuple(commands)
        score = float(self._key) + 3.0 * won
        return Outcome(text, score, terminated=over, success=won, admissible_commands=listed)

    def _advance(self, command: str) -> Outcome:
        if command == "take key" and self._place == 1:
            self._key = True
        elif command in ("left", "right") and 0 <= self._place <= 2:
            self._place = min(2, max(0, self._place + (1 if command == "right" else -1)))
        elif self._place == 2 and command == "open door" and self._key:
            self._place = 9
            return self._outcome_here("You are free.", over=True)
        elif self._place == 2 and command == "jump":
            return self._outcome_here("You fall.", over=True)
        elif self._place == 2 and command == "skate":
            self._place = -5
        return self._outcome_here(f"Place {self._place}.")

    def _save(self) -> bytes:
        return f"{self._place},{int(self._key)}".encode()

    def _load(self, engine: bytes, header: Mapping[str, Any]) -> None:
        place, key = engine.decode().split(",")
        self._place, self._key = int(place), key == "1"


class Forgetful(Corridor):
    """The same without snapshots."""

    can_snapshot: ClassVar[bool] = False


class Random:
    """Plays its list at random."""

    def act(self, turns):
        return [
            str(generator(turn.seed).choice(turn.info["admissible_commands"] or ("look",)))
            for turn in turns
        ]


def play(agent, make_env, *, episodes=1, turns=6, seed=0):
    specs = [EpisodeSpec(f"e/{number}", "any", number) for number in range(episodes)]
    done = run_episodes(
        agent, specs, make_env=lambda _: make_env(), limits=Limits(turns=turns), seed=seed
    )
    return sorted(done, key=lambda trajectory: trajectory.key)


def test_the_mix_is_in_probability_space_and_exact():
    world, scores = np.array([0.7, 0.2, 0.1]), np.log([0.1, 0.1, 0.8])
    mixed = mix_prior(world, scores, PriorSettings(llm_prior_weight=0.25))
    assert mixed == pytest.approx([0.55, 0.175, 0.275], abs=1e-15)
    other = softmax(scores)
    assert mixed.tolist() == (0.75 * world + 0.25 * other).tolist()
    replaced = mix_prior(world, scores, PriorSettings(mode="replace"))
    assert replaced == pytest.approx([0.1, 0.1, 0.8])
    for settings in (PriorSettings(mode="off"), PriorSettings(llm_prior_weight=0.0)):
        assert mix_prior(world, scores, settings).tolist() == world.tolist()
    assert mix_prior(world, None, PriorSettings(mode="replace")).tolist() == world.tolist()
    assert mix_prior(np.zeros(0), np.zeros(0), PriorSettings()).tolist() == []


def test_adaptive_mixing_trusts_the_language_model_more_when_the_world_model_is_sure():
    scores, settings = np.array([0.0, -1.0, -np.inf, 0.5]), PriorSettings(mode="adaptive")
    other = softmax(scores)
    assert other[2] == 0.0
    flat, sure = np.full(4, 0.25), np.array([1.0, 0.0, 0.0, 0.0])
    assert mix_prior(flat, scores, settings) == pytest.approx(0.7 * flat + 0.3 * other)
    assert mix_prior(sure, scores, settings) == pytest.approx(0.3 * sure + 0.7 * other)
    skewed = np.array([0.5, 0.5, 0.0, 0.0])  # entropy log 2, half of log 4
    assert mix_prior(skewed, scores, settings) == pytest.approx(0.5 * skewed + 0.5 * other)


def test_temperature_flattens_the_language_models_scores():
    scores, world = np.array([0.0, -2.0]), np.array([0.5, 0.5])
    cold, hot = (
        mix_prior(world, scores, PriorSettings(mode="replace", temperature=t)) for t in (0.5, 2.0)
    )
    assert cold[1] / cold[0] == pytest.approx(np.exp(-4))
    assert hot[1] / hot[0] == pytest.approx(np.exp(-1))


def test_scores_of_other_commands_and_nan_are_refused():
    world = np.array([0.5, 0.5])
    for scores in (np.zeros(3), np.array([np.nan, 0.0]), np.full(2, -np.inf)):
        with pytest.raises(ModelError, match="of 2 commands"):
            mix_prior(world, scores, PriorSettings())


def test_noise_keeps_a_distribution_and_comes_from_the_generator():
    prior = np.array([0.9, 0.1, 0.0])
    noisy = [add_noise(prior, generator("n", i), PriorSettings()) for i in (1, 1, 2)]
    assert noisy[0].tolist() == noisy[1].tolist() != noisy[2].tolist()
    assert noisy[0].sum() == pytest.approx(1.0)
    assert (noisy[0] >= 0.75 * prior).all()
    mean = np.mean([add_noise(prior, generator("m", i), PriorSettings()) for i in range(3000)], 0)
    assert mean == pytest.approx(0.75 * prior + 0.25 / 3, abs=0.01)
    assert (
        add_noise(prior, generator(1), PriorSettings(noise_weight=0.0)).tolist() == prior.tolist()
    )


def test_statistics_of_a_root_are_what_their_names_say():
    found = root_statistics(np.array([0.5, 0.5, 0.0]), np.array([0.0, 3.0, 1.0]))
    assert found["prior_entropy"] == pytest.approx(np.log(2))
    assert found["visit_entropy"] == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert found["overlap"] == 0.5
    assert found["agreement"] == 0.0
    assert root_statistics(np.array([0.2, 0.8]), np.array([0.0, 4.0]))["agreement"] == 1.0
    assert root_statistics(np.zeros(0), np.zeros(0)) == {}


def simulator(planner, env, **kwargs):
    return SimulatorModel(
        [env], nodes_per_tree=planner.nodes_per_tree, generators=[generator("s")], **kwargs
    )


def test_the_simulator_finds_the_way_to_the_score_and_its_value():
    env = Corridor()
    env.reset(seed=0)
    planner = Planner(SearchSettings(simulations=400))
    model = simulator(planner, env, discount=0.5)
    result = planner.search(model.roots(), model)
    assert model.commands(0) == ("left", "right")
    assert result.chosen[0] == 1
    # right, take key, right, open door: 0.5 * 1 + 0.5 ** 3 * 3, approached from below.
    assert 0.5 < result.q[1] < 0.875
    assert result.q[0] < result.q[1]


def test_the_simulators_rewards_are_gains_in_score_and_endings_have_no_future():
    env = Corridor()
    env.reset(seed=0)
    for command in ("right", "take key", "right"):
        env.step(command)
    planner = Planner(SearchSettings(simulations=60))
    model = simulator(planner, env, discount=1.0)
    result = planner.search(model.roots(), model)
    q = dict(zip(model.commands(0), result.q.tolist(), strict=True))
    assert q["open door"] == 3.0
    assert q["jump"] == 0.0
    assert q["skate"] == 0.0
    assert model.commands(0)[result.chosen[0]] == "open door"


def test_depth_bounds_the_look_ahead():
    env = Corridor()
    env.reset(seed=0)
    planner = Planner(SearchSettings(simulations=300))
    for depth, sees_key in ((1, False), (2, True)):
        env.reset(seed=0)
        model = simulator(planner, env, depth=depth)
        result = planner.search(model.roots(), model)
        assert (result.q[1] > 0.0) == sees_key


def test_a_rollout_sees_further_than_the_tree():
    env = Corridor()
    planner = Planner(SearchSettings(simulations=2))
    seen = {}
    for estimate in ("zero", "rollout"):
        env.reset(seed=0)
        model = simulator(planner, env, estimate=estimate, rollout_steps=30)
        seen[estimate] = float(planner.search(model.roots(), model).values[0])
    assert seen["zero"] == 0.0
    assert seen["rollout"] > 0.0


def test_the_agent_solves_a_corridor_that_chance_does_not():
    searched = play(MctsAgent(simulations=150, depth=6), Corridor, episodes=4)
    assert [trajectory.score for trajectory in searched] == [4.0] * 4
    assert all(len(trajectory.steps) == 4 for trajectory in searched)
    assert searched[0].steps[0].notes["simulations"] == 150
    by_chance = play(Random(), Corridor, episodes=40)
    assert np.mean([trajectory.score for trajectory in by_chance]) < 2.0


def test_the_agent_keeps_the_contract_and_leaves_the_environment_as_found():
    for rule in ("puct", "lightzero", "gumbel"):
        check_agent(MctsAgent(simulations=20, rule=rule), make_env=lambda _: Corridor())


def test_the_agent_solves_countdown_among_random_expressions():
    def make():
        return CountdownEnv(numbers=3, max_number=9, operators="+-")

    done = play(MctsAgent(simulations=300, candidates=400), make, episodes=5, turns=1)
    assert [trajectory.score for trajectory in done] == [1.0] * 5


def test_a_state_without_commands_is_answered():
    env = Corridor()
    env.reset(seed=0)
    for command in ("right", "right", "skate"):
        _, _, _, _, info = env.step(command)
    turn = Turn(Episode("k", "any", 0, env=env), 3, "ice", info, 0.0, seed=1)
    assert MctsAgent().act([turn])[0].text == "look"


def test_what_cannot_be_searched_is_refused_in_words():
    env = Forgetful()
    _, info = env.reset(seed=0)
    turn = Turn(Episode("k", "pz/Any-v0", 0, env=env), 0, "", info, 0.0, seed=1)
    with pytest.raises(AgentError, match="cannot snapshot"):
        MctsAgent().act([turn])
    with pytest.raises(AgentError, match="has none"):
        MctsAgent().act([Turn(Episode("k", "any", 0), 0, "", info, 0.0, seed=1)])
    for wrong in ({"simulations": 0}, {"depth": 0}, {"discount": 0.0}, {"rule": "ucb"}):
        with pytest.raises(ConfigError):
            MctsAgent(**wrong)


@pytest.mark.data
@pytest.mark.skipif(
    find_file("jericho", "detective.z5") is None, reason="needs detective.z5 (PZ_DATA)"
)
def test_a_small_search_scores_more_than_chance_on_detective():
    def make():
        return JerichoEnv("detective", admissible_commands=True, isolated=False)

    searched = play(MctsAgent(simulations=30, depth=4), make, turns=6)
    by_chance = play(Random(), make, episodes=3, turns=6)
    assert searched[0].score > np.mean([trajectory.score for trajectory in by_chance])
