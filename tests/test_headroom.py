"""What can still be given, and which limit binds; refused up front where running out means being killed.

Layouts of control groups that this machine does not have are in test_headroom_files.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparsemem import Anonymous, BackendExhaustedError, Cause, File, Memfd, Region, Simulated
from sparsemem import headroom as headroom_module
from sparsemem.backends import Backend, Limit
from sparsemem.headroom import Gauge, read
from tests.support import accounting
from tests.support.children import run_child

pytestmark = pytest.mark.promise("headroom-refuses-first")

MIB = 1 << 20


def test_memory_of_the_machine_is_always_a_limit() -> None:
    with Region("1T") as region:
        room = region.headroom()
        assert any(limit.cause is Cause.SYSTEM_MEMORY for limit in room.limits)
        assert room.limits == tuple(sorted(room.limits, key=lambda limit: limit.available))
        assert room.binding is room.limits[0]
        assert room.available == room.binding.available
        with pytest.raises(BackendExhaustedError, match="refused up front") as caught:
            region.plug(0, region.nblocks)
        assert caught.value.cause in (Cause.SYSTEM_MEMORY, Cause.MEMORY_CGROUP)
        assert caught.value.populated == 0
        assert region.plugged_size == 0


# ---- control groups ----------------------------------------------------------------


def test_a_control_groups_limit_is_refused_up_front_and_nobody_is_killed(memory_cgroup: Any) -> None:
    group = memory_cgroup(64 * MIB)

    def child() -> tuple[Cause, int]:
        group.add()
        with Region("1G") as region:
            room = region.headroom()
            assert room.binding is not None
            assert room.binding.cause is Cause.MEMORY_CGROUP
            assert room.binding.source == str(group.path)
            assert room.available is not None
            assert 0 < room.available <= 64 * MIB
            with pytest.raises(BackendExhaustedError, match="refused up front") as caught:
                region.plug(0, 64)
            charged = group.usage
            assert region.plug(0, 8) == 8
            return caught.value.cause, charged

    cause, charged = run_child(child).result()
    assert cause is Cause.MEMORY_CGROUP
    assert charged < 32 * MIB, "nothing of the 128 MiB was tried"


def test_without_looking_the_kernel_kills(memory_cgroup: Any) -> None:
    if Path("/proc/sys/vm/panic_on_oom").read_text().strip() == "2":
        pytest.skip("needs a machine that does not panic when a control group runs out (vm.panic_on_oom)")
    group = memory_cgroup(64 * MIB)

    def child() -> None:
        Path("/proc/self/oom_score_adj").write_text("1000")
        group.add()
        with Region("1G", headroom="off") as region:
            region.plug(0, 64)

    outcome = run_child(child)
    assert outcome.signal is not None
    assert outcome.signal.name == "SIGKILL"


@pytest.mark.parametrize("backend", [Anonymous(), Memfd(), Memfd(shared=False)], ids=str)
@pytest.mark.parametrize("block_size", ["4K", "2M"])
def test_filling_a_control_group_block_by_block_ends_in_an_error(
    memory_cgroup: Any, backend: Backend, block_size: str
) -> None:
    """The last byte is not given: page tables and the process itself are charged to the group as well."""
    if Path("/proc/sys/vm/panic_on_oom").read_text().strip() == "2":
        pytest.skip("needs a machine that does not panic when a control group runs out (vm.panic_on_oom)")
    group = memory_cgroup(32 * MIB)

    def child() -> tuple[Cause, int]:
        Path("/proc/self/oom_score_adj").write_text("1000")
        group.add()
        with Region("1G", block_size=block_size, backend=backend) as region:
            with pytest.raises(BackendExhaustedError) as caught:
                for block in range(region.nblocks):
                    region.plug(block)
            return caught.value.cause, region.plugged_size

    cause, plugged = run_child(child).result()
    assert cause is Cause.MEMORY_CGROUP
    assert 16 * MIB < plugged < 32 * MIB


def test_a_limit_that_comes_with_a_move_is_seen_by_a_region_that_was_there_before(memory_cgroup: Any) -> None:
    group = memory_cgroup(64 * MIB)

    def child() -> bool:
        with Region("1G") as region:
            before = [limit.source for limit in region.headroom().limits]
            group.add()
            binding = region.headroom().binding
            assert binding is not None
            return str(group.path) not in before and binding.source == str(group.path)

    assert run_child(child).result() is True


def test_the_tightest_of_all_ancestors_binds(memory_cgroup: Any) -> None:
    group = memory_cgroup(48 * MIB)
    if group.version == 2:
        (group.path / "cgroup.subtree_control").write_text("+memory")
    inner = group.path / "inner"
    inner.mkdir()
    limit = inner / ("memory.limit_in_bytes" if group.version == 1 else "memory.max")
    limit.write_text(str(512 * MIB))

    def child() -> list[tuple[str, int]]:
        (inner / "cgroup.procs").write_text(str(os.getpid()))
        with Region("1G") as region:
            found = {limit.source: limit.available for limit in region.headroom().limits}
            assert region.headroom().binding.source == str(group.path)  # type: ignore[union-attr]
            return [(source, found[source]) for source in (str(group.path), str(inner))]

    try:
        (_, outside), (_, inside) = run_child(child).result()
    finally:
        inner.rmdir()
    assert outside <= 48 * MIB < inside <= 512 * MIB


# ---- huge pages -----------------------------------------------------------------------


def test_the_pool_of_huge_pages_binds(huge_pool: Any) -> None:
    huge_pool(4)
    with Region("1T", backend=Memfd(hugetlb="2M")) as region:
        room = region.headroom()
        assert room.binding is not None
        assert room.binding.cause is Cause.HUGETLB_POOL
        pool = accounting.huge_pool()
        may_be_made = max(0, pool.overcommit - pool.surplus)
        assert room.available == (pool.available + may_be_made) * 2 * MIB
        with pytest.raises(BackendExhaustedError, match="refused up front"):
            region.plug(0, room.available // (2 * MIB) + 1)
        region.plug(0, 2)
        assert region.headroom().available == room.available - 4 * MIB
        assert accounting.allocated_bytes(region.fileno()) == 4 * MIB


@pytest.mark.parametrize("backend", [Memfd(hugetlb="2M"), Anonymous(hugetlb="2M")], ids=str)
def test_a_control_groups_limit_on_huge_pages(
    huge_pool: Any, hugetlb_cgroup: Callable[[int], Path], backend: Backend
) -> None:
    huge_pool(6)
    group = hugetlb_cgroup(4 * MIB)

    def child() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        with Region("64M", block_size="2M", backend=backend) as region:
            binding = region.headroom().binding
            assert binding is not None
            assert (binding.cause, binding.source, binding.available) == (Cause.HUGETLB_CGROUP, str(group), 4 * MIB)
            with pytest.raises(BackendExhaustedError, match="refused up front") as caught:
                region.plug(0, 3)
            assert caught.value.cause is Cause.HUGETLB_CGROUP
            assert region.plug(0, 2) == 2
            assert region.headroom().available == 0
        with Region("64M", block_size="2M", backend=backend, headroom="off") as region:
            # Unlike the memory controller this one has an errno: the plug is rolled back.
            with pytest.raises(BackendExhaustedError) as caught:
                region.plug(0, 3)
            assert caught.value.cause is Cause.HUGETLB_CGROUP
            assert caught.value.rolled_back
            assert (group / "hugetlb.2MB.current").read_text() == "0\n"
            assert region.plug(0, 2) == 2

    run_child(child).result()


# ---- file systems ----------------------------------------------------------------------


def test_a_full_tmpfs_is_seen_coming(tmpfs_mount: Any) -> None:
    folder = tmpfs_mount("8M")
    with Region("1G", block_size="1M", backend=File(folder / "f")) as region:
        binding = region.headroom().binding
        assert binding is not None
        assert (binding.cause, binding.available) == (Cause.TMPFS_FULL, 8 * MIB)
        region.plug(0, 3)
        assert region.headroom().available == 5 * MIB
        with pytest.raises(BackendExhaustedError, match="5M that are left") as caught:
            region.plug(3, 6)
        assert (caught.value.cause, caught.value.errno) == (Cause.TMPFS_FULL, errno.ENOSPC)


def test_the_size_of_a_hugetlbfs_mount(huge_pool: Any, hugetlbfs_mount: Any) -> None:
    huge_pool(6)
    folder = hugetlbfs_mount(pages=4)
    with Region("64M", block_size="2M", backend=File(folder / "f")) as region:
        binding = region.headroom().binding
        assert binding is not None
        assert (binding.cause, binding.available) == (Cause.HUGETLBFS_SIZE, 8 * MIB)
        with pytest.raises(BackendExhaustedError, match="refused up front"):
            region.plug(0, 5)
        assert region.plug(0, 4) == 4


def test_the_blocks_of_a_disk(ext4_mount: Any) -> None:
    folder = ext4_mount()
    with Region("1G", block_size="1M", backend=File(folder / "f")) as region:
        (limit,) = region.headroom().limits
        about = os.statvfs(folder)
        assert (limit.cause, limit.available) == (Cause.FILESYSTEM_FULL, about.f_bavail * about.f_frsize)
        with pytest.raises(BackendExhaustedError, match="refused up front") as caught:
            region.plug(0, limit.available // MIB + 1)
        assert caught.value.cause is Cause.FILESYSTEM_FULL
        assert region.plug(0, 8) == 8


# ---- the gauge --------------------------------------------------------------------------


class Limits:
    """Limits that count how often they were read."""

    def __init__(self, *rooms: int) -> None:
        self.rooms = list(rooms)
        self.readings = 0

    def __call__(self) -> list[Limit]:
        self.readings += 1
        return [Limit(Cause.CAPACITY, room, f"limit {i}", errno.ENOSPC) for i, room in enumerate(self.rooms)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that a gauge sees."""
    now = [100.0]
    monkeypatch.setattr(headroom_module, "time", SimpleNamespace(monotonic_ns=lambda: int(now[0] * 1e9)))
    return now


