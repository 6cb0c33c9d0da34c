"""Limits as the kernel tells them, read from recorded trees: layouts that one machine does not have all of."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsemem import Cause
from sparsemem._sys import calls
from sparsemem._sys.files import KernelFiles, group_limits, huge_group_limits, huge_pool
from sparsemem.backends.diagnosis import Surroundings
from sparsemem.recipes import Kind

pytestmark = pytest.mark.promise("headroom-refuses-first")

MIB = 1 << 20
PAGE = 4096
UNLIMITED = 9223372036854771712  # how version 1 writes "no limit"


def tree(root: Path, files: dict[str, object]) -> KernelFiles:
    for name, content in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return KernelFiles(str(root))


def causes(files: KernelFiles, kind: Kind, page_size: int = PAGE) -> dict[Cause, int]:
    surroundings = Surroundings(calls.kernel, files, kind, page_size, None, 1 << 40)
    return {limit.cause: limit.available for limit in surroundings.limits()}


V2_MOUNT = "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
V2: dict[str, object] = {
    "/proc/self/cgroup": "0::/user/job",
    "/proc/self/mountinfo": V2_MOUNT,
    "/sys/fs/cgroup/user/job/memory.max": "max",
    "/sys/fs/cgroup/user/memory.max": 100 * MIB,
    "/sys/fs/cgroup/user/memory.current": 90 * MIB,
    "/sys/fs/cgroup/user/memory.stat": f"anon 5\ninactive_file {20 * MIB}\nactive_file {5 * MIB}",
    "/sys/fs/cgroup/user/job/hugetlb.2MB.max": 8 * MIB,
    "/sys/fs/cgroup/user/job/hugetlb.2MB.current": 2 * MIB,
}
MEMORY = "/sys/fs/cgroup/memory"
V1: dict[str, object] = {
    "/proc/self/cgroup": "4:memory:/a/b\n3:cpu,cpuacct:/x\n0::/",
    "/proc/self/mountinfo": f"31 24 0:27 / {MEMORY} rw - cgroup cgroup rw,memory",
    f"{MEMORY}/a/b/memory.limit_in_bytes": 50 * MIB,
    f"{MEMORY}/a/b/memory.usage_in_bytes": 10 * MIB,
    f"{MEMORY}/a/b/memory.stat": f"inactive_file 0\ntotal_inactive_file {MIB}",
    f"{MEMORY}/a/memory.limit_in_bytes": UNLIMITED,
    f"{MEMORY}/memory.limit_in_bytes": UNLIMITED,
    f"{MEMORY}/c/memory.limit_in_bytes": 7 * MIB,
    f"{MEMORY}/c/memory.usage_in_bytes": 0,
}


# ---- control groups ----------------------------------------------------------------


def test_version_2_looks_at_every_ancestor(tmp_path: Path) -> None:
    files = tree(tmp_path, V2)
    (limit,) = group_limits(files)
    assert limit.group == "/sys/fs/cgroup/user"
    assert limit.available == 30 * MIB  # what is left, and page cache that nobody uses
    (huge,) = huge_group_limits(files, 2 * MIB)
    assert huge.group == "/sys/fs/cgroup/user/job"
    assert huge.available == 6 * MIB
    assert not huge_group_limits(files, 1 << 30)


def test_several_limits_on_the_way_up_are_all_told(tmp_path: Path) -> None:
    job = {"/sys/fs/cgroup/user/job/memory.max": 40 * MIB, "/sys/fs/cgroup/user/job/memory.current": 0}
    files = tree(tmp_path, V2 | job)
    assert [(limit.group, limit.available) for limit in group_limits(files)] == [
        ("/sys/fs/cgroup/user/job", 40 * MIB),
        ("/sys/fs/cgroup/user", 30 * MIB),
    ]


def test_version_1_tells_page_cache_of_descendants_too(tmp_path: Path) -> None:
    files = tree(tmp_path, V1)
    assert [(limit.group, limit.available) for limit in group_limits(files)] == [(f"{MEMORY}/a/b", 41 * MIB)]


def test_each_controller_is_found_in_the_hierarchy_that_has_it(tmp_path: Path) -> None:
    """Memory on version 1 and huge pages on version 2, as systems with both have it."""
    v2 = "/sys/fs/cgroup/unified"
    hybrid = {
        "/proc/self/cgroup": "4:memory:/a/b\n0::/hot",
        "/proc/self/mountinfo": f"{V1['/proc/self/mountinfo']}\n32 24 0:28 / {v2} rw - cgroup2 cgroup2 rw",
        f"{v2}/hot/hugetlb.1GB.max": 3 << 30,
        f"{v2}/hot/hugetlb.1GB.current": 1 << 30,
    }
    files = tree(tmp_path, V1 | hybrid)
    assert [limit.available for limit in group_limits(files)] == [41 * MIB]
    assert [limit.available for limit in huge_group_limits(files, 1 << 30)] == [2 << 30]


@pytest.mark.parametrize("group", ["/../../elsewhere", "/docker/abc", "/somebody/else"])
def test_in_a_container_the_path_is_cut_off_at_the_mount(tmp_path: Path, group: str) -> None:
    """The mount shows one group of the host as its root; /proc/self/cgroup may still speak of the host's paths."""
    files = tree(
        tmp_path,
        {
            "/proc/self/cgroup": f"0::{group}",
            "/proc/self/mountinfo": "30 24 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
            "/sys/fs/cgroup/memory.max": 64 * MIB,
            "/sys/fs/cgroup/memory.current": 0,
        },
    )
    assert [limit.available for limit in group_limits(files)] == [64 * MIB]


