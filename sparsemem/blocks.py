"""The block map: which blocks are plugged, busy and tainted, and who holds which.

It touches no memory but its own.  One mutex guards the three bitmaps; it lives
in C and is only held within one call, so never while Python code runs.  Hence a
finaliser in garbage collection may take it, user code never runs under it, and
a KeyboardInterrupt sees either nothing or all of what a call does.
"""

from __future__ import annotations

import enum
import errno
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

from sparsemem._sys import ffi, lib
from sparsemem.bitmap import fit_code, in_chunks, share
from sparsemem.budget import Budget
from sparsemem.errors import (
    BlockStateError,
    ForkedRegionError,
    RegionClosedError,
    ReserveError,
    Run,
    ViewsAliveError,
)
from sparsemem.runs import EMPTY, Runs, normalise

# How long one call waits for blocks that somebody else holds, before Python gets
# to look at signals.
_WAIT_MS = 50

# The same where somebody may stop the waiting, which is promised within 50 ms.
_WATCHED_MS = 40

# Runs that may come into being between counting and fetching them.
_SPARE_RUNS = 64

_uninitialised = ffi.new_allocator(should_clear_after_alloc=False)


class Want(enum.IntEnum):
    """What an operation is going to do with the blocks it claims."""

    TO_PLUGGED = lib.SM_TO_PLUGGED
    TO_UNPLUGGED = lib.SM_TO_UNPLUGGED
    WITHIN_PLUGGED = lib.SM_WITHIN_PLUGGED
    TAINTED_ONLY = lib.SM_TAINTED_ONLY
    PENDING_ONLY = lib.SM_PENDING_ONLY
    AS_IT_IS = lib.SM_AS_IT_IS
    WHOLE = lib.SM_WHOLE


class Map(enum.IntEnum):
    """The bitmaps."""

    PLUGGED = lib.SM_MAP_PLUGGED
    BUSY = lib.SM_MAP_BUSY
    TAINTED = lib.SM_MAP_TAINTED
    PENDING = lib.SM_MAP_PENDING


