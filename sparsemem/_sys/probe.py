"""What this kernel can do, found by trying it and never by its version.

Distributions backport, vendors reuse numbers (advice 23 was something else on
one 5.4 kernel), containers filter: only the call itself tells.
"""

from __future__ import annotations

import errno
import functools
import os
import resource
import weakref
from collections.abc import Callable

from sparsemem._sys import ffi, lib, uffd
from sparsemem._sys.calls import Calls, check
from sparsemem._sys.files import PAGE_SIZE, shared_files, thp_size
from sparsemem._sys.residency import guards, page_cache, private_scan, written_pages

# What an unknown or forbidden advice gives, and EAGAIN, ENOMEM and EBUSY what a collapse
# gives for want of a huge page (madvise(2)).
_FOR_NOW = (errno.EAGAIN, errno.ENOMEM, errno.EBUSY)
_REFUSALS = (errno.EINVAL, errno.ENOSYS, errno.EPERM, *_FOR_NOW)

_PRIVATE = lib.MAP_PRIVATE | lib.MAP_ANONYMOUS | lib.MAP_NORESERVE
_SHARED = lib.MAP_SHARED | lib.MAP_ANONYMOUS | lib.MAP_NORESERVE


def _remembered(trial: Callable[[Calls], bool]) -> Callable[[Calls], bool]:
    """Tries once for each `calls` object."""
    answers: weakref.WeakKeyDictionary[Calls, bool] = weakref.WeakKeyDictionary()

    @functools.wraps(trial)
    def answer(calls: Calls) -> bool:
        if calls not in answers:
            answers[calls] = trial(calls)
        return answers[calls]

    return answer


@_remembered
def populate_write(calls: Calls) -> bool:
    """Whether MADV_POPULATE_WRITE populates (Linux 5.14).

    An unknown advice is EINVAL, but a known one need not be the right one: a
    page is populated and looked for.  Remembered for each `calls` object.
    """
    address = calls.reserve(PAGE_SIZE, PAGE_SIZE, _PRIVATE, -1, writable=True, locked=False)
    try:
        calls.madvise(address, PAGE_SIZE, lib.MADV_POPULATE_WRITE)
        return list(page_cache(address, PAGE_SIZE)) == [(0, PAGE_SIZE)]
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOSYS, errno.EPERM):
            return False
        raise
    finally:
        calls.unmap(address, PAGE_SIZE)


@_remembered
def collapse(calls: Calls) -> bool:
    """Whether MADV_COLLAPSE makes a huge page of a memfd's small one (Linux 6.1).

    Not with shmem_enabled=deny or PR_SET_THP_DISABLE.  Remembered for each `calls` object.
    """
    huge = thp_size(shared_files())
    if huge is None:
        return False
    fd = address = None
    try:
        fd = calls.memfd_create("sparsemem-probe", lib.MFD_CLOEXEC)
        calls.ftruncate(fd, huge)
        address = calls.reserve(huge, huge, lib.MAP_SHARED | lib.MAP_NORESERVE, fd, writable=True, locked=False)
        calls.madvise(address, PAGE_SIZE, lib.MADV_POPULATE_WRITE)
        calls.madvise(address, huge, lib.MADV_COLLAPSE)
        return True
    except OSError as error:
        if error.errno in _REFUSALS:
            return False
        raise
    finally:
        if address is not None:
            calls.unmap(address, huge)
        if fd is not None:
            calls.close(fd)


def _keeps_content(calls: Calls, advice: int, length: int = PAGE_SIZE) -> bool:
    """Whether fresh private memory with one page in it takes the advice and has that page afterwards.

    Also where it was only for want of memory that it did not: the next one may find some.
    """
    address = calls.reserve(length, length, _PRIVATE, -1, writable=True, locked=False)
    try:
        byte = ffi.cast("unsigned char *", address)
        byte[0] = 0x5A
        calls.madvise(address, length, advice)
        return bool(byte[0] == 0x5A)
    except OSError as error:
        if error.errno in _REFUSALS:
            return error.errno in _FOR_NOW
        raise
    finally:
        calls.unmap(address, length)


@_remembered
def collapse_private(calls: Calls) -> bool:
    """Whether MADV_COLLAPSE works on private memory (Linux 6.1; not with PR_SET_THP_DISABLE)."""
    huge = thp_size(shared_files())
    return huge is not None and _keeps_content(calls, lib.MADV_COLLAPSE, huge)


@_remembered
def cold(calls: Calls) -> bool:
    """Whether MADV_COLD works (Linux 5.4)."""
    return _keeps_content(calls, lib.MADV_COLD)


