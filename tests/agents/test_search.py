"""The batched tree against an independent tree in plain Python, and the rules it promises."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from pz_agents.errors import ModelError
from pz_agents.search import Expansion, Leaves, Planner, Roots, SearchSettings, visit_policy
from pz_agents.search.planner import halving_table
from pz_envs.errors import ConfigError
from pz_envs.seeding import generator

MASK = 2**64 - 1
MCTX = Path(__file__).with_name("mctx_visits.json")


@dataclass
class State:
    """A node of a random tree-shaped decision process, decided by its seed alone."""

    seed: int
    widest: int
    children: dict = field(default_factory=dict)

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        self.value = float(rng.normal())
        self.count = int(rng.integers(0, self.widest + 1)) if rng.random() < 0.9 else 0
        self.logits = rng.normal(size=self.count) * 2
        self.rewards = rng.normal(size=self.count)
        self.discounts = np.where(rng.random(self.count) < 0.1, 0.0, 0.9)
        self.ends = self.discounts == 0.0
        self.seeds = rng.integers(1, 2**62, size=self.count)

    def child(self, action):
        if action not in self.children:
            child = State(int(self.seeds[action]), self.widest)
            if self.ends[action]:
                child.count, child.logits = 0, np.zeros(0)
            self.children[action] = child
        return self.children[action]


class Process:
    """Many such trees as a search model; it remembers states by handle."""

    def __init__(self, roots, per_tree):
        self.states = {number * per_tree: root for number, root in enumerate(roots)}
        self.asked = 0

    def step(self, leaves: Leaves) -> Expansion:
        rewards, discounts, values, logits, counts = [], [], [], [np.zeros(0)], []
        for parent, action, node in zip(leaves.parent, leaves.action, leaves.node, strict=True):
            state = self.states[int(parent)]
            child = state.child(int(action))
            self.states[int(node)] = child
            rewards.append(state.rewards[action])
            discounts.append(state.discounts[action])
            values.append(child.value)
            logits.append(child.logits)
            counts.append(child.count)
            self.asked += 1
        return Expansion(
            np.array(rewards),
            np.array(discounts),
            np.array(values),
            np.concatenate(logits),
            np.array(counts, np.int64),
        )


def softmax(logits):
    weights = np.exp(np.asarray(logits) - max(logits, default=0.0))
    return weights / weights.sum() if len(weights) else weights


@dataclass
class Node:
    """One node of the reference tree: dictionaries and recursion, nothing shared with numba."""

    state: State
    prior: list[float]
    value_sum: float = 0.0
    visits: int = 0
    children: dict = field(default_factory=dict)  # action -> (reward, discount, Node)

    def q(self, action):
        reward, discount, node = self.children[action]
        return reward + discount * node.value_sum / node.visits


class Reference:
    """Searches one root by the formulas of the documentation."""

    def __init__(self, root, prior, settings, stream=0, perturbed=None):
        self.root = Node(root, list(prior), root.value, 1)
        self.settings = settings
        self.stream = stream
        self.perturbed = perturbed
        self.low = self.high = root.value
        if root.count:
            for _ in range(settings.simulations):
                self.simulate()

    def visits(self):
        chosen = (self.root.children.get(action) for action in range(self.root.state.count))
        return [0 if child is None else child[2].visits for child in chosen]

    def simulate(self):
        node, path = self.root, []
        while node.state.count:
            action = self.choose(node)
            path.append((node, action))
            if action not in node.children:
                state = node.state.child(action)
                fresh = Node(state, list(softmax(state.logits)))
                reward, discount = node.state.rewards[action], node.state.discounts[action]
                node.children[action] = (reward, discount, fresh)
                node = fresh
                break
            node = node.children[action][2]
        total = node.state.value
        node.value_sum += total
        node.visits += 1
        for parent, action in reversed(path):
            reward, discount, _ = parent.children[action]
            total = reward + discount * total
            parent.value_sum += total
            parent.visits += 1
            self.low = min(self.low, parent.q(action))
            self.high = max(self.high, parent.q(action))

    def choose(self, node):
        if self.settings.rule == "gumbel":
            return self.gumbel_root(node) if node is self.root else self.gumbel_inside(node)
        settings = self.settings
        low, span = self.low, self.high - self.low
        seen = [node.q(action) for action in node.children]
        unseen = (node.state.value + sum(seen)) / (1 + len(seen))
        total = node.visits - 1
        under = total if settings.rule == "lightzero" else total + 1
        factor = settings.c_init + math.log((total + settings.c_base + 1) / settings.c_base)
        scores = []
        for action in range(node.state.count):
            q = node.q(action) if action in node.children else unseen
            count = node.children[action][2].visits if action in node.children else 0
            scaled = min(1.0, max(0.0, (q - low) / max(span, settings.value_floor)))
            scores.append(scaled + factor * math.sqrt(under) * node.prior[action] / (1 + count))
        if settings.rule == "puct":
            return scores.index(max(scores))
        ties = [a for a, score in enumerate(scores) if score >= max(scores) - 1e-6]
        return ties[self.draw() % len(ties)]

    def draw(self):
        self.stream = (self.stream + 0x9E3779B97F4A7C15) & MASK
        bits = self.stream
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
        return (bits ^ (bits >> 31)) >> 33

    def completed(self, node):
        counts = {action: child[2].visits for action, child in node.children.items()}
        mixed = node.state.value
        if counts:
            mass = sum(node.prior[action] for action in counts)
            weighted = sum(node.prior[action] * node.q(action) for action in counts) / mass
            total = sum(counts.values())
            mixed = (mixed + total * weighted) / (1 + total)
        q = [node.q(a) if a in counts else mixed for a in range(node.state.count)]
        span = max(max(q) - min(q), 1e-8)
        scale = 0.1 * (50 + max(counts.values(), default=0))
        return np.array([scale * (value - min(q)) / span for value in q])

    def gumbel_root(self, node):
        table = halving_table(self.settings.considered, self.settings.simulations)
        due = table[min(self.settings.considered, node.state.count), node.visits - 1]
        scores = self.perturbed + self.completed(node)
        visits = np.array(self.visits())
        return int(np.argmax(np.where(visits == due, scores, -np.inf)))

    def gumbel_inside(self, node):
        policy = softmax(np.log(node.prior) + self.completed(node))
        visits = [
            node.children[a][2].visits if a in node.children else 0 for a in range(len(policy))
        ]
        return int(np.argmax(policy - np.array(visits) / node.visits))


def search(settings, roots, priors, streams=None):
    planner = Planner(settings)
    model = Process(roots, planner.nodes_per_tree)
    return planner.search(Roots.join(priors, [root.value for root in roots]), model, streams)


def random_roots(number, widest, seed):
    return [State(seed * 1_000_003 + i, widest) for i in range(number)]


def simple(**kwargs):
    return SearchSettings(simulations=kwargs.pop("simulations", 25), **kwargs)


@pytest.mark.parametrize(
    ("rule", "number", "widest", "simulations"),
    [
        ("puct", 1000, 6, 20),
        ("puct", 250, 20, 30),
        ("lightzero", 500, 8, 15),
        ("gumbel", 250, 20, 16),
    ],
)
def test_visits_agree_with_a_plain_python_tree(rule, number, widest, simulations):
    settings = simple(rule=rule, simulations=simulations, considered=8)
    roots = random_roots(number, widest, seed=simulations)
    priors = [softmax(root.logits) for root in roots]
    streams = [generator("stream", i) for i in range(number)]
    result = search(settings, roots, priors, streams)
    assert result.visits.sum() == simulations * sum(root.count > 0 for root in roots)
    for index, (root, prior) in enumerate(zip(roots, priors, strict=True)):
        stream = generator("stream", index)
        first, perturbed = 0, None
        if rule == "lightzero":
            first = int(stream.integers(2**63))
        if rule == "gumbel":
            perturbed = np.log(prior) + stream.gumbel(size=root.count)
        reference = Reference(root, prior, settings, first, perturbed)
        assert result.visits[result.at(index)].tolist() == reference.visits(), index
        mean = reference.root.value_sum / reference.root.visits
        assert result.values[index] == pytest.approx(mean, abs=1e-9)


class Table:
    """A decision process in tables, as mctx searched it; the roots' lists are subsets."""

    def __init__(self, tables, lists, per_tree):
        self.tables = {name: np.array(value) for name, value in tables.items()}
        self.lists, self.per_tree = lists, per_tree
        self.states = {n * per_tree: at for n, at in enumerate(tables["root_states"])}

    def step(self, leaves: Leaves) -> Expansion:
        before = [self.states[parent] for parent in leaves.parent.tolist()]
        actions = [
            self.lists[tree][action] if parent % self.per_tree == 0 else action
            for tree, parent, action, _ in zip(*(each.tolist() for each in leaves), strict=True)
        ]
        after = self.tables["following"][before, actions]
        self.states.update(zip(leaves.node.tolist(), after.tolist(), strict=True))
        return Expansion(
            self.tables["rewards"][before, actions],
            self.tables["discounts"][before, actions],
            self.tables["values"][after],
            self.tables["logits"][after].ravel(),
            np.full(len(after), self.tables["logits"].shape[1]),
        )


