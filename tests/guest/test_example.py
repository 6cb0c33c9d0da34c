"""The example that boots a guest does what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest.packages import Packages
from tests.test_examples import run

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.guest
@pytest.mark.slow
def test_the_elastic_vm_follows_its_work(
    guest_packages: Packages, vhost_user_device: tuple[str, list[str]], tmp_path: Path
) -> None:
    picture = tmp_path / "memory.png"
    done = run("elastic_vm.py", arguments=(str(picture),))
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "no process was killed for want of memory" in done.stdout
    assert picture.read_bytes().startswith(PNG)


def test_without_the_packages_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    done = run("elastic_vm.py", SPARSEMEM_GUEST_CACHE=str(tmp_path / "a file"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("this example needs something more: ")


def test_without_matplotlib_it_says_so_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not installed')")
    done = run("elastic_vm.py", tmp_path)
    assert (done.returncode, done.stdout) == (0, "this example needs something more: not installed\n")