@_remembered
def pageout(calls: Calls) -> bool:
    """Whether MADV_PAGEOUT works (Linux 5.4)."""
    return _keeps_content(calls, lib.MADV_PAGEOUT)


def _fills(calls: Calls, way: int, flags: int) -> bool:
    address = calls.reserve(PAGE_SIZE, PAGE_SIZE, flags, -1, writable=True, locked=False)
    try:
        return way in uffd.shared(calls).register(address, PAGE_SIZE)
    except OSError as error:
        if error.errno in _REFUSALS:
            return False
        raise
    finally:
        calls.unmap(address, PAGE_SIZE)


@_remembered
def uffd_copy(calls: Calls) -> bool:
    """Whether private memory can be filled with UFFDIO_COPY (userfaultfd for all users: Linux 5.11)."""
    return _fills(calls, uffd.COPY, _PRIVATE)


@_remembered
def uffd_move(calls: Calls) -> bool:
    """Whether pages can be moved with UFFDIO_MOVE (Linux 6.8)."""
    return _fills(calls, uffd.MOVE, _PRIVATE)


@_remembered
def uffd_shmem(calls: Calls) -> bool:
    """Whether shared memory can be filled with UFFDIO_ZEROPAGE and UFFDIO_COPY (as we register it: Linux 5.19)."""
    return _fills(calls, uffd.ZEROPAGE, _SHARED)


@_remembered
def trap(calls: Calls) -> bool:
    """Whether a userfaultfd traps accesses to private and shared memory (UFFD_FEATURE_SIGBUS, Linux 4.14).

    A write by the kernel for us has to be EFAULT, before a page is filled in and not after.
    """
    return _traps(calls, _PRIVATE, uffd.COPY) and _traps(calls, _SHARED, uffd.ZEROPAGE)


@_remembered
def catch(calls: Calls) -> bool:
    """Whether a userfaultfd tells of them instead.

    And whether a page can be poisoned (UFFDIO_POISON, Linux 6.6): what else could be done with an
    access for which there is no memory?
    """
    return all(_traps(calls, flags, uffd.POISON, uffd.Purpose.CATCH) for flags in (_PRIVATE, _SHARED))


def _traps(calls: Calls, flags: int, way: int, purpose: uffd.Purpose = uffd.Purpose.TRAP) -> bool:
    address = calls.reserve(PAGE_SIZE, PAGE_SIZE, flags, -1, writable=True, locked=False)
    try:
        found = uffd.Userfaultfd(calls, purpose)
        return way in found.register(address, PAGE_SIZE) and not _accessible(address)
    except OSError as error:
        if error.errno in (*_REFUSALS, errno.EOPNOTSUPP):
            return False
        raise
    finally:
        calls.unmap(address, PAGE_SIZE)


@_remembered
def guard(calls: Calls) -> bool:
    """Whether MADV_GUARD_INSTALL bars access to private and shared memory, and PAGEMAP_SCAN tells (Linux 6.15).

    6.13 and 6.14 guard private memory, but audits would take its guards for swapped pages.
    """
    return _guards(calls, _PRIVATE) and _guards(calls, _SHARED)


def _guards(calls: Calls, flags: int) -> bool:
    address = calls.reserve(PAGE_SIZE, PAGE_SIZE, flags, -1, writable=True, locked=False)
    try:
        calls.madvise(address, PAGE_SIZE, lib.MADV_GUARD_INSTALL)
        barred = not _accessible(address) and guards(address, PAGE_SIZE) == [(0, PAGE_SIZE)]
        calls.madvise(address, PAGE_SIZE, lib.MADV_GUARD_REMOVE)
        return barred and _accessible(address)
    except OSError as error:
        if error.errno in (*_REFUSALS, errno.ENOTTY):
            return False
        raise
    finally:
        calls.unmap(address, PAGE_SIZE)


@_remembered
def removes_forbidden(calls: Calls) -> bool:
    """Whether MADV_REMOVE works where access is forbidden (EACCES on kernels that want it writable)."""
    address = calls.reserve(PAGE_SIZE, PAGE_SIZE, _SHARED, -1, writable=True, locked=False)
    try:
        calls.protect(address, PAGE_SIZE, lib.PROT_NONE)
        calls.madvise(address, PAGE_SIZE, lib.MADV_REMOVE)
        return True
    except OSError as error:
        if error.errno in (errno.EACCES, *_REFUSALS):
            return False
        raise
    finally:
        calls.unmap(address, PAGE_SIZE)


def _accessible(address: int) -> bool:
    return writable(memoryview(ffi.buffer(ffi.cast("char *", address), 1)))


