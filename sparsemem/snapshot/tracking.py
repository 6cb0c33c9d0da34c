"""What has changed since the last save, so that the next one need only save that.

Three sources together, for none sees all of it (each fact measured on 6.18):

- The kernel notes stores of this process (`_sys.residency.written_pages`), by whatever way they
  come through the page tables.  Peers have page tables of their own.
- A page that somebody else discarded in a file keeps its mark, and so may count as not written,
  and reads zero in any case.  Those discarded inside plugged blocks the block map knows.
- Blocks that were unplugged and plugged again: a listener is told.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

from sparsemem._sys import ffi, lib
from sparsemem.bitmap import Bitmap
from sparsemem.engine import Work
from sparsemem.errors import Run, SnapshotError, UnsupportedError
from sparsemem.operations import Core, Join, execute
from sparsemem.runs import clip


class Tracker:
    """Follows one region, from the first save on; thread-safe.

    Until then it has no bitmaps: they are made in the first save's turn, which one thread has at a time.

    Without a lock that an interrupt could leave held: each block's bits are only touched by who has
    its claim, the rest by whoever has the turn to save.

    Changes are kept until a save that has them has got its name: one that fails, or is
    cancelled, loses none of them.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._pid = os.getpid()
        self._page = core.mapping.page_size
        self._per_block = core.block_size // self._page
        self._changed: Bitmap
        self._saving: Bitmap
        self._turn: Any = ffi.new("sm_warm *")  # of which only the lock is used
        self.base: str | None = None
        """The id of the last save."""
        self.files: tuple[tuple[int, int], ...] = ()
        """Device and inode of the snapshots that it needs, itself included."""

    # ---- what the region tells ------------------------------------------------------------

    def on_plug(self, first: int, count: int) -> None:
        """A freshly plugged block is another one than it was."""
        self._changed.set(first * self._per_block, count * self._per_block)

    def on_unplug(self, first: int, count: int) -> None:
        """What is gone is in no snapshot; if it comes back, `on_plug` is told."""

    # ---- what a save asks -------------------------------------------------------------------

    @contextlib.contextmanager
    def save(self, last: str | None) -> Iterator[None]:
        """One save; what `take` gave comes back unless `commit` was called.

        Args:
            last: The id that the last save is believed to have; None believes nothing.

        Raises:
            SnapshotError: It has another one; or there is a save already, for which this one
                does not wait: who is told of a plug may want to save, while that save waits
                for the plug.
            UnsupportedError: The kernel cannot tell of such memory what was written to.
        """
        if os.getpid() != self._pid:
            raise UnsupportedError("changes are tracked for the process that made the region, not for a forked child")
        # Whoever saves holds it, however that ends: it goes with the object, if not before.
        hold = ffi.gc(ffi.new("sm_hold *"), lib.sm_hold_release)
        try:
            if not lib.sm_hold_take(hold, self._turn, threading.get_ident()):
                raise SnapshotError("another save with dirty= of the same region is under way")
            self._check_last(last)
            self._begin()
            try:
                self._give_back()  # of one that was interrupted in the line below
                yield
            finally:
                self._give_back()
                lib.sm_hold_release(hold)
        finally:
            lib.sm_hold_release(hold)  # where an interrupt has kept the lines above from it

    def _check_last(self, last: str | None) -> None:
        if last is not None and last != self.base:
            was = "there was none" if self.base is None else f"that had the id {self.base}"
            raise SnapshotError(
                f"what has changed since the snapshot with the id {last} is unknown: it is not the last one "
                f"of this region that was saved with dirty= ({was})"
            )

    def _begin(self) -> None:
        if not any(known is self for known in self._core.listeners):
            self._core.mapping.track()
            npages = self._core.mapping.size // self._page
            self._changed, self._saving = Bitmap(npages), Bitmap(npages)
            # It is told of all that is plugged: all of it has changed.
            execute(Join(self._core, self))

    def take(self, plugged: list[Run]) -> list[Run]:
        """What has changed in byte runs of plugged blocks, whose claim the caller holds; in bytes.

        From now on it counts as unchanged.
        """
        mapping, page = self._core.mapping, self._page
        found: list[Run] = []
        for offset, length in plugged:
            # What the kernel has told once it does not tell again: until that is noted, all of it has changed.
            self._saving.set(offset // page, length // page)
            found += mapping.written(offset, length)
            first = offset // page
            gone = [(at * page, n * page) for at, n in self._core.blocks.discarded_pages(first, first + length // page)]
            # They are found again next time all the same, and a mark would look like a page that is there.
            Work(mapping, "unprotect", self._core.byte_runs(gone), 0).run()
            found += gone
        taken: list[Run] = []
        for offset, length in found:
            self._changed.set(offset // page, length // page)
        for offset, length in plugged:
            first, end = offset // page, (offset + length) // page
            self._saving.clear(first, end - first)
            taken += clip(list(self._changed.runs(True, first, end)), [(first, end - first)])
        # In this order: an interrupt in between has them changed in both.
        for first, count in taken:
            self._saving.set(first, count)
        for first, count in taken:
            self._changed.clear(first, count)
        return [(first * page, count * page) for first, count in taken]

    def commit(self, identity: str, file: tuple[int, int], *, full: bool) -> None:
        """What was taken is in a snapshot that has got its name."""
        # In this order: an interrupt in between has the next save hold too much, and never too little.
        self.files = (file,) if full else (*self.files, file)
        self.base = identity
        self._saving = Bitmap(self._saving.nbits)

    def _give_back(self) -> None:
        for first, count in list(self._saving.runs()):
            self._changed.set(first, count)
            self._saving.clear(first, count)
