"""The lines that people see: text, tables, and asides for standard error.

``rich`` draws tables on a terminal, and is loaded only then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from qsnap.cli.output.text import cut, printable, width

if TYPE_CHECKING:
    from rich.console import Console

#: The width that a column which folds, or is cut, has at least.
_LEAST = 14
#: Blanks between two columns.
_GAP = 2


class Column(msgspec.Struct, frozen=True):
    """A column of a table.

    :ivar is_number: right-aligned on a terminal.
    :ivar folds: its cells may take several lines.
    :ivar styles: rich's style for a cell with that text.
    :ivar cut: where the terminal is too narrow, its cells lose their end or their middle; "" never.
    :ivar is_dull: on a terminal it is left out if all cells say the same.
    :ivar goes: on a terminal that is too narrow it is left out, the column with the greatest number first; 0 never.
    :ivar whole: columns that may be left out are, before the cells of this one are cut to less. Of several columns the
        one is cut that exceeds this most.
    """

    head: str
    is_number: bool = False
    folds: bool = False
    styles: Mapping[str, str] = {}
    cut: Literal["", "end", "middle"] = ""
    is_dull: bool = False
    goes: int = 0
    whole: int = _LEAST


class Table(msgspec.Struct, frozen=True):
    """Columns and rows of cells."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]

    def plain(self) -> str:
        """Columns side by side, for a pipe or a file: nothing is left out, cut or wrapped."""
        lines = self._lines()
        widths = [max(map(width, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            (" " * _GAP)
            .join(cell + " " * (wide - width(cell)) for cell, wide in zip(line, widths, strict=True))
            .rstrip()
            for line in lines
        )

    def without(self, heads: Collection[str]) -> Table:
        """The table without the columns of these names."""
        left = [number for number, column in enumerate(self.columns) if column.head not in heads]
        return Table([self.columns[number] for number in left], [[row[number] for number in left] for row in self.rows])

    def draw(self, console: Console, *, wide: bool = False) -> None:
        """Print it with colours, as wide as the terminal.

        If it is still too wide it is printed as plain lines, which the terminal wraps: a tag can be copied.

        :param wide: leave out and cut nothing.
        """
        from rich.table import Table as Drawing
        from rich.text import Text

        uncut = Table([msgspec.structs.replace(column, cut="") for column in self.columns], self.rows)
        shown = uncut if wide else self._fitting(console.width)
        if shown._least() > console.width:
            console.print(self.plain(), soft_wrap=True, markup=False, highlight=False)
            return
        drawing = Drawing(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
        for column in shown.columns:
            drawing.add_column(
                column.head, overflow="fold", no_wrap=not column.folds, justify="right" if column.is_number else "left"
            )
        for row in shown._lines()[1:]:
            # A Text is taken as it is: a tag like "[red]" is not markup
            cells = zip(row, shown.columns, strict=True)
            drawing.add_row(*(Text(cell, style=column.styles.get(cell, "")) for cell, column in cells))
        console.print(drawing)

    def _fitting(self, available: int) -> Table:
        """The columns that say something, as far as there is room for them, and their cells cut to it."""
        shown = self.without(
            {
                column.head
                for column, cells in zip(self.columns, zip(*self.rows, strict=True), strict=False)
                if column.is_dull and len(set(cells)) == 1
            }
        )
        while shown._least(whole=True) > available and (goes := max(column.goes for column in shown.columns)):
            shown = shown.without({column.head for column in shown.columns if column.goes == goes})
        widths = shown._widths()
        over = sum(widths) + _GAP * (len(widths) - 1) - available
        for _ in range(over):
            cuttable = [number for number, one in enumerate(shown.columns) if one.cut and widths[number] > _LEAST]
            if cuttable:  # the one that has most of what it can do without
                widths[max(cuttable, key=lambda number: widths[number] - shown.columns[number].whole)] -= 1
        rows = [
            [
                cut(printable(cell), wide, middle=column.cut == "middle") if column.cut else cell
                for cell, wide, column in zip(row, widths, shown.columns, strict=True)
            ]
            for row in shown.rows
        ]
        return Table(shown.columns, rows)

    def _widths(self) -> list[int]:
        """How wide each column is as a whole."""
        return [max(map(width, cells)) for cells in zip(*self._lines(), strict=True)]

    def _least(self, *, whole: bool = False) -> int:
        """The columns of a terminal that it takes at least; *whole*: before columns are left out."""
        widths = [
            min(wide, column.whole if whole else _LEAST) if column.folds or column.cut else wide
            for wide, column in zip(self._widths(), self.columns, strict=True)
        ]
        return sum(widths) + _GAP * (len(widths) - 1)

    def _lines(self) -> list[list[str]]:
        return [[column.head for column in self.columns], *([printable(cell) for cell in row] for row in self.rows)]


class Aside(msgspec.Struct, frozen=True):
    """Text for standard error; it may have several lines.

    :ivar head: what it begins with: "qsnap", or how grave it is.
    """

    text: str
    head: str = "qsnap"


class Hint(msgspec.Struct, frozen=True):
    """A line that only a terminal gets."""

    text: str


class Cut(msgspec.Struct, frozen=True):
    """A line that a terminal gets without the end for which it is too narrow."""

    text: str


#: Text is one line, without its newline; it may hold anything, as it is made printable when it is written.
Line: TypeAlias = str | Table | Aside | Hint | Cut
Lines: TypeAlias = Iterator[Line]
