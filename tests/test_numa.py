"""`numa_node=`: memory from one node, populated from near it, and refused where there is no such node."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from sparsemem import Anonymous, Cause, File, Memfd, Region, ReserveError, UnsupportedError, workers
from sparsemem._sys import calls, numa
from sparsemem._sys.files import KernelFiles
from sparsemem.backends import Backend, from_text
from sparsemem.backends import numa as backends_numa
from sparsemem.backends.diagnosis import Surroundings
from sparsemem.recipes import Kind
from tests.support import accounting
from tests.support.injector import Injector
from tests.support.kinds import need_disk

ONLINE = Path("/sys/devices/system/node/online")
MIB = 1 << 20

needs_numa = pytest.mark.skipif(not ONLINE.exists(), reason="needs a kernel with NUMA")
needs_two = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")


@pytest.fixture
def node() -> int:
    """The first node that is there: on many machines the only one."""
    return int(ONLINE.read_text().replace("-", ",").split(",")[0])


def policy(region: Region) -> tuple[str, int]:
    """What /proc/self/numa_maps calls the mapping's policy, and its pages on all nodes."""
    lines = (line.split() for line in Path("/proc/self/numa_maps").read_text().splitlines())
    ((words),) = [words for words in lines if int(words[0], 16) == region.address]
    return words[1], sum(int(word.split("=")[1]) for word in words if word[0] == "N" and word[1].isdigit())


# ---- memory from a node -----------------------------------------------------------------------


@needs_numa
@pytest.mark.parametrize("text", ["anonymous", "anonymous:shared", "memfd", "memfd:private", "memfd:strategy=futex"])
@pytest.mark.parametrize("block_size", ["64K", "2M"])
def test_all_of_the_mapping_is_bound(text: str, block_size: str, node: int) -> None:
    backend = attrs.evolve(from_text(text), numa_node=node)  # type: ignore[misc]  # those with nodes are attrs
    with Region("1G", block_size=block_size, backend=backend, plugged=[(9, 1)]) as region:
        region.plug(0, 4)
        bound, pages = policy(region)
        assert bound == f"bind:{node}"
        assert pages == 5 * region.block_size // accounting.PAGE_SIZE
        assert len(accounting.vmas(region.address, region.size)) == 1
        region.unplug(0, 4)
        assert region.audit().ok


@needs_numa
def test_without_it_no_policy_is_set() -> None:
    with Region("1G") as region:
        region.plug(0)
        assert policy(region)[0] == "default"


@needs_numa
def test_hugetlb_is_bound_too(huge_pool: Callable[[int], None], node: int) -> None:
    huge_pool(4)
    for backend in (Anonymous(hugetlb="2M", numa_node=node), Memfd(hugetlb="2M", numa_node=node)):
        with Region("1G", backend=backend) as region:
            region.plug(0, 2)
            assert policy(region)[0] == f"bind:{node}"
            limits = region.headroom().limits
            assert [limit.cause for limit in limits if limit.source.startswith(f"node{node}:")] == [Cause.HUGETLB_POOL]


@needs_numa
def test_files_and_adopted_ones(tmpfs_folder: Path, tmp_path: Path, node: int) -> None:
    with Region("64M", backend=File(tmpfs_folder / "file", numa_node=node)) as region:
        region.plug(0)
        assert policy(region)[0] == f"bind:{node}"
        with Region("64M", backend=Memfd(fd=region.fileno(), existing="adopt", numa_node=node)) as again:
            assert policy(again)[0] == f"bind:{node}"
            assert again.is_plugged(0)
    template = tmp_path / "template"
    template.write_bytes(b"data" * MIB)
    with Region("4M", block_size="64K", backend=File(template, shared=False, numa_node=node)) as region:
        region.plug(0)
        assert region.view(0)[:4] == b"data"
        assert policy(region)[0] == f"bind:{node}"


@needs_numa
def test_the_page_cache_of_a_disk_follows_no_policy(tmp_path: Path, node: int) -> None:
    need_disk(tmp_path)
    with pytest.raises(UnsupportedError, match="page cache"):
        Region("64M", backend=File(tmp_path / "file", numa_node=node))
    assert not (tmp_path / "file").exists()


# ---- what is said of it -----------------------------------------------------------------------


@needs_numa
@pytest.mark.parametrize("text", ["anonymous:numa_node=0", "memfd:private,numa_node=0", "file:/x,numa_node=0"])
def test_the_text_form_and_the_repr(text: str, node: int) -> None:
    text = text.replace("=0", f"={node}")
    backend = from_text(text)
    assert str(backend) == text
    assert from_text(str(backend)) == backend
    assert f"numa_node={node}" in repr(backend)
    if not text.startswith("file"):
        with Region("64M", backend=backend) as region:
            assert f"numa_node={node}" in repr(region)


