"""How populating and discarding fail, and what they leave behind: the facts behind every rollback, line by line.

If one of these fails, the kernel differs from what sparsemem relies on.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sparsemem._sys import calls, lib
from tests.conformance.raw import (
    DONTNEED,
    DONTNEED_LOCKED,
    FREE,
    GUARD_INSTALL,
    GUARD_REMOVE,
    HUGE,
    KERNEL,
    PAGE,
    POPULATE_READ,
    POPULATE_WRITE,
    PROT_READ,
    PROT_WRITE,
    REMOVE,
    SIZE,
    Raw,
    code,
    madvise,
    mapping,
    memfd,
    need,
    punch,
    supports,
)
from tests.support import accounting
from tests.support.children import run_child, unprivileged
from tests.support.resources import need_root

MIB = 1 << 20
PAGES = SIZE // PAGE

libc = ctypes.CDLL(None, use_errno=True)
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

pytestmark = pytest.mark.skipif(madvise(0, 0, POPULATE_WRITE) != 0, reason="needs a kernel with MADV_POPULATE_WRITE")


@contextmanager
def file_in(folder: Path, size: int) -> Iterator[int]:
    fd = os.open(folder / "f", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


# ---- EFAULT: every backend that has run out --------------------------------------------------


def test_a_full_ext4_is_efault_and_partial(ext4_mount: Any) -> None:
    size = 128 * MIB
    with file_in(ext4_mount(64), size) as fd, mapping(shared=True, fd=fd, size=size) as raw:
        assert madvise(raw.address, size, POPULATE_WRITE) == errno.EFAULT
        assert 0 < raw.in_file() < 64 * MIB


def test_an_empty_pool_of_huge_pages_is_efault(empty_pool: None) -> None:
    for shared in (True, False):
        with memfd(huge=True) as fd, mapping(shared=shared, fd=fd, huge=True) as raw:
            assert madvise(raw.address, raw.size, POPULATE_WRITE) == errno.EFAULT
            assert raw.in_file() == 0
    with mapping(huge=True) as raw:
        assert madvise(raw.address, raw.size, POPULATE_WRITE) == errno.EFAULT


def test_the_size_of_a_hugetlbfs_is_efault_and_partial(huge_pool: Any, hugetlbfs_mount: Any) -> None:
    huge_pool(8)
    with file_in(hugetlbfs_mount(pages=3), 4 * HUGE) as fd, mapping(shared=True, fd=fd, huge=True) as raw:
        assert madvise(raw.address, raw.size, POPULATE_WRITE) == errno.EFAULT
        assert raw.in_file() == 3 * HUGE


def test_a_special_mapping_is_einval() -> None:
    """The kernel's own pages in every process (VM_PFNMAP) cannot be populated, nor can they be discarded."""
    special = [area for area in accounting.vmas() if area.name == "[vvar]"]
    if not special:
        pytest.skip("needs a kernel that shows a special mapping ([vvar])")
    assert madvise(special[0].start, PAGE, POPULATE_READ) == errno.EINVAL
    assert madvise(special[0].start, PAGE, POPULATE_WRITE) == errno.EINVAL
    assert madvise(special[0].start, PAGE, DONTNEED) == errno.EINVAL


def test_a_control_groups_limit_on_huge_pages_is_efault(huge_pool: Any, hugetlb_cgroup: Any) -> None:
    huge_pool(6)
    group = hugetlb_cgroup(2 * HUGE)

    def child() -> tuple[int, int]:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        with memfd(huge=True) as fd, mapping(shared=True, fd=fd, huge=True) as raw:
            return madvise(raw.address, raw.size, POPULATE_WRITE), raw.in_file()

    assert run_child(child).result() == (errno.EFAULT, 2 * HUGE)


