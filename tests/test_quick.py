"""The short way of a small plug or unplug: taken where nothing stands against it, and no different to be seen."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsemem import (
    Anonymous,
    BackendExhaustedError,
    BlockRangeError,
    BlockStateError,
    Budget,
    DiscardError,
    File,
    ForkedRegionError,
    Memfd,
    PopulateError,
    Region,
    RegionClosedError,
    Secret,
    Simulated,
    UnsupportedError,
    ViewsAliveError,
)
from sparsemem._sys import ffi, lib
from sparsemem.backends import Backend
from sparsemem.errors import Cause
from sparsemem.quick import Quick
from sparsemem.recipes import Step
from tests.support.children import run_child
from tests.test_faults import Told

BLOCK = 64 << 10


def quick(region: Region) -> Quick:
    found = region._core.quick
    assert found is not None
    return found


def fail(region: Region, step: Step, *, of: int = 0, code: int = errno.ENOMEM, nth: int = 1, repeat: int = 1) -> object:
    """Makes a step of the short way's plug (of=0) or discard (of=1) fail; the fault must be kept alive."""
    fault = ffi.new("sm_fault *", (getattr(lib, f"SM_STEP_{step.name}"), nth, repeat, 0, code))
    quick(region).jobs[of].fault = fault
    return fault


def taken(region: Region) -> tuple[float, float]:
    counts = quick(region).counts
    return counts["plugs"], counts["unplugs"]


@pytest.mark.parametrize(
    "make",
    [
        lambda _: Anonymous(),
        lambda _: Anonymous(shared=True),
        lambda _: Memfd(),
        lambda _: Memfd(shared=False),
        lambda folder: File(folder / "file"),
        lambda folder: File(folder / "file", shared=False),
    ],
    ids=["anonymous", "anonymous shared", "memfd", "memfd private", "file", "file private"],
)
def test_one_block_goes_the_short_way_and_is_like_any_other(make: Callable[[Path], Backend], tmp_path: Path) -> None:
    with Region("16M", block_size=BLOCK, backend=make(tmp_path), headroom="off") as region:
        assert (region.plug(3), region.plug(first=7, count=2)) == (1, 2)
        assert list(region.plugged_runs()) == [(3, 1), (7, 2)]
        with region.view(7, 2) as view:
            assert view == bytes(2 * BLOCK)
            view[:] = b"x" * len(view)
        assert region.audit().ok
        assert region.unplug(3) == 1
        assert region.unplug(7) == 1
        assert list(region.plugged_runs()) == [(8, 1)]
        with region.view(8) as view:
            assert view == b"x" * BLOCK
        assert region.plug(7) == 1
        with region.view(7) as view:
            assert view == bytes(BLOCK)
        assert taken(region) == (3, 2)
        stats = region.stats()
        assert (stats.plugs, stats.plugged_bytes) == (3, 4 * BLOCK)
        assert (stats.unplugs, stats.unplugged_bytes) == (2, 2 * BLOCK)
        assert stats.system_calls >= 5
        assert stats.seconds > 0
        assert region.audit().ok


def test_a_stray_write_does_not_survive_it() -> None:
    with Region("1M", block_size=BLOCK, headroom="off") as region:
        region.view()[5 * BLOCK] = 1
        region.plug(5)
        assert region.view(5)[0] == 0
        assert taken(region) == (1, 0)


def test_more_than_a_chunk_goes_the_long_way() -> None:
    with Region("64M", block_size=BLOCK, headroom="off") as region:
        region.plug(0, 33)
        region.unplug(0, 33)
        assert taken(region) == (0, 1)  # a chunk is 2 MiB for a plug and 16 MiB for an unplug
        region.plug(0, 32)
        assert taken(region) == (1, 1)


def test_with_a_listener_there_is_no_short_way_and_without_it_again() -> None:
    told = Told()
    with Region("1M", block_size=BLOCK, headroom="off") as region:
        region.plug(0)
        region.add_listener(told)
        region.plug(1)
        region.unplug(0)
        assert told.blocks == {1}
        region.remove_listener(told)
        region.plug(2)
        assert told.blocks == set()
        assert taken(region) == (2, 0)


