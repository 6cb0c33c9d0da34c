"""Populate and discard of a large range, for each kind of mapping and each way to populate it.

Not for `Secret`: what it takes out of the kernel's own mapping of memory splits that
for good, and would slow whatever is measured afterwards.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import attrs
from attrs import frozen

from sparsemem._sys import files, lib, probe
from sparsemem.backends import Anonymous, File, Memfd, Tmpfs
from sparsemem.backends.base import Backend
from sparsemem.bench.cases.rivals import PRIVATE, Bare, collapsed, others, system_calls
from sparsemem.bench.lab import FAILURES, Lab, Watch, explain
from sparsemem.bench.model import TIMES, Case, Figures, Measure, Way
from sparsemem.errors import UnsupportedError
from sparsemem.recipes import STRATEGIES
from sparsemem.region import Region

_SMALL = 4 << 10
_LARGE = 2 << 20


@frozen(kw_only=True)
class Kind:
    """A kind of mapping: ours, and the same made by hand.

    Attributes:
        backend: Makes ours, given a folder for a file.
        block_size: Bytes of our blocks.
        bare: The mapping made by hand.
        folder: Makes such a folder.
        pool: Size of its huge pages, if it takes them from a pool.
        measures_memory: Whether the memory used is measured, too.
        collapses: Whether shared small pages can be made huge: then that is measured from C, too.
        brief: Whether only the best of ours and system calls are measured, since all else is
            as for another kind.
    """

    name: str
    title: str
    backend: Callable[[str], Backend]
    block_size: int
    bare: Bare
    folder: Callable[[], AbstractContextManager[str]] | None = None
    pool: int = 0
    measures_memory: bool = False
    collapses: bool = False
    brief: bool = False


@contextmanager
def _disk() -> Iterator[str]:
    """A folder on something that is not memory."""
    place = "/var/tmp"
    if probe.file_system(place) in (0, lib.TMPFS_MAGIC):
        raise UnsupportedError(f"{place} is not on a disk")
    with TemporaryDirectory(prefix="sparsemem-bench-", dir=place) as folder:
        yield folder


@contextmanager
def _own_tmpfs() -> Iterator[str]:
    """No folder; but a tmpfs of one's own can be had."""
    Region(_LARGE, block_size=_LARGE, backend=Tmpfs()).close()
    yield ""


@contextmanager
def _nowhere() -> Iterator[str]:
    yield ""


