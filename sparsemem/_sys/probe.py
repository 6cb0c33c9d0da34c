"""What this kernel can do, found by trying it and never by its version.

Distributions backport, vendors reuse numbers (advice 23 was something else on
one 5.4 kernel), containers filter: only the call itself tells.
"""

from __future__ import annotations

import errno
import weakref

from sparsemem._sys import lib
from sparsemem._sys.calls import Calls
from sparsemem._sys.files import PAGE_SIZE
from sparsemem._sys.residency import page_cache

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
    address = calls.reserve(
        PAGE_SIZE, PAGE_SIZE, lib.MAP_PRIVATE | lib.MAP_ANONYMOUS | lib.MAP_NORESERVE, -1, writable=True, locked=False
    )
    try:
        calls.madvise(address, PAGE_SIZE, lib.MADV_POPULATE_WRITE)
        return list(page_cache(address, PAGE_SIZE)) == [(0, PAGE_SIZE)]
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOSYS, errno.EPERM):
            return False
        raise
    finally:
        calls.unmap(address, PAGE_SIZE)


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
