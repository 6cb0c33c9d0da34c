"""The engine: chunks, threads, many ranges in one call, and how work is watched and stopped."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemem import (
    Anonymous,
    BackendExhaustedError,
    DeadlineError,
    DiscardError,
    File,
    Memfd,
    OperationCancelledError,
    PopulateError,
    Region,
    Simulated,
    engine,
    workers,
)
from sparsemem._sys import calls, ffi, lib, probe
from sparsemem.backends import Backend
from sparsemem.engine import Work
from sparsemem.recipes import Step
from sparsemem.runs import collect, join, single
from sparsemem.units import parse_size
from tests.support import accounting
from tests.support.children import run_child
from tests.support.injector import Injector
from tests.support.kinds import need_disk

BLOCK = 64 << 10
MIB = 1 << 20


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are lent for small work, too."""
    monkeypatch.setattr(workers, "SHARE", 1 << 20)


def plugged(region: Region) -> set[int]:
    return {block for first, count in region.plugged_runs() for block in range(first, first + count)}


# ---- parts ---------------------------------------------------------------------------------------


@given(
    runs=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 40)), min_size=1, max_size=30),
    nparts=st.integers(1, 9),
    chunk_shift=st.integers(12, 18),
    align_shift=st.integers(12, 20),
)
def test_parts_are_disjoint_cut_where_they_may_be_and_together_the_whole(
    runs: list[tuple[int, int]], nparts: int, chunk_shift: int, align_shift: int
) -> None:
    blocks = collect(join(runs), 1000)
    job, parts = ffi.new("sm_job *"), ffi.new("sm_job[]", nparts)
    job.runs, job.nruns, job.shift, job.chunk = blocks.array, blocks.n, 16, 1 << chunk_shift
    align = max(1 << chunk_shift, 1 << align_shift)
    lib.sm_job_split(job, align, parts, nparts)
    pieces: list[tuple[int, int]] = []
    for part in parts:
        pieces += _walk(part)
    assert pieces == sorted(pieces)
    assert sum(length for _, length in pieces) == blocks.total << 16, "none twice"
    whole = [(first << 16, count << 16) for first, count in blocks]
    assert join(pieces) == whole
    starts = {start for start, _ in whole}
    assert all(start % align == 0 for start, _ in pieces if start not in starts)


def _walk(part: Any) -> list[tuple[int, int]]:
    """What the engine would do of a part, each range of it: by its own bookkeeping."""
    work = Work.__new__(Work)
    end = ffi.new("sm_cursor *", (part.nruns, 0))
    return Work._between(work, part, end)


# ---- threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [Anonymous(thp=False), Memfd(thp=False), Memfd(shared=False)], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_work_and_all_of_it_is_done(backend: Backend, threads: int, eager: None) -> None:
    with Region("1G", block_size=BLOCK, backend=backend, threads=threads) as region:
        runs = [(3, 100), (150, 1), (160, 700), (2000, 37)]
        used: set[int] = set()
        _watch(region, used)
        assert region.plug_runs(runs) == 838
        assert (len(used) > 1) is (threads > 1)
        assert region.audit().ok
        assert region.audit().resident_size == 838 * BLOCK
        with region.view(160, 700) as view:
            view[:] = b"\5" * len(view)
        assert region.unplug_runs(runs) == 838
        assert region.audit().ok
        assert region.audit().resident_size == 0


def _watch(region: Region, used: set[int]) -> None:
    """Notes which threads have worked: a quick one may do the parts of two."""
    real, mapping = region._core.mapping.advance, region._core.mapping

    def advance(job: Any, operation: str, budget: int) -> int:
        used.add(threading.get_ident())
        return real(job, operation, budget)

    mapping.advance = advance  # type: ignore[method-assign]


