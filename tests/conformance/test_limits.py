"""Limits and oddities that the library works around, on the kernel itself."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
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
    mapping,
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


def _guest_memfd() -> tuple[int, list[int]]:
    """A guest_memfd that can be mapped, and what else has to be closed (linux/kvm.h)."""
    create_vm = 0xAE01
    create_guest_memfd = 3 << 30 | 64 << 16 | 0xAE << 8 | 0xD4
    mmap_and_init_shared = 3
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"needs root: KVM, for a guest_memfd ({error.strerror})")
    try:
        vm = fcntl.ioctl(kvm, create_vm, 0)
    except OSError as error:
        os.close(kvm)
        pytest.skip(f"needs KVM to make a virtual machine, for a guest_memfd ({error.strerror})")
    try:
        argument = bytearray(struct.pack("8Q", SIZE, mmap_and_init_shared, *[0] * 6))
        return fcntl.ioctl(vm, create_guest_memfd, argument), [vm, kvm]
    except OSError as error:
        os.close(vm)
        os.close(kvm)
        pytest.skip(f"needs a kernel with guest_memfd that can be mapped ({error.strerror})")


@pytest.mark.parametrize(("call", "discards"), [("DONTNEED", False), ("PUNCH", True), ("REMOVE", True)])
def test_a_guest_memfd_is_discarded_like_any_shared_file(call: str, discards: bool) -> None:
    fd, others = _guest_memfd()
    try:
        with mapping(shared=True, fd=fd) as raw:
            assert raw.populated()
            raw.write(0, b"data")
            if call == "PUNCH":
                assert punch(fd, 0, PAGE) == 0
            else:
                assert madvise(raw.address, PAGE, DONTNEED if call == "DONTNEED" else REMOVE) == 0
            assert raw.read(0, 4) == (bytes(4) if discards else b"data")
    finally:
        for number in (fd, *others):
            os.close(number)
