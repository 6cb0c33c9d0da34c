"""Somebody else has taken the room: an error, nothing changed, and when the room is back the same plug succeeds.

With `headroom="off"` the kernel says so, in the middle of the work; with "check" it is seen beforehand.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sparsemem import Anonymous, BackendExhaustedError, Cause, File, Memfd, Region
from tests.support import accounting
from tests.support.children import run_child
from tests.support.kinds import private_bytes

pytestmark = [pytest.mark.promise("plug-all-or-nothing"), pytest.mark.promise("plugged-memory-is-there")]

MIB = 1 << 20
HUGE = 2 * MIB


@dataclass(frozen=True)
class Place:
    """A file system that can be filled.

    Attributes:
        fixture: Makes the mount.
        arguments: Its size.
        left: Bytes that the filler leaves.
        plug: Bytes that are plugged then, more than what is left.
        slack: Bytes that the file system may keep for itself (ext4's extent tree).
    """

    fixture: str
    arguments: dict[str, Any]
    cause: Cause
    left: int
    plug: int
    block_size: int = 64 << 10
    slack: int = 0


PLACES = {
    "tmpfs": Place("tmpfs_mount", {"size": "16M"}, Cause.TMPFS_FULL, MIB, 8 * MIB),
    "ext4": Place("ext4_mount", {"size_mib": 64}, Cause.FILESYSTEM_FULL, 4 * MIB, 24 * MIB, slack=64 << 10),
    "hugetlbfs": Place("hugetlbfs_mount", {"pages": 8}, Cause.HUGETLBFS_SIZE, 2 * HUGE, 4 * HUGE, HUGE),
}


def fill(folder: Path, left: int) -> Path:
    """Leaves so many bytes."""
    path = folder / "filler"
    about = os.statvfs(folder)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, about.f_bavail * about.f_frsize - left)
    return path


def write(region: Region, first: int, count: int) -> None:
    with region.view(first, count) as view:
        view[:] = b"\x5a" * len(view)


def usage(region: Region) -> tuple[int, int]:
    """Bytes of the file, and bytes of private memory in front of it."""
    if region.page_size == HUGE:
        return accounting.allocated_bytes(region.fileno()), accounting.smaps(region.address, region.size).hugetlb
    return accounting.allocated_bytes(region.fileno()), private_bytes(region)


@pytest.mark.parametrize("headroom", ["off", "check"])
@pytest.mark.parametrize("strategy", ["populate_write", "futex"])
@pytest.mark.parametrize(
    ("name", "shared"), [("tmpfs", True), ("tmpfs", False), ("ext4", True), ("hugetlbfs", True), ("hugetlbfs", False)]
)
def test_the_same_plug_succeeds_when_there_is_room_again(
    name: str, shared: bool, strategy: str, headroom: str, request: pytest.FixtureRequest
) -> None:
    place = PLACES[name]
    if name == "hugetlbfs":
        request.getfixturevalue("huge_pool")(16)
    folder = request.getfixturevalue(place.fixture)(**place.arguments)
    backend = File(folder / "f", shared=shared, strategy=strategy)
    with Region("128M", block_size=place.block_size, backend=backend, headroom=headroom, fork="inherit") as region:
        region.plug(0, 2)
        write(region, 0, 2)
        filler = fill(folder, place.left)
        before = usage(region)
        region._core.gauge.forget()  # a reading is good for 100 ms
        for _ in range(2):  # a second time, for the first must have left nothing behind
            with pytest.raises(BackendExhaustedError) as caught:
                region.plug(4, place.plug // place.block_size)
            assert caught.value.cause is place.cause
            assert caught.value.errno in (errno.EFAULT, errno.ENOSPC, errno.ENOMEM)
            assert caught.value.rolled_back
            if headroom == "check":
                assert caught.value.populated == 0
                assert "up front" in str(caught.value)
            assert list(region.plugged_runs()) == [(0, 2)]
            assert not list(region.tainted_runs())
            assert all(abs(now - was) <= place.slack for now, was in zip(usage(region), before, strict=True))
            with region.view(0, 2) as view:
                assert bytes(view) == b"\x5a" * len(view)
        filler.unlink()
        assert region.plug(4, place.plug // place.block_size) == place.plug // place.block_size
        # Now somebody takes all that is left: what is plugged needs nothing more.
        fill(folder, 0 if name != "ext4" else 256 << 10)
        write(region, 4, place.plug // place.block_size)
        if shared:
            assert run_child(write, region, 4, place.plug // place.block_size).signal is None
        assert region.audit().ok or name == "hugetlbfs"


def test_an_unplugged_block_of_a_full_tmpfs_is_what_raises_sigbus(tmpfs_mount: Any) -> None:
    """So the tests above would see it if a plugged one did."""
    folder = tmpfs_mount(size="4M")
    with Region("64M", block_size="64K", backend=File(folder / "f"), headroom="off", fork="inherit") as region:
        region.plug(0, 64)

        def touch() -> None:
            with region.view() as view:
                view[32 * MIB] = 1

        outcome = run_child(touch)
        assert outcome.signal is not None
        assert outcome.signal.name == "SIGBUS"


def test_a_private_tmpfs_file_is_not_refused_for_want_of_more_than_a_chunk(tmpfs_mount: Any) -> None:
    """It is populated through the file a chunk at a time, so its size is no limit to what can be plugged."""
    folder = tmpfs_mount(size="2M")
    with Region("1G", block_size="64K", backend=File(folder / "f", shared=False), headroom="check") as region:
        assert region.plug(0, 256) == 256
        assert usage(region) == (0, 16 * MIB)
        assert all(limit.cause is not Cause.TMPFS_FULL for limit in region.headroom().limits)


@pytest.mark.parametrize("headroom", ["off", "check"])
@pytest.mark.parametrize("strategy", ["populate_write", "futex"])
@pytest.mark.parametrize(
    "make",
    [
        lambda strategy: Anonymous(hugetlb="2M", strategy=strategy),
        lambda strategy: Memfd(hugetlb="2M", strategy=strategy),
        lambda strategy: Memfd(hugetlb="2M", shared=False, strategy=strategy),
    ],
    ids=["anonymous", "memfd shared", "memfd private"],
)
def test_huge_pages_that_somebody_else_has(
    make: Callable[[str], Any], strategy: str, headroom: str, huge_pool: Any, kernel_setting: Any
) -> None:
    huge_pool(8)
    kernel_setting(accounting.huge_pool_folder() / "nr_overcommit_hugepages", 0)
    with (
        Region("1G", backend=make(strategy), headroom=headroom) as region,
        Region("1G", backend=Anonymous(hugetlb="2M"), headroom="off") as other,
    ):
        region.plug(0)
        write(region, 0, 1)
        free = accounting.huge_pool().available
        other.plug(0, free - 2)
        region._core.gauge.forget()  # a reading is good for 100 ms
        before = accounting.smaps(region.address, region.size).hugetlb
        with pytest.raises(BackendExhaustedError) as caught:
            region.plug(1, 4)
        assert caught.value.cause is Cause.HUGETLB_POOL
        assert caught.value.rolled_back
        assert (caught.value.populated > 0) == (headroom == "off")
        assert accounting.huge_pool().available == 2
        assert accounting.smaps(region.address, region.size).hugetlb == before
        with region.view(0) as view:
            assert bytes(view[:MIB]) == b"\x5a" * MIB
        other.unplug(0, 2)
        assert region.plug(1, 4) == 4
        assert accounting.huge_pool().available == 0
        write(region, 1, 4)  # a SIGBUS would end this process
