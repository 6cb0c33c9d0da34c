"""What the command line shows of a long operation."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from typing import Any

import pytest

from sparsemem.cli import progress as progress_module
from sparsemem.cli.progress import showing


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_without_a_terminal_there_is_a_line_a_second(clock: Clock) -> None:
    out = io.StringIO()
    with showing("plug", out) as tell:
        for done in range(0, 101, 10):
            clock.now += 0.3
            tell(done << 20, 100 << 20)
    assert out.getvalue().splitlines() == ["plug: 30M of 100M (30 %)", "plug: 70M of 100M (70 %)"]


def test_what_is_done_at_once_is_not_told(clock: Clock) -> None:
    out = io.StringIO()
    with showing("plug", out) as tell:
        tell(1 << 20, 1 << 20)
    assert out.getvalue() == ""


def test_without_rich_there_are_lines_on_a_terminal_too(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    out: Any = io.StringIO()
    out.isatty = lambda: True
    with showing("plug", out) as tell:
        clock.now += 2
        tell(0, 0)
    assert out.getvalue() == "plug: 0 of 0 (100 %)\n"


def test_on_a_terminal_there_is_a_bar_that_goes_away() -> None:
    pytest.importorskip("rich", reason="needs rich")
    ours, theirs = pty.openpty()
    code = (
        "from sparsemem.cli.progress import showing\n"
        "with showing('plugging') as tell:\n"
        "    for i in range(11): tell(i << 20, 10 << 20)\n"
        "print('done')"
    )
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    env.pop("NO_COLOR", None)
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs, env=env, check=True)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert done.stdout == b"done\n"
    assert b"plugging" in shown
    assert "━".encode() in shown
