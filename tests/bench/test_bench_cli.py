import json
import signal
import subprocess
import sys
import time

import pytest

from pz_bench import cli, store
from pz_bench.cli import main, name_the_matrix

AGENT = """
import time

class MyAgent:
    def __init__(self, seconds=0.0):
        self.seconds = seconds

    def act(self, turns):
        time.sleep(self.seconds)
        return ["<answer>1</answer>" for _ in turns]

def broken(observation, info):
    raise ValueError("no idea")
"""

MATRIX = """
name: small
title: Small
seeds: [0, 1]
rows:
  - {algorithms: [random, expert], environments: [pz/Countdown-v0], episodes: 6}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "my_agent.py").write_text(AGENT)
    (tmp_path / "m.yaml").write_text(MATRIX)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["run", "--matrix"], ["run", "--matrix", "starter"]),
        (["run", "--matrix", "starter"], ["run", "--matrix", "starter"]),
        (["run", "--matrix", "./m.yaml", "-j", "2"], ["run", "--matrix", "./m.yaml", "-j", "2"]),
        (["run", "--matrix", "-j", "2"], ["run", "--matrix", "starter", "-j", "2"]),
        (["run", "-m", "--dry-run"], ["run", "-m", "starter", "--dry-run"]),
        (["run", "--matrix=core"], ["run", "--matrix=core"]),
        (["run", "-a", "random"], ["run", "-a", "random"]),
    ],
)
def test_matrix_alone_means_the_starter(words, named):
    assert name_the_matrix(words) == named


def test_a_matrix_is_measured_written_and_then_there_is_nothing_to_do(here, capsys):
    assert main(["run", "--matrix", "./m.yaml", "-j", "2"]) == 0
    printed = capsys.readouterr().out
    assert "4 done" in printed
    assert "expert" in printed
    for kind in ("md", "csv", "json", "html"):
        assert (here / "leaderboards" / f"small.{kind}").is_file()
    assert main(["run", "--matrix", "./m.yaml"]) == 0
    assert "nothing to do: 4 of 4 cells are done" in capsys.readouterr().out
    assert main(["run", "--matrix", "./m.yaml", "--json", "--set", "seeds=[0,1,2]"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [cell["state"] for cell in found["cells"]] == ["done"] * 6
    assert (found["suite"], found["problems"]) == ("small", [])
    assert "leaderboards/small.md" in found["written"]
    assert main(["report", "--check"]) == 0
    assert main(["status"]) == 0
    assert "small: 6 cells: 6 done" in capsys.readouterr().out


def test_an_agent_in_a_file_gets_its_row_beside_the_others(here, capsys):
    base = ["-e", "pz/Countdown-v0", "-n", "3"]
    assert main(["run", "-a", "random", *base]) == 0
    assert main(["run", "-a", "./my_agent.py:MyAgent", *base]) == 0
    printed = capsys.readouterr().out
    last = printed[printed.rindex("By hand") :]
    assert "my_agent.py:MyAgent" in last
    assert "random" in last
    assert str(here) not in (here / "leaderboards" / "adhoc.json").read_text()


def test_a_changed_digit_fails_the_check_and_names_the_file(here, capsys):
    assert main(["run", "-a", "expert", "-e", "pz/Countdown-v0", "-n", "3"]) == 0
    (episodes,) = (here / "runs").glob("*/episodes.jsonl")
    episodes.write_text(episodes.read_text().replace('"score":1.0', '"score":0.0', 1))
    capsys.readouterr()
    assert main(["report", "--check"]) == 1
    assert str(episodes.relative_to(here)) in capsys.readouterr().err
    assert main(["report"]) == 1


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_a_changed_or_missing_table_fails_the_check_and_is_named(here, capsys, damage):
    assert main(["run", "-a", "expert", "-e", "pz/Countdown-v0", "-n", "3"]) == 0
    table = here / "leaderboards" / "adhoc.md"
    if damage == "change":
        table.write_text(table.read_text() + "x")
    else:
        table.unlink()
    assert main(["report", "--check"]) == 1
    assert "leaderboards/adhoc.md" in capsys.readouterr().err
    assert main(["report"]) == 0
    assert main(["report", "--check"]) == 0


def test_a_limit_leaves_the_rest_owed(here, capsys):
    assert main(["run", "--matrix", "m.yaml", "--limit", "1"]) == 3
    capsys.readouterr()
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"small": {"done": 1, "owed": 3}}
    assert main(["run", "--matrix", "m.yaml"]) == 0


def test_a_fresh_cell_keeps_its_result_until_it_is_measured_again(here, capsys):
    """A budget, a limit or missing data may keep it from being started."""
    assert main(["run", "--matrix", "m.yaml"]) == 0
    first, *others = store.cell_folders(here / "runs")
    files = {folder: (folder / store.CELL).stat().st_mtime_ns for folder in (first, *others)}

    def unchanged():
        return [folder for folder in files if measured(folder) == files[folder]]

    def measured(folder):
        return (folder / store.CELL).stat().st_mtime_ns

    capsys.readouterr()
    assert main(["run", "--matrix", "m.yaml", "--fresh", "all", "--limit", "1", "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert "4 of 4 cells are owed" in dry
    assert "now: 1 of them (--limit 1): " in dry
    assert len(unchanged()) == 4
    small = ["run", "--matrix", "m.yaml", "--fresh", "all", "--set", "limits.steps=1"]
    assert main(small) == cli.INCOMPLETE
    assert len(unchanged()) == 4
    assert main(["run", "--matrix", "m.yaml", "--fresh", "all", "--limit", "1"]) == cli.INCOMPLETE
    assert len(unchanged()) == 3
    assert store.verify(here / "runs") == []
    assert main(["run", "--matrix", "m.yaml"]) == 0


def test_a_fresh_cell_that_cannot_be_run_here_is_refused_and_kept(here, capsys, monkeypatch):
    (here / "empty").mkdir()
    game = ["run", "-a", "random", "-e", "pz/Detective-v0", "-n", "1", "--set", "max_turns=2"]
    assert main(game) == 0
    (folder,) = store.cell_folders(here / "runs")
    monkeypatch.setenv("PZ_DATA", str(here / "empty"))
    capsys.readouterr()
    assert main([*game, "--fresh", folder.name]) == 2
    said = capsys.readouterr().err
    assert f"--fresh {folder.name}: it cannot be run here." in said
    assert "pz-envs data get jericho/detective.z5" in said
    assert store.read_cell(folder).status == "done"


def test_an_empty_store_names_the_next_command(here, capsys):
    for words in (["watch", "--once"], ["ls"], ["status"]):
        assert main(words) == 0
        assert "pz-bench run --matrix starts" in capsys.readouterr().out


def test_one_suite_s_status_can_be_asked_for(here, capsys):
    assert main(["run", "--matrix", "m.yaml", "--limit", "1"]) == cli.INCOMPLETE
    capsys.readouterr()
    assert main(["status", "--suite", "small"]) == 0
    assert capsys.readouterr().out == "small: 4 cells: 1 done, 3 owed\n"
    assert main(["status", "--suite", "smal"]) == 2
    assert "small" in capsys.readouterr().err


def test_a_wrong_part_of_a_list_is_one_error(here, capsys):
    assert main(["run", "--matrix", "m.yaml", "--set", "seeds=[x]"]) == 2
    said = capsys.readouterr().err
    assert "seeds.0" in said
    assert "at least 1 item" not in said
    assert main(["run", "--matrix", "m.yaml", "--set", "seeds=[]"]) == 2
    assert "at least 1 item" in capsys.readouterr().err


def test_failed_cells_make_the_exit_code_one(here, capsys):
    words = ["run", "-a", "my_agent.py:broken", "-e", "pz/Countdown-v0", "-n", "2"]
    assert main(words) == 1
    assert "no idea" in capsys.readouterr().err
    assert main(words) == 1
    assert "--retry-failed" in capsys.readouterr().err
    (here / "my_agent.py").write_text(AGENT.replace('raise ValueError("no idea")', "return '1'"))
    assert main(words) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "say what to run"),
        (["run", "--matrix", "nope"], "No matrix `nope`"),
        (["run", "--matrix", "m.yaml", "-a", "random"], "not both"),
        (["run", "-a", "randm", "-e", "pz/Countdown-v0"], "Did you mean `random`"),
        (["run", "-a", "random", "-e", "pz/Countdwn-v0"], "Did you mean `pz/Countdown-v0`"),
        (["run", "-a", "nofile.py:X", "-e", "pz/Countdown-v0"], "nofile.py"),
        (["run", "-a", "my_agent.py:X", "-e", "pz/Countdown-v0"], "MyAgent"),
        (["run", "--matrix", "m.yaml", "--set", "episods=2"], "Did you mean `episodes`"),
        (["run", "--matrx"], "--matrx"),
        (["run", "-a", "random", "-e", "pz/Countdown-v0", "-n", "0"], "-n"),
        (["report"], "no suite yet"),
        (["nothing"], "nothing"),
    ],
)
def test_wrong_usage_is_explained(here, capsys, words, message):
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_a_dry_run_and_a_plan_say_the_same_and_leave_no_trace(here, capsys):
    assert main(["run", "--matrix", "m.yaml", "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert main(["plan", "--matrix", "m.yaml"]) == 0
    assert capsys.readouterr().out == dry
    assert "4 of 4 cells are owed" in dry
    assert not (here / "runs").exists()


def test_what_is_stored_is_listed(here, capsys):
    assert main(["ls"]) == 0
    assert "no cell yet" in capsys.readouterr().out
    assert main(["run", "-a", "random", "-e", "pz/Countdown-v0", "-n", "2"]) == 0
    capsys.readouterr()
    assert main(["ls", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["status"], entry["episodes"], entry["of"]) == ("done", 2, 2)


def test_a_game_without_its_story_is_listed_as_not_run_beside_the_rest(here, capsys, monkeypatch):
    (here / "empty").mkdir()
    monkeypatch.setenv("PZ_DATA", str(here / "empty"))
    monkeypatch.setenv("PZ_CACHE", str(here / "cache"))
    both = ["run", "-a", "random", "-n", "2", "-e", "pz/Countdown-v0", "-e", "pz/Detective-v0"]
    assert main(both) == 0
    printed = capsys.readouterr()
    assert "not run" in printed.out
    assert "pz-envs data get jericho/detective.z5" in printed.err
    only = ["run", "-a", "random", "-n", "2", "-e", "pz/Detective-v0", "--suite", "alone"]
    assert main(only) == 3
    (result,) = store.load_suite(here / "runs", "alone")
    assert (result.status, result.episodes) == ("not_run", ())
    assert main(["report", "--check"]) == 0


def test_interrupting_ends_with_130_and_the_same_command_goes_on(here, capsys):
    words = ["run", "-a", "my_agent.py:MyAgent", "-e", "pz/Countdown-v0", "-n", "40"]
    words += ["--set", "agent_kwargs.seconds=0.3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pz_bench.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    give_up = time.monotonic() + 30
    while not any(path.stat().st_size for path in (here / "runs").glob("*/episodes.jsonl")):
        assert time.monotonic() < give_up
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == cli.INTERRUPTED
    assert "the same command goes on from here" in error
    (result,) = store.load(here / "runs")
    assert 0 < len(result.episodes) < 40
    assert main(words) == 0
    (result,) = store.load(here / "runs")
    assert len(result.episodes) == 40


def test_doctor_looks_at_packages_space_and_data(here, capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "pz-bench 0.1.0" in printed
    assert "Countdown number puzzles: 1 of 1 playable" in printed


def test_help_imports_neither_the_matrix_nor_torch():
    code = (
        "import sys\n"
        "from pz_bench.cli import main\n"
        "main(['--help'])\n"
        "heavy = {'torch', 'transformers', 'gymnasium', 'matplotlib', 'scipy', 'pydantic'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
