"""What the other threads of the process notice of a large plug."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from sparsemem._sys import lib
from sparsemem.bench.cases.rivals import PRIVATE
from sparsemem.bench.lab import Lab, Watch
from sparsemem.bench.model import Case, Figures, Measure, Way
from sparsemem.bench.peers import Peers
from sparsemem.region import Region

_WHOLE = "C populate_write, one call"
_PAUSE = 0.0005
_SETTLE = 0.02
_IDLE = 0.5
_BESIDE = (("", False), (", beside a busy Python thread", True))
_SMALL = 4 << 10
_LARGE = 2 << 20


class Ticker:
    """A Python thread that sleeps half a millisecond at a time, and notes how late it was at worst."""

    def __init__(self) -> None:
        self._worst = 0.0
        self._before = time.perf_counter()
        self._stop = False
        self._thread = threading.Thread(target=self._tick)

    def _tick(self) -> None:
        while not self._stop:
            time.sleep(_PAUSE)
            self._worst = self.worst
            self._before = time.perf_counter()

    @property
    def worst(self) -> float:
        """Seconds, what it waits for at this moment included."""
        return max(self._worst, time.perf_counter() - self._before - _PAUSE)

    def start_over(self) -> None:
        """Forgets what was."""
        self._worst = 0.0

    def __enter__(self) -> Ticker:
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._stop = True
        self._thread.join()


@contextmanager
def _busy_thread() -> Iterator[None]:
    """A Python thread that computes without a pause."""
    stop = False

    def compute() -> None:
        while not stop:
            sum(range(100))

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield
    finally:
        stop = True
        thread.join()


@contextmanager
def _ways(block: int, lab: Lab) -> Iterator[list[Way]]:
    size = lab.scale.watched
    ways = [
        lab.in_c(f"{_WHOLE}{beside}", partial(_bare, lab, size, block, busy), memory=size) for beside, busy in _BESIDE
    ]
    ways.append(Way(f"nothing{_BESIDE[1][0]}", partial(_nothing, lab)))
    # As many as the library takes by itself, and one: what a busy thread takes away from that is no processor.
    for name, threads in (("", None), (", 1 thread", 1)):
        for beside, busy in _BESIDE:
            plug = partial(_plug, lab, size, block, threads, busy)
            ways.append(Way(f"sparsemem{name}{beside}", plug, memory=size))
    yield ways


def _plug(lab: Lab, size: int, block: int, threads: int | None, busy: bool) -> Figures:
    with Region(size, block_size=block, threads=threads) as region:
        return _watched(lab, lambda: region.plug(0, region.nblocks), busy)


def _nothing(lab: Lab) -> Figures:
    """What a thread waits for the busy one alone: nobody here wants anything of them."""
    figures = dict(_watched(lab, lambda: time.sleep(_IDLE), True))
    del figures["plug"]
    return figures


def _bare(lab: Lab, size: int, block: int, busy: bool, peers: Peers) -> Figures:
    advice = lib.MADV_HUGEPAGE if block == _LARGE else lib.MADV_NOHUGEPAGE
    with peers.mapping(size, PRIVATE, advice=advice) as base:
        return _watched(lab, lambda: peers.advise(base, size, lib.MADV_POPULATE_WRITE), busy)


def _watched(lab: Lab, work: Callable[[], object], busy: bool) -> Figures:
    """Does it while others look on."""
    with ExitStack() as stack:
        if busy:
            stack.enter_context(_busy_thread())
        ticker = stack.enter_context(Ticker())
        waited = stack.enter_context(lab.peers.watching()) if lab.peers else []
        time.sleep(_SETTLE)  # until they all run
        ticker.start_over()
        watch = Watch()
        work()
        figures = {"plug": watch.lap(), "Python stall": ticker.worst}
    if waited:
        figures["mmap wait"] = waited[0]
    return figures


def _case(name: str, title: str, block: int) -> Case:
    measures = tuple(Measure(measure, _WHOLE) for measure in ("mmap wait", "Python stall", "plug"))
    return Case(name, title, measures, partial(_ways, block))


CASES = (
    _case("stalls-thp", "the longest that other threads wait while 2 MiB blocks are plugged", _LARGE),
    _case("stalls-4k", "the longest that other threads wait while 4 KiB blocks are plugged", _SMALL),
)
