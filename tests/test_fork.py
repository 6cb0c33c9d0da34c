"""What a forked child has of a region: nothing that could hurt the parent."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsemem import Anonymous, File, ForkedRegionError, Memfd, Region, RegionClosedError, Simulated
from sparsemem._sys import calls
from tests.support import accounting
from tests.support.children import run_child
from tests.support.kinds import Made, every_viewable, every_viewable_or_protected, private_bytes
from tests.test_listeners import Listener

pytestmark = pytest.mark.promise("fork-safe")

BLOCK = 64 << 10


@every_viewable_or_protected
def test_a_child_cannot_use_the_region_and_its_end_changes_nothing(made: Made) -> None:
    listener = Listener("parent")
    with made.region() as region:
        region.add_listener(listener)
        region.plug(0, 2)
        with region.view(0) as view:
            view[:5] = b"hello"
        used = made.used(region)

        def child() -> str:
            for operation in (
                lambda: region.plug(3),
                lambda: region.unplug(0),
                lambda: region.view(0),
                lambda: region.discard(0, region.page_size),
                region.audit,
                region.fileno,
            ):
                with pytest.raises(ForkedRegionError, match="parent"):
                    operation()
            assert issubclass(ForkedRegionError, RegionClosedError)
            assert region.size
            assert region.plugged_blocks == 2
            events = len(listener.journal)
            region.close()
            assert len(listener.journal) == events
            gc.collect()
            return "fine"

        assert run_child(child).result() == "fine"
        assert made.used(region) == used
        with region.view(0) as view:
            assert view[:5] == b"hello"
        region.unplug(0)


@every_viewable_or_protected
def test_an_inherited_view_reads_zero_or_the_shared_memory_and_never_crashes(made: Made) -> None:
    with made.region() as region:
        region.plug(0)
        view = region.view(0)
        view[:5] = b"hello"

        def child() -> bytes:
            seen = bytes(view[:5])
            view[5:10] = b"child"
            return seen

        shared = made.kind.shared_file or made.kind.id.startswith("anonymous shared")
        assert run_child(child).result() == (b"hello" if shared else bytes(5))
        assert bytes(view[5:10]) == (b"child" if shared else made.kind.fresh(10)[5:10])
        view.release()


@pytest.mark.parametrize("backend", [Anonymous(), Memfd(), Memfd(shared=False), Anonymous(shared=True)], ids=str)
def test_with_inherit_the_child_has_the_region_too(backend: Anonymous | Memfd) -> None:
    with Region("1M", block_size=BLOCK, backend=backend, fork="inherit") as region:
        region.plug(0)
        with region.view(0) as view:
            view[0] = 1

        def child() -> int:
            region.plug(4)
            with region.view(0) as view:
                view[0] += 1
                value = view[0]
            region.unplug(4)
            region.close()
            return value

        assert run_child(child).result() == 2
        with region.view(0) as view:
            assert view[0] == (2 if backend.shared else 1)
        assert region.plugged_blocks == 1


def test_a_child_never_removes_the_file(tmp_path: Path) -> None:
    with Region("1M", block_size=BLOCK, backend=File(tmp_path / "f", delete=True)) as region:
        region.plug(0)

        def child() -> None:
            nonlocal region
            region.close()
            del region

        run_child(child).result()
        assert (tmp_path / "f").exists()
        assert accounting.allocated_bytes(region.fileno()) >= BLOCK
    assert not (tmp_path / "f").exists()


def test_a_child_of_multiprocessing_is_one_too() -> None:
    def child(queue: multiprocessing.SimpleQueue[str]) -> None:
        try:
            region.plug(1)
        except ForkedRegionError as error:
            queue.put(str(error))

    with Region("1M", block_size=BLOCK) as region:
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        assert "parent process" in queue.get()
        process.join()
        queue.close()


def test_what_another_thread_had_in_hand_is_tainted_in_an_inheriting_child() -> None:
    entered, leave = threading.Event(), threading.Event()

    def latency(operation: str, length: int) -> float:
        if threading.current_thread() is plugger:
            entered.set()
            leave.wait(20)
        return 0.0

    with Region("1M", block_size=BLOCK, backend=Simulated(latency=latency), fork="inherit") as region:
        plugger = threading.Thread(target=lambda: region.plug(3))
        plugger.start()
        assert entered.wait(10)

        def child() -> tuple[list[tuple[int, int]], int]:
            tainted = list(region.tainted_runs())
            region.plug(5)
            return tainted, region.scrub()

        assert run_child(child).result() == ([(3, 1)], 1)
        leave.set()
        plugger.join()
        assert list(region.plugged_runs()) == [(3, 1)]
        assert not list(region.tainted_runs())


def test_forking_beside_busy_threads_never_hangs() -> None:
    stop = threading.Event()

    def work(first: int) -> None:
        while not stop.is_set():
            region.plug(first)
            region.unplug(first)

    with Region("1M", block_size=BLOCK, fork="inherit") as region:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(30):
                assert run_child(lambda: region.plug(9) + region.unplug(9), timeout=20).result() == 2
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_the_parents_pid_is_not_needed() -> None:
    """A grandchild is refused, too."""

    def child() -> int:
        def grandchild() -> int:
            with pytest.raises(ForkedRegionError):
                region.plug(0)
            return os.getpid()

        return run_child(grandchild).result()

    with Region("1M", block_size=BLOCK) as region:
        assert run_child(child).result() != os.getpid()


@every_viewable
def test_the_kernel_was_told_what_a_child_gets(made: Made) -> None:
    """WIPEONFORK ("wf") is for private anonymous memory alone; other private memory stays out of a child ("dc")."""
    with made.region() as region:
        flags = accounting.smaps(region.address, region.size).flags
        named = "private" in made.kind.id or "template" in made.kind.id or made.kind.id == "anonymous hugetlb"
        private = made.kind.used is private_bytes or named
        wiped = made.kind.id.startswith("anonymous private")
        assert all(("wf" in vma) is wiped for vma in flags)
        assert all(("dc" in vma) is (private and not wiped) for vma in flags)
    with made.region(fork="inherit") as region:
        assert not any({"wf", "dc"} & set(vma) for vma in accounting.smaps(region.address, region.size).flags)


_ENDS = """
import atexit, gc, os, sys
from sparsemem import File, Region

