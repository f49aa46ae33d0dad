from __future__ import annotations

import json
import math
import shutil
import sys

import pytest

from pz_agents.training import checkpoint
from pz_agents.training.monitors import MetricsLog, read_metrics
from pz_agents.training.plots import plot_metrics
from pz_agents.training.settings import TrainSettings, check_resumable, resolved
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
    # It is out of the way of what the run writes next, and still there to be looked at.
    assert sorted(path.name for path in three.iterdir()) == [
        "step_000010",
        "step_000020",
        "step_000030.damaged",
    ]


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
    with pytest.raises(ConfigError, match=f"`{key}(.beta)?` was .* when the run in out began"):
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


def test_metrics_survive_a_torn_line_and_steps_taken_again_are_dropped(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3, 4):
        log.write({"step": step, "reward": 0.5}, {"seconds": 1.5})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')
    log = MetricsLog(tmp_path, 2)
    log.write({"step": 3, "reward": 1.0}, {"seconds": 1.5})
    log.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["reward"]) for line in lines] == [(1, 0.5), (2, 0.5), (3, 1.0)]
    timings = read_metrics(tmp_path / "timings.jsonl")
    assert timings == [{"step": step, "seconds": 1.5} for step in (1, 2, 3)]


def test_values_that_are_not_finite_are_null_and_named(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1, "loss": math.nan, "reward": 1.0, "ratio": math.inf}, {})
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "loss": None, "reward": 1.0, "ratio": None, "nan": ["loss", "ratio"]}


def test_the_plot_is_the_same_bytes_from_the_same_metrics(tmp_path):
    pytest.importorskip("matplotlib")
    metrics = [
        {"step": step, "reward": step / 10, "success": None, "entropy": 1.0, "usable_groups": 3}
        for step in range(10)
    ]
    first = plot_metrics(metrics, tmp_path / "a")
    second = plot_metrics(metrics, tmp_path / "b")
    assert [path.name for path in first] == ["a.png", "a.svg", "a_detailed.png"]
    assert first[0].read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in first[1].read_text()
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_without_matplotlib_there_is_no_plot_and_no_error(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert plot_metrics([{"step": 1, "reward": 0.5}], tmp_path / "a") == []
    assert "pip install" in caplog.text


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_monitor_that_is_not_installed_names_the_command(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="pip install"):
        MetricsLog(tmp_path, 0, monitor=name)


def test_a_monitor_that_fails_ends_nothing(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    log = MetricsLog(tmp_path, 0, monitor="tensorboard")
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "tensorboard").write_text("in the way")
    log._monitor.close()
    for step in (1, 2):
        log.write({"step": step, "reward": 0.5}, {})
    log.close()
    assert caplog.text.count("the monitor failed") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    scores = {1: 0.2, 2: 0.9, 3: 0.9, 4: 0.5, 5: None, 6: 0.1}
    for step, score in scores.items():
        checkpoint.save(tmp_path, step, write_two_files, keep=2, score=score)
    kept = [checkpoint.step_of(path) for path in checkpoint.steps_in(tmp_path)]
    assert kept == [6, 5, 3]
    assert checkpoint.step_of(checkpoint.best(tmp_path)) == 3
    checkpoint.save(tmp_path, 7, write_two_files, keep=2, score=1.0)
    assert [checkpoint.step_of(path) for path in checkpoint.steps_in(tmp_path)] == [7, 6]


def test_the_manifest_names_every_file_with_its_size_and_the_versions(three):
    manifest = json.loads((three / "step_000030" / "manifest.json").read_text())
    assert manifest["files"]["policy/weights"]["bytes"] == 1000
    assert len(manifest["files"]["optimizer"]["sha256"]) == 64
    assert set(manifest["versions"]) == {"torch", "transformers", "trl"}


@pytest.fixture
def run(tmp_path):
    """A run's folder with checkpoints of the steps 10, 20 and 30."""
    for step in (10, 20, 30):
        checkpoint.save(tmp_path / "run" / "checkpoints", step, write_two_files, keep=3)
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, 31)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    return tmp_path / "run"