@pytest.mark.parametrize("simulations", [25, 80])
@pytest.mark.parametrize("rule", ["puct", "gumbel"])
def test_visits_agree_with_mctx(rule, simulations):
    golden = json.loads(MCTX.read_text("utf-8"))
    tables = golden["process"]
    lists = [np.flatnonzero(allowed) for allowed in tables["root_allowed"]]
    planner = Planner(
        SearchSettings(
            rule=rule, simulations=simulations, value_floor=golden["floor"],
            c_base=golden["c_base"], considered=golden["considered"], gumbel_scale=0.0,
        )
    )  # fmt: skip
    model = Table(tables, lists, planner.nodes_per_tree)
    priors = [
        softmax(np.array(row)[listed])
        for row, listed in zip(tables["root_logits"], lists, strict=True)
    ]
    values = model.tables["values"][tables["root_states"]] * (rule == "gumbel")
    result = planner.search(Roots.join(priors, values), model)
    expected = golden["visits"][f"{rule}-{simulations}"]
    for root, (listed, visits) in enumerate(zip(lists, expected, strict=True)):
        assert result.visits[result.at(root)].tolist() == np.array(visits)[listed].tolist(), root


def test_the_golden_visits_are_what_mctx_gives_here():
    pytest.importorskip("mctx", reason="the committed visits stand in for it")
    spec = importlib.util.spec_from_file_location(
        "make_golden", MCTX.with_name("make_mctx_golden.py")
    )
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.make() == json.loads(MCTX.read_text("utf-8"))


