"""catch_stray: an access to an unplugged block goes through, and the callback is told of it afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import logging
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsemem import (
    Anonymous,
    File,
    Memfd,
    Region,
    RegionClosedError,
    ReserveError,
    StrayAccess,
    UnsupportedError,
    ViewsAliveError,
)
from sparsemem._sys import calls, probe
from sparsemem.backends import Backend
from tests.support import accounting
from tests.support.children import run_child, unprivileged
from tests.support.injector import Injector
from tests.support.kinds import Made, params

BLOCK = 64 << 10
MIB = 1 << 20
BACKENDS = [Anonymous(), Anonymous(shared=True), Memfd(), Memfd(shared=False)]

pytestmark = pytest.mark.skipif(
    not (probe.trap(calls.kernel) and probe.catch(calls.kernel)), reason="needs userfaultfd"
)
every_trapping = pytest.mark.parametrize(
    "made",
    [case for case in params(protected=True, bare=False) if case.values[0][2] == "trap"],
    indirect=True,
)


class Seen:
    """Keeps what it is told of, and can wait for it."""

    def __init__(self) -> None:
        self.events: list[StrayAccess] = []
        self._more = threading.Condition()

    def __call__(self, event: StrayAccess) -> None:
        with self._more:
            self.events.append(event)
            self._more.notify_all()

    def wait(self, n: int) -> list[StrayAccess]:
        with self._more:
            assert self._more.wait_for(lambda: len(self.events) >= n, 20), f"{len(self.events)} of {n} were told"
            return list(self.events)


@pytest.fixture
def seen() -> Seen:
    return Seen()


def make(backend: Backend, callback: Callable[[StrayAccess], object], size: str = "1M", **options: Any) -> Region:
    options.setdefault("block_size", BLOCK)
    return Region(size, backend=backend, protection="trap", catch_stray=callback, **options)


def threads(expected: int | None = None) -> int:
    """How many there are; one that was joined is listed for a moment more, so it waits for as many as are expected.

    Without an expectation it waits until the number stays as it is.
    """
    found: list[int] = []
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found.append(len(os.listdir("/proc/self/task")))
        if found[-1] == expected or (expected is None and found[-20:] == [found[-1]] * 20):
            break
        time.sleep(0.01)
    return found[-1]


# ---- what it tells ----------------------------------------------------------------------------


@pytest.mark.promise("strays-are-caught")
@every_trapping
def test_an_access_goes_through_and_is_told(made: Made, seen: Seen) -> None:
    with made.region(8 * made.kind.block_size, catch_stray=seen) as region:
        size = region.block_size
        region.plug(1, 2)
        with region.view() as whole:
            assert whole[size] == whole[3 * size - 1] == 0
            assert whole[5] == 0
            whole[5 * size + 7] = 9
            assert whole[5 * size + 7] == 9
        first, second = seen.wait(2)
        me = threading.get_native_id()
        assert first == StrayAccess(block=0, offset=5, write=False, thread=me)
        assert second == StrayAccess(block=5, offset=5 * size + 7, write=True, thread=me)
        assert (5, 1) in region.audit().leaks
        region.plug(5)
        region.plug(0)
        assert region.view(5) == region.view(0) == bytes(size)
        assert region.audit().ok
        region.unplug(5)
        with region.view() as whole:
            assert whole[5 * size + 7] == 0
        assert seen.wait(3)[2].block == 5
        region.unplug_all()
        assert region.stats().strays == 3
        assert region.stats().strays_dropped == 0


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_the_thread_that_did_it_is_told(backend: Backend, seen: Seen) -> None:
    ids = []

    def stray(whole: memoryview, block: int) -> None:
        ids.append((block, threading.get_native_id()))
        whole[block * BLOCK] = 1

    with make(backend, seen) as region, region.view() as whole:
        workers = [threading.Thread(target=stray, args=(whole, block)) for block in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert sorted((event.block, event.thread) for event in seen.wait(8)) == sorted(ids)


def test_it_needs_no_privilege(seen: Seen) -> None:
    def child() -> list[int]:
        told = Seen()
        with make(Memfd(), told) as region:
            region.plug(0)
            with region.view() as whole:
                whole[3 * BLOCK] = 1
            return [event.block for event in told.wait(1)]

    assert unprivileged(child).result() == [3]


@pytest.mark.promise("strays-are-caught")
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_a_store_that_holds_the_gil_never_waits_for_python(backend: Backend) -> None:
    """The fault is resolved although no Python thread can run until the store is done."""

    def child() -> int:
        told = Seen()
        with make(backend, told, "64M") as region, region.view() as whole:
            sys.setswitchinterval(60)  # nobody is asked to let go of the GIL
            for page in range(0, region.size, BLOCK):
                whole[page] = 1
            return len(told.wait(region.nblocks))

    assert run_child(child, timeout=30).result() == 1024


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_a_system_call_is_an_error_and_not_told(backend: Backend, seen: Seen) -> None:
    with make(backend, seen) as region, region.view() as whole, open("/dev/zero", "rb", buffering=0) as zeroes:
        with pytest.raises(OSError, match="Bad address"):
            zeroes.readinto(whole[:10])
        assert region.stats().strays == 0
        assert region.audit().ok


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_what_the_region_does_itself_is_no_stray_access(backend: Backend, seen: Seen) -> None:
    with make(backend, seen, "256M", block_size="4K", threads=2) as region:
        region.plug(0, 40960)
        region.unplug_runs([(i * 2, 1) for i in range(1000)])
        region.plug_runs([(i * 2, 1) for i in range(1000)])
        region.discard(0, 1 << 20)
        region.populate(0, 1 << 20)
        region.audit()
        region.unplug_all()
        assert region.stats().strays == 0
    assert not seen.events


@every_trapping
def test_pages_discarded_in_a_plugged_block_come_back_and_are_not_told(made: Made, seen: Seen) -> None:
    with made.region(8 * made.kind.block_size, catch_stray=seen) as region:
        region.plug(2)
        region.view(2)[:] = b"x" * region.block_size
        region.discard(2 * region.block_size, region.page_size)
        with region.view(2) as view:
            assert view[5] == 0
            view[5] = 1
            assert view[5] == 1
        assert region.stats().strays == 0
        assert region.audit().ok


@pytest.mark.promise("strays-are-caught")
def test_strays_while_blocks_are_plugged_and_unplugged(seen: Seen) -> None:
    """Neither waits for the other, and nothing strays into what is plugged."""
    stop = threading.Event()
    with make(Memfd(), seen, "64M", block_size="4K") as region:

        def stray(whole: memoryview) -> None:
            while not stop.is_set():
                for block in range(12000, 12100):
                    whole[block * 4096] = 1
                region.plug(12000, 100)
                region.unplug(12000, 100)

        with region.view() as whole:
            worker = threading.Thread(target=stray, args=(whole,))
            worker.start()
            try:
                for _ in range(50):
                    region.plug(0, 4096)
                    assert not any(region.view(0, 4096)[::4096])
                    region.view(0, 4096)[::4096] = b"x" * 4096
                    region.unplug(0, 4096)
            finally:
                stop.set()
                worker.join()
        assert region.stats().strays >= 100
        region.plug(12000, 100)
        assert region.audit().ok
    assert all(12000 <= event.block < 12100 for event in seen.events)


# ---- the callback -------------------------------------------------------------------------------


def test_a_callback_that_raises_is_logged_and_told_of_the_next(caplog: pytest.LogCaptureFixture) -> None:
    told = Seen()

    def callback(event: StrayAccess) -> None:
        told(event)
        raise RuntimeError("no")

    with caplog.at_level(logging.ERROR), make(Anonymous(), callback) as region:
        with region.view() as whole:
            whole[0] = whole[BLOCK] = 1
        told.wait(2)
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "StrayAccess(block=0" in caplog.text
    assert "RuntimeError: no" in caplog.text


def test_the_callback_may_use_the_region() -> None:
    done = Seen()

    def callback(event: StrayAccess) -> None:
        region.plug(event.block)  # which discards what the access has left
        assert region.audit().ok
        done(event)

    with make(Memfd(), callback) as region:
        with region.view() as whole:
            whole[7 * BLOCK] = 1
        done.wait(1)
        assert region.is_plugged(7)
        assert region.view(7)[0] == 0


def test_the_callback_may_close_the_region() -> None:
    told = Seen()
    through = threading.Event()

    def callback(event: StrayAccess) -> None:
        through.wait(20)  # who is told may be faster than the access: it would find no memory any more
        region.close()
        told(event)

    region = make(Memfd(), callback)
    ctypes.memset(region.address, 1, 1)  # a view would hold the close off
    through.set()
    told.wait(1)
    assert region.closed
    region.close()


def test_closing_tells_all_that_was_caught_first() -> None:
    told = Seen()
    gate = threading.Event()

    def callback(event: StrayAccess) -> None:
        gate.wait(20)
        told(event)

    region = make(Anonymous(), callback, "16M", block_size="4K")
    with region.view() as whole:
        for block in range(500):
            whole[block * 4096] = 1
    threading.Timer(0.1, gate.set).start()
    region.close()
    assert [event.block for event in told.events] == list(range(500))
    before = threads()
    region.close()
    assert threads(before) == before


def test_a_close_that_is_refused_goes_on_catching(seen: Seen) -> None:
    with make(Memfd(), seen) as region, region.view() as whole:
        with pytest.raises(ViewsAliveError):
            region.close()
        whole[0] = 1
        seen.wait(1)
        whole.release()
    with pytest.raises(RegionClosedError):
        region.plug(0)


def test_what_comes_too_fast_is_counted() -> None:
    told = Seen()
    gate = threading.Event()

    def callback(event: StrayAccess) -> None:
        gate.wait(60)
        told(event)

    with make(Anonymous(), callback, "64M", block_size="4K") as region:
        with region.view() as whole:
            for block in range(4000):
                whole[block * 4096] = 1
            assert whole[: 4000 * 4096 : 4096] == b"\1" * 4000
        assert region.stats().strays == 4000
        dropped = region.stats().strays_dropped
        assert 4000 - 1024 - 256 <= dropped <= 4000 - 1024
        gate.set()
        assert len(told.wait(4000 - dropped)) == 4000 - dropped


# ---- the ends ---------------------------------------------------------------------------------------


def test_threads_and_descriptors_go_with_the_region(seen: Seen) -> None:
    make(Memfd(), seen).close()
    gc.collect()
    before = threads(), len(accounting.open_descriptors())
    for _ in range(50):
        with make(Memfd(), seen) as region:
            assert threads(before[0] + 2) == before[0] + 2
    del region
    gc.collect()
    assert (threads(before[0]), len(accounting.open_descriptors())) == before


def test_a_region_that_is_forgotten_takes_its_threads_along(seen: Seen) -> None:
    before = threads()
    region = make(Anonymous(), seen)
    with region.view() as whole:
        whole[0] = 1
    with pytest.warns(ResourceWarning, match="unclosed"):
        del whole, region
        gc.collect()
    seen.wait(1)
    assert threads(before) == before


def test_the_end_of_the_process_tells_what_is_left() -> None:
    program = """
