"""The leaderboard on a terminal: the headline table, the comparisons, and what was not run."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from pz_bench import scores
from pz_bench.report import tables
from pz_bench.report.leaderboard import Leaderboard
from pz_bench.report.tables import Cell, Header, Table

_WIDE = 6
_STYLES = {"label": "bold", "value": "", "unranked": "yellow", "missing": "dim", "text": ""}


def render_terminal(board: Leaderboard) -> RenderableType:
    """Return what a console prints of the leaderboard.

    With more environments than fit side by side the table is turned: a line an environment.
    """
    table = tables.headline(board)
    if len(board.environments) > _WIDE:
        table = _turned(table)
    parts: list[RenderableType] = [render_table(board.title, table)]
    for each in board.comparisons:
        short = next(place.short for place in board.environments if place.name == each.environment)
        excludes = each.low > 0 or each.high < 0
        parts.append(
            Text(
                f"{short}: {each.row} against {each.against} {tables.signed(each.difference)} "
                f"points [{tables.signed(each.low)} to {tables.signed(each.high)}], "
                f"p {'' if each.p < 0.001 else '= '}{tables.p_value(each.p)}",
                style="green" if excludes and each.difference > 0 else "",
            )
        )
    for head, table in (("Not run", tables.not_run(board)), ("Not ranked", tables.unranked(board))):
        for row in table.rows:
            place, label, reason, command = (cell.text for cell in row)
            tail = f"  →  {command}" if command else ""
            parts.append(Text(f"{head}: {place} ({label}): {reason}{tail}", style="yellow"))
    parts.append(Text(" ".join(_notes(board)), style="dim"))
    return Group(*parts)


def _notes(board: Leaderboard) -> list[str]:
    found = ["Percent ± the larger side of the 95 % interval."]
    return found + ([f"{scores.TINY_LABEL}."] if any(row.tiny for row in board.rows) else [])


def render_table(title: str, table: Table) -> RichTable:
    """Return a table as a console prints it."""
    shown = RichTable(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left")
    for column, header in enumerate(table.headers):
        numeric = any(row[column].kind in ("value", "unranked") for row in table.rows)
        shown.add_column(Text(header.text), justify="right" if numeric else "left")
    for row in table.rows:
        shown.add_row(*(_cell(cell) for cell in row))
    return shown


def _cell(cell: Cell) -> Text:
    return Text(cell.text, style="bold green" if cell.strong else _STYLES[cell.kind])


def _turned(table: Table) -> Table:
    """Return the headline with a line a column: rank and label become the heads."""
    labels = [row[1].text for row in table.rows]
    heads = (Header("Environment"), *(Header(label) for label in labels))
    lines = tuple(
        (Cell(table.headers[column].text, kind="label"), *(row[column] for row in table.rows))
        for column in range(2, len(table.headers))
    )
    return Table(heads, lines)
