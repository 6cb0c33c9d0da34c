"""How each kind of mapping is populated and discarded: data, no code.

The kernel's rules differ with the kind of mapping, and the obvious call is
often the wrong one: MADV_DONTNEED on shared memory returns 0 and frees nothing,
punching a private memfd leaves the private copy alive.  The table below is
those rules; `tests/conformance` holds every line of it against the running
kernel, and the table in the documentation is made from it.

Each populate starts with the discard: a stray write may have put something
into an unplugged block, and a plugged block must read zero (or its template).
A discard of empty memory costs 1-7 us.
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
    FUTEX = "futex(FUTEX_WAKE_OP) on each page"
    ZERO = "memset to zero"


class Kind(enum.Enum):
    """The kinds of mapping that behave differently."""

    ANONYMOUS_PRIVATE = "anonymous private"
    ANONYMOUS_SHARED = "anonymous shared"
    ANONYMOUS_HUGETLB = "anonymous hugetlb private"
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
    """

    faults: Mapping[str, tuple[Step, ...]]
    discard: tuple[Step, ...]
    evidence: Evidence
    inheritance: Inheritance
    fresh: str = "zero"
    cleanse: tuple[Step, ...] = ()
    reset: tuple[Step, ...] = field(init=False)

    @reset.default
    def _reset_is_discard(self) -> tuple[Step, ...]:
        return self.discard

    def populate(self, strategy: str) -> tuple[Step, ...]:
        """All steps of a plug: reset, fault, cleanse."""
        return self.reset + self.faults[strategy] + self.cleanse


POPULATE_WRITE = "populate_write"
FUTEX = "futex"
STRATEGIES = ("auto", POPULATE_WRITE, FUTEX)

_TOUCH = {POPULATE_WRITE: (Step.POPULATE_WRITE,), FUTEX: (Step.FUTEX,)}

# fallocate first: it has an errno of its own (ENOSPC) where a fault has only
# EFAULT.  Never on a private mapping: it would pay for pages that the private
# copies then hide.  Nor on shmem: it knows nothing of MADV_NOHUGEPAGE, and with
# huge= or shmem_enabled set takes 2 MiB for a block of 64 KiB (measured on 6.18).
_ALLOCATE = {POPULATE_WRITE: (Step.POPULATE_WRITE,), FUTEX: (Step.FALLOCATE, Step.FUTEX)}

# A write fault on a private file mapping allocates the file's page and copies
# it: double memory.  Punching the file afterwards leaves the copy alone.
_ONCE = {
    POPULATE_WRITE: (Step.POPULATE_WRITE, Step.PUNCH),
    FUTEX: (Step.FUTEX, Step.PUNCH),
}

_PUNCH_FILE_AND_COPY = (Step.PUNCH, Step.DONTNEED)

RECIPES: Mapping[Kind, Recipe] = {
    Kind.ANONYMOUS_PRIVATE: Recipe(_TOUCH, (Step.DONTNEED,), Evidence.PRIVATE_PAGES, Inheritance.WIPED),
    # No descriptor to punch, and DONTNEED only drops the page tables.
    Kind.ANONYMOUS_SHARED: Recipe(_TOUCH, (Step.REMOVE,), Evidence.PAGE_CACHE, Inheritance.SHARED),
    # WIPEONFORK is EINVAL on hugetlb; a NORESERVE parent could SIGBUS on its
    # own write after a fork, so the child gets nothing.
    Kind.ANONYMOUS_HUGETLB: Recipe(_TOUCH, (Step.DONTNEED,), Evidence.PRIVATE_PAGES, Inheritance.ABSENT),
    Kind.SHMEM_SHARED: Recipe(_TOUCH, (Step.PUNCH,), Evidence.FILE_DATA, Inheritance.SHARED),
    Kind.SHMEM_PRIVATE: Recipe(_ONCE, _PUNCH_FILE_AND_COPY, Evidence.PRIVATE_PAGES, Inheritance.ABSENT),
    Kind.HUGETLB_SHARED: Recipe(_ALLOCATE, (Step.PUNCH,), Evidence.MAPPED_PAGES, Inheritance.SHARED),
    # Populated once by nature: a private hugetlb fault allocates no file page.
    Kind.HUGETLB_PRIVATE: Recipe(_TOUCH, (Step.DONTNEED,), Evidence.PRIVATE_PAGES, Inheritance.ABSENT),
    Kind.DISK_SHARED: Recipe(_ALLOCATE, (Step.PUNCH,), Evidence.FILE_EXTENTS, Inheritance.SHARED),
    Kind.DISK_PRIVATE: Recipe(_TOUCH, _PUNCH_FILE_AND_COPY, Evidence.PRIVATE_PAGES, Inheritance.ABSENT),
    # Never punched, never fallocated: the file is somebody's data.
    Kind.TEMPLATE: Recipe(_TOUCH, (Step.DONTNEED,), Evidence.PRIVATE_PAGES, Inheritance.ABSENT, fresh="file"),
    # POPULATE_WRITE is EINVAL and nothing discards; what cannot be reset
    # beforehand is zeroed afterwards.
    Kind.SECRET: Recipe({FUTEX: (Step.FUTEX,)}, (), Evidence.NONE, Inheritance.SHARED, cleanse=(Step.ZERO,)),
}
