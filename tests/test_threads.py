"""Overlapping operations wait for each other, disjoint ones run side by side, and nothing is lost."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sparsemem import (
    Anonymous,
    BlockRangeError,
    BlockStateError,
    DeadlineError,
    ListenerVetoError,
    Memfd,
    OperationCancelledError,
    Region,
    Simulated,
)
from sparsemem.backends import Backend
from sparsemem.blocks import Map
from tests.support.children import run_child

BLOCK = 64 << 10


class Gate:
    """Holds populates of the simulated backend until it is opened, and tells who is inside."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.inside = threading.Semaphore(0)

    def __call__(self, operation: str, length: int) -> float:
        if operation == "populate":
            self.inside.release()
            assert self.open.wait(20)
        return 0.0


def start(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def test_disjoint_operations_run_side_by_side() -> None:
    gate = Gate()
    with Region("1M", block_size=BLOCK, backend=Simulated(latency=gate)) as region:
        threads = [start(lambda i=i: region.plug(i)) for i in range(4)]
        for _ in range(4):
            assert gate.inside.acquire(timeout=10), "one waited for another"
        assert region.stats().busy_size == 4 * BLOCK
        gate.open.set()
        for thread in threads:
            thread.join()
        assert region.plugged_blocks == 4


def test_overlapping_operations_wait_and_then_see_what_came_of_it() -> None:
    gate, outcome = Gate(), []
    with Region("1M", block_size=BLOCK, backend=Simulated(latency=gate)) as region:

        def second() -> None:
            try:
                region.plug(2, 4)
            except BlockStateError as error:
                outcome.append(error.block)

        first = start(lambda: region.plug(0, 4))
        assert gate.inside.acquire(timeout=10)
        waiting = start(second)
        waiting.join(0.2)
        assert waiting.is_alive()
        assert not outcome
        gate.open.set()
        first.join()
        waiting.join()
        assert outcome == [2]
        assert list(region.plugged_runs()) == [(0, 4)]


def test_an_unplug_waits_for_the_plug_of_the_same_blocks() -> None:
    gate = Gate()
    with Region("1M", block_size=BLOCK, backend=Simulated(latency=gate)) as region:
        first = start(lambda: region.plug(0, 4))
        assert gate.inside.acquire(timeout=10)
        second = start(lambda: region.unplug(0, 4))
        gate.open.set()
        first.join()
        second.join()
        assert region.plugged_blocks == 0
        assert region.audit().ok


@pytest.mark.promise("threads-lose-nothing")
def test_two_who_look_for_room_never_get_the_same() -> None:
    found: list[int | None] = []
    with Region("4M", block_size=BLOCK, backend=Simulated()) as region:
        threads = [start(lambda: found.extend(region.plug_fit(2) for _ in range(4))) for _ in range(8)]
        for thread in threads:
            thread.join()
        assert sorted(found) == list(range(0, 64, 2))
        assert region.plug_fit(1) is None


@pytest.mark.promise("threads-lose-nothing")
def test_concurrent_resizes_each_do_their_share_or_look_again() -> None:
    """Blocks that one has taken while another still looked are no error, and what each says it did adds up."""
    for _ in range(20):
        with Region("4M", block_size=BLOCK, backend=Simulated()) as region:
            targets = (5, 40, 17, 60, 1, 33)
            with ThreadPoolExecutor(len(targets)) as pool:
                changes = list(pool.map(lambda blocks, region=region: region.resize(blocks * BLOCK), targets))
            assert sum(changes) == region.plugged_size
            assert region.audit().ok
            region.resize(12 * BLOCK)
            assert region.plugged_blocks == 12


@pytest.mark.promise("threads-lose-nothing")
@pytest.mark.parametrize("backend", [Anonymous(), Memfd(), Memfd(shared=False)], ids=str)
def test_eight_threads_lose_no_block(backend: Backend) -> None:
    """Each thread owns some blocks, whose content it checks, and all meddle with the common rest."""
    faulthandler.dump_traceback_later(60, exit=True)
    failures: list[BaseException] = []
    deadline = time.monotonic() + 1.5

    def work(me: int) -> None:
        chance = random.Random(me)
        mine = dict.fromkeys(range(me * 4, me * 4 + 4), 0)
        try:
            while time.monotonic() < deadline:
                block = chance.choice(list(mine))
                if not mine[block]:
                    region.plug(block)
                    mine[block] = chance.randrange(1, 256)
                    with region.view(block) as view:
                        assert not any(view[::4096])
                        view[:] = bytes([mine[block]]) * len(view)
                else:
                    with region.view(block) as view:
                        assert view[0] == view[-1] == mine[block]
                    region.unplug(block)
                    mine[block] = 0
                common = 32 + chance.randrange(32)
                with contextlib.suppress(BlockStateError, BlockRangeError):
                    chance.choice([region.plug, region.unplug])(common, chance.randrange(1, 5))
            for block, byte in mine.items():
                assert region.is_plugged(block) is bool(byte)
        except BaseException as error:
            failures.append(error)

    with Region("4M", block_size=BLOCK, backend=backend) as region:
        threads = [start(lambda me=me: work(me)) for me in range(8)]
        for thread in threads:
            thread.join()
        faulthandler.cancel_dump_traceback_later()
        assert not failures
        counts = region._core.blocks.counts()
        assert (counts.busy, counts.claims, counts.pins) == (0, 0, 0)
        assert region.audit().ok


@pytest.mark.promise("no-deadlock")
def test_finalisers_of_views_never_deadlock_in_garbage_collection() -> None:
    """They run in whichever thread collects, in the middle of an operation, too."""
    stop = threading.Event()

    class Cycle:
        def __init__(self, view: memoryview) -> None:
            self.view, self.me = view, self

    def litter() -> None:
        while not stop.is_set():
            for block in range(4):
                Cycle(region.view(block))
            gc.collect()

    with Region("1M", block_size=BLOCK) as region:
        region.plug(0, 4)
        threads = [start(litter) for _ in range(2)]
        threshold = gc.get_threshold()
        gc.set_threshold(20)
        try:
            for _ in range(20):
                region.plug(8, 2)
                region.unplug(8, 2)
        finally:
            gc.set_threshold(*threshold)
            stop.set()
            for thread in threads:
                thread.join(20)
                assert not thread.is_alive()
        gc.collect()
        assert region.stats().views == 0


@pytest.mark.promise("no-deadlock")
def test_listeners_of_two_threads_that_want_each_others_blocks_get_an_error_and_not_a_deadlock() -> None:
    """One of them gives way: its callback's error vetoes its plug, and the other one goes on."""

    def child() -> tuple[int, bool]:
        meet, inner = threading.Barrier(2), threading.local()

        class Greedy:
            def on_plug(self, first: int, count: int) -> None:
                if not hasattr(inner, "plug"):
                    inner.plug = True
                    meet.wait(5)
                    region.plug(1 - first)

            def on_unplug(self, first: int, count: int) -> None:
                pass

        refused: list[ListenerVetoError] = []

        def plug(block: int) -> None:
            try:
                region.plug(block)
            except ListenerVetoError as error:
                refused.append(error)

        with Region("1M", block_size=BLOCK) as region:
            greedy = Greedy()
            region.add_listener(greedy)
            threads = [start(lambda i=i: plug(i)) for i in (0, 1)]
            for thread in threads:
                thread.join()
            assert region.stats().busy_size == 0
            assert region.audit().ok
            return len(refused), all(isinstance(error.__cause__, BlockStateError) for error in refused)

    refused, as_state = run_child(child, timeout=10).result()
    assert refused >= 1
    assert as_state


# ---- told to stop while others are waited for ------------------------------------------------------


@contextlib.contextmanager
def held(region: Region, gate: Gate) -> Iterator[None]:
    """Another thread plugs block 0, and has it as long as this lasts."""
    gate.open.clear()
    thread = start(lambda: region.plug(0))
    assert gate.inside.acquire(timeout=10)
    try:
        yield
    finally:
        gate.open.set()
        thread.join()


WAITING: dict[str, Callable[..., object]] = {
    "plug": lambda region, **stop: region.plug(0, 2, exist_ok=True, **stop),
    "plug_runs": lambda region, **stop: region.plug_runs([(0, 1), (4, 1)], **stop),
    "plug without memory": lambda region, **stop: region.plug(0, populate=False, **stop),
    "unplug": lambda region, **stop: region.unplug(0, 2, missing_ok=True, **stop),
    "unplug_runs": lambda region, **stop: region.unplug_runs([(0, 2), (4, 1)], missing_ok=True, **stop),
}


@pytest.mark.promise("stops-when-told", found="nobody looked at cancel and deadline while others had the blocks")
@pytest.mark.parametrize("how", ["cancel", "deadline"])
@pytest.mark.parametrize("operation", WAITING)
def test_who_waits_for_blocks_can_be_stopped_and_has_changed_nothing(operation: str, how: str) -> None:
    gate, cancel = Gate(), threading.Event()
    cancel.set()
    stop: dict[str, Any] = {"cancel": cancel} if how == "cancel" else {"deadline": 0}
    with Region("1M", block_size=BLOCK, backend=Simulated(latency=gate)) as region:
        gate.open.set()
        region.plug(1)
        gate.inside.acquire()
        with held(region, gate):
            with pytest.raises((OperationCancelledError, DeadlineError)) as caught:
                WAITING[operation](region, **stop)
            assert list(region.plugged_runs()) == [(1, 1)], "the other has not finished"
            assert region.stats().busy_size == BLOCK
        assert isinstance(caught.value, OperationCancelledError) is (how == "cancel")
        assert (caught.value.discarded, caught.value.tainted) == ((), ())
        assert caught.value.remaining == (((1, 1),) if operation.startswith("unplug") else ())
        assert list(region.plugged_runs()) == [(0, 2)]


def test_a_flush_that_waits_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, cancel = Gate(), threading.Event()
    cancel.set()
    with Region("1M", block_size=BLOCK, backend=Simulated(latency=gate), unplug_delay=1000) as region:
        gate.open.set()
        region.plug(0)
        gate.inside.acquire()
        region.unplug(0)
        blocks = region._core.blocks
        runs = blocks.runs
        # As if the other had come just after the look at what is busy.
        monkeypatch.setattr(blocks, "runs", lambda which, *a: iter(()) if which is Map.BUSY else runs(which, *a))
        with held(region, gate), pytest.raises(OperationCancelledError) as caught:
            region.flush(cancel=cancel)
        assert caught.value.remaining == ((0, 1),)
        assert list(region.plugged_runs()) == [(0, 1)]
