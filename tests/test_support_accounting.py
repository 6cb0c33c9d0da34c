"""The accounting is measured against mappings whose truth is known by construction."""

import ctypes
import mmap
import os

import pytest

from tests.support import accounting
from tests.support.accounting import HUGE_2M, PAGE_SIZE, Page, PagemapBit

MIB = 1 << 20
MADV_NOHUGEPAGE = 15
MAP_NORESERVE = 0x4000
MAP_HUGETLB = 0x40000


def address_of(mapping: mmap.mmap) -> int:
    # from_buffer exports the mapping's buffer; it is released at once, so that close() works.
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


@pytest.fixture
def anonymous():
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    with mmap.mmap(-1, 16 * MIB, flags=flags) as mapping:
        mapping.madvise(MADV_NOHUGEPAGE)
        yield mapping


def touch(mapping, first, pages):
    for page in range(first, first + pages):
        mapping[page * PAGE_SIZE] = 1


def test_smaps_counts_exactly_what_was_touched(anonymous):
    start = address_of(anonymous)
    touch(anonymous, 3, 5)
    found = accounting.smaps(start, len(anonymous))
    assert found.exact
    assert found["Rss"] == found["Pss"] == found["Anonymous"] == found.resident == 5 * PAGE_SIZE
    assert found["AnonHugePages"] == found["Swap"] == found.hugetlb == 0
    assert [area.span for area in found.areas] == [(start, start + len(anonymous))]
    assert {"rd", "wr", "nr", "nh"} <= found.flags[0]


def test_smaps_says_when_it_counts_neighbours(anonymous):
    start = address_of(anonymous)
    touch(anonymous, 0, 2)
    found = accounting.smaps(start + MIB, MIB)
    assert not found.exact
    assert found["Rss"] == 2 * PAGE_SIZE


def test_smaps_sums_split_areas(anonymous):
    start = address_of(anonymous)
    anonymous.madvise(mmap.MADV_DONTDUMP, MIB, MIB)
    touch(anonymous, 0, 600)
    found = accounting.smaps(start, len(anonymous))
    assert len(found.areas) == 3
    assert ["dd" in flags for flags in found.flags] == [False, True, False]
    assert found["Rss"] == 600 * PAGE_SIZE


def test_smaps_of_nothing(anonymous):
    start = address_of(anonymous)
    length = len(anonymous)
    anonymous.close()
    with pytest.raises(LookupError, match="nothing is mapped"):
        accounting.smaps(start, length)
    assert accounting.vmas(start, length) == []


def test_vmas_and_their_number(tmp_path):
    before = accounting.vma_count()
    (tmp_path / "file").write_bytes(bytes(PAGE_SIZE))
    with open(tmp_path / "file", "rb") as file, mmap.mmap(file.fileno(), PAGE_SIZE, prot=mmap.PROT_READ) as mapping:
        assert mapping[0] == 0
        (vma,) = (vma for vma in accounting.vmas() if vma.name == str(tmp_path / "file"))
        assert vma.permissions == "r--s"
        assert vma.inode == os.fstat(file.fileno()).st_ino
        assert vma.length == PAGE_SIZE
        assert accounting.vma_count() == len(accounting.vmas())
        assert accounting.vma_count() >= before


def test_allocated_bytes_of_a_memfd():
    descriptor = os.memfd_create("accounting")
    try:
        os.ftruncate(descriptor, 1 << 40)
        assert accounting.allocated_bytes(descriptor) == 0
        os.posix_fallocate(descriptor, 3 * MIB, 7 * PAGE_SIZE)
        assert accounting.allocated_bytes(descriptor) == 7 * PAGE_SIZE
        assert accounting.open_descriptors()[descriptor].startswith("/memfd:accounting")
    finally:
        os.close(descriptor)
    assert descriptor not in accounting.open_descriptors()


