"""The cases of the HyperAlloc paper (EuroSys'25), for our regions.

Theirs is another machine's, and a virtual machine's memory taken by its hypervisor:
the figures are shown to give an idea of the scale, not to be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from sparsemem._sys import files, lib
from sparsemem.bench.cases.rivals import PRIVATE
from sparsemem.bench.lab import Lab, Watch
from sparsemem.bench.model import RATE, Case, Figures, Measure, Published, Way
from sparsemem.bench.peers import Peers
from sparsemem.region import Region

_BARE = "C, bare calls, 1 thread"
_SMALL = 4 << 10
_LARGE = 2 << 20

TOUCHED, UNTOUCHED, RETURNED = "reclaim, touched", "reclaim, untouched", "return and install"

_PAPER = {
    "virtio-balloon": (0.95, 1.7, 0.69),
    "virtio-mem": (34.5, 42, 4.0),
    "HyperAlloc": (345, 5035, 3.9),
}

PUBLISHED = tuple(
    Published(measure, name, rate)
    for name, rates in _PAPER.items()
    for measure, rate in zip((TOUCHED, UNTOUCHED, RETURNED), rates, strict=True)
)


@contextmanager
def _ways(block: int, lab: Lab) -> Iterator[list[Way]]:
    size = lab.scale.size
    yield [
        *(Way(f"sparsemem, {name}", partial(_ours, size, block, n), lacks, size) for name, n, lacks in lab.threads()),
        lab.in_c(_BARE, partial(_bare, size, block), memory=size),
    ]


def _rates(size: int, returned: float, touched: float, untouched: float) -> Figures:
    gib = size / (1 << 30)
    return {TOUCHED: gib / touched, UNTOUCHED: gib / untouched, RETURNED: gib / returned}


def _ours(size: int, block: int, threads: int) -> Figures:
    """Return: blocks are plugged and every page is written to.  Reclaim: they are unplugged.

    Untouched are plugged blocks that have no memory, since their pages were discarded.
    """
    with Region(size, block_size=block, threads=threads) as region:
        watch = Watch()
        region.plug(0, region.nblocks)
        with region.view(0, region.nblocks) as view:
            _write(view)
        returned = watch.lap()
        region.unplug(0, region.nblocks)
        touched = watch.lap()
        region.plug(0, region.nblocks)
        region.discard(0, size)
        watch.lap()
        region.unplug(0, region.nblocks)
        return _rates(size, returned, touched, watch.lap())


def _bare(size: int, block: int, peers: Peers) -> Figures:
    advice = lib.MADV_HUGEPAGE if block == _LARGE else lib.MADV_NOHUGEPAGE
    with peers.mapping(size, PRIVATE, advice=advice) as base:
        watch = Watch()
        peers.advise(base, size, lib.MADV_POPULATE_WRITE)
        _write(memoryview(peers.ffi.buffer(base, size)))
        returned = watch.lap()
        peers.advise(base, size, lib.MADV_DONTNEED)
        touched = watch.lap()
        peers.advise(base, size, lib.MADV_DONTNEED)
        return _rates(size, returned, touched, watch.lap())


def _write(view: Any) -> None:
    """One byte into each page."""
    pages = len(view) // files.PAGE_SIZE
    view.cast("B")[:: files.PAGE_SIZE] = b"\1" * pages


def _case(name: str, title: str, block: int) -> Case:
    measures = tuple(Measure(measure, _BARE, RATE) for measure in (TOUCHED, UNTOUCHED, RETURNED))
    return Case(name, title, measures, partial(_ways, block), PUBLISHED)


CASES = (
    _case("hyperalloc-4k", "the HyperAlloc paper's cases, 4 KiB blocks; a higher rate is better", _SMALL),
    _case("hyperalloc-2m", "the HyperAlloc paper's cases, 2 MiB blocks; a higher rate is better", _LARGE),
)
