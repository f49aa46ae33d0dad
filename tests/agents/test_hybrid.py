"""The hybrid's parts: ORZ's names, prompts and replies to them, and trials in true games."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pz_agents.config import parse_settings
from pz_agents.errors import EngineMissing, ModelError
from pz_agents.hybrid import engines
from pz_agents.hybrid.engines import Engine, engine_model, share_of
from pz_agents.hybrid.half import figures_of
from pz_agents.hybrid.prompt import Answer, HybridPrior, Prompter
from pz_agents.hybrid.settings import HybridSettings, RewardSettings
from pz_agents.hybrid.trials import State, Trials, earned
from pz_agents.models import load_model
from pz_agents.models.scripted import ScriptedModel
from pz_agents.models.vllm import EngineSettings, parse_spec
from pz_agents.priorzero import phases
from pz_agents.priorzero.prior import Moment
from pz_agents.runtime import Resources
from pz_agents.training.worker import pack_files
from pz_envs.catalog import make_env
from pz_envs.errors import ConfigError
from tests.support.house import DOORS, House

pytestmark = pytest.mark.timeout(280)

GAME, OTHER = "pz/Detective-v0", "pz/Zork1-v0"
LIST = ("go west", "take paper", "wait")


def settings(**changes):
    return HybridSettings.model_validate({"env": GAME, "preset": "debug"} | changes)


# Settings.


def test_the_defaults_are_those_of_open_reasoner_zero():
    given = HybridSettings.model_validate({"env": GAME, "steps": 1, "preset": ""})
    found = given.training()
    assert (found.groups_per_step, found.group_size, found.max_new_tokens) == (128, 64, 8000)
    assert (found.learning_rate, found.warmup_updates, found.policy_update_steps) == (1e-6, 50, 1)
    wanted = {"critic_learning_rate": 5e-6, "critic_update_steps": 12, "lam": 1.0}
    assert wanted.items() <= found.options.items()
    assert given.updates_per_rollout == 13
    assert (given.phase, given.root.llm_prior_weight) == ("parallel", 0.3)


def test_the_names_that_users_know_are_the_settings_that_are_kept():
    given = settings(
        model="micro",
        wm_training_mode="alternating",
        llm_prior_weight=0.7,
    )
    assert given.language.model == "micro"
    assert given.phase == given.wm_training_mode == "alternating"
    assert (given.root.llm_prior_weight, given.root.mode) == (0.7, "mix")
    assert settings(use_llm_prior_in_mcts=False).root.mode == "off"
    assert settings(root={"mode": "adaptive"}, use_llm_prior_in_mcts=True).root.mode == "adaptive"
    shown = given.model_dump(mode="json")
    assert shown["wm_training_mode"] == "alternating"
    assert shown["use_llm_prior_in_mcts"] is True


@pytest.mark.parametrize(
    "changes",
    [
        {"wm_training_mode": "alternating", "llm_prior_weight": 0.7},
        {"preset": "quick,grpo", "use_llm_prior_in_mcts": False},
        {"preset": "debug", "wm_llm_ratio": 1.0, "rl_algorithm": "grpo"},
    ],
)
def test_what_a_run_has_written_is_read_again(changes):
    given = settings(**changes)
    plain = json.loads(json.dumps(given.model_dump(mode="json"))) | {"preset": ""}
    again = parse_settings(HybridSettings, plain, "again")
    assert again.model_dump(exclude={"preset"}) == given.model_dump(exclude={"preset"})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"wm_training_mode": "parallel", "phase": "sequential"}, "one setting and differ"),
        ({"use_llm_prior_in_mcts": "mix"}, "true or false"),
        ({"language": {"kind": "generate"}}, "take priorzero"),
        ({"rl_algorithm": "grpo", "n_samples_per_prompt": 1}, "compares the attempts"),
        ({"options": {"gama": 1}}, "gamma"),
        ({"rolout_batch_size": 3}, "rollout_batch_size"),
        ({"vllm_num_engines": 2, "total_num_nodes": 2}, "beside the learner take 3"),
        ({"vllm_num_engines": 2, "total_num_nodes": 3, "colocate_all": True}, "take 2"),
        ({"colocate_all": True}, "vllm_num_engines is 0"),
        ({"runtime": "ray"}, "vllm_num_engines is 0"),
        ({"options": {"critic_update_steps": 1}}, "set critic_update_steps=1"),
        ({"options": {"critic_learning_rate": 1.0}}, "set critic_learning_rate=1.0"),
        ({"rl_algorithm": "grpo", "critic_update_steps": 3}, "critic_update_steps is about"),
        ({"preset": "grpo", "critic_learning_rate": 0.1}, "critic_learning_rate is about"),
        ({"use_llm_prior_in_mcts": False, "llm_prior_weight": 0.3}, "set that true"),
        ({"root": {"mode": "off", "llm_prior_weight": 0.3}}, "set that true"),
        ({"wm_llm_ratio": 1, "vllm_num_engines": 1}, "it learns nothing. Leave the engines out"),
        ({"top_p": 0.9}, "unknown key `top_p` of ORZ's: replies are sampled from all tokens"),
        ({"zero_stage": 3}, "unknown key `zero_stage`"),
        ({"actor_num_nodes": 2}, "engines are vllm_num_engines"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        parse_settings(HybridSettings, {"env": GAME, "preset": "debug"} | changes, "--set")


def test_debug_mode_is_the_preset_where_none_is_named(monkeypatch):
    monkeypatch.setenv("DEBUG_MODE", "1")
    given = HybridSettings.model_validate({"env": GAME})
    assert (given.rollout_batch_size, given.n_samples_per_prompt) == (16, 2)
    assert (given.critic_update_steps, given.nodes) == (1, 1)


def test_engines_are_given_what_is_there():
    engines = {"vllm_num_engines": 2}
    apart, together = settings(**engines), settings(**engines, colocate_all=True)
    assert (apart.nodes, together.nodes) == (3, 2)
    assert share_of(apart, Resources(cpus=3)) == Resources(cpus=1.0)
    assert share_of(together, Resources(cpus=2)) == Resources(cpus=0.5)
    assert share_of(together, Resources(cpus=8, gpus=2)) == Resources(cpus=1.0, gpus=0.5)
    with pytest.raises(ConfigError, match="3 GPUs, and runtime local has 2; set vllm_num_engines"):
        share_of(apart, Resources(cpus=8, gpus=2))


def test_vllm_is_demanded_or_done_without(monkeypatch, caplog):
    monkeypatch.setattr("pz_agents.hybrid.engines.vllm.available", lambda: False)
    assert engine_model(settings(vllm_num_engines=1), "tiny") == "tiny"
    assert caplog.text.count("vLLM is not installed") == 1
    with pytest.raises(EngineMissing, match="pip install"):
        engine_model(settings(vllm_num_engines=1, vllm_required=True), "tiny")
    with pytest.raises(EngineMissing, match="pip install"):
        settings(vllm_required=True)
    monkeypatch.setattr("pz_agents.hybrid.engines.vllm.available", lambda: True)
    assert engine_model(settings(vllm_num_engines=1), "tiny") == "vllm:tiny"
    beside = engine_model(settings(vllm_num_engines=1, colocate_all=True), "tiny")
    assert parse_spec(beside) == EngineSettings(folder="tiny", memory=0.425)
    with pytest.raises(ConfigError, match="vllm_num_engines is 0"):
        settings(vllm_required=True)


class Sleepy(ScriptedModel):
    """Notes what is asked of it, and refuses to work in its sleep."""

    def __init__(self):
        super().__init__(("</think> <answer>wait</answer>",), name="sleepy")
        self.told, self.awake, self.fails = [], True, False

    def sleep(self):
        self.told.append("sleep")
        self.awake = False

    def wake(self):
        self.told.append("wake")
        self.awake = True

    def load_weights(self, source):
        assert self.awake
        self.told.append("load")

    def generate(self, requests):
        assert self.awake
        self.told.append("generate")
        if self.fails:
            raise ModelError("out of memory")
        return super().generate(requests)


def test_an_engine_that_shares_a_gpu_is_awake_while_it_samples_alone(monkeypatch, tmp_path):
    monkeypatch.setattr("pz_envs.catalog.make_env", lambda env_id, **kwargs: House())
    model = Sleepy()
    monkeypatch.setattr(engines, "load_model", lambda spec: model)
    state = state_of("house", (), "You are in the cellar.", ("wait",)).plain()
    weights = pack_files(lambda folder: (folder / "config.json").write_text("{}"))

    def plain(**changes):
        return settings(vllm_num_engines=1, generate_max_len=64, **changes).model_dump(mode="json")

    engine = Engine(plain(colocate_all=True), "sleepy", 0)
    assert model.told == ["sleep"]
    assert len(engine.play([state], 1, weights)) == 4
    engine.play([state], 1, None)
    assert model.told[1:] == ["wake", "load", "generate", "sleep", "wake", "generate", "sleep"]
    model.fails = True
    with pytest.raises(ModelError, match="out of memory"):
        engine.play([state], 1, None)
    assert model.told[-1] == "sleep"
    model.told, model.fails, model.awake = [], False, True
    Engine(plain(), "sleepy", 0).play([state], 1, weights)
    assert model.told == ["load", "generate"]


# When which half learns.


def learned(given, turns, steps):
    """Return all updates of each half over steps of so many turns, as a run counts them."""
    owed = {"wm_turns": 0, "llm_turns": 0, "stretch": 0, "llm_owed": 0.0}
    world = language = 0
    for step in range(1, steps + 1):
        if phases.collects(given, owed):
            owed["wm_turns"] += turns
            owed["llm_turns"] += turns
        due = phases.updates(given, owed, step)
        owed = json.loads(json.dumps(owed | phases.counted(given, owed, due)))
        assert due.language % given.updates_per_rollout == 0
        world, language = world + due.world, language + due.language
    return world, language


@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("critic", [1, 12])
@pytest.mark.parametrize(
    "mode",
    [
        {"wm_training_mode": "parallel"},
        {"wm_training_mode": "sequential", "llm_every": 3},
        {"wm_training_mode": "alternating", "phase_updates": 5},
    ],
)
def test_the_world_models_share_of_all_updates_is_what_was_asked_for(ratio, critic, mode):
    given = settings(wm_llm_ratio=ratio, critic_update_steps=critic, replay_ratio=0.25, **mode)
    world, language = learned(given, 9, 600)
    wanted = world * (1 - ratio) / ratio
    most = max((critic + 1), 2 * 6 * (1 - ratio) / ratio)
    assert world > 200
    assert abs(language - wanted) <= most + critic + 1


# Prompts and replies.

MOMENT = Moment(
    "A street.\n", "Play well.", LIST, (("A hall.", "go east", 0.0), ("A door.", "open door", 5.0))
)


def scripted(*replies, template="chat"):
    model = ScriptedModel(replies or ("",), name="scripted")
    model.template = template
    return model


def test_the_prompt_is_in_orz_form_and_ends_in_an_open_thought():
    text, ids = Prompter(scripted(), settings(prompt_max_len=2048)).prompt(MOMENT)
    assert text.startswith("A conversation between User and Assistant. The User asks a question,")
    assert "i.e., <think> reasoning process here </think> <answer> answer here </answer>. " in text
    assert text[text.index("User: Play") :] == (
        "User: Play well.\n"
        "\nObservation: A hall.\nCommand: go east\nReward: 0\n"
        "\nObservation: A door.\nCommand: open door\nReward: 5\n"
        "\nObservation: A street.\nValid commands: go west; take paper; wait\n"
        "Which command comes next? Put it between <answer> and </answer>, word for word. "
        "Assistant: <think>"
    )
    assert scripted().decode(ids) == text


def test_a_compact_model_reads_numbers():
    text, _ = Prompter(scripted(template="compact"), settings()).prompt(MOMENT)
    assert text == (
        "User: > go east\n> open door\nA street.\n"
        "Commands: 1 go west; 2 take paper; 3 wait;\nAssistant: <think>"
    )


def test_a_prompt_that_is_too_long_loses_its_oldest_turns():
    _, whole = Prompter(scripted(), settings(prompt_max_len=2048)).prompt(MOMENT)
    text, ids = Prompter(scripted(), settings(prompt_max_len=len(whole) - 1)).prompt(MOMENT)
    assert len(ids) < len(whole)
    assert "A hall." not in text
    assert "A door." in text


def test_a_template_of_ones_own(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text("{{ commands | length }} ways. {{ observation }} <think>")
    text, _ = Prompter(scripted(), settings(prompt_template=str(path))).prompt(MOMENT)
    assert text == "3 ways. A street. <think>"
    path.write_text("{{ comands }}")
    with pytest.raises(ConfigError, match="'comands' is undefined"):
        Prompter(scripted(), settings(prompt_template=str(path))).prompt(MOMENT)
    path.write_text("{{ commands")
    with pytest.raises(ConfigError, match=r"own\.jinja cannot be used"):
        Prompter(scripted(), settings(prompt_template=str(path)))


@pytest.mark.parametrize(
    ("reply", "command", "well_formed"),
    [
        (" go on </think> <answer> go  west </answer>", "go west", True),
        ("</think><answer>2</answer>", "2", True),
        ("<answer>wait</answer>", "wait", False),
        ("a </think> b <answer>wait</answer>", "wait", False),
        ("</think> </think> <answer>wait</answer>", "wait", False),
        ("</think> <answer> </answer>", None, False),
        ("</think> go west", None, False),
        ("go west", None, False),
    ],
)
def test_what_a_reply_says(reply, command, well_formed):
    prompter = Prompter(scripted(), settings())
    assert prompter.read(reply, LIST) == Answer(command, well_formed)


def test_a_number_is_a_command_to_a_compact_model_alone():
    prompter = Prompter(scripted(template="compact"), settings())
    assert prompter.read("</think> <answer>2</answer>", LIST).command == "take paper"
    assert prompter.read("</think> <answer>4</answer>", LIST).command == "4"
    assert prompter.answers(LIST) == ["1", "2", "3"]


def test_a_reply_ends_with_its_first_stop_and_keeps_its_ids_and_log_probs(monkeypatch):
    monkeypatch.setattr("pz_envs.catalog.make_env", lambda env_id, **kwargs: House())
    model = scripted("so </think> <answer>wait</answer> User: and so on", "Human: what?", "wait")
    trials = Trials(settings(generate_max_len=64), model)
    played = trials.play([state_of("house", (), "You are in the cellar.", ("wait",), replies=3)])
    samples = [item.steps[0].sample for item in played]
    told = ["so </think> <answer>wait</answer>", "Human:", "wait"]
    assert [model.decode(each.token_ids) for each in samples] == told
    assert [each.finish for each in samples] == ["stop"] * 3
    assert [len(each.log_probs) for each in samples] == [len(told[0]), len(told[1]), 5]
    assert played[0].steps[0].notes["command"] == "wait"


def test_the_prior_scores_answers_behind_the_prompt_that_is_trained(micro):
    model = load_model(str(micro))
    prior = HybridPrior(model, settings(prompt_max_len=70, generate_max_len=8))
    moment = Moment("A hall.", "", LIST)
    text, _ = prior.prompter.prompt(moment)
    assert model.decode(prior.prefix(moment)) == f"{text} </think> <answer>"
    assert [model.decode(each) for each in prior.candidates(LIST)][2] == " 3 </answer>"
    (opinion,) = prior.judge([moment])
    wanted = model.score(prior.prefix(moment), prior.candidates(LIST))
    assert np.allclose(opinion.scores, [each.mean() for each in wanted])


# Rewards.


@pytest.mark.parametrize(
    ("command", "gain", "well_formed", "paid"),
    [
        ("go west", 10.0, True, 1.2),
        ("Go West", 0.0, True, 0.2),
        ("go west", -5.0, False, 0.1),
        ("fly", 0.0, True, -0.4),
        ("fly", 1.0, False, 0.5),
        (None, 0.0, False, -0.5),
    ],
)
def test_what_a_reply_is_paid(command, gain, well_formed, paid):
    answer = Answer(command, well_formed)
    terms = earned(answer, LIST, gain, RewardSettings())
    assert sum(terms.values()) == pytest.approx(paid)
    for name, term in (
        ("score_gain", "reward_score_gain"),
        ("format", "reward_format"),
        ("valid", "reward_valid"),
        ("invalid", "reward_valid"),
    ):
        off = earned(answer, LIST, gain, RewardSettings(**{name: 0.0}))
        known = command is not None and command.casefold() in LIST
        switched = {**terms, term: 0.0} if name not in ("valid", "invalid") else dict(terms)
        if name == ("valid" if known else "invalid"):
            switched[term] = 0.0
        assert off == switched


# Trials.


def walked(game, count):
    """Return a true game's walkthrough as far as ``count`` commands, and the state there."""
    env = make_env(game, split="train", admissible_commands=True)
    try:
        seen, info = env.reset(seed=7)
        before = []
        for command in count:
            seen, _, _, _, info = env.step(command)
            before.append(command)
        return tuple(before), seen, info
    finally:
        env.close()


