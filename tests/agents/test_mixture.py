"""Data sets as environments: order, proportions, messages about what is wrong, whole runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

pytest.importorskip("trl", reason="needs pz-agents[train]")

from pz_agents.cli import app
from pz_agents.config import parse_settings
from pz_agents.rollout import ExperienceStore
from pz_agents.training.mixture import DATA_ENV, ORDERED, DataEnv, DataSource, Mixture, read_rows
from pz_agents.training.monitors import read_metrics
from pz_agents.training.run import TrainSettings, train
from pz_agents.training.settings import check_resumable, resolved
from pz_envs.checks import check_env
from pz_envs.errors import ConfigError, DataError

pytestmark = pytest.mark.timeout(280)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str]:
    """Thirty questions in a JSONL file and seventeen under other names in a Parquet file."""
    folder = tmp_path_factory.mktemp("data")
    lines, table = folder / "sums.jsonl", folder / "words.parquet"
    rows = [{"prompt": f"Add {n} and 1.", "sum": n + 1, "kind": "sum"} for n in range(30)]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {
        "question": [f"Say w{n}." for n in range(17)],
        "answer": [f"W{n}" for n in range(17)],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), table)
    return str(lines), str(table)


def sources(files, **changes: Any) -> list[DataSource]:
    return [
        DataSource(path=files[0], output="sum", weight=3, **changes),
        DataSource(path=files[1], input="question", output="answer", weight=1, **changes),
    ]


def places(mixture: Mixture, first: int, last: int) -> list[tuple[int, int]]:
    return [mixture.place(draw) for draw in range(first, last)]


# Order.


def test_ten_thousand_draws_have_the_proportions_of_the_weights(files):
    counts = Counter(source for source, _ in places(Mixture(sources(files), 0), 0, 10_000))
    assert abs(counts[0] / 10_000 - 0.75) < 0.01
    assert abs(counts[1] / 10_000 - 0.25) < 0.01


def test_every_row_comes_once_an_epoch_and_epochs_have_different_orders(files):
    drawn = places(Mixture(sources(files), 0), 0, 400)
    for source, size in ((0, 30), (1, 17)):
        rows = [row for each, row in drawn if each == source]
        epochs = [rows[start : start + size] for start in range(0, len(rows) - size, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_a_mixture_made_anew_goes_on_at_the_exact_next_row(files):
    straight = places(Mixture(sources(files), 0), 0, 3000)
    for cut in (1, 29, 777, 2048):
        assert places(Mixture(sources(files), 0), cut, 3000) == straight[cut:]
    assert places(Mixture(sources(files), 1), 0, 3000) != straight


def test_a_seed_of_no_draw_takes_some_row_and_always_the_same(files):
    mixture = Mixture(sources(files), 0)
    found = [mixture.find(seed) for seed in range(500)]
    assert found == [Mixture(sources(files), 0).find(seed) for seed in range(500)]
    assert 0.65 < sum(source == 0 for source, _ in found) / 500 < 0.85
    assert mixture.find(ORDERED + 7) == mixture.place(7)


# Reading.


def test_a_parquet_file_and_a_jsonl_file_give_the_same_kind_of_rows(files):
    first, second = (read_rows(source) for source in sources(files))
    assert first[2] == {"prompt": "Add 2 and 1.", "sum": 3, "kind": "sum"}
    assert second[16] == {"question": "Say w16.", "answer": "W16"}


def write(folder: Path, *lines: str) -> str:
    path = folder / "d.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


GOOD = '{"prompt": "a", "answer": "b"}'


def test_a_line_that_is_no_json_is_named_by_file_and_line(tmp_path):
    path = write(tmp_path, GOOD, "{oops", GOOD)
    with pytest.raises(DataError, match=r"d\.jsonl:2: not JSON"):
        read_rows(DataSource(path=path))
    assert len(read_rows(DataSource(path=path, skip=1))) == 2
    path = write(tmp_path, GOOD, "{oops", "[1]")
    with pytest.raises(DataError, match=r"d\.jsonl:2: .*d\.jsonl:3: an object is needed"):
        read_rows(DataSource(path=path, skip=1))


def test_a_missing_column_lists_those_that_are_there(tmp_path):
    path = write(tmp_path, GOOD)
    with pytest.raises(DataError, match=r"no column `promt`.*`prompt`\?.*Present: prompt, answer"):
        read_rows(DataSource(path=path, input="promt"))
    with pytest.raises(DataError, match=r"no column `target` \(its `output`\)"):
        read_rows(DataSource(path=path, output="target"))
    with pytest.raises(DataError, match=r"d\.jsonl:1: column `prompt` must hold text; got \['a'\]"):
        read_rows(DataSource(path=write(tmp_path, '{"prompt": ["a"]}')))


def test_files_that_are_not_there_or_hold_nothing_are_refused(tmp_path):
    with pytest.raises(DataError, match="no data set"):
        read_rows(DataSource(path=str(tmp_path / "none.jsonl")))
    with pytest.raises(DataError, match="has no rows"):
        read_rows(DataSource(path=write(tmp_path)))
    with pytest.raises(DataError, match="set its `type`"):
        read_rows(DataSource(path=str(tmp_path / "d.txt")))
    (tmp_path / "p.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="is no Parquet file"):
        read_rows(DataSource(path=str(tmp_path / "p.parquet")))


# As an environment.


@pytest.mark.parametrize(
    ("reply", "pays"), [("W3", 1.0), ("<answer> w3 </answer>", 1.0), ("w4", 0.0), ("<answer>", 0.0)]
)
def test_a_reply_equal_to_the_answer_pays_and_any_reply_ends_the_episode(files, reply, pays):
    env = DataEnv(Mixture(sources(files)[1:], 0))
    seed = next(ORDERED + n for n in range(17) if env._mixture.place(n)[1] == 3)
    observation, info = env.reset(seed=seed)
    assert (observation, info["task_id"]) == ("Say w3.", "words.parquet:4")
    _, reward, terminated, _, info = env.step(reply)
    assert (reward, terminated, info["success"]) == (pays, True, pays == 1)


def test_without_a_seed_the_next_row_comes(files):
    mixture = Mixture(sources(files), 0)
    env = DataEnv(mixture)
    assert [env.reset()[0] for _ in range(5)] == [
        mixture.question(ORDERED + draw)[0] for draw in range(5)
    ]


def test_it_behaves_as_every_environment_does(files):
    check_env(lambda: DataEnv(Mixture(sources(files), 0)))


# Runs.


@pytest.fixture(autouse=True, scope="module")
def _no_plots():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pz_agents.training.run.plot_metrics", lambda metrics, path: [])
        yield


def settings(model: Path, files, **changes: Any) -> TrainSettings:
    given = {
        "datasets": [source.model_dump() for source in sources(files)],
        "model": str(model),
        "steps": 4,
        "groups_per_step": 5,
        "group_size": 2,
        "learning_rate": 1e-3,
        "max_new_tokens": 4,
        "save_every": 2,
        **changes,
    }
    return TrainSettings(**given)


class StopHereError(Exception):
    pass


def stop_at_three(step, steps, metrics):
    if step == 3:
        raise StopHereError


def rows_played(folder: Path) -> list[tuple[str, str]]:
    with ExperienceStore(folder / "experience.db") as store:
        return sorted((item.key, item.task_id) for item in store.trajectories())


def test_a_run_over_two_files_resumes_at_the_exact_next_row(micro, files, tmp_path):
    # Five draws a step, of 47 rows.
    given = {"algorithm": "ppo", "options": {"critic_update_steps": 1}}
    chosen = settings(micro, files, **given, steps=None, epochs=0.4)
    assert chosen.steps == 4
    train(chosen, tmp_path / "straight")
    with pytest.raises(StopHereError):
        train(chosen, tmp_path / "cut", on_progress=stop_at_three)
    train(chosen, tmp_path / "cut")
    played = rows_played(tmp_path / "straight")
    assert rows_played(tmp_path / "cut") == played
    for file in ("metrics.jsonl", "policy/model.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "straight" / file).read_bytes()
    mixture = Mixture(sources(files), 0)
    names = [mixture.question(ORDERED + draw)[2] for draw in range(20)]
    assert [task for _, task in played] == [name for name in names for _ in range(2)]


def test_epochs_stand_for_steps_and_more_of_them_are_more_steps(micro, files):
    given = {"datasets": [source.model_dump() for source in sources(files)[1:]]}  # 17 rows
    given |= {"steps": None, "groups_per_step": 10}
    two = settings(micro, files, **given, epochs=2)
    assert (two.steps, "epochs" in two.model_dump()) == (4, False)
    assert settings(micro, files, **given, epochs=0.01).steps == 1
    more = settings(micro, files, **given, epochs=2.5)
    check_resumable(resolved(two), more, "here")
    with pytest.raises(ConfigError, match="`steps` was 5"):
        check_resumable(resolved(more), two, "here")


def test_epochs_need_data_and_no_steps(micro, files):
    with pytest.raises(ConfigError, match="`epochs` is 2 and `steps` 4"):
        settings(micro, files, epochs=2)
    with pytest.raises(ConfigError, match="there are no `datasets`"):
        TrainSettings(env="pz/Countdown-v0", epochs=2)
    with pytest.raises(ConfigError, match="greater than 0"):
        parse_settings(TrainSettings, {"datasets": [{"path": files[1]}], "epochs": 0}, "here")


def kinds_and_lengths(prompts, completions, **columns):
    """A reward that sees the row: pays what the data say, or has no answer."""
    assert all(prompt.startswith(("Add", "Say")) for prompt in prompts)
    assert len(columns["sum"]) == len(columns["kind"]) == len(completions)
    return [0.5 if kind == "sum" else None for kind in columns["kind"]]


def test_grpo_trains_on_data_too_and_a_reward_function_sees_the_rows_columns(
    micro, files, tmp_path
):
    held_out = [{**source.model_dump(), "split": "eval"} for source in sources(files)]
    chosen = settings(micro, files, steps=1, algorithm="grpo")
    chosen = settings(
        micro,
        files,
        steps=1,
        algorithm="grpo",
        eval_episodes=8,
        datasets=[*chosen.model_dump()["datasets"], *held_out],
        reward_function=f"{__file__}:kinds_and_lengths",
    )
    train(chosen, tmp_path)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["failed"] == 2 * 1  # one of five rows is a word, tried twice
    assert line["reward"] == pytest.approx(0.5 * 8 / 10)
    assert line["eval_reward"] == pytest.approx(0.5 * 6 / 8)


def test_the_command_line_takes_files(files, capsys):
    # What typer does between a script's arguments and the command, and nothing more.
    arguments = ["train", "--data", files[0], "--data", files[1], "--steps", "1", "--print-config"]
    with pytest.raises(ConfigError, match="nothing pays"):
        app(arguments, standalone_mode=False)
    paid = ["--set", f"reward_function={__file__}:kinds_and_lengths"]
    app([*arguments, *paid], standalone_mode=False)
    values = json.loads(capsys.readouterr().out)
    assert [source["path"] for source in values["datasets"]] == list(files)
    assert (values["env"], values["max_turns"]) == (DATA_ENV, 1)
    # A preset's steps give way to epochs; those of the command line do not.
    arguments = [*arguments[:3], "--epochs", "2", "--preset", "quick", "--print-config", *paid]
    app(arguments, standalone_mode=False)
    values = json.loads(capsys.readouterr().out)
    assert (values["steps"], values["groups_per_step"]) == (4, 16)  # 30 rows
    with pytest.raises(ConfigError, match="leave one of them out"):
        app([*arguments, "--steps", "3"], standalone_mode=False)


def test_data_and_an_environment_are_one_too_many_and_evaluation_needs_a_split(
    micro, files, tmp_path
):
    with pytest.raises(ConfigError, match="there are `datasets` too"):
        settings(micro, files, env="pz/Countdown-v0")
    with pytest.raises(ConfigError, match="`split: eval`"):
        train(settings(micro, files, steps=1, eval_episodes=2), tmp_path)
