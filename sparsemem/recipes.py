"""How each kind of mapping is populated and discarded: data, no code.

The kernel's rules differ with the kind of mapping, and the obvious call is
often the wrong one: MADV_DONTNEED on shared memory returns 0 and frees nothing,
punching a private memfd leaves the private copy alive.  The table below is
those rules; `tests/conformance` holds every line of it against the running
kernel, and the table in the documentation is made from it.

Each populate starts with the discard: a stray write may have put something
into an unplugged block, and a plugged block must read zero (or its template).
A discard of empty memory costs 1-7 us.  Only pages that the kernel itself refuses to
put where there are any (userfaultfd's) come before it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from attrs import field, frozen


class Step(enum.Enum):
    """One system call over one chunk; named as in the shim (`SM_STEP_*`)."""

    DONTNEED = "madvise(MADV_DONTNEED)"
    REMOVE = "madvise(MADV_REMOVE)"
    PUNCH = "fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)"
    FALLOCATE = "fallocate(FALLOC_FL_KEEP_SIZE)"
    POPULATE_WRITE = "madvise(MADV_POPULATE_WRITE)"
    LAST_PAGES = "madvise(MADV_POPULATE_WRITE) on the last small page of each huge page"
    FIRST_PAGES = "madvise(MADV_POPULATE_WRITE) on the first small page of each huge page"
    COLLAPSE = "madvise(MADV_COLLAPSE)"
    UFFD_COPY = "ioctl(UFFDIO_COPY) of zeroes"
    UFFD_ZEROPAGE = "ioctl(UFFDIO_ZEROPAGE)"
    MOVE = "ioctl(UFFDIO_MOVE) from the warm pool"
    TOUCH = "readv(/dev/zero) of one byte into each page"
    FUTEX = "futex(FUTEX_WAKE_OP) on each page"
    COLD = "madvise(MADV_COLD)"
    PAGEOUT = "madvise(MADV_PAGEOUT)"
    UNPROTECT = "ioctl(UFFDIO_WRITEPROTECT) without protection"
    ZERO = "read(/dev/zero)"
    ZERO_PAGES = "ioctl(UFFDIO_ZEROPAGE) of the zero page"
    GUARD = "madvise(MADV_GUARD_INSTALL)"
    UNGUARD = "madvise(MADV_GUARD_REMOVE)"
    FORBID = "mprotect(PROT_NONE)"
    ALLOW = "mprotect(PROT_READ | PROT_WRITE)"


FILLS = (Step.UFFD_COPY, Step.UFFD_ZEROPAGE)
"""Steps that put pages only where nothing is.