def test_auto_and_must_take_the_newest_and_differ_where_there_is_none(run, tmp_path):
    for how in ("auto", "must"):
        assert checkpoint.step_of(checkpoint.choose(run, how)) == 30
    assert checkpoint.choose(tmp_path / "other", "auto") is None
    with pytest.raises(ConfigError, match="no checkpoint in"):
        checkpoint.choose(tmp_path / "other", "must")


def test_never_moves_the_old_run_aside_and_touches_nothing_else(run):
    assert checkpoint.choose(run, "never") is None
    assert sorted(path.name for path in run.iterdir()) == ["before-1", "notes.txt"]
    moved = run / "before-1"
    assert len(checkpoint.steps_in(moved / "checkpoints")) == 3
    assert (moved / "metrics.jsonl").is_file()
    checkpoint.save(run / "checkpoints", 5, write_two_files)
    assert checkpoint.choose(run, "never") is None
    assert (run / "before-2" / "checkpoints" / "step_000005").is_dir()
    assert checkpoint.choose(run, "never") is None
    assert not (run / "before-3").exists()


def test_a_path_goes_back_to_a_checkpoint_and_sets_later_ones_aside(run):
    chosen = checkpoint.choose(run, str(run / "checkpoints" / "step_000010"))
    assert checkpoint.step_of(chosen) == 10
    assert [checkpoint.step_of(path) for path in checkpoint.steps_in(run / "checkpoints")] == [10]
    assert len(checkpoint.steps_in(run / "before-1" / "checkpoints")) == 2


@pytest.mark.parametrize("whole_run", [True, False])
def test_a_path_into_another_run_branches_off_it(run, tmp_path, whole_run):
    source = run if whole_run else run / "checkpoints" / "step_000020"
    other = tmp_path / "branch"
    chosen = checkpoint.choose(other, str(source))
    assert chosen == other / "checkpoints" / ("step_000030" if whole_run else "step_000020")
    assert checkpoint.problems(chosen) == []
    assert len(read_metrics(other / "metrics.jsonl")) == 30
    assert len(checkpoint.steps_in(run / "checkpoints")) == 3
    with pytest.raises(ConfigError, match="has checkpoints of its own"):
        checkpoint.choose(other, str(source))


def test_a_path_to_a_damaged_checkpoint_is_refused(run):
    path = run / "checkpoints" / "step_000020"
    (path / "optimizer").write_bytes(b"")
    with pytest.raises(DataError, match="sha256 differs"):
        checkpoint.choose(run, str(path))


def test_published_weights_are_the_newest_whole_ones_and_two_stay(tmp_path):
    assert checkpoint.published(tmp_path) is None
    for step in (0, 1, 2, 1):
        checkpoint.publish(
            tmp_path,
            lambda folder, step=step: (folder / "w").write_text(str(step)),
            step,
            10 + step,
        )
        told = checkpoint.published(tmp_path)
        assert (told.step, told.version) == (step, 10 + step)
        assert (told.folder / "w").read_text() == str(step)
        assert checkpoint.problems(told.folder) == []
    assert told.number == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000003",
        "00000004",
        "latest.json",
    ]


def test_an_option_of_the_algorithm_that_changed_is_named_with_both_values():
    saved = resolved(settings(algorithm="dapo", options={"max_rounds": 3}))
    with pytest.raises(ConfigError, match=r"`options.max_rounds` was 3 .* is 10 now"):
        check_resumable(saved, settings(algorithm="dapo"), "out")


def test_settings_that_came_later_had_their_defaults():
    saved = resolved(settings())
    del saved["max_staleness"]
    saved["gone"] = 1
    check_resumable(saved, settings(), "out")
    with pytest.raises(ConfigError, match=r"`max_staleness` was 0 .* is 1 now"):
        check_resumable(saved, settings(max_staleness=1), "out")