def test_a_root_does_not_depend_on_its_neighbours():
    roots = random_roots(30, 10, seed=5)
    priors = [softmax(root.logits) for root in roots]
    together = search(simple(), roots, priors)
    planner = Planner(simple())
    for index, (root, prior) in enumerate(zip(roots, priors, strict=True)):
        model = Process([root], planner.nodes_per_tree)
        alone = planner.search(Roots.join([prior], [root.value]), model)
        assert alone.visits.tolist() == together.visits[together.at(index)].tolist()


def test_the_same_generators_give_the_same_search():
    roots = random_roots(20, 10, seed=6)
    priors = [softmax(root.logits) for root in roots]
    for rule in ("lightzero", "gumbel"):
        results = [
            search(simple(rule=rule), roots, priors, [generator(seed, i) for i in range(20)])
            for seed in (1, 1, 2)
        ]
        assert results[0].visits.tolist() == results[1].visits.tolist()
        assert results[0].visits.tolist() != results[2].visits.tolist()


def first_visits(rule, prior, repeats):
    settings = simple(rule=rule, simulations=1)
    root = State(4, 12)
    root.count, rng = len(prior), generator("rewards")
    root.rewards, root.discounts = rng.normal(size=len(prior)), np.full(len(prior), 0.9)
    root.ends, root.seeds = root.discounts == 0, np.arange(1, len(prior) + 1)
    streams = [generator("first", i) for i in range(repeats)]
    result = search(settings, [root] * repeats, [prior] * repeats, streams)
    return result.visits.reshape(repeats, -1).argmax(1)


def test_the_first_visit_is_the_priors_favourite_without_noise():
    rng = generator("favourites")
    for _ in range(50):
        prior = rng.dirichlet(np.ones(12))
        assert first_visits("puct", prior, 1)[0] == prior.argmax()