import time
from sparsemem import Region
def told(event):
    time.sleep(0.1)
    print(event.block)
region = Region("1M", block_size="64K", protection="trap", catch_stray=told)
whole = region.view()
for block in range(5):
    whole[block << 16] = 1
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("fork", ["refuse", "inherit"])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_a_child_has_no_threads_and_waits_for_none(backend: Backend, fork: str, seen: Seen) -> None:
    with make(backend, seen, fork=fork) as region:
        region.plug(0)
        with region.view() as whole:
            whole[3 * BLOCK] = 1
            seen.wait(1)

            def child() -> tuple[int, int]:
                if fork == "inherit":
                    region.plug(8)
                    region.view(8)[:] = b"x" * BLOCK
                    whole[5 * BLOCK] = 1  # nobody catches it
                    assert region.stats().strays == 0
                whole.release()
                region.close()
                gc.collect()
                return threads(1), sum("userfaultfd" in path for path in accounting.open_descriptors().values())

            n, descriptors = run_child(child, timeout=20).result()
            assert n == 1
            assert descriptors <= 1  # that of fork="refuse" is dropped, too; the probes' may be there
            whole[9 * BLOCK] = 1
            assert seen.wait(2)[-1].block == 9


def test_accesses_of_others_go_on_when_the_region_ends_under_them(seen: Seen) -> None:
    """The body raised, so the region closes although a view lives; nobody waits for an answer that never comes."""

    def child() -> int:
        told = Seen()
        with pytest.raises(RuntimeError, match="body"), make(Anonymous(), told) as region:
            region.plug(0)
            whole = region.view()
            raise RuntimeError("body")
        whole[5 * BLOCK] = 4
        return whole[5 * BLOCK]

    assert run_child(child, timeout=20).result() == 4


