"""How far a long operation is: a bar where rich is installed and somebody watches, else plain lines."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from sparsemem.units import format_size

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[int, int], None]

_PATIENCE_S = 1.0
"""What is done by then needs no telling."""


@contextlib.contextmanager
def showing(label: str, stream: TextIO | None = None) -> Iterator[Progress]:
    """A function for `progress=` that shows `(bytes done, bytes in all)` on standard error."""
    stream = sys.stderr if stream is None else stream
    try:
        from rich.console import Console
    except ImportError:
        yield _lines(label, stream)
        return
    console = Console(file=stream)
    if not console.is_terminal:
        yield _lines(label, stream)
        return
    with _bar(label, console) as progress:
        yield progress


@contextlib.contextmanager
def _bar(label: str, console: Console) -> Iterator[Progress]:
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = ("{task.description}", BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(label: str, stream: TextIO) -> Progress:
    """A line a second, from the second second on."""
    due = time.monotonic() + _PATIENCE_S

    def tell(done: int, total: int) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + _PATIENCE_S
            share = 100 * done // total if total else 100
            print(f"{label}: {format_size(done)} of {format_size(total)} ({share} %)", file=stream, flush=True)

    return tell
