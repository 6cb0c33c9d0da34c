"""KeyboardInterrupt at every line of making a region: nothing is left behind."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from sparsemem import Anonymous, Budget, File, Memfd, Region
from sparsemem._sys import calls, probe
from sparsemem._sys.descriptor import Descriptor
from sparsemem._sys.files import KernelFiles
from sparsemem._sys.uffd import Userfaultfd
from sparsemem.backends import Backend
from tests.support import accounting
from tests.support.kinds import need_protection
from tests.test_failed_making import BLOCK, DATA, file  # noqa: F401 - the fixture

pytestmark = [pytest.mark.promise("make-or-leave-nothing"), pytest.mark.promise("interrupt-safe")]

MODULES = {
    sys.modules[f"sparsemem.{name}"].__file__
    for name in ("region", "backends.kernel", "backends.adopted", "backends.allocated", "stray")
}


def _made_with_interrupt_at(make: Callable[[], Region], n: int) -> bool:
    """Makes a region, with an interrupt at the nth line of these modules; whether it came that far."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        # Not in what opens and creates: between such a system call and the object that owns what it made, nothing in
        # Python can help.  Nor in finalisers, whose errors reach nobody.
        if frame.f_code.co_filename not in MODULES or frame.f_code.co_name in ("__del__", "close", "_map"):
            return None
        if event == "line":
            count += 1
            if count == n:
                raise KeyboardInterrupt
        return trace

    region = None
    sys.settrace(trace)
    try:
        region = make()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
        if region is not None:
            region.close()
    return False


def _fewer_threads_than(n: int) -> bool:
    """Soon, for one that was told to end takes its time."""
    deadline = time.monotonic() + 20
    while len(os.listdir("/proc/self/task")) >= n and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.001)
    return len(os.listdir("/proc/self/task")) < n


PROTECTED: dict[str, dict[str, Any]] = {
    "trap": {"protection": "trap"},
    "caught": {"protection": "trap", "catch_stray": print},
    "guard": {"protection": "guard"},
    "prot_none": {"protection": "prot_none"},
}


@pytest.mark.parametrize("what", ["anonymous", "memfd", "new file", "adopted file", *PROTECTED])
def test_an_interrupt_at_every_line_of_making_one_leaves_nothing(
    what: str,
    file: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    backends: dict[str, Backend] = {
        "anonymous": Anonymous(),
        "memfd": Memfd(),
        "new file": File(tmp_path / "new", delete=True),
        "adopted file": File(file, existing="adopt"),
    }
    budget = Budget("1G")

    def make() -> Region:
        backend, options = backends.get(what, Memfd()), PROTECTED.get(what, {})
        return Region("1M", block_size=BLOCK, backend=backend, plugged=[(1, 2)], budget=budget, **options)

    if what in PROTECTED:
        need_protection(PROTECTED[what]["protection"])
    if what == "caught" and not probe.catch(calls.kernel):
        pytest.skip("needs userfaultfd")
    make().close()  # what is shared between regions and stays open is there now
    descriptors = set(accounting.open_descriptors().items())
    threads = len(os.listdir("/proc/self/task"))
    n, came = 0, True
    while came:
        n += 1
        came = _made_with_interrupt_at(make, n)
        assert budget.used == 0, f"line event {n}: the budget"
        if set(accounting.open_descriptors().items()) - descriptors:
            gc.collect()  # the error's frames, which Python 3.10 leaves to the collector
        assert not set(accounting.open_descriptors().items()) - descriptors, f"line event {n}: a descriptor"
        assert not (tmp_path / "new").exists(), f"line event {n}: the file"
        assert _fewer_threads_than(threads + 1), f"line event {n}: a thread"
    assert n > 50
    assert file.read_bytes()[BLOCK : BLOCK + len(DATA)] == DATA


def test_what_an_interrupted_constructor_left_dies_in_silence() -> None:
    """__init__ never ran: in CI an interrupt came at its first line, and __del__ complained on standard error."""
    for made in (KernelFiles, Userfaultfd, Descriptor):
        made.__new__(made).__del__()
