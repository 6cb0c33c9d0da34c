"""What can still be given, and which limit binds; refused up front where running out means being killed."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from sparsemem import BackendExhaustedError, Cause, Memfd, Region, Simulated
from sparsemem import headroom as headroom_module
from sparsemem._sys.files import KernelFiles, group_limits, huge_group_limits, huge_pool
from sparsemem.backends import Limit
from sparsemem.headroom import Gauge, read
from tests.support import accounting
from tests.support.children import run_child

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
        assert region.plugged_size == 0


def test_a_control_groups_limit_is_refused_up_front_and_nobody_is_killed(memory_cgroup: Any) -> None:
    group = memory_cgroup(96 * MIB)

    def child() -> Cause:
        group.add()
        with Region("1G") as region:
            room = region.headroom()
            assert room.binding is not None
            assert room.binding.cause is Cause.MEMORY_CGROUP
            assert 0 < room.available <= 96 * MIB  # type: ignore[operator]
            with pytest.raises(BackendExhaustedError) as caught:
                region.plug(0, 128)
            assert region.plug(0, 8) == 8
            return caught.value.cause

    assert run_child(child).result() is Cause.MEMORY_CGROUP


def test_without_looking_the_kernel_kills(memory_cgroup: Any) -> None:
    if Path("/proc/sys/vm/panic_on_oom").read_text().strip() == "2":
        pytest.skip("needs a machine that does not panic when a control group runs out (vm.panic_on_oom)")
    group = memory_cgroup(64 * MIB)

    def child() -> None:
        Path("/proc/self/oom_score_adj").write_text("1000")
        group.add()
        with Region("1G", headroom="off") as region:
            region.plug(0, 128)

    outcome = run_child(child)
    assert outcome.signal is not None
    assert outcome.signal.name == "SIGKILL"


def test_the_pool_of_huge_pages_binds(huge_pool: Any) -> None:
    huge_pool(4)
    with Region("1T", backend=Memfd(hugetlb="2M")) as region:
        room = region.headroom()
        assert room.binding is not None
        assert room.binding.cause is Cause.HUGETLB_POOL
        assert room.available == accounting.huge_pool().available * 2 * MIB
        with pytest.raises(BackendExhaustedError, match="refused up front"):
            region.plug(0, room.available // (2 * MIB) + 1)  # type: ignore[operator]


def tree(root: Path, files: dict[str, str]) -> KernelFiles:
    for name, content in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return KernelFiles(str(root))


V2 = {
    "/proc/self/cgroup": "0::/user/job\n",
    "/proc/self/mountinfo": "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
    "/sys/fs/cgroup/user/job/memory.max": "max\n",
    "/sys/fs/cgroup/user/memory.max": f"{100 * MIB}\n",
    "/sys/fs/cgroup/user/memory.current": f"{90 * MIB}\n",
    "/sys/fs/cgroup/user/memory.stat": f"anon 5\ninactive_file {20 * MIB}\n",
    "/sys/fs/cgroup/user/job/hugetlb.2MB.max": f"{8 * MIB}\n",
    "/sys/fs/cgroup/user/job/hugetlb.2MB.current": f"{2 * MIB}\n",
}


def test_version_2_looks_at_every_ancestor(tmp_path: Path) -> None:
    files = tree(tmp_path, V2)
    (limit,) = group_limits(files)
    assert limit.group == "/sys/fs/cgroup/user"
    assert limit.available == 30 * MIB  # what is left, and page cache that nobody uses
    (huge,) = huge_group_limits(files, 2 * MIB)
    assert huge.available == 6 * MIB
    assert not huge_group_limits(files, 1 << 30)
    files.close()


def test_version_2_in_a_container_whose_path_lies_outside(tmp_path: Path) -> None:
    files = tree(
        tmp_path,
        {
            "/proc/self/cgroup": "0::/../../elsewhere\n",
            "/proc/self/mountinfo": "30 24 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            "/sys/fs/cgroup/memory.max": f"{64 * MIB}\n",
            "/sys/fs/cgroup/memory.current": "0\n",
        },
    )
    assert [limit.available for limit in group_limits(files)] == [64 * MIB]
    files.close()


def test_version_1_and_a_move_to_another_group(tmp_path: Path) -> None:
    memory = "/sys/fs/cgroup/memory"
    files = tree(
        tmp_path,
        {
            "/proc/self/cgroup": "4:memory:/a/b\n3:cpu,cpuacct:/x\n0::/\n",
            "/proc/self/mountinfo": f"31 24 0:27 / {memory} rw - cgroup cgroup rw,memory\n",
            f"{memory}/a/b/memory.limit_in_bytes": f"{50 * MIB}\n",
            f"{memory}/a/b/memory.usage_in_bytes": f"{10 * MIB}\n",
            f"{memory}/a/b/memory.stat": f"total_inactive_file {MIB}\n",
            f"{memory}/a/memory.limit_in_bytes": "9223372036854771712\n",
            f"{memory}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{memory}/c/memory.limit_in_bytes": f"{7 * MIB}\n",
            f"{memory}/c/memory.usage_in_bytes": "0\n",
        },
    )
    assert [(limit.group, limit.available) for limit in group_limits(files)] == [(f"{memory}/a/b", 41 * MIB)]
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/c\n")
    assert [limit.available for limit in group_limits(files)] == [7 * MIB]
    files.close()


def test_reserved_and_surplus_huge_pages_are_counted_right(tmp_path: Path) -> None:
    pool = "/sys/kernel/mm/hugepages/hugepages-2048kB"
    names = ("nr_hugepages", "free_hugepages", "resv_hugepages", "surplus_hugepages", "nr_overcommit_hugepages")
    values = (10, 6, 2, 1, 4)
    files = tree(tmp_path, {f"{pool}/{name}": f"{value}\n" for name, value in zip(names, values, strict=True)})
    found = huge_pool(files, 2 * MIB)
    assert found is not None
    assert found.available == (6 - 2) + (4 - 1)
    files.close()


def test_a_machine_without_any_of_it_has_no_limit(tmp_path: Path) -> None:
    files = KernelFiles(str(tmp_path))
    assert group_limits(files) == []
    assert huge_pool(files, 2 * MIB) is None
    assert read([]).available is None


def test_a_reading_is_a_budget_that_is_read_again_when_half_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    now, readings, room = [100.0], [0], [100]
    monkeypatch.setattr(headroom_module.time, "monotonic", lambda: now[0])

    def limits() -> list[Limit]:
        readings[0] += 1
        return [Limit(Cause.CAPACITY, room[0], "test", errno.ENOSPC)]

    gauge = Gauge(limits, "check")
    for _ in range(5):
        gauge.spend(10)
    assert readings == [1]
    gauge.spend(10)
    assert readings == [2], "half was spent"
    now[0] += 0.2
    gauge.spend(1)
    assert readings == [3], "the reading was old"
    room[0] = 5
    with pytest.raises(BackendExhaustedError, match="5 that are left"):
        gauge.spend(95)
    assert readings == [4], "it looks again before it refuses"
    Gauge(limits, "off").spend(10**9)
    assert readings == [4]


def test_a_simulated_capacity_is_a_limit_like_any_other() -> None:
    with Region("1P", backend=Simulated(capacity="8M")) as region:
        assert region.headroom().available == 8 * MIB
        with pytest.raises(BackendExhaustedError, match="refused up front") as caught:
            region.plug(0, 5)
        assert caught.value.cause is Cause.CAPACITY
        region.plug(0, 4)
        assert region.headroom().available == 0
