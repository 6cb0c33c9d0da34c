"""A mapping of real memory, managed by its recipe.

Every backend but Simulated ends up here: it opens or makes what is mapped and
names its kind; the kind's recipe says the rest.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from attrs import evolve, frozen

from sparsemem._sys import calls as _calls
from sparsemem._sys import ffi, lib, probe, residency, uffd
from sparsemem._sys.calls import Calls
from sparsemem._sys.descriptor import Descriptor
from sparsemem._sys.files import PAGE_SIZE, shared_files, thp_size
from sparsemem._sys.inheritance import keep_place
from sparsemem._sys.stray import Watch
from sparsemem._sys.uffd import Userfaultfd
from sparsemem.backends.advice import refusal
from sparsemem.backends.base import Limit, Mapping, Request
from sparsemem.backends.diagnosis import Surroundings
from sparsemem.backends.numa import bind
from sparsemem.backends.protection import check_protection, require_protection
from sparsemem.backends.strategies import UFFD, check_strategy, choose_strategy
from sparsemem.backends.trap import Trap
from sparsemem.errors import Cause, ReserveError, Run, SparseMemError, UnsupportedError
from sparsemem.recipes import (
    ADVICE,
    GUARD,
    POPULATE_WRITE,
    PROT_NONE,
    PROTECTIONS,
    RECIPES,
    TRAP,
    Evidence,
    Inheritance,
    Kind,
    Step,
)
from sparsemem.runs import join
from sparsemem.units import exact_size

_log = logging.getLogger("sparsemem")

STEP_CODES = {step: getattr(lib, f"SM_STEP_{step.name}") for step in Step}


# What a snapshot reads through the descriptor: a hole of a file reads zero and stays one,
# where touching it would give it a page.
_READABLE = (Kind.SHMEM_SHARED, Kind.HUGETLB_SHARED, Kind.DISK_SHARED)

_ENTRY = 8  # bytes of page table for each page, without the tables of tables (1/512 of it)
_NO_TOTAL = (Kind.TEMPLATE, Kind.SECRET, Kind.DISK_SHARED, Kind.DISK_PRIVATE)


@frozen(kw_only=True)
class OwnFile:
    """A file that we made and may remove, as long as it is still that one, and we are still the one."""

    path: str
    device: int
    inode: int
    pid: int

    def remove(self, calls: Calls) -> None:
        """Removes it; not in a child, and not what somebody has put in its place."""
        if self.pid != os.getpid():
            return
        try:
            about = calls.lstat(self.path)
        except FileNotFoundError:
            return
        if (about.st_dev, about.st_ino) == (self.device, self.inode):
            calls.unlink(self.path)


@frozen
class Adopted:
    """What an existing file holds, in byte runs.

    Attributes:
        blocks: Whole blocks that are taken over.
        missing: Parts of blocks that start out plugged which the file has no memory for.
    """

    blocks: tuple[Run, ...]
    missing: tuple[Run, ...]


@frozen(kw_only=True)
class Area:
    """What is to be mapped, and what it is."""

    kind: Kind
    flags: int
    page_size: int
    fd: Descriptor | None = None
    offset: int = 0
    """Where in the file block 0 is; only of a template, since all else is punched at the block's offset."""
    writable: bool = True
    adopt: Callable[[], Adopted] | None = None
    """Makes an existing file fit, and says what it holds; loses nothing."""
    discard: Callable[[], None] | None = None
    """Throws away what the file held.  Done last: it cannot be undone."""
    restore: Callable[[], None] | None = None
    """Undoes what `adopt` did, for a region that comes to nothing."""
    thp: bool | None = None
    numa_node: int | None = None
    created: OwnFile | None = None
    """A file that was made for this mapping, and goes if its region comes to nothing."""
    unlink: OwnFile | None = None
    """A file that is removed on close."""


def page_flags(page_size: int) -> int:
    """The bits of MAP_HUGETLB and MFD_HUGETLB that name a huge page size."""
    return (page_size.bit_length() - 1) << int(lib.MAP_HUGE_SHIFT)