def test_in_a_container_groups_below_the_mount_still_count(tmp_path: Path) -> None:
    files = tree(
        tmp_path,
        {
            "/proc/self/cgroup": "0::/docker/abc/inner",
            "/proc/self/mountinfo": "30 24 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
            "/sys/fs/cgroup/inner/memory.max": 9 * MIB,
            "/sys/fs/cgroup/memory.max": 64 * MIB,
        },
    )
    assert [limit.available for limit in group_limits(files)] == [9 * MIB, 64 * MIB]


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    files = tree(tmp_path, V2 | {"/sys/fs/cgroup/user/memory.current": 200 * MIB})
    assert [limit.available for limit in group_limits(files)] == [0]


def test_a_group_that_disappears_limits_no_more(tmp_path: Path) -> None:
    files = tree(tmp_path, V2)
    assert len(group_limits(files)) == 1
    (tmp_path / "sys/fs/cgroup/user/memory.max").unlink()
    files.close()  # an open descriptor of a removed group reads ENODEV, which a recorded file cannot
    assert group_limits(files) == []


def test_a_move_to_another_group_is_noticed(tmp_path: Path) -> None:
    files = tree(tmp_path, V1)
    assert [limit.available for limit in group_limits(files)] == [41 * MIB]
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/c\n")
    assert [limit.available for limit in group_limits(files)] == [7 * MIB]


def test_a_move_while_another_thread_looks_is_not_forgotten(tmp_path: Path) -> None:
    tree(tmp_path, V1)

    class Moving(KernelFiles):
        """Between one thread's two reads the process moves, and another thread looks."""

        moved = False

        def whole_text(self, path: str) -> str:
            if not self.moved:
                self.moved = True
                (tmp_path / "proc/self/cgroup").write_text("4:memory:/c\n")
                assert [limit.available for limit in group_limits(self)] == [7 * MIB]
            return super().whole_text(path)

    files = Moving(str(tmp_path))
    assert [limit.available for limit in group_limits(files)] == [41 * MIB], "true when it looked"
    assert [limit.available for limit in group_limits(files)] == [7 * MIB]


# ---- what counts for which kind of memory ------------------------------------------------

MACHINE: dict[str, object] = {
    "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 4000 kB\nSwapFree: 1000 kB\n"
    "CommitLimit: 3000 kB\nCommitted_AS: 1000 kB\nHugepagesize: 2048 kB",
    "/proc/sys/vm/overcommit_memory": 0,
}
POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB"
POOL_NAMES = ("nr_hugepages", "free_hugepages", "resv_hugepages", "surplus_hugepages", "nr_overcommit_hugepages")


def pool(*numbers: int) -> dict[str, object]:
    return {f"{POOL}/{name}": number for name, number in zip(POOL_NAMES, numbers, strict=True)}


def test_memory_is_what_is_available_and_swap(tmp_path: Path) -> None:
    assert causes(tree(tmp_path, MACHINE), Kind.ANONYMOUS_PRIVATE) == {Cause.SYSTEM_MEMORY: 5000 << 10}


def test_a_kernel_that_does_not_tell_what_is_available_sets_no_limit(tmp_path: Path) -> None:
    files = tree(tmp_path, {"/proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB"})
    assert causes(files, Kind.ANONYMOUS_PRIVATE) == {}


