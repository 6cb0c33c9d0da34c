"""Runs: ascending, disjoint `(first, count)` pairs, as a C array.

What a caller hands over is converted and checked once, here; everything below
works on the array.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, SupportsIndex, Union

from sparsemem._sys import ffi, lib
from sparsemem.bitmap import Bitmap, pairs
from sparsemem.errors import BlockRangeError, Run

RunsInput = Union["Runs", Iterable["tuple[SupportsIndex, SupportsIndex]"], memoryview, Any]
"""Pairs in any order, or a C-contiguous uint64 buffer of shape (n, 2) such as a numpy array."""

_RUN_BYTES = ffi.sizeof("sm_run")


class Runs:
    """An immutable, normalised array of runs; units are whatever the owner counts in."""

    __slots__ = ("array", "n")

    def __init__(self, cdata: Any, n: int) -> None:
        self.array = cdata
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Run]:
        return pairs(self.array, self.n)

    def __repr__(self) -> str:
        return f"Runs({list(self)!r})"

    @property
    def total(self) -> int:
        """Units in all runs together."""
        # Mostly there is one.  A call of C gives the GIL away, and beside a busy Python thread
        # each costs 5 ms: that is how long one that wants it back has to wait.
        return int(self.array[0].count if self.n == 1 else lib.sm_runs_total(self.array, self.n))

    def scaled(self, shift: int) -> Runs:
        """The same in units `1 << shift` times as small."""
        return self.within(0, 1 << (63 - shift), shift=shift)

    def fill(self, bitmap: Bitmap, value: bool) -> None:
        """Sets or clears the bits of the runs, which must be within the bitmap."""
        lib.sm_bits_fill_runs(bitmap.words, self.array, self.n, value)

    def whole(self, bitmap: Bitmap, shift: int) -> Runs:
        """Of the units of `1 << shift` bits that the runs touch, those whose bits are all set."""
        out = ffi.new("sm_run[]", self.n)
        return Runs(out, int(lib.sm_bits_whole(bitmap.words, self.array, self.n, shift, out)))

    @property
    def bounds(self) -> tuple[int, int]:
        """Where the first run begins and the last one ends; there must be one."""
        last = self.array[self.n - 1]
        return int(self.array[0].first), int(last.first + last.count)

    def are_multiples(self, unit: int) -> bool:
        """Whether all of them begin and end at multiples of a power of two."""
        return bool(lib.sm_runs_aligned(self.array, self.n, unit))

    def within(self, first: int, count: int, *, base: int = 0, shift: int = 0) -> Runs:
        """The parts in [first, first + count), as offsets from `first`, in units `1 << shift` times as small.

        Args:
            first: Where the window begins.
            count: How long it is.
            base: Added to the offsets, after they were scaled.
            shift: What they are scaled by.
        """
        out = ffi.new("sm_run[]", self.n)
        return Runs(out, int(lib.sm_runs_within(self.array, self.n, (first, count), base, shift, out)))

    def widened(self, shift: int) -> Runs:
        """The units of `1 << shift` that the runs touch."""
        out = ffi.new("sm_run[]", self.n)
        return Runs(out, int(lib.sm_runs_widen(self.array, self.n, shift, out)))


EMPTY = Runs(ffi.new("sm_run[]", 0), 0)


def index_of(value: object, what: str) -> int:
    """An integer, or a TypeError that names what it should have been."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{what} must be an integer, not {value!r}") from None


def single(first: object, count: object, limit: int, unit: str = "block") -> Runs:
    """One run, checked against `limit` units.

    Raises:
        TypeError: Not integers.
        BlockRangeError: Empty, negative or beyond the limit.
    """
    start, n = index_of(first, f"first {unit}"), index_of(count, f"{unit} count")
    if n < 1:
        raise BlockRangeError(f"{unit} count {n} is not positive")
    if start < 0 or start + n > limit:
        raise BlockRangeError(f"{unit}s {start} to {start + n - 1} are not all within 0 to {limit - 1}")
    return Runs(ffi.new("sm_run[]", [(start, n)]), 1)


def collect(runs: RunsInput, limit: int, unit: str = "block") -> Runs:
    """Runs from anything that holds pairs: copied, sorted, neighbours joined.

    Raises:
        TypeError: Not pairs of integers.
        BlockRangeError: A run is empty, negative, beyond the limit, or overlaps another.
    """
    if isinstance(runs, Runs):
        flat, n = runs.array, runs.n
    else:
        flat = _flat_from_buffer(runs)
        if flat is None:
            flat = _flat_from_pairs(runs, unit)
        n = len(flat) * 8 // _RUN_BYTES
    cdata = ffi.new("sm_run[]", n)
    ffi.memmove(cdata, flat, n * _RUN_BYTES)
    return normalise(cdata, n, limit, unit)