@pytest.mark.promise("plug-all-or-nothing")
@pytest.mark.parametrize("nth", [1, 2, 9, 17])
@pytest.mark.parametrize("after", [0, 4096])
def test_the_first_error_of_any_thread_stops_all_and_all_is_rolled_back(
    nth: int, after: int, eager: None, inject: Injector
) -> None:
    with Region("1G", block_size=BLOCK, backend=Memfd(thp=False, strategy="populate_write"), threads=3) as region:
        region.plug(0)
        with region.view(0) as view:
            view[:] = b"\7" * BLOCK
        inject.step(Step.POPULATE_WRITE, errno=errno.ENOMEM, nth=nth, after=after)
        with pytest.raises(PopulateError) as caught:
            region.plug(16, 600)
        assert caught.value.errno == errno.ENOMEM
        assert caught.value.rolled_back
        assert plugged(region) == {0}
        assert accounting.allocated_bytes(region.fileno()) == BLOCK
        assert region.view(0)[5] == 7
        assert region.plug(16, 600) == 600


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_discard_that_fails_in_one_thread_is_reported_exactly(nth: int, eager: None, inject: Injector) -> None:
    """16 MiB a chunk, 2 MiB a block: the failed chunk's blocks are tainted, what others did is unplugged."""
    with Region("1G", block_size="2M", backend=Memfd(thp=False), threads=2) as region:
        region.plug(0, 32)
        inject.step(Step.PUNCH, errno=errno.EIO, nth=nth)
        with pytest.raises(DiscardError) as caught:
            region.unplug(0, 32)
        error = caught.value
        assert join([*error.discarded, *error.tainted, *error.remaining]) == [(0, 32)]
        assert sum(n for _, n in error.tainted) == 8
        assert plugged(region) == {b for f, n in (*error.tainted, *error.remaining) for b in range(f, f + n)}
        assert accounting.allocated_bytes(region.fileno()) == region.plugged_size
        region.scrub()
        assert region.audit().ok


def test_a_child_makes_threads_of_its_own(eager: None) -> None:
    with Region("1G", block_size=BLOCK, backend=Anonymous(thp=False), threads=2, fork="inherit") as region:
        region.plug(0, 200)

        def child() -> int:
            region.plug(1000, 400)
            return region.audit().resident_size

        assert run_child(child).result() == 600 * BLOCK


