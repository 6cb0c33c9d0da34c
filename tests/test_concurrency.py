"""Eight threads and four processes on the memory of one memfd, with every operation, for a while."""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from sparsemem import Anonymous, BlockStateError, Memfd, Region, ViewsAliveError
from sparsemem.backends import Backend
from tests.support import accounting
from tests.support.children import run_child
from tests.support.evidence import Cases

BLOCK = 64 << 10
PROCESSES, THREADS, OWN, COMMON = 4, 8, 6, 16
SECONDS = float(os.environ.get("SPARSEMEM_LOAD_SECONDS") or (60 if os.environ.get("CI") else 15))
"""A minute in CI."""

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """Whoever hangs is shown, with all threads, and ended.

    By an alarm, which works in a forked child: the thread of `faulthandler.dump_traceback_later` is not there, and to
    set or cancel it there would wait for that thread for ever.
    """
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.unregister(signal.SIGALRM)
        signal.signal(signal.SIGALRM, before)


class Load:
    """What one process does in its part of a shared region: threads with blocks of their own, and common ones.

    Args:
        fd: The memfd.
        first: The first block of the process's part.
        seed: Of its dice.
    """

    def __init__(self, region: Region, first: int, seed: int) -> None:
        self.region = region
        self.first = first
        self.common = range(first + THREADS * OWN, first + THREADS * OWN + COMMON)
        self.seed = seed
        self.until = time.monotonic() + SECONDS
        self.operations = [0] * THREADS
        self.failures: list[BaseException] = []

    def run(self) -> int:
        threads = [threading.Thread(target=self._work, args=(i,)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failures:
            raise self.failures[0]
        return sum(self.operations)

    def _work(self, me: int) -> None:
        chance = random.Random(self.seed * 100 + me)
        mine: dict[int, int] = {}
        first = self.first + me * OWN
        try:
            while time.monotonic() < self.until:
                self._with_own_blocks(chance, mine, range(first, first + OWN))
                self._with_common_blocks(chance)
                self.operations[me] += 2
            for block in range(first, first + OWN):
                assert self.region.is_plugged(block) is (block in mine), "a block was lost"
                if block in mine:
                    self._check(block, mine[block])
        except BaseException as error:
            self.failures.append(error)
            self.until = 0.0

    def _check(self, block: int, byte: int) -> None:
        with self.region.view(block) as view:
            same = bytes(view) == bytes([byte]) * BLOCK
        assert same, f"block {block} does not hold what was written"

    def _with_own_blocks(self, chance: random.Random, mine: dict[int, int], blocks: range) -> None:
        region, block = self.region, chance.choice(blocks)
        if block not in mine:
            region.plug(block)
            self._check(block, 0)
            mine[block] = chance.randrange(1, 256)
            with region.view(block) as view:
                view[:] = bytes([mine[block]]) * BLOCK
        elif chance.random() < 0.3:
            self._check(block, mine[block])
            region.discard(block * BLOCK, BLOCK)
            region.populate(block * BLOCK, BLOCK)
            self._check(block, 0)
            mine[block] = 0
        else:
            self._check(block, mine[block])
            held = [other for other in blocks if other in mine]
            region.unplug_runs([(other, 1) for other in held])
            mine.clear()

    def _with_common_blocks(self, chance: random.Random) -> None:
        """Any thread of the process may change them; what all see must still be a state that was."""
        region = self.region
        first = chance.choice(self.common)
        count = chance.randrange(1, self.common.stop - first + 1)
        with contextlib.suppress(BlockStateError, ViewsAliveError):
            match chance.randrange(6):
                case 0:
                    region.plug(first, count)
                case 1:
                    region.unplug(first, count, missing_ok=True)
                case 2:
                    region.plug(first, count, exist_ok=True)
                case 3:
                    region.discard(first * BLOCK, count * BLOCK)
                case 4:
                    region.populate(first * BLOCK, count * BLOCK)
                case _:
                    with region.view(first) as view:
                        view[7] = 1


@pytest.mark.promise("threads-lose-nothing")
@pytest.mark.promise("no-deadlock")
def test_threads_and_processes_under_load_lose_nothing(cases: Cases) -> None:
    """Each process has a region of its own over the memfd, and by agreement blocks of its own (docs/hazards.md)."""
    part = THREADS * OWN + COMMON
    with watchdog(SECONDS * 3 + 60), Region(PROCESSES * part * BLOCK, block_size=BLOCK, backend=Memfd()) as region:
        fd = region.fileno()

        def child(number: int) -> tuple[int, int]:
            with (
                watchdog(SECONDS * 3 + 30),
                Region(region.size, block_size=BLOCK, backend=Memfd(fd=fd, existing="trust")) as own,
            ):
                operations = Load(own, number * part, number).run()
                counts = own._core.blocks.counts()
                assert (counts.busy, counts.claims, counts.pins, counts.tainted) == (0, 0, 0, 0)
                held = own.plugged_blocks
                audit = own.audit()
                # What others have plugged is a leak to us, but nothing of ours is missing.
                assert not [run for run in audit.gaps if number * part <= run[0] < (number + 1) * part]
                own.unplug_all()
                return operations, held

        answers: list[tuple[int, int]] = []
        errors: list[BaseException] = []

        def look_after(number: int) -> None:
            try:
                answers.append(run_child(child, number, timeout=SECONDS * 3 + 60).result())
            except BaseException as error:
                errors.append(error)

        keepers = [threading.Thread(target=look_after, args=(number,)) for number in range(PROCESSES)]
        for keeper in keepers:
            keeper.start()
        for keeper in keepers:
            keeper.join()
        assert not errors
        assert accounting.allocated_bytes(fd) == 0, "all was given back, whoever it was of"
        assert region.audit().ok
        cases.add(sum(operations for operations, _ in answers))


@pytest.mark.promise("no-deadlock")
@pytest.mark.parametrize("backend", [Anonymous(), Memfd(), Memfd(shared=False)], ids=str)
@pytest.mark.parametrize(
    ("pest", "victim"),
    [
        (lambda r: r.discard(0, 2 * BLOCK), lambda r: r.populate(0, BLOCK)),
        (lambda r: r.discard(0, mmap.PAGESIZE), lambda r: r.populate(0, 4 * BLOCK)),
        (lambda r: (r.unplug(2, 2, missing_ok=True), r.plug(2, 2, exist_ok=True)), lambda r: r.populate(0, BLOCK)),
        (lambda r: (r.unplug(3, missing_ok=True), r.plug(3, exist_ok=True)), lambda r: r.plug(0, 8, exist_ok=True)),
        (lambda r: r.populate(0, 2 * BLOCK), lambda r: r.discard(0, BLOCK)),
    ],
    ids=["discard-populate", "page-blocks", "beside", "replug-plug", "populate-discard"],
)
def test_nobody_is_starved_by_who_never_stops(
    backend: Backend, pest: Callable[[Region], object], victim: Callable[[Region], object], cases: Cases
) -> None:
    """In the kernel a populate that races a discard of the same pages never ends; here the two take turns."""
    turns, pests = 0, 3
    stop = threading.Event()

    def never_stop() -> None:
        while not stop.is_set():
            with contextlib.suppress(BlockStateError):
                pest(region)

    with watchdog(120), Region("16M", block_size=BLOCK, backend=backend) as region:
        region.plug(0, 8)
        threads = [threading.Thread(target=never_stop) for _ in range(pests)]
        for thread in threads:
            thread.start()
        try:
            while turns < 60:
                with contextlib.suppress(BlockStateError):
                    victim(region)
                turns += 1
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert region.stats().busy_size == 0
        cases.add(turns)
