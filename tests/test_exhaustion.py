"""Backends that really run out, and limits that are really reached: an error, no SIGBUS, and all as before."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from sparsemem import Anonymous, BackendExhaustedError, Cause, File, Memfd, PopulateError, Region, ReserveError
from tests.support import accounting
from tests.support.children import run_child
from tests.support.kinds import private_bytes

pytestmark = [pytest.mark.promise("plug-all-or-nothing"), pytest.mark.promise("plugged-memory-is-there")]

MIB = 1 << 20


def fill(region: Region, block: int, byte: int) -> None:
    with region.view(block) as view:
        view[:] = bytes([byte]) * len(view)


def exhaust(region: Region, room: int, cause: Cause, codes: tuple[int, ...]) -> None:
    """Plugs half of the room, then more than there is, then all that there is; writes every byte of it."""
    half = room // region.block_size // 2
    region.plug(0, half)
    fill(region, 0, 7)
    with pytest.raises(BackendExhaustedError) as caught:
        region.plug(half, 2 * half)
    assert caught.value.errno in codes
    assert caught.value.cause is cause
    assert caught.value.rolled_back
    assert isinstance(caught.value, MemoryError)
    assert list(region.plugged_runs()) == [(0, half)]
    with region.view(0) as view:
        assert view == bytes([7]) * len(view)
    region.plug(half, half)  # exactly what is left

    def touch_all() -> int:
        with region.view(0, 2 * half) as view:
            view[:] = bytes(len(view))
            return len(view)

    # Although nothing is left, every plugged byte can be written; a SIGBUS would end this process.
    assert touch_all() == 2 * half * region.block_size
    region.unplug(0)
    region.plug(2 * half)


@pytest.mark.parametrize("strategy", ["auto", "futex"])
def test_a_full_tmpfs(tmpfs_mount: Any, strategy: str) -> None:
    folder = tmpfs_mount("16M")
    with Region("1T", block_size="64K", backend=File(folder / "f", strategy=strategy), headroom="off") as region:
        exhaust(region, 16 * MIB, Cause.TMPFS_FULL, (errno.EFAULT, errno.ENOSPC))
        assert accounting.allocated_bytes(region.fileno()) == 16 * MIB


def test_two_regions_share_what_a_tmpfs_has(tmpfs_mount: Any) -> None:
    folder = tmpfs_mount("8M")
    with (
        Region("1T", block_size="64K", backend=File(folder / "a"), headroom="off") as one,
        Region("1T", block_size="64K", backend=File(folder / "b"), headroom="off") as two,
    ):
        one.plug(0, 96)
        with pytest.raises(BackendExhaustedError):
            two.plug(0, 64)
        assert accounting.allocated_bytes(two.fileno()) == 0
        one.unplug(0, 64)
        assert two.plug(0, 64) == 64


@pytest.mark.parametrize("strategy", ["auto", "futex"])
def test_a_private_tmpfs_file_needs_one_chunk_of_room_only(tmpfs_mount: Any, strategy: str) -> None:
    """Populated once: the file's pages are given back chunk by chunk, and the copies are private memory."""
    folder = tmpfs_mount("2M")
    backend = File(folder / "f", shared=False, strategy=strategy)
    with Region("1G", block_size="64K", backend=backend, headroom="off") as region:
        region.plug(0, 256)  # 16 MiB through 2 MiB
        assert accounting.allocated_bytes(region.fileno()) == 0
        assert private_bytes(region) == 16 * MIB
        assert region.audit().ok


def test_a_full_ext4(ext4_mount: Any) -> None:
    folder = ext4_mount(64)
    with Region("1G", block_size="64K", backend=File(folder / "f"), headroom="off") as region:
        region.plug(0, 4)
        fill(region, 0, 7)
        before = accounting.allocated_bytes(region.fileno())
        with pytest.raises(BackendExhaustedError) as caught:
            region.plug(16, 1024)  # all of the disk's 64 MiB
        assert caught.value.cause is Cause.FILESYSTEM_FULL
        assert caught.value.rolled_back
        assert list(region.plugged_runs()) == [(0, 4)]
        # The extent tree may keep a block or two of its own.
        assert accounting.allocated_bytes(region.fileno()) - before <= 64 << 10
        assert region.plug(16, 64) == 64
        with region.view(0) as view:
            assert view == bytes([7]) * len(view)


@pytest.mark.parametrize("shared", [True, False])
def test_a_hugetlbfs_with_a_size(hugetlbfs_mount: Any, huge_pool: Any, shared: bool) -> None:
    huge_pool(16)
    folder = hugetlbfs_mount(pages=4)
    with Region("1G", backend=File(folder / "f", shared=shared), headroom="off") as region:
        exhaust(region, 8 * MIB, Cause.HUGETLBFS_SIZE, (errno.EFAULT, errno.ENOSPC))


