"""Many discards inside plugged blocks at once, and blocks that are plugged without memory."""

from __future__ import annotations

import errno
import os
import warnings
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemem import (
    Anonymous,
    BlockRangeError,
    BlockStateError,
    Budget,
    Cause,
    DiscardError,
    File,
    HugePageSplitWarning,
    Memfd,
    PopulateError,
    Region,
    ReserveError,
    Secret,
    Simulated,
    UnsupportedError,
)
from sparsemem._sys import probe
from sparsemem._sys.calls import kernel
from sparsemem.backends import Backend
from sparsemem.bitmap import Bitmap
from sparsemem.recipes import Step
from sparsemem.runs import collect
from tests.support.injector import Injector

BLOCK = 64 << 10
PAGE = 4096

KINDS = [Anonymous(), Anonymous(shared=True), Memfd(), Memfd(shared=False), Simulated()]


def full(region: Region, *blocks: int) -> None:
    for block in blocks:
        region.plug(block)
        if not isinstance(region.backend, Simulated):
            region.view(block)[:] = b"x" * BLOCK


# ---- many discards at once ------------------------------------------------------------------


@pytest.mark.parametrize("backend", KINDS, ids=str)
def test_scattered_pages_are_given_back_and_the_blocks_stay_plugged(backend: Backend) -> None:
    with Region("1M", block_size=BLOCK, backend=backend) as region:
        full(region, 0, 1, 4)
        pages = [(0, PAGE), (3 * PAGE, 2 * PAGE), (BLOCK - PAGE, 2 * PAGE), (4 * BLOCK + PAGE, PAGE)]
        assert region.discard_runs(pages) == 6 * PAGE
        audit = region.audit()
        assert (audit.discarded_size, audit.resident_size, audit.ok) == (6 * PAGE, 3 * BLOCK - 6 * PAGE, True)
        assert region.plugged_blocks == 3
        if not isinstance(backend, Simulated):
            assert bytes(region.view(0)[: 2 * PAGE]) == bytes(PAGE) + b"x" * PAGE


def test_runs_come_in_any_order_and_form() -> None:
    with Region("1M", block_size=BLOCK, backend=Memfd()) as region:
        region.plug(0, 4)
        assert region.discard_runs([(BLOCK, PAGE), (0, PAGE)]) == 2 * PAGE
        assert (
            region.discard_runs(memoryview(array("Q", [PAGE, PAGE, 0, PAGE])).cast("B").cast("Q", (2, 2))) == 2 * PAGE
        )
        assert region.discard_runs(iter([])) == 0


@pytest.mark.parametrize("missing_ok", [False, True])
def test_what_is_not_plugged_is_an_error_or_left_out(missing_ok: bool) -> None:
    with Region("1M", block_size=BLOCK, backend=Memfd()) as region:
        full(region, 0, 2)
        pages = [(0, PAGE), (BLOCK - PAGE, 3 * PAGE), (2 * BLOCK, PAGE), (9 * BLOCK, PAGE)]
        if missing_ok:
            assert region.discard_runs(pages, missing_ok=True) == 3 * PAGE
            assert region.discard_runs([(9 * BLOCK, PAGE)], missing_ok=True) == 0
        else:
            with pytest.raises(BlockStateError, match="block 1 is not plugged"):
                region.discard_runs(pages)
        assert region.audit().discarded_size == (3 * PAGE if missing_ok else 0)
        assert region.audit().ok


def test_a_tainted_block_is_left_out_too(inject: Injector) -> None:
    with Region("1M", block_size=BLOCK, backend=Memfd()) as region:
        full(region, 0, 1)
        inject.step(Step.PUNCH, errno=errno.EIO)
        with pytest.raises(DiscardError):
            region.unplug(1)
        with pytest.raises(BlockStateError, match="tainted"):
            region.discard_runs([(0, PAGE), (BLOCK, PAGE)])
        assert region.discard_runs([(0, PAGE), (BLOCK, PAGE)], missing_ok=True) == PAGE


