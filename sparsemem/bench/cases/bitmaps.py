"""The block map: looking for a place at the far end, and listing all runs."""

from __future__ import annotations

import struct
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType

from sparsemem.backends.base import Backend, Mapping, Request
from sparsemem.bench.lab import Lab, Watch
from sparsemem.bench.model import Case, Figures, Measure, Way
from sparsemem.bench.peers import Peers
from sparsemem.errors import Run
from sparsemem.region import Region

_RUN = 64
"""Blocks that are plugged in a row, and free in a row."""

_BLOCK = 4 << 10
_FEWER = 1 << 19

_FIND, _TUPLES, _ARRAY = "find at the far end", "a run, of all as tuples", "all runs as an array"
_IN_C = "C, word by word"
_NUMPY = "numpy on Region.bitmap"


class _Nothing(Backend):
    """Blocks without memory: only the map is measured."""

    page_size = _BLOCK

    def reserve(self, request: Request) -> Mapping:
        return _NothingMapped(request)


class _NothingMapped(Mapping):
    def __init__(self, request: Request) -> None:
        self.size = request.size

    def populate(self, offset: int, length: int) -> None:
        pass

    def discard(self, offset: int, length: int) -> None:
        pass

    def resident(self, offset: int, length: int) -> Iterator[Run] | None:
        return None


@contextmanager
def _ways(bits: int | None, lab: Lab) -> Iterator[list[Way]]:
    nbits = min(bits or lab.scale.bits, lab.scale.bits)
    runs = nbits // (2 * _RUN) - 1
    taken = array("Q", bytes(16 * runs))
    taken[::2] = array("Q", range(0, 2 * _RUN * runs, 2 * _RUN))
    taken[1::2] = array("Q", [_RUN]) * runs
    pairs = memoryview(taken).cast("B").cast("Q", (runs, 2))
    # After the last run 192 blocks are free: the only place for more than 64.
    with Region(nbits * _BLOCK, block_size=_BLOCK, backend=_Nothing(), plugged=pairs) as region:
        ways = [
            Way("sparsemem", partial(_ours, region, runs)),
            lab.in_c(_IN_C, partial(_in_c, region, runs)),
        ]
        if bits is not None:  # the smaller: for the larger it takes seconds, and says no more
            ways.append(lab.in_numpy(_NUMPY, partial(_with_numpy, region, runs)))
        yield ways


def _ours(region: Region, runs: int) -> Figures:
    watch = Watch()
    found = region.find_unplugged(_RUN + 1)
    figures = {_FIND: watch.lap()}
    # Each is made and let go: a list of two million is mostly the time that its own memory takes.
    last = deque(region.plugged_runs(), maxlen=1).pop()
    figures[_TUPLES] = watch.lap() / runs
    _check((found, last), (region.nblocks - 3 * _RUN, (2 * _RUN * (runs - 1), _RUN)))
    watch.lap()
    flat = region.plugged_array()
    figures[_ARRAY] = watch.lap()
    _check((len(flat), flat[-2]), (2 * runs, 2 * _RUN * (runs - 1)))
    return figures


def _in_c(region: Region, runs: int, peers: Peers) -> Figures:
    out = array("Q", bytes(16 * runs))
    watch = Watch()
    found = peers.find(region.bitmap, region.nblocks, _RUN + 1)
    figures = {_FIND: watch.lap()}
    listed = peers.runs(region.bitmap, region.nblocks, out)
    figures[_ARRAY] = watch.lap()
    last = deque(struct.iter_unpack("=QQ", out), maxlen=1).pop()
    figures[_TUPLES] = (figures[_ARRAY] + watch.lap()) / runs
    _check((found, listed, last), (region.nblocks - 3 * _RUN, runs, (2 * _RUN * (runs - 1), _RUN)))
    return figures


def _with_numpy(region: Region, runs: int, numpy: ModuleType) -> Figures:
    watch = Watch()
    bits = numpy.unpackbits(numpy.frombuffer(region.bitmap, dtype=numpy.uint8), bitorder="little")
    edges = numpy.flatnonzero(numpy.diff(bits, prepend=0, append=0)).reshape(-1, 2)
    pairs = numpy.stack((edges[:, 0], edges[:, 1] - edges[:, 0]), axis=1).astype(numpy.uint64)
    figures = {_ARRAY: watch.lap()}
    last = deque(zip(*pairs.T.tolist(), strict=True), maxlen=1).pop()
    figures[_TUPLES] = (figures[_ARRAY] + watch.lap()) / runs
    _check((len(pairs), last), (runs, (2 * _RUN * (runs - 1), _RUN)))
    return figures


def _check(found: object, expected: object) -> None:
    """Whoever computes something else is not to be compared with."""
    if found != expected:
        raise AssertionError(f"the benchmark is wrong: {found} instead of {expected}")


def _case(name: str, bits: int | None, title: str) -> Case:
    measures = (Measure(_FIND, _IN_C), Measure(_TUPLES, _IN_C), Measure(_ARRAY, _IN_C))
    return Case(name, f"{title}, 64 plugged and 64 free in turn", measures, partial(_ways, bits))


CASES = (
    _case("bitmap-small", _FEWER, "a map of 2^19 blocks (or as many as the larger, if that has fewer)"),
    _case("bitmap-large", None, "a map of 2^28 blocks (with --quick 2^22)"),
)
