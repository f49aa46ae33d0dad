"""Root priors, the true simulator as a search model, and the agent that plays with it."""

from __future__ import annotations

import itertools
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


def searched(env, simulations, **kwargs):
    """Search from where ``env`` is; return the model and the result."""
    model = SimulatorModel(env, generator("s"), **kwargs)
    return model, Planner(SearchSettings(simulations=simulations)).search(model.roots(), model)


def test_the_simulator_finds_the_way_to_the_score_and_its_value():
    env = Corridor()
    env.reset(seed=0)
    model, result = searched(env, 400, discount=0.5)
    assert model.root.commands == ("left", "right")
    assert result.chosen[0] == 1
    # right, take key, right, open door.
    assert model.root.worth == 0.5 * 1.0 + 0.5**3 * 3.0
    assert model.root.gains(0.5)[1] == model.root.worth
    assert result.q[0] < result.q[1] < 0.875


def test_the_simulators_rewards_are_gains_in_score_and_endings_have_no_future():
    env = Corridor()
    env.reset(seed=0)
    for command in ("right", "take key", "right"):
        env.step(command)
    model, result = searched(env, 60, discount=1.0)
    q = dict(zip(model.root.commands, result.q.tolist(), strict=True))
    assert q["open door"] == 3.0
    assert q["jump"] == q["skate"] == q["right"] == 0.0
    assert model.root.worth == 3.0


def test_circles_are_closed_and_no_step_is_taken_twice():
    env = Corridor()
    env.reset(seed=0)
    model, result = searched(env, 5_000)
    # A dozen readings, no more than eight commands each.
    assert model.taken < 60
    assert result.visits.sum() == model.taken
    known, again = model.root, SimulatorModel(env, generator("s"), root=model.root)
    planner = Planner(SearchSettings(simulations=5_000))
    repeated = planner.search(again.roots(), again)
    assert again.root is known
    assert again.taken == 0
    assert repeated.visits.sum() == result.visits.sum()


def test_steps_bound_the_search_and_not_what_is_known():
    env = Corridor()
    env.reset(seed=0)
    model, result = searched(env, 100, steps=7)
    assert model.taken == result.visits.sum() == 7
    env.restore(model.root.saved)
    again = SimulatorModel(env, generator("s"), steps=7, root=model.root)
    result = Planner(SearchSettings(simulations=100)).search(again.roots(), again)
    assert again.taken == 7
    assert 7 < result.visits.sum() <= 14


def test_where_nothing_scores_new_texts_lead_on_and_not_into_the_pit():
    env = Corridor()
    env.reset(seed=0)
    for command in ("right", "right"):
        env.step(command)
    model, result = searched(env, 60, depth=2)
    q = dict(zip(model.root.commands, result.q.tolist(), strict=True))
    assert q["left"] > q["jump"] == q["right"] == 0.0


class Cave(TextEnv):
    """Waiting costs nothing; inside is dark, and whatever is done there loses a point and ends."""

    family: ClassVar[str] = "cave"
    can_snapshot: ClassVar[bool] = True

    def _start(self, seed: int, options: Mapping[str, Any]) -> Outcome:
        self._task_id, self._instruction, self._place = "cave", "Wait.", "A hill. "
        return Outcome(self._place, 0.0, admissible_commands=("in", "wait"))

    def _advance(self, command: str) -> Outcome:
        if self._place == "Dark.":
            return Outcome("A grue eats you.", -1.0, terminated=True)
        self._place = "Dark." if command == "in" else self._place + "Birds sing. "
        return Outcome(self._place, 0.0, admissible_commands=("in", "wait"))

    def _save(self) -> bytes:
        return self._place.encode()

    def _load(self, engine: bytes, header: Mapping[str, Any]) -> None:
        self._place = engine.decode()


def test_a_state_where_all_commands_lose_is_worth_a_loss_and_avoided():
    env = Cave()
    env.reset(seed=0)
    model, _ = searched(env, 30, discount=0.5, depth=4)
    assert model.root.gains(0.5) == [-0.5, 0.0]
    (played,) = play(MctsAgent(simulations=20, noise_weight=1.0), Cave)
    assert [step.action for step in played.steps] == ["wait"] * 6


def test_depth_bounds_the_look_ahead():
    env = Corridor()
    for depth, worth in ((1, 0.0), (2, 0.99)):
        env.reset(seed=0)
        model, _ = searched(env, 300, depth=depth)
        assert model.root.worth == worth


def test_the_agent_solves_a_corridor_that_chance_does_not():
    played = play(MctsAgent(simulations=40, depth=6), Corridor, episodes=4)
    assert [trajectory.score for trajectory in played] == [4.0] * 4
    assert all(len(trajectory.steps) == 4 for trajectory in played)
    by_chance = play(Random(), Corridor, episodes=40)
    assert np.mean([trajectory.score for trajectory in by_chance]) < 2.0


def test_the_agent_goes_on_from_what_it_found_and_forgets_it_at_the_end():
    agent = MctsAgent(simulations=40, discount=0.5)
    (played,) = play(agent, Corridor)
    gains = [step.notes["gain"] for step in played.steps]
    assert gains == [0.875, 1.75, 1.5, 3.0]
    assert played.steps[0].notes["simulations"] > sum(
        step.notes["simulations"] for step in played.steps[1:]
    )
    assert agent._roots == {}


def test_a_game_that_is_not_where_the_agent_thought_is_searched_afresh():
    agent, env = MctsAgent(simulations=40, discount=0.5), Corridor()
    text, info = env.reset(seed=0)
    episode = Episode("k", "any", 0, env=env)
    assert agent.act([Turn(episode, 0, text, info, 0.0, seed=1)])[0].text == "right"
    for command in ("right", "right"):
        text, _, _, _, info = env.step(command)
    (answer,) = agent.act([Turn(episode, 1, text, info, 0.0, seed=2)])
    assert answer.text == "left"
    assert answer.notes["gain"] == 0.5 * 1.0 + 0.5**3 * 3.0


def test_answers_do_not_depend_on_who_else_plays():
    together = play(MctsAgent(simulations=3, depth=3), Corridor, episodes=5, turns=12)
    alone = play(MctsAgent(simulations=3, depth=3), Corridor, episodes=1, turns=12)
    assert alone[0].steps
    assert [step.action for step in alone[0].steps] == [step.action for step in together[0].steps]


def test_the_agent_keeps_the_contract_and_leaves_the_environment_as_found():
    check_agent(MctsAgent(simulations=20), make_env=lambda _: Corridor())


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
    for wrong in ({"simulations": 0}, {"depth": 0}, {"discount": 0.0}, {"seconds": 0.0}):
        with pytest.raises(ConfigError):
            MctsAgent(**wrong)


@pytest.mark.data
@pytest.mark.skipif(
    find_file("jericho", "detective.z5") is None, reason="needs detective.z5 (PZ_DATA)"
)
def test_a_small_search_plans_on_detective_and_follows_its_plan():
    def make():
        return JerichoEnv("detective", admissible_commands=True, isolated=False)

    (played,) = play(MctsAgent(simulations=30), make, turns=12)
    by_chance = play(Random(), make, episodes=3, turns=12)
    assert played.score > 1.0 + np.mean([trajectory.score for trajectory in by_chance])
    # What a plan was worth is gained or still to come, and worth more as it comes nearer.
    for step, following in itertools.pairwise(played.steps):
        left = (step.notes["gain"] - step.reward) / 0.95
        assert following.notes["gain"] >= left - 1e-9