# ---- no memory -----------------------------------------------------------------------------------------


def test_an_access_for_which_there_is_no_memory_is_a_bus_error(tmpfs_mount: Callable[..., Path]) -> None:
    """As it is without protection."""
    folder = tmpfs_mount("1M")

    def child() -> None:
        region = make(File(folder / "file", delete=True), Seen(), "4M")
        region.plug(0, 15)
        whole = region.view()
        for page in range(32 * BLOCK, 64 * BLOCK, 4096):
            whole[page] = 1

    assert run_child(child, timeout=20).signal is signal.SIGBUS


@every_trapping
def test_a_poisoned_page_is_healed_by_the_next_plug(made: Made, seen: Seen) -> None:
    with made.region(8 * made.kind.block_size, catch_stray=seen) as region:
        uffd = region._mapping._uffd  # type: ignore[attr-defined]
        poison = 3 << 30 | 32 << 16 | 0xAA << 8 | 8  # _IOWR, linux/userfaultfd.h
        fcntl.ioctl(
            uffd.c.fd, poison, struct.pack("QQQq", region.address + 3 * region.block_size, region.page_size, 0, 0)
        )
        assert region.plug(2, 2) == 2
        assert region.view(2, 2) == bytes(2 * region.block_size)
        region.unplug(2, 2)
        assert region.audit().ok