def state_of(game, before, seen, commands, replies=4):
    prompt = "Assistant: <think>"
    ids = ScriptedModel(("",), name="x").encode(prompt)
    key = f"{game}/0"
    return State(key, game, 7, before, seen, tuple(commands), prompt, ids, tuple(range(replies)))


@pytest.mark.parametrize(
    ("game", "path", "scoring"),
    [
        (GAME, ("take paper", "go west"), "take gun"),
        (OTHER, ("north", "east", "open window"), "go in"),
    ],
)
def test_a_command_is_tried_in_the_true_game(game, path, scoring):
    before, seen, info = walked(game, path)
    commands = info["admissible_commands"]
    _, said, later = walked(game, (*path, scoring))
    assert later["score"] > info["score"]
    said_to = [f"</think> <answer>{each}</answer>" for each in (scoring, "fly home")]
    model = ScriptedModel(
        lambda text, seed: said_to[seed % 2] if seed < 3 else "what?", name="scripted"
    )
    trials = Trials(settings(generate_max_len=64), model)
    try:
        played = trials.play([state_of(game, before, seen, commands)])
    finally:
        trials.close()
    good, bad, same, none = played
    assert good.final_observation == same.final_observation == said
    assert (good.score, good.steps[0].notes["gain"]) == (
        later["score"],
        later["score"] - info["score"],
    )
    listed = scoring in commands
    assert good.reward == same.reward == pytest.approx(1.1 + (0.1 if listed else -0.5))
    assert (bad.score, bad.reward) == (info["score"], pytest.approx(-0.4))
    assert none.reward == -0.5
    assert none.final_observation == seen
    assert figures_of(played)["score_gain"] == 0.5


