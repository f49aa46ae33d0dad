"""The leaderboard and the episode viewer in a real browser, headless, without a network.

The test adds one script to a copy of a page, which clicks as a person would and writes into the
title what it saw, among it every address that the page asked for.
"""

from __future__ import annotations

import html as html_text
import json
import re
import shutil
import subprocess

import pytest

from pz_bench import report, view
from pz_bench.report import html
from pz_bench.store import CellFile

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
COUNTDOWN, DETECTIVE = "pz/Countdown-v0", "pz/Detective-v0"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]


def browse(folder, page, script="", *options):
    """Open ``page`` in a fresh browser that reaches nothing; returns the document afterwards."""
    path = folder / "page.html"
    head, end = page.rsplit("</body>", 1)
    path.write_text(f"{head}<script>{{{script}}}</script></body>{end}", "utf-8")
    words = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    words += ["--disable-dev-shm-usage", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND"]
    words += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000"]
    words += [*options, "--dump-dom", path.as_uri()]
    done = subprocess.run(words, capture_output=True, timeout=180, check=True)
    return done.stdout.decode("utf-8")


def noted(document):
    """Return what the script wrote into the title."""
    return json.loads(html_text.unescape(re.search(r"<title>(.*?)</title>", document)[1]))


@pytest.fixture
def board(make_cell):
    values = {"one.py:One": 0.5, "two.py:Two": 0.9, "three.py:Three": 0.1, "random": 0.0}
    return report.build(
        [
            make_cell(name, env, [value, value / 2], seed=seed, most=10)
            for name, value in values.items()
            for env in (COUNTDOWN, DETECTIVE)
            for seed in (0, 1)
        ],
        "small",
        "A small suite",
    )


@pytest.fixture
def episodes(make_cell):
    def step(text, command, commands):
        return {
            "admissible_commands": commands,
            "observation": f"You see {text}.",
            "action": f"<think>because of {text}</think><action>{command}</action>",
            "reward": 1.0,
            "score": 1.0,
            "valid": True,
            "format_error": False,
            "tokens": 2,
            "pieces": ["take", " it"],
            "log_probs": [-0.1, -3.0],
            "notes": {"visits": {"look": 2, "take it": 8}, "prior": {"take it": 0.25, "look": 0.5}},
        }

    def shown(name, outcome, text):
        cell = make_cell(name, DETECTIVE, [outcome])
        episode = cell.episodes[0]
        first = step(text, "take it", ["look", "take it", "wait"])
        second = step(f"{text} again", "dance", [[0, 2], "drop it"])
        object.__setattr__(episode, "steps", (first, second))
        return view.Shown(CellFile(f"{name}-id", cell.spec, {}), (episode,))

    return [shown("expert", 1.0, "a lamp"), shown("random", 0.0, "a sword")]


def test_a_click_on_a_head_sorts_the_table_and_nothing_leaves_the_machine(tmp_path, board):
    script = """
    const table = document.querySelector("table");
    const labels = () => [...table.tBodies[0].rows].map(row => row.cells[1].textContent.trim());
    const seen = [labels()];
    for (const click of [4, 4]) {
      table.tHead.rows[0].cells[click].querySelector("button").click();
      seen.push(labels());
    }
    seen.push(performance.getEntriesByType("resource").map(entry => entry.name));
    document.title = JSON.stringify(seen);
    """
    _, first, second, asked = noted(browse(tmp_path, html.render(board), script))
    assert asked == []
    values = {row.label: row.score(board.environments[1].name).value for row in board.rows}
    assert len(set(values.values())) == 4
    assert [values[label] for label in first] == sorted(values.values(), reverse=True)
    assert [values[label] for label in second] == sorted(values.values())


def test_an_episode_opens_a_second_one_beside_it_and_a_filter_hides(tmp_path, episodes):
    script = """
    const buttons = () => [...document.querySelectorAll("#list button")];
    const text = () => document.getElementById("panes").innerText;
    const seen = [document.querySelectorAll("#panes > section").length];
    buttons()[1].click();
    seen.push(text());
    buttons()[0].dispatchEvent(new MouseEvent("click", {bubbles: true, shiftKey: true}));
    seen.push(document.querySelectorAll("#panes > section").length, text());
    const filter = document.getElementById("filter");
    filter.value = "no success";
    filter.dispatchEvent(new Event("change"));
    seen.push(buttons().map(button => button.dataset.episode));
    document.querySelector("#panes .reasoning").open = true;
    seen.push(text());
    seen.push(performance.getEntriesByType("resource").map(entry => entry.name));
    document.title = JSON.stringify(seen);
    """
    at_first, alone, panes, both, left, opened, asked = noted(
        browse(tmp_path, view.to_html(episodes), script)
    )
    assert asked == []
    assert at_first == 2, "a page made of two episodes shows both"
    assert "a sword" in alone
    assert "a lamp" not in alone
    assert panes == 2
    assert "a lamp" in both
    assert "because of" not in both
    assert left == ["random-id:0"]
    assert "because of" in opened


def test_commands_unfold_and_visits_are_bars_with_the_chosen_one_marked(tmp_path, episodes):
    script = """
    const turns = [...document.querySelectorAll("#panes .turn")];
    const texts = (turn, what) => [...turn.querySelectorAll(what)].map((one) => one.textContent);
    const seen = [turns[0].innerText];
    turns[0].querySelector("details").open = true;
    seen.push(turns[0].innerText);
    for (const turn of turns.slice(0, 2)) {
      seen.push(texts(turn, "summary")[0], texts(turn, ".commands span"));
      seen.push(texts(turn, ".commands .chosen"));
    }
    seen.push(texts(turns[0], ".visits span"), texts(turns[0], ".visits .chosen"));
    const bars = [...turns[0].querySelectorAll(".bar")];
    seen.push(bars.map((bar) => bar.getBoundingClientRect().width));
    document.title = JSON.stringify(seen);
    """
    folded, unfolded, *rest = noted(browse(tmp_path, view.to_html(episodes), script))
    assert "wait" not in folded
    assert "wait" in unfolded
    assert rest[:3] == ["3 admissible commands", ["look", "take it", "wait"], ["take it"]]
    outside = "3 admissible commands, the action is not among them"
    assert rest[3:6] == [outside, ["look", "take it", "drop it"], []]
    assert rest[6] == ["take it", "8", "prior 0.25", "look", "2", "prior 0.50"]
    assert rest[7] == ["take it"]
    assert rest[8][0] == pytest.approx(4 * rest[8][1], rel=0.01)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1200])
def test_pages_fit_a_phone_and_a_desk_in_light_and_dark(tmp_path, board, episodes, width, dark):
    script = """
    const frame = document.querySelector("iframe");
    const look = () => {
      const page = frame.contentDocument, inside = frame.contentWindow;
      document.title = JSON.stringify([page.documentElement.scrollWidth, inside.innerWidth,
        inside.matchMedia("(prefers-color-scheme: dark)").matches,
        inside.getComputedStyle(page.body).backgroundColor]);
    };
    if (frame.contentDocument.readyState === "complete") look();
    frame.addEventListener("load", look);
    """
    style = f"width:{width}px;height:800px;border:0"
    for page in (html.render(board), view.to_html(episodes)):
        inner = html_text.escape(page)
        shell = f'<title>[]</title><body><iframe srcdoc="{inner}" style="{style}"></iframe></body>'
        mode = ["--blink-settings=preferredColorScheme=0"] if dark else []
        document = browse(tmp_path, f"<!doctype html>{shell}", script, *mode)
        wide, inside, is_dark, colour = noted(document)
        assert inside == width
        assert wide <= width
        assert is_dark is dark
        red = int(re.findall(r"\d+", colour)[0])
        assert (red < 60) is dark
