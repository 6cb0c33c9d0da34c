"""Somebody changes the mapping or the process's limits underneath: an error that says so, and all can be mended."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsemem import Anonymous, BackendExhaustedError, Cause, File, Memfd, PopulateError, Region, ReserveError
from sparsemem.backends import Backend
from tests.support import accounting
from tests.support.children import run_child
from tests.support.kinds import private_bytes
from tests.support.resources import need_root

pytestmark = pytest.mark.promise("plug-all-or-nothing")

BLOCK = 64 << 10
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
MAP_FIXED_NOREPLACE, MAP_NORESERVE = 0x100000, 0x4000
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE

BACKENDS: dict[str, type[Backend]] = {"anonymous": Anonymous, "memfd": Memfd}


def used(region: Region) -> int:
    file = accounting.allocated_bytes(region.fileno()) if isinstance(region.backend, Memfd) else 0
    return file + private_bytes(region)


@pytest.mark.parametrize("protection", [mmap.PROT_NONE, mmap.PROT_READ] if hasattr(mmap, "PROT_NONE") else [0, 1])
@pytest.mark.parametrize("strategy", ["populate_write", "futex"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_block_that_somebody_has_protected_is_refused(name: str, strategy: str, protection: int) -> None:
    with Region("16M", block_size=BLOCK, backend=BACKENDS[name](strategy=strategy)) as region:  # type: ignore[call-arg]
        region.plug(0)
        before, bad = used(region), region.address + 5 * BLOCK
        assert _libc.mprotect(bad, BLOCK, protection) == 0
        with pytest.raises(PopulateError) as caught:
            region.plug_runs([(3, 1), (5, 1), (7, 1)])
        assert caught.value.errno == (errno.EINVAL if strategy == "populate_write" else errno.EFAULT)
        assert caught.value.cause is Cause.PROTECTION
        assert not isinstance(caught.value, BackendExhaustedError)
        assert (caught.value.offset, caught.value.rolled_back) == (5 * BLOCK, True)
        assert list(region.plugged_runs()) == [(0, 1)]
        assert used(region) == before
        assert _libc.mprotect(bad, BLOCK, READ_WRITE) == 0
        assert region.plug_runs([(3, 1), (5, 1), (7, 1)]) == 3


@pytest.mark.parametrize("strategy", ["populate_write", "futex"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_hole_that_somebody_has_made_is_reported_and_mends(name: str, strategy: str) -> None:
    """Where a discard meets it, it fails as well (ENOMEM): those blocks are tainted until the hole is filled."""

    def child() -> tuple[Any, ...]:  # in a process of its own, for something else could come to lie in the hole
        with Region("16M", block_size=BLOCK, backend=BACKENDS[name](strategy=strategy)) as region:  # type: ignore[call-arg]
            region.plug(0)
            before, hole = used(region), region.address + 5 * BLOCK
            assert _libc.munmap(hole, BLOCK) == 0
            with pytest.raises(PopulateError) as caught:
                region.plug_runs([(3, 1), (5, 1), (7, 1)])
            failed = caught.value.errno, caught.value.cause, caught.value.rolled_back
            assert list(region.plugged_runs()) == [(0, 1)]
            assert used(region) == before
            tainted = list(region.tainted_runs())
            fd = region.fileno() if name == "memfd" else -1
            flags = (mmap.MAP_SHARED if name == "memfd" else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) | MAP_NORESERVE
            offset = 5 * BLOCK if name == "memfd" else 0
            assert _libc.mmap(hole, BLOCK, READ_WRITE, flags | MAP_FIXED_NOREPLACE, fd, offset) == hole
            assert region.scrub() == len(tainted)
            assert region.plug_runs([(3, 1), (5, 1), (7, 1)]) == 3
            assert used(region) == before + 3 * BLOCK
            return (*failed, tainted)

    code, cause, rolled_back, tainted = run_child(child).result()
    if name == "anonymous":
        assert (code, cause, rolled_back, tainted) == (errno.ENOMEM, Cause.MAPPING_HOLE, False, [(5, 1)])
    elif strategy == "populate_write":
        assert (code, cause, rolled_back, tainted) == (errno.ENOMEM, Cause.MAPPING_HOLE, True, [])
    else:  # a futex cannot tell a hole from any other bad address
        assert (code, cause, rolled_back, tainted) == (errno.EFAULT, Cause.PROTECTION, True, [])


@pytest.mark.parametrize("shared", [True, False])
def test_an_owned_file_truncated_underneath_is_no_lack_of_room(tmp_path: Path, shared: bool) -> None:
    with Region("64M", block_size=BLOCK, backend=File(tmp_path / "f", shared=shared)) as region:
        region.plug(0)
        with region.view(0) as view:
            view[:] = b"\x5a" * BLOCK
        os.truncate(tmp_path / "f", 8 * BLOCK)
        with pytest.raises(PopulateError) as caught:
            region.plug(6, 4)  # half of it beyond the end
        assert caught.value.cause is Cause.FILE_TRUNCATED
        assert not isinstance(caught.value, BackendExhaustedError)
        assert caught.value.rolled_back
        assert list(region.plugged_runs()) == [(0, 1)]
        assert private_bytes(region) + accounting.allocated_bytes(region.fileno()) <= 2 * BLOCK
        with region.view(0) as view:
            assert bytes(view) == b"\x5a" * BLOCK
        os.truncate(tmp_path / "f", 64 << 20)
        assert region.plug(6, 4) == 4


@pytest.mark.parametrize("backend", [Memfd(), File("made")], ids=["memfd", "file"])
def test_without_descriptors_there_is_no_region_and_no_file(backend: Backend, tmp_path: Path) -> None:
    def child() -> list[str]:
        os.chdir(tmp_path)
        highest = max(accounting.open_descriptors())
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, highest + 1))
        taken = []
        try:  # the gaps below it
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError as error:
            assert error.errno == errno.EMFILE
        with pytest.raises(ReserveError) as caught:
            Region("64M", backend=backend)
        code = caught.value.errno
        for fd in taken:
            os.close(fd)
        assert code == errno.EMFILE
        return os.listdir(tmp_path)

    assert run_child(child).result() == []


@pytest.mark.parametrize("backend", [Anonymous(), Memfd(), Memfd(shared=False)], ids=str)
def test_a_limit_of_the_address_space_does_not_concern_what_is_reserved(backend: Backend) -> None:
    def child() -> int:
        with Region("1G", block_size=BLOCK, backend=backend) as region:
            region.plug(1023)  # what has to be mapped once has been
            with open("/proc/self/statm") as sizes:
                mapped = int(sizes.read().split()[0]) * mmap.PAGESIZE
            resource.setrlimit(resource.RLIMIT_AS, (mapped, mapped))
            changed = region.plug(0, 256)
            with region.view(0, 256) as view:
                view[:: mmap.PAGESIZE] = bytes(len(view) // mmap.PAGESIZE)
            return changed - region.unplug(0, 256)

    assert run_child(child).result() == 0


@pytest.mark.parametrize("headroom", ["off", "check"])
@pytest.mark.parametrize("strategy", ["populate_write", "futex"])
def test_the_commit_limit_ends_a_plug_of_shared_memory(
    strategy: str, headroom: str, strict_overcommit: Callable[[], None]
) -> None:
    """Shmem is charged as it comes, so the limit binds the plug; private memory is charged when it is reserved."""

    def child() -> tuple[Any, ...]:
        backend = Memfd(strategy=strategy)
        with Region("64G", block_size="2M", backend=backend, headroom=headroom) as region:
            left = next(limit for limit in region.headroom().limits if limit.cause is Cause.OVERCOMMIT).available
            # Untouched private memory is charged all the same and takes none.
            filler = mmap.mmap(-1, (left - (64 << 20)) & -4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            region.plug(0)
            before = used(region)
            region._core.gauge.forget()
            with pytest.raises(BackendExhaustedError) as caught:
                region.plug(1, 4000)  # far beyond what other processes may give back meanwhile
            error = caught.value
            assert list(region.plugged_runs()) == [(0, 1)]
            assert used(region) == before
            assert not list(region.tainted_runs())
            filler.close()
            region._core.gauge.forget()
            assert region.plug(1, 100) == 100
            return error.cause, error.rolled_back, error.populated > 0

    strict_overcommit()
    assert run_child(child).result() == (Cause.OVERCOMMIT, True, headroom == "off")


def test_locked_shared_memory_is_given_back_and_stays_locked() -> None:
    """MADV_REMOVE is EINVAL on it, so it has to be unlocked for that."""
    need_root("to lock memory without a limit")

    def child() -> tuple[int, int, bool]:
        with Region("64M", block_size=BLOCK, backend=Anonymous(shared=True)) as region:
            region.plug(0, 8)
            mlockall(MCL_CURRENT | MCL_ONFAULT)
            region.unplug_runs([(2, 1), (4, 2)])
            region.plug(4)
            areas = accounting.smaps(region.address, region.size)
            assert region.audit().ok
            return region.audit().resident_size, len(areas.areas), all("lo" in flags for flags in areas.flags)

    mlockall = _libc.mlockall
    MCL_CURRENT, MCL_ONFAULT = 1, 4
    assert run_child(child).result() == (6 * BLOCK, 1, True)


def test_a_templates_hole_that_a_full_tmpfs_has_no_page_for(tmpfs_mount: Any) -> None:
    """On tmpfs the file gets a page of its own for a hole that is copied, and keeps it."""
    folder = tmpfs_mount(size="8M")
    path = folder / "template"
    with path.open("wb") as file:
        file.write(b"data" * (BLOCK // 4))
        file.truncate(64 << 20)
    with Region("64M", block_size=BLOCK, backend=File(path, shared=False)) as region:
        region.plug_runs([(0, 1), (8, 1)])
        assert accounting.allocated_bytes(path) == 2 * BLOCK, "one with data, one that was a hole"
        with (folder / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, os.statvfs(folder).f_bavail * mmap.PAGESIZE)
        with pytest.raises(BackendExhaustedError) as caught:
            region.plug(16)
        assert caught.value.cause is Cause.TMPFS_FULL
        region.unplug(0)
        assert region.plug(0) == 1, "where the file has pages it takes no new ones"
        with region.view(0) as view:
            assert view[:4] == b"data"
