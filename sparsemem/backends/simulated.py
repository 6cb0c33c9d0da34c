"""No memory at all: a deterministic backend for policies, at petabyte scale."""

from __future__ import annotations

import errno as _errno
import os
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator

from attrs import field, frozen

from sparsemem._sys.files import PAGE_SIZE
from sparsemem.backends.base import Backend, Limit, Mapping, Request
from sparsemem.backends.text import options_text
from sparsemem.errors import Cause, ReserveError, Run
from sparsemem.runs import clip
from sparsemem.units import Size, exact_size, parse_size


@frozen
class Fault:
    """A failure at the nth call of an operation.

    Args:
        operation: "populate" or "discard".
        nth: Which call fails, from 1; a call is one chunk of at most 2 MiB.
        errno: The errno that it fails with.
        after: Bytes that are done before it fails.
        repeat: How many calls in a row fail.
    """

    operation: str = field()
    nth: int = field(default=1, kw_only=True)
    errno: int = field(default=_errno.ENOMEM, kw_only=True)
    after: int = field(default=0, kw_only=True)
    repeat: int = field(default=1, kw_only=True)

    @operation.validator
    def _check_operation(self, _: object, operation: str) -> None:
        if operation not in ("populate", "discard"):
            raise ValueError(f"fault on {operation!r}: only 'populate' and 'discard' can fail")

    @nth.validator
    def _check_nth(self, _: object, nth: int) -> None:
        if nth < 1:
            raise ValueError(f"nth={nth}: calls are counted from 1")


def _optional_size(size: Size | None) -> int | None:
    return None if size is None else parse_size(size, "capacity")


def _page_size(size: Size) -> int:
    page = parse_size(size, "page_size")
    if page < 1 or page & (page - 1):
        raise ValueError(f"page_size {page} is not a power of two")
    return page


@frozen(kw_only=True)
class Simulated(Backend):
    """Bookkeeping without memory: nothing can be viewed, everything else works.

    Args:
        capacity: Bytes that all blocks together may take; None is no limit.
        faults: `Fault`s that it has.
        latency: Called as `latency(operation, length)` before each chunk; its
            result is slept for, in seconds.
        page_size: Bytes of the smallest piece.
    """

    capacity: int | None = field(default=None, converter=_optional_size)
    faults: tuple[Fault, ...] = field(default=(), converter=tuple)
    latency: Callable[[str, int], float] | None = None
    simulated_page_size: int = field(default=PAGE_SIZE, converter=_page_size, alias="page_size")

    @property
    def page_size(self) -> int:
        return self.simulated_page_size

    def reserve(self, request: Request) -> SimulatedMapping:
        return SimulatedMapping(self, request)

    def __str__(self) -> str:
        capacity = None if self.capacity is None else exact_size(self.capacity)
        page = None if self.page_size == PAGE_SIZE else exact_size(self.page_size)
        return options_text("simulated", {"capacity": capacity, "page_size": page})


class Intervals:
    """A set of bytes as sorted, disjoint intervals: cheap however large the numbers are."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.total = 0
        """Bytes in all intervals."""

    def within(self, offset: int, length: int) -> int:
        """Bytes of the set in [offset, offset + length)."""
        return sum(n for _, n in clip(self._touching(offset, length), [(offset, length)]))

    def replace(self, offset: int, length: int, present: bool) -> None:
        """Puts a range into the set, or takes it out."""
        if length <= 0:
            return
        self.total += (length if present else 0) - self.within(offset, length)
        end = offset + length
        # All intervals that overlap or touch the range give way to what is left of them.
        low, high = bisect_left(self._ends, offset), bisect_right(self._starts, end)
        before = self._starts[low] if low < high else offset
        after = self._ends[high - 1] if low < high else end
        pieces = [(min(before, offset), max(after, end))] if present else [(before, offset), (end, after)]
        pieces = [(start, stop) for start, stop in pieces if start < stop]
        self._starts[low:high] = [start for start, _ in pieces]
        self._ends[low:high] = [stop for _, stop in pieces]

    def runs(self) -> list[Run]:
        """All of it, as `(offset, length)`."""
        return [(start, end - start) for start, end in zip(self._starts, self._ends, strict=True)]

    def _touching(self, offset: int, length: int) -> list[Run]:
        low, high = bisect_right(self._ends, offset), bisect_left(self._starts, offset + length)
        return [(self._starts[i], self._ends[i] - self._starts[i]) for i in range(low, high)]


class SimulatedMapping(Mapping):
    """Bytes that are in use, as intervals."""

    def __init__(self, backend: Simulated, request: Request) -> None:
        self._backend = backend
        self.size = request.size
        self.page_size = backend.page_size
        self.strategy = "simulated"
        self._used = Intervals()
        self._lock = threading.RLock()
        self._calls = {"populate": 0, "discard": 0}
        self.fork_inherits = request.fork == "inherit"
        self.granule = backend.page_size  # a chunk must not split one, however large it is
        held = sum(length for _, length in request.plugged)
        if backend.capacity is not None and held > backend.capacity:
            raise ReserveError(
                _errno.ENOSPC,
                f"plugged={exact_size(held)} is more than the capacity of {exact_size(backend.capacity)}",
            )
        for offset, length in request.plugged:
            self._mark(offset, length, True)

    def populate(self, offset: int, length: int) -> None:
        self._begin("populate", offset, length)
        with self._lock:
            self._populate(offset, length)

    def _populate(self, offset: int, length: int) -> None:
        new = length - self._used.within(offset, length)
        capacity = self._backend.capacity
        if capacity is not None and self._used.total + new > capacity:
            # As a real backend does: what still fits is taken before it fails.
            fits = (capacity - self._used.total) // self.page_size * self.page_size
            self._mark(offset, min(fits, length), True)
            raise OSError(_errno.ENOSPC, os.strerror(_errno.ENOSPC))
        self._mark(offset, length, True)

    def discard(self, offset: int, length: int) -> None:
        self._begin("discard", offset, length)
        self._mark(offset, length, False)

    def _begin(self, operation: str, offset: int, length: int) -> None:
        if self._backend.latency is not None:
            time.sleep(self._backend.latency(operation, length))
        self._calls[operation] += 1
        for fault in self._backend.faults:
            if fault.operation == operation and 0 <= self._calls[operation] - fault.nth < fault.repeat:
                self._mark(offset, min(fault.after, length) // self.page_size * self.page_size, operation == "populate")
                raise OSError(fault.errno, os.strerror(fault.errno))

    def _mark(self, offset: int, length: int, used: bool) -> None:
        with self._lock:
            self._used.replace(offset, length, used)

    def resident(self, offset: int, length: int) -> Iterator[Run]:
        with self._lock:
            return iter(clip(self._used.runs(), [(offset, length)]))

    def resident_total(self) -> int:
        return self._used.total

    def after_fork_in_child(self) -> None:
        self._lock = threading.RLock()  # a thread that does not exist here may have held it

    def limits(self) -> Iterable[Limit]:
        if self._backend.capacity is not None:
            left = self._backend.capacity - self._used.total
            yield Limit(Cause.CAPACITY, left, "Simulated(capacity=)", _errno.ENOSPC)

    def diagnose(self, errno: int, offset: int) -> Cause:
        capacity = self._backend.capacity
        full = capacity is not None and capacity - self._used.total < self.page_size
        return Cause.CAPACITY if errno == _errno.ENOSPC and full else Cause.UNKNOWN
