"""The bitmap and the runs in C, against bitarray and plain Python sets."""

from __future__ import annotations

import random
import resource
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

from sparsemem import BlockRangeError, Region, Simulated
from sparsemem.bitmap import Bitmap
from sparsemem.runs import clip, collect, join, subtract, to_blocks
from tests.support import accounting

SIZES = st.sampled_from([1, 7, 63, 64, 65, 127, 128, 129, 200, 1000])


def pieces(nbits: int) -> Any:
    return st.lists(
        st.tuples(st.booleans(), st.integers(0, nbits - 1), st.integers(1, nbits)).map(
            lambda piece: (piece[0], piece[1], min(piece[2], nbits - piece[1]))
        ),
        max_size=12,
    )


@st.composite
def bitmaps(draw: Any) -> tuple[Bitmap, bitarray]:
    nbits = draw(SIZES)
    ours, oracle = Bitmap(nbits), bitarray(nbits, endian="little")
    oracle.setall(0)
    for value, first, count in draw(pieces(nbits)):
        (ours.set if value else ours.clear)(first, count)
        oracle[first : first + count] = value
    return ours, oracle


def runs_of(bits: Any, value: int) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for i, bit in enumerate(bits):
        if bool(bit) == bool(value):
            if runs and sum(runs[-1]) == i:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((i, 1))
    return runs


@given(pieces(500), st.booleans())
def test_runs_come_as_an_array_too(changes: list[tuple[bool, int, int]], plugged: bool) -> None:
    with Region(500 * 4096, block_size=4096, backend=Simulated()) as region:
        for value, first, count in changes:
            if value:
                region.plug(first, count, exist_ok=True)
            else:
                region.unplug(first, count, missing_ok=True)
        array = region.plugged_array() if plugged else region.unplugged_array()
        runs = list(region.plugged_runs() if plugged else region.unplugged_runs())
        assert array.tolist() == [number for run in runs for number in run]
        asked = np.asarray(array).reshape(-1, 2)
        if plugged and runs:
            assert region.unplug_runs(asked) == sum(count for _, count in runs)


def test_an_empty_bitmap_is_searched_in_no_time() -> None:
    """First fit ends at the first place, not at the end of 2**36 bits."""
    with Region("1P", block_size="64K", backend=Simulated()) as region:
        assert region.find_unplugged(1) == 0
        assert region.find_unplugged(100, align=64) == 0
        region.plug(0)
        assert region.find_unplugged(128, align=3) == 3


@given(bitmaps())
def test_the_bytes_are_bitarrays_little_endian_bytes(pair: tuple[Bitmap, bitarray]) -> None:
    ours, oracle = pair
    assert bytes(ours.buffer()) == oracle.tobytes()
    assert bitarray(buffer=ours.buffer(), endian="little")[: ours.nbits] == oracle


@given(bitmaps(), st.data())
def test_count_next_and_runs(pair: tuple[Bitmap, bitarray], data: Any) -> None:
    ours, oracle = pair
    first = data.draw(st.integers(0, ours.nbits - 1))
    stop = data.draw(st.integers(first, ours.nbits))
    assert ours.count(first, stop - first) == oracle[first:stop].count(1)
    for value in (0, 1):
        found = oracle.find(value, first, stop)
        assert ours.next(first, stop, bool(value)) == (stop if found < 0 else found)
        assert list(ours.runs(bool(value))) == runs_of(oracle, value)


@given(bitmaps(), st.integers(1, 70) | st.integers(65, 600), st.sampled_from([1, 2, 3, 8, 64]))
def test_find_first_last_and_best(pair: tuple[Bitmap, bitarray], count: int, align: int) -> None:
    ours, oracle = pair
    starts = [start for start in range(0, ours.nbits - count + 1, align) if not oracle[start : start + count].any()]
    assert ours.find(count, align=align, fit="first") == (starts[0] if starts else None)
    assert ours.find(count, align=align, fit="last") == (starts[-1] if starts else None)
    holes = {start: hole for start in starts for hole in runs_of(oracle, 0) if hole[0] <= start < sum(hole)}
    best = min(starts, key=lambda start: (holes[start][1], start), default=None)
    assert ours.find(count, align=align, fit="best") == best


@pytest.mark.parametrize("seed", range(4))
def test_a_large_map_is_searched_as_a_small_one(seed: int) -> None:
    """Long empty and full stretches, which the search jumps over word by word."""
    chance = random.Random(seed)
    nbits = 200_000 + chance.randrange(64)
    ours, oracle = Bitmap(nbits), bitarray(nbits, endian="little")
    oracle.setall(0)
    for _ in range(60):
        first, count = chance.randrange(nbits), chance.choice([1, 63, 64, 65, 1000, 9000])
        count, value = min(count, nbits - first), chance.random() < 0.7
        (ours.set if value else ours.clear)(first, count)
        oracle[first : first + count] = value
    assert ours.count(0, nbits) == oracle.count()
    holes = holes_of(oracle)
    assert list(ours.runs(False)) == holes
    for count in (1, 64, 129, 3000, 20_000):
        fitting = [hole for hole in holes if hole[1] >= count]
        assert ours.find(count) == (fitting[0][0] if fitting else None)
        assert ours.find(count, fit="last") == (sum(fitting[-1]) - count if fitting else None)
        best = min(fitting, key=lambda hole: (hole[1], hole[0]), default=(None, 0))
        assert ours.find(count, fit="best") == best[0]


