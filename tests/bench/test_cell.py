import json
import subprocess
import sys

import numpy as np
import pytest

from pz_agents.sdk.types import Sample, Step, Trajectory
from pz_bench import data
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
    def identifier(env):
        data._looked_for.cache_clear()
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
    data._looked_for.cache_clear()


def names_of(env, **env_kwargs):
    """The data files of a cell, without their hashes."""
    return sorted(identity(CellSpec(algorithm="random", env=env, env_kwargs=env_kwargs))["data"])


@pytest.mark.parametrize(
    ("env", "key"),
    [
        ("pz/Countdown-v0", "source"),
        ("pz/Sokoban-v0", "source"),
        ("pz/Math-v0", "path"),
        ("pz/ALFWorld-v0", "source"),
        ("pz/TextWorld-v0", "game"),
        ("pz/WebShop-v0", "source"),
        ("pz/Detective-v0", "story"),
    ],
)
def test_a_file_that_an_argument_names_is_in_the_id_by_its_content(tmp_path, env, key):
    path = tmp_path / "mine.jsonl"
    spec = CellSpec(algorithm="random", env=env, env_kwargs={key: str(path)})
    ids = [spec.id]
    for text in ("one", "two", "one"):
        path.write_text(text)
        ids.append(spec.id)
    assert ids[1] == ids[3]
    assert len(set(ids)) == 3


def test_a_folder_that_an_argument_names_is_in_the_id_by_its_files(tmp_path):
    spec = CellSpec(algorithm="random", env="pz/WebShop-v0", env_kwargs={"source": str(tmp_path)})
    (tmp_path / "items_shuffle.json").write_text("[]")
    before = spec.id
    (tmp_path / "items_ins_v2.json").write_text("{}")
    imported = spec.id
    (tmp_path / "header.json").write_text("the header of a shop folder, with hashes")
    assert len({before, imported, spec.id}) == 3


def test_published_files_that_an_argument_asks_for_are_in_the_id(monkeypatch, tmp_path):
    monkeypatch.setenv("PZ_DATA", str(tmp_path))
    monkeypatch.setenv("PZ_CACHE", str(tmp_path / "cache"))
    files = [
        ("pz/Countdown-v0", {"source": "tasks"}, "countdown/countdown_test1024_UFT.jsonl.gz"),
        ("pz/Sokoban-v0", {"source": "boxoban"}, "boxoban/unfiltered/test/000.txt"),
        ("pz/Sokoban-v0", {"source": "boxoban"}, "boxoban/unfiltered_test_001.txt.gz"),
        ("pz/Math-v0", {"dataset": "gsm8k"}, "math/gsm8k_test.jsonl"),
        ("pz/WebShop-v0", {"source": "products_1000"}, "webshop/products_1000.jsonl.gz"),
    ]
    for env, kwargs, file in files:
        before = names_of(env, **kwargs)
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("content")
        assert len(names_of(env, **kwargs)) == len(before) + 1, file
        assert names_of(env) == []


def test_what_training_plays_beside_it_is_in_the_id(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("one")
    values = {"algorithm": "grpo", "env": "pz/Countdown-v0", "model": "tiny"}
    spec = CellSpec(**values, train={"steps": 3, "env_kwargs": {"source": str(path)}})
    assert list(identity(spec)["data"]) == ["train train.jsonl"]


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A distribution `house` 1.2 as pip would leave it, whose agent `butler` is in a package."""
    package = tmp_path / "house_agents"
    package.mkdir()
    (package / "__init__.py").write_text("from house_agents.mind import act\n")
    (package / "mind.py").write_text("def act(observation, info):\n    return 'look'\n")
    described = tmp_path / "house-1.2.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: house\nVersion: 1.2\n")
    (described / "entry_points.txt").write_text(
        "[pz_agents.agents]\nbutler = house_agents:act\nrandom = house_agents:act\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_an_installed_agent_s_code_and_version_are_in_the_id(installed):
    spec = CellSpec(algorithm="butler", env="pz/Countdown-v0")
    before = identity(spec)
    assert before["versions"]["house"] == "1.2"
    mind = installed / "house_agents" / "mind.py"
    mind.write_text(mind.read_text().replace("look", "wait"))
    changed = identity(spec)
    assert before["agent"] is not None
    assert changed["agent"] != before["agent"]
    described = installed / "house-1.2.dist-info"
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: house\nVersion: 1.3\n")
    assert identity(spec)["versions"]["house"] == "1.3"


def test_an_agent_of_ours_has_no_code_in_its_id_whoever_takes_its_name(installed):
    found = identity(CellSpec(**COUNTDOWN))
    assert found["agent"] is None
    assert "house" not in found["versions"]
