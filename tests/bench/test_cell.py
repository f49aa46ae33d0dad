import json
import subprocess
import sys

import numpy as np
import pytest

from pz_agents.sdk.types import Sample, Step, Trajectory
from pz_bench.cell import (
    CellSpec,
    cell_id,
    env_seed,
    from_line,
    identity,
    record,
    to_line,
    training_settings,
)
from pz_envs.errors import ConfigError, DataError

COUNTDOWN = {"env": "pz/Countdown-v0", "algorithm": "random"}


def trajectory(**changes):
    sample = Sample(
        np.array([1, 2, 3], np.int32), np.array([4, 5], np.int32), np.zeros(2, np.float32)
    )
    steps = (
        Step("one", "go \ud800 north", 0.5, 0.5, valid=False, format_error=True, sample=sample),
        Step("two", "<action>x</action>", 0.5, 1.0, valid=True, format_error=False, sample=sample),
    )
    values = {
        "key": "3",
        "env_id": "pz/Countdown-v0",
        "env_seed": 7,
        "task_id": "countdown/1",
        "group_id": "",
        "attempt": 0,
        "steps": steps,
        "final_observation": "three\nlines",
        "reward": 1.0,
        "score": 1.0,
        "max_score": 2.0,
        "score_norm": 0.5,
        "success": False,
        "terminated": True,
        "truncated": "",
        "seconds": 1.25,
    }
    return Trajectory(**(values | changes))


def test_id_is_the_same_in_another_process():
    spec = CellSpec(**COUNTDOWN, env_kwargs={"tries": 2, "numbers": [3]})
    code = (
        "from pz_bench.cell import CellSpec\n"
        f"print(CellSpec.model_validate_json({spec.model_dump_json()!r}).id)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == spec.id


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"episodes": 6},
        {"max_turns": 99},
        {"max_repeats": 3},
        {"env_kwargs": {"tries": 2}},
        {"agent_kwargs": {"x": 1}},
        {"algorithm": "expert"},
    ],
)
def test_id_changes_with_everything_that_can_change_the_number(change):
    assert CellSpec(**COUNTDOWN).id != CellSpec(**(COUNTDOWN | change)).id


def test_id_changes_with_the_source_of_an_agent_file_but_not_with_its_folder(tmp_path):
    ids = []
    for folder, text in (("a", "x = 1\n"), ("b", "x = 1\n"), ("c", "x = 2\n")):
        path = tmp_path / folder / "mine.py"
        path.parent.mkdir()
        path.write_text(text)
        spec = CellSpec(algorithm=f"{path}:Mine", env="pz/Countdown-v0")
        assert spec.player == "mine.py:Mine"
        ids.append(spec.id)
    assert ids[0] == ids[1] != ids[2]


def test_an_agent_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.py"):
        identity(CellSpec(algorithm=f"{tmp_path}/nowhere.py:X", env="pz/Countdown-v0"))


def test_identity_holds_the_versions_of_the_packages_that_matter():
    versions = identity(CellSpec(**COUNTDOWN))["versions"]
    assert set(versions) == {"pz-envs", "pz-agents", "pz-bench"}
    assert cell_id(identity(CellSpec(**COUNTDOWN))) == CellSpec(**COUNTDOWN).id


def test_identity_ignores_training_settings_that_no_weight_depends_on():
    def training(**train):
        spec = CellSpec(
            algorithm="grpo", env="pz/Countdown-v0", model="tiny", train={"steps": 3, **train}
        )
        return identity(spec)["spec"]["train"]

    assert training() == training(save_every=1)
    assert training() != training(group_size=4)


def test_training_settings_name_a_wrong_key():
    spec = CellSpec(algorithm="grpo", env="pz/Countdown-v0", model="tiny", train={"step": 3})
    with pytest.raises(ConfigError, match="Did you mean `steps`"):
        training_settings(spec)


def test_instances_are_shared_by_algorithms_and_differ_between_environments():
    seeds = [env_seed("pz/Countdown-v0", number) for number in range(100)]
    assert len(set(seeds)) == 100
    assert seeds[3] != env_seed("pz/Zork1-v0", 3)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_record_survives_its_line_exactly():
    episode = record(3, trajectory())
    line = to_line(episode)
    assert line.count("\n") == 1
    assert line.isascii()
    assert from_line(line) == episode


def test_a_record_counts_what_happened():
    episode = record(3, trajectory(status="failed", error="boom"))
    assert (episode.turns, episode.invalid, episode.format_errors) == (2, 1, 1)
    assert (episode.sampled_tokens, episode.prompt_tokens) == (4, 6)
    assert (episode.status, episode.error) == ("failed", "boom")


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "{}", '{"episode": 1}', "null", '{"steps": [], "other": 1}']
)
def test_a_broken_line_is_a_data_error(line):
    with pytest.raises(DataError, match="broken episode line"):
        from_line(line)


def test_a_line_with_one_key_missing_is_broken():
    values = json.loads(to_line(record(0, trajectory())))
    del values["score"]
    with pytest.raises(DataError):
        from_line(json.dumps(values))


def test_other_questions_and_other_games_are_another_cell(monkeypatch, tmp_path):
    from pz_bench.cell import _data_identity

    def identifier(env):
        _data_identity.cache_clear()
        return CellSpec(algorithm="random", env=env).id

    monkeypatch.setenv("PZ_DATA", str(tmp_path))
    generated = identifier("pz/ALFWorld-v0")
    (tmp_path / "alfworld").mkdir()
    archive = tmp_path / "alfworld" / "games_valid_seen.tar.xz"
    archive.write_bytes(b"some games")
    published = identifier("pz/ALFWorld-v0")
    archive.write_bytes(b"other games")
    assert len({generated, published, identifier("pz/ALFWorld-v0")}) == 3
    (tmp_path / "math").mkdir()
    questions = tmp_path / "math" / "aime24.jsonl"
    questions.write_text("one")
    before = identifier("pz/AIME24-v0")
    questions.write_text("two")
    assert identifier("pz/AIME24-v0") != before
    _data_identity.cache_clear()