def test_a_state_is_played_again_where_the_engine_takes_no_snapshot(monkeypatch):
    monkeypatch.setattr("pz_envs.catalog.make_env", lambda env_id, **kwargs: House())
    doors = [f"open {colour} door" for colour in DOORS]
    model = ScriptedModel(
        lambda text, seed: f"</think> <answer>{doors[seed]}</answer>", name="scripted"
    )
    trials = Trials(settings(generate_max_len=64), model)
    state = state_of("house", (doors[2],), "You are in the hall.", doors)
    assert [item.steps[0].notes["gain"] for item in trials.play([state])] == [1.0, 0.0, 0.0, 0.0]


def test_a_state_that_is_not_reached_again_is_a_failure_and_the_others_are_played(monkeypatch):
    monkeypatch.setattr("pz_envs.catalog.make_env", lambda env_id, **kwargs: House())
    trials = Trials(settings(generate_max_len=64), scripted("</think> <answer>x</answer>"))
    lost = state_of("house", (), "You are in the tower.", ("x",), replies=2)
    found = state_of("house", (), "You are in the cellar.", ("x",), replies=2)
    played = trials.play([lost, found])
    assert [item.status for item in played] == ["failed", "failed", "ok", "ok"]
    assert "and not 'You are in the tower.'" in played[0].error
    assert figures_of(played)["failed"] == 0.5


def test_a_state_travels_as_plain_data():
    state = state_of("house", ("a",), "b", ("c", "d"))
    plain = state.plain()
    assert {type(each) for each in plain.values()} <= {str, int, list, bytes}
    again = State.of(plain)
    assert np.array_equal(again.prompt_ids, state.prompt_ids)
    assert again.plain() == plain