def test_lightzeros_rule_ignores_the_prior_at_the_first_visit():
    prior = np.array([0.97, 0.01, 0.01, 0.01])
    shares = np.bincount(first_visits("lightzero", prior, 2000), minlength=4) / 2000
    assert np.abs(shares - 0.25).max() < 0.04


def test_the_injected_prior_is_searched_with_unchanged():
    roots = random_roots(10, 9, seed=7)
    priors = [generator("mix", i).dirichlet(np.ones(root.count)) if root.count else np.zeros(0)
              for i, root in enumerate(roots)]  # fmt: skip
    result = search(simple(), roots, priors)
    assert result.prior.tolist() == np.concatenate(priors).tolist()


def test_roots_without_actions_and_empty_batches_are_survived():
    empty, full = State(1, 0), State(3, 5)
    assert empty.count == 0
    assert full.count > 0
    result = search(simple(), [empty, full], [np.zeros(0), softmax(full.logits)])
    assert result.chosen[0] == -1
    assert result.visits.sum() == 25
    assert result.values[0] == empty.value
    nothing = search(simple(), [], [])
    assert len(nothing.chosen) == 0


def test_a_terminal_step_is_not_asked_about_twice():
    root = State(11, 1)
    root.count, root.rewards, root.discounts = 2, np.array([1.0, 0.0]), np.zeros(2)
    root.ends, root.seeds = np.array([True, True]), np.array([1, 2])
    planner = Planner(simple())
    model = Process([root], planner.nodes_per_tree)
    result = planner.search(Roots.join([np.array([0.5, 0.5])], [0.0]), model)
    assert model.asked == 2
    assert result.visits.sum() == 25
    assert result.q.tolist() == [1.0, 0.0]
    assert result.chosen[0] == 0


class Ladder:
    """Each rung leads up or to one of two dead ends, which the model closes; stops when asked."""

    def __init__(self, rungs, stop=10**9):
        self.rungs, self.stop, self.asked, self.height = rungs, stop, [], {0: 0}

    def step(self, leaves):
        if len(self.asked) == self.stop:
            return None
        parent, action, node = (int(column[0]) for column in leaves[1:])
        self.asked.append((parent, action))
        self.height[node] = self.height[parent] + 1
        count = 3 if action == 0 and self.height[node] < self.rungs else -1
        one = np.ones(1)
        return Expansion(
            (action == 0) * one, one, 0 * one, np.zeros(max(count, 0)), np.array([count])
        )


@pytest.mark.parametrize("rule", ["puct", "lightzero"])
def test_closed_nodes_are_visited_once_and_an_exhausted_tree_no_more(rule):
    planner, model = Planner(simple(simulations=400, rule=rule)), Ladder(6)
    roots = Roots.join([np.full(3, 1 / 3)], [0.0])
    result = planner.search(roots, model, [generator(rule)])
    assert len(model.asked) == len(set(model.asked)) == 6 * 3
    assert result.visits.tolist() == [16.0, 1.0, 1.0]
    assert result.chosen[0] == 0


def test_a_model_can_end_the_search():
    planner, model = Planner(simple(simulations=400)), Ladder(6, stop=7)
    result = planner.search(Roots.join([np.full(3, 1 / 3)], [0.0]), model)
    assert result.simulations == result.visits.sum() == 7


def test_lists_longer_than_any_seen_before_make_the_pools_grow():
    planner = Planner(simple(simulations=5))
    for count in (3, 5000, 20):
        root = State(20, 3)
        rng = generator("wide", count)
        root.count, root.rewards = count, rng.normal(size=count)
        root.discounts, root.seeds = np.full(count, 0.9), rng.integers(1, 2**40, count)
        root.ends = np.zeros(count, bool)
        prior = rng.dirichlet(np.ones(count))
        model = Process([root], planner.nodes_per_tree)
        result = planner.search(Roots.join([prior], [0.0]), model)
        root.value = 0.0
        assert result.visits.tolist() == Reference(root, prior, planner.settings).visits()