# ---- what it takes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protection", ["none", "guard", "prot_none"])
def test_only_a_trap_tells(protection: str, seen: Seen) -> None:
    with pytest.raises(ValueError, match="catch_stray needs protection='trap'"):
        Region("1M", block_size=BLOCK, protection=protection, catch_stray=seen)


def test_a_callback_is_callable() -> None:
    with pytest.raises(TypeError, match="catch_stray must be callable, not 5"):
        Region("1M", block_size=BLOCK, protection="trap", catch_stray=5)  # type: ignore[arg-type]


def test_a_kernel_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    monkeypatch.setattr(probe, "catch", lambda _: False)
    with pytest.raises(UnsupportedError, match="catch_stray does not work here: no userfaultfd with UFFDIO_POISON"):
        make(Anonymous(), seen)


def test_without_a_thread_there_is_no_region(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    make(Anonymous(), seen).close()
    gc.collect()
    before = threads(), len(accounting.open_descriptors()), accounting.vma_count()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(ReserveError, match="no thread can be had for catch_stray"):
        make(Anonymous(), seen)
    gc.collect()
    assert (threads(before[0]), len(accounting.open_descriptors())) == before[:2]
    assert accounting.vma_count() - before[2] < 10


@pytest.mark.parametrize("call", ["userfaultfd", "register"])
def test_what_the_kernel_refuses_is_told(call: str, inject: Injector, seen: Seen) -> None:
    with make(Anonymous(), seen):
        inject.call(call, errno=24)
        with pytest.raises(ReserveError, match="userfaultfd does not trap"):
            make(Anonymous(), seen)


def test_the_shims_thread_blocks_all_signals(seen: Seen) -> None:
    """Else a signal that Python handles could arrive there, and the main thread go on sleeping."""
    usual = (1 << signal.SIGINT - 1) | (1 << signal.SIGALRM - 1) | (1 << signal.SIGUSR1 - 1)

    def deaf() -> set[str]:
        found = set()
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one that has just ended
                blocked = int((task / "status").read_text().split("SigBlk:")[1].split()[0], 16)
                found |= {task.name} if blocked & usual == usual else set()
        return found

    before = deaf()
    with make(Anonymous(), seen):
        assert len(deaf() - before) == 1


def test_an_access_of_c_code_is_told_as_well(seen: Seen) -> None:
    with make(Memfd(), seen) as region:
        ctypes.memset(region.address + 2 * BLOCK, 7, BLOCK)
        assert {event.block for event in seen.wait(16)} == {2}
        assert region.audit().leaked_size == BLOCK
