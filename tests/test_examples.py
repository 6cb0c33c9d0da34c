"""The examples run, show what they say, and stay short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "virtio_mem_prototype.py": ["BUSY", "never lost a byte"],
    "balloon_simulator.py": ["the Budget is spent", "audit ok"],
    "buddy_allocator.py": ["purged", "everything was joined and given back"],
    "share_with_process.py": ["hello, too!!", "two processes, one memory"],
    "numpy_arena.py": ["given back", "no array is left"],
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs_and_checks_itself(name: str) -> None:
    path = EXAMPLES / name
    assert len(path.read_text().splitlines()) < 150
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    for text in SAYS[name]:
        assert text in done.stdout
