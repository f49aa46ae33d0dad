"""A turn as the store keeps it: commands packed against the turn before, old lines still read."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from pz_agents.rollout.loop import EpisodeSpec, Limits, run_episodes
from pz_agents.sdk.builtin import RandomAgent
from pz_agents.sdk.types import Step
from pz_agents.search.agent import MctsAgent
from pz_bench import cell, steps
from pz_envs.catalog import make_env

LISTS = st.lists(st.none() | st.lists(st.text(max_size=3), max_size=6).map(tuple), max_size=6)


def made(commands):
    return Step("seen", "said", 0.0, 0.0, True, False, admissible_commands=commands)


@given(LISTS)
def test_every_list_is_read_back_as_it_was(lists):
    records = steps.to_records(map(made, lists))
    read = steps.commands_of(json.loads(json.dumps(records)))
    assert read == [None if each is None else list(each) for each in lists]


def test_what_did_not_change_is_not_written_again():
    lists = [
        ("look", "go north", "take lamp"),
        ("look", "go north"),
        ("open it", "look", "go north"),
    ]
    records = steps.to_records(map(made, lists))
    assert [each["admissible_commands"] for each in records] == [
        ["look", "go north", "take lamp"],
        [[0, 2]],
        ["open it", [0, 2]],
    ]


def test_lines_from_before_commands_were_kept_have_none():
    record = steps.to_records([made(None)])
    assert "admissible_commands" not in record[0]
    assert steps.commands_of(record) == [None]


def play(agent, env, turns):
    specs = [EpisodeSpec("0", env, cell.env_seed(env, 0))]
    (trajectory,) = run_episodes(agent, specs, make_env=make_env, limits=Limits(turns), seed=0)
    return cell.from_line(cell.to_line(cell.record(0, trajectory)))


def test_the_commands_are_those_of_the_state_in_which_the_agent_acted():
    env = "pz/Sokoban-v0"
    episode = play(RandomAgent(), env, 6)
    game = make_env(env)
    _, info = game.reset(seed=cell.env_seed(env, 0))
    for step, commands in zip(episode.steps, steps.commands_of(episode.steps), strict=True):
        assert commands == list(info["admissible_commands"])
        info = game.step(step["action"])[4]
    game.close()


def test_a_search_leaves_the_visits_and_the_prior_of_what_it_visited():
    episode = play(MctsAgent(simulations=12, depth=4), "pz/Sokoban-v0", 2)
    for step, commands in zip(episode.steps, steps.commands_of(episode.steps), strict=True):
        visits, prior = step["notes"]["visits"], step["notes"]["prior"]
        assert visits.keys() == prior.keys() <= set(commands)
        assert min(visits.values()) > 0
        assert sum(visits.values()) >= 12
        assert 0 < sum(prior.values()) <= 1.001
