"""The leaderboard as one HTML file that needs nothing else: style, script and plots are inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from pz_bench.report import plots, side_tables, tables, wording
from pz_bench.report.leaderboard import Leaderboard


def render(board: Leaderboard) -> str:
    """Return the page; it makes no request, follows the system's colours and fits a phone."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.get_template("leaderboard.html.j2")
    return template.render(
        board=board,
        headline=tables.headline(board),
        notes=wording.notes(board),
        macro=plots.score_panel(board, None),
        aggregates=tables.aggregates(board),
        samples=side_tables.samples(board),
        families=side_tables.families(board),
        family_panels=plots.family_panels(board),
        profile=plots.profile_panel(board),
        training=plots.training_panels(board),
        retries=tables.retries(board),
        comparisons=tables.comparisons(board),
        not_run=tables.not_run(board),
        unranked=tables.unranked(board),
        sections=[_section(board, place) for place in range(len(board.environments))],
        definitions=wording.definitions(board),
        sources=side_tables.published_sources(board),
        settings=tables.settings(board),
    )


def _section(board: Leaderboard, place: int) -> dict[str, Any]:
    environment = board.environments[place]
    found = (plots.score_panel(board, environment), plots.cost_panel(board, environment))
    return {
        "name": environment.name,
        "link": wording.link(environment),
        "family": environment.family_title,
        "table": tables.details(board, environment),
        "published": side_tables.published(board, environment),
        "panels": [panel for panel in found if panel is not None],
    }