@pytest.mark.parametrize("headroom", ["off", "check"])
def test_a_template_on_a_hugetlbfs_that_is_full(hugetlbfs_mount: Any, huge_pool: Any, headroom: str) -> None:
    """The copies count against size=, though the file is never changed."""
    huge_pool(8)
    path = hugetlbfs_mount(pages=4) / "template"
    with path.open("w+b") as file:
        file.truncate(6 * MIB)
        with mmap.mmap(file.fileno(), 6 * MIB) as memory:
            memory[:] = b"template" * (6 * MIB // 8)
    with Region(6 * MIB, backend=File(path, shared=False), headroom=headroom) as region:
        assert region.plug(0) == 1
        fill(region, 0, 7)
        with pytest.raises(BackendExhaustedError) as caught:
            region.plug(1, 2)
        assert caught.value.cause is Cause.HUGETLBFS_SIZE
        assert caught.value.rolled_back
        assert list(region.plugged_runs()) == [(0, 1)]
        with region.view(0) as view:
            assert view == bytes([7]) * len(view)
        region.unplug(0)
        region.plug(0)
        with region.view(0) as view:
            assert view[:8] == b"template", "and is fresh again"
        assert region.audit().ok


@pytest.mark.parametrize(
    "backend",
    [
        Anonymous(hugetlb="2M"),
        Memfd(hugetlb="2M"),
        Memfd(hugetlb="2M", shared=False),
        Memfd(hugetlb="2M", strategy="futex"),
    ]
    if accounting.huge_pool_folder().exists()
    else [],
    ids=str,
)
def test_an_empty_pool_of_huge_pages(empty_pool: None, backend: Any) -> None:
    with Region("1T", backend=backend, headroom="off") as region:
        with pytest.raises(BackendExhaustedError) as caught:
            region.plug(0, 2)
        assert caught.value.cause is Cause.HUGETLB_POOL
        assert caught.value.rolled_back
        assert region.audit().ok


def test_a_pool_that_runs_out_half_way_is_given_back(huge_pool: Any) -> None:
    huge_pool(4)
    free = accounting.huge_pool().available
    with Region("1T", backend=Memfd(hugetlb="2M"), headroom="off") as region:
        with pytest.raises(BackendExhaustedError) as caught:
            region.plug(0, free + 1)
        assert caught.value.populated == free * 2 * MIB
        assert accounting.huge_pool().available == free
        assert region.plug(0, free) == free
    assert accounting.huge_pool().available == free


def test_rlimit_as_limits_the_reservation_and_not_the_process() -> None:
    def child() -> int:
        room = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + (1 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        with pytest.raises(ReserveError, match="ulimit -v") as caught:
            Region("1T")
        assert caught.value.errno == errno.ENOMEM
        with Region("64M") as region:
            return region.plug(0, 4)

    assert run_child(child).result() == 4


def test_rlimit_fsize_limits_files(tmp_path: Path) -> None:
    def child() -> list[str]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(ReserveError, match="ulimit -f") as caught:
            Region("64M", backend=File(tmp_path / "f"))
        assert caught.value.errno == errno.EFBIG
        return os.listdir(tmp_path)

    assert run_child(child, limits={resource.RLIMIT_FSIZE: 1 << 20}).result() == []


def test_strict_overcommit_refuses_private_reservations(kernel_setting: Any) -> None:
    """It ignores MAP_NORESERVE for private memory; shared memory still reserves, and is charged as it comes."""
    kernel_setting("/proc/sys/vm/overcommit_memory", 2)
    with pytest.raises(ReserveError, match="overcommit_memory=2"):
        Region("1T")
    with Region("64G", backend=Memfd()) as region:
        assert any(limit.cause is Cause.OVERCOMMIT for limit in region.headroom().limits)
        assert region.plug(0, 2) == 2


@pytest.mark.parametrize("strategy", ["auto", "futex"])
def test_a_file_truncated_underneath(tmp_path: Path, strategy: str) -> None:
    with Region("64M", block_size="64K", backend=File(tmp_path / "f", strategy=strategy)) as region:
        region.plug(0)
        os.ftruncate(region.fileno(), 1 << 20)
        with pytest.raises(PopulateError) as caught:
            region.plug(16, 4)
        assert caught.value.cause is Cause.FILE_TRUNCATED
        assert not isinstance(caught.value, BackendExhaustedError)
        assert list(region.plugged_runs()) == [(0, 1)]
        os.ftruncate(region.fileno(), 64 << 20)
        assert region.plug(16, 4) == 4


def test_headroom_refuses_before_anything_is_touched(tmpfs_mount: Any) -> None:
    folder = tmpfs_mount("8M")
    with Region("1T", block_size="64K", backend=File(folder / "f")) as region:
        headroom = region.headroom()
        assert headroom.available == 8 * MIB
        assert headroom.binding is not None
        assert headroom.binding.cause is Cause.TMPFS_FULL
        with pytest.raises(BackendExhaustedError, match="refused up front") as caught:
            region.plug(0, 129)
        assert caught.value.populated == 0
        assert caught.value.cause is Cause.TMPFS_FULL
        assert region.plug(0, 128) == 128
        assert region.headroom().available == 0
