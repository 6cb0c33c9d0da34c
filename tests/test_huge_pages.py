"""What is huge, what makes it huge again, and a warning before it is no longer."""

from __future__ import annotations

import ctypes
import errno
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsemem import (
    Anonymous,
    BlockRangeError,
    BlockStateError,
    File,
    HugePageSplitWarning,
    Memfd,
    Region,
    RegionClosedError,
    Secret,
    Simulated,
    UnsupportedError,
)
from sparsemem._sys import calls, lib, residency
from sparsemem.backends import Backend
from sparsemem.recipes import Step
from tests.support import accounting
from tests.support.accounting import Page
from tests.support.cgroups import MemoryCgroup
from tests.support.children import run_child
from tests.support.injector import Injector
from tests.support.kinds import need_disk
from tests.support.resources import THP_ENABLED
from tests.test_old_kernel import python

PMD = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
PR_SET_THP_DISABLE = 41

pytestmark = [
    pytest.mark.skipif(not PMD.exists(), reason="needs a kernel with transparent huge pages"),
    pytest.mark.skipif(not accounting.have_pagemap_scan(), reason="needs a kernel with PAGEMAP_SCAN"),
]

MODES = ["never", "madvise", "always"]
COLLAPSING = [Anonymous(), Anonymous(shared=True), Memfd(), Memfd(strategy="populate_write")]


@pytest.fixture
def huge() -> int:
    return int(PMD.read_text())


@pytest.fixture
def madvise_mode(thp_mode: Callable[[str], None]) -> None:
    if "[never]" in THP_ENABLED.read_text():
        thp_mode("madvise")


def huge_bytes(region: Region) -> int:
    """What the kernel says, read by the tests' own means."""
    found = accounting.pagemap_scan(region.address, region.size, all_of=Page.HUGE | Page.PRESENT, none_of=Page.PFNZERO)
    return sum(end - start for start, end in found)


def make_small(region: Region, first: int, count: int, huge: int) -> None:
    """Splits every huge page of these blocks, and fills what that discards again."""
    start, size = first * region.block_size, count * region.block_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HugePageSplitWarning)
        for offset in range(start, start + size, huge):
            region.discard(offset + region.page_size, region.page_size)
            region.populate(offset + region.page_size, region.page_size)