def test_a_reading_is_a_budget_that_is_read_again_when_half_is_spent(clock: list[float]) -> None:
    limits = Limits(100)
    gauge = Gauge(limits, "check")
    for _ in range(5):
        gauge.spend(10)
    assert limits.readings == 1
    gauge.spend(10)
    assert limits.readings == 2
    assert clock == [100.0]


def test_a_reading_is_too_old_after_100_ms(clock: list[float]) -> None:
    limits = Limits(1 << 30)
    gauge = Gauge(limits, "check")
    gauge.spend(1)
    clock[0] += 0.09
    gauge.spend(1)
    assert limits.readings == 1
    clock[0] += 0.02
    gauge.spend(1)
    assert limits.readings == 2


def test_it_looks_again_before_it_refuses(clock: list[float]) -> None:
    limits = Limits(100)
    gauge = Gauge(limits, "check")
    gauge.spend(40)
    limits.rooms = [200]  # somebody gave memory back
    gauge.spend(150)
    limits.rooms = [50]
    with pytest.raises(BackendExhaustedError, match=r"51 is more than the 50 that are left .*limit 0") as caught:
        gauge.spend(51)
    assert (caught.value.cause, caught.value.errno) == (Cause.CAPACITY, errno.ENOSPC)
    gauge.spend(50)  # the refusal cost nothing