def test_a_listener_that_is_refused_leaves_the_short_way_open() -> None:
    class Refusing(Told):
        def on_plug(self, first: int, count: int) -> None:
            raise ValueError("no")

    with Region("1M", block_size=BLOCK, headroom="off") as region:
        region.plug(0)
        with pytest.raises(RuntimeError):
            region.add_listener(Refusing())
        region.plug(1)
        assert taken(region) == (2, 0)


def test_a_budget_is_kept() -> None:
    budget = Budget(BLOCK)
    with Region("1M", block_size=BLOCK, budget=budget) as region:
        region.plug(0)
        with pytest.raises(BackendExhaustedError):
            region.plug(1)
        assert budget.used == BLOCK
        assert taken(region) == (0, 0)


@pytest.mark.parametrize("backend", [Secret(), Simulated()], ids=["secret", "simulated"])
def test_where_c_alone_cannot_do_it_there_is_none(backend: Backend) -> None:
    with Region("256K", block_size=BLOCK, backend=backend) as region:
        assert region._core.quick is None
        assert region.plug(0) == 1
        if isinstance(backend, Secret):
            with pytest.raises(UnsupportedError):
                region.unplug(0)


@pytest.mark.parametrize(
    ("first", "count"),
    [(16, 1), (15, 2), (-1, 1), (0, 0), (0, -1), (1 << 63, 1), (0, 1 << 63), (-(1 << 70), 1), ((1 << 63) - 1, 1)],
)
def test_a_range_that_is_wrong_is_refused_in_the_same_words(first: int, count: int) -> None:
    with Region("1M", block_size=BLOCK, headroom="off") as region:
        for method in (region.plug, region.unplug):
            with pytest.raises(BlockRangeError, match=r"are not all within 0 to 15|is not positive|is out of range"):
                method(first, count)
        assert taken(region) == (0, 0)


def test_a_state_that_is_wrong_is_refused_in_the_same_words() -> None:
    with Region("1M", block_size=BLOCK, headroom="off") as region:
        region.plug(1)
        with pytest.raises(BlockStateError, match="block 1 is already plugged"):
            region.plug(0, 2)
        with pytest.raises(BlockStateError, match="block 0 is not plugged"):
            region.unplug(0, 2)
        view = region.view(1)
        with pytest.raises(ViewsAliveError):
            region.unplug(1)
        view.release()
        assert region.plug(0, 2, exist_ok=True) == 1
        assert list(region.plugged_runs()) == [(0, 2)]
    with pytest.raises(RegionClosedError):
        region.plug(5)


def test_a_populate_that_fails_once_is_undone_and_done_again() -> None:
    with Region("1M", block_size=BLOCK, backend=Anonymous(strategy="populate_write"), headroom="off") as region:
        fault = fail(region, Step.POPULATE_WRITE)
        assert region.plug(0) == 1  # on the long way
        assert fault.repeat == 0  # type: ignore[attr-defined]
        assert taken(region) == (0, 0)
        assert region.audit().ok


def test_what_is_really_exhausted_is_told_by_the_long_way(tmpfs_mount: Callable[[str], Path]) -> None:
    with Region("1M", block_size=BLOCK, backend=File(tmpfs_mount("256K") / "file"), headroom="off") as region:
        for block in range(4):
            region.plug(block)
        with pytest.raises(BackendExhaustedError) as caught:
            region.plug(4)
        assert caught.value.cause is Cause.TMPFS_FULL
        assert caught.value.rolled_back
        assert taken(region) == (4, 0)
        assert region.unplug(0) == 1
        assert region.plug(4) == 1
        assert region.audit().ok