def fill(region: Region, first: int, count: int) -> bytes:
    pattern = os.urandom(4096) * (count * region.block_size // 4096)
    with region.view(first, count) as view:
        view[:] = pattern
    return pattern


# ---- what is huge ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", [*COLLAPSING, Memfd(shared=False), Anonymous(thp=False)], ids=str)
def test_the_audit_tells_what_the_kernel_does(mode: str, backend: Backend, thp_mode: Callable[[str], None]) -> None:
    thp_mode(mode)
    with Region("1G", backend=backend) as region:
        nothing = region.audit()
        assert (nothing.plugged_size, nothing.huge_size, nothing.huge_share) == (0, 0, 0)
        region.plug_runs([(1, 2), (5, 1)])
        audit = region.audit()
        assert audit.plugged_size == 3 * region.block_size
        assert audit.huge_size == huge_bytes(region)
        if backend == Anonymous():
            assert audit.huge_share == (0 if mode == "never" else 1)
        assert audit.huge_share == audit.huge_size / audit.plugged_size


def test_hugetlb_pages_are_huge(huge_pool: Callable[[int], None]) -> None:
    huge_pool(4)
    with Region("1G", block_size="2M", backend=Anonymous(hugetlb="2M")) as region:
        region.plug_runs([(0, 1), (2, 2)])
        assert region.audit().huge_share == 1
        assert region.huge_runs() == ((0, 1), (2, 2))


def test_unplugged_memory_does_not_count(madvise_mode: None) -> None:
    with Region("1G") as region:
        region.plug(0)
        with region.view() as whole:
            whole[3 * region.block_size] = 1
        audit = region.audit()
        assert audit.leaked_size == audit.huge_size == region.block_size
        assert region.huge_runs() == ((0, 1),)


def test_the_zero_page_is_nothing(madvise_mode: None, huge: int) -> None:
    with Region("1G", block_size=2 * huge) as region, region.view() as whole:
        assert whole[0] == 0  # a read of private memory maps the huge zero page
        assert region.audit().huge_size == 0
        region.plug(0)
        assert region.huge_runs() == ((0, 1),)


def test_a_block_is_huge_when_all_of_it_is(madvise_mode: None, huge: int) -> None:
    with Region("1G", block_size=2 * huge) as region:
        region.plug(0, 8)
        assert region.huge_runs() == ((0, 8),)
        make_small(region, 2, 1, 2 * huge)  # its first half
        make_small(region, 5, 1, huge)
        assert region.audit().huge_size == huge_bytes(region) == (2 * 6 + 1) * huge
        assert region.huge_runs() == ((0, 2), (3, 2), (6, 2))


def test_where_nobody_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    with Region("1P", backend=Simulated()) as region:
        region.plug(0)
        assert (region.audit().huge_size, region.audit().huge_share) == (None, None)
        assert region.audit().plugged_size == region.block_size
        with pytest.raises(UnsupportedError, match="nobody tells"):
            region.huge_runs()
    with Region("1G") as region:
        region.plug(0)
        monkeypatch.setattr(residency, "huge_pages", lambda address, length: None)
        assert region.audit().huge_share is None


def test_an_old_kernel_collapses_and_warns_of_nothing() -> None:
    """Without PAGEMAP_SCAN (before 6.7): what is huge nobody tells, but MADV_COLLAPSE (6.1) may work."""
    done = python(
        "from sparsemem import Region, UnsupportedError\n"
        "with Region('1G') as region:\n"
        "    region.plug(0, 2)\n"
        "    assert region.audit().huge_size is None\n"
        "    region.discard(4096, 4096)\n"
        "    try:\n"
        "        region.huge_runs()\n"
        "    except UnsupportedError as error:\n"
        "        print(region.collapse(0, 2) // region.block_size, error)\n"
    )
    assert done.stdout.startswith("2 nobody tells"), done.stderr


# ---- collapse --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", COLLAPSING, ids=str)
def test_collapsing_restores_huge_pages(
    mode: str, backend: Backend, thp_mode: Callable[[str], None], huge: int
) -> None:
    thp_mode(mode)
    with Region("1G", block_size=2 * huge, backend=backend) as region:
        region.plug(0, 6)
        pattern = fill(region, 0, 6)
        make_small(region, 0, 6, huge)
        assert huge_bytes(region) == 0
        with region.view(0, 6) as view:  # a view does not hinder it: content is kept
            pattern = bytes(view)
            assert region.collapse(1, 4) == 4 * region.block_size == huge_bytes(region)
            assert bytes(view) == pattern
        assert region.huge_runs() == ((1, 4),)
        assert region.audit().huge_share == 4 / 6
        assert region.collapse(0, 6) == 6 * region.block_size, "what is huge already counts"
        assert region.audit().ok
        assert list(region.plugged_runs()) == [(0, 6)]


def test_collapsing_fills_discarded_pages(madvise_mode: None, huge: int) -> None:
    with Region("1G", backend=Memfd()) as region:
        region.plug(0, 2)
        with pytest.warns(HugePageSplitWarning):
            region.discard(8192, 4096)
        assert region.audit().discarded_size == 4096
        assert region.collapse(0) == region.block_size
        audit = region.audit()
        assert (audit.discarded_size, audit.gap_size, audit.resident_size) == (0, 0, 2 * region.block_size)


def test_what_is_wholly_discarded_stays_so(madvise_mode: None, huge: int) -> None:
    with Region("1G", block_size=2 * huge) as region:
        region.plug(0)
        region.discard(0, huge)
        assert region.collapse(0) == huge, "there is nothing to make a huge page of"
        assert region.audit().discarded_size == huge


def test_tmpfs_files_collapse(tmpfs_folder: Path, huge: int) -> None:
    with Region("1G", backend=File(tmpfs_folder / "file", strategy="populate_write")) as region:
        region.plug(0, 3)
        assert region.collapse(0, 3) == 3 * region.block_size == huge_bytes(region)


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOMEM, errno.EBUSY])
@pytest.mark.parametrize("nth", [1, 3])
def test_a_huge_page_that_is_not_there_is_no_error(
    code: int, nth: int, inject: Injector, madvise_mode: None, huge: int
) -> None:
    with Region("1G", block_size=huge) as region:
        region.plug(0, 4)
        make_small(region, 0, 4, huge)
        inject.step(Step.COLLAPSE, errno=code, nth=nth)
        assert region.collapse(0, 4) == 3 * huge == huge_bytes(region)
        assert region.huge_runs() == (((1, 3),) if nth == 1 else ((0, 2), (3, 1)))
        assert region.audit().ok


