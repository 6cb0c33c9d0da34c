"""The region: a large sparse mapping whose blocks are plugged and unplugged.

This module is about order only: it rejects what is wrong before anything
happens, hands the operation on, and answers questions.  The sequences
themselves are in `operations`, the state in `blocks`, the memory in `backends`.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

from sparsemem import fork as _fork
from sparsemem.advice import Advise, huge_runs, warn_of_split
from sparsemem.audit import Audit
from sparsemem.audit import audit as _audit
from sparsemem.backends import Anonymous
from sparsemem.backends.base import Backend, Mapping, Request
from sparsemem.backends.protection import check_protection
from sparsemem.bitmap import fit_code
from sparsemem.blocks import BlockMap, Claim, Map, Want
from sparsemem.budget import Budget
from sparsemem.deferral import Deferral, check_deferral
from sparsemem.engine import UNWATCHED, Control
from sparsemem.errors import (
    BlockRangeError,
    DiscardError,
    RegionClosedError,
    ReserveError,
    Run,
    SparseMemError,
    UnsupportedError,
)
from sparsemem.geometry import check_block_size, check_name, check_size, check_threads, check_warm
from sparsemem.headroom import Gauge, Headroom, check_mode
from sparsemem.headroom import read as _read_headroom
from sparsemem.listeners import Listener
from sparsemem.operations import (
    Close,
    Core,
    Inner,
    Join,
    Leave,
    Plug,
    Unplug,
    check_listens,
    execute,
    flush,
    plug_at_once_error,
    protect,
    refill,
    require_discard,
    resize,
    unplug_at_once_error,
)
from sparsemem.runs import Runs, RunsInput, clip, collect, index_of, single, subtract
from sparsemem.snapshot import Snapshot, Tracker, opened
from sparsemem.snapshot import save as _save
from sparsemem.statistics import Stats, Tally
from sparsemem.stray import Catcher, StrayAccess, check_callback
from sparsemem.units import Size, exact_size, parse_size
from sparsemem.views import make_view
from sparsemem.warm import Warm

if TYPE_CHECKING:
    from typing_extensions import Self


_log = logging.getLogger("sparsemem")

Progress = Callable[[int, int], object]
"""Told `(bytes done, bytes in all)`."""


class BlockState(enum.Enum):
    """The state of one or several blocks."""

    PLUGGED = "plugged"
    UNPLUGGED = "unplugged"
    MIXED = "mixed"


class Region:
    """A reservation of `size` bytes, in blocks that are plugged and unplugged.

    Reserving costs nothing.  A plugged block is populated: every byte of it can
    be read and written without a fault that could fail.  An unplugged block
    holds no data and no memory; touching it is a stray access (with shared
    memory even a read allocates), which `audit()` finds.

    All methods are thread-safe: operations on overlapping blocks wait for each
    other, others run in parallel.

    Args:
        size: Bytes, a multiple of the block size.
        block_size: Bytes, a power of two, at least the backend's page size.
            Default: 2 MiB, a transparent huge page or the backend's page,
            whichever is largest.
        backend: Where the memory comes from; `Anonymous()` by default.
        headroom: "check" refuses a plug up front that limits would not allow;
            "off" finds out by trying, which at a control group's limit means
            the OOM killer.
        dump: Whether core dumps contain the memory.
        fork: "refuse" makes the region unusable in a forked child (private
            memory reads zero there); with "inherit" the child has it too.  Then
            private memory is copied on write and the two go separate ways, while
            shared memory stays one, though each keeps a bitmap of its own: what
            the child unplugs is gone for the parent.
        threads: How many threads may work on one operation; each gets 64 MiB at
            least.  By default as many as suit the size and the machine: one for
            each processor, up to 16; for huge pages one for every second processor, up
            to 16, with 256 MiB each; one for a shared file on a disk.
        unplug_delay: Seconds by which discards are put off, to be done together: at
            the first operation after that time, at `flush()`, or when memory runs
            out.  Until then the blocks are unplugged like others, but hold memory.
            Peers that share the memory see its content until then.
        reuse: What a block reads that is plugged again before its discard: "zero",
            or "keep" for whatever it held (or zero, if the discard came first).
        protection: What keeps accesses off unplugged blocks.  "none": nothing, as in QEMU.
            "trap": userfaultfd; an access is SIGBUS and a system call EFAULT, for no
            memory at all, but without transparent huge pages.  Not on files on disks.
            "guard": guard pages, SIGSEGV and EFAULT; they take page tables, 2 MiB for
            each GiB of the region, and 4 to 10 s for each TiB when it is made (measured).
            Not on hugetlb.  "prot_none": mprotect, SIGSEGV and EFAULT; works on all kernels and
            mappings, but each run of plugged blocks is a mapping of its own then, of
            which a process has 65530 (vm.max_map_count): an unplug that finds none left
            is a `DiscardError` that has changed nothing.  See docs/hazards.md.
        catch_stray: With protection="trap": called with a `StrayAccess` after each access to
            an unplugged block, which is let through instead (system calls are EFAULT all
            the same, and not told).  It runs in a thread of the region's, outside of all
            locks; what it raises is logged.  An access is told once a page: what it leaves
            there lets later ones pass, until the next plug of the block discards it.
        warm: Bytes of populated memory held ready, whole blocks, which plugs move
            into place; filled now and by `refill()`, given back when memory runs
            out.  For private anonymous memory, where the kernel can move it.
        plugged: Runs of blocks that start out plugged.  Of an adopted file they
            are taken to hold data already, which stays; fresh memory is populated.
            A plug of any other block discards first: two regions over one file
            must agree on who has which blocks.
        budget: A `Budget` that it shares with other regions.
        name: Shown in /proc/PID/maps where the kernel can, and as a memfd's name.

    Raises:
        ValueError: A size or option that does not fit; names value and rule.
        ReserveError: The kernel refused; nothing is left behind.
        UnsupportedError: The machine has no such thing.
    """

    _closed = True  # of an object whose __init__ never began

    def __init__(
        self,
        size: Size,
        *,
        block_size: Size | None = None,
        backend: Backend | None = None,
        headroom: str = "check",
        dump: bool = False,
        fork: str = "refuse",
        protection: str = "none",
        catch_stray: Callable[[StrayAccess], object] | None = None,
        threads: int | None = None,
        unplug_delay: float | None = None,
        reuse: str = "zero",
        warm: Size | None = None,
        plugged: RunsInput = (),
        budget: Budget | None = None,
        name: str = "sparsemem",
    ) -> None:
        backend = Anonymous() if backend is None else backend
        if not isinstance(backend, Backend):
            raise TypeError(f"backend must be a Backend such as Memfd(), not {backend!r}")
        if fork not in _fork.MODES:
            raise ValueError(f"fork {fork!r} is none of {', '.join(map(repr, _fork.MODES))}")
        if budget is not None and not isinstance(budget, Budget):
            raise TypeError(f"budget must be a Budget, not {budget!r}")
        if not isinstance(dump, bool):
            raise TypeError(f"dump must be True or False, not {dump!r}")
        self._threads = check_threads(threads)
        deferral = check_deferral(unplug_delay, reuse)
        if deferral is not None and fork == "inherit":
            raise ValueError("unplug_delay does not go with fork='inherit': late discards would hit the other's blocks")
        self._protection = check_protection(protection)
        check_callback(catch_stray, protection)
        if deferral is not None and protection != "none":
            raise ValueError(
                f"unplug_delay does not go with protection={protection!r}: "
                "what is unplugged and still has its memory would not be protected"
            )
        self._headroom = check_mode(headroom)
        self._backend = backend
        self._page_size = backend.page_size
        self._block_size = check_block_size(block_size, backend, self._page_size)
        self._size = check_size(size, self._block_size)
        self._fork = fork
        self._name = check_name(name)
        given = collect(plugged, self.nblocks)
        ready = check_warm(warm, self._block_size)
        blocks = BlockMap(self.nblocks, self._block_size, self._page_size, budget)
        try:
            self._catcher: Catcher | None = None
            blocks.adopt(given)  # before the backend touches anything, for the budget may refuse
            self._mapping: Mapping = _reserve(backend, self._request(given, dump, catch=catch_stray is not None))
            if self._mapping.protection != protection:
                raise UnsupportedError(f"{backend} has no protection={protection!r}")
            self._address = self._mapping.address
            self._core = Core(
                mapping=self._mapping,
                blocks=blocks,
                block_size=self._block_size,
                gauge=Gauge(self._mapping.limits, headroom),
                tally=Tally(),
                threads=self._threads,
                deferral=_deferrable(deferral, self._mapping),
                warm=Warm(self._mapping, ready) if ready else None,
            )
            self._tracker = Tracker(self._core)  # idle, and next to nothing, until a save asks for it
            refill(self._core)
            self._adopt(given)
            if catch_stray is not None:
                self._catcher = _catch(self._core, catch_stray)
            _fork.register(self._core)
            self._closed = False  # last: what is interrupted before was never open
        except BaseException:
            blocks.abandon()
            if hasattr(self, "_catcher") and self._catcher is not None:
                self._catcher.stop()
            if hasattr(self, "_core") and self._core.warm is not None:
                self._core.warm.close()
            if hasattr(self, "_mapping"):
                self._mapping.abandon()
            raise

    def _request(self, given: Runs, dump: bool, *, catch: bool) -> Request:
        block = self._block_size
        return Request(
            size=self._size,
            block_size=block,
            fork=self._fork,
            dump=dump,
            name=self._name,
            protection=self._protection,
            catch=catch,
            plugged=tuple((first * block, count * block) for first, count in given),
        )

    def _adopt(self, given: Runs) -> None:
        """Starts blocks plugged that hold data: those given, and those the backend found.

        In this order: what may fail first, and at last what loses data for good.
        """
        core = self._core
        found = [(first >> core.shift, count >> core.shift) for first, count in self._mapping.adopted]
        found = subtract(found, given)
        core.blocks.adopt(core.block_runs(found))
        protect(core, look=self._headroom == "check")
        for offset, length in self._mapping.unpopulated:
            execute(Inner(core, self._pages(offset, length), "repopulate", spend=not self._mapping.adopts_pages))
        self._mapping.settle()

    # ---- facts ----------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes reserved."""
        return self._size

    @property
    def block_size(self) -> int:
        """Bytes of a block."""
        return self._block_size

    @property
    def nblocks(self) -> int:
        """Blocks in all."""
        return self._size // self._block_size

    @property
    def page_size(self) -> int:
        """Bytes of the backend's page, the unit of `discard` and `populate`."""
        return self._page_size

    @property
    def plugged_blocks(self) -> int:
        """Blocks that are plugged."""
        return int(self._core.blocks.counts().plugged)

    @property
    def plugged_size(self) -> int:
        """Bytes that are plugged."""
        return self.plugged_blocks * self._block_size

    @property
    def backend(self) -> Backend:
        """The description that the region was made from."""
        return self._backend

    @property
    def fresh(self) -> str:
        """What a freshly plugged block reads: "zero", or "file" for a template."""
        return self._mapping.fresh

    @property
    def can_unplug(self) -> bool:
        """Whether the backend can give memory back (memfd_secret cannot)."""
        return self._mapping.can_discard

    @property
    def protection(self) -> str:
        """What keeps accesses off unplugged blocks: "none", "trap", "guard" or "prot_none"."""
        return self._protection

    @property
    def name(self) -> str:
        """Its name in /proc/PID/maps, where the kernel can."""
        return self._name

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._closed

    @property
    def address(self) -> int:
        """Where block 0 is in this process.

        Raises:
            RegionClosedError: It is nowhere any more.
            UnsupportedError: The backend has no memory.
        """
        self._core.blocks.check_open()
        if self._address is None:
            self._mapping.owner()  # says why not
        return self._address  # type: ignore[return-value]

    def fileno(self) -> int:
        """The descriptor whose offset 0 is block 0; it belongs to the region.

        Raises:
            RegionClosedError: It is closed.
            UnsupportedError: The memory has no descriptor.
        """
        self._core.blocks.check_open()
        return self._mapping.fileno()

    def offset(self, block: int) -> int:
        """The byte offset at which a block begins.

        Raises:
            BlockRangeError: There is no such block.
        """
        return next(iter(single(block, 1, self.nblocks)))[0] * self._block_size

    def blocks(self, offset: int, length: int, round: str = "exact") -> Run:
        """The blocks of a byte range.

        Args:
            offset: Where it begins, in bytes.
            length: How long it is, in bytes.
            round: "exact" refuses a range that is not made of whole blocks,
                "inward" takes only whole ones, "outward" all that it touches.

        Returns:
            `(first, count)`; the count may be 0 with "inward".

        Raises:
            BlockRangeError: Not within the region, or not exact.
        """
        ((offset, length),) = single(offset, length, self._size, "byte")
        block, end = self._block_size, offset + length
        if round == "outward":
            first, last = offset // block, -(-end // block)
        elif round == "inward":
            first, last = -(-offset // block), end // block
        elif round == "exact":
            first, last = offset // block, end // block
            if offset % block or end % block:
                raise BlockRangeError(
                    f"bytes {offset} to {end - 1} are not whole blocks of {exact_size(block)}; "
                    "round='inward' or 'outward' rounds them"
                )
        else:
            raise ValueError(f"round {round!r} is none of 'exact', 'inward', 'outward'")
        return first, max(0, last - first)

    # ---- state ----------------------------------------------------------------------------

    def is_plugged(self, first: int, count: int = 1) -> bool:
        """Whether all of these blocks are plugged.

        Raises:
            BlockRangeError: There are no such blocks.
        """
        return self.state(first, count) is BlockState.PLUGGED

    def state(self, first: int, count: int = 1) -> BlockState:
        """PLUGGED or UNPLUGGED if all of these blocks are, else MIXED.

        Raises:
            BlockRangeError: There are no such blocks.
        """
        ((start, n),) = single(first, count, self.nblocks)
        plugged = self._core.blocks.count(Map.PLUGGED, start, n)
        return BlockState.PLUGGED if plugged == n else BlockState.MIXED if plugged else BlockState.UNPLUGGED

    def plugged_runs(self) -> Iterator[Run]:
        """Maximal ascending `(first, count)` runs of plugged blocks.

        Fetched in portions: changes made meanwhile may or may not show.
        """
        return self._core.blocks.runs(Map.PLUGGED, True)

    def unplugged_runs(self) -> Iterator[Run]:
        """Maximal ascending `(first, count)` runs of unplugged blocks; see `plugged_runs`."""
        return self._core.blocks.runs(Map.PLUGGED, False)

    def plugged_array(self) -> memoryview:
        """The runs of plugged blocks as a flat array of uint64: first, count, first, count...

        Taken at one moment.  For numpy: `np.asarray(region.plugged_array()).reshape(-1, 2)`,
        which shares the memory, and which `plug_runs` and `unplug_runs` take as it is.
        """
        return self._core.blocks.runs_array(Map.PLUGGED, True)

    def unplugged_array(self) -> memoryview:
        """The runs of unplugged blocks; see `plugged_array`."""
        return self._core.blocks.runs_array(Map.PLUGGED, False)

    def tainted_runs(self) -> Iterator[Run]:
        """Maximal ascending runs of blocks that an earlier failure left in an unknown state."""
        return self._core.blocks.runs(Map.TAINTED, True)

    def find_unplugged(self, count: int, *, align: int = 1, fit: str = "first") -> int | None:
        """Where `count` blocks in a row could be plugged now.

        Args:
            count: Blocks.
            align: The start is a multiple of this many blocks.
            fit: "first" is the lowest start that fits, "last" the highest, "best"
                in the smallest free run.

        Returns:
            The first block, or None.
        """
        fit_code(fit)
        return self._core.blocks.find(_positive(count, "count"), _positive(align, "align"), fit)

    @property
    def bitmap(self) -> memoryview:
        """The plugged bitmap, read-only: block n is bit n % 8 of byte n // 8.

        It is the region's own memory and not a copy, so it changes under the
        reader's eyes; numpy and bitarray (`buffer=..., endian="little"`) share it.
        """
        return self._core.blocks.plugged_buffer()

    # ---- change ---------------------------------------------------------------------------

    def plug(
        self,
        first: int,
        count: int = 1,
        *,
        exist_ok: bool = False,
        populate: bool = True,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
        deadline: float | None = None,
    ) -> int:
        """Populates blocks [first, first + count): all of them, or none and an error.

        Afterwards they read zero, or show the template's content.

        Args:
            first: The first block.
            count: How many blocks.
            exist_ok: Let blocks that are plugged already stay as they are.
            populate: With False they get memory by the first access to each page, which
                may fail as any fault may: as if they were plugged and discarded inside.
                (In a private mapping of a file such a page takes memory twice.)
            progress: Called with `(bytes done, bytes in all)` about every 40 ms and
                at the end, in this thread; what it raises stops the plug.
            cancel: When it is set, the plug stops within 50 ms and is rolled back.
            deadline: Seconds from now after which likewise.

        Returns:
            The number of blocks that were plugged.

        Raises:
            OperationCancelledError: It was cancelled; nothing has changed.
            DeadlineError: It took too long; nothing has changed.
            BlockRangeError: There are no such blocks.
            BlockStateError: A block is plugged already, or tainted.
            BackendExhaustedError: There is not enough memory; `cause` says why.
            PopulateError: Something else failed.
            ListenerVetoError: A listener refused.
            UnsupportedError: populate=False on memory that cannot be given back.
            RegionClosedError: It is closed.
        """
        # The short way. It stands here, since another frame of Python costs a tenth of the system calls.
        # Only plain integers: whatever else may be one, or be refused, is for the long way to judge.
        plain = progress is None and cancel is None and deadline is None and populate
        if plain and type(first) is type(count) is int:
            try:
                done = self._core.plug_at_once(first, count)
            except OverflowError:
                done = 0
            if done > 0:
                return count
            if done < 0:
                raise plug_at_once_error(self._core, -done, first)
        control = _control(progress, cancel, deadline)
        return self._plug(single(first, count, self.nblocks), exist_ok, populate, control)

    def plug_runs(
        self,
        runs: RunsInput,
        *,
        exist_ok: bool = False,
        populate: bool = True,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
        deadline: float | None = None,
    ) -> int:
        """Plugs several runs: all or nothing, over all of them.

        Args:
            runs: `(first, count)` pairs in any order, or a C-contiguous uint64
                buffer of shape (n, 2).  Runs that touch are treated as one.
            exist_ok: As for `plug`; so is `populate`.
            populate: Whether they get memory now.
            progress: As for `plug`; so are `cancel` and `deadline`.
            cancel: When it is set, all of it is rolled back.
            deadline: Seconds from now.

        Returns:
            The number of blocks that were plugged.

        Raises:
            BlockRangeError: A run is out of range, empty, or overlaps another.
            As `plug`.
        """
        return self._plug(collect(runs, self.nblocks), exist_ok, populate, _control(progress, cancel, deadline))

    def plug_fit(self, count: int, *, align: int = 1, fit: str = "first") -> int | None:
        """Finds a place for `count` blocks and plugs them, with nobody in between.

        Args:
            count: Blocks.
            align: As for `find_unplugged`; so is `fit`.
            fit: Which place.

        Returns:
            The first block, or None if there is no such place.

        Raises:
            As `plug`.
        """
        fit_code(fit)
        count, align = _positive(count, "count"), _positive(align, "align")
        claim = Claim(self._core.blocks, single(0, 1, 1))
        operation = Plug(self._core, claim, fit=(count, align, fit))
        return operation.found if execute(operation) else None

    def unplug(
        self,
        first: int,
        count: int = 1,
        *,
        missing_ok: bool = False,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
        deadline: float | None = None,
    ) -> int:
        """Discards blocks [first, first + count); the backend has the memory back.

        Everything that can be checked is checked first, since a discard cannot
        be undone.  If it fails all the same, it stops there: blocks discarded so
        far are unplugged, the rest stays plugged.

        Args:
            first: The first block.
            count: How many blocks.
            missing_ok: Let blocks that are not plugged stay as they are.
            progress: As for `plug`; gaps that are discarded along with the blocks count.
            cancel: When it is set, the unplug stops within 50 ms; what is discarded
                by then is unplugged, the rest stays plugged, and the error says which.
            deadline: Seconds from now after which likewise.

        Returns:
            The number of blocks that were unplugged.

        Raises:
            OperationCancelledError: It was cancelled; says what was done.
            DeadlineError: It took too long; says what was done.
            BlockRangeError: There are no such blocks.
            BlockStateError: A block is not plugged.
            ViewsAliveError: A view still uses a block.
            ListenerVetoError: A listener refused.
            DiscardError: The kernel failed; says which blocks are in which state.
            UnsupportedError: The backend cannot give memory back.
            RegionClosedError: It is closed.
        """
        plain = progress is None and cancel is None and deadline is None
        if plain and type(first) is type(count) is int:  # the short way, as in plug
            try:
                done = self._core.unplug_at_once(first, count)
            except OverflowError:
                done = 0
            if done > 0:
                return count
            if done < 0:
                raise unplug_at_once_error(self._core, -done, first, count)
        return self._unplug(single(first, count, self.nblocks), missing_ok, _control(progress, cancel, deadline))

    def unplug_runs(
        self,
        runs: RunsInput,
        *,
        missing_ok: bool = False,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
        deadline: float | None = None,
    ) -> int:
        """Unplugs several runs, all checked before the first is discarded.

        Args:
            runs: As for `plug_runs`.
            missing_ok: As for `unplug`.
            progress: As for `unplug`; so are `cancel` and `deadline`.
            cancel: When it is set, it stops.
            deadline: Seconds from now.

        Returns:
            The number of blocks that were unplugged.

        Raises:
            As `unplug`.
        """
        return self._unplug(collect(runs, self.nblocks), missing_ok, _control(progress, cancel, deadline))

    def unplug_all(self) -> int:
        """Unplugs whatever is plugged; the number of blocks.  Raises as `unplug`."""
        return self._unplug(single(0, self.nblocks, self.nblocks), True)

    def resize(self, plugged_size: Size) -> int:
        """Plugs or unplugs until so much is plugged.

        Growing takes the lowest unplugged blocks and is all or nothing; shrinking
        gives the highest plugged ones back and can stop half way, as `unplug`.
        The change is reckoned once, when the call begins: what other threads plug
        and unplug meanwhile comes on top of it.

        Args:
            plugged_size: Bytes, a multiple of the block size.

        Returns:
            The change in bytes; negative if it shrank.

        Raises:
            ValueError: Not a multiple, or more than the region has.
            BlockStateError: Too few blocks can be plugged, since some are tainted.
            As `plug` and `unplug`.
        """
        target = parse_size(plugged_size, "plugged_size")
        if target % self._block_size:
            raise ValueError(f"plugged_size {target} is not a multiple of the block size {self._block_size}")
        if target > self._size:
            raise ValueError(f"plugged_size {target} is more than the region's size {self._size}")
        return resize(self._core, target // self._block_size) * self._block_size

    def discard(self, offset: int, length: int) -> None:
        """Gives pages inside plugged blocks back; the blocks stay plugged.

        The pages read zero (or the template) and are populated again by the next
        access, which may fail as any fault may.  Balloons, hinting and reporting
        work like this.  With protection="trap" they trap on shared memory and hugetlb,
        until `populate` brings them back.  With transparent huge pages, discarding a part of one may
        free nothing until the kernel splits it: there is a `HugePageSplitWarning`
        first, where the kernel tells which pages are huge (Linux 6.7).

        Args:
            offset: Bytes, a multiple of `page_size`.
            length: Bytes, a multiple of `page_size`.

        Raises:
            BlockRangeError: Not whole pages, or not within the region.
            BlockStateError: A block is not plugged, or tainted.
            DiscardError: The kernel failed.
            UnsupportedError: The backend cannot give memory back.
        """
        pages = self._pages(offset, length)
        self._core.blocks.check_open()
        ((start, size),) = pages
        warn_of_split(self._mapping, start, size, stacklevel=2)
        execute(Inner(self._core, pages, "thin"))

    def discard_runs(self, runs: RunsInput, *, missing_ok: bool = False) -> int:
        """Gives many pages inside plugged blocks back at once; the blocks stay plugged.

        As `discard`, but without the warning of split huge pages: whoever hands over
        scattered pages means to.

        Args:
            runs: `(offset, length)` pairs in bytes, multiples of `page_size`, in any
                order, or a C-contiguous uint64 buffer of shape (n, 2).
            missing_ok: Leave out what lies in blocks that are not plugged, or tainted.

        Returns:
            The bytes that were discarded.

        Raises:
            As `discard`.
        """
        pages = collect(runs, self._size, "byte")
        self._core.blocks.check_open()
        self._check_pages(pages)
        return execute(Inner(self._core, pages, "thin", strict=not missing_ok)) if pages.n else 0

    def populate(self, offset: int, length: int) -> None:
        """Populates pages inside plugged blocks again; what they hold stays.

        Not all or nothing: what was populated when it fails stays populated, for
        it may hold content from before.

        Args:
            offset: Bytes, a multiple of `page_size`.
            length: Bytes, a multiple of `page_size`.

        Raises:
            BlockRangeError: Not whole pages, or not within the region.
            BlockStateError: A block is not plugged, or tainted.
            PopulateError: The kernel failed.
        """
        execute(Inner(self._core, self._pages(offset, length), "repopulate"))

    def collapse(self, first: int, count: int = 1) -> int:
        """Has the kernel put what plugged blocks hold into huge pages, which discards and small populates undo.

        Content is kept, and may be used meanwhile.  Pages discarded within the
        blocks get memory again.  Where the kernel finds no huge page, small ones
        stay: no error, but fewer bytes.  Works with transparent huge pages set to
        "never", too.

        Args:
            first: The first block.
            count: How many blocks.

        Returns:
            The bytes of these blocks that are huge pages afterwards.

        Raises:
            BlockRangeError: There are no such blocks.
            BlockStateError: A block is not plugged, or tainted.
            UnsupportedError: The memory cannot be made huge: blocks smaller than a
                huge page, thp=False, hugetlb, secret and disk memory, private
                mappings of files, or a kernel before Linux 6.1.
            RegionClosedError: It is closed.
        """
        return self._advise("collapse", first, count)

    def cold(self, first: int, count: int = 1) -> None:
        """Tells the kernel that plugged blocks will not be used soon: they go first when memory gets short.

        Not an unplug: the blocks stay plugged and keep their content.  But what
        the kernel has reclaimed comes back by a fault that may fail as any fault
        may (SIGBUS, OOM killer), and takes memory again that headroom() does not
        keep for it.  Without swap, anonymous memory, memfds and tmpfs stay.

        Args:
            first: The first block.
            count: How many blocks.

        Raises:
            BlockRangeError: There are no such blocks.
            BlockStateError: A block is not plugged, or tainted.
            AdviceError: The kernel refused, of locked memory for one.
            UnsupportedError: hugetlb or secret memory, or a kernel before Linux 5.4.
            RegionClosedError: It is closed.
        """
        self._advise("cold", first, count)

    def pageout(self, first: int, count: int = 1) -> None:
        """Has the kernel reclaim plugged blocks now: to swap, or to the file that they are from.

        As `cold`, but at once.  Huge pages are split, even where there is no swap.

        Args:
            first: The first block.
            count: How many blocks.

        Raises:
            As `cold`.
        """
        self._advise("pageout", first, count)

    def scrub(self, first: int = 0, count: int | None = None) -> int:
        """Tries again to discard tainted blocks.

        Those that were to be unplugged are unplugged then.

        Args:
            first: The first block that it may be.
            count: How many from there on; None is all.

        Returns:
            The number of blocks that are mended; what fails again stays tainted.

        Raises:
            BlockRangeError: There are no such blocks.
            UnsupportedError: The backend cannot give memory back.
        """
        require_discard(self._mapping)
        self._core.blocks.check_open()
        first = index_of(first, "first block")
        within = single(first, self.nblocks - first if count is None else count, self.nblocks)
        mended = 0
        for first, count in clip(self.tainted_runs(), within):
            claim = Claim(self._core.blocks, single(first, count, self.nblocks))
            try:
                execute(Unplug(self._core, claim, want=Want.TAINTED_ONLY))
                mended += count
            except DiscardError as error:
                mended += sum(n for _, n in error.discarded)
        return mended

    def flush(
        self,
        *,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
        deadline: float | None = None,
    ) -> int:
        """Discards what `unplug_delay` has put off, now.

        Args:
            progress: As for `unplug`; so are `cancel` and `deadline`.
            cancel: When it is set, it stops; the rest stays pending.
            deadline: Seconds from now.

        Returns:
            Bytes.

        Raises:
            DiscardError: The kernel failed, now or when it was done in passing since
                the last time; the blocks are tainted.
            OperationCancelledError: It was cancelled.
            DeadlineError: It took too long.
            RegionClosedError: It is closed.
        """
        self._core.blocks.check_open()
        done, deferral = flush(self._core, _control(progress, cancel, deadline)), self._core.deferral
        if deferral is not None and deferral.failure is not None:
            failure, deferral.failure = deferral.failure, None
            raise failure
        return done

    def refill(
        self,
        *,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
        deadline: float | None = None,
    ) -> int:
        """Fills the warm pool up again; best when there is nothing else to do.

        Args:
            progress: As for `plug`; so are `cancel` and `deadline`.
            cancel: When it is set, it stops; the pool is as before.
            deadline: Seconds from now.

        Returns:
            Bytes that were populated; 0 without a pool.

        Raises:
            BackendExhaustedError: There is not so much memory.
            PopulateError: The kernel failed otherwise.
            BlockStateError: Called from within its own `progress`.
            OperationCancelledError: It was cancelled.
            DeadlineError: It took too long.
            RegionClosedError: It is closed.
        """
        self._core.blocks.check_open()
        return refill(self._core, _control(progress, cancel, deadline))

    def _plug(self, runs: Runs, exist_ok: bool, populate: bool, control: Control) -> int:
        claim = Claim(self._core.blocks, runs)
        return execute(Plug(self._core, claim, strict=not exist_ok, populate=populate, control=control))

    def _unplug(self, runs: Runs, missing_ok: bool, control: Control = UNWATCHED) -> int:
        return execute(Unplug(self._core, Claim(self._core.blocks, runs), strict=not missing_ok, control=control))

    def _advise(self, advice: str, first: int, count: int) -> int:
        claim = Claim(self._core.blocks, single(first, count, self.nblocks))
        return execute(Advise(self._core, claim, advice))

    def _pages(self, offset: int, length: int) -> Runs:
        pages = single(offset, length, self._size, "byte")
        self._check_pages(pages)
        return pages

    def _check_pages(self, runs: Runs) -> None:
        if not runs.are_multiples(self._page_size):
            start, size = next(run for run in runs if any(edge % self._page_size for edge in run))
            raise BlockRangeError(
                f"bytes {start} to {start + size - 1} are not whole pages of {exact_size(self._page_size)}"
            )

    # ---- views ----------------------------------------------------------------------------

    def view(self, first: int | None = None, count: int | None = None) -> memoryview:
        """A writable view of plugged blocks, which pins them.

        As long as the view or anything made from it lives, its blocks cannot be
        unplugged and the region cannot be closed.

        Without arguments it is the whole reservation, for a VMM that maps all of
        it.  That view holds off close but not unplug: a store to an unplugged
        block populates it behind the region's back, and so does a load of shared
        memory; when the backend has nothing left, the access raises SIGBUS.  With a
        `protection` it always raises a signal, but for what `catch_stray` is told of.

        Args:
            first: The first block.
            count: How many blocks; 1 if it is not given.

        Raises:
            TypeError: A count without a first block.
            BlockRangeError: There are no such blocks.
            BlockStateError: A block is not plugged, or tainted.
            UnsupportedError: The backend has no memory.
            RegionClosedError: It is closed.
        """
        self._core.blocks.check_open()
        if first is None:
            if count is not None:
                raise TypeError(f"view(count={count!r}) lacks the first block; view() alone is the whole reservation")
            return make_view(self._mapping, self._core.blocks, 0, 0, 0, self._size)
        ((start, n),) = single(first, 1 if count is None else count, self.nblocks)
        offset, length = start * self._block_size, n * self._block_size
        return make_view(self._mapping, self._core.blocks, start, n, offset, length)

    # ---- listeners ------------------------------------------------------------------------

    def add_listener(self, listener: Listener) -> None:
        """Registers a listener, which is told of all plugged blocks first.

        Waits until no operation is in flight.

        Raises:
            TypeError: It lacks a method.
            ValueError: It is registered already.
            ListenerVetoError: It refused; it is not registered.
        """
        self._core.blocks.check_open()
        check_listens(self._core, listener, False)
        for event in ("on_plug", "on_unplug"):
            if not callable(getattr(listener, event, None)):
                raise TypeError(f"{listener!r} is no listener: it has no {event}()")
        execute(Join(self._core, listener))

    def remove_listener(self, listener: Listener) -> None:
        """Removes a listener, which is told that all plugged blocks go.

        Raises:
            ValueError: It is not registered.
            ListenerVetoError: It refused; it stays registered.
        """
        check_listens(self._core, listener, True)
        execute(Leave(self._core, listener))

    # ---- the truth about memory --------------------------------------------------------------

    def stats(self) -> Stats:
        """Figures of this moment."""
        counts, block = self._core.blocks.counts(), self._block_size
        strays, dropped = (0, 0) if self._catcher is None else self._catcher.counts()
        return Stats(
            size=self._size,
            plugged_size=counts.plugged * block,
            pending_size=counts.pending * block,
            warm_size=self._core.warm.ready if self._core.warm is not None else 0,
            tainted_size=counts.tainted * block,
            busy_size=counts.busy * block,
            views=counts.pins,
            strategy=self._mapping.strategy,
            strays=strays,
            strays_dropped=dropped,
            **self._core.counts(),  # type: ignore[arg-type]
        )

    def audit(self) -> Audit:
        """Holds the bitmap against what the kernel says is resident.

        Raises:
            RegionClosedError: It is closed.
        """
        with self._while_open():
            return _audit(self._mapping, self._core.blocks, self._block_size)

    def huge_runs(self) -> tuple[Run, ...]:
        """Runs of plugged blocks, `(first, count)`, that are huge pages and nothing else.

        Raises:
            UnsupportedError: The kernel does not tell (before Linux 6.7), or there is no memory.
            RegionClosedError: It is closed.
        """
        with self._while_open():
            return huge_runs(self._mapping, self._core.blocks, self._core.shift)

    def headroom(self) -> Headroom:
        """What can still be plugged, and which limit binds; advisory.

        Raises:
            RegionClosedError: It is closed.
        """
        with self._while_open():
            return _read_headroom(self._mapping.limits())

    @contextlib.contextmanager
    def _while_open(self) -> Iterator[None]:
        """What only looks does not hold off close: if that comes in between, nothing that was seen counts."""
        self._core.blocks.check_open()
        try:
            yield
        except OSError:
            self._core.blocks.check_open()  # a descriptor that was just closed is no error of its own
            raise
        self._core.blocks.check_open()

    # ---- snapshots --------------------------------------------------------------------------

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        compress: str | None = None,
        dirty: bool | str | os.PathLike[str] = False,
        full: bool = False,
        follow_symlinks: bool = False,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
        deadline: float | None = None,
    ) -> Snapshot:
        """Saves which blocks are plugged, and what they hold, to a file.

        The file (mode 0600) gets its name only when all of it is on the disk, in place
        of what had the name before; until then that is as it was.  Pages of zeroes take
        no space in it, and pages that have no memory get none.

        Each block is saved in a state that it had, plugged or not, at some moment of
        the save: 32 MiB of blocks at a time are claimed while they are copied, others can
        be plugged and unplugged meanwhile.  Views may be alive, but what their owners
        store during the save may be in it or not, a part of it too: the *content* of the
        whole is that of one moment only if nobody writes.

        Args:
            path: Where to.
            compress: "zstd" makes the file smaller (the extra `zstd`); it cannot be restored
                with `lazy=True` then.
            dirty: Save only what has changed since the last such save.  True: the first one
                is full, and each further one needs all before it to be restored.  A path: the
                snapshot that the last one is believed to be, refused if it is another.  False:
                a full one, that has nothing to do with the others.  From the first such save on the
                kernel notes which pages this process writes to (Linux 6.7): the first store to
                each page after a save is slower and splits a huge page, and small plugs go the
                long way.  Not noted is what somebody else writes: other processes that share the
                memory, `write()` to the file or memfd, devices that write to pinned pages.
            full: With `dirty`: save all of it nevertheless, as the first one of a new chain.
            follow_symlinks: If `path` is a symbolic link, write what it points to.
            progress: Called with `(bytes done, bytes in all)` of plugged blocks about every 40 ms
                and at the end, in this thread; what it raises stops the save.
            cancel: When it is set, the save stops, and leaves nothing behind.
            deadline: Seconds from now after which likewise.

        Returns:
            What the snapshot says about itself.

        Raises:
            SnapshotIOError: The disk is full, for one; `errno` tells.
            SnapshotError: `dirty` names another snapshot than the last one, or `path` is one that
                the new one would need.
            BlockStateError: A plugged block is tainted.
            UnsupportedError: Memory that is secret or simulated; `dirty=` where the kernel does
                not tell; no `zstandard`.
            OperationCancelledError: It was cancelled.
            DeadlineError: It took too long.
            RegionClosedError: It is closed.
        """
        control = _control(progress, cancel, deadline)
        return _save(
            self._core,
            os.fsdecode(path),
            str(self._backend),
            compress=compress,
            follow_symlinks=follow_symlinks,
            tracker=None if dirty is False else self._tracker,
            base=None if isinstance(dirty, bool) else os.fsdecode(dirty),
            full=full,
            control=control,
        )

    @classmethod
    def restore(
        cls,
        path: str | os.PathLike[str],
        *,
        base: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = (),
        backend: Backend | None = None,
        lazy: bool = False,
        verify: bool = True,
        follow_symlinks: bool = False,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
        deadline: float | None = None,
        **options: Any,
    ) -> Self:
        """A new region in the state that a snapshot has.

        Its size and block size are the snapshot's; its memory may be any other that has no
        larger pages than that, and holds nothing yet.  All that is in the file is read and checked
        before the region is made, and what is copied is checked once more: a file that was cut
        off or changed in any place is refused, and so is one of a newer version.  Nothing in it is executed.

        Args:
            path: The snapshot.
            base: For one that was saved with `dirty=`: the snapshots before it, back to the full
                one, in any order.
            backend: Where the memory comes from; `Anonymous()` by default.
            lazy: Map the file privately instead of reading it: its blocks count as plugged, but
                have no memory until they are written to, as if all their pages had been discarded
                (see `discard`, and `populate` for how to get them).  A block that is unplugged
                and plugged again shows the file once more: it is a template.  The file must stay
                as it is as long as the region lives.
            verify: False believes the content: a lazy restore reads none of it then, any other
                finds out while it copies, and lets go of the region.
            follow_symlinks: Whether `path` and `base` may be symbolic links.
            progress: As for `plug`, for all of the reading and plugging; so are `cancel` and
                `deadline`.
            cancel: When it is set, the restore stops, and leaves nothing behind.
            deadline: Seconds from now after which likewise.
            **options: As for `Region`; `size` and `block_size` need not be given.

        Raises:
            SnapshotError: The file is no snapshot, was cut off, is corrupted or newer; it needs
                another `base`; `size` or `block_size` is another one.
            SnapshotIOError: It cannot be read.
            UnsupportedError: Memory that is simulated, a template; `lazy=True` of a compressed or
                incremental one.
            As `Region` and `plug`.
        """
        control = _control(progress, cancel, deadline)
        if lazy and backend is not None:
            raise ValueError(f"lazy=True maps the snapshot itself: it does not go with backend={backend!r}")
        bases = [base] if isinstance(base, (str, os.PathLike)) else list(base)
        region = None
        try:
            with opened(os.fsdecode(path), map(os.fsdecode, bases), follow_symlinks=follow_symlinks) as chain:
                shown = None
                if lazy:
                    backend, shown = chain.template(options.get("protection", "none"))
                options = chain.check_options(options)
                meter = chain.check(control, content=verify, again=not lazy)
                region = cls(backend=backend, **options)
                if shown is None:
                    chain.fill(region._core, meter)
                else:
                    chain.adopt(region._core)
                    region._backend = shown
                meter.end()
            return region  # in here, for until the caller has it an interrupt must close it
        except BaseException:
            if region is not None:
                region._close(force=True, abandon=True)
            raise

    # ---- lifetime ---------------------------------------------------------------------------

    def close(self) -> None:
        """Unmaps everything; a second time does nothing.

        Waits for operations in flight, and mostly goes before new ones; only long
        ones that overlap without a pause can hold it off.  Listeners are told
        that all plugged blocks go.  A file that the region did not delete keeps
        its content.

        Raises:
            ViewsAliveError: A view is alive; nothing was changed.
            ListenerVetoError: A listener refused; nothing was changed.
            DiscardError: What `unplug_delay` had put off could not be discarded; it is tainted, and
                the region still open.
        """
        self._close(force=False)

    def _close(self, *, force: bool, abandon: bool = False) -> None:
        """Closes it whatever lives and says no, with `force`; with `abandon`, as if it had never been."""
        if not self._closed:
            if abandon and self._mapping.can_discard:
                # What a file that was there before has got from us goes, too.
                with contextlib.suppress(SparseMemError):
                    self.unplug_all()
            self._flush_last(force)
            # Closed already: another thread was faster, or the parent process owns it.
            with contextlib.suppress(RegionClosedError):
                execute(Close(self._core, force=force))
            self._closed = True
        if self._catcher is not None:
            self._catcher.close()
        if self._core.warm is not None:
            self._core.warm.close()
        if abandon:
            self._mapping.abandon()
        self._mapping.close()

    def _flush_last(self, force: bool) -> None:
        """What is pending goes before the region does: a file or a peer may outlive it."""
        try:
            with contextlib.suppress(RegionClosedError):
                self.flush()
        except DiscardError:
            if not force:
                raise
            _log.debug("a late discard failed as the region closed", exc_info=True)

    def __enter__(self) -> Self:
        self._core.blocks.check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # The body's error is what the user must see.  What it refers to may
        # well hold views, so the memory goes when the last of them dies.
        views, notes = self._core.blocks.counts().pins, []
        try:
            self._close(force=True)
        except Exception as failure:
            notes.append(f"closing {self!r} failed, too: {failure}")
        if views:
            notes.append(f"{views} views of {self!r} were alive; it is closed, and unmapped when the last one dies")
        for note in notes:
            _log.debug("%s", note)
            if hasattr(error, "add_note"):  # 3.11
                error.add_note(note)

    def __del__(self) -> None:
        if not self._closed and not self._core.blocks.forked:
            self._closed = True
            self._core.blocks.abandon()
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            if self._catcher is not None:
                self._catcher.stop()
            self._mapping.close()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        # A copy would unmap the memory that the original still uses.
        raise TypeError(f"{self!r} cannot be copied or pickled: it owns memory; fileno() can be handed on")

    def __repr__(self) -> str:
        options = f"{exact_size(self._size)!r}, block_size={exact_size(self._block_size)!r}, backend={self._backend!r}"
        if not hasattr(self, "_core"):
            return f"<Region({options}), not made>"
        state = "closed" if self._closed else f"{exact_size(self.plugged_size)} plugged"
        where = "" if self._closed or self._address is None else f", at {self._address:#x}"
        return (
            f"<Region({options}, headroom={self._headroom!r}, fork={self._fork!r}, "
            f"protection={self._protection!r}, threads={self._threads}, name={self._name!r}), "
            f"{state}, strategy={self._mapping.strategy!r}, thp={self._mapping.thp}{where}>"
        )


def _catch(core: Core, callback: Callable[[StrayAccess], object]) -> Catcher:
    """Has the callback told of stray accesses from now on."""
    try:
        watch = core.mapping.watch(core.blocks.plugged_words, core.shift, core.blocks.c)
        return Catcher(watch, core.shift, callback)
    except OSError as error:
        raise ReserveError(error.errno, f"no thread can be had for catch_stray: {error.strerror}") from error
    except RuntimeError as error:  # Python's own word for it
        raise ReserveError(errno.EAGAIN, f"no thread can be had for catch_stray: {error}") from error


def _deferrable(deferral: Deferral | None, mapping: Mapping) -> Deferral | None:
    """The deferral, where blocks can be made fresh without a discard."""
    if deferral is not None:
        require_discard(mapping)
        if mapping.fresh != "zero":
            raise UnsupportedError("unplug_delay needs blocks that start as zeroes: a template's content is the file's")
    return deferral


def _reserve(backend: Backend, request: Request) -> Mapping:
    """The backend's mapping; whatever system call failed in it, the error is ours and says of what."""
    try:
        return backend.reserve(request)
    except SparseMemError:
        raise
    except OSError as error:
        raise ReserveError(
            error.errno, f"cannot reserve {exact_size(request.size)} of {backend}: {error.strerror}"
        ) from error


def _control(progress: Progress | None, cancel: threading.Event | None, deadline: float | None) -> Control:
    """Whoever looks on, checked before anything happens."""
    if progress is None and cancel is None and deadline is None:
        return UNWATCHED
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be callable, not {progress!r}")
    if cancel is not None and not isinstance(cancel, threading.Event):
        raise TypeError(f"cancel must be a threading.Event, not {cancel!r}")
    if deadline is not None:
        if isinstance(deadline, bool) or not isinstance(deadline, (int, float)):
            raise TypeError(f"deadline must be seconds from now, not {deadline!r}")
        if not deadline >= 0:
            raise ValueError(f"deadline {deadline} is not a number of seconds from now, 0 or more")
        deadline += time.monotonic()
    return Control(progress, cancel, deadline)


def _positive(value: Any, what: str) -> int:
    number = index_of(value, what)
    if not 1 <= number < 1 << 63:
        raise BlockRangeError(f"{what} {number} is out of range: 1 <= {what} < 2**63")
    return number
