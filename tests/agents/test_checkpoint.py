from __future__ import annotations

import json
import math

import pytest

from pz_agents.training import checkpoint
from pz_agents.training.monitors import MetricsLog, plot, read_metrics
from pz_agents.training.settings import PRESETS, TrainSettings, check_resumable
from pz_envs.errors import ConfigError, DataError


def write_two_files(folder):
    (folder / "policy").mkdir()
    (folder / "policy" / "weights").write_bytes(b"w" * 1000)
    (folder / "optimizer").write_bytes(b"o" * 1000)


@pytest.fixture
def three(tmp_path):
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, write_two_files, keep=3)
    return tmp_path


def test_the_newest_whole_checkpoint_is_found_and_only_the_latest_are_kept(tmp_path):
    for step in (2, 10, 9, 100):
        checkpoint.save(tmp_path, step, write_two_files, keep=2)
    assert [path.name for path in checkpoint.steps_in(tmp_path)] == ["step_000100", "step_000010"]
    assert checkpoint.step_of(checkpoint.newest(tmp_path)) == 100


def test_a_folder_without_checkpoints_has_no_newest(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "absent") is None


@pytest.mark.parametrize("name", ["policy/weights", "optimizer", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_to_any_file_is_noticed_and_the_older_checkpoint_used(three, caplog, name, damage):
    path = three / "step_000030" / name
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    assert checkpoint.step_of(checkpoint.newest(three)) == 20
    assert "step_000030" in caplog.text


def test_when_every_checkpoint_is_damaged_nothing_starts_silently_from_zero(three):
    for folder in checkpoint.steps_in(three):
        (folder / "optimizer").write_bytes(b"")
    with pytest.raises(DataError, match=r"no checkpoint .* is whole"):
        checkpoint.newest(three)


def test_a_write_that_fails_leaves_the_older_checkpoint_and_nothing_half_done(three):
    def fail(folder):
        write_two_files(folder)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(three, 40, fail, keep=1)
    assert checkpoint.step_of(checkpoint.newest(three)) == 30
    assert len(checkpoint.steps_in(three)) == 3
    checkpoint.save(three, 40, write_two_files, keep=1)
    assert sorted(path.name for path in three.iterdir()) == ["step_000040"]


def test_saving_a_step_again_replaces_it(three):
    def other(folder):
        (folder / "only").write_text("x")

    checkpoint.save(three, 30, other, keep=3)
    assert checkpoint.problems(three / "step_000030") == []
    assert not (three / "step_000030" / "optimizer").exists()


def settings(**changes):
    return TrainSettings(**{"env": "pz/Countdown-v0", "steps": 10, **changes})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 0.5),
        ("seed", 1),
        ("env", "pz/Zork1-v0"),
        ("group_size", 4),
        ("options", {"beta": 0.1}),
    ],
)
def test_a_changed_setting_that_weights_depend_on_is_refused_by_name(key, value):
    saved = settings().model_dump(mode="json")
    with pytest.raises(ConfigError, match=f"`{key}` was .* when the run in out began"):
        check_resumable(saved, settings(**{key: value}), "out")


def test_settings_that_no_weight_depends_on_may_change():
    saved = settings().model_dump(mode="json")
    check_resumable(saved, settings(save_every=3, keep_checkpoints=9, steps=20), "out")


def test_steps_may_not_change_where_the_learning_rate_depends_on_them():
    saved = settings(schedule="cosine").model_dump(mode="json")
    with pytest.raises(ConfigError, match="`steps` was 10"):
        check_resumable(saved, settings(schedule="cosine", steps=20), "out")
    with pytest.raises(ConfigError, match="`steps` was 10"):
        check_resumable(settings().model_dump(mode="json"), settings(steps=5), "out")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_complete_and_what_is_given_wins(name):
    assert TrainSettings(preset=name).steps == PRESETS[name]["steps"]
    assert TrainSettings(preset=name, steps=7).steps == 7


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean `tiny-countdown`"):
        TrainSettings(preset="tiny-countdow")


def test_metrics_survive_a_torn_line_and_steps_taken_again_are_dropped(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3, 4):
        log.write({"step": step, "reward": 0.5})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')
    log = MetricsLog(tmp_path, 2)
    log.write({"step": 3, "reward": 1.0})
    log.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["reward"]) for line in lines] == [(1, 0.5), (2, 0.5), (3, 1.0)]


def test_values_that_are_not_finite_are_null_and_named(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1, "loss": math.nan, "reward": 1.0, "ratio": math.inf})
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "loss": None, "reward": 1.0, "ratio": None, "nan": ["loss", "ratio"]}


def test_the_plot_is_the_same_bytes_from_the_same_metrics(tmp_path):
    pytest.importorskip("matplotlib")
    metrics = [
        {"step": step, "reward": step / 10, "success": None, "entropy": 1.0, "usable_groups": 3}
        for step in range(10)
    ]
    plot(metrics, tmp_path / "a.png")
    plot(metrics, tmp_path / "b.png")
    first = (tmp_path / "a.png").read_bytes()
    assert first[:4] == b"\x89PNG"
    assert first == (tmp_path / "b.png").read_bytes()
