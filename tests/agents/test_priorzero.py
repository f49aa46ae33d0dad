"""PriorZero's loop: the prior at the root, both halves' training, evaluation, games, presets."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pz_agents.models import load_model
from pz_agents.priorzero import phases
from pz_agents.priorzero import trainer as priorzero
from pz_agents.priorzero.actor import Actor
from pz_agents.priorzero.agent import PriorZeroAgent, UniZeroAgent, policy_folder
from pz_agents.priorzero.encoder import FrozenEncoder
from pz_agents.priorzero.language import LanguageLearner
from pz_agents.priorzero.language_settings import LanguageLearnerSettings
from pz_agents.priorzero.prior import LanguagePrior, LanguageSettings, Moment
from pz_agents.priorzero.settings import PriorZeroSettings, UniZeroSettings
from pz_agents.rollout import EpisodeSpec, Limits, run_episodes
from pz_agents.sdk.check import check_agent
from pz_agents.sdk.loading import load_agent
from pz_agents.search.planner import Planner
from pz_agents.search.priors import mix_prior
from pz_agents.training import checkpoint
from pz_agents.training.monitors import read_metrics
from pz_agents.worldmodel.imagination import Imagination
from pz_agents.worldmodel.network import WorldModel
from pz_agents.worldmodel.texts import Texts
from pz_envs.errors import ConfigError
from tests.support.house import DOORS, ROOMS, House

pytestmark = pytest.mark.timeout(280)

GAME, OTHER = "pz/Detective-v0", "pz/Zork1-v0"
COMMANDS = tuple(f"open {colour} door" for colour in DOORS)
NETWORK = {"embed": 32, "heads": 2, "buckets": 256, "dropout": 0.1, "layers": 1}


def common(**changes):
    return {
        "env": GAME,
        "steps": 2,
        "slots": 3,
        "episodes_per_step": 3,
        "max_turns": 6,
        "temperature": 1.0,
        "replay_ratio": 0.5,
        "network": NETWORK,
        "learner": {"learning_rate": 3e-3, "batch_windows": 8, "precision": "fp32"},
        "replay": {"horizon": 3},
        "search": {"simulations": 6},
        "branching": 4,
        "eval_episodes": 0,
        "save_every": 1,
        "keep_checkpoints": 9,
    } | changes


def settings(model, **changes):
    values = {
        "phase": "sequential",
        "wm_llm_ratio": 0.6,
        "language": {"model": str(model), "history": 3, **changes.pop("language", {})},
        "language_learner": {
            "sft_weight": 0.5,
            "rft_weight": 0.3,
            "learning_rate": 1e-3,
            "microbatch": 4,
            "accumulate": 1,
            "precision": "float32",
        },
    }
    return PriorZeroSettings.model_validate(common(**values) | changes)


@pytest.fixture
def house(monkeypatch):
    """Make every environment a House; the fixture's value sets a game's arguments."""
    arguments = {}
    monkeypatch.setattr("pz_agents.priorzero.run.plot_panels", lambda *given: [])
    monkeypatch.setattr(
        "pz_envs.catalog.make_env", lambda env_id, **kwargs: House(**arguments.get(env_id, {}))
    )
    return arguments


@pytest.fixture(scope="module")
def guide(micro, tmp_path_factory):
    """Return a model that was taught which door is right in each room."""
    model = load_model(str(micro))
    prior = LanguagePrior(model, LanguageSettings(history=3))
    given = LanguageLearnerSettings(
        sft_weight=1.0, rft_weight=0.0, kl=0.0, learning_rate=1e-2, microbatch=4, accumulate=1
    )
    learner = LanguageLearner(model, given, seed=0)
    lessons, past = [], ()
    for room, right in zip(ROOMS, House.right, strict=False):
        seen = f"You are in the {room}."
        prefix = prior.prefix(Moment(seen, "", COMMANDS, past))
        lessons.append(prior.decision(prefix, COMMANDS, np.eye(4)[right], right, 0.0))
        past = (*past, (seen, COMMANDS[right], 1.0))
    for _ in range(80):
        told = learner.learn(lessons)
    assert told["llm_agreement"] == 1.0
    folder = tmp_path_factory.mktemp("guide")
    learner.save(folder)
    return folder / "model"


def world_of(folder, step=None):
    found = folder / "checkpoints" / f"step_{step:06d}" if step else policy_folder(folder)
    path = found / "learner.pt" if step else found / "model.pt"
    state = torch.load(path, weights_only=True)
    return state["model"] if step else state


def language_of(folder, step=None):
    if step is None:
        return load_file(folder / "policy" / "language" / "model.safetensors")
    return load_file(
        folder / "checkpoints" / f"step_{step:06d}" / "language" / "model" / "model.safetensors"
    )


def same(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def actor_of(guide, *, explore, **changes):
    given = settings(guide, **changes)
    torch.manual_seed(0)
    texts = Texts(given.network.buckets)
    prior = LanguagePrior(load_model(str(guide)), given.language)
    model = WorldModel(given.network).eval()
    return Actor(model, texts, given, slots=2, explore=explore, prior=prior), texts, given


def positions_of(actor):
    env = House()
    observation, info = env.reset(seed=0)
    return [actor.position(slot, observation, info, None) for slot in range(2)]


@pytest.mark.parametrize("mode", ["mix", "adaptive", "replace"])
def test_the_searched_root_prior_is_the_mix_to_the_last_bit(guide, monkeypatch, mode):
    actor, _, given = actor_of(guide, explore=False, root={"mode": mode})
    worlds, searched = [], []
    roots, search = Imagination.roots, Planner.search

    def seen_roots(self, *arguments):
        found = roots(self, *arguments)
        worlds.extend(found[1])
        return found

    def seen_search(self, given_roots, *arguments):
        searched.append(search(self, given_roots, *arguments).prior)
        return search(self, given_roots, *arguments)

    monkeypatch.setattr(Imagination, "roots", seen_roots)
    monkeypatch.setattr(Planner, "search", seen_search)
    positions = positions_of(actor)
    actor.choose(positions, [np.random.default_rng(n) for n in range(2)])
    prior = LanguagePrior(load_model(str(guide)), given.language)
    said = prior.judge([each.moment for each in positions])
    mixed = [mix_prior(w, o.scores, given.root) for w, o in zip(worlds, said, strict=True)]
    assert np.array_equal(searched[0], np.concatenate(mixed))
    assert not np.array_equal(mixed[0], worlds[0])


def test_without_noise_the_first_visit_is_the_priors_favourite(guide):
    actor, texts, _ = actor_of(guide, explore=False, search={"simulations": 1})
    choices = actor.choose(positions_of(actor), [np.random.default_rng(n) for n in range(2)])
    for choice in choices:
        assert choice.policy.tolist() == [0.0, 0.0, 1.0, 0.0]
        assert texts.string(choice.command) == COMMANDS[House.right[0]]
        assert choice.statistics["llm_agreement"] == choice.statistics["llm_success"] == 1.0


def test_the_language_model_sees_what_happened_and_what_it_gained(guide):
    actor, texts, _ = actor_of(guide, explore=False)
    env = House()
    observation, info = env.reset(seed=0)
    first = actor.position(0, observation, info, None)
    right = COMMANDS[House.right[0]]
    after, _, _, _, info = env.step(right)
    second = actor.position(0, after, info, texts.intern(right))
    assert first.moment.history == ()
    assert second.moment.history == ((observation, right, 1.0),)
    assert second.moment.observation == "You are in the hall."
    assert actor.position(0, observation, info, None).moment.history == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"phase": "alternating", "phase_updates": 2, "off_policy": 1},
        {"phase": "parallel", "wm_every": 2, "eval_episodes": 1, "eval_every": 2},
    ],
    ids=["alternating", "parallel"],
)
def test_a_resumed_run_is_the_run_that_was_not_cut_short(tmp_path, house, micro, changes):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes["language_learner"] = {"critic": "world_model", "microbatch": 4, "accumulate": 1}
    changes |= {"eval_every": 2} if "eval_every" not in changes else {}
    priorzero.train(settings(micro, steps=5, **changes), whole)
    for steps in (2, 3, 5):
        priorzero.train(settings(micro, steps=steps, **changes), cut)
    assert same(world_of(whole), world_of(cut))
    assert same(language_of(whole), language_of(cut))
    lines = read_metrics(whole / "metrics.jsonl")
    if not changes.get("eval_episodes"):
        # Without evaluations, which the end of each call has, every figure is the same.
        assert lines == read_metrics(cut / "metrics.jsonl")
    assert any("train/llm_updates" in line for line in lines)


def test_in_alternation_one_half_learns_while_the_other_stays(tmp_path, house, micro):
    given = settings(
        micro, steps=4, phase="alternating", phase_updates=2, wm_llm_ratio=0.5, episodes_per_step=4
    )
    priorzero.train(given, tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    alone = [line["step"] for line in lines if "train/wm_total_loss" not in line]
    assert alone
    assert 1 not in alone
    for before, line in itertools.pairwise(lines):
        step = line["step"]
        still = step in alone
        assert same(world_of(tmp_path, step - 1), world_of(tmp_path, step)) == still
        assert same(language_of(tmp_path, step - 1), language_of(tmp_path, step)) != still
        assert ("reward" not in line) == still
        assert (line["env_steps"] == before["env_steps"]) == still


def test_both_halves_learn_in_every_step_and_the_order_matters(tmp_path, house, micro):
    learner = {"sft_weight": 0.5, "learning_rate": 1e-3, "microbatch": 4, "accumulate": 1}
    for phase in ("parallel", "sequential"):
        given = settings(
            micro,
            phase=phase,
            episodes_per_step=9,
            language_learner={**learner, "rft_weight": 1.0},
        )
        priorzero.train(given, tmp_path / phase)
        for line in read_metrics(tmp_path / phase / "metrics.jsonl"):
            assert {"train/wm_total_loss", "train/llm_sft_loss", "train/llm_rft_loss"} <= set(line)
        assert not same(world_of(tmp_path / phase, 1), world_of(tmp_path / phase, 2))
        assert not same(language_of(tmp_path / phase, 1), language_of(tmp_path / phase, 2))
    # The language model was judged by the world model from before its updates, or from after them.
    first, second = tmp_path / "parallel", tmp_path / "sequential"
    assert same(world_of(first, 1), world_of(second, 1))
    assert not same(language_of(first, 2), language_of(second, 2))


def test_a_prior_that_fails_is_counted_and_nothing_ends(tmp_path, house, micro):
    """No prompt leaves room for such commands in a context of 128 tokens."""
    house[GAME] = {"doors": tuple(colour * 60 for colour in DOORS)}
    priorzero.train(settings(micro), tmp_path)
    first, last = read_metrics(tmp_path / "metrics.jsonl")
    assert last["failed_priors"] == last["env_steps"] > first["failed_priors"] > 0
    assert last["collector_iter/llm_success_mean"] == 0.0
    assert "train/llm_updates" not in last
    assert last["train/updates"] > 0


def test_evaluation_tells_the_halves_apart(tmp_path, house, guide):
    """The language model knows the way, the world model has seen next to nothing."""
    frozen = {"language_learner": None, "root": {"mode": "replace"}}
    given = settings(guide, steps=1, eval_episodes=2, **frozen)
    policy = priorzero.train(given, tmp_path)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["evaluator_step/llm_reward_mean"] == 4.0
    assert line["evaluator_step/wm_reward_mean"] < 4.0
    assert line["evaluator_step/reward_mean"] > line["evaluator_step/wm_reward_mean"]
    assert "language model alone 4.00" in priorzero.last_evaluation(tmp_path)
    kwargs = {"folder": str(tmp_path)}
    found = {
        mode: played_by(load_agent("priorzero", kwargs={**kwargs, "mode": mode}))
        for mode in ("wm", "both", "llm")
    }
    assert found["llm"] == 4.0
    assert found["wm"] == line["evaluator_step/wm_reward_mean"]
    assert found["both"] == line["evaluator_step/reward_mean"]
    assert played_by(UniZeroAgent(folder=str(policy))) == found["wm"]
    assert played_by(priorzero.player(tmp_path)) == found["both"]
    check_agent(PriorZeroAgent(folder=str(policy), slots=3), make_env=lambda env_id: House())
    with pytest.raises(ConfigError, match="wm, both, llm"):
        PriorZeroAgent(folder=str(policy), mode="lm")


def played_by(agent, env=GAME):
    (played,) = run_episodes(
        agent,
        [EpisodeSpec("0", env, 0)],
        make_env=lambda env_id: House(),
        limits=Limits(turns=6),
        seed=0,
    )
    return played.reward


def test_several_games_share_models_and_keep_their_commands_apart(tmp_path, house, micro):
    house[OTHER] = {"doors": ("oak", "iron", "glass", "straw")}
    given = settings(micro, envs=(OTHER,), steps=2, eval_episodes=1)
    policy = priorzero.train(given, tmp_path)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["episodes"] == 2 * 2 * given.episodes_per_step
    for name in ("Detective", "Zork1"):
        assert f"collector_iter/{name}/reward_mean" in last
        assert {
            f"evaluator_step/{name}/reward_mean",
            f"evaluator_step/{name}/wm_reward_mean",
            f"evaluator_step/{name}/llm_reward_mean",
        } <= last.keys()
    assert last["reward"] == pytest.approx(
        np.mean([last[f"collector_iter/{name}/reward_mean"] for name in ("Detective", "Zork1")])
    )
    commands = json.loads((policy / "commands.json").read_text())
    assert set(commands[GAME]) == set(COMMANDS)
    assert set(commands[OTHER]) == {f"open {each} door" for each in house[OTHER]["doors"]}
    agent = PriorZeroAgent(folder=str(policy))
    played = list(
        run_episodes(
            agent,
            [EpisodeSpec(str(number), (GAME, OTHER)[number % 2], 0) for number in range(4)],
            make_env=lambda env_id: House(**house.get(env_id, {})),
            limits=Limits(turns=6),
            seed=0,
            concurrency=4,
        )
    )
    assert [each.status for each in played] == ["ok"] * 4


def test_a_run_can_begin_with_what_another_game_taught(tmp_path, house, micro):
    first, second = tmp_path / "first", tmp_path / "second"
    priorzero.train(settings(micro), first)
    house[OTHER] = {"doors": ("oak", "iron", "glass", "straw")}
    still = {
        "learner": {"learning_rate": 1e-12, "weight_decay": 0.0, "precision": "fp32"},
        "language_learner": {"learning_rate": 1e-12, "microbatch": 4, "accumulate": 1},
        "env": OTHER,
        "steps": 1,
    }
    priorzero.train(settings(micro, start_from=str(first), **still), second)
    for mine, taught in (
        (world_of(second), world_of(first)),
        (language_of(second), language_of(first)),
    ):
        assert all(torch.allclose(mine[name], taught[name], atol=1e-6) for name in taught)
    assert json.loads((second / "policy" / "commands.json").read_text()).keys() == {OTHER}
    assert played_by(PriorZeroAgent(folder=str(first)), env="pz/Pentari-v0") >= 0.0
    with pytest.raises(ConfigError, match="nothing trained"):
        priorzero.train(settings(micro, start_from=str(tmp_path / "x")), tmp_path / "third")


def test_an_adapter_that_a_run_begins_with_becomes_part_of_its_weights(tmp_path, house, micro):
    first, whole, cut = tmp_path / "first", tmp_path / "whole", tmp_path / "cut"
    learner = {"lora_rank": 2, "learning_rate": 1e-1, "microbatch": 4, "accumulate": 1}
    lora = {"language_learner": learner}
    priorzero.train(settings(micro, steps=1, **lora), first)

    def given(steps):
        return settings(micro, steps=steps, start_from=str(first), **lora)

    priorzero.train(given(2), whole)
    priorzero.train(given(1), cut)
    priorzero.train(given(2), cut)
    adapters = [
        load_file(folder / "policy" / "language" / "adapter_model.safetensors")
        for folder in (whole, cut)
    ]
    assert same(*adapters)
    plain, begun = (
        load_file(micro / "model.safetensors"),
        load_file(whole / "start" / "model.safetensors"),
    )
    assert not same(plain, begun)
    assert played_by(PriorZeroAgent(folder=str(whole), mode="llm")) >= 0.0


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    words = ["you", "are", "in", "the", ".", "open", "door", "commands", ":", ";"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *ROOMS, *DOORS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_a_frozen_encoder_reads_every_state_once(tmp_path, house, encoder, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    read = []
    call = FrozenEncoder.__call__
    monkeypatch.setattr(
        FrozenEncoder, "__call__", lambda self, text: (read.append(text), call(self, text))[1]
    )

    def given(steps):
        return UniZeroSettings.model_validate(common(steps=steps, text_encoder=str(encoder)))

    priorzero.train(given(3), whole)
    assert len(read) == len(set(read)) > 0
    first = list(read)
    priorzero.train(given(1), cut)
    priorzero.train(given(3), cut)
    assert sorted(read[len(first) :]) == sorted(first)
    assert same(world_of(whole), world_of(cut))
    assert world_of(whole)["observation_features.weight"].shape == (32, 16)
    newest = checkpoint.newest(whole / "checkpoints")
    assert len(torch.load(newest / "vectors.pt", weights_only=True)) == len(first)
    assert played_by(UniZeroAgent(folder=str(whole))) >= 0.0
    vectors = [FrozenEncoder(str(encoder))(f"You are in the {room}.") for room in ROOMS[:2]]
    assert not torch.equal(*vectors)


def test_collection_may_lead_training_by_batches(tmp_path, house, micro):
    priorzero.train(settings(micro, steps=3, off_policy=1), tmp_path)
    first, second, third = read_metrics(tmp_path / "metrics.jsonl")
    assert "train/updates" not in first
    done = third["train/updates"] - second["train/updates"]
    assert second["train/updates"] == max(1, round(first["env_steps"] * 0.5))
    assert done == max(1, round((second["env_steps"] - first["env_steps"]) * 0.5))


def test_frequencies_delay_updates_and_drop_none():
    given = settings("x", wm_every=2, llm_every=3, wm_llm_ratio=0.8, replay_ratio=0.1)
    owed = {"wm_turns": 0, "llm_turns": 0, "stretch": 0}
    done = []
    for step in range(1, 7):
        owed["wm_turns"] += 40
        owed["llm_turns"] += 40
        found = phases.updates(given, owed, step)
        owed |= phases.counted(given, owed, found)
        done.append((found.world, found.language))
    assert done == [(0, 0), (8, 0), (0, 3), (8, 0), (0, 0), (8, 3)]


def test_a_stretch_is_as_long_as_the_ratio_says():
    given = PriorZeroSettings(env=GAME, steps=1)
    owed = {"wm_turns": 5000, "llm_turns": 5000, "stretch": 1500}
    found = phases.updates(given, owed, 1)
    assert (found.world, found.language) == (500, 0)
    owed |= phases.counted(given, owed, found)
    assert not phases.collects(given, owed)
    found = phases.updates(given, owed, 2)
    assert (found.world, found.language) == (0, 200)
    owed |= phases.counted(given, owed, found)
    assert owed == {"wm_turns": 0, "llm_turns": 0, "stretch": 0}


@pytest.mark.parametrize("changes", [{"language": None}, {"language_learner": None}])
def test_what_is_not_trained_has_no_phase(changes):
    given = PriorZeroSettings(env=GAME, steps=1, **changes)
    owed = {"wm_turns": 100, "llm_turns": 100, "stretch": 10**6}
    assert phases.collects(given, owed)
    assert phases.updates(given, owed, 1) == phases.Updates(10, 0)


def test_presets_go_together_over_the_papers_method(monkeypatch):
    paper = PriorZeroSettings(env=GAME, steps=1)
    assert (paper.network.embed, paper.phase, paper.language_learner.critic) == (
        768,
        "alternating",
        "world_model",
    )
    both = PriorZeroSettings(env=GAME, preset="quick,lora", network={"layers": 1})
    assert (both.steps, both.network.embed, both.network.layers) == (12, 96, 1)
    assert both.language_learner.lora_rank == 16
    assert PriorZeroSettings(env=GAME, preset="quick,pure").language is None
    old = PriorZeroSettings(env=GAME, steps=1, preset="v1")
    assert (old.language.kind, old.root.mode, old.phase) == ("generate", "replace", "parallel")
    assert (old.language_learner.sft_weight, old.language_learner.rft_weight) == (0.5, 0.3)
    assert PriorZeroSettings(env=GAME, steps=1, preset="sft").language_learner.rft_weight == 0.0
    monkeypatch.setenv("DEBUG_MODE", "1")
    assert PriorZeroSettings(env=GAME).steps == 3
    assert PriorZeroSettings(env=GAME, preset="quick").steps == 12
    with pytest.raises(ConfigError, match="Did you mean `quick`"):
        PriorZeroSettings(env=GAME, preset="quik")
    with pytest.raises(ConfigError, match="llm_every=2"):
        PriorZeroSettings(env=GAME, steps=1, llm_every=2)


def test_without_a_language_model_it_is_unizero(tmp_path, house):
    values = common(steps=2, eval_episodes=1)
    priorzero.train(UniZeroSettings.model_validate(values), tmp_path / "unizero")
    pure = {"language": None, "learner": values["learner"] | {"max_grad_norm": 10.0}}
    pure["learner"]["loss"] = {"entropy_weight": 5e-3}
    pure["replay"] = values["replay"] | {"alpha": 0.6}
    priorzero.train(PriorZeroSettings.model_validate(values | pure), tmp_path / "pure")
    assert same(world_of(tmp_path / "unizero"), world_of(tmp_path / "pure"))
    with pytest.raises(ConfigError, match="no language model"):
        PriorZeroAgent(folder=str(tmp_path / "pure"), mode="llm")


def test_a_run_of_another_algorithm_is_not_gone_on_with(tmp_path, house, micro):
    priorzero.train(UniZeroSettings.model_validate(common(steps=1)), tmp_path)
    with pytest.raises(ConfigError, match=r"`algorithm` was 'unizero'"):
        priorzero.train(settings(micro), tmp_path)