def writable(memory: memoryview) -> bool:
    """Whether memory can be written, found without a signal; it becomes zero."""
    zeroes = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.readv(zeroes, [memory])
        return True
    except OSError as error:
        if error.errno == errno.EFAULT:
            return False
        raise
    finally:
        os.close(zeroes)


@_remembered
def tracks_writes(calls: Calls) -> bool:
    """Whether the kernel tells which pages were written to (UFFD_FEATURE_WP_ASYNC and PAGEMAP_SCAN: Linux 6.7)."""
    address = calls.reserve(PAGE_SIZE, PAGE_SIZE, _PRIVATE, -1, writable=True, locked=False)
    try:
        found = uffd.shared(calls)  # in a variable, since it goes with the last who refers to it
        found.register(address, PAGE_SIZE)
        byte = ffi.cast("unsigned char *", address)
        told = []
        for write in (True, False, True):
            if write:
                byte[0] = 1
            told.append(bool(written_pages(address, PAGE_SIZE)))
        return told == [True, False, True]
    except OSError as error:
        if error.errno in (*_REFUSALS, errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOENT, errno.EACCES):
            return False
        raise
    finally:
        calls.unmap(address, PAGE_SIZE)


@_remembered
def vectored(calls: Calls) -> bool:
    """Whether one process_madvise(2) can work on many ranges of our own (Linux 6.13 or later).

    Found by trying it on real pages; remembered for each `calls` object.
    """
    return calls.can_vector()


def file_system(path: str) -> int:
    """The magic number of the file system that a path is on, 0 if there is no such path."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        return check(lib.sm_filesystem_type(fd, ffi.new("uint64_t *")))
    finally:
        os.close(fd)


def makes_secrets(calls: Calls) -> bool:
    """Whether memfd_secret() works (5.14; often switched off)."""
    try:
        os.close(calls.memfd_secret())
    except OSError:
        return False
    return True


def opens_map_files() -> bool:
    """Whether shared anonymous memory can be opened as a file: if not, auditing 1 TiB of it takes 14 s."""
    try:
        with os.scandir("/proc/self/map_files") as mappings:
            os.close(os.open(next(mappings).path, os.O_RDONLY | os.O_CLOEXEC))
    except (OSError, StopIteration):
        return False
    return True


def lockable() -> int | None:
    """Bytes that one without privileges may lock (RLIMIT_MEMLOCK), as secret memory is; None is no limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def names_mappings(calls: Calls) -> bool:
    """Whether anonymous mappings can be named (PR_SET_VMA_ANON_NAME, CONFIG_ANON_VMA_NAME)."""
    return _with_page(calls, lambda address: calls.name_mapping(address, PAGE_SIZE, "sparsemem"))


def scans_pagemap(calls: Calls) -> bool:
    """Whether PAGEMAP_SCAN works (6.7); without it audits read all of /proc/self/pagemap."""
    return _with_page(calls, lambda address: private_scan(address, PAGE_SIZE))


def advises(calls: Calls, advice: int) -> bool:
    """Whether a fresh anonymous page accepts an madvise advice."""
    return _with_page(calls, lambda address: calls.madvise(address, PAGE_SIZE, advice))


def largest_reservation(calls: Calls) -> int:
    """Bytes of the largest power of two that can be reserved at once, from 1 GiB on; 0 if not even that."""
    largest = 0
    for power in range(30, 48):
        try:
            address = calls.reserve(1 << power, PAGE_SIZE, _PRIVATE, -1, writable=True, locked=False)
        except OSError:
            break
        calls.unmap(address, 1 << power)
        largest = 1 << power
    return largest


def _with_page(calls: Calls, attempt: Callable[[int], object]) -> bool:
    address = calls.reserve(PAGE_SIZE, PAGE_SIZE, _PRIVATE, -1, writable=True, locked=False)
    try:
        attempt(address)
    except OSError:
        return False
    finally:
        calls.unmap(address, PAGE_SIZE)
    return True


def can_punch(calls: Calls, fd: int, size: int) -> int:
    """0 if the file can be punched, else the errno of trying.

    Tried beyond the end of the file, where there is nothing to lose: the
    checks for seals (EPERM), for the way it was opened (EBADF) and for the file
    system (EOPNOTSUPP) come first.
    """
    try:
        calls.fallocate(fd, lib.FALLOC_FL_PUNCH_HOLE | lib.FALLOC_FL_KEEP_SIZE, size, PAGE_SIZE)
    except OSError as error:
        return error.errno or errno.EIO
    return 0