class BlockMap:
    """The state of all blocks of one region.  Thread-safe."""

    def __init__(self, nblocks: int, block_size: int, page_size: int, budget: Budget | None = None) -> None:
        self.c = ffi.gc(lib.sm_blocks_new(nblocks, block_size, page_size), lib.sm_blocks_free)
        if not self.c:
            raise ReserveError(errno.ENOMEM, f"no address space for a map of {nblocks} blocks; see ulimit -v")
        self.nblocks = nblocks
        self._block_size = block_size
        self.budget = budget
        if budget is not None:
            lib.sm_blocks_set_budget(self.c, budget.c)

    def adopt(self, runs: Runs) -> None:
        """Blocks that start out plugged.

        Raises:
            BackendExhaustedError: The budget does not cover them.
        """
        if lib.sm_blocks_adopt(self.c, runs.array, runs.n) == lib.SM_BUDGET:
            assert self.budget is not None
            self.budget.refuse(runs.total * self._block_size)

    def abandon(self) -> None:
        """Gives what is plugged back to the budget, for a region that goes without being closed."""
        lib.sm_blocks_abandon(self.c)

    # ---- reading -----------------------------------------------------------------------

    def counts(self) -> Any:
        """`plugged`, `tainted`, `busy`, `pending`, `pins` and `claims`, of one moment."""
        out = ffi.new("sm_counts *")
        lib.sm_blocks_counts(self.c, out)
        return out

    def count(self, which: Map, first: int, count: int) -> int:
        """Blocks among [first, first + count) whose bit is set."""
        return int(lib.sm_blocks_count(self.c, which, first, count))

    def runs(self, which: Map, value: bool, start: int = 0, stop: int | None = None) -> Iterator[Run]:
        """Maximal ascending runs; fetched in chunks, so a snapshot only of a quiet region."""
        return in_chunks(
            partial(lib.sm_blocks_runs, self.c, which, value), start, self.nblocks if stop is None else stop
        )

    def runs_array(self, which: Map, value: bool) -> memoryview:
        """The same at one moment, as an array of uint64, two a run."""
        n = following = 0
        while following < self.nblocks:
            room = int(lib.sm_blocks_count_runs(self.c, which, value)) + _SPARE_RUNS
            out, next_one = _uninitialised("sm_run[]", room), ffi.new("uint64_t *")
            n = int(lib.sm_blocks_runs(self.c, which, value, 0, self.nblocks, out, room, next_one))
            following = int(next_one[0])  # before the end if so many came into being meanwhile
        # Through a view, and cut to size there: a buffer of no bytes cannot be cast.
        return memoryview(ffi.buffer(out)).cast("Q")[: 2 * n]

    def find(self, count: int, align: int, fit: str) -> int | None:
        """A run that could be plugged now: not plugged, not busy, not tainted."""
        where = ffi.new("uint64_t *")
        code = lib.sm_blocks_find(self.c, count, align, fit_code(fit), where)
        return int(where[0]) if code == lib.SM_OK else None

    def plugged_buffer(self) -> memoryview:
        """The plugged bitmap, read-only and shared."""
        return share(lib.sm_blocks_plugged(self.c), self.nblocks, self.c)

    @property
    def plugged_words(self) -> Any:
        """The plugged bitmap, as C has it; valid while `c` is referred to."""
        return lib.sm_blocks_plugged(self.c)

    def check_open(self) -> None:
        """Raises what an operation would raise if the region is closed or was forked."""
        state = lib.sm_blocks_state(self.c)
        if state != lib.SM_OK:
            _refuse(state, 0, "use")

    @property
    def is_open(self) -> bool:
        """Whether it is neither closed nor a child's copy that must not be used."""
        return bool(lib.sm_blocks_state(self.c) == lib.SM_OK)

    @property
    def forked(self) -> bool:
        """Whether this is a child's copy that must not be used."""
        return bool(lib.sm_blocks_state(self.c) == lib.SM_FORKED)

    # ---- discarded pages -----------------------------------------------------------------

    def mark_pages(self, runs: Runs, discarded: bool) -> None:
        """Remembers pages that were discarded inside plugged blocks; byte runs, none to make room for them."""
        if lib.sm_blocks_mark_pages(self.c, runs.array, runs.n, discarded) == lib.SM_NOMEM:
            raise MemoryError("no address space for the map of discarded pages")

    def discarded_pages(self, start: int, stop: int) -> Iterator[Run]:
        """Runs of pages discarded inside plugged blocks."""
        return in_chunks(partial(lib.sm_blocks_discarded_runs, self.c), start, stop)

    # ---- pins and fork --------------------------------------------------------------------

    def pin(self, first: int, count: int) -> Any:
        """An object that pins the blocks for as long as it lives; count 0 only holds off close.

        Raises:
            BlockStateError: A block is not plugged, or tainted.
        """
        pin = ffi.gc(lib.sm_pin_new(first, count), lib.sm_pin_drop)
        where = ffi.new("uint64_t *")
        code = lib.SM_BUSY
        while code == lib.SM_BUSY:
            code = lib.sm_pin_take(self.c, pin, threading.get_ident(), _WAIT_MS, where)
        if code != lib.SM_OK:
            _refuse(code, where[0], "view", plugged=False)
        return pin

    def watch(self, watched: bool) -> None:
        """Whether somebody listens, so that the short way is barred; only while a claim on everything is held."""
        lib.sm_blocks_watch(self.c, watched)

    def after_fork(self, *, refuse: bool) -> None:
        """In a child: taints what other threads had in hand, and closes the map if it is the parent's alone."""
        lib.sm_blocks_after_fork(self.c, refuse, threading.get_ident())