@needs_numa
@pytest.mark.parametrize(
    ("make", "error", "names"),
    [
        (lambda: Anonymous(numa_node=1 << 20), ValueError, "numa_node 1048576 is not online: this machine has "),
        (lambda: Memfd(numa_node=-1), ValueError, "numa_node -1 is not online"),
        (lambda: File("x", numa_node=2**64), ValueError, "18446744073709551616"),
        (lambda: Anonymous(numa_node=True), TypeError, "numa_node must be an integer, not True"),
        (lambda: Anonymous(numa_node="0"), TypeError, "not '0'"),  # type: ignore[arg-type]
        (lambda: Anonymous(numa_node=0.0), TypeError, "not 0.0"),  # type: ignore[arg-type]
        (lambda: from_text("memfd:numa_node"), ValueError, "numa_node=True is not a number"),
        (lambda: from_text("memfd:numa_node=all"), ValueError, "'all' is not a number"),
        (lambda: from_text("memfd:numa_node=99999"), ValueError, "numa_node 99999"),
        (lambda: from_text("secret:numa_node=0"), ValueError, "no option 'numa_node'"),
    ],
)
def test_a_node_that_is_not_there(make: Callable[[], object], error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        make()


@needs_numa
def test_any_integer_will_do(node: int) -> None:
    with Region("64M", backend=Anonymous(numa_node=np.int64(node))) as region:  # type: ignore[arg-type]
        assert policy(region)[0] == f"bind:{node}"


def test_a_kernel_without_numa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends_numa, "shared_files", lambda: KernelFiles(str(tmp_path)))
    with pytest.raises(UnsupportedError, match="no NUMA"):
        Anonymous(numa_node=0)


# ---- failures ---------------------------------------------------------------------------------


@needs_numa
@pytest.mark.parametrize("code", ["EFAULT", "EINVAL", "EIO", "ENOMEM", "EPERM", "ENOSYS"])
@pytest.mark.parametrize("make", [Anonymous, Memfd])
def test_a_bind_that_fails_leaves_nothing_behind(
    code: str, make: Callable[..., Backend], inject: Injector, node: int
) -> None:
    backend = make(numa_node=node)
    before = accounting.open_descriptors(), accounting.vma_count()
    inject.call("bind", errno=getattr(errno, code))
    with pytest.raises(UnsupportedError if code == "ENOSYS" else ReserveError, match=f"node.{node}|no NUMA") as caught:
        Region("64M", backend=backend)
    assert getattr(caught.value, "errno", errno.ENOSYS) == getattr(errno, code)
    caught = None  # type: ignore[assignment]  # its traceback holds the half-made region
    assert accounting.open_descriptors() == before[0]
    assert abs(accounting.vma_count() - before[1]) <= 2
    Region("64M", backend=backend).close()


@needs_numa
def test_the_kernel_refuses_what_is_no_node() -> None:
    with Region("64M") as region:
        for node in (1023, 1024, (1 << 32) - 1):
            with pytest.raises(OSError, match="Invalid argument"):
                calls.kernel.bind(region.address, region.size, node)


# ---- a machine with several nodes, as it was written down -----------------------------------------


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[KernelFiles]:
    nodes = tmp_path / "sys/devices/system/node"
    nodes.mkdir(parents=True)
    (nodes / "online").write_text("0-1,3\n")
    for name, cpus, free in ((0, "0-3,8-11", 500), (1, "4-7,12", 300), (3, "", 100)):
        (nodes / f"node{name}/hugepages/hugepages-2048kB").mkdir(parents=True)
        (nodes / f"node{name}/cpulist").write_text(cpus + "\n")
        (nodes / f"node{name}/hugepages/hugepages-2048kB/free_hugepages").write_text(f"{name}\n")
        (nodes / f"node{name}/meminfo").write_text(
            f"\nNode {name} MemTotal:       1024000 kB\nNode {name} MemFree:       {free << 10} kB\n"
            f"Node {name} Inactive(file):  1024 kB\nNode {name} HugePages_Free:     3\n"
        )
    pool = tmp_path / "sys/kernel/mm/hugepages/hugepages-2048kB"
    pool.mkdir(parents=True)
    for file, count in (("nr", 4), ("free", 4), ("resv", 0), ("surplus", 0), ("nr_overcommit", 2)):
        (pool / f"{file}_hugepages").write_text(f"{count}\n")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemAvailable:    921600 kB\n")
    files = KernelFiles(str(tmp_path))
    yield files
    files.close()


