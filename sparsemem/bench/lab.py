"""Where cases are run: what they may use, warm memory, and the rounds."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType

from sparsemem.bench.model import Case, Figures, Result, Row, Scale, Way
from sparsemem.bench.peers import Peers, compiled
from sparsemem.errors import DeadlineError, SparseMemError
from sparsemem.region import Region

_GRAIN = 2 << 20
_MARGIN = 16 << 20
_MOST_THREADS = 16

FAILURES = (SparseMemError, OSError, MemoryError)
"""What keeps one way from being run, and no other."""


class Lab:
    """What the cases may use.

    Attributes:
        scale: How much to measure.
        processors: How many this process may use.
    """

    def __init__(self, scale: Scale, peers: Peers | str, numpy: ModuleType | str) -> None:
        self.scale = scale
        self.processors = len(os.sched_getaffinity(0))
        self._deadline = None if scale.seconds is None else time.monotonic() + scale.seconds
        self._peers = peers
        self._numpy = numpy

    def threads(self) -> Iterator[tuple[str, int, str]]:
        """One thread, and one for each processor, up to 16 as in QEMU: a name, how many, and why they cannot be had."""
        yield "1 thread", 1, ""
        threads = min(_MOST_THREADS, self.processors)
        yield "all threads", threads, "" if threads > 1 else "there is one processor only"

    def check_time(self) -> None:
        """Goes on if there is time.

        Raises:
            DeadlineError: There is none left; fewer rounds would be no measurement.
        """
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise DeadlineError(f"no time is left of the {self.scale.seconds:g} s that --{self.scale.name} has")

    @property
    def peers(self) -> Peers | None:
        """The peers in C, if they could be compiled."""
        return None if isinstance(self._peers, str) else self._peers

    def in_c(self, name: str, run: Callable[[Peers], Figures], *, memory: int = 0, reason: str = "") -> Way:
        """A way that needs the peers in C."""
        peers = self._peers
        if isinstance(peers, str):
            return Way(name, reason=peers)
        return Way(name, lambda: run(peers), reason, memory)

    def in_numpy(self, name: str, run: Callable[[ModuleType], Figures], *, memory: int = 0) -> Way:
        """A way that needs numpy."""
        numpy = self._numpy
        if isinstance(numpy, str):
            return Way(name, reason=numpy)
        return Way(name, lambda: run(numpy), memory=memory)


@contextmanager
def laboratory(scale: Scale) -> Iterator[Lab]:
    """With all that this machine has; what it has not is skipped with the reason."""
    with ExitStack() as stack:
        peers: Peers | str
        try:
            peers = stack.enter_context(compiled())
        except SparseMemError as error:
            peers = str(error)
        numpy: ModuleType | str
        try:
            import numpy
        except ImportError:
            numpy = "numpy is not installed"
        yield Lab(scale, peers, numpy)


def run_case(case: Case, lab: Lab) -> Result:
    """All ways in turn, round after round, another one first each time; the first round warms up and does not count."""
    try:
        lab.check_time()
        gc.collect()  # what the case before has left shall not be this one's burden
        with case.ways(lab) as ways:
            return _run_ways(case, ways, lab)
    except FAILURES as error:
        return Result(case, skipped={"": explain(error)})


def _run_ways(case: Case, ways: Iterable[Way], lab: Lab) -> Result:
    skipped = {way.name: way.reason for way in ways if way.reason}
    kept = [way for way in ways if not way.reason]
    rounds_of: dict[str, list[Figures]] = {way.name: [] for way in kept}
    for turn in range(1 + lab.scale.rounds):
        lab.check_time()
        begin = turn % len(kept) if kept else 0
        for way in kept[begin:] + kept[:begin]:
            if way.name in skipped:
                continue
            try:
                warm(way.memory)
                rounds_of[way.name].append(way.run())
            except FAILURES as error:
                skipped[way.name] = explain(error)
    rows = [
        Row(measure.name, way.name, tuple(figures[measure.name] for figures in rounds_of[way.name][1:]))
        for measure in case.measures
        for way in kept
        if way.name not in skipped and measure.name in rounds_of[way.name][0]
    ]
    return Result(case, tuple(rows), skipped)


def warm(size: int) -> None:
    """Leaves the kernel with so much free memory that the host has given it already.

    In a virtual machine the first touch of a page costs 3 to 10 times as much, and a
    free huge page goes back to the host after a while (free page reporting).  What is
    populated and freed here is what the next allocation gets.
    """
    if size:
        size += size // 16 + _MARGIN
        with Region(-(-size // _GRAIN) * _GRAIN, block_size=_GRAIN, name="warm reserve") as reserve:
            reserve.plug(0, reserve.nblocks)
            reserve.unplug_all()


def explain(error: BaseException) -> str:
    """An error as a reason, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


class Watch:
    """Seconds since it was made, or since it was last looked at."""

    def __init__(self) -> None:
        self._since = time.perf_counter_ns()

    def lap(self) -> float:
        """Reads it and starts it again."""
        now = time.perf_counter_ns()
        took, self._since = now - self._since, time.perf_counter_ns()
        return took / 1e9
