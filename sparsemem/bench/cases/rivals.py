"""What others do to populate and discard a large range: system calls from C, QEMU, CPython, numpy."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

from attrs import frozen

from sparsemem._sys import files, lib
from sparsemem.bench.lab import Lab, Watch
from sparsemem.bench.model import Figures, Way
from sparsemem.bench.peers import Peers

PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_PROTECTION = mmap.PROT_READ | mmap.PROT_WRITE


@frozen
class Bare:
    """A mapping made by hand.

    Attributes:
        flags: Of mmap().
        page: Bytes of a page.
        file: Opens the file that is mapped, in a folder; None if there is none.
        discards: Advice that gives memory back; a file is punched before that.
        advice: Advice on huge pages.
        folder: Where the file is made.
        measures_memory: Whether to measure the memory used, too.
    """

    flags: int
    page: int = files.PAGE_SIZE
    file: Callable[[str], AbstractContextManager[int]] | None = None
    discards: tuple[int, ...] = ()
    advice: int | None = None
    folder: str = ""
    measures_memory: bool = False

    @contextmanager
    def opened(self, size: int) -> Iterator[int]:
        """The file's descriptor, or -1."""
        if self.file is None:
            yield -1
            return
        with self.file(self.folder) as fd:
            os.ftruncate(fd, size)
            yield fd

    def discard(self, peers: Peers, base: Any, fd: int, size: int, step: int) -> None:
        """Gives everything back, so many bytes a call."""
        if fd >= 0:
            peers.punch(fd, size, step=step)
        for advice in self.discards:
            peers.advise(base, size, advice, step=step)

    def memory(self, size: int) -> int:
        """Bytes that should be warm; those of a pool always are, and a private file's are copied."""
        copies = 2 if self.file is not None and self.flags & mmap.MAP_PRIVATE else 1
        return copies * size if self.page == files.PAGE_SIZE else 0

    def used(self, address: int, fd: int, size: int) -> float:
        """How often the kernel has the memory: anonymous pages and those of the file, by its own accounting."""
        private = files.mapping_fields(address, size)["Anonymous"]
        return (private + os.fstat(fd).st_blocks * 512) / size


def system_calls(lab: Lab, bare: Bare, size: int, block: int, *, of: str = "", thorough: bool = False) -> Iterator[Way]:
    """MADV_POPULATE_WRITE from C, and what QEMU does; `of` is added to the names."""
    way = partial(lab.in_c, memory=bare.memory(size))
    yield way(f"C populate_write{of}", partial(_advised, bare, size, size))
    if thorough:
        yield way(f"C populate_write{of}, block by block", partial(_advised, bare, size, block))
    for name, threads, reason in lab.threads():
        populate = partial(_preallocated, bare, size, threads)
        yield way(f"QEMU populate_write{of}, {name}", partial(populate, touch=False), reason=reason)
        if thorough:
            yield way(f"QEMU touch{of}, {name}", partial(populate, touch=True), reason=reason)


def others(lab: Lab, bare: Bare, size: int) -> Iterator[Way]:
    """Other ways of getting memory, and how long it takes only to write it."""
    memory = bare.memory(size)
    if bare.advice != lib.MADV_HUGEPAGE:
        # With transparent huge pages the advice would come too late.  (And shared memory is
        # only read by it, so a file on a disk gets no blocks.)
        shared = " (reads, allocates nothing)" if bare.folder else " (reads)" if bare.flags & mmap.MAP_SHARED else ""
        yield lab.in_c(f"MAP_POPULATE{shared}", partial(_mapped, bare, size), memory=memory)
    if bare.file is not None:
        yield Way("posix_fallocate (neither cleared nor mapped)", partial(_fallocated, bare, size), memory=memory)
    yield Way("CPython mmap.madvise", partial(_madvised, bare, size), memory=memory)
    yield Way("CPython mmap, touching", partial(_touched, bare, size), memory=memory)
    yield lab.in_numpy("numpy fill", partial(_numpy_filled, bare, size), memory=memory)
    yield lab.in_c("memset of populated memory", partial(_filled, bare, size), memory=memory)


