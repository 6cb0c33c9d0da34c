"""The warm pool: populated pages held ready, which a plug moves into place.

Moving a huge page takes 2 us, populating it about 90.  The pool is memory of the same
sort as the region's (userfaultfd's UFFDIO_MOVE asks for that), filled from its start
and taken from its end, in the engine's loop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from sparsemem._sys import ffi, lib
from sparsemem.backends.base import Mapping
from sparsemem.engine import Work
from sparsemem.errors import BlockStateError
from sparsemem.runs import single


class Warm:
    """Memory held ready for one region; thread-safe.

    Args:
        mapping: The region's.
        size: Bytes, whole blocks.

    Raises:
        UnsupportedError: Nothing can be moved into the region's memory; says why.
        ReserveError: The kernel refused.
    """

    def __init__(self, mapping: Mapping, size: int) -> None:
        self._pool = mapping.spare(size)
        self.size = size
        self.c: Any = ffi.new("sm_warm *")
        self.c.base = ffi.cast("char *", self._pool.address)
        self.c.size, self.c.unit = size, self._pool.granule
        mapping.draw_from(self.c)

    @property
    def ready(self) -> int:
        """Bytes held ready."""
        return int(self.c.ready)

    def fill(self, populate: Callable[[Work], object] = Work.run, look: Callable[[], object] | None = None) -> int:
        """Populates what is missing; the bytes.

        Args:
            populate: What does the work.
            look: Called now and then while another thread has the pool; what it raises ends that.

        Raises:
            BlockStateError: This thread is filling it already, in whose progress we are.
            What `populate` and `look` raise; the pool is as before.
        """
        if self._mine():
            raise BlockStateError("cannot refill: this thread is already at it (a call from within its progress=?)")
        hold = self._hold(look)
        try:
            ready, missing = self.ready, self.size - self.ready
            if missing:
                try:
                    populate(Work(self._pool, "populate", single(ready, missing, self.size, "byte"), 0))
                except BaseException:
                    self._discard(ready)
                    raise
                self.c.ready = self.size
            return missing
        finally:
            lib.sm_hold_release(hold)

    def give_back(self) -> int:
        """Discards all that is ready; the bytes.  None of it while it is in somebody's hands.

        Those are not waited for: who fills it may wait for blocks that we have, by its
        progress or for a discard that was put off.

        Raises:
            StepFailedError: A discard failed.
        """
        hold = ffi.gc(ffi.new("sm_hold *"), lib.sm_hold_release)
        if not self._take(hold):
            return 0
        try:
            ready, self.c.ready = self.ready, 0
            if ready:
                self._discard(0)
            return ready
        finally:
            lib.sm_hold_release(hold)

    def close(self) -> None:
        """Lets go of the memory, once nobody fills it; for a region that is closed."""
        if self._mine():
            return  # the memory goes with the last who refers to it
        hold = self._hold()
        self.size = self.c.ready = 0  # whoever comes later finds nothing missing
        self._pool.close()
        lib.sm_hold_release(hold)

    def after_fork(self) -> None:
        """In a child: nothing is held ready, and nothing will be, for only the parent can move pages."""
        self.size = self.c.ready = self.c.owner = self.c.held = 0

    def _discard(self, start: int) -> None:
        Work(self._pool, "discard", single(start, self.size - start, self.size, "byte"), 0).run()

    def _mine(self) -> bool:
        return bool(self.c.owner == threading.get_ident())

    def _take(self, hold: Any) -> bool:
        return bool(lib.sm_hold_take(hold, self.c, threading.get_ident()))

    def _hold(self, look: Callable[[], object] | None = None) -> Any:
        """Keeps all others out, until released or dropped; plugs that come meanwhile go without the pool."""
        hold = ffi.gc(ffi.new("sm_hold *"), lib.sm_hold_release)
        while not self._take(hold):
            if look is not None:
                look()
            time.sleep(0.001)
        return hold
