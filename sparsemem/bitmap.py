"""A bitmap in C, in little-endian bit order, whose bytes numpy and bitarray can share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

from sparsemem._sys import ffi, lib
from sparsemem.errors import Run

FITS = {"first": lib.SM_FIRST, "last": lib.SM_LAST, "best": lib.SM_BEST}
"""Where `find` puts a run: the lowest place, the highest, or the smallest that holds it."""

_CHUNK = 4096
"""Runs that one call into C fetches."""


def _keep(owner: Any, _: Any) -> None:
    """A destructor that does nothing but hold a reference to the owner of the memory."""


def share(words: Any, nbits: int, owner: Any) -> memoryview:
    """A read-only view of a bitmap's bytes, without a copy, that keeps its owner alive."""
    held = ffi.gc(words, partial(_keep, owner))
    return memoryview(ffi.buffer(held, (nbits + 7) // 8)).toreadonly()


def fit_code(fit: str) -> int:
    """The C value of a fit by name, or a ValueError that lists the names."""
    try:
        return int(FITS[fit])
    except (KeyError, TypeError):
        raise ValueError(f"fit {fit!r} is none of {', '.join(map(repr, FITS))}") from None


def pairs(array: Any, n: int) -> Iterator[Run]:
    """The runs of a C array as tuples; a quarter of the time that its elements take one by one."""
    numbers = iter(memoryview(ffi.buffer(array, n * ffi.sizeof("sm_run"))).cast("Q").tolist() if n else ())
    return zip(numbers, numbers, strict=False)


def in_chunks(fetch: Callable[..., int], start: int, stop: int) -> Iterator[Run]:
    """The runs in [start, stop), which a function of C fetches: see `sm_bits_runs` for its last five arguments.

    The caller takes them from `zip` itself: through a generator each would take half as
    long again.
    """
    return chain.from_iterable(_chunks(fetch, start, stop))


def _chunks(fetch: Callable[..., int], start: int, stop: int) -> Iterator[Iterator[Run]]:
    out, following = ffi.new("sm_run[]", _CHUNK), ffi.new("uint64_t *", start)
    while following[0] < stop:
        n = fetch(following[0], stop, out, _CHUNK, following)
        yield pairs(out, n)


class Bitmap:
    """`nbits` bits, all clear at first.

    Memory is only used for pages of the bitmap that were written to.  Threads may
    set and clear different bits at the same time, of one word too.
    Arguments are not checked; callers have done that.
    """

    __slots__ = ("nbits", "words")

    def __init__(self, nbits: int) -> None:
        words = lib.sm_bits_new(nbits)
        if not words:
            raise MemoryError(f"no address space for a bitmap of {nbits} bits")
        self.words = ffi.gc(words, lambda pointer, free=lib.sm_bits_free: free(pointer, nbits))
        self.nbits = nbits

    def set(self, first: int, count: int = 1) -> None:
        """Sets bits [first, first + count)."""
        lib.sm_bits_fill_shared(self.words, first, count, 1)

    def clear(self, first: int, count: int = 1) -> None:
        """Clears bits [first, first + count)."""
        lib.sm_bits_fill_shared(self.words, first, count, 0)

    def count(self, first: int, count: int) -> int:
        """Set bits among `count` bits."""
        return int(lib.sm_bits_count(self.words, first, count))

    def next(self, start: int, stop: int, value: bool = True) -> int:
        """The first bit of that value in [start, stop), or stop."""
        return int(lib.sm_bits_next(self.words, start, stop, value))

    def find(self, count: int, *, align: int = 1, fit: str = "first") -> int | None:
        """The start of `count` clear bits at a multiple of `align`, or None."""
        where = ffi.new("uint64_t *")
        code = lib.sm_bits_find(self.words, self.nbits, count, align, fit_code(fit), where)
        return int(where[0]) if code == lib.SM_OK else None

    def runs(self, value: bool = True, start: int = 0, stop: int | None = None) -> Iterator[Run]:
        """Maximal runs of that value, ascending."""
        return in_chunks(partial(lib.sm_bits_runs, self.words, value), start, self.nbits if stop is None else stop)

    def buffer(self) -> memoryview:
        """The bytes, read-only and shared: bit n is bit n % 8 of byte n // 8."""
        return share(self.words, self.nbits, self.words)