@pytest.mark.parametrize(
    "runs", [[(1, PAGE)], [(0, PAGE), (PAGE, 100)], [(0, 0)], [(1 << 20, PAGE)], [(0, 8192), (PAGE, PAGE)]]
)
def test_what_is_no_pages_of_the_region_is_refused_as_a_whole(runs: list[tuple[int, int]]) -> None:
    with Region("1M", block_size=BLOCK, backend=Memfd()) as region:
        full(region, 0)
        with pytest.raises(BlockRangeError):
            region.discard_runs(runs, missing_ok=True)
        assert region.audit().discarded_size == 0


def test_a_discard_that_fails_says_what_is_gone(inject: Injector) -> None:
    with Region("1M", block_size=BLOCK, backend=Memfd()) as region:
        full(region, 0, 1)
        inject.step(Step.PUNCH, errno=errno.EIO, nth=2)
        with pytest.raises(DiscardError) as caught:
            region.discard_runs([(0, PAGE), (8 * PAGE, PAGE), (BLOCK, PAGE)])
        assert caught.value.discarded == ((0, PAGE),)
        assert caught.value.tainted == ((8 * PAGE, PAGE),)
        assert caught.value.remaining == ((BLOCK, PAGE),)
        assert region.stats().busy_size == 0
        assert region.audit().ok


def test_no_warning_of_huge_pages_that_are_split() -> None:
    with Region("4M", block_size="2M") as region, warnings.catch_warnings():
        warnings.simplefilter("error", HugePageSplitWarning)
        region.plug(0)
        region.discard_runs([(PAGE, PAGE)])


# ---- plugged without memory --------------------------------------------------------------------


@pytest.mark.parametrize("backend", KINDS, ids=str)
def test_a_block_that_is_plugged_without_memory_takes_none_until_it_is_used(backend: Backend) -> None:
    with Region("1M", block_size=BLOCK, backend=backend) as region:
        assert region.plug(1, 3, populate=False) == 3
        assert region.plug_runs([(9, 1)], populate=False) == 1
        audit = region.audit()
        assert (audit.plugged_size, audit.discarded_size, audit.resident_size) == (4 * BLOCK, 4 * BLOCK, 0)
        assert audit.ok
        region.populate(BLOCK, BLOCK)
        assert region.audit().resident_size == BLOCK
        region.unplug_all()
        region.plug(1)
        assert region.audit().discarded_size == 0


@pytest.mark.parametrize("backend", [Anonymous(), Memfd()], ids=str)
def test_stray_writes_do_not_show_in_it(backend: Backend) -> None:
    with Region("1M", block_size=BLOCK, backend=backend) as region:
        region.view()[BLOCK : BLOCK + 5] = b"stray"
        region.plug(1, populate=False)
        assert bytes(region.view(1)) == bytes(BLOCK)


def test_it_needs_no_headroom_but_a_budget() -> None:
    budget = Budget("128K")
    with Region("1M", block_size=BLOCK, backend=Simulated(capacity=0), budget=budget) as region:
        assert region.plug(0, 2, populate=False) == 2
        with pytest.raises(PopulateError) as caught:
            region.plug(2, populate=False)
        assert caught.value.cause is Cause.BUDGET


def test_what_is_pending_is_emptied_too() -> None:
    with Region("1M", block_size=BLOCK, backend=Memfd(), unplug_delay=1000, reuse="keep") as region:
        full(region, 0)
        region.unplug(0)
        assert region.stats().pending_size == BLOCK
        region.plug(0, populate=False)
        assert region.stats().pending_size == 0
        assert bytes(region.view(0)[:4]) == bytes(4)


def test_a_plug_without_memory_that_fails_changes_nothing(inject: Injector) -> None:
    with Region("1M", block_size=BLOCK, backend=Memfd()) as region:
        inject.step(Step.PUNCH, errno=errno.EIO)
        with pytest.raises(PopulateError):
            region.plug(0, 2, populate=False)
        assert region.plugged_size == 0
        assert not list(region.tainted_runs())
        region.plug(0, populate=False)
        with pytest.raises(BlockStateError, match="already plugged"):
            region.plug(0, populate=False)


def test_memory_that_cannot_be_given_back_cannot_be_plugged_without() -> None:
    if not probe.makes_secrets(kernel):
        pytest.skip("needs memfd_secret")
    with Region("128K", block_size=BLOCK, backend=Secret()) as region:
        assert not region.can_unplug
        with pytest.raises(UnsupportedError):
            region.plug(0, populate=False)