def test_a_reading_that_was_wrong_once_is_not_trusted_again(clock: list[float]) -> None:
    limits = Limits(1000)
    gauge = Gauge(limits, "check")
    gauge.spend(1)
    gauge.forget()
    gauge.spend(1)
    assert limits.readings == 2


def test_with_no_limit_it_looks_only_now_and_then(clock: list[float]) -> None:
    limits = Limits()
    gauge = Gauge(limits, "check")
    gauge.spend(1 << 50)
    gauge.spend(1 << 50)
    assert limits.readings == 1
    clock[0] += 0.2
    limits.rooms = [10]
    with pytest.raises(BackendExhaustedError):
        gauge.spend(11)


def test_off_never_looks() -> None:
    limits = Limits(0)
    Gauge(limits, "off").spend(1 << 60)
    assert limits.readings == 0


def test_the_binding_limit_is_the_tightest_and_is_named() -> None:
    room = read(Limits(30, 10, 20)())
    assert [limit.available for limit in room.limits] == [10, 20, 30]
    assert room.binding is not None
    assert room.binding.source == "limit 1"
    assert room.available == 10
    nothing = read([])
    assert (nothing.available, nothing.binding, nothing.limits) == (None, None, ())


def test_a_simulated_capacity_is_a_limit_like_any_other() -> None:
    with Region("1P", backend=Simulated(capacity="8M")) as region:
        assert region.headroom().available == 8 * MIB
        with pytest.raises(BackendExhaustedError, match="refused up front") as caught:
            region.plug(0, 5)
        assert caught.value.cause is Cause.CAPACITY
        region.plug(0, 4)
        assert region.headroom().available == 0


# ---- descriptors ---------------------------------------------------------------------------


def kernel_files_open() -> list[str]:
    return [path for path in accounting.open_descriptors().values() if path.startswith(("/proc/", "/sys/"))]


def test_what_it_reads_stays_open_until_the_last_region_closes() -> None:
    before = kernel_files_open()
    with Region("1G") as one:
        with Region("1G") as two:
            for region in (one, two):
                region.headroom()
            both = kernel_files_open()
            assert [path for path in both if path == "/proc/meminfo"] == ["/proc/meminfo"], "one for all regions"
        assert kernel_files_open() == both
    assert kernel_files_open() == before
