"""The errors that sparsemem raises.

Every one is a `SparseMemError` and also the builtin that fits, so callers may
catch either.  They are plain classes that survive pickling and copying with
all their details.
"""

from __future__ import annotations

import enum
from typing import Any

Run = tuple[int, int]


class Cause(enum.Enum):
    """Why a populate failed, *inferred* afterwards from what the kernel shows.

    The errno alone says little: EFAULT is a full tmpfs, an empty huge page
    pool, a truncated file and a guard page alike.
    """

    TMPFS_FULL = "the tmpfs is full"
    FILESYSTEM_FULL = "the file system is full"
    HUGETLB_POOL = "the huge page pool is empty"
    HUGETLBFS_SIZE = "the size= limit of the hugetlbfs mount is reached"
    HUGETLB_CGROUP = "the huge page limit of a control group is reached"
    MEMORY_CGROUP = "the memory limit of a control group is reached"
    SYSTEM_MEMORY = "the machine has no memory to give"
    OVERCOMMIT = "the commit limit is reached (vm.overcommit_memory=2)"
    BUDGET = "the Budget is spent"
    CAPACITY = "the simulated capacity is used up"
    FILE_TRUNCATED = "the file ends before the block (truncated underneath?)"
    MAPPING_HOLE = "something unmapped a part of the region"
    MAPPINGS = "the process has as many mappings as it may (vm.max_map_count)"
    PROTECTION = "the mapping does not allow it"
    POISONED = "a page is poisoned by a hardware error"
    UNKNOWN = "the kernel did not say why"

    @property
    def exhausted(self) -> bool:
        """Whether the backend had no more to give, as opposed to being broken."""
        return self in _EXHAUSTED


_EXHAUSTED = frozenset(
    {
        Cause.TMPFS_FULL,
        Cause.FILESYSTEM_FULL,
        Cause.HUGETLB_POOL,
        Cause.HUGETLBFS_SIZE,
        Cause.HUGETLB_CGROUP,
        Cause.MEMORY_CGROUP,
        Cause.SYSTEM_MEMORY,
        Cause.OVERCOMMIT,
        Cause.BUDGET,
        Cause.CAPACITY,
    }
)


def _rebuild(cls: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error = cls.__new__(cls, *args)
    # Where a subclass has an __init__ of its own, OSError takes errno and text
    # out of the arguments in __init__ and not in __new__.
    (OSError if isinstance(error, OSError) else BaseException).__init__(error, *args)
    error.__dict__.update(state)
    return error


class SparseMemError(Exception):
    """Base of all errors of this package."""

    def __reduce__(self) -> Any:
        # The default protocol would call the class with args alone, which the
        # keyword-only details are not in.
        return _rebuild, (type(self), self.args, dict(self.__dict__))


class ReserveError(SparseMemError, OSError):
    """The address space or the file for a region could not be had; nothing is left behind."""


class PopulateError(SparseMemError, OSError):
    """Blocks could not be populated; all that had been was given back again.

    Attributes:
        errno: The kernel's own errno.
        offset: Byte offset in the region at which it stopped.
        populated: Bytes that had been populated before that, at least.
        rolled_back: False if giving them back failed too: see `Region.scrub`.
        cause: A `Cause`, inferred afterwards.
    """

    def __init__(
        self,
        errno: int,
        message: str,
        *,
        offset: int = 0,
        populated: int = 0,
        rolled_back: bool = True,
        cause: Cause = Cause.UNKNOWN,
    ) -> None:
        super().__init__(errno, message)
        self.offset = offset
        self.populated = populated
        self.rolled_back = rolled_back
        self.cause = cause


class BackendExhaustedError(PopulateError, MemoryError):
    """The backend has no more memory to give; `cause` says which limit it was."""


class DiscardError(SparseMemError, OSError):
    """Memory could not be given back.

    The runs are of blocks, but of bytes where `Region.discard` failed inside
    blocks; those stay plugged, and none becomes tainted.

    Attributes:
        errno: The kernel's own errno.
        discarded: Runs whose memory was given back.
        remaining: Runs that were left as they were.
        tainted: Runs that may have lost content or kept memory.
    """

    def __init__(
        self,
        errno: int,
        message: str,
        *,
        discarded: tuple[Run, ...] = (),
        remaining: tuple[Run, ...] = (),
        tainted: tuple[Run, ...] = (),
    ) -> None:
        super().__init__(errno, message)
        self.discarded = discarded
        self.remaining = remaining
        self.tainted = tainted


class AdviceError(SparseMemError, OSError):
    """The kernel refused advice about plugged blocks, which stay as they are, content and all."""


class BlockStateError(SparseMemError, ValueError):
    """A block is not in the state that the operation needs; nothing changed.

    Attributes:
        block: The first block that is in the way, or None.
    """

    def __init__(self, message: str, *, block: int | None = None) -> None:
        super().__init__(message)
        self.block = block


class BlockRangeError(SparseMemError, ValueError):
    """Blocks, bytes or runs that the region does not have, or that overlap."""


class RegionClosedError(SparseMemError, ValueError):
    """The region is closed."""


class ForkedRegionError(RegionClosedError):
    """The region belongs to the parent process (`fork="refuse"`)."""


class ViewsAliveError(SparseMemError, BufferError):
    """A view, or something made from one, still uses the blocks."""


class ListenerVetoError(SparseMemError, RuntimeError):
    """A listener refused; its exception is the `__cause__`."""


class SnapshotError(SparseMemError, ValueError):
    """A snapshot is not what it should be: cut off, corrupted, foreign, newer, or not for this region."""


class SnapshotIOError(OSError, SnapshotError):  # OSError first, which takes errno out of the arguments
    """A snapshot could not be written or read; `errno` is the kernel's own.

    After a failed save the file that had the name before is as it was.  One error comes later, and says
    so: the new file has the name, but the disk does not promise that it keeps it.
    """


class _StoppedError(SparseMemError):
    """What the two below have in common."""

    def __init__(
        self,
        message: str,
        *,
        discarded: tuple[Run, ...] = (),
        remaining: tuple[Run, ...] = (),
        tainted: tuple[Run, ...] = (),
    ) -> None:
        super().__init__(message)
        self.discarded = discarded
        self.remaining = remaining
        self.tainted = tainted


class OperationCancelledError(_StoppedError):
    """The operation was cancelled.  A plug is rolled back; an unplug stops where it is.

    Attributes:
        discarded: Of an unplug, runs of blocks that were unplugged before; and
            likewise as for `DiscardError`:
        remaining: Runs that were left as they were.
        tainted: Runs whose content is unknown.
    """


class DeadlineError(_StoppedError, TimeoutError):
    """The operation did not end in time; else as `OperationCancelledError`."""


class UnsupportedError(SparseMemError, NotImplementedError):
    """The backend, the kernel or the machine cannot do that, and why."""


class HugePageSplitWarning(RuntimeWarning):
    """A discard cuts a huge page, which becomes small pages and may free nothing."""