class Claim:
    """The right to change some blocks: taken and finished in one call each.

    It is made before anything happens and has no effect until `take`.  One that
    is dropped while open (an interrupt in the handling of an interrupt) leaves
    its blocks tainted.
    """

    def __init__(self, blocks: BlockMap, runs: Runs) -> None:
        self._blocks = blocks  # the C side refers to it
        self._c = ffi.gc(lib.sm_claim_new(runs.array, runs.n), lib.sm_claim_drop)
        if not self._c:
            raise MemoryError(f"no memory for {runs.n} runs")

    @property
    def open(self) -> bool:
        """Whether it is taken and not yet finished."""
        return bool(self._c.blocks)

    @property
    def runs(self) -> Runs:
        """The claimed runs; valid while the claim lives."""
        return Runs(self._c.runs, self._c.nruns)

    def take(self, want: Want, strict: bool = True, look: Callable[[], object] | None = None) -> None:
        """Claims all runs or nothing, waiting for those that others hold.

        Args:
            want: What is going to happen.
            strict: Refuse blocks that are in the target state already; for
                WHOLE, refuse while views live.
            look: Called now and then while others are waited for; what it raises ends that.

        Raises:
            BlockStateError: A block's state does not allow it.
            ViewsAliveError: A view pins a block.
            RegionClosedError: The region is closed, or was forked.
        """
        where = ffi.new("uint64_t *")
        wait = _WAIT_MS if look is None else _WATCHED_MS
        while True:
            code = lib.sm_claim_take(self._blocks.c, self._c, want, strict, threading.get_ident(), wait, where)
            if code != lib.SM_BUSY:
                break
            if look is not None:
                look()
        if code != lib.SM_OK:
            _refuse(code, where[0], _VERBS[want], plugged=want is Want.TO_PLUGGED)

    def take_fit(self, count: int, align: int, fit: str) -> int | None:
        """Finds and claims a run that can be plugged, with nobody in between; its start or None."""
        code = lib.SM_BUSY
        while code == lib.SM_BUSY:
            code = lib.sm_claim_take_fit(
                self._blocks.c, self._c, count, align, fit_code(fit), threading.get_ident(), _WAIT_MS
            )
        if code == lib.SM_NOFIT:
            return None
        if code != lib.SM_OK:
            _refuse(code, 0, "plug")
        return int(self._c.runs[0].first)

    def select(self, which: Map, value: bool) -> Runs:
        """The parts of the claimed runs whose bit has that value."""
        n = lib.sm_claim_select(self._c, which, value, ffi.NULL, 0)
        if n == 0:
            return EMPTY
        out = ffi.new("sm_run[]", n)
        lib.sm_claim_select(self._c, which, value, out, n)
        return Runs(out, n)

    def bridge(self, victims: Runs, most: int) -> Runs:
        """Victims, runs within the claim, joined over unplugged gaps of at most `most` blocks.

        The gaps are claimed, too; where somebody uses one, or has plugged it within the claim, it stays a gap.
        """
        if most == 0 or victims.n < 2:
            return victims
        out = ffi.new("sm_run[]", victims.n)
        ffi.memmove(out, victims.array, ffi.sizeof("sm_run") * victims.n)
        return Runs(out, lib.sm_claim_bridge(self._c, most, out, victims.n))

    def charge(self, size: int) -> None:
        """Takes bytes from the budget, if there is one; given back unless the claim ends plugged.

        Raises:
            BackendExhaustedError: The budget does not cover it.
        """
        budget = self._blocks.budget
        if budget is not None and lib.sm_claim_charge(self._c, size) == lib.SM_BUDGET:
            budget.refuse(size)

    def finish(
        self,
        *,
        plugged: Runs = EMPTY,
        unplugged: Runs = EMPTY,
        tainted: Runs = EMPTY,
        healed: Runs = EMPTY,
        pending: Runs = EMPTY,
        empty: Runs = EMPTY,
        close: bool = False,
    ) -> int:
        """Sets what came of it and gives the blocks back, all at once; the number of blocks changed.

        Args:
            plugged: What is plugged now.
            unplugged: What is unplugged now, and discarded.
            tainted: What is in an unknown state.
            healed: What is so no more.
            pending: Of `unplugged`, what is still to be discarded.
            empty: Of `plugged`, what has no memory; `mark_pages` has made room to remember that.
            close: Close the map.
        """
        lists = (plugged, unplugged, tainted, healed, pending, empty)
        outcome = ffi.new("sm_outcome *", (*(runs.array for runs in lists), *(runs.n for runs in lists)))
        return int(lib.sm_claim_finish(self._c, outcome, close))


_VERBS = {
    Want.TO_PLUGGED: "plug",
    Want.TO_UNPLUGGED: "unplug",
    Want.WITHIN_PLUGGED: "use",
    Want.TAINTED_ONLY: "scrub",
    Want.PENDING_ONLY: "flush",
    Want.AS_IT_IS: "save",
    Want.WHOLE: "close",
}


def _refuse(code: int, block: int, verb: str, *, plugged: bool = False) -> NoReturn:
    if code == lib.SM_STATE:
        state = "already plugged" if plugged else "not tainted" if verb == "scrub" else "not plugged"
        raise BlockStateError(f"cannot {verb}: block {block} is {state}; nothing was changed", block=block)
    if code == lib.SM_TAINTED:
        raise BlockStateError(
            f"cannot {verb}: block {block} is tainted by an earlier failure; scrub() mends it", block=block
        )
    if code == lib.SM_PINNED:
        raise ViewsAliveError(f"cannot {verb}: a view that is still alive uses block {block} or the whole region")
    if code == lib.SM_SELF:
        raise BlockStateError(
            f"cannot {verb}: this thread is already changing these blocks, or one that waits for this thread is "
            "(calls from within listeners?)"
        )
    if code == lib.SM_FORKED:
        raise ForkedRegionError(
            f"cannot {verb}: the region belongs to the parent process (fork='inherit' would share it)"
        )
    if code == lib.SM_CLOSED:
        raise RegionClosedError(f"cannot {verb}: the region is closed")
    raise AssertionError(f"unexpected code {code}")


def runs_of(pairs: list[Run], limit: int) -> Runs:
    """Runs from Python pairs that are known to be right."""
    if not pairs:
        return EMPTY
    return normalise(ffi.new("sm_run[]", pairs), len(pairs), limit)
