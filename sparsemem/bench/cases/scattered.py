"""Every second block plugged and unplugged in one call, against a loop in C that does one after the other.

Unless it says otherwise ours takes as many threads as it does by itself: for 128 MiB and more of small
blocks, another where there is a processor for it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from sparsemem._sys import lib
from sparsemem.bench.cases.rivals import PRIVATE
from sparsemem.bench.lab import Lab, Watch
from sparsemem.bench.model import Case, Figures, Measure, Way
from sparsemem.bench.peers import Peers
from sparsemem.region import Region

_LOOP = "C loop of madvise"
_ALONE = ("plug", "unplug")
_BESIDE = ("plug, other processors busy", "plug, gaps plugged", "unplug, gaps plugged")
"""For small blocks only: twice 8 GiB of large ones would take minutes, and gaps of 2 MiB change nothing."""
_SMALL = 4 << 10
_LARGE = 2 << 20

Runs = Callable[[int], Any]
"""Makes every second block out of so many, in some form that `plug_runs` takes."""


def _pairs(blocks: int) -> list[tuple[int, int]]:
    return [(first, 1) for first in range(0, blocks, 2)]


def _buffer(blocks: int) -> memoryview:
    flat = array("Q", bytes(16 * (blocks // 2)))
    flat[::2] = array("Q", range(0, blocks, 2))
    flat[1::2] = array("Q", [1]) * (blocks // 2)
    return memoryview(flat).cast("B").cast("Q", (blocks // 2, 2))


@contextmanager
def _ways(block: int, lab: Lab) -> Iterator[list[Way]]:
    blocks = 2 * (lab.scale.small if block == _SMALL else lab.scale.large)
    memory = blocks * block if block == _SMALL else blocks * block // 2
    yield [
        Way("sparsemem, list of tuples", partial(_ours, lab, block, blocks, _pairs), memory=memory),
        Way("sparsemem, list of tuples, 1 thread", partial(_ours, lab, block, blocks, _pairs, 1), memory=memory),
        Way("sparsemem, uint64 buffer", partial(_ours, lab, block, blocks, _buffer), memory=memory),
        lab.in_c(_LOOP, partial(_loop, lab, block, blocks), memory=memory),
    ]


def _ours(lab: Lab, block: int, blocks: int, make: Runs, threads: int | None = None) -> Figures:
    runs, figures = make(blocks), dict[str, float]()
    with Region(block * blocks, block_size=block, threads=threads) as region:
        watch = Watch()
        region.plug_runs(runs)
        figures["plug"] = watch.lap()
        region.unplug_runs(runs)
        figures["unplug"] = watch.lap()
        if block == _LARGE:
            return figures
        with _others_busy(lab) as possible:
            watch.lap()
            region.plug_runs(runs)
            if possible:
                figures["plug, other processors busy"] = watch.lap()
        region.plug(0, blocks, exist_ok=True)
        watch.lap()
        region.unplug_runs(runs)
        figures["unplug, gaps plugged"] = watch.lap()
        region.plug_runs(runs)
        figures["plug, gaps plugged"] = watch.lap()
    return figures


def _loop(lab: Lab, block: int, blocks: int, peers: Peers) -> Figures:
    size, figures = block * blocks, dict[str, float]()
    advice = lib.MADV_HUGEPAGE if block == _LARGE else lib.MADV_NOHUGEPAGE
    populate, discard = lib.MADV_POPULATE_WRITE, lib.MADV_DONTNEED
    with peers.mapping(size, PRIVATE, advice=advice) as base:
        scattered = partial(peers.advise, base, size, step=block, stride=2 * block)
        watch = Watch()
        scattered(populate)
        figures["plug"] = watch.lap()
        scattered(discard)
        figures["unplug"] = watch.lap()
        if block == _LARGE:
            return figures
        with _others_busy(lab) as possible:
            watch.lap()
            scattered(populate)
            if possible:
                figures["plug, other processors busy"] = watch.lap()
        peers.advise(base, size, populate)
        watch.lap()
        scattered(discard)
        figures["unplug, gaps plugged"] = watch.lap()
        scattered(populate)
        figures["plug, gaps plugged"] = watch.lap()
    return figures


@contextmanager
def _others_busy(lab: Lab) -> Iterator[bool]:
    """All processors but one are kept busy; whether that can be done."""
    possible = lab.peers is not None and lab.processors > 1
    with lab.peers.spinning(lab.processors - 1) if lab.peers and possible else nullcontext():
        yield possible


def _case(name: str, title: str, block: int, measures: tuple[str, ...]) -> Case:
    return Case(name, title, tuple(Measure(measure, _LOOP) for measure in measures), partial(_ways, block))


CASES = (
    _case(
        "scattered-4k", "every second 4 KiB block of private anonymous memory, in one call", _SMALL, (*_ALONE, *_BESIDE)
    ),
    _case("scattered-2m", "every second 2 MiB block of private anonymous memory, in one call", _LARGE, _ALONE),
)