def test_the_commit_limit_on_shared_memory_is_efault(strict_overcommit: Any) -> None:
    strict_overcommit()

    def child() -> tuple[int, bool]:
        size, large = 256 * MIB, 64 << 30
        with memfd() as fd, memfd() as other:
            os.ftruncate(fd, size)
            os.ftruncate(other, large)
            # So much that the process's share is 1 GiB less than the others'.
            bulk = mmap.mmap(other, large)
            fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
            left = sum(int(fields[name].split()[0]) * sign for name, sign in (("CommitLimit", 1), ("Committed_AS", -1)))
            filler = mmap.mmap(
                -1, ((left - (1 << 20) - (64 << 10)) << 10) & -PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
            with mapping(shared=True, fd=fd, size=size) as raw:
                failed = madvise(raw.address, size, POPULATE_WRITE)
                partial = 0 < raw.in_file() < size
            filler.close()
            bulk.close()
            return failed, partial

    assert run_child(child).result() == (errno.EFAULT, True)


# ---- ENOMEM: a control group that waits instead of killing -------------------------------------


def test_a_control_groups_limit_is_enomem_with_the_oom_killer_off(memory_cgroup: Any) -> None:
    group = memory_cgroup(32 * MIB)
    if group.version != 1:
        pytest.skip("needs a memory controller of version 1: the OOM killer can be switched off there")
    group.disable_oom_killer()
    size = 64 * MIB

    def child() -> tuple[int, int]:
        with mapping(size=size) as raw:
            group.add()
            # What comes next of the interpreter's own may have to wait until the limit is lifted.
            failed = madvise(raw.address, size, POPULATE_WRITE)
            return failed, raw.private()

    lift = threading.Timer(2, group.set_limit, [None])
    lift.start()
    try:
        failed, done = run_child(child).result()
    finally:
        lift.join()
    assert failed == errno.ENOMEM
    assert 0 < done <= 32 * MIB, "partial"


# ---- partial, and the count that only process_madvise has ----------------------------------------


def test_it_stops_at_the_first_bad_page_and_goes_no_further() -> None:
    need(GUARD_INSTALL, "MADV_GUARD_INSTALL")
    with mapping() as raw:
        for page in (8, 32):
            assert madvise(raw.address + page * PAGE, PAGE, GUARD_INSTALL) == 0
        assert madvise(raw.address, raw.size, POPULATE_WRITE) == errno.EFAULT
        assert raw.present() == 8 * PAGE


class _Range(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def process_madvise(ranges: list[tuple[int, int]], advice: int) -> int:
    """Bytes that process_madvise on this process says it did, or -errno."""
    pidfd = os.pidfd_open(os.getpid())
    try:
        vector = (_Range * len(ranges))(*ranges)
        done = ctypes.c_long(libc.syscall(440, pidfd, vector, ctypes.c_size_t(len(ranges)), advice, 0)).value
        return done if done >= 0 else -ctypes.get_errno()
    finally:
        os.close(pidfd)


def need_process_madvise() -> None:
    with mapping() as raw:
        if process_madvise([(raw.address, PAGE)], POPULATE_WRITE) != PAGE:
            pytest.skip("needs a kernel with process_madvise on oneself (6.13)")


def test_process_madvise_tells_what_was_done_before_the_bad_range() -> None:
    need_process_madvise()
    with mapping() as raw:
        assert libc.munmap(raw.address + 20 * PAGE, PAGE) == 0
        ranges = [(raw.address + page * PAGE, 4 * PAGE) for page in (0, 8, 18, 32)]
        assert process_madvise(ranges, POPULATE_WRITE) == 8 * PAGE
        # The third range was begun, though: the count is of whole ranges.
        assert raw.private() == (4 + 4 + 2) * PAGE
        KERNEL.reserve_placeholder(raw.address + 20 * PAGE, PAGE)


def test_process_madvise_of_nothing_says_yes_to_every_advice() -> None:
    """So it has to be probed with a page."""
    need_process_madvise()
    with mapping() as raw:
        assert process_madvise([(raw.address, 0)], DONTNEED) == 0
        assert process_madvise([(raw.address, 0)], POPULATE_WRITE) == 0
        assert process_madvise([], 12345) == 0
        assert process_madvise([(raw.address, PAGE)], 12345) == -errno.EINVAL


def test_madvise_of_nothing_tells_whether_it_knows_the_advice() -> None:
    assert madvise(0, 0, DONTNEED) == 0
    assert madvise(0, 0, POPULATE_WRITE) == 0
    assert madvise(0, 0, 12345) == errno.EINVAL


def test_guards_go_on_past_a_hole_and_still_say_enomem() -> None:
    need(GUARD_INSTALL, "MADV_GUARD_INSTALL")
    with mapping() as raw:
        assert raw.populated()
        assert libc.munmap(raw.address + 4 * PAGE, PAGE) == 0
        assert madvise(raw.address, raw.size, GUARD_INSTALL) == errno.ENOMEM
        for page in (0, 5, PAGES - 1):
            assert madvise(raw.address + page * PAGE, PAGE, POPULATE_WRITE) == errno.EFAULT
        assert raw.present() == 0
        KERNEL.reserve_placeholder(raw.address + 4 * PAGE, PAGE)


# ---- EINTR ---------------------------------------------------------------------------------------


@contextmanager
def signals(every: float) -> Iterator[list[int]]:
    """A handler that is called again and again; yields what it has counted."""
    count: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: count.append(1))
    signal.siginterrupt(signal.SIGALRM, True)
    signal.setitimer(signal.ITIMER_REAL, every, every)
    try:
        yield count
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_signal_that_does_not_kill_does_not_interrupt_it() -> None:
    size = 256 * MIB

    def child() -> tuple[int, int]:
        with mapping(size=size) as raw, signals(0.0005) as count:
            failed = madvise(raw.address, size, POPULATE_WRITE)
            assert raw.private() == size
            time.sleep(0.002)
            return failed, len(count)

    failed, signalled = run_child(child).result()
    assert failed == 0
    assert signalled > 0


def test_hugetlb_fallocate_is_interrupted_by_any_signal_and_keeps_what_it_did(huge_pool: Any) -> None:
    huge_pool(16)
    size = 16 * HUGE

    def child() -> list[int]:
        seen = []
        fd = KERNEL.memfd_create("conformance", lib.MFD_CLOEXEC | lib.MFD_HUGETLB | 21 << 26)
        os.ftruncate(fd, size)
        with signals(0.0003):
            for _ in range(50):
                failed = code(lambda: calls.kernel.fallocate(fd, 0, 0, size))
                if failed == errno.EINTR:
                    seen.append(accounting.allocated_bytes(fd))
                else:
                    assert failed == 0
                calls.kernel.fallocate(fd, lib.FALLOC_FL_PUNCH_HOLE | lib.FALLOC_FL_KEEP_SIZE, 0, size)
        return seen

    seen = run_child(child).result()
    assert seen, "never interrupted"
    assert any(0 < done < size for done in seen), seen


# ---- fallocate that runs out -----------------------------------------------------------------------


def test_ext4_does_not_roll_a_failed_fallocate_back(ext4_mount: Any) -> None:
    with file_in(ext4_mount(64), 0) as fd:
        assert code(lambda: calls.kernel.fallocate(fd, lib.FALLOC_FL_KEEP_SIZE, 0, 128 * MIB)) == errno.ENOSPC
        assert accounting.allocated_bytes(fd) > 16 * MIB, "what it did stays: the rollback must discard"


@pytest.mark.parametrize("access", ["store", "load"])
def test_touching_a_hole_of_a_full_tmpfs_is_sigbus(tmpfs_mount: Any, access: str) -> None:
    folder = tmpfs_mount("64K")

    def child() -> None:
        with file_in(folder, SIZE) as fd, mapping(shared=True, fd=fd) as raw:
            madvise(raw.address, 16 * PAGE, POPULATE_WRITE)
            assert raw.in_file() == 64 << 10
            if access == "store":
                raw.write(32 * PAGE, b"x")
            else:
                raw.read(32 * PAGE, 1)

    assert run_child(child).signal == signal.SIGBUS


# ---- limits of the process ---------------------------------------------------------------------------


def test_rlimit_as_is_enomem_of_mmap() -> None:
    def child() -> int:
        room = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE + 64 * MIB
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        flags = lib.MAP_PRIVATE | lib.MAP_ANONYMOUS | lib.MAP_NORESERVE
        return code(lambda: KERNEL.reserve(1 << 30, PAGE, flags, -1, writable=True, locked=False))

    assert run_child(child).result() == errno.ENOMEM


_MCL_FUTURE = 2


def test_as_root_a_mapping_that_will_be_locked_is_populated_at_once() -> None:
    """Which is why a region is reserved without access first, and unlocked."""
    need_root("to lock memory without a limit")

    def child() -> int:
        assert libc.mlockall(_MCL_FUTURE) == 0
        with mmap.mmap(-1, 16 * MIB) as plain:
            start = ctypes.addressof(ctypes.c_char.from_buffer(plain))
            return accounting.smaps(start, 16 * MIB)["Rss"]

    assert run_child(child).result() == 16 * MIB


def test_without_privilege_a_mapping_that_would_be_locked_is_eagain() -> None:
    room = 8 * MIB
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if 0 <= hard < room:
        pytest.skip("needs root: ulimit -l is less than this interpreter will lock")

    def child() -> int:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (room, hard))
        assert libc.mlockall(_MCL_FUTURE) == 0
        return code(lambda: mmap.mmap(-1, 64 * MIB))

    assert unprivileged(child).result() == errno.EAGAIN


