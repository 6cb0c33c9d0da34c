"""What an existing file already holds, and what to do about it.

An unplugged block holds no data: so a rollback may discard whatever it
populated and cannot touch anything older.  This is where that is made true for
a file that was there before.
"""

from __future__ import annotations

import errno

from sparsemem._sys import lib, residency
from sparsemem._sys.calls import Calls
from sparsemem._sys.descriptor import Descriptor
from sparsemem.backends.base import Request
from sparsemem.backends.kernel import Adopted
from sparsemem.errors import ReserveError, Run
from sparsemem.recipes import Kind
from sparsemem.runs import join, subtract, to_blocks
from sparsemem.units import exact_size

EXISTING = ("error", "adopt", "discard", "trust")


def check_existing(existing: str) -> str:
    """The mode, or a ValueError that lists the modes."""
    if existing not in EXISTING:
        raise ValueError(f"existing {existing!r} is none of {', '.join(map(repr, EXISTING))}")
    return existing


def check_existing_data(calls: Calls, fd: Descriptor, kind: Kind, existing: str, request: Request) -> None:
    """Refuses a file that holds data which nobody takes over; changes nothing.

    Raises:
        ReserveError: Something is allocated outside of `request.plugged` and
            `existing` is "error", or it cannot be told where and "adopt" asks.
    """
    if existing in ("discard", "trust"):
        return
    found, unplaced = _allocated(calls, fd.fd, kind, request.size)
    held = sum(length for _, length in request.plugged)
    if existing == "adopt":
        # What the kernel does not place, the caller may.
        if unplaced > held:
            raise ReserveError(
                errno.EOPNOTSUPP,
                f"the file holds {exact_size(unplaced)} that the kernel does not place: "
                "say which blocks hold data with Region(plugged=runs)",
            )
        return
    stray = subtract(found, request.plugged)
    if stray or unplaced > held:
        where = f"at offset {stray[0][0]}" if stray else "somewhere"
        raise ReserveError(
            errno.EEXIST,
            f"the file already holds data {where} in the first {exact_size(request.size)}: existing='adopt' takes it "
            "over as plugged blocks, existing='discard' throws it away, plugged=runs names the blocks that hold it",
        )


def adopt_existing(calls: Calls, fd: Descriptor, kind: Kind, existing: str, request: Request) -> Adopted:
    """Which blocks are taken over, and what those and `request.plugged` lack; changes nothing."""
    if existing == "trust":
        return Adopted((), ())  # populated by whoever uses it, when they like
    found, _ = _allocated(calls, fd.fd, kind, request.size)
    shift = request.block_size.bit_length() - 1
    blocks = to_blocks(found, shift) if existing == "adopt" else []
    adopted = [(first << shift, count << shift) for first, count in blocks]
    return Adopted(tuple(adopted), tuple(subtract(join([*adopted, *request.plugged]), found)))


def discard_existing(calls: Calls, fd: Descriptor, request: Request) -> None:
    """Throws away what the file held, but for `request.plugged`.

    Raises:
        ReserveError: The file cannot be punched.
    """
    try:
        for offset, length in subtract([(0, request.size)], request.plugged):
            calls.fallocate(fd.fd, lib.FALLOC_FL_PUNCH_HOLE | lib.FALLOC_FL_KEEP_SIZE, offset, length)
    except OSError as error:
        raise ReserveError(error.errno, f"existing='discard': cannot punch the file: {error.strerror}") from error


def _allocated(calls: Calls, fd: int, kind: Kind, size: int) -> tuple[list[Run], int]:
    """Allocated byte runs, and bytes that are allocated somewhere the kernel does not say."""
    total = residency.file_total(calls, fd)
    if kind is Kind.DISK_SHARED:
        return list(residency.file_extents(calls, fd, 0, size)), 0
    if kind is Kind.HUGETLB_SHARED:
        return [], total  # SEEK_DATA says "data" for all of it
    found = list(residency.file_data(calls, fd, 0, size))
    beyond = sum(length for _, length in residency.file_data(calls, fd, size, (1 << 63) - 1))
    return found, max(0, total - beyond - sum(length for _, length in found))
