"""A thread of the shim that catches accesses to what is not there, and never takes the GIL."""

from __future__ import annotations

from typing import Any

from attrs import frozen

from sparsemem._sys import ffi, lib
from sparsemem._sys.calls import check
from sparsemem._sys.uffd import Userfaultfd

_AT_ONCE = 256


@frozen
class Caught:
    """One access.

    Attributes:
        offset: Bytes from the start of the mapping; before Linux 5.18 those of its page.
        write: Whether it was a store.
        thread: The thread's id, as `threading.get_native_id()` has it.
    """

    offset: int
    write: bool
    thread: int


class Watch:
    """Owns the thread, which resolves accesses from `start` to `stop`.

    Args:
        uffd: Opened with `Purpose.CATCH`, and registered.
        plugged: A bitmap (`const uint64_t *`) of blocks whose accesses are resolved but not told.
        shift: A block is `1 << shift` bytes.
        address: Where offset 0 is.
        page_size: Bytes that are filled in at once.
        zero_page: Whether private memory gets the zero page, or shared memory what stands for it.
        keeps: What has to outlive the thread.
    """

    def __init__(
        self, uffd: Userfaultfd, plugged: Any, shift: int, address: int, page_size: int, *, zero_page: bool, keeps: Any
    ) -> None:
        self._keeps: Any = (uffd, keeps)
        what = ffi.new("sm_watched *", (uffd.c, plugged, address, page_size, shift, zero_page))
        self._c = ffi.gc(lib.sm_watch_new(what), lib.sm_watch_free)
        if not self._c:
            raise MemoryError("no memory for a watch on stray accesses")

    def start(self) -> None:
        """Starts the thread: apart from making it, so that no interrupt can leave one that nobody stops.

        Raises:
            OSError: There is no thread or descriptor to be had.
        """
        check(lib.sm_watch_start(self._c))

    def wait(self) -> list[Caught]:
        """Waits for accesses, without the GIL; [] once it was stopped and nothing is left."""
        out = ffi.new("sm_stray[]", _AT_ONCE)
        n = lib.sm_watch_wait(self._c, out, _AT_ONCE)
        return [Caught(int(one.offset), bool(one.write), int(one.thread)) for one in out[0:n]]

    def counts(self) -> tuple[int, int]:
        """Accesses caught, and how many of those were too many to be kept; none in a child."""
        caught, dropped = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        lib.sm_watch_counts(self._c, caught, dropped)
        return int(caught[0]), int(dropped[0])

    def stop(self) -> None:
        """Ends the thread, once it has resolved what has come so far; does nothing in a child, which has none."""
        lib.sm_watch_stop(self._c)
        self._keeps = None