def test_without_threads_to_be_had_the_caller_does_it_all(eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the interpreter ends, for one: then the pool takes nothing more."""
    monkeypatch.setattr(workers, "submit", lambda function, argument: None)
    with Region("1G", block_size=BLOCK, threads=4) as region:
        region.plug(0, 1000)
        assert region.audit().resident_size == 1000 * BLOCK


class OneThread:
    """A pool in a process that gets a thread for it, and no other (pids.max, RLIMIT_NPROC)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pool = ThreadPoolExecutor(8, thread_name_prefix="sparsemem")
        self.when_refused: Callable[[], object] = lambda: None
        """Called where a thread is asked for that cannot be had: what it was to do is queued already."""
        self._start = threading.Thread.start
        self._started = False
        monkeypatch.setattr(workers, "_pool", self.pool)
        monkeypatch.setattr(threading.Thread, "start", lambda thread: self._start_one(thread))

    def _start_one(self, thread: threading.Thread) -> None:
        if thread.name.startswith("sparsemem"):
            if self._started:
                self.when_refused()
                raise RuntimeError("can't start new thread")
            self._started = True
        self._start(thread)


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[OneThread]:
    one = OneThread(monkeypatch)
    yield one
    one.pool.shutdown()


def test_what_no_thread_was_to_be_had_for_is_never_called_and_kept_alive_by_nothing(one_thread: OneThread) -> None:
    """It stays in the pool's queue, perhaps for good; whoever was told of it does it himself."""

    class Argument:
        pass

    gate, called, argument = threading.Event(), list[Any](), Argument()
    kept = weakref.ref(argument)
    busy = workers.submit(lambda _: gate.wait(20), None)
    assert busy is not None
    assert workers.submit(called.append, argument) is None
    del argument
    gc.collect()
    assert kept() is None
    gate.set()
    one_thread.pool.shutdown()  # when all that is queued was looked at
    assert called == []


def test_what_a_thread_has_come_for_though_none_could_be_started_is_waited_for(one_thread: OneThread) -> None:
    gate, begun, end = threading.Event(), threading.Event(), threading.Event()

    def function(_: object) -> None:
        begun.set()
        assert end.wait(20)
        raise LookupError

    def while_refused() -> None:
        gate.set()
        assert begun.wait(20)

    one_thread.when_refused = while_refused
    assert workers.submit(lambda _: gate.wait(20), None) is not None
    future = workers.submit(function, None)
    assert future is not None
    assert not future.done()
    end.set()
    with pytest.raises(LookupError):
        future.result(20)


def test_no_part_is_in_two_hands_where_no_further_thread_can_be_started(eager: None, one_thread: OneThread) -> None:
    gate, again = threading.Event(), threading.Event()
    hands: dict[int, list[int]] = {}

    def while_refused() -> None:
        gate.set()
        again.wait(20)

    with Region("1G", block_size=BLOCK, threads=5) as region:
        real, mapping, caller = region._core.mapping.advance, region._core.mapping, threading.get_ident()

        def advance(job: Any, operation: str, budget: int) -> int:
            me, part = threading.get_ident(), int(ffi.cast("uintptr_t", job))
            hands.setdefault(part, [])
            if me not in hands[part]:
                hands[part].append(me)
            if me != caller:
                # The first part that it is given it holds until a second is queued for it.
                assert gate.wait(20)
                if sum(me in those for those in hands.values()) > 1:
                    again.set()
            return real(job, operation, budget)

        mapping.advance = advance  # type: ignore[method-assign]
        one_thread.when_refused = while_refused
        assert region.plug(0, 1000) == 1000
        assert len(hands) == 5
        assert again.is_set(), "the thread there is came for a part that no other could be started for"
        assert all(len(those) == 1 for those in hands.values())
        assert region.audit().ok
        assert region.audit().resident_size == 1000 * BLOCK


@pytest.mark.parametrize(
    ("threads", "error", "names"),
    [(0, ValueError, "threads 0"), (-1, ValueError, "-1"), (1025, ValueError, "1025"), ("2", TypeError, "'2'")],
)
def test_a_number_of_threads_that_makes_no_sense_is_refused(threads: Any, error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        Region("1M", block_size=BLOCK, threads=threads)


@pytest.mark.parametrize(
    ("processors", "size", "huge", "threads"),
    [
        (2, "1M", False, 1),  # not worth handing over
        (2, "1T", False, 2),
        (2, "1T", True, 1),  # a processor is left to others
        (8, "1T", True, 4),
        (8, "128M", True, 1),  # as much as virtio-mem asks for at once
        (8, "128M", False, 2),
        (128, "1T", False, workers.MOST),
        (128, "1T", True, workers.MOST),
        (1, "1T", True, 1),
    ],
)
def test_the_number_of_threads_suits_the_size_the_pages_and_the_machine(
    processors: int, size: str, huge: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: set(range(processors)))
    assert workers.sensible(parse_size(size), huge=huge) == threads
    assert workers.limited(8, 200 << 20) == 3


@pytest.mark.parametrize(
    ("backend", "block_size", "threads"),
    [
        (Memfd(shared=False), "2M", 4),  # its copies are small pages, so all processors
        (Memfd(), "64K", 4),
        (Memfd(), "2M", 2),
    ],
)
def test_a_region_takes_as_many_threads_as_suit_its_memory(
    backend: Memfd, block_size: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: set(range(4)))
    with Region("1G", block_size=block_size, backend=backend) as region:
        work = region._core.work("populate", single(0, region.nblocks, region.nblocks))
        assert len(work._parts) == threads


def test_a_disk_file_is_populated_by_one_thread_unless_more_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_disk(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: set(range(4)))
    for asked, threads in ((None, 1), (2, 2)):
        backend = File(tmp_path / f"f{threads}", delete=True)
        with Region("1G", block_size="64K", backend=backend, threads=asked) as region:
            work = region._core.work("populate", single(0, region.nblocks, region.nblocks))
            assert len(work._parts) == threads


# ---- watched and stopped -------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_progress_only_grows_and_ends_with_all(threads: int) -> None:
    seen: list[tuple[int, int]] = []
    with Region("4G", block_size="2M", backend=Memfd(thp=False), threads=threads) as region:
        region.plug(0, 256, progress=lambda *at: seen.append(at))
        size = 512 * MIB
        assert seen[0] == (0, size)
        assert seen[-1] == (size, size)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert {total for _, total in seen} == {size}
        assert len(seen) > 2, "it was told in between"
        seen.clear()
        region.unplug(0, 256, progress=lambda *at: seen.append(at))
        assert (seen[0], seen[-1]) == ((0, size), (size, size))


@pytest.mark.promise("stops-when-told")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("how", ["cancel", "deadline", "progress raises"])
def test_a_plug_that_is_stopped_leaves_nothing(how: str, threads: int) -> None:
    event = threading.Event()

    def progress(done: int, total: int) -> None:
        if done and how == "cancel":
            event.set()
        if done and how == "progress raises":
            raise LookupError

    errors = {"cancel": OperationCancelledError, "deadline": DeadlineError, "progress raises": LookupError}
    with Region("64G", block_size="2M", backend=Memfd(thp=False), threads=threads, headroom="off") as region:
        region.plug(0)
        deadline = 0.1 if how == "deadline" else None
        with pytest.raises(errors[how]):
            region.plug_runs([(1, 1), (3, 2000)], progress=progress, cancel=event, deadline=deadline)
        assert plugged(region) == {0}
        assert accounting.allocated_bytes(region.fileno()) == 2 * MIB
        stats = region.stats()
        assert (stats.failures, stats.rollbacks, stats.busy_size) == (1, 1, 0)
        assert region.plug(1, 3) == 3


@pytest.mark.promise("stops-when-told")
@pytest.mark.parametrize(("deadline", "most"), [(None, 0.1), (60, 0.05)])
def test_long_work_comes_back_for_who_looks_on_and_more_seldom_for_signals_alone(
    deadline: float | None, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Region("1G", block_size="64K", threads=1) as region:
        mapping, budgets = region._core.mapping, []
        real = mapping.advance

        def advance(job: Any, operation: str, budget_ns: int) -> int:
            budgets.append(budget_ns)
            return real(job, operation, budget_ns)

        monkeypatch.setattr(mapping, "advance", advance)
        region.plug(0, region.nblocks, deadline=deadline)
    assert budgets
    assert max(budgets) <= most * 1e9
    assert max(budgets) > most * 1e9 / 2


def test_a_cancel_that_comes_first_changes_nothing_at_all() -> None:
    event = threading.Event()
    event.set()
    with Region("1G", block_size="2M") as region:
        with pytest.raises(OperationCancelledError, match="0 of 2097152 bytes"):
            region.plug(0, cancel=event)
        with pytest.raises(DeadlineError):
            region.plug(0, deadline=0)
        assert region.stats().system_calls == 0
        assert region.audit().resident_size == 0
        region.plug(0)
        with pytest.raises(OperationCancelledError) as caught:
            region.unplug(0, cancel=event)
        assert (caught.value.discarded, caught.value.remaining) == ((), ((0, 1),))
        assert plugged(region) == {0}


@pytest.mark.promise("stops-when-told")
def test_an_unplug_that_is_cancelled_stops_and_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    event = threading.Event()

    def slow(operation: str, length: int) -> float:
        if operation == "discard":
            count.append(length)
            if len(count) == 3:
                event.set()
        return 0.0

    count: list[int] = []
    with Region("1G", block_size="32M", backend=Simulated(latency=slow)) as region:
        region.plug(0, 8)
        monkeypatch.setattr(engine, "SLICE_NS", 0)
        with pytest.raises(OperationCancelledError) as caught:
            region.unplug_runs([(0, 1), (2, 1), (4, 1), (6, 1)], cancel=event)
        assert caught.value.discarded == ((0, 1), (2, 1))
        assert caught.value.remaining == ((4, 1), (6, 1))
        assert caught.value.tainted == ()
        assert plugged(region) == {1, 3, 4, 5, 6, 7}


@pytest.mark.promise("stops-when-told", found="a mapping of Python's worked to its end, whoever looked on")
@pytest.mark.parametrize("how", ["cancel", "deadline", "progress raises"])
@pytest.mark.parametrize("operation", ["populate", "discard"])
def test_a_mapping_without_an_engine_of_its_own_stops_at_the_next_chunk(
    operation: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    event, now, chunks = threading.Event(), [time.monotonic()], []

    def latency(which: str, length: int) -> float:
        if which == operation:
            chunks.append(length)
            if len(chunks) == 3:
                event.set()
                now[0] += 100
        return 0.0

    def progress(done: int, total: int) -> None:
        if event.is_set():
            raise LookupError

    stops: dict[str, tuple[type[Exception], dict[str, Any]]] = {
        "cancel": (OperationCancelledError, {"cancel": event}),
        "deadline": (DeadlineError, {"deadline": 50}),
        "progress raises": (LookupError, {"progress": progress}),
    }
    error, options = stops[how]
    with Region("1G", block_size="16M", backend=Simulated(latency=latency)) as region:
        region.plug(0, 8)
        chunks.clear()
        event.clear()
        monkeypatch.setattr(engine, "SLICE_NS", 0)
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        with pytest.raises(error):
            region.plug(16, 8, **options) if operation == "populate" else region.unplug(0, 8, **options)
        assert len(chunks) == 3
        assert plugged(region) == (set(range(8)) if operation == "populate" else {3, 4, 5, 6, 7})
        assert region.audit().ok


def test_a_mapping_without_an_engine_of_its_own_tells_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(engine, "SLICE_NS", 0)
    with Region("1G", block_size="2M", backend=Simulated()) as region:
        region.plug(0, 4, progress=lambda *at: seen.append(at))
        assert seen == [(done * MIB, 8 * MIB) for done in (0, 2, 4, 6, 8)]


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"progress": 1}, TypeError, "progress must be callable, not 1"),
        ({"cancel": True}, TypeError, "cancel must be a threading.Event, not True"),
        ({"deadline": "1"}, TypeError, "deadline must be seconds from now, not '1'"),
        ({"deadline": True}, TypeError, "not True"),
        ({"deadline": -1}, ValueError, "deadline -1 is not a number of seconds"),
        ({"deadline": float("nan")}, ValueError, "deadline nan"),
    ],
)
def test_whoever_looks_on_is_checked_before_anything_happens(
    options: dict[str, Any], error: type[Exception], names: str
) -> None:
    with Region("1G", block_size="2M") as region:
        operations: list[Callable[..., object]] = [
            lambda **o: region.plug(0, **o),
            lambda **o: region.plug_runs([(0, 1)], **o),
            lambda **o: region.unplug(0, **o),
            lambda **o: region.unplug_runs([(0, 1)], **o),
        ]
        for operation in operations:
            with pytest.raises(error, match=names):
                operation(**options)
        assert region.stats().failures == 0


