"""Guest-physical memory: translation, what backs it, and how it comes and goes."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemem import Anonymous, Memfd, Region, ReserveError, ViewsAliveError
from sparsemem.virtio import FileRange, GuestError, GuestMemory, GuestMemoryError, RegionRange
from tests.support import accounting

ROOT = Path(__file__).parent.parent.parent
PAGE = 4096
MIB = 1 << 20


@pytest.fixture
def ram() -> Iterator[int]:
    """A guest's memory as a VMM makes it: a memfd that nobody has touched."""
    fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 16 * MIB)
    yield fd
    os.close(fd)


def used(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_one_file_at_two_addresses_as_below_and_above_the_hole(ram: int) -> None:
    with GuestMemory([FileRange(0, 4 * MIB, ram), FileRange(1 << 32, 12 * MIB, ram, 4 * MIB)]) as memory:
        memory.write((1 << 32) + 5, b"hello")
        assert os.pread(ram, 5, 4 * MIB + 5) == b"hello"
        assert memory.read((1 << 32) + 5, 5) == b"hello"
        assert memory.size == 16 * MIB


def test_a_guests_memory_is_neither_populated_nor_looked_at_nor_resized(ram: int) -> None:
    os.pwrite(ram, b"guest", 3 * PAGE)
    before = used(ram)
    with GuestMemory([FileRange(0, 8 * MIB, ram, 8 * MIB), FileRange(1 << 32, 8 * MIB, ram)]):
        assert used(ram) == before == PAGE
    assert used(ram) == before
    assert os.pread(ram, 5, 3 * PAGE) == b"guest"
    assert os.fstat(ram).st_size == 16 * MIB


def test_a_read_or_write_may_cross_entries(ram: int) -> None:
    with GuestMemory([FileRange(0, MIB, ram, MIB), FileRange(MIB, MIB, ram)]) as memory:
        memory.write(MIB - 3, b"abcdef")
        assert os.pread(ram, 3, 2 * MIB - 3) == b"abc"
        assert os.pread(ram, 3, 0) == b"def"
        assert memory.read(MIB - 3, 6) == b"abcdef"


@pytest.mark.promise("guest-memory-is-the-limit")
@pytest.mark.parametrize(
    ("address", "length"),
    [(-1, 2), (MIB, 1), (MIB - 1, 2), (3 * MIB, 1), (0, 0), (0, -1), (2**64, 1), (2**64 - 1, 2), (0, 2**64)],
)
def test_what_is_not_all_in_the_table_is_refused_and_nothing_is_touched(ram: int, address: int, length: int) -> None:
    with GuestMemory([FileRange(0, MIB, ram), FileRange(2 * MIB, MIB, ram, MIB)]) as memory:
        for use in (memory.read, memory.discard, memory.view):
            with pytest.raises(GuestError):
                use(address, length)
        if 0 < length < 100:
            with pytest.raises(GuestError):
                memory.write(address, b"x" * length)
        assert used(ram) == 0


def test_a_discard_gives_whole_pages_back(ram: int) -> None:
    os.pwrite(ram, b"x" * 4 * PAGE, 0)
    with GuestMemory([FileRange(0, MIB, ram)]) as memory:
        assert memory.discard(PAGE // 2, 3 * PAGE) == 2 * PAGE
        assert memory.discard(1, PAGE - 1) == 0
        assert used(ram) == 2 * PAGE
        assert memory.read(0, 4 * PAGE) == b"x" * PAGE + bytes(2 * PAGE) + b"x" * PAGE


def test_a_discard_leaves_out_what_is_unplugged() -> None:
    with Region("8M", block_size=MIB, backend=Memfd()) as region:
        region.plug(0, 2)
        region.plug(4)
        memory = GuestMemory.of(region, 1 << 30)
        assert memory.discard((1 << 30) + MIB, 6 * MIB) == 2 * MIB
        assert list(region.plugged_runs()) == [(0, 2), (4, 1)]
        assert region.audit().ok


@pytest.mark.promise("guest-memory-is-the-limit")
def test_unplugged_memory_is_not_read_nor_written() -> None:
    """A read would allocate it, where the memory is shared."""
    with Region("8M", block_size=MIB, backend=Memfd()) as region:
        region.plug(0)
        with GuestMemory([RegionRange(0, 8 * MIB, region)]) as memory:
            for use in (lambda: memory.read(MIB - 4, 8), lambda: memory.view(2 * MIB, 4)):
                with pytest.raises(GuestError, match="unplugged"):
                    use()
            with pytest.raises(GuestError, match="unplugged"):
                memory.write(MIB - 4, b"12345678")
            assert region.audit().ok
            assert memory.read(MIB - 4, 4) == bytes(4)


@pytest.mark.promise("guest-memory-is-the-limit")
def test_a_write_is_refused_as_a_whole() -> None:
    with (
        Region("2M", block_size=MIB, backend=Memfd()) as low,
        Region("2M", block_size=MIB, backend=Memfd()) as high,
    ):
        low.plug(0, 2)
        with GuestMemory([RegionRange(0, 2 * MIB, low), RegionRange(2 * MIB, 2 * MIB, high)]) as memory:
            with pytest.raises(GuestError, match="unplugged"):
                memory.write(2 * MIB - 2, b"1234")
            assert memory.read(2 * MIB - 2, 2) == bytes(2)


def test_a_file_that_is_a_region_of_ours_becomes_that_region(ram: int) -> None:
    with Region("8M", block_size=MIB, backend=Memfd()) as region:
        region.plug(0)
        fd = os.dup(region.fileno())
        memory = GuestMemory([FileRange(1 << 33, 8 * MIB, fd), FileRange(0, MIB, ram)], regions=[region])
        os.close(fd)
        base, ours = memory.ranges
        assert ours.region is region
        assert (base.owned, ours.owned) == (True, False)
        memory.write(1 << 33, b"guest")
        assert bytes(region.view(0)[:5]) == b"guest"
        memory.close()
        assert not region.closed


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda fd: [FileRange(0, MIB, fd), FileRange(MIB - PAGE, MIB, fd)], "overlap"),
        (lambda fd: [FileRange(0, 17 * MIB, fd)], "with existing='trust' it is somebody else's"),
        (lambda fd: [FileRange(0, MIB, fd, 16 * MIB)], "existing='trust'"),
        (lambda fd: [FileRange(1, MIB, fd)], "not multiples of 4096"),
        (lambda fd: [FileRange(0, 0, fd)], "out of range"),
        (lambda fd: [FileRange(-PAGE, MIB, fd)], "out of range"),
        (lambda fd: [FileRange(0, MIB, fd, -PAGE)], "out of range"),
        (lambda fd: [FileRange(2**63 - PAGE, MIB, fd)], "out of range"),
        (lambda fd: [FileRange(0, PAGE, fd, 2**63 - PAGE), FileRange(PAGE, MIB, fd)], "."),
    ],
)
def test_a_table_that_does_not_fit_leaves_the_one_that_is_there(
    ram: int, make: Callable[[int], list[FileRange]], why: str
) -> None:
    with GuestMemory([FileRange(1 << 40, MIB, ram)]) as memory:
        before = memory.ranges
        descriptors = len(accounting.open_descriptors())
        with pytest.raises((ValueError, ReserveError), match=why):
            memory.replace(make(ram))
        assert memory.ranges is before
        assert len(accounting.open_descriptors()) == descriptors
        assert memory.read(1 << 40, 1) == b"\0"


