"""What this kernel can do, found by trying it and never by its version.

Distributions backport, vendors reuse numbers (advice 23 was something else on
one 5.4 kernel), containers filter: only the call itself tells.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable

from sparsemem._sys import lib
from sparsemem._sys.calls import Calls, check
from sparsemem._sys.files import PAGE_SIZE
from sparsemem._sys.residency import page_cache, private_scan

_PRIVATE = lib.MAP_PRIVATE | lib.MAP_ANONYMOUS | lib.MAP_NORESERVE

_populate_write: weakref.WeakKeyDictionary[Calls, bool] = weakref.WeakKeyDictionary()


def populate_write(calls: Calls) -> bool:
    """Whether MADV_POPULATE_WRITE populates (Linux 5.14).

    An unknown advice is EINVAL, but a known one need not be the right one: a
    page is populated and looked for.  Remembered for each `calls` object.
    """
    if calls not in _populate_write:
        _populate_write[calls] = _try_populate_write(calls)
    return _populate_write[calls]


def _try_populate_write(calls: Calls) -> bool:
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


def detached_tmpfs_file(size: int) -> int:
    """A descriptor of an unnamed file on a tmpfs of `size` bytes that is mounted nowhere.

    Raises:
        OSError: It takes CAP_SYS_ADMIN, and Linux 5.2.
    """
    mount = check(lib.sm_detached_tmpfs(str(size).encode()))
    try:
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=mount)
    finally:
        os.close(mount)


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
