"""What MADV_POPULATE_READ and _WRITE promise, call by call; the kernel's own selftest is in test_selftest.

If one of these fails, the kernel differs from what sparsemem relies on.
"""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from sparsemem import PopulateError, Region
from sparsemem._sys import lib
from tests.conformance.raw import (
    GUARD_INSTALL,
    KERNEL,
    PAGE,
    POPULATE_READ,
    POPULATE_WRITE,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    SIZE,
    lib_memory,
    madvise,
    mapping,
    memfd,
    need,
)

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

pytestmark = pytest.mark.skipif(madvise(0, 0, POPULATE_WRITE) != 0, reason="needs a kernel with MADV_POPULATE_WRITE")


def protect(address: int, length: int, protection: int) -> None:
    assert libc.mprotect(address, length, protection) == 0


def unmap_and_refill(address: int, length: int) -> None:
    """Closes a hole again, so that the fixture's unmapping finds what it made."""
    KERNEL.reserve_placeholder(address, length)


@pytest.mark.parametrize(
    ("protection", "advice", "expected"),
    [
        (PROT_READ, POPULATE_READ, 0),
        (PROT_READ, POPULATE_WRITE, errno.EINVAL),
        (PROT_WRITE, POPULATE_READ, errno.EINVAL),
        (PROT_WRITE, POPULATE_WRITE, 0),
        (PROT_READ | PROT_WRITE, POPULATE_READ, 0),
        (PROT_READ | PROT_WRITE, POPULATE_WRITE, 0),
        (PROT_NONE, POPULATE_READ, errno.EINVAL),
        (PROT_NONE, POPULATE_WRITE, errno.EINVAL),
    ],
)
def test_it_needs_the_access_that_it_simulates(protection: int, advice: int, expected: int) -> None:
    with mapping() as raw:
        protect(raw.address, raw.size, protection)
        assert madvise(raw.address, raw.size, advice) == expected
        assert bool(raw.present()) is (expected == 0)


