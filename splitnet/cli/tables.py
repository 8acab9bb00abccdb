"""Tables that the commands print. No cell is cut, however narrow the terminal is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate, zip_longest
from shutil import get_terminal_size

from rich.cells import cell_len

from splitnet.logs import printable

GAP = "  "
NO_TERMINAL = 1000, 25  # a file has room for all columns


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], figures: Collection[str] = (), *, title: str = ""
) -> str:
    """The text of a table, without a line break at its end.

    Columns that do not fit in the width of the terminal are printed below each row as `head cell, head cell`, so the
    least important column comes last.

    Args:
        heads: the heads of the columns; a line break in a head makes the column narrower.
        figures: the heads of columns that are aligned to the right.
    """
    lines = [[" ".join(printable(cell).split()) for cell in row] for row in rows]
    split = [head.split("\n") for head in heads]
    tops = [*zip_longest(*map(reversed, split), fillvalue="")][::-1]
    widths = [max(map(cell_len, column)) for column in zip(*tops, *lines, strict=True)]
    room = get_terminal_size(NO_TERMINAL).columns
    shown = max(1, sum(end - len(GAP) <= room for end in accumulate(width + len(GAP) for width in widths)))

    def across(cells: Sequence[str]) -> str:
        placed: list[str] = []
        for head, cell, width in zip(heads[:shown], cells, widths, strict=False):
            space = " " * (width - cell_len(cell))
            placed.append(space + cell if head in figures else cell + space)
        return GAP.join(placed).rstrip()

    text = [title] * bool(title) + [across(top) for top in tops]
    for cells in lines:
        text.append(across(cells))
        line = ""
        for told in (" ".join((*head, cell)) for head, cell in zip(split[shown:], cells[shown:], strict=True) if cell):
            if line and cell_len(f"{line}, {told},") > room:
                text.append(f"{line},")
                line = ""
            line = f"{line}, {told}" if line else f"{GAP}{told.lstrip()}"
        text += [line] * bool(line)
    return "\n".join(text)
