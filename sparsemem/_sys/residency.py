"""Which bytes of a mapping or file are really there.

No single source is right for every kind of mapping (measured on 6.18):
mincore says 1 for the anonymous zero page and 0 for fallocated, untouched shmem
and unmapped hugetlb; SEEK_DATA calls fallocated shmem a hole and all of a hugetlb
file data.  So each function here says for what it may be believed; `recipes`
says which one a kind of mapping needs.

All yield maximal, ascending `(offset, length)` runs in bytes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

from sparsemem._sys import ffi, lib
from sparsemem._sys.calls import Calls, check
from sparsemem._sys.files import PAGE_SIZE

Extent = tuple[int, int]

# Categories of PAGEMAP_SCAN: include/uapi/linux/fs.h, PAGE_IS_*.
_WRITTEN, _FILE, _PRESENT, _SWAPPED, _PFNZERO, _HUGE = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 6
_GUARD = 1 << 8

# And its flags, PM_SCAN_*: protect what matched, and fail where nobody would be told of writes.
_PROTECT, _ONLY_ASYNC = 1 << 0, 1 << 1

_ROOM = 512
_NOT_THERE = (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


def _walk(step: Callable[..., int], start: int, end: int) -> Iterator[Extent]:
    """Calls a function of the shim until it has walked [start, end), and joins what it yields."""
    out, n, following = ffi.new("sm_run[]", _ROOM), ffi.new("size_t *"), ffi.new("uint64_t *", start)
    held: Extent | None = None
    while following[0] < end:
        before = following[0]
        check(step(before, end, out, _ROOM, n, following))
        if following[0] <= before:
            raise OSError(errno.EIO, f"the kernel stopped telling at {before:#x} of {end:#x}")
        for run in out[0 : n[0]]:
            if held is not None and held[0] + held[1] == run.first:
                held = (held[0], held[1] + run.count)
            else:
                if held is not None:
                    yield held
                held = (run.first, run.count)
    if held is not None:
        yield held


def _page_tables(address: int, length: int, *, shared: bool, guarded: bool = False) -> Iterator[Extent]:
    """Pages in this process's page tables.

    A guard (MADV_GUARD_INSTALL) looks like a swapped page but for a category of its own, which older
    kernels do not know (6.15): it is only asked for where there can be any.

    PAGEMAP_SCAN (6.7) walks 1 TiB with one page in it in 0.04 ms.  Before it,
    /proc/self/pagemap is read: 2 GiB of it for 1 TiB, and the zero page counts.
    """
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        what = ffi.new("sm_scan *")
        what.any_of = _PRESENT | _SWAPPED
        what.none_of = 0 if shared else _PFNZERO | _FILE | (_GUARD if guarded else 0)
        found: Iterator[Extent] = _walk(_bind(lib.sm_pagemap_scan, fd, what), address, address + length)
        try:
            first = next(found, None)
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
            found = _walk(_bind(lib.sm_pagemap_read, fd, shared), address, address + length)
            first = next(found, None)
        if first is not None:
            yield first[0] - address, first[1]
        for start, size in found:
            yield start - address, size
    finally:
        os.close(fd)


def private_scan(address: int, length: int) -> list[Extent]:
    """As `private_pages`, by PAGEMAP_SCAN alone: an OSError where the kernel has none."""
    return _scan(address, length, any_of=_PRESENT | _SWAPPED, none_of=_PFNZERO | _FILE)


def huge_pages(address: int, length: int) -> list[Extent] | None:
    """Pages that are mapped here as huge ones, transparent or hugetlb; None where the kernel does not tell.

    By PAGEMAP_SCAN alone (6.7).  The huge zero page, which a mere read gives, holds nothing.
    A huge page of a file that is mapped as small ones here, or not at all, is not found.
    """
    try:
        return _scan(address, length, all_of=_PRESENT | _HUGE, none_of=_PFNZERO)
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        return None


def written_pages(address: int, length: int, *, protect: bool = True) -> list[Extent]:
    """Pages that were written to since the last call; from now on they count as not written.

    Of memory that is registered with a userfaultfd of WP_ASYNC (6.7): each page is protected, and
    the kernel takes the protection off as the page is written to.  One step, so that no
    write can fall between the look and the protection.  What was never looked at, or is
    not there, counts as written; but a page that was discarded in a *file* need not:
    the kernel keeps its mark (measured on 6.18).

    A page that is not there is marked, too, which then looks like a swapped one.

    Args:
        address: Where they begin.
        length: Bytes.
        protect: False only looks.

    Raises:
        OSError: EPERM where the memory is not registered so, ENOTTY before 6.7.
    """
    return _scan(address, length, all_of=_WRITTEN, flags=_ONLY_ASYNC | _PROTECT * protect)


def _scan(
    address: int, length: int, *, any_of: int = 0, all_of: int = 0, none_of: int = 0, flags: int = 0
) -> list[Extent]:
    what = ffi.new("sm_scan *", (any_of, all_of, none_of, flags))
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [(s - address, n) for s, n in _walk(_bind(lib.sm_pagemap_scan, fd, what), address, address + length)]
    finally:
        os.close(fd)


def guards(address: int, length: int) -> list[Extent]:
    """Guarded pages, by PAGEMAP_SCAN: an OSError where the kernel does not tell (before 6.15)."""
    return _scan(address, length, all_of=_GUARD)


def private_pages(address: int, length: int, *, guarded: bool = False) -> Iterator[Extent]:
    """Pages of one's own: present or swapped, neither the zero page nor a file's page.

    For private mappings of every kind.  `guarded` is whether there may be guards in it.
    """
    return _page_tables(address, length, shared=False, guarded=guarded)


def mapped_pages(address: int, length: int) -> Iterator[Extent]:
    """Pages that are mapped here, of whatever kind.  For shared hugetlb, with the file's total."""
    return _page_tables(address, length, shared=True)


