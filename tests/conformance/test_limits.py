"""Limits and oddities that the library works around, on the kernel itself."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any

import pytest

from sparsemem import Anonymous, Memfd, Region
from tests.conformance.raw import (
    DONTNEED,
    FREE,
    GUARD_INSTALL,
    KERNEL,
    PAGE,
    REMOVE,
    SIZE,
    madvise,
    punch,
    supports,
)
from tests.support import accounting
from tests.support.children import run_child
from tests.support.resources import need_root


def test_nothing_discards_a_memfd_secret() -> None:
    """So the backend is plug-only, and zeroes what a failed plug leaves."""
    try:
        fd = KERNEL.memfd_secret()
    except OSError as error:
        pytest.skip(f"needs memfd_secret ({error.strerror})")
    try:
        os.ftruncate(fd, SIZE)
        from sparsemem._sys import lib

        address = KERNEL.reserve(SIZE, PAGE, lib.MAP_SHARED, fd, writable=True, locked=True)
        try:
            for advice in (DONTNEED, REMOVE, FREE, *([GUARD_INSTALL] if supports(GUARD_INSTALL) else [])):
                assert madvise(address, PAGE, advice) == errno.EINVAL
            assert punch(fd, 0, PAGE) == errno.EOPNOTSUPP
        finally:
            KERNEL.unmap(address, SIZE)
    finally:
        os.close(fd)


@pytest.mark.parametrize("backend", [Anonymous(), Memfd(), Memfd(shared=False)], ids=str)
def test_reserving_costs_nothing_even_if_all_memory_is_to_be_locked(backend: Any) -> None:
    """With MCL_FUTURE a privileged mmap of accessible memory populates all of it."""
    need_root("to lock memory without a limit")

    def child() -> tuple[int, int]:
        libc = ctypes.CDLL(None, use_errno=True)
        mcl_future = 2
        assert libc.mlockall(mcl_future) == 0
        with Region("4G", backend=backend) as region:
            reserved = accounting.smaps(region.address, region.size)["Rss"]
            region.plug(0, 4)
            region.unplug(0, 2)
            return reserved, accounting.smaps(region.address, region.size)["Rss"]

    assert run_child(child).result() == (0, 4 << 20)