def test_at_the_limit_of_a_control_group(
    memory_cgroup: Callable[..., MemoryCgroup], madvise_mode: None, huge: int
) -> None:
    """A collapse takes a huge page before it gives the small ones back; without one all stays as it is."""
    group = memory_cgroup()

    def child() -> tuple[int, bool]:
        with Region("1G", block_size=huge, headroom="off", backend=Memfd(strategy="populate_write")) as region:
            group.add()
            region.plug(0, 4)
            pattern = fill(region, 0, 4)
            group.set_limit(group.usage + huge // 2)
            done = region.collapse(0, 4)
            group.set_limit(None)
            return done, region.view(0, 4) == pattern

    assert run_child(child).result() == (0, True)


@pytest.mark.parametrize(
    ("backend", "block_size", "why"),
    [
        (Anonymous(), "64K", "blocks smaller than 2M"),
        (Anonymous(thp=False), "2M", "thp=False"),
        (Memfd(shared=False), "2M", "memfd or tmpfs private cannot be made huge"),
        (Secret(), "2M", "secret memory"),
        (Simulated(), "2M", "SimulatedMapping has no pages"),
    ],
    ids=str,
)
def test_what_cannot_be_collapsed(backend: Backend, block_size: str, why: str, huge: int) -> None:
    if huge != 2 << 20:
        pytest.skip("needs huge pages of 2 MiB")
    try:
        region = Region("4M", block_size=block_size, backend=backend)
    except UnsupportedError as error:
        pytest.skip(f"needs memfd_secret ({error})")
    with region:
        region.plug(0)
        with pytest.raises(UnsupportedError, match=why):
            region.collapse(0)


def test_hugetlb_and_disk_files_cannot_be_collapsed(huge_pool: Callable[[int], None], tmp_path: Path) -> None:
    huge_pool(1)
    with Region("64M", block_size="2M", backend=Memfd(hugetlb="2M")) as region:
        region.plug(0)
        with pytest.raises(UnsupportedError, match="huge already"):
            region.collapse(0)
    need_disk(tmp_path)
    with Region("64M", backend=File(tmp_path / "file")) as region:
        region.plug(0)
        with pytest.raises(UnsupportedError, match="disk file shared cannot be made huge"):
            region.collapse(0)


@pytest.mark.parametrize("code", ["EINVAL", "ENOSYS", "EPERM"])
@pytest.mark.parametrize("backend", [Anonymous(), Memfd()], ids=str)
def test_a_kernel_that_does_not_collapse(code: str, backend: Backend, inject: Injector) -> None:
    inject.call(
        "madvise", errno=getattr(errno, code), repeat=9, when=lambda _a, _l, advice: advice == lib.MADV_COLLAPSE
    )
    with Region("64M", backend=backend) as region:
        region.plug(0)
        with pytest.raises(UnsupportedError, match="MADV_COLLAPSE does not work here"):
            region.collapse(0)


@pytest.mark.parametrize("code", ["EAGAIN", "ENOMEM", "EBUSY"])
def test_a_probe_that_finds_no_huge_page_proves_nothing(code: str, inject: Injector) -> None:
    inject.call("madvise", errno=getattr(errno, code), when=lambda _a, _l, advice: advice == lib.MADV_COLLAPSE)
    with Region("64M") as region:
        region.plug(0)
        assert region.collapse(0) == region.block_size


def test_a_process_without_thp_says_so() -> None:
    def child() -> str:
        ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
        calls.kernel = calls.Kernel()  # what was tried before does not hold here
        with Region("64M") as region:
            region.plug(0)
            with pytest.raises(UnsupportedError) as caught:
                region.collapse(0)
            return str(caught.value)

    assert "PR_SET_THP_DISABLE" in run_child(child).result()


# ---- a warning before a split -----------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", COLLAPSING, ids=str)
def test_a_discard_that_splits_a_huge_page_warns_first(
    mode: str, backend: Backend, thp_mode: Callable[[str], None], huge: int
) -> None:
    thp_mode(mode)
    with Region("1G", block_size=4 * huge, backend=backend) as region:
        region.plug(0, 2)
        region.collapse(0, 2)
        fill(region, 0, 2)
        size = region.page_size
        for offset, length, split in (
            (size, size, 0),
            (0, huge - size, 0),
            (2 * huge - size, 2 * size, huge),
            (huge, 2 * huge + size, 3 * huge),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with pytest.raises(HugePageSplitWarning, match=f"at offset {split}:"):
                    region.discard(offset, length)
            assert huge_bytes(region) == 8 * huge, "nothing was changed"
            assert region.audit().discarded_size == 0
            with region.view(0, 2) as view:
                assert any(view[offset : offset + size])
        with pytest.warns(HugePageSplitWarning) as caught:
            region.discard(size, size)
        assert [warning.filename for warning in caught] == [__file__], "it points at the caller"
        assert issubclass(HugePageSplitWarning, RuntimeWarning)
        assert region.audit().discarded_size == size
        assert region.huge_runs() == ((1, 1),)
        region.discard(4 * size, size)  # it is split already
        region.discard(huge, 3 * huge)  # whole ones
        region.discard(4 * huge, 4 * huge)


@pytest.mark.parametrize("backend", [Anonymous(), Memfd(), Memfd(shared=False), Simulated()], ids=str)
@pytest.mark.parametrize("block_size", ["64K", "2M"])
def test_what_is_not_huge_is_discarded_without_a_word(
    backend: Backend, block_size: str, thp_mode: Callable[[str], None]
) -> None:
    thp_mode("never")
    if backend == Memfd():
        backend = Memfd(strategy="populate_write")
    with Region("64M", block_size=block_size, backend=backend) as region:
        region.plug(0, 2)
        region.discard(4096, 4096)
        assert region.audit().discarded_size == 4096


def test_what_is_refused_is_not_warned_of(madvise_mode: None) -> None:
    region = Region("64M")
    region.plug(0)
    with pytest.raises(BlockRangeError):
        region.discard(1, 4096)
    with pytest.raises(BlockRangeError):
        region.discard(0, 1 << 30)
    with pytest.raises(BlockStateError):
        region.discard(3 * region.block_size + 4096, 4096)
    region.close()
    with pytest.raises(RegionClosedError):
        region.discard(4096, 4096)
