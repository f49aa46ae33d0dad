"""The viewer: which episodes a reference names, what is shown of them, and a page that is safe."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from pz_agents.sdk.types import Sample, Step, Trajectory
from pz_bench import cell as cells
from pz_bench import store, view
from pz_bench.cli import main
from pz_envs.errors import ConfigError

COMMANDS = ("down", "up", "wait", "north", "south", "east", "west", "look")
NASTY = "look </script><script>alert(1)</script> & \u2028"


def trajectory(number, *, success, action=NASTY, notes=None, commands=None):
    sample = Sample(
        prompt_ids=np.array([1, 2], np.int32),
        token_ids=np.array([104, 105], np.int32),
        log_probs=np.array([-0.5, -np.inf], np.float32),
    )
    step = Step("A room.", action, 1.0, 1.0, True, False, sample, notes or {}, commands)
    return Trajectory(
        key=str(number),
        env_id="pz/Countdown-v0",
        env_seed=number,
        task_id=f"task/{number}",
        group_id="",
        attempt=0,
        steps=(step,),
        final_observation="The end.",
        reward=1.0,
        score=1.0,
        max_score=1.0,
        score_norm=1.0,
        success=success,
        terminated=True,
        truncated="",
    )


@pytest.fixture
def runs(tmp_path):
    spec = cells.CellSpec(algorithm="random", env="pz/Countdown-v0", episodes=2)
    folder = store.create_cell(tmp_path, spec, cells.identity(spec))
    log = store.EpisodeLog(folder)
    thought = "<think>up is best</think><action>up</action>"
    visits = {"visits": {"down": 2, "up": 6, "wait": 0}, "prior": {"up": 0.25, "down": 0.5}}
    first = trajectory(0, success=True, action=thought, notes=visits, commands=COMMANDS)
    log.append(cells.record(0, first, lambda ids: chr(int(ids[0]))))
    log.append(cells.record(1, trajectory(1, success=False)))
    log.close()
    store.finish_cell(folder, "done")
    return tmp_path


def text_of(renderable):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def identifier(runs):
    return store.cell_folders(runs)[0].name


def test_the_first_letters_of_a_cell_are_enough(runs):
    assert len(view.find(runs, identifier(runs)[:5]).episodes) == 2
    shown = view.find(runs, f"{identifier(runs)[:5]}:1")
    assert [episode.episode for episode in shown.episodes] == [1]


def test_what_succeeded_can_be_left_out(runs):
    shown = view.find(runs, identifier(runs), failed_only=True)
    assert [episode.episode for episode in shown.episodes] == [1]


@pytest.mark.parametrize(
    ("reference", "message"),
    [("zz", "no cell"), ("", "no cell"), ("{id}:7", "episodes 0 to 1")],
)
def test_a_wrong_reference_is_explained(runs, reference, message):
    with pytest.raises(ConfigError, match=message):
        view.find(runs, reference.format(id=identifier(runs)))


def test_a_turn_shows_reasoning_action_tokens_and_visits(runs):
    text = text_of(view.turn_by_turn(view.find(runs, f"{identifier(runs)}:0")))
    for part in (
        "A room.",
        "thinks: up is best",
        "> up   reward +1, score 1, 2 tokens",
        "hi",
        "The end.",
    ):
        assert part in text
    chosen, other = (line for line in text.splitlines() if "prior" in line)
    assert re.fullmatch(r"  ▸ up   (█+) 6 prior 0.25 *", chosen)
    assert re.fullmatch(r"    down █+ +2 prior 0.50 *", other)
    assert chosen.count("█") == 3 * other.count("█")


def test_commands_are_folded_until_they_are_asked_for(runs):
    shown = view.find(runs, f"{identifier(runs)}:0")
    folded, full = text_of(view.turn_by_turn(shown)), text_of(view.turn_by_turn(shown, full=True))
    assert "8 commands: down · up · wait · north · south · east … and 2 more" in folded
    assert "8 commands: down · up · wait · north · south · east · west · look" in full
    assert "commands:" not in text_of(view.turn_by_turn(view.find(runs, f"{identifier(runs)}:1")))


def test_json_has_every_turn_with_its_commands_in_full(runs):
    episodes = json.loads(view.to_json(view.find(runs, identifier(runs))))["episodes"]
    lists = [step["admissible_commands"] for each in episodes for step in each["steps"]]
    assert lists == [list(COMMANDS), None]


def test_tokens_are_kept_with_their_log_probs_and_minus_infinity_is_unknown(runs):
    step = store.read_episodes(store.cell_folders(runs)[0])[0].steps[0]
    assert step["pieces"] == ["h", "i"]
    assert step["log_probs"] == [-0.5, None]


def test_the_page_holds_every_episode_and_no_text_can_become_markup(runs):
    page = view.to_html([view.find(runs, identifier(runs))])
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    found = json.loads(data[1])
    assert [episode["outcome"] for episode in found[0]["episodes"]] == ["success", "no success"]
    assert found[0]["episodes"][1]["steps"][0]["action"] == NASTY
    assert "alert(1)</script>" not in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)


def test_the_command_shows_lists_compares_and_writes(runs, tmp_path, capsys):
    cell = identifier(runs)
    there = ["--runs", str(runs)]
    assert main(["view", cell, *there]) == 0
    assert "task/1" in capsys.readouterr().out
    assert main(["view", f"{cell}:0", *there, "--full"]) == 0
    assert "look" in capsys.readouterr().out
    assert main(["view", f"{cell}:0", f"{cell}:1", *there]) == 0
    assert capsys.readouterr().out.count("The end.") == 2
    assert main(["view", cell, "--json", *there]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == cell
    assert main(["view", cell, "--html", str(tmp_path / "page.html"), *there]) == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