Unless missing pages trap they never fail: what they did not do is for the next steps.
"""


class Kind(enum.Enum):
    """The kinds of mapping that behave differently."""

    ANONYMOUS_PRIVATE = "anonymous private"
    ANONYMOUS_SHARED = "anonymous shared"
    ANONYMOUS_HUGETLB = "anonymous hugetlb private"
    ANONYMOUS_HUGETLB_SHARED = "anonymous hugetlb shared"
    SHMEM_SHARED = "memfd or tmpfs shared"
    SHMEM_PRIVATE = "memfd or tmpfs private"
    HUGETLB_SHARED = "hugetlb file shared"
    HUGETLB_PRIVATE = "hugetlb file private"
    DISK_SHARED = "disk file shared"
    DISK_PRIVATE = "disk file private"
    TEMPLATE = "template (private mapping of an existing file)"
    SECRET = "memfd_secret"


class Evidence(enum.Enum):
    """Where the truth about residency is, which is a different place for each kind."""

    PRIVATE_PAGES = "page tables: anonymous pages that are present or swapped, the zero page left out"
    MAPPED_PAGES = "page tables: present pages; the file's total tells of others"
    FILE_DATA = "SEEK_DATA and SEEK_HOLE; the file's total tells of fallocated, untouched pages"
    FILE_EXTENTS = "FIEMAP: allocated extents"
    PAGE_CACHE = "SEEK_DATA through /proc/self/map_files where allowed, else mincore"
    NONE = "the kernel does not tell; our own bookkeeping"


class Inheritance(enum.Enum):
    """What a child process has of the mapping with `fork="refuse"`."""

    WIPED = "the child reads zero (MADV_WIPEONFORK)"
    ABSENT = "the child has no such mapping (MADV_DONTFORK)"
    SHARED = "the child has the same memory"


@frozen
class Recipe:
    """What to do with one kind of mapping.

    Attributes:
        faults: Strategy name to the steps that populate, the discard left out.
        discard: The steps that give memory back; empty where nothing does.
        evidence: How to see what is resident.
        inheritance: What fork() does with it.
        fresh: What a freshly plugged block reads: "zero" or "file".
        reset: The steps before a populate, so that stray writes do not survive.
        cleanse: The steps after a populate where reset cannot be done.
        huge: As `faults`, for mappings with huge pages; what is not in it is done as
            `faults` says.
        bridge: Bytes of unplugged memory over which one discard is cheaper than two.
        scales: Whether several threads populate faster than one.
        trapped: The strategies, as in `faults`, that fill memory whose missing pages trap;
            empty where nothing can trap.
        blank: The steps after a discard inside a plugged block where missing pages trap, so
            that it reads zero all the same; empty where only memory could do that.
    """

    faults: Mapping[str, tuple[Step, ...]]
    discard: tuple[Step, ...]
    evidence: Evidence
    inheritance: Inheritance
    fresh: str = "zero"
    cleanse: tuple[Step, ...] = ()
    huge: Mapping[str, tuple[Step, ...]] = field(factory=dict)
    bridge: int = 0
    scales: bool = True
    trapped: Mapping[str, tuple[Step, ...]] = field(factory=dict)
    blank: tuple[Step, ...] = ()
    reset: tuple[Step, ...] = field(init=False)

    @reset.default
    def _reset_is_discard(self) -> tuple[Step, ...]:
        return self.discard

    def populate(
        self, strategy: str, *, huge: bool = False, warm: bool = False, protection: str = "none"
    ) -> tuple[Step, ...]:
        """All steps of a plug: allow access; what puts pages only where nothing is; or reset, fault and cleanse."""
        lift, move = PROTECTIONS[protection].lift, (Step.MOVE,) if warm else ()
        way = self.ways(huge=huge, protection=protection)[strategy]
        if protection == TRAP:
            return lift + move + self.reset + way + self.cleanse
        # Moving and filling are refused where there is anything, so they come before the
        # reset; the rest is for the chunks in which they were.
        fill = max((i + 1 for i, step in enumerate(way) if step in FILLS), default=0)
        return lift + move + way[:fill] + self.reset + way[fill:] + self.cleanse

    def release(self, protection: str = "none") -> tuple[Step, ...]:
        """All steps of an unplug: protect, and discard behind that."""
        return PROTECTIONS[protection].protect + (self.discard or self.cleanse)

    def thin(self, protection: str = "none") -> tuple[Step, ...]:
        """The steps that discard within a plugged block."""
        return self.discard + (self.blank if protection == TRAP else ())

    def empty(self, protection: str = "none") -> tuple[Step, ...]:
        """The steps of a plug that leaves populating to the first accesses."""
        return PROTECTIONS[protection].lift + self.discard

    def ways(self, *, huge: bool, protection: str = "none") -> Mapping[str, tuple[Step, ...]]:
        """The strategies that there are, with their steps."""
        if protection == TRAP:
            return self.trapped
        return {**self.faults, **self.huge} if huge else self.faults

    def recycle(self, strategy: str) -> tuple[Step, ...]:
        """The steps that make populated memory fresh without giving it back: what lacks, and zeroes."""
        return (*self.again(strategy), Step.ZERO)

    def again(self, strategy: str, protection: str = "none") -> tuple[Step, ...]:
        """The steps that populate a part of a block, perhaps a small one, and keep what is there."""
        if protection == TRAP:
            return self.trapped[strategy]
        if strategy == TOUCH:
            return self.faults[FUTEX]
        return self.faults[strategy if strategy in self.faults else POPULATE_WRITE]


@frozen
class Protection:
    """What keeps accesses off unplugged blocks, in steps over whole blocks.

    Attributes:
        lift: Before all other steps of a plug.
        protect: Before all other steps of an unplug: what is discarded then cannot come
            back by an access in between.
    """

    lift: tuple[Step, ...] = ()
    protect: tuple[Step, ...] = ()


TRAP, GUARD, PROT_NONE = "trap", "guard", "prot_none"
PROTECTIONS: Mapping[str, Protection] = {
    "none": Protection(),
    # Takes no step: registered with a userfaultfd, a page traps whenever it is not there.
    TRAP: Protection(),
    GUARD: Protection((Step.UNGUARD,), (Step.GUARD,)),
    PROT_NONE: Protection((Step.ALLOW,), (Step.FORBID,)),
}
"""The ways to protect unplugged blocks; which of them a mapping can have, `backends.protection` says."""

POPULATE_WRITE = "populate_write"
FALLOCATE = "fallocate"
COLLAPSE = "collapse"
UFFD_COPY = "uffd_copy"
UFFD_ZEROPAGE = "uffd_zeropage"
TOUCH = "touch"
FUTEX = "futex"
STRATEGIES = ("auto", POPULATE_WRITE, FALLOCATE, COLLAPSE, UFFD_COPY, UFFD_ZEROPAGE, TOUCH, FUTEX)
"""The ways of populating, by name; each kind of mapping has some of them.