def test_two_threads_that_plug_with_helpers_do_not_wait_for_each_other(eager: None) -> None:
    with Region("4G", block_size=BLOCK, backend=Anonymous(thp=False), threads=4) as region:
        threads = [threading.Thread(target=region.plug, args=(i * 4096, 2048)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert region.plugged_blocks == 6 * 2048
        assert region.audit().ok


# ---- many ranges in one call ---------------------------------------------------------------------


vectored = pytest.mark.skipif(
    not probe.vectored(calls.kernel), reason="needs a kernel whose process_madvise works on oneself (6.13)"
)


@vectored
def test_scattered_blocks_take_few_system_calls() -> None:
    blocks = [(i * 2, 1) for i in range(640)]
    with Region("1G", block_size=4096, backend=Anonymous()) as region:
        region.plug_runs(blocks)
        assert region.stats().system_calls == 2 * 640 // 64, "the reset and the populate, 64 ranges each"
        assert region.audit().ok
        assert region.audit().resident_size == 640 * 4096
        with region.view(640, 1) as view:
            view[:] = b"\5" * 4096
        assert not any(region.view(642)), "neighbours are apart"
        before = region.stats().system_calls
        region.plug_runs([(i * 2 + 1, 1) for i in range(640)])  # so that gaps cannot be bridged
        middle = region.stats().system_calls
        region.unplug_runs(blocks)
        assert region.stats().system_calls - middle == 640 // 64
        assert middle - before == 2 * 640 // 64
        assert region.audit().ok
        assert region.audit().resident_size == 640 * 4096


@vectored
@pytest.mark.parametrize("nth", [1, 2, 4])
@pytest.mark.parametrize("after", [0, 4096, 4096 * 37])
def test_a_vectored_populate_that_fails_says_how_far_it_came(nth: int, after: int, inject: Injector) -> None:
    with Region("1G", block_size=4096, backend=Anonymous(strategy="populate_write")) as region:
        region.plug(5001)
        inject.step(Step.POPULATE_WRITE, errno=errno.ENOMEM, nth=nth, after=after)
        with pytest.raises(PopulateError) as caught:
            region.plug_runs([(i * 2, 1) for i in range(640)])
        done = (nth - 1) * 64 + after // 4096
        assert caught.value.populated == done * 4096
        assert caught.value.offset == 2 * done * 4096
        assert plugged(region) == {5001}
        assert region.audit().ok
        assert region.audit().resident_size == 4096


@vectored
@pytest.mark.parametrize("after", [0, 4096 * 37])
def test_a_vectored_discard_that_fails_says_exactly_which(after: int, inject: Injector) -> None:
    with Region("1G", block_size=4096, backend=Anonymous()) as region:
        region.plug(0, 1280)
        inject.step(Step.DONTNEED, errno=errno.EIO, nth=3, after=after)
        with pytest.raises(DiscardError) as caught:
            region.unplug_runs([(i * 2, 1) for i in range(640)])
        done = 2 * 64 + after // 4096
        assert caught.value.discarded == tuple((i * 2, 1) for i in range(done))
        assert caught.value.tainted == ((done * 2, 1),)
        assert caught.value.remaining == tuple((i * 2, 1) for i in range(done + 1, 640))
        region.scrub()
        assert region.audit().ok


def test_what_cannot_be_vectored_is_done_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "vectored", lambda calls: False)
    with Region("1G", block_size=4096, backend=Anonymous()) as region:
        region.plug_runs([(i * 2, 1) for i in range(640)])
        assert region.stats().system_calls == 640  # each of them filled in
        assert region.audit().resident_size == 640 * 4096


def test_locked_memory_is_discarded_all_the_same() -> None:
    """MADV_DONTNEED is EINVAL on locked pages, in a vector, too; the loop has another advice for it."""

    def child() -> int:
        with Region("16M", block_size=4096, backend=Anonymous()) as region:
            region.plug(0, 64)
            assert ctypes.CDLL(None).mlock(ctypes.c_void_p(region.address), ctypes.c_size_t(64 * 4096)) == 0
            region.unplug_runs([(i * 2, 1) for i in range(32)])
            return region.audit().resident_size

    assert run_child(child).result() == 32 * 4096


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("locked", [0, 2, 31], ids=["the first", "the third", "the last"])
@pytest.mark.parametrize("pages", [1, 2], ids=["a part of it", "all of it"])
def test_memory_that_is_locked_in_part_is_discarded_all_the_same(shared: bool, locked: int, pages: int) -> None:
    """Wherever in a vector it is: what comes before it is done, and the loop takes over from there."""

    def child() -> tuple[int, int, bool]:
        blocks = [(i * 2, 1) for i in range(32)]
        with Region("16M", block_size=8192, backend=Anonymous(shared=shared)) as region:
            region.plug(0, 64)
            address = region.address + 2 * locked * 8192 + (2 - pages) * 4096
            assert ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(pages * 4096)) == 0
            unplugged = region.unplug_runs(blocks)
            resident = region.audit().resident_size
            region.plug_runs(blocks)  # its reset is such a discard, too
            return unplugged, resident, region.audit().ok and region.audit().resident_size == 64 * 8192

    assert run_child(child).result() == (32, 32 * 8192, True)