# ---- scrubbing a part -------------------------------------------------------------------------------


def test_a_scrub_of_some_blocks_leaves_others_tainted(inject: Injector) -> None:
    with Region("1M", block_size=BLOCK, backend=Memfd()) as region:
        region.plug(0, 8)
        for block in (1, 5):
            inject.step(Step.PUNCH, errno=errno.EIO)
            with pytest.raises(DiscardError):
                region.unplug(block)
        assert region.scrub(4, 2) == 1
        assert list(region.tainted_runs()) == [(1, 1)]
        assert region.scrub(2) == 0
        assert region.scrub() == 1
        with pytest.raises(BlockRangeError):
            region.scrub(16)


# ---- files that others use meanwhile ------------------------------------------------------------------


def test_a_file_that_is_trusted_is_not_looked_at() -> None:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 1 << 20)
    os.pwrite(fd, b"x" * PAGE, 3 * BLOCK)
    with Region("1M", block_size=BLOCK, backend=File(fd=fd, existing="trust"), plugged=[(0, 4)]) as region:
        assert region.plugged_blocks == 4
        assert os.fstat(fd).st_blocks * 512 == PAGE
        region.unplug(3)
        assert os.fstat(fd).st_blocks == 0
    assert os.fstat(fd).st_size == 1 << 20
    with pytest.raises(ReserveError, match="not extended"):
        Region("2M", block_size=BLOCK, backend=File(fd=fd, existing="trust"))
    assert os.fstat(fd).st_size == 1 << 20
    os.close(fd)


# ---- the array tricks underneath -------------------------------------------------------------------------

bits = st.lists(st.booleans(), min_size=1, max_size=200)


def runs_of(flags: list[bool]) -> list[tuple[int, int]]:
    return [(i, 1) for i, flag in enumerate(flags) if flag]


@given(bits, st.integers(0, 210), st.integers(0, 210), st.integers(0, 3), st.integers(0, 50))
def test_the_parts_within_a_window(flags: list[bool], first: int, count: int, shift: int, base: int) -> None:
    runs = collect(runs_of(flags), 1 << 20)
    got = [unit for start, n in runs.within(first, count, base=base, shift=shift) for unit in range(start, start + n)]
    inside = [i for i, flag in enumerate(flags) if flag and first <= i < first + count]
    assert got == [(i - first << shift) + base + j for i in inside for j in range(1 << shift)]


@given(bits, st.integers(0, 5))
def test_the_units_that_runs_touch(flags: list[bool], shift: int) -> None:
    widened = collect(runs_of(flags), 1 << 20).widened(shift)
    touched = [unit for start, n in widened for unit in range(start, start + n)]
    assert touched == sorted({i >> shift for i, flag in enumerate(flags) if flag})


@given(bits, bits, st.integers(0, 5))
def test_the_units_that_are_whole(before: list[bool], now: list[bool], shift: int) -> None:
    bitmap = Bitmap(256)
    for first, count in runs_of(before):
        bitmap.set(first, count)
    runs = collect(runs_of(now), 256)
    runs.fill(bitmap, True)
    whole = [unit for start, n in runs.whole(bitmap, shift) for unit in range(start, start + n)]
    present = {i for flags in (before, now) for i, flag in enumerate(flags) if flag}
    touched = {i >> shift for i, flag in enumerate(now) if flag}
    assert whole == sorted(
        unit for unit in touched if all(bit in present for bit in range(unit << shift, (unit + 1) << shift))
    )
    runs.fill(bitmap, False)
    assert bitmap.count(0, 256) == len(present - {i for i, flag in enumerate(now) if flag})


@given(st.lists(st.integers(0, 64), max_size=10), st.integers(0, 6))
def test_whether_all_are_multiples(edges: list[int], shift: int) -> None:
    runs = collect([(3 * 64 * i, edge) for i, edge in enumerate(edges) if edge], 1 << 20)
    assert runs.are_multiples(1 << shift) == all(edge % (1 << shift) == 0 for edge in edges)
