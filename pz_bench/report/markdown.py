"""The leaderboard as GitHub-flavoured Markdown, from the same tables as every other form."""

from __future__ import annotations

from collections.abc import Sequence

from pz_bench.report import side_tables, tables, wording
from pz_bench.report.leaderboard import Leaderboard
from pz_bench.report.tables import Cell, Header, Table

_ALT = {
    "scores": "Scores with intervals",
    "cost": "Score by sampled tokens",
    "profiles": "Performance profiles",
    "training": "Learning curves by steps, tokens and hours",
}


def render(board: Leaderboard, plots: Sequence[str] = ()) -> str:
    """Return the whole page.

    Args:
        board: what to show.
        plots: file names of plots beside the page, in order.
    """
    parts = [f"# {_escape(board.title)}", _table(tables.headline(board))]
    parts.append("\n".join(f"- {_escape(note)}" for note in wording.notes(board)))
    parts += [f"![{_alt(name)}]({name})" for name in plots]
    over_all = tables.aggregates(board)
    if over_all.rows:
        parts += ["## Over the whole suite", _table(over_all)]
    retries = tables.retries(board)
    if retries.rows:
        parts += ["## Success, steps, attempts, improvement", _table(retries)]
    by_family = side_tables.families(board)
    if by_family.rows:
        parts += ["## By family", _table(by_family)]
    samples = side_tables.samples(board)
    if samples.rows:
        parts += ["## Mathematics by samples", _table(samples)]
    if board.comparisons:
        parts += ["## Comparisons", _table(tables.comparisons(board))]
    for heading, table in (
        ("## Not run", tables.not_run(board)),
        ("## Not ranked", tables.unranked(board)),
    ):
        if table.rows:
            parts += [heading, _table(table, code=(3,))]
    parts.append("## Environments")
    for environment in board.environments:
        parts += [f"### {_escape(environment.name)}", _table(tables.details(board, environment))]
        published = side_tables.published(board, environment)
        if published.rows:
            parts += ["Published, not ranked:", _table(published)]
    parts.append("## Definitions")
    parts += [
        f'<a id="{link}"></a>**{_escape(title)}.** {_escape(text)}'
        for link, title, text in wording.definitions(board)
    ]
    sources = side_tables.published_sources(board)
    if sources:
        parts.append('<a id="published"></a>**Published figures.** Conditions differ from ours.')
        parts.append("\n".join(f"- {_escape(line)}" for line in sources))
    parts += ["## Settings", _table(tables.settings(board))]
    parts += [
        f"- {_escape(row.label)}: {_escape(row.settings)}" for row in board.rows if row.settings
    ]
    if board.left_out:
        parts += ["## Left out", "\n".join(f"- {_escape(line)}" for line in board.left_out)]
    if board.versions:
        versions = (f"{name} {', '.join(found)}" for name, found in board.versions.items())
        parts += ["## Versions", _escape("; ".join(versions)) + "."]
    return "\n\n".join(parts) + "\n"


def _table(table: Table, code: Sequence[int] = ()) -> str:
    """Return a pipe table; columns in ``code`` are set as code."""
    align = [_alignment(table, column) for column in range(len(table.headers))]
    lines = [
        _line([_head(header) for header in table.headers]),
        _line(align),
        *(
            _line([_cell(cell, column in code) for column, cell in enumerate(row)])
            for row in table.rows
        ),
    ]
    return "\n".join(lines)


def _alignment(table: Table, column: int) -> str:
    numeric = any(row[column].kind in ("value", "unranked") for row in table.rows)
    return "---:" if numeric else "---"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(header: Header) -> str:
    text = _escape(header.text)
    return f"[{text}](#{header.link})" if header.link else text


def _cell(cell: Cell, code: bool) -> str:
    if code and cell.text:
        return f"`{cell.text.replace('`', '').replace('|', chr(92) + '|')}`"
    text = _escape(cell.text)
    return f"**{text}**" if cell.strong else text


def _escape(text: str) -> str:
    """Return ``text`` as itself inside a table or a line, one line long."""
    flat = " ".join(text.split())
    for sign in "\\|<*_`[]":
        flat = flat.replace(sign, f"\\{sign}")
    return flat


def _alt(name: str) -> str:
    return next(text for ending, text in _ALT.items() if name.endswith(f"-{ending}.svg"))
