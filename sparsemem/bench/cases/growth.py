"""What it costs that a region is large, or that there are many runs."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median

from sparsemem._sys import files
from sparsemem.bench.lab import Lab, Watch
from sparsemem.bench.model import BYTES, Case, Figures, Measure, Way
from sparsemem.bench.peers import Peers
from sparsemem.region import Region
from sparsemem.units import exact_size

_SMALL = 4 << 10
_LARGE = 2 << 20
_SIZES = tuple(1 << power for power in (30, 34, 37, 40, 43, 46))
_TIMES = 20
_BARE = "C, mmap and munmap of 64T"
_SMALLEST = f"sparsemem, {exact_size(_SIZES[0])}"


@contextmanager
def _creation(lab: Lab) -> Iterator[list[Way]]:
    yield [
        *(Way(f"sparsemem, {exact_size(size)}", partial(_created, size)) for size in _SIZES),
        lab.in_c(_BARE, _mapped),
    ]


def _created(size: int) -> Figures:
    touched = _touched(size)  # first: afterwards malloc has memory of earlier regions to give
    took = []
    for _ in range(_TIMES):
        watch = Watch()
        Region(size, block_size=_LARGE).close()
        took.append(watch.lap())
    return {"create and close": median(took), "bitmap memory touched": touched}


def _touched(size: int) -> float:
    """What the process has more of once there is a region with one block plugged, that block left out.

    All of its anonymous memory counts: the bitmaps, and whatever else a region has.
    """
    before = _anonymous()
    with Region(size, block_size=_LARGE) as region:
        region.plug(region.nblocks - 1)
        memory = files.mapping_fields(region.address, region.size)["Anonymous"]
        return max(0.0, _anonymous() - before - memory)


def _anonymous() -> int:
    with open("/proc/self/smaps_rollup", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("Anonymous:"))


def _mapped(peers: Peers) -> Figures:
    took = []
    for _ in range(_TIMES):
        watch = Watch()
        with peers.mapping(_SIZES[-1], mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
            pass
        took.append(watch.lap())
    return {"create and close": median(took)}


@contextmanager
def _growing_size(lab: Lab) -> Iterator[list[Way]]:
    yield [
        Way(f"sparsemem, {exact_size(size)}", partial(_single, size, lab.scale.samples), memory=1 << 24)
        for size in _SIZES
    ]


def _single(size: int, rounds: int) -> Figures:
    took = []
    with Region(size, block_size=_LARGE) as region:
        last = region.nblocks - 1
        for _ in range(max(2, rounds // 10)):
            watch = Watch()
            region.plug(last)
            region.unplug(last)
            took.append(watch.lap())
    return {"plug and unplug of the last block": median(took)}


@contextmanager
def _growing_runs(lab: Lab) -> Iterator[list[Way]]:
    counts = [lab.scale.small >> shift for shift in (3, 2, 1, 0)]
    yield [Way(_name(i), partial(_many, count), memory=2 * count * _SMALL) for i, count in enumerate(counts)]


def _name(i: int) -> str:
    return "sparsemem, " + ("an 8th of the runs", "a quarter", "half", "all runs")[i]


def _many(count: int) -> Figures:
    """By one thread, for another one that comes in at some number of runs would hide what they cost."""
    runs = [(2 * i, 1) for i in range(count)]
    with Region(2 * count * _SMALL, block_size=_SMALL, threads=1) as region:
        watch = Watch()
        region.plug_runs(runs)
        plugged = watch.lap()
        region.unplug_runs(runs)
        return {"plug, a run": plugged / count, "unplug, a run": watch.lap() / count}


CASES = (
    Case(
        "create",
        "a region of 2 MiB blocks, from 1 GiB to 64 TiB",
        (Measure("create and close", _BARE), Measure("bitmap memory touched", _SMALLEST, BYTES)),
        _creation,
    ),
    Case(
        "growing-size",
        "one 2 MiB block in larger and larger regions: flat if it does not matter",
        (Measure("plug and unplug of the last block", _SMALLEST),),
        _growing_size,
    ),
    Case(
        "growing-runs",
        "4 KiB runs, 65,536 and fewer (with --quick 8192), the cost of each: flat if the whole is linear",
        (Measure("plug, a run", _name(0)), Measure("unplug, a run", _name(0))),
        _growing_runs,
    ),
)
