"""The leaderboard on a terminal: the headline table, the comparisons, and what was not run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from pz_bench import scores
from pz_bench.narrow import Fitted
from pz_bench.report import numbers, tables
from pz_bench.report.leaderboard import Leaderboard
from pz_bench.report.tables import Cell, Header, Table

_WIDE = 6
_STYLES = {"label": "bold", "value": "", "unranked": "yellow", "missing": "dim", "text": ""}


def render_terminal(board: Leaderboard) -> RenderableType:
    """Return what a console prints of the leaderboard.

    With more environments than fit side by side the table is turned: a line an environment. Columns
    that do not fit either way are left out from the right, and named.
    """
    parts: list[RenderableType] = [_Headline(board)]
    for each in board.comparisons:
        short = next(place.short for place in board.environments if place.name == each.environment)
        parts.append(
            Text(
                f"{short}: {each.row} against {each.against} {numbers.signed(each.difference)} "
                f"points [{numbers.span(each.low, each.high)}], "
                f"p {'' if each.p < 0.001 else '= '}{numbers.p_value(each.p)}, "
                f"Holm {numbers.p_value(each.p_holm)}",
                style="green" if each.stands_out and each.difference > 0 else "",
            )
        )
    for head, table in (("Not run", tables.not_run(board)), ("Not ranked", tables.unranked(board))):
        for row in table.rows:
            place, label, reason, command = (cell.text for cell in row)
            tail = f"  →  {command}" if command else ""
            parts.append(Text(f"{head}: {place} ({label}): {reason}{tail}", style="yellow"))
    parts.append(Text(" ".join(_notes(board)), style="dim"))
    return Group(*parts)


@dataclass(frozen=True, slots=True)
class _Headline:
    """The headline table, upright or turned, as the console's width asks."""

    board: Leaderboard

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table."""
        upright = tables.headline(self.board)
        first = _fitted(self.board.title, upright, always=3)
        other = _fitted(self.board.title, _turned(upright), always=2)
        if len(self.board.environments) > _WIDE:
            first, other = other, first
        yield (
            first
            if first.fits(console, options.max_width) or not other.fits(console, options.max_width)
            else other
        )


def _fitted(title: str, table: Table, always: int) -> Fitted:
    """Return the table without the last columns where they do not fit; ``always`` stay."""
    names = tuple(header.text for header in table.headers)
    text = next(
        (place for place in range(len(names)) if all(r[place].kind == "label" for r in table.rows)),
        0,
    )

    def build(kept: Sequence[int], width: int | None) -> RichTable:
        part = Table(
            tuple(table.headers[place] for place in kept),
            tuple(tuple(row[place] for place in kept) for row in table.rows),
        )
        shown = render_table(title, part)
        for place, column in zip(kept, shown.columns, strict=True):
            column.no_wrap = place != text
            column.overflow = "fold"
            column.max_width = width if place == text else None
        return shown

    return Fitted(names, tuple(range(len(names) - 1, always - 1, -1)), build)


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