@contextmanager
def _memfd(folder: str, flags: int = 0) -> Iterator[int]:
    fd = os.memfd_create("peer", os.MFD_CLOEXEC | flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _disk_file(folder: str) -> Iterator[int]:
    with TemporaryFile(dir=folder) as file:
        yield file.fileno()


_HUGE = PRIVATE | lib.MAP_HUGETLB | 21 << lib.MAP_HUGE_SHIFT
_HUGE_FILE = lib.MFD_HUGETLB | 21 << lib.MAP_HUGE_SHIFT

KINDS = (
    Kind(
        name="anonymous-4k",
        title="private anonymous memory, 4 KiB blocks",
        backend=lambda folder: Anonymous(),
        block_size=_SMALL,
        bare=Bare(PRIVATE, discards=(lib.MADV_DONTNEED,), advice=lib.MADV_NOHUGEPAGE),
    ),
    Kind(
        name="anonymous-thp",
        title="private anonymous memory, 2 MiB blocks of transparent huge pages",
        backend=lambda folder: Anonymous(),
        block_size=_LARGE,
        bare=Bare(PRIVATE, discards=(lib.MADV_DONTNEED,), advice=lib.MADV_HUGEPAGE),
    ),
    Kind(
        name="anonymous-shared",
        title="shared anonymous memory, 2 MiB blocks",
        backend=lambda folder: Anonymous(shared=True),
        block_size=_LARGE,
        bare=Bare(mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, discards=(lib.MADV_REMOVE,), advice=lib.MADV_NOHUGEPAGE),
        collapses=True,
    ),
    Kind(
        name="memfd-4k",
        title="a shared memfd, 4 KiB blocks",
        backend=lambda folder: Memfd(),
        block_size=_SMALL,
        bare=Bare(mmap.MAP_SHARED, file=_memfd, advice=lib.MADV_NOHUGEPAGE),
    ),
    Kind(
        name="memfd-2m",
        title="a shared memfd, 2 MiB blocks",
        backend=lambda folder: Memfd(),
        block_size=_LARGE,
        bare=Bare(mmap.MAP_SHARED, file=_memfd, advice=lib.MADV_NOHUGEPAGE),
        collapses=True,
    ),
    Kind(
        name="memfd-private-4k",
        title="a private memfd, 4 KiB blocks",
        backend=lambda folder: Memfd(shared=False),
        block_size=_SMALL,
        bare=Bare(mmap.MAP_PRIVATE, file=_memfd, discards=(lib.MADV_DONTNEED,), advice=lib.MADV_NOHUGEPAGE),
        measures_memory=True,
    ),
    Kind(
        name="memfd-private-2m",
        title="a private memfd, 2 MiB blocks (small pages all the same)",
        backend=lambda folder: Memfd(shared=False),
        block_size=_LARGE,
        bare=Bare(mmap.MAP_PRIVATE, file=_memfd, discards=(lib.MADV_DONTNEED,), advice=lib.MADV_NOHUGEPAGE),
        measures_memory=True,
        brief=True,
    ),
    Kind(
        name="tmpfs-2m",
        title="a tmpfs of the region's own, mounted huge=always, 2 MiB blocks; the others have a plain memfd",
        backend=lambda folder: Tmpfs(),
        block_size=_LARGE,
        bare=Bare(mmap.MAP_SHARED, file=_memfd, advice=lib.MADV_NOHUGEPAGE),
        folder=_own_tmpfs,
        brief=True,
    ),
    Kind(
        name="hugetlb-anonymous",
        title="private anonymous memory of the 2 MiB huge page pool",
        backend=lambda folder: Anonymous(hugetlb="2M"),
        block_size=_LARGE,
        bare=Bare(_HUGE, page=_LARGE, discards=(lib.MADV_DONTNEED,)),
        pool=_LARGE,
    ),
    Kind(
        name="hugetlb-memfd",
        title="a shared memfd of the 2 MiB huge page pool",
        backend=lambda folder: Memfd(hugetlb="2M"),
        block_size=_LARGE,
        bare=Bare(mmap.MAP_SHARED, page=_LARGE, file=partial(_memfd, flags=_HUGE_FILE)),
        pool=_LARGE,
    ),
    Kind(
        name="disk",
        title="a shared file on a disk, 2 MiB blocks",
        backend=lambda folder: File(os.path.join(folder, "ours"), delete=True),
        block_size=_LARGE,
        bare=Bare(mmap.MAP_SHARED, file=_disk_file),
        folder=_disk,
    ),
)


def _case(kind: Kind) -> Case:
    measures = [Measure("populate", "C populate_write"), Measure("discard", "C populate_write")]
    if kind.measures_memory:
        measures.append(Measure("memory used", "C populate_write", TIMES))
    return Case(kind.name, kind.title, tuple(measures), partial(_ways, kind))


@contextmanager
def _ways(kind: Kind, lab: Lab) -> Iterator[list[Way]]:
    size = _size(kind, lab.scale.size)
    thorough = lab.scale.thorough and not kind.brief
    with (kind.folder or _nowhere)() as folder:
        bare = attrs.evolve(kind.bare, folder=folder, measures_memory=kind.measures_memory)
        ways = [
            *_ours(kind, lab, size, folder, STRATEGIES if thorough else STRATEGIES[:1]),
            *system_calls(lab, bare, size, kind.block_size, thorough=thorough),
        ]
        if kind.collapses:
            collapse = partial(collapsed, attrs.evolve(bare, advice=None), size)
            ways.append(lab.in_c("C collapse, then populate_write", collapse, memory=size))
        if bare.advice == lib.MADV_HUGEPAGE:
            small = attrs.evolve(bare, advice=lib.MADV_NOHUGEPAGE)
            ways += system_calls(lab, small, size, _SMALL, of=" of 4 KiB pages")
        yield [*ways, *others(lab, bare, size)] if thorough else ways


def _size(kind: Kind, size: int) -> int:
    """As much as asked for, or as the pool has."""
    if not kind.pool:
        return size
    pool = files.huge_pool(files.shared_files(), kind.pool)
    free = 0 if pool is None else pool.free * kind.pool
    if free < min(size, 32 << 20):
        raise UnsupportedError(f"the pool of huge pages has {free >> 20}M free: see /proc/sys/vm/nr_hugepages")
    return min(size, free)


def _ours(kind: Kind, lab: Lab, size: int, folder: str, strategies: Iterable[str]) -> Iterator[Way]:
    """Each strategy with one thread and with all."""
    memory, auto = 0 if kind.pool else size, ""
    for strategy in strategies:
        used, reason = _trial(partial(_region, kind, size, folder, strategy, 1))
        if strategy == "auto":
            auto = used
        elif used == auto:
            reason = "it is what auto takes"
        if reason:
            yield Way(f"sparsemem {strategy}", reason=reason)
            continue
        for name, threads, lacking in lab.threads():
            make = partial(_region, kind, size, folder, strategy, threads)
            yield Way(f"sparsemem {strategy}, {name}", partial(_plug_and_unplug, make, kind), lacking, memory)


def _region(kind: Kind, size: int, folder: str, strategy: str, threads: int) -> Region:
    backend: Any = attrs.evolve(kind.backend(folder), strategy=strategy)  # type: ignore[misc]
    return Region(size, block_size=kind.block_size, backend=backend, threads=threads)


def _trial(make: Callable[[], Region]) -> tuple[str, str]:
    """The strategy that such a region uses, or why there can be none."""
    try:
        with make() as region:
            return region.stats().strategy, ""
    except FAILURES as error:
        return "", explain(error)


def _plug_and_unplug(make: Callable[[], Region], kind: Kind) -> Figures:
    figures: dict[str, float] = {}
    with make() as region:
        watch = Watch()
        region.plug(0, region.nblocks)
        figures["populate"] = watch.lap()
        if kind.measures_memory:
            figures["memory used"] = kind.bare.used(region.address, region.fileno(), region.size)
            watch.lap()
        region.unplug(0, region.nblocks)
        figures["discard"] = watch.lap()
    return figures


CASES = tuple(_case(kind) for kind in KINDS)