def test_what_a_machine_tells(machine: KernelFiles) -> None:
    assert numa.online_nodes(machine) == [0, 1, 3]
    assert numa.processors(machine, 0) == {0, 1, 2, 3, 8, 9, 10, 11}
    assert numa.processors(machine, 3) == numa.processors(machine, 7) == frozenset()
    assert numa.available(machine, 1) == 301 * MIB
    assert numa.available(machine, 7) is None
    assert numa.free_huge_pages(machine, 3, 2 * MIB) == 6 * MIB
    assert numa.free_huge_pages(machine, 3, 1 << 30) is None


@pytest.mark.parametrize(("node", "left"), [(None, 900), (0, 501), (1, 301), (3, 101), (7, 900)])
def test_the_headroom_is_the_nodes(node: int | None, left: int, machine: KernelFiles) -> None:
    around = Surroundings(calls.kernel, machine, Kind.ANONYMOUS_PRIVATE, 4096, None, 1 << 30, node)
    tightest = min(around.limits(), key=lambda limit: limit.available)
    assert (tightest.cause, tightest.available) == (Cause.SYSTEM_MEMORY, left * MIB)
    assert (node is not None and f"node{node}/meminfo" in tightest.source) == (left != 900)


@pytest.mark.parametrize(("node", "pages"), [(None, 6), (1, 3), (3, 5)])
def test_the_headroom_of_huge_pages_is_the_nodes(node: int | None, pages: int, machine: KernelFiles) -> None:
    around = Surroundings(calls.kernel, machine, Kind.ANONYMOUS_HUGETLB, 2 * MIB, None, 1 << 30, node)
    limits = [limit for limit in around.limits() if limit.cause is Cause.HUGETLB_POOL]
    assert min(limit.available for limit in limits) == pages * 2 * MIB


@needs_numa
def test_the_headroom_of_this_machine(node: int) -> None:
    with Region("1G", backend=Memfd(numa_node=node)) as region:
        (limit,) = (limit for limit in region.headroom().limits if f"node{node}/meminfo" in limit.source)
        assert limit.cause is Cause.SYSTEM_MEMORY
        assert 0 < limit.available < 1 << 50


def test_a_list_may_be_anything(tmp_path: Path) -> None:
    path = tmp_path / "sys/devices/system/node"
    path.mkdir(parents=True)
    for text, expected in (("", []), ("\n", []), ("0\n", [0]), ("2-2\n", [2]), ("1,4-5,9\n", [1, 4, 5, 9])):
        (path / "online").write_text(text)
        assert numa.online_nodes(KernelFiles(str(tmp_path))) == expected


# ---- threads ----------------------------------------------------------------------------------


@needs_numa
@needs_two
def test_the_threads_work_on_the_nodes_processors(node: int) -> None:
    seen: list[tuple[int, frozenset[int]]] = []
    here = frozenset(os.sched_getaffinity(0))
    near = frozenset({max(here)})
    with Region("1G", block_size="64K", backend=Memfd(numa_node=node), threads=2) as region:
        mapping: Any = region._mapping
        assert mapping.processors & here
        real = mapping.advance

        def advance(*given: Any) -> int:
            seen.append((threading.get_ident(), frozenset(os.sched_getaffinity(0))))
            return int(real(*given))

        mapping.processors, mapping.advance = near, advance
        region.plug(0, 4096)
        assert {there for me, there in seen if me == threading.get_ident()} == {here}, "the caller's stays"
        assert {there for me, there in seen if me != threading.get_ident()} == {near}
        mapping.processors = frozenset({100_000})  # as far as this process may know, there is no such one
        seen.clear()
        region.unplug(0, 4096)
        assert {there for _, there in seen} == {here}, "put back, and left where it may be"


def in_thread(function: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


@needs_two
def test_a_thread_is_put_back_whatever_happens() -> None:
    here = os.sched_getaffinity(0)

    def fail() -> set[int]:
        with pytest.raises(LookupError), workers.placed(frozenset({min(here)})):
            assert os.sched_getaffinity(0) == {min(here)}
            raise LookupError
        return os.sched_getaffinity(0)

    assert in_thread(fail) == here == os.sched_getaffinity(0)


@pytest.mark.parametrize("cpus", [set(), {100_000}, None])
def test_a_node_without_processors_moves_nobody(cpus: set[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    here = os.sched_getaffinity(0)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: pytest.fail("was moved"))
    with workers.placed(frozenset(here if cpus is None else cpus)):
        assert os.sched_getaffinity(0) == here


@needs_two
def test_a_thread_that_may_not_be_moved_works_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "its cpuset has changed")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    with workers.placed(frozenset({min(os.sched_getaffinity(0))})):
        pass