@pytest.mark.parametrize("advice", [POPULATE_READ, POPULATE_WRITE])
@pytest.mark.parametrize("where", ["start", "middle", "end"])
def test_a_hole_is_enomem_wherever_it_is(advice: int, where: str) -> None:
    with mapping() as raw:
        offset = {"start": 0, "middle": SIZE // 2, "end": SIZE - PAGE}[where]
        assert libc.munmap(raw.address + offset, PAGE) == 0
        assert madvise(raw.address, raw.size, advice) == errno.ENOMEM
        # It stops at the hole and keeps what it did.
        assert raw.present() == offset
        unmap_and_refill(raw.address + offset, PAGE)


@pytest.mark.parametrize("where", ["start", "middle", "end"])
def test_a_region_with_a_hole_plugs_nothing(where: str) -> None:
    with Region(SIZE, block_size=PAGE) as region:
        block = {"start": 0, "middle": 32, "end": 63}[where]
        assert libc.munmap(region.address + block * PAGE, PAGE) == 0
        with pytest.raises(PopulateError) as caught:
            region.plug(0, 64)
        assert caught.value.errno == errno.ENOMEM
        assert region.plugged_size == 0
        unmap_and_refill(region.address + block * PAGE, PAGE)
        region.scrub()
        assert region.plug(0, 64) == 64


def test_populate_read_makes_readable_and_nothing_more() -> None:
    """It never plugs: anonymous memory gets the zero page."""
    with mapping() as raw:
        assert madvise(raw.address, raw.size, POPULATE_READ) == 0
        assert raw.present() == raw.size
        assert raw.private() == 0


def test_populate_write_makes_pages_of_ones_own() -> None:
    with mapping() as raw:
        assert madvise(raw.address, raw.size, POPULATE_WRITE) == 0
        assert raw.private() == raw.size
        assert raw.read(0, raw.size) == bytes(raw.size)


def test_populating_twice_keeps_the_content() -> None:
    with mapping() as raw:
        raw.write(5 * PAGE, b"hello")
        assert madvise(raw.address, raw.size, POPULATE_WRITE) == 0
        assert raw.read(5 * PAGE, 5) == b"hello"


def test_populate_read_on_a_shared_file_allocates_pages_that_are_clean() -> None:
    with memfd() as fd, mapping(shared=True, fd=fd) as raw:
        assert madvise(raw.address, raw.size, POPULATE_READ) == 0
        assert raw.in_file() == raw.size


@pytest.mark.parametrize("advice", [POPULATE_READ, POPULATE_WRITE])
def test_an_unaligned_address_is_einval(advice: int) -> None:
    with mapping() as raw:
        assert madvise(raw.address + 1, PAGE, advice) == errno.EINVAL
        assert raw.present() == 0


@pytest.mark.parametrize("advice", [POPULATE_READ, POPULATE_WRITE])
def test_nothing_to_do_is_fine(advice: int) -> None:
    with mapping() as raw:
        assert madvise(raw.address, 0, advice) == 0
        assert raw.present() == 0


def test_an_unknown_advice_is_einval_which_is_how_an_old_kernel_says_no() -> None:
    with mapping() as raw:
        assert madvise(raw.address, PAGE, 12345) == errno.EINVAL


def test_beyond_the_end_of_a_file_is_efault() -> None:
    with memfd() as fd, mapping(shared=True, fd=fd) as raw:
        os.ftruncate(fd, SIZE // 2)
        assert madvise(raw.address, raw.size, POPULATE_WRITE) == errno.EFAULT
        assert raw.in_file() == SIZE // 2, "what came before the end is kept"


def test_a_guard_page_is_efault() -> None:
    need(GUARD_INSTALL, "MADV_GUARD_INSTALL")
    with mapping() as raw:
        assert madvise(raw.address + 8 * PAGE, PAGE, GUARD_INSTALL) == 0
        assert madvise(raw.address, raw.size, POPULATE_WRITE) == errno.EFAULT
        # Measured on 6.18: a guard marker counts as "swapped" in PAGEMAP_SCAN, so only what is present is asked for.
        assert raw.present() == 8 * PAGE


def test_a_full_tmpfs_is_efault_and_partial_without_a_count(tmpfs_mount) -> None:  # type: ignore[no-untyped-def]
    folder = tmpfs_mount("64K")
    fd = os.open(folder / "f", os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(fd, SIZE)
        with mapping(shared=True, fd=fd) as raw:
            assert madvise(raw.address, raw.size, POPULATE_WRITE) == errno.EFAULT
            assert raw.in_file() == 64 << 10
    finally:
        os.close(fd)


def test_memfd_secret_is_einval() -> None:
    try:
        fd = KERNEL.memfd_secret()
    except OSError as error:
        pytest.skip(f"needs memfd_secret ({error.strerror})")
    try:
        os.ftruncate(fd, SIZE)
        try:
            context = mapping(shared=True, fd=fd, locked=True)
            with context as raw:
                assert madvise(raw.address, raw.size, POPULATE_WRITE) == errno.EINVAL
                assert raw.present() == 0
        except OSError as error:
            pytest.skip(f"needs root: to lock the memory of a memfd_secret ({error.strerror})")
    finally:
        os.close(fd)


# ---- the futex way (kernels before 5.14) ------------------------------------------------


def _futex(raw_address: int, length: int) -> int:
    from sparsemem._sys import ffi

    run = ffi.new("sm_run[]", [(0, length)])
    job = ffi.new("sm_job *")
    job.base, job.fd, job.page, job.chunk, job.runs, job.nruns = (
        ffi.cast("char *", raw_address),
        -1,
        PAGE,
        2 << 20,
        run,
        1,
    )
    job.nsteps = 1
    job.steps[0] = lib.SM_STEP_FUTEX
    return -int(lib.sm_advance(job, 10**9))


def test_a_futex_populates_and_keeps_the_content() -> None:
    with mapping() as raw:
        raw.write(7 * PAGE, b"\x7f\x00\x00\x01")
        assert _futex(raw.address, raw.size) == 0
        assert raw.private() == raw.size
        assert raw.read(7 * PAGE, 4) == b"\x7f\x00\x00\x01"


def test_a_futex_fails_with_efault_where_a_store_would_be_sigbus() -> None:
    with memfd() as fd, mapping(shared=True, fd=fd) as raw:
        os.ftruncate(fd, SIZE // 2)
        assert _futex(raw.address, raw.size) == errno.EFAULT
        assert raw.in_file() == SIZE // 2


def test_a_futex_loses_no_concurrent_increment() -> None:
    import threading

    with mapping() as raw:
        word = lib_memory(raw.address, 4).cast("I")
        stop = threading.Event()

        def populate() -> None:
            while not stop.is_set():
                _futex(raw.address, PAGE)

        thread = threading.Thread(target=populate)
        thread.start()
        for _ in range(100_000):
            word[0] += 1
        stop.set()
        thread.join()
        assert word[0] == 100_000