def shared_anonymous(calls: Calls, address: int, size: int, offset: int, length: int) -> Iterator[Extent]:
    """Pages of a shared anonymous mapping, whose file has no descriptor, as offsets in it.

    Who may (CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE) opens the file behind the
    mapping, where SEEK_DATA jumps over what is not there; else it is mincore.
    """
    found = shared_anonymous_data(calls, address, size, offset, length)
    if found is not None:
        yield from found
        return
    for start, size in page_cache(address + offset, length):
        yield offset + start, size


def shared_anonymous_data(calls: Calls, address: int, size: int, offset: int, length: int) -> list[Extent] | None:
    """The same with swapped pages surely included; None if one may not see it."""
    try:
        fd = _open_behind(address, size)
    except OSError:  # not allowed
        return None
    try:
        return list(file_data(calls, fd, offset, offset + length))
    finally:
        os.close(fd)


def _open_behind(address: int, size: int) -> int:
    """The file of a mapping, which may be split by now (PROT_NONE, for one): its first part is of the same file."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        return os.open(f"/proc/self/map_files/{address:x}-{address + size:x}", flags)
    except FileNotFoundError:
        with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
            parts = (line.split(maxsplit=1)[0] for line in maps)
            first = next((part for part in parts if int(part.split("-")[0], 16) == address), "")
        return os.open(f"/proc/self/map_files/{first}", flags)


def page_cache(address: int, length: int) -> Iterator[Extent]:
    """Pages of a shared mapping that are in memory, mapped here or not.

    Slow where nothing is
    there (14 s for 1 TiB, measured), and blind for swapped pages.
    """
    for start, size in _walk(lib.sm_mincore, address, address + length):
        yield start - address, size


def file_data(calls: Calls, fd: int, start: int, end: int) -> Iterator[Extent]:
    """What SEEK_DATA calls data, in whole pages.  For shmem (swapped pages included), and disks without FIEMAP.

    Seeks on an open file description of its own: a duplicated descriptor shares
    its offset with the one that the caller goes on using.
    """
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield from _seek_data(calls, own, start, end)
    finally:
        os.close(own)


def _seek_data(calls: Calls, fd: int, start: int, end: int) -> Iterator[Extent]:
    while start < end:
        try:
            data = calls.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data up to the end of the file
                return
            raise
        if data >= end:
            return
        # The end of the file is a hole, too, and may lie within a page.
        hole = calls.lseek(fd, data, os.SEEK_HOLE)
        hole = min(hole + -hole % PAGE_SIZE, end)
        yield data, hole - data
        start = hole


def file_extents(calls: Calls, fd: int, start: int, end: int) -> Iterator[Extent]:
    """Allocated extents, those without data included.  For disk files."""
    found = _walk(_bind(lib.sm_fiemap, fd), start, end)
    try:
        first = next(found, None)
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        yield from file_data(calls, fd, start, end)
        return
    if first is not None:
        yield first
    yield from found


def _bind(function: Any, *bound: Any) -> Callable[..., int]:
    def call(start: int, end: int, *rest: Any) -> int:
        return int(function(*bound, start, end, *rest))

    return call


def file_total(calls: Calls, fd: int) -> int:
    """Bytes that the whole file uses, as the file system counts (st_blocks)."""
    return calls.fstat(fd).st_blocks * 512
