"""Which call discards what, for each kind of mapping: the table that the recipes are made from, line by line."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
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
    PAGE,
    POPULATE_READ,
    POPULATE_WRITE,
    REMOVE,
    SIZE,
    Raw,
    madvise,
    mapping,
    memfd,
    need,
    punch,
    supports,
)
from tests.support import accounting
from tests.support.kinds import need_disk

DATA = b"data"
GONE, KEPT, COPY_GONE = "discards", "keeps", "drops the copy"

# kind: (DONTNEED, PUNCH, REMOVE, FREE), each an errno or what becomes of the data.  None: not applicable.
TABLE: dict[str, tuple[object, object, object, object]] = {
    "anonymous private": (GONE, None, errno.EINVAL, KEPT),
    "anonymous shared": (KEPT, None, GONE, errno.EINVAL),
    "memfd shared": (KEPT, GONE, GONE, errno.EINVAL),
    "memfd private": (COPY_GONE, KEPT, errno.EACCES, errno.EINVAL),
    "hugetlb memfd shared": (KEPT, GONE, GONE, errno.EINVAL),
    "hugetlb memfd private": (GONE, GONE, errno.EACCES, errno.EINVAL),
    "hugetlb anonymous": (GONE, None, errno.EACCES, errno.EINVAL),
    "disk shared": (KEPT, GONE, GONE, errno.EINVAL),
    "disk private": (COPY_GONE, KEPT, errno.EACCES, errno.EINVAL),
    "tmpfs file shared": (KEPT, GONE, GONE, errno.EINVAL),
    "tmpfs file private": (COPY_GONE, KEPT, errno.EACCES, errno.EINVAL),
    "hugetlbfs file shared": (KEPT, GONE, GONE, errno.EINVAL),
    "hugetlbfs file private": (GONE, GONE, errno.EACCES, errno.EINVAL),
    "ext4 file shared": (KEPT, GONE, GONE, errno.EINVAL),
    "ext4 file private": (COPY_GONE, KEPT, errno.EACCES, errno.EINVAL),
}
GUARDS = {kind: not kind.startswith("hugetlb") for kind in TABLE}

# kind: what populating all of it costs, in units of the mapping: (pages of one's own, in the file).
COST = {
    "anonymous private": (1, 0),
    "anonymous shared": (0, 0),
    "memfd shared": (0, 1),
    "memfd private": (1, 1),  # double memory
    "hugetlb memfd shared": (0, 1),
    "hugetlb memfd private": (1, 0),
    "hugetlb anonymous": (1, 0),
    "disk shared": (0, 1),
    "disk private": (1, 0),  # and clean page cache
    "tmpfs file shared": (0, 1),
    "tmpfs file private": (1, 1),
    "hugetlbfs file shared": (0, 1),
    "hugetlbfs file private": (1, 0),
    "ext4 file shared": (0, 1),
    "ext4 file private": (1, 0),
}
# What a disk's file system may add for its extents.
SLACK = 64 << 10


@pytest.fixture
def raw(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Raw]:
    kind = request.param
    huge, shared = "hugetlb" in kind, "shared" in kind
    if huge:
        request.getfixturevalue("huge_pool")(8)
    if kind.startswith("disk"):
        need_disk(tmp_path)
    if "file" in kind or kind.startswith("disk"):
        mount = {"tmpfs": "tmpfs_mount", "hugetlbfs": "hugetlbfs_mount", "ext4": "ext4_mount"}.get(kind.split()[0])
        folder = tmp_path if mount is None else request.getfixturevalue(mount)()
        fd = os.open(folder / "f", os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, 4 * HUGE if huge else SIZE)
        try:
            with mapping(shared=shared, fd=fd, huge=huge) as made:
                yield made
        finally:
            os.close(fd)
    elif "memfd" in kind:
        with memfd(huge=huge) as fd, mapping(shared=shared, fd=fd, huge=huge) as made:
            yield made
    else:
        with mapping(shared=shared, huge=huge) as made:
            yield made


def columns() -> list[Any]:
    return [
        pytest.param(kind, call, expected, id=f"{kind}-{call}")
        for kind, row in TABLE.items()
        for call, expected in zip(("DONTNEED", "PUNCH", "REMOVE", "FREE"), row, strict=True)
        if expected is not None
    ]


@pytest.mark.parametrize(("raw", "call", "expected"), columns(), indirect=["raw"])
def test_what_a_call_does(raw: Raw, call: str, expected: object) -> None:
    raw.write(0, DATA)
    length, before = raw.page, raw.in_file()
    if call == "PUNCH":
        got = punch(raw.fd, 0, length)
    else:
        got = madvise(raw.address, length, {"DONTNEED": DONTNEED, "REMOVE": REMOVE, "FREE": FREE}[call])
    if isinstance(expected, int):
        assert got == expected
        assert raw.read(0, 4) == DATA
        return
    assert got == 0
    if call == "DONTNEED" and expected == KEPT:
        assert raw.present() == 0, "the page tables are dropped"
        assert raw.in_file() == before, "and nothing is freed"
    if expected == KEPT:
        assert raw.read(0, 4) == DATA
    else:
        assert raw.read(0, 4) == bytes(4)
    if call == "FREE":
        assert raw.private() >= length, "MADV_FREE is not an unplug: the memory is still in use"


@pytest.mark.parametrize("raw", TABLE, indirect=True)
def test_the_discard_of_the_recipe_gives_the_memory_back(raw: Raw, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["raw"]
    raw.write(0, DATA)
    shared, before = "shared" in kind, raw.in_file()
    if shared and raw.fd >= 0:
        assert punch(raw.fd, 0, raw.page) == 0
        assert raw.in_file() <= before - raw.page
    elif shared:
        assert madvise(raw.address, raw.page, REMOVE) == 0
    elif raw.fd >= 0 and "hugetlb" not in kind:
        assert punch(raw.fd, 0, raw.page) == 0
        assert madvise(raw.address, raw.page, DONTNEED) == 0
        assert raw.in_file() == 0
    else:
        assert madvise(raw.address, raw.page, DONTNEED) == 0
    assert raw.present() == 0
    assert raw.read(0, 4) == bytes(4)


@pytest.mark.parametrize("raw", TABLE, indirect=True)
def test_where_guard_pages_can_be(raw: Raw, request: pytest.FixtureRequest) -> None:
    need(GUARD_INSTALL, "MADV_GUARD_INSTALL")
    kind = request.node.callspec.params["raw"]
    raw.write(0, DATA)
    assert madvise(raw.address, raw.page, GUARD_INSTALL) == (0 if GUARDS[kind] else errno.EINVAL)
    if not GUARDS[kind]:
        assert raw.read(0, 4) == DATA
        return
    # Shared memory keeps its data behind the guard; what was private is gone, the file shows through.
    assert madvise(raw.address, raw.page, GUARD_REMOVE) == 0
    assert raw.read(0, 4) == (DATA if "shared" in kind else bytes(4))


@pytest.mark.parametrize("raw", COST, indirect=True)
def test_reserving_costs_nothing_and_populating_what_the_table_says(raw: Raw, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["raw"]
    own, in_file = COST[kind]
    slack = SLACK if kind.startswith(("disk", "ext4")) else 0
    assert (raw.present(), raw.private(), raw.in_file()) == (0, 0, 0)
    (area,) = accounting.vmas(raw.address, raw.size)
    assert area.span == (raw.address, raw.address + raw.size) or "anonymous" in kind, "one mapping"
    assert madvise(raw.address, raw.size, POPULATE_WRITE) == 0
    assert raw.present() == raw.size
    if "hugetlb" in kind:
        sizes = accounting.smaps(raw.address, raw.size)
        assert (sizes["Private_Hugetlb"] + sizes["Shared_Hugetlb"], sizes["Rss"]) == (raw.size, 0)
        assert raw.in_file() == in_file * raw.size, "single"
        return
    assert raw.private() == own * raw.size
    assert 0 <= raw.in_file() - in_file * raw.size <= slack
    assert accounting.smaps(raw.address, raw.size)["Rss"] == raw.size


@pytest.mark.parametrize("raw", ["disk private", "ext4 file private"], indirect=True)
def test_a_private_disk_file_has_clean_cache_beside_the_copies(raw: Raw) -> None:
    assert madvise(raw.address, raw.size, POPULATE_WRITE) == 0
    with mapping(shared=True, fd=raw.fd) as other:
        assert accounting.mincore_pages(other.address, other.size) == SIZE // PAGE
        assert madvise(other.address, other.size, POPULATE_READ) == 0
        assert accounting.smaps(other.address, other.size)["Shared_Dirty"] == 0
        assert accounting.smaps(other.address, other.size)["Private_Dirty"] == 0


@pytest.mark.parametrize("raw", ["memfd private"], indirect=True)
def test_populating_a_private_file_costs_double_until_it_is_punched(raw: Raw) -> None:
    assert raw.populated()
    assert (raw.private(), raw.in_file()) == (raw.size, raw.size)
    assert punch(raw.fd, 0, raw.size) == 0
    assert (raw.private(), raw.in_file()) == (raw.size, 0)


@pytest.mark.parametrize("raw", ["memfd shared"], indirect=True)
def test_a_punch_of_less_than_a_page_zeroes_and_frees_nothing(raw: Raw) -> None:
    raw.write(0, b"abcd" * 1024)
    assert punch(raw.fd, 0, 100) == 0
    assert raw.read(0, 100) == bytes(100)
    assert raw.read(100, 4) == b"abcd"
    assert raw.in_file() == PAGE


@pytest.mark.parametrize("raw", ["hugetlb anonymous"], indirect=True)
def test_a_short_dontneed_on_huge_pages_says_yes_and_does_nothing(raw: Raw) -> None:
    raw.write(0, DATA)
    assert madvise(raw.address, PAGE, DONTNEED) == 0
    assert raw.read(0, 4) == DATA


@pytest.mark.parametrize("raw", ["anonymous private"], indirect=True)
def test_locked_memory_needs_dontneed_locked(raw: Raw) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    if libc.mlock(raw.address, raw.size):
        pytest.skip("needs root: to lock memory")
    raw.write(0, DATA)
    assert madvise(raw.address, raw.size, DONTNEED) == errno.EINVAL
    if supports(DONTNEED_LOCKED):
        assert madvise(raw.address, raw.size, DONTNEED_LOCKED) == 0
        assert raw.read(0, 4) == bytes(4)


def test_a_write_seal_forbids_punching() -> None:
    with memfd() as fd:
        calls.kernel.add_seals(fd, lib.F_SEAL_FUTURE_WRITE)
        assert punch(fd, 0, PAGE) == errno.EPERM


@pytest.mark.parametrize("raw", ["anonymous private"], indirect=True)
def test_dontneed_goes_on_past_a_hole_and_still_says_enomem(raw: Raw) -> None:
    assert raw.populated()
    calls.kernel.unmap(raw.address + 4 * PAGE, PAGE)
    assert madvise(raw.address, raw.size, DONTNEED) == errno.ENOMEM
    assert raw.private() == 0
    calls.kernel.reserve_placeholder(raw.address + 4 * PAGE, PAGE)


def test_shmem_rolls_a_failed_fallocate_back(tmpfs_mount: Any) -> None:
    folder = tmpfs_mount("64K")
    fd = os.open(folder / "f", os.O_RDWR | os.O_CREAT)
    try:
        calls.kernel.fallocate(fd, 0, 0, 8 * PAGE)
        with pytest.raises(OSError, match="No space") as caught:
            calls.kernel.fallocate(fd, 0, 8 * PAGE, SIZE)
        assert caught.value.errno == errno.ENOSPC
        assert os.fstat(fd).st_blocks * 512 == 8 * PAGE
    finally:
        os.close(fd)


def test_hugetlb_fallocate_does_not(huge_pool: Any, hugetlbfs_mount: Any) -> None:
    huge_pool(8)
    folder = hugetlbfs_mount(pages=3)
    fd = os.open(folder / "f", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(OSError, match="No space"):
            calls.kernel.fallocate(fd, 0, 0, 6 * HUGE)
        assert os.fstat(fd).st_blocks * 512 == 3 * HUGE, "what it did stays: the rollback must discard"
    finally:
        os.close(fd)
