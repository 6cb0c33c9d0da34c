"""The 21 checks of the kernel's own selftest for MADV_POPULATE_READ and _WRITE, each raw and on a region.

The selftest is tools/testing/selftests/mm/madv_populate.c; the numbers below are the order of its checks. A region
never populates for reading, so its counterpart of such a check is what that call does to a region behind its back:
it succeeds or fails as on any mapping, and never counts as plugged.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator

import pytest

from sparsemem import Anonymous, Cause, PopulateError, Region
from tests.conformance.raw import (
    KERNEL,
    PAGE,
    POPULATE_READ,
    POPULATE_WRITE,
    PROT_READ,
    PROT_WRITE,
    Raw,
    madvise,
    mapping,
)
from tests.support import accounting

SIZE = 2 << 20
BLOCKS = SIZE // PAGE
BOTH = PROT_READ | PROT_WRITE

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

pytestmark = pytest.mark.skipif(madvise(0, 0, POPULATE_WRITE) != 0, reason="needs a kernel with MADV_POPULATE_WRITE")


@pytest.fixture
def raw() -> Iterator[Raw]:
    with mapping(size=SIZE) as made:
        yield made


@pytest.fixture(params=["populate_write", "futex"])
def region(request: pytest.FixtureRequest) -> Iterator[Region]:
    with Region(SIZE, block_size=PAGE, backend=Anonymous(strategy=request.param)) as made:
        yield made


def protect(address: int, protection: int) -> None:
    assert libc.mprotect(address, SIZE, protection) == 0


def populated(address: int) -> int:
    """Pages that pagemap says are present or swapped, as the selftest asks (pagemap_is_populated)."""
    return sum(1 for entry in accounting.pagemap_entries(address, SIZE) if entry >> 62)


def refuse(region: Region, first: int, count: int, cause: Cause, *codes: int) -> None:
    """A plug fails with one of these errnos, nothing is plugged and nothing is resident."""
    with pytest.raises(PopulateError) as caught:
        region.plug(first, count)
    assert caught.value.errno in codes
    assert caught.value.cause is cause
    assert region.plugged_size == 0
    assert region.audit().resident_size == 0


# ---- 1 to 4: READ and WRITE with PROT_READ and with PROT_WRITE -------------------------------


@pytest.mark.parametrize(
    ("protection", "advice", "expected"),
    [
        pytest.param(PROT_READ, POPULATE_READ, 0, id="1 read with PROT_READ"),
        pytest.param(PROT_READ, POPULATE_WRITE, errno.EINVAL, id="2 write with PROT_READ"),
        pytest.param(PROT_WRITE, POPULATE_READ, errno.EINVAL, id="3 read with PROT_WRITE"),
        pytest.param(PROT_WRITE, POPULATE_WRITE, 0, id="4 write with PROT_WRITE"),
    ],
)
def test_access(raw: Raw, protection: int, advice: int, expected: int) -> None:
    protect(raw.address, protection)
    assert madvise(raw.address, SIZE, advice) == expected
    assert populated(raw.address) == (0 if expected else BLOCKS)


def test_1_a_readable_region_can_be_populated_for_reading_and_that_is_no_plug(region: Region) -> None:
    protect(region.address, PROT_READ)
    assert madvise(region.address, SIZE, POPULATE_READ) == 0
    audit = region.audit()
    assert audit.ok
    assert audit.resident_size == 0


def test_2_a_region_that_cannot_be_written_plugs_nothing(region: Region) -> None:
    protect(region.address, PROT_READ)
    refuse(region, 0, BLOCKS, Cause.PROTECTION, errno.EINVAL, errno.EFAULT)  # EFAULT: the futex way
    protect(region.address, BOTH)
    assert region.plug(0, BLOCKS) == BLOCKS


def test_3_a_region_that_can_only_be_written_is_not_populated_for_reading(region: Region) -> None:
    protect(region.address, PROT_WRITE)
    assert madvise(region.address, SIZE, POPULATE_READ) == errno.EINVAL
    assert populated(region.address) == 0


def test_4_a_region_that_can_only_be_written_can_be_plugged(region: Region) -> None:
    protect(region.address, PROT_WRITE)
    assert region.plug(0, BLOCKS) == BLOCKS
    assert region.audit().ok
    assert region.audit().resident_size == SIZE


# ---- 5 to 10: holes ---------------------------------------------------------------------------

# The selftest's own ranges, in pages: the second page is missing.
HOLES = [
    pytest.param(0, BLOCKS, id="5, 6 in the middle"),
    pytest.param(0, 2, id="7, 8 at the end"),
    pytest.param(1, 1, id="9, 10 at the beginning"),
]


@pytest.mark.parametrize(("first", "count"), HOLES)
@pytest.mark.parametrize("advice", [POPULATE_READ, POPULATE_WRITE], ids=["read", "write"])
def test_holes(raw: Raw, first: int, count: int, advice: int) -> None:
    assert libc.munmap(raw.address + PAGE, PAGE) == 0
    assert madvise(raw.address + first * PAGE, count * PAGE, advice) == errno.ENOMEM
    KERNEL.reserve_placeholder(raw.address + PAGE, PAGE)


@pytest.mark.parametrize(("first", "count"), HOLES)
def test_holes_in_a_region(region: Region, first: int, count: int) -> None:
    assert libc.munmap(region.address + PAGE, PAGE) == 0
    assert madvise(region.address + first * PAGE, count * PAGE, POPULATE_READ) == errno.ENOMEM
    with pytest.raises(PopulateError) as caught:
        region.plug(first, count)
    assert caught.value.errno == errno.ENOMEM
    assert caught.value.cause is Cause.MAPPING_HOLE
    assert not caught.value.rolled_back, "the discard met the hole as well: its blocks are tainted"
    assert region.plugged_size == 0
    assert any(start <= 1 < start + n for start, n in region.tainted_runs())
    KERNEL.reserve_placeholder(region.address + PAGE, PAGE)
    assert region.scrub() > 0
    assert region.plug(0, BLOCKS) == BLOCKS
    assert region.audit().ok


# ---- 11 to 16: populated or not, seen in pagemap ------------------------------------------------


@pytest.mark.parametrize(
    "advice", [pytest.param(POPULATE_READ, id="11 to 13 read"), pytest.param(POPULATE_WRITE, id="14 to 16 write")]
)
def test_populated(raw: Raw, advice: int) -> None:
    assert populated(raw.address) == 0
    assert madvise(raw.address, SIZE, advice) == 0
    assert populated(raw.address) == BLOCKS


def test_11_to_13_a_region_populated_for_reading_has_nothing_of_its_own(region: Region) -> None:
    assert populated(region.address) == 0
    assert madvise(region.address, SIZE, POPULATE_READ) == 0
    assert populated(region.address) == BLOCKS
    audit = region.audit()
    assert audit.ok, "the zero page is nobody's memory"
    assert audit.resident_size == 0


def test_14_to_16_a_plugged_region_is_populated(region: Region) -> None:
    assert populated(region.address) == 0
    assert region.plug(0, BLOCKS) == BLOCKS
    assert populated(region.address) == BLOCKS
    assert region.audit().resident_size == SIZE
    region.unplug_all()
    assert populated(region.address) == 0


# ---- 17 to 21: soft-dirty, where the kernel has it ------------------------------------------------


def soft_dirty(address: int) -> int:
    return sum(1 for entry in accounting.pagemap_entries(address, SIZE) if entry >> 55 & 1)


@pytest.fixture
def cleared() -> None:
    """Nothing is soft-dirty; skips where the kernel keeps no such bits."""
    with mapping(size=PAGE) as probe:
        probe.write(0, b"x")
        if not accounting.pagemap_entries(probe.address, PAGE)[0] >> 55 & 1:
            pytest.skip("the kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)")


def clear_soft_dirty() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("4")


def test_17_to_21_soft_dirty(raw: Raw, cleared: None) -> None:
    clear_soft_dirty()
    assert soft_dirty(raw.address) == 0
    assert madvise(raw.address, SIZE, POPULATE_READ) == 0
    assert soft_dirty(raw.address) == 0
    assert madvise(raw.address, SIZE, POPULATE_WRITE) == 0
    assert soft_dirty(raw.address) == BLOCKS


def test_17_to_21_soft_dirty_of_a_region(region: Region, cleared: None) -> None:
    clear_soft_dirty()
    assert soft_dirty(region.address) == 0
    assert madvise(region.address, SIZE, POPULATE_READ) == 0
    assert soft_dirty(region.address) == 0
    assert region.plug(0, BLOCKS) == BLOCKS
    assert soft_dirty(region.address) == BLOCKS
