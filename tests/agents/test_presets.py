from __future__ import annotations

import pytest

from pz_agents.algorithms import load_algorithm
from pz_agents.training.presets import (
    LAYERS,
    compose,
    merged,
    preset_names,
    presets,
    read_config,
    resolve,
)
from pz_agents.training.settings import TrainSettings, algorithm_options, resolved
from pz_envs.errors import ConfigError

EVERY = [(layer, name) for layer in LAYERS for name in presets()[layer]]


@pytest.mark.parametrize(("layer", "name"), EVERY, ids=lambda value: value)
def test_every_preset_has_only_settings_that_exist_and_composes_with_the_rest(layer, name):
    values = resolve({"preset": name, **({} if layer == "env" else {"env": "pz/Countdown-v0"})})
    chosen = TrainSettings.model_validate(values)
    assert name in chosen.preset.split(",")
    for key, value in compose([name]).items():
        if key != "options":
            assert getattr(chosen, key) == value
    algorithm_options(chosen)


def test_names_are_unique_over_the_layers():
    names = [name for _, name in EVERY]
    assert len(names) == len(set(names))


def test_layers_are_applied_in_their_order_whatever_the_order_of_names():
    assert preset_names("tiny, countdown3,quick") == ["quick", "countdown3", "tiny"]
    assert compose(["tiny", "study"])["learning_rate"] == 1.5e-4
    assert compose(["tiny", "study"])["groups_per_step"] == 96


def test_several_presets_go_by_one_name():
    chosen = TrainSettings(preset="tiny-countdown")
    assert (chosen.steps, chosen.groups_per_step, chosen.group_size) == (60, 16, 16)
    assert (chosen.model, chosen.learning_rate, chosen.max_turns) == ("tiny", 1.5e-4, 1)
    assert chosen.env_kwargs == {"numbers": [3], "max_number": 20, "operators": "+-*"}


def test_what_is_given_in_code_wins_whole():
    assert TrainSettings(preset="tiny-countdown", steps=7).steps == 7
    assert TrainSettings(preset="tiny-countdown", env_kwargs={}).env_kwargs == {}


def test_given_mappings_are_merged_key_by_key():
    values = resolve({"preset": "grpo-paper,countdown3"}, {"options": {"clip_high": 0.3}})
    assert values["options"]["clip_high"] == 0.3
    assert values["options"]["beta"] == 0.04
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"env": "pz/ALFWorld-v0", "algorithm": "dapo"}, "standard,alfworld,dapo,tiny"),
        ({"env": "pz/Detective-v0", "model": "/m/tiny"}, "standard,jericho,grpo,tiny"),
        ({"env": "pz/Countdown-v0", "model": "/m/Qwen2.5-1.5B-Instruct", "algorithm": "rloo"},
         "standard,countdown,qwen2.5-1.5b"),
        ({"env": "pz/Countdown-v0", "preset": "smoke,gpu"}, "smoke,countdown,grpo,tiny,gpu"),
        ({"env": "pz/Countdown-v0", "preset": "none"}, ""),
        ({"env": "pz/Unknown-v0", "model": "/m/other", "algorithm": "x"}, "standard"),
    ],
)  # fmt: skip
def test_a_layer_that_is_not_named_takes_the_preset_that_matches(given, names):
    assert resolve(given)["preset"] == names


def test_the_environment_and_the_algorithm_that_were_asked_for_stay():
    values = resolve({"env": "pz/NumberLine-v0", "algorithm": "opmd-reweight"})
    assert (values["env"], values["max_turns"]) == ("pz/NumberLine-v0", 22)
    assert values["algorithm"] == "opmd-reweight"


def test_the_resolved_settings_give_themselves_again():
    chosen = TrainSettings.model_validate(
        resolve({"env": "pz/WebShop-v0", "algorithm": "dapo", "options": {"max_rounds": 3}})
    )
    again = TrainSettings.model_validate(resolved(chosen))
    assert resolved(again) == resolved(chosen)
    assert resolved(again)["options"]["max_rounds"] == 3
    assert set(resolved(again)["options"]) == set(load_algorithm("dapo").defaults.model_dump())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tiny-countdow", "Did you mean `tiny-countdown`"),
        ("quick,smoke", "both of the layer base"),
        ("tiny-countdown,alfworld", "both of the layer env"),
    ],
)
def test_a_wrong_preset_is_refused_by_name(text, words):
    with pytest.raises(ConfigError, match=words):
        TrainSettings(preset=text)
    with pytest.raises(ConfigError, match=words):
        resolve({"preset": text})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", 'env = "pz/Countdown-v0"\nlearning_rate = 1e-4\n[options]\nbeta = 0.5\n'),
        ("a.yaml", "env: pz/Countdown-v0\nlearning_rate: 1e-4\noptions: {beta: .5}\n"),
        ("a.json", '{"env": "pz/Countdown-v0", "learning_rate": 1e-4, "options": {"beta": 0.5}}'),
    ],
)
def test_a_file_may_be_toml_yaml_or_json(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    wanted = {"env": "pz/Countdown-v0", "learning_rate": 1e-4, "options": {"beta": 0.5}}
    assert read_config(path) == wanted


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "env = ", "cannot be read"),
        ("a.yaml", "a: [1", "cannot be read"),
        ("a.yaml", "- 1\n", "holds a list"),
        ("a.ini", "", "is .toml, .yaml, .yml or .json"),
    ],
)
def test_a_file_that_is_no_configuration_says_so(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_config(path)