def test_a_file_that_cannot_be_punched_or_is_none_is_refused(ram: int) -> None:
    read_only = os.open(f"/proc/self/fd/{ram}", os.O_RDONLY)
    pipe = os.pipe()
    for fd in (read_only, pipe[0]):
        with pytest.raises(ReserveError):
            GuestMemory([FileRange(0, MIB, fd)])
    for fd in (read_only, *pipe):
        os.close(fd)


def test_ranges_of_a_region_must_lie_in_it() -> None:
    with Region("2M", block_size=MIB) as region, pytest.raises(ValueError, match="more than the region has"):
        GuestMemory([RegionRange(0, 2 * MIB, region, PAGE)])


def test_entries_that_stay_are_not_mapped_anew(ram: int) -> None:
    low, high = FileRange(0, MIB, ram), FileRange(1 << 32, MIB, ram, MIB)
    with GuestMemory([low]) as memory:
        first = memory.ranges[0]
        memory.add(high)
        assert memory.ranges[0] is first
        second = memory.ranges[1]
        memory.replace([high, low])
        assert memory.ranges == (first, second)
        memory.remove(0, MIB)
        assert memory.ranges == (second,)
        assert (first.region.closed, second.region.closed) == (True, False)
        with pytest.raises(ValueError, match="no range"):
            memory.remove(0, MIB)