def test_pagemap_scan_finds_runs(anonymous):
    if not accounting.have_pagemap_scan():
        pytest.skip("needs Linux 6.7: ioctl PAGEMAP_SCAN")
    start = address_of(anonymous)
    touch(anonymous, 1, 3)
    touch(anonymous, 100, 1)
    assert anonymous[10 * PAGE_SIZE] == 0  # a read: the zero page
    zero_page = (start + 10 * PAGE_SIZE, start + 11 * PAGE_SIZE)
    written = [(start + first * PAGE_SIZE, start + end * PAGE_SIZE) for first, end in ((1, 4), (100, 101))]
    scan = accounting.pagemap_scan
    assert scan(start, len(anonymous), all_of=Page.PRESENT) == [written[0], zero_page, written[1]]
    assert scan(start, len(anonymous), all_of=Page.PFNZERO) == [zero_page]
    assert scan(start, len(anonymous), all_of=Page.PRESENT, none_of=Page.PFNZERO) == written
    assert scan(start, len(anonymous), any_of=Page.FILE | Page.SWAPPED) == []
    assert accounting.resident_runs(start, len(anonymous)) == written
    assert accounting.resident_bytes(start, len(anonymous)) == 4 * PAGE_SIZE


def test_pagemap_scan_goes_on_when_its_vector_is_full(anonymous):
    if not accounting.have_pagemap_scan():
        pytest.skip("needs Linux 6.7: ioctl PAGEMAP_SCAN")
    start = address_of(anonymous)
    pages = range(0, 4096, 2)
    for page in pages:
        touch(anonymous, page, 1)
    runs = accounting.resident_runs(start, len(anonymous))
    assert runs == [(start + page * PAGE_SIZE, start + (page + 1) * PAGE_SIZE) for page in pages]


def test_pagemap_scan_of_a_tebibyte_is_quick():
    with mmap.mmap(-1, 1 << 40, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE) as mapping:
        mapping.madvise(MADV_NOHUGEPAGE)
        mapping[1 << 39] = 1
        if accounting.have_pagemap_scan():
            assert accounting.resident_bytes(address_of(mapping), 1 << 40) == PAGE_SIZE
        assert accounting.smaps(address_of(mapping), 1 << 40)["Rss"] == PAGE_SIZE


def test_pagemap_entries_and_the_fallback(anonymous, monkeypatch):
    start = address_of(anonymous)
    touch(anonymous, 2, 2)
    entries = accounting.pagemap_entries(start, 8 * PAGE_SIZE)
    assert [bool(entry & PagemapBit.PRESENT) for entry in entries] == [False, False, True, True] + [False] * 4

    def absent(*_args, **_kwargs):
        raise OSError

    monkeypatch.setattr(accounting, "pagemap_scan", absent)
    assert accounting.resident_runs(start, len(anonymous)) == [(start + 2 * PAGE_SIZE, start + 4 * PAGE_SIZE)]


def test_mincore(anonymous):
    start = address_of(anonymous)
    touch(anonymous, 0, 9)
    assert accounting.mincore_pages(start, len(anonymous)) == 9
    with pytest.raises(OSError, match="mincore"):
        accounting.mincore_pages(start + 1, PAGE_SIZE)


def test_hugetlb_is_seen_in_the_pool_in_smaps_and_in_the_file(huge_pool):
    huge_pool(4)
    before = accounting.huge_pool()
    descriptor = os.memfd_create("huge", flags=0x4)  # MFD_HUGETLB
    try:
        os.ftruncate(descriptor, 4 * HUGE_2M)
        with mmap.mmap(descriptor, 4 * HUGE_2M, flags=mmap.MAP_SHARED | MAP_NORESERVE) as mapping:
            mapping[0] = mapping[HUGE_2M] = 1
            found = accounting.smaps(address_of(mapping), len(mapping))
            # The memfd stays a sole mapping, so the kernel may call its pages private or shared.
            assert found.hugetlb == found.resident == 2 * HUGE_2M
            assert found["Rss"] == 0
            assert accounting.allocated_bytes(descriptor) == 2 * HUGE_2M
            assert accounting.huge_pool().free == before.free - 2
    finally:
        os.close(descriptor)
    assert accounting.huge_pool() == before


def test_a_pool_that_does_not_exist():
    with pytest.raises(FileNotFoundError):
        accounting.huge_pool(12345 << 10)