`auto` is the fastest of them that works.  populate_write: MADV_POPULATE_WRITE.
fallocate: the file's pages first, with an errno of their own.  collapse: huge pages
in an ordinary memfd or tmpfs file.  uffd_copy and uffd_zeropage: small pages filled
through userfaultfd, without a fault each.  touch: a byte written to each page, to
compare with.  futex: for kernels without MADV_POPULATE_WRITE.
"""

FASTEST = {
    True: (COLLAPSE, POPULATE_WRITE, FUTEX),
    False: (UFFD_ZEROPAGE, UFFD_COPY, POPULATE_WRITE, FUTEX),
}
"""What `auto` tries, for huge pages or not; measured (benchmarks/RESULTS.md)."""

_LAST_FIRST = {POPULATE_WRITE: (Step.LAST_PAGES, Step.POPULATE_WRITE)}

_FAULT = {POPULATE_WRITE: (Step.POPULATE_WRITE,), TOUCH: (Step.TOUCH,), FUTEX: (Step.FUTEX,)}

# Without touch, which leaves a zero in each page.
_KEEP = {POPULATE_WRITE: (Step.POPULATE_WRITE,), FUTEX: (Step.FUTEX,)}

# Those that fill without a fault, so that where missing pages trap nothing of ours is trapped.
_COPY = {UFFD_COPY: (Step.UFFD_COPY,)}
_COPY_SHMEM = {UFFD_ZEROPAGE: (Step.UFFD_ZEROPAGE,), **_COPY}
# Elsewhere what they do not fill is populated.
_FILL = {UFFD_COPY: (Step.UFFD_COPY, Step.POPULATE_WRITE), **_FAULT}
_FILL_SHMEM = {UFFD_ZEROPAGE: (Step.UFFD_ZEROPAGE, Step.POPULATE_WRITE), **_FILL}
_BLANK = (Step.ZERO_PAGES,)

# fallocate first: it has an errno of its own (ENOSPC) where a fault has only
# EFAULT.  Never on a private mapping: it would pay for pages that the private
# copies then hide.  Nor on shmem: it knows nothing of MADV_NOHUGEPAGE, and with
# huge= or shmem_enabled set takes 2 MiB for a block of 64 KiB (measured on 6.18).
_ALLOCATE = {
    POPULATE_WRITE: (Step.POPULATE_WRITE,),
    FALLOCATE: (Step.FALLOCATE, Step.POPULATE_WRITE),
    TOUCH: (Step.FALLOCATE, Step.TOUCH),
    FUTEX: (Step.FALLOCATE, Step.FUTEX),
}

# Works without privilege and with shmem_enabled=never: a collapse needs no leave but
# the block's size (measured on 6.18: a tenth of the time).
_COLLAPSE = {COLLAPSE: (Step.FIRST_PAGES, Step.COLLAPSE, Step.POPULATE_WRITE), **_LAST_FIRST}

# A write fault on a private file mapping allocates the file's page and copies
# it: double memory.  Punching the file afterwards leaves the copy alone.
_ONCE = {
    POPULATE_WRITE: (Step.POPULATE_WRITE, Step.PUNCH),
    TOUCH: (Step.TOUCH, Step.PUNCH),
    FUTEX: (Step.FUTEX, Step.PUNCH),
}
# UFFDIO_COPY fills in private pages alone, and looks at no page of the file that nobody has
# mapped: so that goes first.
_COPY_ONCE = {UFFD_COPY: (Step.UFFD_COPY, Step.PUNCH)}
_ONCE_FILLED = {UFFD_COPY: (Step.PUNCH, Step.UFFD_COPY, *_ONCE[POPULATE_WRITE]), **_ONCE}

# A discard walks the page tables of what it covers, at about 0.4 us a MiB of nothing;
# beyond that a range of its own in a vectored call is cheaper (measured: 1 MiB gaps
# 0.42 against 0.43).  In a file it walks only what is there.
_WALK = (1 << 20) - 1
_ALWAYS = 1 << 62

_PUNCH_FILE_AND_COPY = (Step.PUNCH, Step.DONTNEED)

RECIPES: Mapping[Kind, Recipe] = {
    Kind.ANONYMOUS_PRIVATE: Recipe(
        _FILL,
        (Step.DONTNEED,),
        Evidence.PRIVATE_PAGES,
        Inheritance.WIPED,
        bridge=_WALK,
        huge=_LAST_FIRST,
        trapped=_COPY,
        blank=_BLANK,
    ),
    # No descriptor to punch, and DONTNEED only drops the page tables.
    Kind.ANONYMOUS_SHARED: Recipe(
        _FILL_SHMEM,
        (Step.REMOVE,),
        Evidence.PAGE_CACHE,
        Inheritance.SHARED,
        huge=_COLLAPSE,
        trapped=_COPY_SHMEM,
    ),
    # WIPEONFORK is EINVAL on hugetlb; a NORESERVE parent could SIGBUS on its
    # own write after a fork, so the child gets nothing.
    Kind.ANONYMOUS_HUGETLB: Recipe(
        _FAULT, (Step.DONTNEED,), Evidence.PRIVATE_PAGES, Inheritance.ABSENT, huge=_LAST_FIRST, trapped=_COPY
    ),
    # No descriptor either; and as with a hugetlb file, only mapped pages can be seen.
    Kind.ANONYMOUS_HUGETLB_SHARED: Recipe(
        _FAULT, (Step.REMOVE,), Evidence.MAPPED_PAGES, Inheritance.SHARED, huge=_LAST_FIRST, trapped=_COPY
    ),
    Kind.SHMEM_SHARED: Recipe(
        _FILL_SHMEM,
        (Step.PUNCH,),
        Evidence.FILE_DATA,
        Inheritance.SHARED,
        bridge=_ALWAYS,
        huge=_COLLAPSE,
        trapped=_COPY_SHMEM,
    ),
    Kind.SHMEM_PRIVATE: Recipe(
        _ONCE_FILLED,
        _PUNCH_FILE_AND_COPY,
        Evidence.PRIVATE_PAGES,
        Inheritance.ABSENT,
        trapped=_COPY_ONCE,
        blank=_BLANK,
    ),
    # UFFDIO_ZEROPAGE is EINVAL on hugetlb pages of every kind, UFFDIO_COPY is not (measured on 6.18).
    Kind.HUGETLB_SHARED: Recipe(
        _ALLOCATE, (Step.PUNCH,), Evidence.MAPPED_PAGES, Inheritance.SHARED, huge=_LAST_FIRST, trapped=_COPY
    ),
    # Populated once by nature: a private hugetlb fault allocates no file page.
    Kind.HUGETLB_PRIVATE: Recipe(
        _FAULT, (Step.DONTNEED,), Evidence.PRIVATE_PAGES, Inheritance.ABSENT, huge=_LAST_FIRST, trapped=_COPY
    ),
    # The file's own lock has punches and allocations wait for each other: two threads take 1.2 times
    # as long as one (ext4, measured).
    Kind.DISK_SHARED: Recipe(_ALLOCATE, (Step.PUNCH,), Evidence.FILE_EXTENTS, Inheritance.SHARED, scales=False),
    Kind.DISK_PRIVATE: Recipe(_FAULT, _PUNCH_FILE_AND_COPY, Evidence.PRIVATE_PAGES, Inheritance.ABSENT),
    # Never punched, never fallocated: the file is somebody's data.
    Kind.TEMPLATE: Recipe(_KEEP, (Step.DONTNEED,), Evidence.PRIVATE_PAGES, Inheritance.ABSENT, fresh="file"),
    # POPULATE_WRITE is EINVAL and nothing discards; what cannot be reset
    # beforehand is zeroed afterwards.
    Kind.SECRET: Recipe({FUTEX: (Step.FUTEX,)}, (), Evidence.NONE, Inheritance.SHARED, cleanse=(Step.ZERO,)),
}

# ---- advice, which keeps content ------------------------------------------------------

ADVICE: Mapping[str, tuple[Step, ...]] = {
    "collapse": (Step.COLLAPSE,),
    "cold": (Step.COLD,),
    "pageout": (Step.PAGEOUT,),
    "unprotect": (Step.UNPROTECT,),
}
"""The operations on plugged blocks that change where the content is, and not what it is."""

COLLAPSES = frozenset({Kind.ANONYMOUS_PRIVATE, Kind.ANONYMOUS_SHARED, Kind.SHMEM_SHARED})
"""Whose small pages MADV_COLLAPSE turns into huge ones.

Of a private mapping of a file it would take the file's pages, and the private copies
are what is used (EINVAL, measured on 6.18); a disk's page cache is not ours to keep huge.
"""