class KernelMapping(Mapping):
    """Address space reserved with mmap(MAP_NORESERVE)."""

    parallel = True

    def __init__(self, area: Area, request: Request, strategy: str = "auto") -> None:
        self._calls: Calls = _calls.kernel
        self.kind = area.kind
        self.recipe = RECIPES[area.kind]
        self.size = request.size
        self.page_size = area.page_size
        self.fresh = self.recipe.fresh
        self.can_discard = bool(self.recipe.discard)
        self.scales = self.recipe.scales
        self.fork_inherits = request.fork == "inherit"
        self.bridge = self.recipe.bridge if self._may_bridge(area, request) else 0
        # Not where something stands in the kernel's place: that must see every call.
        self.direct = isinstance(self._calls, _calls.Kernel) and self.can_discard
        self.protection = check_protection(request.protection)
        self._trap: Trap | None = None
        self._uffd: Userfaultfd | None = None
        require_protection(self._calls, area.kind, area.page_size, self.protection, thp=area.thp, catch=request.catch)
        self.protects = bool(PROTECTIONS[self.protection].protect)
        self._request = request
        self._numa_node = area.numa_node
        self._warm: Any = ffi.NULL
        self._vectored = self.page_size == PAGE_SIZE and probe.vectored(self._calls)
        self._fd = area.fd
        self._offset = area.offset
        self.confidential = area.kind is Kind.SECRET
        if area.fd is not None and area.kind in _READABLE:
            self.readable = area.fd.fd
        self._unlink = area.unlink
        self._created = area.created
        self._discard = area.discard
        self._restore = area.restore
        files = shared_files()
        self._surroundings: Surroundings | None = None
        self.thp, align = self._resolve_thp(area.thp, request.block_size, thp_size(files))
        self.granule = align
        try:
            self.strategy = choose_strategy(
                area.kind, check_strategy(strategy), self._calls, huge=self.huge, protection=self.protection
            )
        except OSError as error:
            raise ReserveError(error.errno, f"cannot even map a page to try things on: {error.strerror}") from error
        self._map(area, request, align)
        try:
            self.processors = bind(self._calls, area.kind, self._address, self.size, area.numa_node)
            self._register(strategy)
            self._advise(request)
            self._surroundings = Surroundings(
                self._calls, files, area.kind, area.page_size, area.fd, self.size, area.numa_node, area.offset
            )
            self._adopt(area, request)
        except BaseException:
            self.abandon()
            raise

    @property
    def huge(self) -> bool:
        # Private copies of a file's pages and the pages of a disk file are small, whatever was asked for.
        return super().huge and bool(self.recipe.huge)

    def _may_bridge(self, area: Area, request: Request) -> bool:
        """Whether a discard may go over what is unplugged between two blocks.

        Of a shared file somebody else may have plugged what lies there: it would be taken
        from them.  And where mprotect() fails access is given back to all that it was to
        take it from, which must not open what was protected.
        """
        if request.protection == PROT_NONE:
            return False
        if self.recipe.inheritance is not Inheritance.SHARED:
            return True
        return area.adopt is None and area.created is None and area.unlink is None and not self.fork_inherits

    # ---- reserving -------------------------------------------------------------------

    def _adopt(self, area: Area, request: Request) -> None:
        """Finds out what blocks that start out plugged have, and what they lack.

        Fresh memory has to be populated to be what `plugged` says.  A file that was
        there may have holes, for which a later access could find no room; the rest of
        it needs nothing, and writing to it would only make it dirty.  But what a
        hugetlb file has the kernel does not say: all of it is mapped, which costs no
        page where there is one.
        """
        if area.adopt is None:
            self.unpopulated = request.plugged
            return
        adopted = area.adopt()
        self.adopted, self.unpopulated = adopted.blocks, adopted.missing
        self.adopts_pages = self.recipe.evidence is Evidence.MAPPED_PAGES

    def watch(self, plugged: Any, shift: int, keeps: Any) -> Watch:
        assert self._trap is not None
        return self._trap.watch(plugged, shift, keeps)

    def room_to_protect(self, length: int) -> None:
        if self.protection != GUARD or self._surroundings is None:
            return
        tables = length // PAGE_SIZE * _ENTRY
        tight = min(self._surroundings.memory(), key=lambda limit: limit.available, default=None)
        if tight is not None and tight.available < tables:
            raise ReserveError(
                errno.ENOMEM,
                f"guards on {exact_size(length)} take {exact_size(tables)} of page tables, and {tight.source} leaves "
                f"{exact_size(tight.available)}: protection='trap' takes none",
            )

    def settle(self) -> None:
        if self._discard is not None:
            self._discard()

    def _resolve_thp(self, wanted: bool | None, block_size: int, huge: int | None) -> tuple[bool | None, int]:
        """Whether to ask for huge pages, and the alignment in bytes.

        A block smaller than a huge page has to be without: else a 4 KiB plug
        takes 2 MiB, and khugepaged fills unplugged holes again.
        """
        if self.page_size > PAGE_SIZE or self.kind is Kind.SECRET:
            if wanted is not None:
                raise ValueError(f"thp={wanted} makes no sense on {self.kind.value}: its page size is fixed")
            return None, self.page_size
        if huge is None:
            if wanted:
                raise UnsupportedError("thp=True: this kernel has no transparent huge pages")
            return None, self.page_size
        if wanted and block_size < huge:
            raise ValueError(
                f"thp=True needs blocks of at least {exact_size(huge)}, a huge page: "
                f"block_size {exact_size(block_size)} would populate its neighbours"
            )
        use = block_size >= huge if wanted is None else wanted
        if self.protection == TRAP:
            use = False  # the kernel makes no huge page of memory that traps
        return use, huge if use else self.page_size

    def _map(self, area: Area, request: Request, align: int) -> None:
        fd = -1 if area.fd is None else area.fd.fd
        try:
            address = self._calls.reserve(
                request.size,
                align,
                area.flags | lib.MAP_NORESERVE,
                fd,
                writable=area.writable,
                locked=area.kind is Kind.SECRET,
                offset=area.offset,
            )
        except OSError as error:
            raise ReserveError(
                error.errno,
                f"cannot reserve {exact_size(request.size)} of {self.kind.value}: {_why_not(error)}",
            ) from error
        self.address = address
        # The memory is unmapped when the last reference to this pointer dies,
        # views included: nothing of ours can reach unmapped memory.
        unmap = partial(_unmap, self._calls, address, request.size)
        self._owner: Any = ffi.gc(ffi.cast("char *", address), unmap)

    def _register(self, strategy: str) -> None:
        """Lets userfaultfd fill the memory, which somebody else's may have by now; or trap in it."""
        self._tracked = False
        if self.protection == TRAP:
            self._trap = Trap(self._calls, self.page_size, catch=self._request.catch)
            self._uffd = self._trap.uffd
            self._trap.arm(self._address, self.size)
            return
        if self.strategy not in UFFD:
            return
        try:
            self._uffd = self._registered()
        except OSError as error:
            if strategy != "auto":
                raise ReserveError(error.errno, f"userfaultfd refuses the mapping: {error.strerror}") from error
            self.strategy = POPULATE_WRITE

    def _registered(self) -> Userfaultfd:
        found = uffd.shared(self._calls)
        found.register(self._address, self.size)
        return found

    def _advise(self, request: Request) -> None:
        """Options of the whole mapping; for single blocks they would split it into many."""
        if self.thp is not None:
            self._try_advice(lib.MADV_HUGEPAGE if self.thp else lib.MADV_NOHUGEPAGE)
        if not request.dump:
            self._try_advice(lib.MADV_DONTDUMP)
        if request.fork == "refuse":
            if self.recipe.inheritance is Inheritance.WIPED:
                self._advice(lib.MADV_WIPEONFORK)
            elif self.recipe.inheritance is Inheritance.ABSENT:
                self._advice(lib.MADV_DONTFORK)
                keep_place(self._owner, self._address, self.size)
        try:
            # Needs CONFIG_ANON_VMA_NAME (5.17); files show their own name.
            self._calls.name_mapping(self._address, self.size, request.name)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EPERM):
                raise ReserveError(error.errno, f"cannot name the mapping: {error.strerror}") from error

    def _advice(self, advice: int) -> None:
        try:
            self._calls.madvise(self._address, self.size, advice)
        except OSError as error:
            raise ReserveError(error.errno, f"madvise({advice}) on the new mapping: {error.strerror}") from error

    def _try_advice(self, advice: int) -> None:
        """Advice that a kernel without the feature may refuse: nothing depends on it."""
        try:
            self._advice(advice)
        except ReserveError as error:
            if error.errno != errno.EINVAL:
                raise

    @property
    def _address(self) -> int:
        assert self.address is not None
        return self.address

    # ---- populate and discard -----------------------------------------------------------

    def prepare(self, job: Any, operation: str) -> None:
        steps = {
            "populate": self.recipe.populate(
                self.strategy, huge=self.huge, warm=bool(self._warm), protection=self.protection
            ),
            "repopulate": self.recipe.again(self.strategy, self.protection),
            "recycle": self.recipe.recycle(self.strategy),
            "discard": self.recipe.release(self.protection),
            "thin": self.recipe.thin(self.protection),
            "empty": self.recipe.empty(self.protection),
            "protect": PROTECTIONS[self.protection].protect,
            **ADVICE,
        }[operation]
        if self._tracked and operation in ("discard", "thin"):
            steps = (Step.UNPROTECT, *steps)
        job.base = ffi.cast("char *", self._address)
        job.fd = -1 if self._fd is None else self._fd.fd
        job.page = self.page_size
        job.huge = self.granule
        job.vectored = self._vectored
        job.uffd = ffi.NULL if self._uffd is None else self._uffd.c
        job.warm = self._warm
        job.nsteps = len(steps)
        for i, step in enumerate(steps):
            job.steps[i] = STEP_CODES[step]
        if operation == "protect" and Step.FORBID in steps:
            job.chunk = self.size  # one call for all of it costs as much as one for a block

    def advance(self, job: Any, operation: str, budget_ns: int) -> int:
        return self._calls.advance(job, budget_ns)

    def spare(self, size: int) -> KernelMapping:
        if self.kind is not Kind.ANONYMOUS_PRIVATE:
            raise UnsupportedError(
                f"a warm pool needs private anonymous memory: {self.kind.value} memory cannot be moved"
            )
        if self.protection == GUARD and self.thp:
            # The kernel splits a huge page that is moved to where a page table is, and zeroes are
            # the zero page from then on: plugged, and without memory (measured on 6.18).
            raise UnsupportedError(
                "a warm pool of huge pages does not go with protection='guard': its page tables would have them "
                "split; thp=False or another protection would do"
            )
        if not probe.uffd_move(self._calls):
            raise UnsupportedError("a warm pool needs UFFDIO_MOVE (Linux 6.8), which does not work here")
        if self._uffd is None:
            try:
                self._uffd = self._registered()
            except OSError as error:
                raise ReserveError(error.errno, f"userfaultfd refuses the mapping: {error.strerror}") from error
        request = evolve(
            self._request,
            size=size,
            name=f"{self._request.name}-warm"[:79],
            fork="refuse",
            protection="none",
            catch=False,
            plugged=(),
        )
        area = Area(
            kind=self.kind,
            flags=lib.MAP_PRIVATE | lib.MAP_ANONYMOUS,
            page_size=self.page_size,
            thp=self.thp,
            numa_node=self._numa_node,
        )
        return KernelMapping(area, request, self.strategy)

    def draw_from(self, warm: Any) -> None:
        self._warm = warm

    # ---- what is there ------------------------------------------------------------------

    def resident(self, offset: int, length: int) -> Iterator[Run] | None:
        start, calls = self._address + offset, self._calls
        if self.recipe.evidence is Evidence.PRIVATE_PAGES:
            return _shifted(residency.private_pages(start, length, guarded=self.protection == GUARD), offset)
        if self.recipe.evidence is Evidence.MAPPED_PAGES:
            return _shifted(residency.mapped_pages(start, length), offset)
        if self.recipe.evidence is Evidence.PAGE_CACHE:
            return residency.shared_anonymous(calls, self._address, self.size, offset, length)
        if self.recipe.evidence is Evidence.FILE_DATA:
            return residency.file_data(calls, self._file(), offset, offset + length)
        if self.recipe.evidence is Evidence.FILE_EXTENTS:
            return residency.file_extents(calls, self._file(), offset, offset + length)
        return None

    def contents(self, offset: int, length: int) -> list[Run] | None:
        found: list[Run] | None = None
        # Without /proc nobody can tell.
        with contextlib.suppress(OSError):
            if self.recipe.evidence is Evidence.PRIVATE_PAGES:
                guarded = self.protection == GUARD
                found = list(_shifted(residency.private_pages(self._address + offset, length, guarded=guarded), offset))
                # Where there is no page of one's own, the file shows through.  A hugetlb file
                # calls all of itself data, and nobody writes to it but through a mapping.
                if self._fd is not None and self.kind is not Kind.HUGETLB_PRIVATE:
                    start = self._offset + offset
                    data = residency.file_data(self._calls, self._fd.fd, start, start + length)
                    found = join([*found, *_shifted(data, -self._offset)])
            elif self.recipe.evidence is Evidence.PAGE_CACHE:
                # Not mincore, which does not see what is swapped.
                found = residency.shared_anonymous_data(self._calls, self._address, self.size, offset, length)
            elif self.recipe.evidence in (Evidence.FILE_DATA, Evidence.FILE_EXTENTS):
                found = list(self.resident(offset, length) or ())
            if found is not None and self._fd is not None:
                found = join([*found, *self._beyond_end(offset, length)])
        return found

    def _beyond_end(self, offset: int, length: int) -> list[Run]:
        """What a file does not have any more since somebody cut it off: no hole, but nothing that could be read."""
        assert self._fd is not None
        end = self._calls.fstat(self._fd.fd).st_size - self._offset
        start = max(offset, -(-end // self.page_size) * self.page_size)
        return [(start, offset + length - start)] if start < offset + length else []

    def track(self) -> None:
        if not probe.tracks_writes(self._calls):
            raise UnsupportedError("this kernel does not tell which pages were written to (UFFD_FEATURE_WP_ASYNC, 6.7)")
        if self.protection != "none":
            raise UnsupportedError(f"protection={self.protection!r} uses what would tell: it does not go with dirty=")
        if self.fork_inherits:
            raise UnsupportedError("with fork='inherit' the kernel would note a parent's writes and not a child's")
        if self._uffd is None:
            try:
                self._uffd = self._registered()
            except OSError as error:
                raise UnsupportedError(f"userfaultfd refuses the mapping: {error.strerror}") from error
        try:
            residency.written_pages(self._address, self.page_size, protect=False)
        except OSError as error:
            raise UnsupportedError(
                f"the kernel does not tell of {self.kind.value} memory which pages were written to: {error.strerror}"
            ) from error
        self._tracked = True

    def written(self, offset: int, length: int) -> list[Run]:
        return list(_shifted(iter(residency.written_pages(self._address + offset, length)), offset))

    def resident_total(self) -> int | None:
        """What file and private pages use.  Behind a private mapping the file should be empty.

        None where the file's own figure says something else: on disks it counts
        metadata, and a larger file than the region has more than ours in it.
        """
        if self._fd is None or self.kind in _NO_TOTAL or self._calls.fstat(self._fd.fd).st_size > self.size:
            return None
        total = residency.file_total(self._calls, self._fd.fd)
        if self.recipe.evidence is Evidence.PRIVATE_PAGES:
            own = residency.private_pages(self._address, self.size, guarded=self.protection == GUARD)
            total += sum(length for _, length in own)
        return total

    def huge_pages(self, offset: int, length: int) -> Iterator[Run] | None:
        found = residency.huge_pages(self._address + offset, length)
        return None if found is None else _shifted(iter(found), offset)

    def refusal(self, advice: str) -> str:
        if self.protection == TRAP and advice == "collapse":
            return "the kernel makes no huge pages of memory that traps (protection='trap')"
        return refusal(self._calls, self.kind, self.page_size, self.thp, advice)

    def limits(self) -> Iterable[Limit]:
        return () if self._surroundings is None else self._surroundings.limits()

    def diagnose(self, errno: int, offset: int) -> Cause:
        return Cause.UNKNOWN if self._surroundings is None else self._surroundings.diagnose(errno, offset)

    def fileno(self) -> int:
        fd = self._file()
        # From now on others may have blocks of their own in it (see _may_bridge).
        if self.recipe.inheritance is Inheritance.SHARED:
            self.bridge = 0
        return fd

    def _file(self) -> int:
        if self._fd is None:
            raise UnsupportedError(f"{self.kind.value} memory has no file descriptor")
        if self._offset:
            raise UnsupportedError(f"block 0 is not at offset 0 of the file, but at {exact_size(self._offset)}")
        return self._fd.fd

    def owner(self) -> Any:
        return self._owner

    def after_fork_in_child(self) -> None:
        # Not ours to remove.
        self._unlink = None
        if self._trap is not None:
            self._trap.after_fork_in_child(usable=self.fork_inherits)

    def abandon(self) -> None:
        if self._restore is not None and self._fd is not None:
            with contextlib.suppress(OSError):  # sealed against shrinking, for one
                self._restore()
        self._unlink = self._created
        self.close()

    def close(self) -> None:
        if self._trap is not None:
            self._trap.release()
        self._owner = self._uffd = None
        self._surroundings = None  # the kernel's files close with the last who holds them
        if self._unlink is not None:
            own, self._unlink = self._unlink, None
            try:
                own.remove(self._calls)
            finally:
                self._close_descriptor()
        self._close_descriptor()

    def _close_descriptor(self) -> None:
        if self._fd is not None:
            self._fd.close()


def _shifted(runs: Iterator[Run], offset: int) -> Iterator[Run]:
    return ((start + offset, length) for start, length in runs)


def _unmap(calls: Calls, address: int, length: int, _: Any) -> None:
    try:
        calls.unmap(address, length)
    except OSError as error:
        # ENOMEM: the kernel has joined the mapping with a neighbour's, and the process
        # has as many mappings as it may (munmap(2)).  The address space stays taken,
        # but the memory need not: private pages go, a file's are only unmapped.
        _log.debug("cannot unmap %d bytes at %#x: %s", length, address, error)
        with contextlib.suppress(OSError):
            calls.madvise(address, length, lib.MADV_DONTNEED)


def _why_not(error: OSError) -> str:
    text = error.strerror or os.strerror(error.errno or 0)
    hint = {
        errno.ENOMEM: "; see ulimit -v and vm.overcommit_memory=2, which ignores MAP_NORESERVE for private memory",
        errno.EAGAIN: "; see ulimit -l, which limits locked memory",
    }.get(error.errno or 0, "")
    return text + hint


def reserving(make: Callable[[], Descriptor], what: str) -> Descriptor:
    """Runs what opens a descriptor; an OSError becomes a ReserveError that names it."""
    try:
        return make()
    except SparseMemError:
        raise
    except OSError as error:
        raise ReserveError(error.errno, f"{what}: {error.strerror}") from error
