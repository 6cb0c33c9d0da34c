"""Transparent huge pages: on where they fit, off where they would take a block's neighbours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sparsemem import Anonymous, File, Memfd, Region
from sparsemem.backends import Backend
from tests.support import accounting
from tests.support.kinds import private_bytes
from tests.support.resources import THP_ENABLED

HUGE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")

pytestmark = [
    pytest.mark.skipif(not HUGE.exists(), reason="needs a kernel with transparent huge pages"),
    pytest.mark.promise("huge-pages-stay-exact"),
]


@pytest.fixture
def huge() -> int:
    return int(HUGE.read_text())


def mode(thp_mode: Callable[[str], None], name: str) -> None:
    if f"[{name}]" not in THP_ENABLED.read_text():
        thp_mode(name)


@pytest.mark.parametrize("name", ["never", "madvise", "always"])
def test_small_blocks_take_exactly_their_size(name: str, thp_mode: Callable[[str], None]) -> None:
    mode(thp_mode, name)
    with Region("1G", block_size=4096) as region:
        region.plug(5)
        assert private_bytes(region) == 4096
        region.plug_runs([(i * 2 + 100, 1) for i in range(100)])
        assert private_bytes(region) == 101 * 4096
        assert accounting.smaps(region.address, region.size)["AnonHugePages"] == 0
        assert region.audit().ok


@pytest.mark.parametrize("name", ["never", "madvise", "always"])
@pytest.mark.parametrize("thp", [None, True, False])
def test_large_blocks_are_huge_where_the_mode_allows(
    name: str, thp: bool | None, thp_mode: Callable[[str], None], huge: int
) -> None:
    mode(thp_mode, name)
    with Region("1G", backend=Anonymous(thp=thp)) as region:
        assert region.block_size >= huge
        assert region.address % (huge if thp is not False else 4096) == 0
        region.plug(3, 4)
        size = 4 * region.block_size
        assert private_bytes(region) == size
        expected = 0 if name == "never" or thp is False else size
        assert accounting.smaps(region.address, region.size)["AnonHugePages"] == expected
        region.unplug(4)
        assert private_bytes(region) == size - region.block_size
        assert region.audit().ok


def exact(backend: Backend, block_size: str, used: Callable[[Region], int]) -> None:
    """A block takes its own size and no more, and gives it back, whatever is huge around it."""
    with Region("1G", block_size=block_size, backend=backend, headroom="off") as region:
        block = region.block_size
        region.plug(1)
        assert used(region) == block
        with region.view(1) as view:
            view[:] = b"x" * block
        region.plug_runs([(0, 1), (2, 1)])
        region.unplug(1)
        assert used(region) == 2 * block
        region.plug(1)
        with region.view(1) as view:
            assert not any(view[::512])
        assert region.audit().ok
        region.unplug_all()
        assert used(region) == 0
        assert region.audit().ok


def in_file_and_private(region: Region) -> int:
    shared = accounting.vmas(region.address, 1)[0].permissions.endswith("s")
    return accounting.allocated_bytes(region.fileno()) + (0 if shared else private_bytes(region))


@pytest.mark.parametrize("name", ["never", "advise", "within_size", "always", "force", "deny"])
@pytest.mark.parametrize("block_size", ["64K", "2M"])
@pytest.mark.parametrize("strategy", ["populate_write", "futex"])
def test_shared_memory_is_exact_in_every_mode(
    name: str, block_size: str, strategy: str, shmem_thp_mode: Callable[[str], None]
) -> None:
    shmem_thp_mode(name)
    exact(Memfd(strategy=strategy), block_size, in_file_and_private)
    exact(Memfd(shared=False, strategy=strategy), block_size, in_file_and_private)
    exact(
        Anonymous(shared=True, strategy=strategy),
        block_size,
        lambda region: accounting.smaps(region.address, region.size)["Rss"],
    )


@pytest.mark.parametrize("how", ["never", "advise", "within_size", "always"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("strategy", ["populate_write", "futex"])
def test_a_tmpfs_with_huge_pages_is_exact(
    how: str, shared: bool, strategy: str, tmpfs_mount: Callable[..., Path]
) -> None:
    folder = tmpfs_mount("256M", huge=how)
    for block_size in ("64K", "2M"):
        backend = File(folder / block_size, shared=shared, strategy=strategy)
        exact(backend, block_size, in_file_and_private)


def test_a_mapping_that_the_kernel_places_badly_is_moved(huge: int) -> None:
    """An odd number of pages is not what the kernel aligns by itself."""
    regions = [Region(2 << 20, backend=backend) for backend in (Anonymous(), Memfd(), Anonymous(), Memfd()) * 8]
    try:
        assert all(region.address % huge == 0 for region in regions)
        assert len({region.address for region in regions}) == len(regions)
    finally:
        for region in regions:
            region.close()


def test_the_default_block_is_at_least_a_huge_page(huge: int) -> None:
    with Region("1G") as region:
        assert region.block_size == max(2 << 20, huge)


def test_thp_makes_no_sense_on_huge_pages(huge_pool: Callable[[int], None]) -> None:
    with pytest.raises(ValueError, match="page size is fixed"):
        Region("1G", backend=Memfd(hugetlb="2M", thp=True))


@pytest.mark.parametrize("mode", ["never", "advise", "within_size", "always", "force"])
def test_shared_memory_reads_zero_whatever_the_machine_makes_huge(
    mode: str, shmem_thp_mode: Callable[[object], None]
) -> None:
    """As with a tmpfs mounted huge=: see test_tmpfs."""
    shmem_thp_mode(mode)
    for backend in (Memfd(), Anonymous(shared=True)):
        with Region("256M", block_size="2M", backend=backend) as region:
            for _ in range(2):
                region.plug(0, 16)
                with region.view(0, 16) as view:
                    assert view == bytes(32 << 20)
                    view[:] = b"secret00" * (4 << 20)
                assert region.audit().ok
                region.unplug(0, 16)
