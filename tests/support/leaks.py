"""Every test must leave as it came: no open descriptors, no mappings of the library's kinds."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import accounting

_REPORT = pytest.StashKey[pytest.TestReport]()
_FILE = pytest.StashKey[Path]()

# A reservation without a name is known by its size: bigger than any heap, arena or stack of the interpreter.
_RESERVATION = 256 << 20

# Names of the nameless: hugetlb, shared anonymous and secret memory, as /proc/self/maps shows them.
_KERNEL_NAMES = ("/anon_hugepage", "/dev/zero (deleted)", "/secretmem", "/SYSV")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker here too, so that the plugin stands alone."""
    config.addinivalue_line("markers", "leaky: this test may leave descriptors or mappings behind")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """At each file: what is alive then, thousands of tests and reports, is no matter for the collector.

    Else each collection goes through it, for 0.1 s and more, and tests of interrupts make thousands.
    """
    if item.session.stash.get(_FILE, None) != item.path:
        item.session.stash[_FILE] = item.path
        gc.collect()
        gc.freeze()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Keep the report of the call: a failed test's traceback keeps its frames, and so their regions, alive."""
    outcome: Any = yield
    report: pytest.TestReport = outcome.get_result()
    if report.when == "call":
        item.stash[_REPORT] = report


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails a passed test that leaves a descriptor or a mapping; `@pytest.mark.leaky` turns it off."""
    # AddressSanitizer maps memory of its own as it goes.
    if request.node.get_closest_marker("leaky") or "libasan" in os.environ.get("LD_PRELOAD", ""):
        yield
        return
    folders = (str(tmp_path_factory.getbasetemp()), tempfile.gettempdir() + "/", "/dev/shm/", "/var/tmp/")
    descriptors = set(accounting.open_descriptors().items())
    mappings = _watched(folders)
    yield
    report = request.node.stash.get(_REPORT, None)
    if report is None or not report.passed:
        return
    leaks = _leaks(descriptors, mappings, folders)
    if leaks:  # a collection is dear (tens of milliseconds in a big process): only when it may change the answer
        gc.collect()
        leaks = _leaks(descriptors, mappings, folders)
    if leaks:
        pytest.fail("the test left behind:\n  " + "\n  ".join(leaks), pytrace=False)


def _leaks(descriptors: set[tuple[int, str]], mappings: set[str], folders: tuple[str, ...]) -> list[str]:
    new_descriptors = set(accounting.open_descriptors().items()) - descriptors
    told = [f"descriptor {number} -> {target}" for number, target in sorted(new_descriptors)]
    return told + [f"mapping {text}" for text in sorted(_watched(folders) - mappings)]


def _watched(folders: tuple[str, ...]) -> set[str]:
    # The permissions are left out of the key, so that an mprotect of an old mapping is no new one.
    return {f"{vma.start:x}-{vma.end:x} {vma.name}" for vma in accounting.vmas() if _is_watched(vma, folders)}


def _is_watched(vma: accounting.Vma, folders: tuple[str, ...]) -> bool:
    if not vma.name:
        return vma.length >= _RESERVATION
    if vma.name.endswith(".so") or ".so." in vma.name:
        return False  # a module that was imported late; the environment itself may live in a temporary folder
    if vma.name.startswith(("/memfd:", "[anon")):
        return True
    return vma.name.startswith(_KERNEL_NAMES) or vma.name.startswith(folders)
