"""The examples run, show what they say, and stay short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparsemem

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "virtio_mem_prototype.py": ["requested  40M  plugged  40M  ACK ", "plugged  48M  BUSY", "never lost a byte"],
    "balloon_simulator.py": ["web alone cannot have it all: the Budget is spent", "audit ok"],
    "buddy_allocator.py": ["purged", "everything was joined and given back"],
    "share_with_process.py": ["hello, too!!", "two processes, one memory"],
    "numpy_arena.py": ["given back", "no array is left"],
}
# These boot a real guest: tests/guest/test_example.py runs them.
WITH_GUEST = {"elastic_vm.py"}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS) | WITH_GUEST


def run(
    name: str, *folders: Path, arguments: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs an example, which finds the package that is tested here; `folders` come before it."""
    path = os.pathsep.join(map(str, [*folders, Path(sparsemem.__file__).parent.parent]))
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", str(EXAMPLES / name), *arguments],
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs_and_checks_itself(name: str) -> None:
    done = run(name)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    for text in SAYS[name]:
        assert text in done.stdout


@pytest.mark.parametrize("name", [*SAYS, *WITH_GUEST])
def test_an_example_is_short_and_says_what_it_shows(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    assert len(text.splitlines()) < 150
    assert text.startswith('"""')


def test_the_numpy_example_says_so_when_there_is_no_numpy(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('not installed')")
    done = run("numpy_arena.py", tmp_path)
    assert (done.returncode, done.stdout) == (0, "this example needs numpy\n")