def test_everything_is_let_go_of_at_the_end(ram: int) -> None:
    GuestMemory([FileRange(0, MIB, ram)]).close()
    before = len(accounting.open_descriptors()), accounting.vma_count()
    for _ in range(30):
        with GuestMemory([FileRange(0, MIB, ram), FileRange(1 << 32, MIB, ram, MIB)]) as memory:
            memory.read(0, 1)
            memory.replace([FileRange(1 << 33, MIB, ram)])
    assert len(accounting.open_descriptors()) == before[0]
    assert accounting.vma_count() - before[1] < 30


def test_a_view_keeps_its_memory_when_the_table_changes(ram: int) -> None:
    memory = GuestMemory([FileRange(0, MIB, ram)])
    view = memory.view(0, PAGE)
    memory.replace([])
    view[:4] = b"ring"
    assert os.pread(ram, 4, 0) == b"ring"
    with pytest.raises(ViewsAliveError):
        memory.close()
    view.release()
    memory.close()


def test_a_view_does_not_cross_entries(ram: int) -> None:
    with (
        GuestMemory([FileRange(0, MIB, ram, MIB), FileRange(MIB, MIB, ram)]) as memory,
        pytest.raises(GuestError, match="not in one range"),
    ):
        memory.view(MIB - 2, 4)


@pytest.mark.promise("guest-memory-is-the-limit")
def test_a_file_that_is_truncated_underneath_is_an_error_and_no_sigbus(ram: int) -> None:
    with GuestMemory([FileRange(0, 16 * MIB, ram)]) as memory:
        os.ftruncate(ram, PAGE)
        with pytest.raises(GuestMemoryError, match="truncated underneath"):
            memory.read(MIB, 4)
        with pytest.raises(GuestMemoryError, match="Bad address"):
            memory.write(MIB, b"1234")
        assert memory.read(0, 4) == bytes(4)