def test_broken_priors_and_answers_are_refused():
    root = State(3, 5)
    with pytest.raises(ModelError, match="sum to 1"):
        search(simple(), [root], [np.full(root.count, 0.7)])
    with pytest.raises(ModelError, match="1 roots with 5 actions"):
        Planner().search(Roots(np.ones(3) / 3, np.array([5]), np.zeros(1)), Process([root], 26))
    with pytest.raises(ConfigError, match="one generator a root"):
        search(simple(rule="lightzero"), [root], [softmax(root.logits)])

    class Diverged(Process):
        def step(self, leaves):
            return super().step(leaves)._replace(value=np.array([np.nan]))

    class Unsure(Process):
        def step(self, leaves):
            said = super().step(leaves)
            return said._replace(logits=np.full(len(said.logits), np.nan))

    class Short(Process):
        def step(self, leaves):
            return super().step(leaves)._replace(reward=np.zeros(0))

    roots = Roots.join([softmax(root.logits)], [0.0])
    with pytest.raises(ModelError, match="not finite"):
        Planner().search(roots, Diverged([root], 26))
    with pytest.raises(ModelError, match="logits that is not finite"):
        Planner(simple(simulations=200)).search(roots, Unsure([root], 201))
    with pytest.raises(ModelError, match="asked about 1 leaves"):
        Planner().search(roots, Short([root], 26))


def test_sequential_halving_gives_mctxs_table():
    table = halving_table(4, 8)
    assert table[4].tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert table[3].tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
    assert table[1].tolist() == list(range(8))


class Bandit:
    """One step to the end; an arm's reward is its mean, the value of a leaf is 0."""

    def __init__(self, means):
        self.means = means

    def step(self, leaves: Leaves) -> Expansion:
        zeros = np.zeros(len(leaves.tree))
        rewards = self.means[leaves.tree, leaves.action]
        return Expansion(rewards, zeros, zeros, np.zeros(0), np.zeros(len(zeros), np.int64))


def test_gumbels_root_action_and_policy_improve_on_the_prior_in_a_bandit():
    rng = generator("bandit")
    means, priors = rng.normal(size=(400, 10)), rng.dirichlet(np.ones(10), 400)
    expected = (priors * means).sum(1)
    planner = Planner(simple(rule="gumbel", simulations=4, considered=4))
    streams = [generator("gumbel", i) for i in range(400)]
    roots = Roots(priors.ravel(), np.full(400, 10), expected)
    result = planner.search(roots, Bandit(means), streams)
    gained = means[np.arange(400), result.chosen] - expected
    assert gained.mean() - 4 * gained.std() / math.sqrt(400) > 0
    improved = (result.policy.reshape(400, 10) * means).sum(1)
    assert (improved >= expected - 1e-9).all()
    assert (improved - expected).mean() > 0.1


def test_more_simulations_find_a_better_arm():
    rng = generator("arms")
    means, priors = rng.normal(size=(200, 12)), np.full((200, 12), 1 / 12)
    found = []
    for simulations in (2, 20, 400):
        planner = Planner(simple(simulations=simulations))
        roots = Roots(priors.ravel(), np.full(200, 12), np.zeros(200))
        result = planner.search(roots, Bandit(means))
        found.append(float(means[np.arange(200), result.chosen].mean()))
    assert found == sorted(found)
    assert found[-1] > means.max(1).mean() - 0.01


def test_time_that_is_over_leaves_the_priors_favourite():
    root = State(3, 5)
    prior = softmax(root.logits)
    result = search(simple(seconds=1e-9), [root], [prior])
    assert result.simulations == 0
    assert result.chosen[0] == prior.argmax()
    assert result.policy.tolist() == prior.tolist()


def test_importing_the_package_compiles_nothing():
    code = (
        "import pz_agents.search.tree as t; assert not t.advance.signatures; "
        "import sys; assert 'torch' not in sys.modules, 'torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_visit_policy_sharpens_with_lower_temperature():
    visits = np.array([1.0, 4.0, 0.0, 3.0])
    assert visit_policy(visits, 1.0).tolist() == [0.125, 0.5, 0.0, 0.375]
    squared = visit_policy(visits, 0.5)
    assert squared == pytest.approx(np.array([1, 16, 0, 9]) / 26)
    assert visit_policy(visits, 0.0).tolist() == [0.0, 1.0, 0.0, 0.0]
    assert visit_policy(np.zeros(4), 1.0).tolist() == [0.25] * 4
    assert visit_policy(np.array([1000.0, 1.0]), 0.01)[1] == pytest.approx(0.0)