def test_a_rollback_that_fails_taints_the_block() -> None:
    with Region("1M", block_size=BLOCK, backend=Anonymous(strategy="populate_write"), headroom="off") as region:
        faults = [fail(region, Step.POPULATE_WRITE), fail(region, Step.DONTNEED, of=1, code=errno.EIO)]
        with pytest.raises(PopulateError) as caught:
            region.plug(3, 2)
        assert (caught.value.errno, caught.value.rolled_back, caught.value.offset) == (errno.ENOMEM, False, 3 * BLOCK)
        assert list(region.tainted_runs()) == [(3, 2)]
        assert region.plugged_size == 0
        with pytest.raises(BlockStateError, match="tainted"):
            region.plug(3)
        assert region.scrub() == 2
        assert region.plug(3, 2) == 2
        stats = region.stats()
        assert (stats.failures, stats.rollbacks, stats.plugs) == (1, 1, 1)
        del faults


def test_an_unplug_that_fails_taints_the_block_which_stays_plugged() -> None:
    with Region("1M", block_size=BLOCK, headroom="off") as region:
        region.plug(0, 4)
        fault = fail(region, Step.DONTNEED, of=1, code=errno.EIO)
        with pytest.raises(DiscardError) as caught:
            region.unplug(1, 2)
        error = caught.value
        assert (error.errno, error.discarded, error.tainted, error.remaining) == (errno.EIO, (), ((1, 2),), ())
        assert (list(region.plugged_runs()), list(region.tainted_runs())) == ([(0, 4)], [(1, 2)])
        assert region.scrub() == 2
        assert list(region.plugged_runs()) == [(0, 1), (3, 1)]
        assert region.stats().failures == 1
        del fault


def test_headroom_that_is_used_up_is_read_again_and_refuses(tmpfs_mount: Callable[[str], Path]) -> None:
    with Region("4M", block_size=BLOCK, backend=File(tmpfs_mount("1M") / "file")) as region:
        with pytest.raises(BackendExhaustedError, match="refused up front"):
            for block in range(64):
                region.plug(block)
        assert region.plugged_size == 1 << 20
        assert taken(region)[0] >= 8
        assert region.audit().ok


def test_it_waits_for_blocks_that_somebody_else_holds() -> None:
    class Slow(Told):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.go_on = threading.Event(), threading.Event()

        def on_unplug(self, first: int, count: int) -> None:
            super().on_unplug(first, count)
            self.inside.set()
            assert self.go_on.wait(20)

    slow = Slow()
    with Region("1M", block_size=BLOCK, headroom="off") as region:
        region.plug(3)
        region.add_listener(slow)
        other = threading.Thread(target=region.unplug, args=(3,))
        other.start()
        assert slow.inside.wait(20)
        region._core.blocks.watch(False)  # so that the held block alone bars the short way
        threading.Timer(0.1, slow.go_on.set).start()
        assert region.plug(3) == 1
        other.join()
        assert list(region.plugged_runs()) == [(3, 1)]
        region.remove_listener(slow)


def test_many_threads_leave_a_state_that_is_right() -> None:
    with Region("4M", block_size=4096) as region:
        mine: list[set[int]] = [set() for _ in range(4)]

        def work(seed: int) -> None:
            dice, held = random.Random(seed), mine[seed]
            for _ in range(3000):
                block = dice.randrange(256) * 4 + seed
                if block in held:
                    region.unplug(block)
                    held.discard(block)
                else:
                    region.plug(block)
                    held.add(block)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        held = set().union(*mine)
        assert {block for first, count in region.plugged_runs() for block in range(first, first + count)} == held
        assert region.plugged_blocks == len(held)
        assert region.stats().plugs + region.stats().unplugs == 12000
        assert region.stats().busy_size == 0
        assert region.audit().ok


@pytest.mark.parametrize("mode", ["refuse", "inherit"])
def test_a_child_is_refused_or_goes_on(mode: str) -> None:
    with Region("1M", block_size=BLOCK, fork=mode) as region:
        region.plug(0)

        def child() -> int:
            if mode == "refuse":
                with pytest.raises(ForkedRegionError):
                    region.plug(1)
                return 0
            assert region.plug(1) == 1
            return region.view(1)[0]

        assert run_child(child).result() == 0
        assert list(region.plugged_runs()) == [(0, 1)]