@pytest.mark.parametrize(
    ("kind", "charged"),
    [
        (Kind.ANONYMOUS_PRIVATE, False),
        (Kind.TEMPLATE, False),
        (Kind.DISK_PRIVATE, False),
        (Kind.ANONYMOUS_SHARED, True),
        (Kind.SHMEM_SHARED, True),
        (Kind.SHMEM_PRIVATE, True),
    ],
)
def test_strict_overcommit_limits_shared_memory_as_it_comes(tmp_path: Path, kind: Kind, charged: bool) -> None:
    """Private memory was charged when it was reserved."""
    files = tree(tmp_path, MACHINE | {"/proc/sys/vm/overcommit_memory": 2})
    assert causes(files, kind).get(Cause.OVERCOMMIT) == (2000 << 10 if charged else None)
    # What this process may not use up: user_reserve_kbytes, or 1/32 of its size if that is less.
    (tmp_path / "proc/sys/vm/user_reserve_kbytes").write_text("500\n")
    (tmp_path / "proc/self").mkdir(exist_ok=True)
    for pages, reserve in ((1 << 20, 500 << 10), (3200, 3200 * 4096 // 32)):
        (tmp_path / "proc/self/statm").write_text(f"{pages} 1 1 1 0 1 0\n")
        assert causes(files, kind).get(Cause.OVERCOMMIT) == ((2000 << 10) - reserve if charged else None)
    (tmp_path / "proc/meminfo").write_text("CommitLimit: 3000 kB\nCommitted_AS: 5000 kB\n")
    assert causes(files, kind).get(Cause.OVERCOMMIT) == (0 if charged else None)
    for mode in "01":
        (tmp_path / "proc/sys/vm/overcommit_memory").write_text(f"{mode}\n")
        assert Cause.OVERCOMMIT not in causes(files, kind)


def test_a_groups_limit_keeps_room_for_what_comes_with_the_pages(tmp_path: Path) -> None:
    """Page tables, a file's index and the process itself are charged too: the last byte would be an OOM kill."""
    files = tree(tmp_path, MACHINE | V2)
    left = {kind: causes(files, kind)[Cause.MEMORY_CGROUP] for kind in (Kind.ANONYMOUS_PRIVATE, Kind.SHMEM_PRIVATE)}
    assert left[Kind.SHMEM_PRIVATE] < left[Kind.ANONYMOUS_PRIVATE] < 30 * MIB - 30 * MIB // 512
    assert left[Kind.SHMEM_PRIVATE] > 26 * MIB
    (tmp_path / "sys/fs/cgroup/user/memory.current").write_text(f"{120 * MIB - PAGE}\n")
    assert causes(files, Kind.ANONYMOUS_PRIVATE)[Cause.MEMORY_CGROUP] == 0


def test_a_disk_files_pages_are_page_cache_and_limited_by_the_disk_alone(tmp_path: Path) -> None:
    assert causes(tree(tmp_path, MACHINE | V2), Kind.DISK_SHARED) == {}


def test_huge_pages_come_from_their_pool_and_not_from_free_memory(tmp_path: Path) -> None:
    files = tree(tmp_path, MACHINE | V2 | pool(10, 6, 2, 1, 4))
    expected = {Cause.HUGETLB_POOL: (4 + 3) * 2 * MIB, Cause.HUGETLB_CGROUP: 6 * MIB}
    assert causes(files, Kind.HUGETLB_SHARED, 2 * MIB) == expected
    assert causes(files, Kind.ANONYMOUS_HUGETLB, 2 * MIB) == expected


@pytest.mark.parametrize(
    ("numbers", "available"),
    [
        ((10, 10, 0, 0, 0), 10),
        ((10, 6, 2, 0, 0), 4),  # reserved pages are promised to others
        ((10, 0, 0, 0, 4), 4),  # pages that the kernel may still make
        ((14, 0, 0, 4, 4), 0),  # ... and has made
        ((12, 1, 0, 4, 2), 1),  # the limit was lowered since
    ],
)
def test_reserved_and_surplus_huge_pages_are_counted_right(
    tmp_path: Path, numbers: tuple[int, ...], available: int
) -> None:
    found = huge_pool(tree(tmp_path, pool(*numbers)), 2 * MIB)
    assert found is not None
    assert found.available == available


def test_a_machine_without_any_of_it_has_no_limit(tmp_path: Path) -> None:
    files = KernelFiles(str(tmp_path))
    assert group_limits(files) == []
    assert huge_group_limits(files, 2 * MIB) == []
    assert huge_pool(files, 2 * MIB) is None
    assert causes(files, Kind.SHMEM_SHARED) == {}
