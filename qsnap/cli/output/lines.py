"""The lines that people see: text, tables, and asides for standard error.

``rich`` draws tables on a terminal, and is loaded only then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from qsnap.cli.output.text import printable, width

if TYPE_CHECKING:
    from rich.console import Console

#: The width that a column which folds has at least.
_FOLDED_TO = 14


class Column(NamedTuple):
    """A column of a table.

    :ivar is_number: right-aligned on a terminal.
    :ivar folds: its cells may take several lines.
    :ivar styles: rich's style for a cell with that text.
    """

    head: str
    is_number: bool = False
    folds: bool = False
    styles: Mapping[str, str] = {}


class Table(NamedTuple):
    """Columns and rows of cells."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]

    def plain(self) -> str:
        """Columns side by side, for a pipe or a file: nothing is cut or wrapped."""
        lines = self._lines()
        widths = [max(map(width, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell + " " * (wide - width(cell)) for cell, wide in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    def draw(self, console: Console) -> None:
        """Print it with colours; where it is too wide as plain lines, which the terminal wraps: a tag can be copied."""
        from rich import box
        from rich.table import Table as Drawing
        from rich.text import Text

        head, *rows = self._lines()
        widths = [
            _FOLDED_TO if column.folds else max(map(width, cells))
            for column, cells in zip(self.columns, zip(head, *rows, strict=True), strict=True)
        ]
        if sum(widths) + 3 * len(widths) > console.width:
            console.print(self.plain(), soft_wrap=True, markup=False, highlight=False)
            return
        drawing = Drawing(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        for column in self.columns:
            drawing.add_column(
                column.head, overflow="fold", no_wrap=not column.folds, justify="right" if column.is_number else "left"
            )
        for row in rows:
            # A Text is taken as it is: a tag like "[red]" is not markup
            cells = zip(row, self.columns, strict=True)
            drawing.add_row(*(Text(cell, style=column.styles.get(cell, "")) for cell, column in cells))
        console.print(drawing)

    def _lines(self) -> list[list[str]]:
        return [[column.head for column in self.columns], *([printable(cell) for cell in row] for row in self.rows)]


class Aside(NamedTuple):
    """Text for standard error; it may have several lines.

    :ivar head: what it begins with: "qsnap", or how grave it is.
    """

    text: str
    head: str = "qsnap"


#: Text is one line, without its newline; it may hold anything, as it is made printable when it is written.
Line: TypeAlias = str | Table | Aside
Lines: TypeAlias = Iterator[Line]