def normalise(cdata: Any, n: int, limit: int, unit: str = "block") -> Runs:
    """Sorts and joins the runs in place and checks them against `limit`."""
    count, bad = ffi.new("size_t *", n), ffi.new("sm_run *")
    code = lib.sm_runs_normalise(cdata, count, limit, bad)
    if code == lib.SM_OK:
        return Runs(cdata, count[0])
    run = f"run ({bad.first}, {bad.count})"
    if code == lib.SM_EMPTY:
        raise BlockRangeError(f"{run}: {unit} count 0 is not positive")
    if code == lib.SM_RANGE:
        raise BlockRangeError(f"{run} is not all within {unit}s 0 to {limit - 1}")
    raise BlockRangeError(f"{run} overlaps another run of the same call")


def _flat_from_buffer(runs: RunsInput) -> Any:
    try:
        view = memoryview(runs)  # type: ignore[arg-type]
    except TypeError:
        return None
    if view.ndim != 2 or view.shape[1] != 2 or view.itemsize != 8 or view.format not in ("Q", "L", "N"):  # type: ignore[index]
        raise TypeError(
            f"a buffer of runs must be uint64 of shape (n, 2), not format {view.format!r} and shape {view.shape}"
        )
    if not view.c_contiguous:
        raise TypeError("a buffer of runs must be C-contiguous")
    return array("Q", view.tobytes())


def _flat_from_pairs(runs: Any, unit: str) -> array[int]:
    try:
        iter(runs)
    except TypeError:
        raise TypeError(f"runs must be pairs (first, count) of integers, not {runs!r}") from None
    pairs = runs if isinstance(runs, (list, tuple)) else list(runs)
    try:
        # As sets, in C: a loop that checks each pair in Python takes 3 times as long.  And the
        # numbers as one list, for all that follows is a quarter faster on that (measured).
        numbers = list(chain.from_iterable(pairs))
        if not set(map(len, pairs)) <= {2} or bool in set(map(type, numbers)):
            raise TypeError
        return array("Q", numbers)
    except OverflowError:
        worst = next(pair for pair in pairs if not all(0 <= number < 1 << 64 for number in pair))
        raise BlockRangeError(f"run {tuple(worst)}: {unit}s count from 0 and stay below 2**63") from None
    except TypeError:
        raise TypeError("runs must be pairs (first, count) of integers") from None


# ---- plain Python pairs: the rare paths ------------------------------------------


def join(runs: Iterable[Run]) -> list[Run]:
    """Runs in any order, perhaps overlapping, as ascending maximal ones."""
    joined: list[Run] = []
    for first, count in sorted(runs):
        if joined and first <= sum(joined[-1]):
            joined[-1] = (joined[-1][0], max(first + count, sum(joined[-1])) - joined[-1][0])
        else:
            joined.append((first, count))
    return joined


def to_blocks(runs: Iterable[Run], shift: int) -> list[Run]:
    """Byte runs widened to whole blocks of `1 << shift` bytes and joined."""
    return join((start >> shift, -(-(start + length) >> shift) - (start >> shift)) for start, length in runs)


def clip(runs: Iterable[Run], kept: Iterable[Run]) -> list[Run]:
    """The parts of ascending runs that lie in other ascending runs."""
    within = list(kept)
    parts, j = [], 0
    for first, count in runs:
        while j < len(within) and sum(within[j]) <= first:
            j += 1
        i = j
        while i < len(within) and within[i][0] < first + count:
            low = max(first, within[i][0])
            parts.append((low, min(first + count, sum(within[i])) - low))
            i += 1
    return parts


def subtract(runs: Iterable[Run], gone: Iterable[Run]) -> list[Run]:
    """The parts of ascending runs that do not lie in other ascending runs."""
    parts, holes, j = [], list(gone), 0
    for first, count in runs:
        at, end = first, first + count
        while j < len(holes) and sum(holes[j]) <= at:
            j += 1
        i = j
        while i < len(holes) and holes[i][0] < end:
            if holes[i][0] > at:
                parts.append((at, holes[i][0] - at))
            at = max(at, sum(holes[i]))
            i += 1
        if at < end:
            parts.append((at, end - at))
    return parts
