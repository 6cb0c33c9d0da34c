"""Raw mappings and calls, so that the kernel itself is tested and not the library."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from sparsemem._sys import calls, lib
from tests.support import accounting
from tests.support.accounting import Page

PAGE = 4096
SIZE = 64 * PAGE
HUGE = 2 << 20
KERNEL = calls.kernel

POPULATE_READ, POPULATE_WRITE = 22, 23
DONTNEED, FREE, REMOVE = 4, 8, 9
GUARD_INSTALL, GUARD_REMOVE, DONTNEED_LOCKED = 102, 103, 24
PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2


def madvise(address: int, length: int, advice: int) -> int:
    """0 or the errno."""
    return -int(lib.sm_madvise(address, length, advice))


def punch(fd: int, offset: int, length: int) -> int:
    """0 or the errno."""
    return -int(lib.sm_fallocate(fd, lib.FALLOC_FL_PUNCH_HOLE | lib.FALLOC_FL_KEEP_SIZE, offset, length))


def supports(advice: int) -> bool:
    """Whether the kernel knows the advice: with no range at all it is 0 then, else EINVAL."""
    return madvise(0, 0, advice) == 0


@dataclass
class Raw:
    """One raw mapping."""

    address: int
    size: int
    page: int
    fd: int = -1

    def populated(self) -> bool:
        return madvise(self.address, self.size, POPULATE_WRITE) == 0

    def write(self, offset: int, data: bytes) -> None:
        lib_memory(self.address + offset, len(data))[:] = data

    def read(self, offset: int, length: int) -> bytes:
        return bytes(lib_memory(self.address + offset, length))

    def private(self) -> int:
        runs = accounting.pagemap_scan(
            self.address, self.size, any_of=Page.PRESENT | Page.SWAPPED, none_of=Page.PFNZERO | Page.FILE
        )
        return sum(end - start for start, end in runs)

    def present(self) -> int:
        runs = accounting.pagemap_scan(self.address, self.size, any_of=Page.PRESENT)
        return sum(end - start for start, end in runs)

    def in_file(self) -> int:
        return accounting.allocated_bytes(self.fd) if self.fd >= 0 else 0


def lib_memory(address: int, length: int) -> memoryview:
    """Memory at an address."""
    from sparsemem._sys import ffi

    return memoryview(ffi.buffer(ffi.cast("char *", address), length))


@contextmanager
def mapping(
    *,
    shared: bool = False,
    fd: int = -1,
    huge: bool = False,
    size: int = SIZE,
    writable: bool = True,
    locked: bool = False,
) -> Iterator[Raw]:
    """A mapping with MAP_NORESERVE; anonymous without a descriptor."""
    flags = (lib.MAP_SHARED if shared else lib.MAP_PRIVATE) | lib.MAP_NORESERVE
    if fd < 0:
        flags |= lib.MAP_ANONYMOUS | (lib.MAP_HUGETLB | 21 << 26 if huge else 0)
    size = 4 * HUGE if huge else size
    address = KERNEL.reserve(size, HUGE if huge else PAGE, flags, fd, writable=writable, locked=locked)
    if not huge and fd < 0:
        madvise(address, size, lib.MADV_NOHUGEPAGE)
    try:
        yield Raw(address, size, HUGE if huge else PAGE, fd)
    finally:
        KERNEL.unmap(address, size)


@contextmanager
def memfd(*, huge: bool = False) -> Iterator[int]:
    """A memfd of the size that `mapping` maps."""
    fd = KERNEL.memfd_create(
        "conformance", lib.MFD_CLOEXEC | lib.MFD_ALLOW_SEALING | (lib.MFD_HUGETLB | 21 << 26 if huge else 0)
    )
    try:
        os.ftruncate(fd, 4 * HUGE if huge else SIZE)
        yield fd
    finally:
        os.close(fd)


def need(advice: int, name: str) -> None:
    """Skips on a kernel that lacks an advice."""
    if not supports(advice):
        pytest.skip(f"needs a kernel with {name}")


def code(call: Callable[[], object]) -> int:
    """0, or the errno that a call raised."""
    try:
        call()
    except OSError as error:
        return error.errno or errno.EIO
    return 0