@pytest.mark.parametrize("barred", [False, True])
def test_memory_is_copied_where_containers_bar_process_vm_readv_too(barred: bool) -> None:
    numbers = {"x86_64": (310, 311), "aarch64": (270, 271)}.get(platform.machine())
    if numbers is None:
        pytest.skip("needs the numbers of this architecture's calls")
    code = f"""
import os
from tests.test_old_kernel import bar
from sparsemem.virtio import FileRange, GuestMemory, GuestMemoryError
if {barred}:
    bar(*{numbers})
fd = os.memfd_create("ram")
os.ftruncate(fd, 1 << 20)
with GuestMemory([FileRange(0, 1 << 20, fd)]) as memory:
    memory.write(5, b"hello")
    assert os.pread(fd, 5, 5) == b"hello" == memory.read(5, 5)
    os.ftruncate(fd, 4096)
    for use in (lambda: memory.read(8192, 4), lambda: memory.write(8192, b"1234")):
        try:
            use()
        except GuestMemoryError as error:
            assert error.errno == 14, error
        else:
            raise AssertionError("it was no error")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_who_is_in_the_middle_of_something_goes_on_with_the_table_before(ram: int) -> None:
    with GuestMemory([FileRange(0, MIB, ram)]) as memory:
        memory.write(0, b"before")
        with memory.table() as table:
            memory.replace([])
            ((entry, offset, length),) = table.pieces(0, 6)
            assert bytes(entry.region.view(0)[offset : offset + length]) == b"before"
            assert not entry.region.closed
        assert entry.region.closed


@pytest.mark.promise("guest-memory-is-the-limit")
def test_tables_change_while_others_read(ram: int) -> None:
    tables = [[FileRange(0, MIB, ram)], [FileRange(0, MIB, ram, MIB)], [FileRange(0, 2 * MIB, ram)]]
    failed: list[BaseException] = []
    with GuestMemory(tables[0]) as memory:
        stop = threading.Event()

        def read() -> None:
            try:
                while not stop.is_set():
                    memory.read(0, 64)
                    memory.discard(0, PAGE)
            except BaseException as error:
                failed.append(error)

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        for i in range(60):
            memory.replace(tables[i % 3])
        stop.set()
        for reader in readers:
            reader.join(60)
    assert not failed


def test_a_disk_file_is_as_good(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "ram")
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 4 * MIB)
    with GuestMemory([FileRange(0, 4 * MIB, fd)]) as memory:
        memory.write(MIB, b"x" * MIB)
        os.fsync(fd)
        assert memory.discard(MIB, MIB) == MIB
        assert memory.read(MIB, 8) == bytes(8)
    os.close(fd)


def test_huge_pages_are_mapped_without_taking_any(huge_pool: Callable[[int], object]) -> None:
    huge_pool(2)
    with Region("4M", block_size="2M", backend=Memfd(hugetlb="2M")) as vmm:
        with GuestMemory(
            [FileRange(0, 2 * MIB, vmm.fileno()), FileRange(1 << 32, 2 * MIB, vmm.fileno(), 2 * MIB)]
        ) as m:
            assert used(vmm.fileno()) == 0
            m.write((1 << 32) + 7, b"x")
            assert used(vmm.fileno()) == 2 * MIB
            assert m.discard(1 << 32, MIB) == 0  # half a page
            assert m.discard(1 << 32, 2 * MIB) == 2 * MIB
            assert used(vmm.fileno()) == 0
        with pytest.raises(ValueError, match="not whole pages"):
            GuestMemory([FileRange(0, MIB, vmm.fileno())])


@given(
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=6),
    gaps=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    address=st.integers(0, 60 * PAGE),
    length=st.integers(1, 40 * PAGE),
)
def test_pieces_cover_exactly_what_was_asked_for(sizes: list[int], gaps: list[int], address: int, length: int) -> None:
    with Region(64 * PAGE, block_size=PAGE, backend=Anonymous()) as region:
        ranges, at, offset = [], 0, 0
        backed: dict[int, int] = {}
        for size, gap in zip(sizes, gaps, strict=False):
            at += gap * PAGE
            ranges.append(RegionRange(at, size * PAGE, region, offset))
            backed.update({(at // PAGE) + i: (offset // PAGE) + i for i in range(size)})
            at, offset = at + size * PAGE, offset + size * PAGE
        with GuestMemory(ranges) as memory, memory.table() as table:
            wanted = range(address // PAGE, (address + length - 1) // PAGE + 1)
            if all(page in backed for page in wanted):
                pieces = table.pieces(address, length)
                got = {page for _, at, n in pieces for page in range(at // PAGE, (at + n - 1) // PAGE + 1)}
                assert got == {backed[page] for page in wanted}
                assert sum(n for _, _, n in pieces) == length
            else:
                with pytest.raises(GuestError):
                    table.pieces(address, length)


@pytest.mark.promise(
    "guest-memory-is-the-limit", found="a memory table could name a range whose block map took for ever"
)
def test_a_range_that_would_need_too_large_a_map_is_refused_at_once() -> None:
    fd = os.memfd_create("sparse")
    try:
        os.ftruncate(fd, (1 << 62) + 4096)
        with GuestMemory() as memory:
            with pytest.raises(ValueError, match="more than 268435456 such blocks"):
                memory.replace([FileRange(0, (1 << 62) + 4096, fd, 0)])
            assert memory.ranges == ()
    finally:
        os.close(fd)
