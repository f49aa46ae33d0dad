"""Loading agents from names, modules and files; the built-in agents; check_agent."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import numpy as np
import pytest

from pz_agents.errors import AgentError
from pz_agents.rollout import EpisodeSpec, Limits, run_episodes
from pz_agents.sdk import (
    Action,
    Agent,
    Episode,
    Sample,
    Turn,
    agent_names,
    check_agent,
    load_agent,
    needs_model,
)
from pz_agents.sdk import loading as loading_module
from pz_envs.countdown.env import CountdownEnv
from pz_envs.seeding import generator
from pz_envs.textenv import Outcome, TextEnv

SOURCE = '''
from dataclasses import dataclass
import beside_me

@dataclass
class Walker:
    """Needs nothing."""
    step: str = "go"
    def act(self, turns):
        return [self.step for turn in turns]

class Speaker:
    def __init__(self, model, loud=False):
        self.model, self.loud = model, loud
    def act(self, turns):
        return [beside_me.WORD for turn in turns]

class Optional(Speaker):
    def __init__(self, model=None):
        self.model = model

class Needy:
    def __init__(self, size):
        self.size = size
    def act(self, turns):
        return []

class Broken:
    def __init__(self):
        raise ValueError("no such weights")
    def act(self, turns):
        return []

class Wrong:
    def act(self, observation, info):
        return ""

class Actless:
    pass

def reply(observation, info):
    return f"{observation} {info['steps']}"

def factory(step="left"):
    return Walker(step)

def function_factory():
    return reply

def model_factory(model, loud):
    return Speaker(model, loud)

def one_argument(observation):
    return "go"

async def later(observation, info):
    return "go"

walker = Walker("up")
'''


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "my agent.py"
    file.write_text(SOURCE)
    (tmp_path / "beside_me.py").write_text("WORD = 'hello'\n")
    before, path = set(sys.modules), list(sys.path)
    yield file
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.startswith(("pz_agent_file", "beside_me")):
            del sys.modules[name]


def turn(env, *, seed=1, index=0, observation=None, info=None):
    first, details = env.reset(seed=0)
    episode = Episode("k", "pz/Test-v0", 0, env=env)
    return Turn(episode, index, observation or first, {**details, **(info or {})}, 0.0, seed)


def answer(agent):
    (action,) = agent.act([turn(CountdownEnv(), observation="see")])
    return action.text if isinstance(action, Action) else action


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Walker", "go"),
        ("walker", "up"),
        ("factory", "left"),
        ("reply", "see 0"),
        ("function_factory", "see 0"),
        ("Optional", "hello"),
    ],
)
def test_a_file_gives_a_class_an_object_a_factory_or_a_function(source, name, said):
    agent = load_agent(f"{source}:{name}")
    assert isinstance(agent, Agent)
    assert answer(agent) == said


def test_a_file_is_run_where_it_lies_under_a_name_of_its_own(source, tmp_path):
    other = tmp_path / "deep" / source.name
    other.parent.mkdir()
    other.write_text("def reply(observation, info):\n    return 'other'\n")
    first, second = load_agent(f"{source}:Walker"), load_agent(f"{other}:reply")
    assert answer(first) == "go"
    assert answer(second) == "other"
    assert sys.modules[type(first).__module__].__file__ == str(source)


def test_a_relative_path_is_found_from_the_current_folder(source, monkeypatch):
    monkeypatch.chdir(source.parent)
    assert answer(load_agent("./my agent.py:Walker", kwargs={"step": "run"})) == "run"


def test_the_model_goes_only_to_those_who_take_one(source):
    model = object()
    assert load_agent(f"{source}:Speaker", model=model, kwargs={"loud": True}).model is model
    assert load_agent(f"{source}:Optional", model=model).model is model
    assert load_agent(f"{source}:model_factory", model=model, kwargs={"loud": 1}).loud == 1
    assert answer(load_agent(f"{source}:Walker", model=model)) == "go"


def test_who_needs_a_model_is_known_without_making_it(source):
    assert needs_model(f"{source}:Speaker")
    assert needs_model(f"{source}:model_factory")
    for name in ("Optional", "Walker", "walker", "reply", "factory", "Broken"):
        assert not needs_model(f"{source}:{name}")
    assert not needs_model("random")


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("Wolker", {}, r"has no `Wolker`\. Did you mean `Walker`\? It has: Walker, Speaker"),
        ("Speaker", {}, "needs a language model"),
        ("Needy", {}, "also needs `size`"),
        ("Needy", {"sise": 3}, r"takes no `sise`\. Did you mean `size`\? It takes: size"),
        ("Broken", {}, "could not be made: ValueError: no such weights"),
        ("Wrong", {}, r"act\(observation, info\) must take one argument"),
        ("Actless", {}, "no agent"),
        ("one_argument", {}, r"also needs `observation`.*takes \(observation, info\)"),
        ("later", {}, "asynchronous"),
        ("walker", {"step": "x"}, "no class and no factory, so it takes no `step`"),
    ],
)
def test_what_is_no_agent_is_explained(source, name, kwargs, message):
    with pytest.raises(AgentError, match=message):
        load_agent(f"{source}:{name}", kwargs=kwargs)


def test_a_missing_file_or_name_or_module_is_explained(source):
    with pytest.raises(AgentError, match=r"No file .*Did you mean `my agent.py`"):
        load_agent(f"{source.parent}/my_agent.py:Walker")
    with pytest.raises(AgentError, match=r"needs a `:Name`\. It has: Walker"):
        load_agent(str(source))
    with pytest.raises(AgentError, match=r"No agent `randm`\. Did you mean `random`\? Known:"):
        load_agent("randm")
    with pytest.raises(AgentError, match=r"No module `no_such.thing`"):
        load_agent("no_such.thing:Agent")


def test_a_file_that_fails_to_load_says_where(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("x = 1\nimport nowhere_at_all\n")
    with pytest.raises(AgentError, match=r"bad.py:2: ModuleNotFoundError.*nowhere_at_all"):
        load_agent(f"{file}:Agent")
    file.write_text("x = 1\n\ndef f(:\n")
    with pytest.raises(AgentError, match="line 3: SyntaxError"):
        load_agent(f"{file}:Agent")


def test_a_module_and_an_entry_point_give_agents(monkeypatch):
    assert answer(load_agent("pz_agents.sdk.builtin:ExpertAgent")).strip()
    entry = EntryPoint("mine", "pz_agents.sdk.builtin:ExpertAgent", "pz_agents.agents")
    monkeypatch.setattr(loading_module, "entry_points", lambda group: (entry,))
    assert "mine" in agent_names()
    assert answer(load_agent("mine")).strip()
    assert agent_names()[:5] == ("random", "expert", "zeroshot", "best-of-n", "mcts")


def test_the_sdk_starts_without_torch():
    code = "import sys, pz_agents.sdk, pz_agents.rollout; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ran.stdout.split())
    assert not {"torch", "transformers", "trl", "jericho"} & loaded


class Room(TextEnv):
    """Has commands, no expert after the first step, and a state that can be spoilt."""

    family = "room"
    can_snapshot = True

    def _start(self, seed, options):
        self.touched = 0
        return Outcome("room", 0.0, admissible_commands=("a", "b", "c"))

    def _advance(self, command):
        self.touched += 1
        return Outcome("room", 0.0, admissible_commands=("a", "b", "c"))

    def _save(self):
        return str(self.touched).encode()

    def _load(self, engine, header):
        self.touched = int(engine)


class Guided(Room):
    def expert_action(self):
        return None if self.touched else "a"


def test_the_random_agent_is_uniform_over_commands_and_decided_by_the_turns_seed():
    agent, env = load_agent("random"), Room()
    turns = [turn(env, seed=seed) for seed in range(300)]
    said = [action.text for action in agent.act(turns)]
    assert said == [action.text for action in agent.act(turns)]
    counts = [said.count(command) for command in "abc"]
    assert sum(counts) == 300
    assert min(counts) > 70


def test_the_random_agent_asks_the_environment_where_there_are_no_commands():
    class Dice(Room):
        def random_action(self, rng):
            return f"roll {rng.integers(6)}"

    (action,) = load_agent("random").act([turn(Dice(), seed=4, info={"admissible_commands": None})])
    assert action.text == f"roll {generator(4).integers(6)}"
    (action,) = load_agent("random").act([turn(Room(), info={"admissible_commands": ()})])
    assert action.text


def test_the_expert_refuses_where_there_is_none():
    (trajectory,) = run_episodes(
        load_agent("expert"),
        [EpisodeSpec("k", "pz/Room-v0", 0)],
        make_env=lambda env_id: Room(),
        limits=Limits(),
        seed=0,
    )
    assert trajectory.status == "failed"
    assert "pz/Room-v0 (seed 0) has no expert" in trajectory.error


def test_an_expert_off_its_path_ends_at_the_limit_without_touching_the_engine():
    env = Guided()
    (trajectory,) = run_episodes(
        load_agent("expert"),
        [EpisodeSpec("k", "pz/Guided-v0", 0)],
        make_env=lambda env_id: env,
        limits=Limits(invalid_streak=3),
        seed=0,
    )
    assert trajectory.status == "ok"
    assert trajectory.truncated == "invalid"
    assert [step.action for step in trajectory.steps] == ["a", "", "", ""]
    assert env.touched == 1


@pytest.mark.parametrize("name", ["random", "expert"])
def test_the_built_in_agents_keep_the_contract(name):
    check_agent(load_agent(name))


class Good:
    """The agent that the broken ones below differ from in one point each."""

    def act(self, turns):
        return [self.one(item) for item in turns]

    def one(self, item):
        return f"say {generator(item.seed).integers(1000)}"


class Fewer(Good):
    def act(self, turns):
        return super().act(turns)[:-1]


class Hungry(Good):
    def act(self, turns):
        return [self.one(turns[0]), *super().act(turns)[1:]]


class Deaf(Good):
    def act(self, turns):
        return [self.one(item) for item in sorted(turns, key=lambda item: item.episode.key)]


class Numbers(Good):
    def one(self, item):
        return 7


class Lazy(Good):
    def act(self, turns):
        return (answer for answer in super().act(turns))


class Clumsy(Good):
    def one(self, item):
        item.episode.env.step("a")
        return "a"


class Crashing(Good):
    def one(self, item):
        if item.index == 2:
            raise KeyError("third turn")
        return "a"


class Sampling(Good):
    ids = np.zeros(2, np.int32)
    probs = np.zeros(2, np.float32)

    def one(self, item):
        return Action("a", Sample(self.ids, self.ids, self.probs))


class Wide(Sampling):
    ids = np.zeros(2, np.int64)


class Uneven(Sampling):
    probs = np.zeros(3, np.float32)


class Impossible(Sampling):
    probs = np.ones(2, np.float32)


class Unending(Good):
    def end(self, trajectory):
        raise RuntimeError("never")


@pytest.mark.parametrize("good", [Good, Sampling])
def test_a_good_agent_passes(good):
    check_agent(good(), "room", make_env=lambda env_id: Room())


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (Fewer, "was given 3 turns and returned 2"),
        (Hungry, r"act raised IndexError"),
        (Deaf, "order: with the batch reversed"),
        (Numbers, "must return Action or str; got 7"),
        (Lazy, "must return a list of actions; got generator"),
        (Clumsy, "environment: act left room in another state"),
        (Crashing, "act raised KeyError: 'third turn'"),
        (Wide, "Sample.prompt_ids must be a one-dimensional int32"),
        (Uneven, "same length"),
        (Impossible, "log-probabilities"),
        (Unending, "end raised RuntimeError: never"),
    ],
)
def test_a_broken_rule_is_named(broken, rule):
    with pytest.raises(AgentError, match=rule):
        check_agent(broken(), "room", make_env=lambda env_id: Room())


def test_an_agent_that_draws_from_elsewhere_is_warned():
    class Fickle(Good):
        rng = np.random.default_rng(0)

        def one(self, item):
            return f"say {self.rng.integers(10**9)}"

    with pytest.warns(UserWarning, match="differently under the same seeds"):
        check_agent(Fickle(), "room", make_env=lambda env_id: Room())


def test_an_agent_may_look_ahead_if_it_goes_back():
    class Careful(Good):
        def one(self, item):
            env = item.episode.env
            saved = env.snapshot()
            env.step("a")
            env.restore(saved)
            return super().one(item)

    check_agent(Careful(), "room", make_env=lambda env_id: Room())