# ---- gaps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [Anonymous(), Memfd()], ids=str)
def test_a_discard_bridges_gaps_that_are_unplugged(backend: Backend) -> None:
    blocks = [(i * 2, 1) for i in range(640)]
    with Region("1G", block_size=4096, backend=backend) as region:
        region.plug_runs(blocks)
        before = region.stats().system_calls
        region.unplug_runs(blocks)
        assert region.stats().system_calls - before == 1
        assert region.audit().resident_size == 0
        assert region.audit().ok
        region.plug_runs(blocks)
        before = region.stats().system_calls
        assert region.unplug_all() == 640
        assert region.stats().system_calls - before == 1


def test_a_gap_that_is_plugged_or_tainted_or_wide_is_left_alone(inject: Injector) -> None:
    with Region("1G", block_size="64K", backend=Anonymous()) as region:
        region.plug_runs([(0, 1), (2, 1), (3, 1), (4, 1), (6, 1), (100, 1)])
        with region.view(3) as view:
            view[:] = b"\3" * BLOCK
        inject.step(Step.DONTNEED, errno=errno.EIO, nth=2)
        inject.step(Step.POPULATE_WRITE, errno=errno.EIO)
        before = region.stats().system_calls
        inject.clear()
        region.unplug_runs([(0, 1), (2, 1), (4, 1), (6, 1), (100, 1)])
        assert region.stats().system_calls - before == 3, "0-2, 4-6 and 100, which is too far away"
        with region.view(3) as view:
            assert view == b"\3" * BLOCK


