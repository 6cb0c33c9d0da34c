"""The warm pool: populated pages held ready, which a plug moves into place.

Moving a huge page takes 2 us, populating it about 90.  The pool is memory of the same
sort as the region's (userfaultfd's UFFDIO_MOVE asks for that), filled from its start
and taken from its end, in the engine's loop.
"""

from __future__ import annotations

import time
from typing import Any

from sparsemem._sys import ffi, lib
from sparsemem.backends.base import Mapping
from sparsemem.engine import UNWATCHED, Control, Work
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

    def fill(self, control: Control = UNWATCHED) -> int:
        """Populates what is missing; the bytes.

        Raises:
            StepFailedError: There was not so much; the pool is as before.
            What `Control.check` raises; likewise.
        """
        hold = self._hold()
        try:
            ready = self.ready
            if ready == self.size:
                return 0
            work = Work(self._pool, "populate", single(ready, self.size - ready, self.size, "byte"), 0)
            try:
                work.run(control)
            except BaseException:
                self._discard(ready)
                raise
            self.c.ready = self.size
            return self.size - ready
        finally:
            lib.sm_hold_release(hold)

    def give_back(self) -> int:
        """Discards all that is ready; the bytes.

        Raises:
            StepFailedError: A discard failed.
        """
        hold = self._hold()
        try:
            ready, self.c.ready = self.ready, 0
            if ready:
                self._discard(0)
            return ready
        finally:
            lib.sm_hold_release(hold)

    def close(self) -> None:
        """Lets go of the memory; for a region that is closed."""
        self.c.ready = 0
        self._pool.close()

    def _discard(self, start: int) -> None:
        Work(self._pool, "discard", single(start, self.size - start, self.size, "byte"), 0).run()

    def _hold(self) -> Any:
        """Keeps all others out, until released or dropped; plugs that come meanwhile go without the pool."""
        hold = ffi.gc(ffi.new("sm_hold *"), lib.sm_hold_release)
        while not lib.sm_hold_take(hold, self.c):
            time.sleep(0.001)
        return hold
