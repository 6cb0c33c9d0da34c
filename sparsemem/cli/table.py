"""Aligned columns, like those of lsmem, and the options that say how to print."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from sparsemem.units import format_size


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--bytes`."""
    parser.add_argument("--json", action="store_true", help="print JSON (sizes in bytes)")
    parser.add_argument("--bytes", action="store_true", help="print sizes in bytes instead of 64M")


def show_size(size: int, raw: bool) -> str:
    """Bytes as `64M`, or as a plain number."""
    return str(size) if raw else format_size(size)


def columns(rows: Iterable[Sequence[str]], right: Iterable[int] = (), indent: str = "") -> str:
    """Rows as lines, columns two spaces apart; those in `right` are right-aligned."""
    table, ends = [list(row) for row in rows], set(right)
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [
            cell.rjust(width) if i in ends else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(indent + "  ".join(cells).rstrip())
    return "\n".join(lines)