def _advised(bare: Bare, size: int, step: int, peers: Peers) -> Figures:
    figures: dict[str, float] = {}
    with bare.opened(size) as fd, peers.mapping(size, bare.flags, fd, advice=bare.advice) as base:
        watch = Watch()
        peers.advise(base, size, lib.MADV_POPULATE_WRITE, step=step)
        figures["populate"] = watch.lap()
        if bare.measures_memory:
            figures["memory used"] = bare.used(int(peers.ffi.cast("uintptr_t", base)), fd, size)
            watch.lap()
        bare.discard(peers, base, fd, size, step)
        figures["discard"] = watch.lap()
    return figures


def collapsed(bare: Bare, size: int, peers: Peers) -> Figures:
    """Huge pages in shared memory without its mount's leave: a page of each, all collapsed, the rest populated."""
    huge = 2 << 20
    with bare.opened(size) as fd, peers.mapping(size, bare.flags, fd) as base:
        watch = Watch()
        peers.advise(base, size, lib.MADV_POPULATE_WRITE, step=files.PAGE_SIZE, stride=huge)
        peers.advise(base, size, lib.MADV_COLLAPSE, step=huge)
        peers.advise(base, size, lib.MADV_POPULATE_WRITE)
        figures = {"populate": watch.lap()}
        bare.discard(peers, base, fd, size, size)
        figures["discard"] = watch.lap()
    return figures


def _preallocated(bare: Bare, size: int, threads: int, peers: Peers, *, touch: bool) -> Figures:
    with bare.opened(size) as fd, peers.mapping(size, bare.flags, fd, advice=bare.advice) as base:
        watch = Watch()
        peers.preallocate(base, size, bare.page, threads, touch=touch)
        return {"populate": watch.lap()}


def _filled(bare: Bare, size: int, peers: Peers) -> Figures:
    """The limit: how long it takes only to write."""
    with bare.opened(size) as fd, peers.mapping(size, bare.flags, fd, advice=bare.advice) as base:
        peers.fill(base, 1, size)
        watch = Watch()
        peers.fill(base, 0, size)
        return {"populate": watch.lap()}


def _mapped(bare: Bare, size: int, peers: Peers) -> Figures:
    with bare.opened(size) as fd:
        watch = Watch()
        with peers.mapping(size, bare.flags | mmap.MAP_POPULATE, fd):
            return {"populate": watch.lap()}


def _fallocated(bare: Bare, size: int) -> Figures:
    """Gets the file's pages only: the first access still faults, and the kernel clears the page then."""
    with bare.opened(size) as fd:
        watch = Watch()
        os.posix_fallocate(fd, 0, size)
        return {"populate": watch.lap()}


@contextmanager
def _cpython(bare: Bare, size: int) -> Iterator[mmap.mmap]:
    with bare.opened(size) as fd, mmap.mmap(fd, size, bare.flags, _PROTECTION) as mapping:
        if bare.advice is not None:
            mapping.madvise(bare.advice)
        yield mapping


def _madvised(bare: Bare, size: int) -> Figures:
    with _cpython(bare, size) as mapping:
        watch = Watch()
        mapping.madvise(lib.MADV_POPULATE_WRITE)
        figures = {"populate": watch.lap()}
        if not bare.file:
            mapping.madvise(bare.discards[0])
            figures["discard"] = watch.lap()
        return figures


def _touched(bare: Bare, size: int) -> Figures:
    with _cpython(bare, size) as mapping:
        watch = Watch()
        for offset in range(0, size, bare.page):
            mapping[offset] = 0
        return {"populate": watch.lap()}


def _numpy_filled(bare: Bare, size: int, numpy: ModuleType) -> Figures:
    with _cpython(bare, size) as mapping:
        pages = numpy.frombuffer(mapping, dtype=numpy.uint8)
        watch = Watch()
        pages.fill(0)
        figures = {"populate": watch.lap()}
        del pages  # the mapping cannot be closed under it
        return figures