class Listener:
    def on_plug(self, first, count): pass
    def on_unplug(self, first, count): print("told", os.getpid() == parent, first, count, flush=True)

parent = os.getpid()
region = Region("1M", block_size="64K", backend=File(sys.argv[1], delete=True))
listener = Listener()
region.add_listener(listener)
region.plug(0, 2)
view = region.view(1)
view[:5] = b"hello"
cycle = [region, view]
cycle.append(cycle)
atexit.register(lambda: print("exit", flush=True))
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
    print(os.stat(sys.argv[1]).st_blocks * 512 >= 2 << 16, bytes(view[:5]), flush=True)
    view.release()
    del view, cycle[:]
    region.close()
elif sys.argv[2] == "dropped":
    del region, view, cycle, listener
    gc.collect()
"""


@pytest.mark.parametrize("how", ["dropped", "left to the interpreter"])
def test_a_child_that_ends_as_programs_do_touches_nothing(how: str, tmp_path: Path) -> None:
    """With finalisers and atexit, unlike a child that leaves by os._exit()."""
    path = tmp_path / "file"
    command = [sys.executable, "-W", "error", "-c", _ENDS, str(path), how]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["exit", "True b'hello'", "told True 0 2", "exit"]
    assert not path.exists()


class Forking:
    """A listener, or somebody who looks on, that forks once; what the child does then is up to it."""

    def __init__(self, child: Callable[[], None]) -> None:
        self.child = child
        self.pid = -1
        self.journal: list[tuple[str, int, int]] = []

    def fork(self) -> None:
        if self.pid < 0:
            self.pid = os.fork()
            if self.pid == 0:
                self.child()

    def on_plug(self, first: int, count: int) -> None:
        self.journal.append(("plug", first, count))
        self.fork()

    def on_unplug(self, first: int, count: int) -> None:
        self.journal.append(("unplug", first, count))
        if self.journal[0][0] == "unplug":
            self.fork()


@pytest.mark.promise("fork-safe", found="the child undid what its parent was doing, in memory that both have")
@pytest.mark.parametrize("leaves", [False, True], ids=["goes on", "leaves"])
@pytest.mark.parametrize("during", ["on_plug", "on_unplug", "progress"])
@pytest.mark.parametrize("fork", ["refuse", "inherit"])
def test_a_fork_in_the_middle_of_an_operation_leaves_it_to_the_parent(fork: str, during: str, leaves: bool) -> None:
    parent = os.getpid()
    written, let_write = os.pipe()

    def child() -> None:
        os.read(written, 1)  # the parent has gone on, and used the blocks
        if leaves:
            sys.exit(0)

    forking = Forking(child)
    with Region("64M", block_size="1M", backend=Memfd(), fork=fork) as region:
        if during == "on_unplug":
            region.plug(0, 4)
        if during != "progress":
            region.add_listener(forking) if during == "on_plug" else region._core.listen((forking,))
        journal_before = len(forking.journal)
        try:
            if during == "on_unplug":
                region.unplug(0, 4)
                region.plug(0, 4)
            else:
                watch = (lambda done, total: forking.fork()) if during == "progress" else None
                region.plug(0, 4, progress=watch)
        except SystemExit:
            os._exit(0 if leaves and len(forking.journal) - journal_before <= 1 else 1)
        except ForkedRegionError as error:
            told_no_more = len(forking.journal) - journal_before <= 1
            os._exit(0 if not leaves and told_no_more and "in the middle of it" in str(error) else 2)
        except BaseException:
            os._exit(3)
        if os.getpid() != parent:
            os._exit(4)
        region.view(0)[:5] = b"hello"
        os.write(let_write, b"1")
        assert os.waitstatus_to_exitcode(os.waitpid(forking.pid, 0)[1]) == 0
        assert bytes(region.view(0)[:5]) == b"hello"
        assert region.audit().ok
        gc.collect()
    os.close(written)
    os.close(let_write)


@pytest.mark.parametrize("unnamed", [True, False], ids=["O_TMPFILE", "a name meanwhile"])
def test_a_fork_in_the_middle_of_a_save_leaves_it_to_the_parent(
    unnamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not unnamed:
        real = calls.kernel.open_in

        def open_in(folder: int, name: str, flags: int, mode: int) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "no unnamed files")
            return real(folder, name, flags, mode)

        monkeypatch.setattr(calls.kernel, "open_in", open_in)
    parent = os.getpid()
    forking = Forking(lambda: None)

    def look_on(done: int, total: int) -> None:
        if forking.pid < 0:
            forking.fork()
            if os.getpid() == parent:
                assert os.waitstatus_to_exitcode(os.waitpid(forking.pid, 0)[1]) == 0

    with Region("64M", block_size="1M") as region:
        region.plug(0, 4)
        region.view(3)[:5] = b"saved"
        try:
            region.save(tmp_path / "state", progress=look_on)
        except ForkedRegionError:
            os._exit(0)
        except BaseException:
            os._exit(3)
        if os.getpid() != parent:
            os._exit(4)
    assert os.listdir(tmp_path) == ["state"]
    with Region.restore(tmp_path / "state") as restored:
        assert bytes(restored.view(3)[:5]) == b"saved"