def test_a_bridged_gap_is_held_as_long_as_it_is_discarded() -> None:
    """Else a block that is plugged there meanwhile would lose what it holds."""
    order: list[str] = []
    with Region("1G", block_size="64K", backend=Memfd(thp=False)) as region:
        region.plug_runs([(0, 1), (2, 1)])
        real = region._core.mapping.advance
        started = threading.Event()

        def advance(job: Any, operation: str, budget: int) -> int:
            if operation == "discard":
                started.set()
                time.sleep(0.1)
                order.append("discarded")
            return real(job, operation, budget)

        region._core.mapping.advance = advance  # type: ignore[method-assign]
        unplug = threading.Thread(target=region.unplug_runs, args=([(0, 1), (2, 1)],))
        unplug.start()
        assert started.wait(10)
        region.plug(1)
        order.append("plugged")
        with region.view(1) as view:
            view[:] = b"\1" * BLOCK
        unplug.join()
        assert order == ["discarded", "plugged"]
        with region.view(1) as view:
            assert view == b"\1" * BLOCK


def test_an_exhausted_backend_is_an_error_with_threads_too(tmpfs_mount: Callable[..., Any], eager: None) -> None:
    from sparsemem import File

    folder = tmpfs_mount(size="32M")
    with Region("1G", block_size="1M", backend=File(folder / "f", delete=True), threads=3, headroom="off") as region:
        region.plug(0, 4)
        with pytest.raises(BackendExhaustedError):
            region.plug(16, 64)
        assert plugged(region) == set(range(4))
        assert accounting.allocated_bytes(region.fileno()) == 4 * MIB
