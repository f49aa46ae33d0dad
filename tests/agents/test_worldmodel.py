"""The world model: exact sliding context, targets by hand, priorities that act, and learning."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pz_agents.search.planner import Leaves, Planner, SearchSettings
from pz_agents.worldmodel import losses, scalars
from pz_agents.worldmodel.imagination import Imagination
from pz_agents.worldmodel.learner import LearnerSettings, WorldModelLearner, alarms
from pz_agents.worldmodel.losses import LossSettings
from pz_agents.worldmodel.network import NetworkSettings, WorldModel
from pz_agents.worldmodel.replay import Replay, ReplaySettings, Segment
from pz_agents.worldmodel.texts import BUCKETS, Texts, features, state_text
from pz_envs.errors import ConfigError, DataError

SMALL = NetworkSettings(embed=32, layers=3, heads=4, context_steps=2, dropout=0.0, buckets=512)


def model(settings=SMALL, seed=0):
    torch.manual_seed(seed)
    made = WorldModel(settings)
    # away from the zero initialisation, so that every path carries a signal
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


# Texts


def test_features_are_words_and_pairs_of_neighbours():
    assert len(features("Go north.")) == 3 + 2
    assert set(features("go north")) < set(features("Go north now"))
    assert list(features("")) == [0]
    assert features("a b" * 50).max() < BUCKETS


def test_equal_texts_have_one_number_and_the_numbers_come_back():
    texts = Texts()
    first, second = texts.intern("go north"), texts.intern("go south")
    assert texts.intern("go north") == first != second
    assert texts.string(second) == "go south"
    bags = texts.bags([second, first, second])
    assert bags.offsets.tolist() == [0, 3, 6]
    again = Texts()
    assert [again.intern(text) for text in texts.strings()] == [first, second]


def test_a_state_is_read_with_its_commands():
    assert state_text("A room.", ["go", "look"]).endswith("Commands: go; look")
    assert state_text("A room.", None) == "A room."


# Scalars


def test_a_nan_is_not_hidden():
    assert scalars.two_hot(torch.tensor([math.nan, 1.0])).isnan().any(-1).tolist() == [True, False]


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 350.0, -7.25, 1e-3])
def test_a_two_hot_value_decodes_to_itself(value):
    target = scalars.two_hot(torch.tensor([value]))
    assert target.sum() == pytest.approx(1.0)
    assert int((target > 0).sum()) <= 2
    assert float(scalars.expectation(torch.log(target + 1e-30))[0]) == pytest.approx(
        value, rel=1e-3, abs=1e-4
    )


def test_the_transform_by_hand():
    # h(3) = sqrt(4) - 1 + 0.003
    assert float(scalars.transform(torch.tensor(3.0))) == pytest.approx(1.003)
    target = scalars.two_hot(torch.tensor(3.0))
    assert float(target[51]) == pytest.approx(0.997, abs=1e-5)
    assert float(target[52]) == pytest.approx(0.003, abs=1e-5)


def test_values_beyond_the_atoms_are_clipped_to_them():
    assert float(scalars.two_hot(torch.tensor(1e9))[-1]) == 1.0
    assert float(scalars.two_hot(torch.tensor(-1e9))[0]) == 1.0


def targets(rewards, values, end, terminated, steps=2, discount=0.5):
    return scalars.n_step_values(
        torch.tensor([rewards]),
        torch.tensor([values]),
        torch.tensor([end]),
        torch.tensor([terminated]),
        steps,
        discount,
    )[0].tolist()


def test_value_targets_by_hand():
    # z_0 = 1 + .5*2 + .25*30, z_1 = 2 + .5*3 + .25*40
    found = targets([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0], end=9, terminated=True)
    assert found == pytest.approx([9.5, 13.5])


def test_nothing_is_worth_anything_after_an_end():
    # the episode has two actions and ends: z_0 = 1 + .5*2, z_1 = 2
    found = targets([1.0, 2.0, 0.0, 0.0], [10.0, 20.0, 30.0, 40.0], end=2, terminated=True)
    assert found == pytest.approx([2.0, 2.0])


def test_an_episode_that_was_cut_off_is_bootstrapped_from_its_last_observation():
    # z_0 = 1 + .5*2 + .25*30; z_1 has one step left: 2 + .5*30
    found = targets([1.0, 2.0, 0.0, 0.0], [10.0, 20.0, 30.0, 40.0], end=2, terminated=False)
    assert found == pytest.approx([9.5, 17.0])


# The network and its cache


@pytest.mark.parametrize("norm", ["layernorm", "simnorm"])
def test_token_by_token_equals_the_whole_sequence_at_once(norm):
    world = model(SMALL.model_copy(update={"latent_norm": norm}))
    texts = Texts(SMALL.buckets)
    observations = [texts.intern(f"room {n} of many") for n in range(9)]
    actions = [texts.intern(f"go door {n}") for n in range(9)]
    with torch.no_grad():
        latents = world.encode_observations(texts.bags(observations))[None]
        tokens = world.encode_actions(texts.bags(actions))[None]
        whole, _ = world(latents, tokens)
        keys = world.policy_keys(tokens[0])
        logits = world.policy_logits(whole[0, -1], keys)
        value = scalars.expectation(world.value_head(whole[0, -1]))
    imagined = Imagination(world, texts, slots=2, nodes_per_tree=3, dtype=torch.float32)
    for turn in range(9):
        before = None if turn == 0 else actions[turn - 1]
        imagined.observe([1], [observations[turn]], [before])
        torch.testing.assert_close(imagined._known[1], whole[0, turn], atol=1e-5, rtol=1e-5)
    roots, policies = imagined.roots([1], [actions])
    assert policies[0] == pytest.approx(logits.softmax(0).numpy(), abs=1e-5)
    assert roots.values[0] == pytest.approx(float(value), abs=1e-4)


def test_imagined_nodes_equal_recomputation_from_scratch():
    world = model()
    texts = Texts(SMALL.buckets)
    commands = [texts.intern(f"go door {n}") for n in range(4)]
    observations = [texts.intern(f"room {n}") for n in range(3)]
    imagined = Imagination(
        world, texts, slots=2, nodes_per_tree=8, branching=3, dtype=torch.float32
    )
    for turn, observation in enumerate(observations):
        imagined.observe([0, 1], [observation] * 2, [commands[0] if turn else None] * 2)
    imagined.roots([0, 1], [commands, commands[:2]])
    first = Leaves(*map(np.array, ([0, 1], [0, 8], [2, 1], [1, 9])))
    imagined.step(first)
    offered = imagined._offered[1]
    second = imagined.step(Leaves(*map(np.array, ([0], [1], [1], [2]))))
    with torch.no_grad():
        real = world.encode_observations(texts.bags(observations))
        played = world.encode_actions(texts.bags([commands[0], commands[0], commands[2]]))
        _, acted = world(real[None], played[None])
        dreamt = world.normalise(world.latent_head(acted[0, -1]))
        vocabulary = world.encode_actions(texts.bags(commands))
        latents = torch.cat([real, dreamt[None]])
        tokens = torch.cat([played, vocabulary[offered[1]][None]])
        _, acted = world(latents[None], tokens[None])
        reward = scalars.expectation(world.reward_head(acted[0, -1]))
        further = world.normalise(world.latent_head(acted[0, -1]))
        latents = torch.cat([latents, further[None]])
        known, _ = world(latents[None], torch.cat([tokens, tokens[-1:]])[None])
        value = scalars.expectation(world.value_head(known[0, -1]))
        keys = world.policy_keys(vocabulary)
        logits = world.policy_logits(known[0, -1], keys)
    assert second.reward[0] == pytest.approx(float(reward), abs=1e-4)
    assert second.value[0] == pytest.approx(float(value), abs=1e-4)
    assert second.logits == pytest.approx(logits.topk(3).values.double().numpy(), abs=1e-5)


def test_another_tree_or_an_old_search_leaves_no_trace():
    world = model()
    texts = Texts(SMALL.buckets)
    commands = [texts.intern(f"go door {n}") for n in range(5)]
    here, there = texts.intern("here"), texts.intern("there")

    def visits(slots, warm):
        imagined = Imagination(world, texts, slots=3, nodes_per_tree=26, dtype=torch.float32)
        if warm:
            imagined.observe([0, 2], [there, there], [None, None])
            Planner(SearchSettings()).search(imagined.roots([0, 2], [commands] * 2)[0], imagined)
            imagined.forget([0])
        imagined.observe(slots, [here] * len(slots), [None] * len(slots))
        found = Planner(SearchSettings()).search(
            imagined.roots(slots, [commands] * len(slots))[0], imagined
        )
        return found.visits[: len(commands)]

    alone = visits([0], warm=False)
    assert alone.sum() == 25
    np.testing.assert_array_equal(alone, visits([0, 1], warm=False))
    np.testing.assert_array_equal(alone, visits([0], warm=True))


def test_new_weights_are_searched_with_after_a_refresh():
    world = model()
    texts = Texts(SMALL.buckets)
    commands = [texts.intern(f"go door {n}") for n in range(3)]
    imagined = Imagination(world, texts, slots=1, nodes_per_tree=3, dtype=torch.float32)

    def policy():
        imagined.forget([0])
        imagined.observe([0], [texts.intern("here")], [None])
        return imagined.roots([0], [commands])[1][0]

    before = policy()
    with torch.no_grad():
        world.policy_keys.weight.mul_(-1)
    np.testing.assert_array_equal(policy(), before)
    imagined.refresh()
    assert np.abs(policy() - before).max() > 1e-3


def test_an_untrained_model_values_nothing_and_prefers_nothing():
    torch.manual_seed(0)
    world = WorldModel(SMALL)
    texts = Texts(SMALL.buckets)
    imagined = Imagination(world, texts, slots=1, nodes_per_tree=2)
    imagined.observe([0], [texts.intern("a room")], [None])
    roots, policies = imagined.roots([0], [[texts.intern("go"), texts.intern("look")]])
    assert roots.values[0] == pytest.approx(0.0, abs=1e-4)
    assert policies[0] == pytest.approx([0.5, 0.5])


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="multiple of heads"):
        WorldModel(SMALL.model_copy(update={"heads": 5}))


# Replay


def segment(texts, rewards, *, terminated=True, weight=1.0, name="room"):
    steps = len(rewards)
    return Segment(
        observations=tuple(texts.intern(f"{name} {n}") for n in range(steps + 1)),
        actions=tuple(texts.intern(f"go {n % 2}") for n in range(steps)),
        rewards=tuple(rewards),
        lists=tuple(tuple(texts.intern(f"go {k}") for k in range(2 + n % 2)) for n in range(steps)),
        visits=tuple(np.full(2 + n % 2, 1 / (2 + n % 2)) for n in range(steps)),
        terminated=terminated,
        weight=weight,
    )


def test_windows_run_past_the_end_and_say_so():
    texts = Texts()
    replay = Replay(texts, ReplaySettings(horizon=3))
    replay.add(segment(texts, [1.0, 2.0]))
    batch = replay.draw(16, 2, np.random.default_rng(0)).batch
    starts = (2 - batch.ends).tolist()
    for row, start in enumerate(starts):
        assert batch.alive[row].tolist() == [1.0 if start + n < 2 else 0.0 for n in range(5)]
        assert batch.rewards[row, 0] == start + 1
    assert set(starts) == {0, 1}
    learned = int((batch.alive[:, :3] * torch.ones(3)).sum())
    assert len(set(batch.policy_row.tolist())) == learned


def test_priorities_change_what_is_drawn_and_how_much_it_weighs():
    texts = Texts()
    replay = Replay(texts, ReplaySettings(horizon=1, alpha=1.0, beta=1.0))
    replay.add(segment(texts, [0.0, 0.0, 0.0, 0.0]))
    drawn = replay.draw(200, 1, np.random.default_rng(0))
    assert batch_share(drawn, 0) == pytest.approx(0.25, abs=0.08)
    assert drawn.batch.weights.tolist() == [1.0] * 200
    errors = torch.tensor([7.0 if start == 0 else 1.0 for _, start in drawn.windows])
    replay.update(drawn, errors)
    assert replay.probabilities() == pytest.approx([0.7, 0.1, 0.1, 0.1])
    again = replay.draw(400, 1, np.random.default_rng(1))
    assert batch_share(again, 0) == pytest.approx(0.7, abs=0.07)
    found = {
        start: float(w) for (_, start), w in zip(again.windows, again.batch.weights, strict=True)
    }
    assert found[0] / found[1] == pytest.approx(1 / 7)  # (N P)^-1


def batch_share(drawn, start):
    return np.mean([at == start for _, at in drawn.windows])


def test_the_oldest_episodes_are_forgotten_and_their_priorities_with_them():
    texts = Texts()
    replay = Replay(texts, ReplaySettings(capacity=5, horizon=1))
    replay.add(segment(texts, [0.0] * 3, name="old"))
    drawn = replay.draw(4, 1, np.random.default_rng(0))
    replay.add(segment(texts, [0.0] * 4, name="new"))
    assert len(replay) == 4
    before = replay.probabilities()
    replay.update(drawn, torch.full((4,), 99.0))
    np.testing.assert_array_equal(replay.probabilities(), before)


def test_an_impossible_segment_and_an_empty_replay_are_refused():
    texts = Texts()
    replay = Replay(texts)
    with pytest.raises(ConfigError, match="empty"):
        replay.draw(1, 1, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="segment of 0"):
        replay.add(segment(texts, []))


# Losses


def batch_of(texts, *segments, horizon=4, windows=8, td_steps=2):
    replay = Replay(texts, ReplaySettings(horizon=horizon))
    for each in segments:
        replay.add(each)
    return replay.draw(windows, td_steps, np.random.default_rng(0)).batch


def gradient(name, weight):
    texts = Texts(SMALL.buckets)
    batch = batch_of(texts, segment(texts, [0.0, 1.0, 0.0, 5.0, 0.0]))
    world, target = model(seed=1), model(seed=2)
    off = {f"{each}_weight": 0.0 for each in ("latent", "reward", "value", "policy", "entropy")}
    settings = LossSettings(**{**off, f"{name}_weight": weight}, td_steps=2)
    losses.loss(world, target, batch, settings).loss.backward()
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for p in world.parameters()
        ]
    )


@pytest.mark.parametrize("name", ["latent", "reward", "value", "policy", "entropy"])
def test_a_losss_weight_scales_its_gradient(name):
    once, thrice = gradient(name, 1.0), gradient(name, 3.0)
    assert once.norm() > 0
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-4, atol=1e-6)


def test_a_windows_weight_scales_its_share():
    texts = Texts(SMALL.buckets)
    world, target = model(seed=1), model(seed=2)
    settings = LossSettings(td_steps=2)
    once = batch_of(texts, segment(texts, [1.0, 2.0, 3.0]))
    twice = batch_of(texts, segment(texts, [1.0, 2.0, 3.0], weight=2.0))
    left, right = (
        losses.loss(world, target, each, settings).loss.detach() for each in (once, twice)
    )
    assert float(right) == pytest.approx(2 * float(left), rel=1e-5)


def test_the_policy_loss_is_the_cross_entropy_over_each_states_own_list():
    texts = Texts(SMALL.buckets)
    world = model(seed=1)
    batch = batch_of(texts, segment(texts, [0.0, 0.0, 0.0]), horizon=3, windows=2)
    tokens = world.encode_actions(batch.actions)
    known = torch.randn(2, 3, SMALL.embed)
    cross, entropy, _ = losses._policy(world, known, tokens, batch)
    keys = world.policy_keys(tokens)
    for row in set(batch.policy_row.tolist()):
        mine = batch.policy_row == row
        logits = torch.stack(
            [
                world.policy_logits(known.flatten(0, 1)[row], keys[a])
                for a in batch.policy_action[mine]
            ]
        )
        expected = -(batch.policy_share[mine] * logits.log_softmax(0)).sum()
        torch.testing.assert_close(cross.flatten()[row], expected, rtol=1e-4, atol=1e-5)
        spread = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(entropy.flatten()[row], spread, rtol=1e-4, atol=1e-5)


def test_the_group_kl_is_zero_for_equal_latents_and_else_positive():
    world = model(SMALL.model_copy(update={"latent_norm": "simnorm"}))
    left, right = world.normalise(torch.randn(2, 5, 32)).unbind(0)
    assert losses.latent_distance(left, left, "simnorm").abs().max() < 1e-6
    assert (losses.latent_distance(left, right, "simnorm") > 0).all()
    p, q = left[0].view(4, 8) + 1e-6, right[0].view(4, 8) + 1e-6
    by_hand = float((q * (q / p).log()).sum(-1).mean())
    assert float(losses.latent_distance(left, right, "simnorm")[0]) == pytest.approx(
        by_hand, rel=1e-4
    )


# Learning


def corridor(texts, random, turns=6):
    """Two rooms in turn; `open` in the second one pays 1, anything else nothing."""
    observations, actions, rewards = [texts.intern("a hall")], [], []
    open_, wait = texts.intern("open"), texts.intern("wait")
    for turn in range(turns):
        choice = open_ if random.random() < 0.5 else wait
        actions.append(choice)
        rewards.append(1.0 if turn % 2 and choice == open_ else 0.0)
        observations.append(texts.intern("a vault" if turn % 2 == 0 else "a hall"))
    best = [np.array([0.9, 0.1]) if turn % 2 else np.array([0.1, 0.9]) for turn in range(turns)]
    return Segment(
        tuple(observations), tuple(actions), tuple(rewards),
        ((open_, wait),) * turns, tuple(best), terminated=True,
    )  # fmt: skip


def test_it_learns_what_pays_where_and_what_comes_next():
    random = np.random.default_rng(0)
    texts = Texts(SMALL.buckets)
    replay = Replay(texts, ReplaySettings(horizon=5))
    for _ in range(20):
        replay.add(corridor(texts, random))
    torch.manual_seed(0)
    settings = LearnerSettings(
        learning_rate=3e-3, batch_windows=16, precision="fp32",
        loss=LossSettings(td_steps=2, discount=0.9),
    )  # fmt: skip
    learner = WorldModelLearner(WorldModel(SMALL.model_copy(update={"layers": 1})), settings)
    first = learner.learn(replay, random)
    for _ in range(170):
        last = learner.learn(replay, random)
    # a reward of 1 lies between two atoms: its cross-entropy cannot fall below .68, and one step
    # in four has it
    assert last["reward"] < 0.25 < first["reward"]
    assert last["latent"] < 0.2 * max(first["latent"], 0.1)
    imagined = Imagination(
        learner.model, texts, slots=1, nodes_per_tree=4, dtype=torch.float32, branching=2
    )
    imagined.observe([0], [texts.intern("a hall")], [None])
    imagined.observe([0], [texts.intern("a vault")], [texts.intern("wait")])
    _, policies = imagined.roots([0], [[texts.intern("open"), texts.intern("wait")]])
    assert policies[0] == pytest.approx([0.9, 0.1], abs=0.08)
    wave = Leaves(*map(np.array, ([0], [0], [0], [1])))
    assert imagined.step(wave).reward[0] > 0.6


def test_a_loss_that_is_not_finite_changes_nothing():
    texts = Texts(SMALL.buckets)
    learner = WorldModelLearner(model(), LearnerSettings(precision="fp32"))
    before = [each.clone() for each in learner.model.parameters()]
    stats, _ = learner.update(batch_of(texts, segment(texts, [0.0, math.nan, 1.0]), td_steps=5))
    assert stats["skipped"] == 1.0
    assert learner.updates == 0
    for old, new in zip(before, learner.model.parameters(), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)


def test_bfloat16_loses_little():
    texts = Texts(SMALL.buckets)
    batch = batch_of(texts, segment(texts, [0.0, 1.0, 0.0, 2.0]), td_steps=5)
    totals = []
    for precision in ("fp32", "bf16"):
        learner = WorldModelLearner(model(), LearnerSettings(precision=precision))
        totals.append(learner.update(batch)[0]["total"])
    assert totals[1] == pytest.approx(totals[0], rel=0.03)


def test_the_target_follows_and_everything_is_saved_and_restored(tmp_path):
    texts = Texts(SMALL.buckets)
    batch = batch_of(texts, segment(texts, [0.0, 1.0, 0.0, 2.0]), td_steps=5)
    learner = WorldModelLearner(model(), LearnerSettings(precision="fp32", target_rate=0.5))
    before = learner.target.value_head[0].weight.clone()
    learner.update(batch)
    middle = (before + learner.model.value_head[0].weight) / 2
    torch.testing.assert_close(learner.target.value_head[0].weight, middle)
    learner.save(tmp_path / "world.pt")
    other = WorldModelLearner(model(seed=5), learner.settings)
    other.load(tmp_path / "world.pt")
    ours, theirs = learner.update(batch)[0], other.update(batch)[0]
    assert ours == theirs
    (tmp_path / "world.pt").write_bytes(b"nothing")
    with pytest.raises(DataError, match="no state"):
        other.load(tmp_path / "world.pt")


def test_alarms_name_what_is_beyond_its_bound():
    assert alarms({"policy_logit_max": 3.0, "latent_std": 0.5}) == []
    found = alarms({"policy_logit_max": 9.0, "latent_std": 1e-3})
    assert [each.split()[0] for each in found] == ["policy_logit_max", "latent_std"]
