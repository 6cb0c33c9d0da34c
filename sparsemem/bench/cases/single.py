"""One block plugged and unplugged, again and again; one block from the warm pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median, quantiles
from time import perf_counter_ns
from typing import Any

from sparsemem._sys import lib
from sparsemem.backends import Anonymous
from sparsemem.backends.base import Backend
from sparsemem.bench.cases.rivals import PRIVATE
from sparsemem.bench.lab import Lab, Watch
from sparsemem.bench.model import Case, Figures, Measure, Way
from sparsemem.bench.peers import Peers
from sparsemem.region import Region

_CALLS = "C, the two bare system calls"
_POPULATED = "sparsemem, populating"
_SMALL = 4 << 10
_LARGE = 2 << 20


def _figures(took: list[int]) -> Figures:
    """The middle, and what one in a hundred exceeds, of nanoseconds."""
    return {"median": median(took) / 1e9, "99th percentile": quantiles(took, n=100)[98] / 1e9}


@contextmanager
def _latency(block: int, backend: Callable[[], Backend], lab: Lab) -> Iterator[list[Way]]:
    rounds, memory = lab.scale.samples, 16 * block
    yield [
        Way("sparsemem", partial(_plug_and_unplug, block, backend, rounds), memory=memory),
        lab.in_c(_CALLS, partial(_bare, block, rounds), memory=memory),
    ]


def _plug_and_unplug(block: int, backend: Callable[[], Backend], rounds: int) -> Figures:
    took = []
    with Region(16 * block, block_size=block, backend=backend()) as region:
        plug, unplug, now = region.plug, region.unplug, perf_counter_ns
        for _ in range(rounds):
            start = now()
            plug(3)
            unplug(3)
            took.append(now() - start)
    return _figures(took)


def _bare(block: int, rounds: int, peers: Peers) -> Figures:
    advice = lib.MADV_HUGEPAGE if block == _LARGE else lib.MADV_NOHUGEPAGE
    with peers.mapping(16 * block, PRIVATE, advice=advice) as base:
        return _figures(peers.latency(base + 3 * block, block, rounds))


@contextmanager
def _warm_pool(lab: Lab) -> Iterator[list[Way]]:
    blocks = max(1, min(256, lab.scale.size // _LARGE // 2))
    memory = 2 * blocks * _LARGE
    yield [
        Way("sparsemem, from the warm pool", partial(_from_pool, blocks), _lacks_pool(), memory),
        Way(_POPULATED, partial(_populating, blocks), memory=memory),
    ]


def _pooled(size: int, pool: int) -> Any:
    """A region that holds so many bytes ready."""
    make: Any = Region
    return make(size, block_size=_LARGE, warm=pool)


def _lacks_pool() -> str:
    try:
        _pooled(16 * _LARGE, _LARGE).close()
    except TypeError:
        return "this version's Region has no warm pool"
    except (OSError, NotImplementedError) as error:
        return str(error)
    return ""


def _from_pool(blocks: int) -> Figures:
    with _pooled(blocks * _LARGE, blocks * _LARGE) as region:
        region.refill()
        return _plugged_singly(region)


def _populating(blocks: int) -> Figures:
    with Region(blocks * _LARGE, block_size=_LARGE) as region:
        return _plugged_singly(region)


def _plugged_singly(region: Region) -> Figures:
    took = []
    for block in range(region.nblocks):
        watch = Watch()
        region.plug(block)
        took.append(watch.lap())
    return {"plug": median(took)}


def _case(name: str, title: str, block: int, backend: Callable[[], Backend]) -> Case:
    measures = (Measure("median", _CALLS), Measure("99th percentile", _CALLS))
    return Case(name, title, measures, partial(_latency, block, backend))


CASES = (
    _case("latency-4k", "one 4 KiB block plugged and unplugged, private anonymous memory", _SMALL, Anonymous),
    _case("latency-2m", "one 2 MiB block plugged and unplugged, private anonymous memory", _LARGE, Anonymous),
    Case(
        "warm-pool",
        "one 2 MiB block plugged, private anonymous memory",
        (Measure("plug", _POPULATED),),
        _warm_pool,
    ),
)
