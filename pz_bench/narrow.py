"""A table that fits the terminal: on a narrow one the least important columns are left out.

What is left out is named under the table. The one column of free text (a row's or a cell's name)
is broken into lines first, down to ``TEXT_WIDTH`` characters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

TEXT_WIDTH = 18
_AMPLE = 100_000

Build = Callable[[Sequence[int], int | None], Table]
"""Makes the table of these columns, its text column at most so many characters wide."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A table as wide as the console lets it be.

    ``names`` are all columns, in order; ``drop`` those that may go, least important first.
    """

    names: tuple[str, ...]
    drop: tuple[int, ...]
    build: Build

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, and a line naming the columns that did not fit."""
        kept = list(range(len(self.names)))
        hidden: list[int] = []
        while (room := options.max_width - self._needs(console, kept, TEXT_WIDTH)) < 0:
            if len(hidden) == len(self.drop):
                break
            hidden.append(self.drop[len(hidden)])
            kept.remove(hidden[-1])
        whole = self._needs(console, kept, None) <= options.max_width
        yield self.build(kept, None if whole else TEXT_WIDTH + max(room, 0))
        if hidden:
            names = ", ".join(self.names[place] for place in sorted(hidden))
            yield Text(f"Hidden in {options.max_width} columns: {names}", style="yellow")

    def fits(self, console: Console, width: int) -> bool:
        """Return whether no column would be left out."""
        return self._needs(console, range(len(self.names)), TEXT_WIDTH) <= width

    def _needs(self, console: Console, kept: Sequence[int], text: int | None) -> int:
        ample = console.options.update(width=_AMPLE, max_width=_AMPLE)
        return Measurement.get(console, ample, self.build(kept, text)).maximum