def holes_of(bits: bitarray) -> list[tuple[int, int]]:
    """As `runs_of(bits, 0)`, by bitarray's own search."""
    holes, start = [], bits.find(0)
    while start >= 0:
        end = bits.find(1, start)
        holes.append((start, (len(bits) if end < 0 else end) - start))
        start = -1 if end < 0 else bits.find(0, end)
    return holes


RUNS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=10)


def members(runs: Any) -> set[int]:
    return {i for first, count in runs for i in range(first, first + count)}


@given(RUNS, RUNS)
def test_run_algebra_is_that_of_sets(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    a, b = join(a), join(b)
    for runs in (a, b):
        assert all(sum(x) < y[0] for x, y in pairwise(runs)), "ascending and maximal"
    assert members(clip(a, b)) == members(a) & members(b)
    assert members(subtract(a, b)) == members(a) - members(b)
    assert members(to_blocks(a, 3)) == {i >> 3 for i in members(a)}


@given(RUNS, st.booleans())
def test_collect_sorts_joins_and_refuses_overlaps(runs: list[tuple[int, int]], as_array: bool) -> None:
    given_runs: Any = np.array(runs, dtype=np.uint64).reshape(-1, 2) if as_array else iter(runs)
    if sum(count for _, count in runs) == len(members(runs)):
        assert list(collect(given_runs, 100)) == join(runs)
        assert collect(list(runs), 100).total == len(members(runs))
    else:
        with pytest.raises(BlockRangeError, match="overlaps"):
            collect(given_runs, 100)


def test_the_regions_bitmap_is_its_own_memory_and_read_only() -> None:
    with Region("1G", block_size="1M", backend=Simulated()) as region:
        shared = region.bitmap
        as_numpy = np.frombuffer(shared, dtype=np.uint8)
        as_bits = bitarray(buffer=shared, endian="little")
        region.plug_runs([(0, 3), (9, 1), (1023, 1)])
        assert shared.readonly
        assert as_bits.count() == 5
        assert np.unpackbits(as_numpy, bitorder="little").nonzero()[0].tolist() == [0, 1, 2, 9, 1023]
        with pytest.raises(TypeError):
            shared[0] = 1
        with pytest.raises(ValueError, match="read-only"):
            as_numpy[0] = 1
    assert as_bits.count() == 5, "it lives as long as somebody looks at it"


def test_a_huge_map_uses_memory_only_where_it_was_written() -> None:
    """2^28 blocks: a bitmap of 32 MiB, of which one word is written."""
    with Region("1T", block_size=4096, backend=Simulated()) as region:
        assert region.nblocks == 1 << 28
        region.plug(region.nblocks - 1)
        assert region.is_plugged(region.nblocks - 1)
        start = np.frombuffer(region.bitmap, dtype=np.uint8).ctypes.data
        used = accounting.resident_bytes(start, len(region.bitmap))
        # (Where transparent huge pages are always on, the smallest piece is one of those.)
        assert used <= accounting.HUGE_2M
        assert region.find_unplugged(1, fit="last") == region.nblocks - 2
        assert list(region.plugged_runs()) == [(region.nblocks - 1, 1)]
        assert region.audit().ok
        if accounting.have_pagemap_scan():  # only this tells the kernel's page of zeroes, which reading maps
            assert accounting.resident_bytes(start, len(region.bitmap)) == used


def test_the_largest_region_is_made_and_searched() -> None:
    with Region("64T", block_size=4096, backend=Simulated()) as region:
        assert region.nblocks == 1 << 34
        region.plug(0, 1 << 20)
        assert region.find_unplugged(1) == 1 << 20


@pytest.mark.parametrize("fit", ["first", "last", "best"])
def test_find_unplugged_keeps_clear_of_what_is_plugged(fit: str) -> None:
    with Region("64K", block_size=4096, backend=Simulated()) as region:
        region.plug_runs([(0, 2), (5, 1), (8, 6)])
        assert region.find_unplugged(2, fit=fit) == {"first": 2, "last": 14, "best": 6}[fit]
        assert region.find_unplugged(3, fit=fit) == 2
        assert region.find_unplugged(4) is None
        assert region.find_unplugged(2, align=7, fit=fit) == 14
        assert region.find_unplugged(2, align=4, fit=fit) is None


def test_a_large_region_comes_and_goes_without_its_maps_being_looked_through() -> None:
    def faults_of_a_region(size: str) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        with Region(size, block_size="2M") as region:
            region.plug(region.nblocks - 1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults_of_a_region("64T")  # whatever is imported or allocated once
    # Its four maps have 1024 pages each; what the block takes is 1 to 512.
    assert faults_of_a_region("64T") <= faults_of_a_region("1G") + 600