# ---- strict overcommit -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memfd", "tmpfs", "hugetlb"])
def test_strict_overcommit_refuses_private_reservations_and_not_shared_ones(
    kernel_setting: Any, request: pytest.FixtureRequest, kind: str
) -> None:
    kernel_setting("/proc/sys/vm/overcommit_memory", 2)
    size = 64 << 30

    def reserve(flags: int, fd: int) -> int:
        try:
            address = KERNEL.reserve(size, PAGE, flags | lib.MAP_NORESERVE, fd, writable=True, locked=False)
        except OSError as error:
            return error.errno or -1
        KERNEL.unmap(address, size)
        return 0

    assert reserve(lib.MAP_PRIVATE | lib.MAP_ANONYMOUS, -1) == errno.ENOMEM
    if kind == "tmpfs":
        fd = os.open(request.getfixturevalue("tmpfs_folder") / "f", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    else:
        huge = lib.MFD_HUGETLB | 21 << 26 if kind == "hugetlb" else 0
        fd = KERNEL.memfd_create("conformance", lib.MFD_CLOEXEC | huge)
    try:
        os.ftruncate(fd, size)
        assert reserve(lib.MAP_SHARED, fd) == 0
        if kind != "hugetlb":
            assert reserve(lib.MAP_PRIVATE, fd) == errno.ENOMEM
    finally:
        os.close(fd)


# ---- populating for reading is no plug -----------------------------------------------------------------


def test_populate_read_leaves_shmem_pages_clean() -> None:
    with memfd() as fd, mapping(shared=True, fd=fd) as raw:
        assert madvise(raw.address, raw.size, POPULATE_READ) == 0
        sizes = accounting.smaps(raw.address, raw.size)
        assert sizes["Rss"] == raw.size
        assert sizes["Private_Dirty"] + sizes["Shared_Dirty"] == 0
        assert madvise(raw.address, raw.size, POPULATE_WRITE) == 0
        sizes = accounting.smaps(raw.address, raw.size)
        assert sizes["Private_Dirty"] + sizes["Shared_Dirty"] == raw.size


def test_populate_read_allocates_no_block_of_a_disk(ext4_mount: Any) -> None:
    with file_in(ext4_mount(), SIZE) as fd, mapping(shared=True, fd=fd) as raw:
        assert madvise(raw.address, raw.size, POPULATE_READ) == 0
        assert raw.present() == raw.size
        assert raw.in_file() == 0
        assert madvise(raw.address, raw.size, POPULATE_WRITE) == 0
        assert raw.in_file() >= raw.size


# ---- locked mappings ---------------------------------------------------------------------------------


def locked(raw: Raw) -> None:
    if libc.mlock(raw.address, raw.size):
        pytest.skip("needs root: to lock memory")


@pytest.mark.parametrize("advice", [DONTNEED, FREE, GUARD_INSTALL], ids=["DONTNEED", "FREE", "GUARD_INSTALL"])
def test_a_locked_private_mapping_refuses_what_discards(advice: int) -> None:
    if not supports(advice):
        pytest.skip("needs a kernel with MADV_GUARD_INSTALL")
    with mapping() as raw:
        locked(raw)
        raw.write(0, b"data")
        assert madvise(raw.address, raw.size, advice) == errno.EINVAL
        assert raw.read(0, 4) == b"data"


def test_a_locked_shared_mapping_refuses_remove_and_can_be_punched() -> None:
    with memfd() as fd, mapping(shared=True, fd=fd) as raw:
        locked(raw)
        raw.write(0, b"data")
        for advice in (DONTNEED, REMOVE):
            assert madvise(raw.address, raw.size, advice) == errno.EINVAL
        assert raw.read(0, 4) == b"data"
        assert punch(fd, 0, raw.size) == 0
        assert raw.in_file() == 0
        if supports(DONTNEED_LOCKED):
            assert madvise(raw.address, raw.size, DONTNEED_LOCKED) == 0


# ---- traps of single calls ------------------------------------------------------------------------------


@pytest.mark.parametrize("seal", ["F_SEAL_WRITE", "F_SEAL_FUTURE_WRITE"])
def test_a_write_seal_forbids_punch_and_remove(seal: str) -> None:
    shared = seal == "F_SEAL_FUTURE_WRITE"  # F_SEAL_WRITE refuses while a shared writable mapping lives
    with memfd() as fd, mapping(shared=shared, fd=fd) as raw:
        calls.kernel.add_seals(fd, getattr(lib, seal))
        assert punch(fd, 0, PAGE) == errno.EPERM
        assert madvise(raw.address, PAGE, REMOVE) == (errno.EPERM if shared else errno.EACCES)


def test_a_punch_through_a_read_only_descriptor_is_ebadf(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"data" * PAGE)
    fd = os.open(tmp_path / "f", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert punch(fd, 0, PAGE) == errno.EBADF
    finally:
        os.close(fd)


def test_the_length_of_a_huge_mapping_is_rounded_and_that_of_its_unmapping_must_be(huge_pool: Any) -> None:
    """Measured on 6.18: a munmap of the length that was asked for fails, and all of it stays."""
    huge_pool(4)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 2, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    with memfd(huge=True) as fd:
        flags = lib.MAP_SHARED | lib.MAP_NORESERVE
        address = libc.mmap(None, HUGE + PAGE, PROT_READ | PROT_WRITE, flags, fd, 0)
        assert address
        (area,) = accounting.vmas(address, 2 * HUGE)
        assert area.span == (address, address + 2 * HUGE)
        assert code(lambda: KERNEL.unmap(address, HUGE + PAGE)) == errno.EINVAL
        assert len(accounting.vmas(address, 2 * HUGE)) == 1
        KERNEL.unmap(address, 2 * HUGE)
        assert accounting.vmas(address, 2 * HUGE) == []


def test_fallocate_behind_a_private_mapping_costs_double() -> None:
    with memfd() as fd, mapping(fd=fd) as raw:
        calls.kernel.fallocate(fd, 0, 0, SIZE)
        assert raw.populated()
        assert (raw.private(), raw.in_file()) == (SIZE, SIZE)


# ---- a guest_memfd, memfd_secret: calls that are in no other table -----------------------------------------


def test_memfd_secret_can_be_touched_and_nothing_else() -> None:
    try:
        fd = KERNEL.memfd_secret()
    except OSError as error:
        pytest.skip(f"needs memfd_secret ({error.strerror})")
    try:
        os.ftruncate(fd, SIZE)
        try:
            with mapping(shared=True, fd=fd, locked=True) as raw:
                assert madvise(raw.address, raw.size, POPULATE_READ) == errno.EINVAL
                raw.write(PAGE, b"touched")
                assert raw.read(PAGE, 7) == b"touched"
                assert accounting.smaps(raw.address, raw.size)["Rss"] == PAGE
                for advice in (DONTNEED, FREE, REMOVE, GUARD_INSTALL):
                    if supports(advice):
                        assert madvise(raw.address, raw.size, advice) == errno.EINVAL
                # Measured on 6.18: this one says yes, and gives nothing back.
                assert madvise(raw.address, raw.size, DONTNEED_LOCKED) in (0, errno.EINVAL)
                assert raw.read(PAGE, 7) == b"touched"
        except OSError as error:
            pytest.skip(f"needs root: to lock the memory of a memfd_secret ({error.strerror})")
    finally:
        os.close(fd)


def test_a_guest_memfd_knows_no_free_and_keeps_its_data_behind_a_guard() -> None:
    from tests.conformance.test_limits import _guest_memfd

    need(GUARD_INSTALL, "MADV_GUARD_INSTALL")
    fd, others = _guest_memfd()
    try:
        with mapping(shared=True, fd=fd) as raw:
            assert raw.populated()
            raw.write(0, b"data")
            assert madvise(raw.address, PAGE, FREE) == errno.EINVAL
            assert madvise(raw.address, PAGE, GUARD_INSTALL) == 0
            assert madvise(raw.address, PAGE, GUARD_REMOVE) == 0
            assert raw.read(0, 4) == b"data"
    finally:
        for number in (fd, *others):
            os.close(number)
