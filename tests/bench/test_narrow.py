"""Tables on narrow terminals."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from pz_bench import report, watch


@pytest.mark.parametrize("width", [120, 90, 60, 40])
def test_a_narrow_terminal_names_the_columns_it_hides(make_cell, width):
    made = [
        make_cell(name, f"pz/{game}-v0", [0.1, 0.2])
        for name in ("a.py:OneRatherLongName", "b.py:AnotherLongName", "random")
        for game in ("Zork1", "Zork2", "Zork3", "Detective", "Pentari")
    ]
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(report.render_terminal(report.build(made, "games")))
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= width
    table, mark, rest = text.partition("Hidden in ")
    assert bool(mark) == (width < 90)
    words = (table + rest).replace(",", " ").split()
    assert {"Detective", "Pentari", "Zork1", "Zork2", "Zork3"} <= set(words)
    assert re.search(r"15\.0 ± \d+\.\d\b", table)  # what is shown is shown whole


def test_a_narrow_watch_keeps_state_cell_and_progress():
    cell = watch.CellView(
        "id", "grpo on pz/Countdown-v0, seed 0", "running", "train", 3, 60, 75.0, 0.5, 0.5,
        {"loss": 0.1, "reward": 0.4},
    )  # fmt: skip

    def text(width):
        console = Console(width=width, file=io.StringIO(), record=True)
        console.print(watch.frame([cell], 5))
        return console.export_text()

    assert "Hidden" not in text(110)
    assert "Hidden in 60 columns: " in text(60)
    for width in (60, 50):
        assert "train 3/60" in text(width)
        assert "training" in text(width).partition("Hidden")[2]
