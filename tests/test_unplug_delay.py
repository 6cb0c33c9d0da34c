"""Discards that are put off: what such blocks are meanwhile, and when they are discarded after all."""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sparsemem import (
    Anonymous,
    BackendExhaustedError,
    BlockStateError,
    DeadlineError,
    DiscardError,
    File,
    ListenerVetoError,
    Memfd,
    OperationCancelledError,
    Region,
    RegionClosedError,
    Secret,
    Simulated,
    UnsupportedError,
    engine,
)
from sparsemem.backends import Backend
from sparsemem.blocks import Claim
from sparsemem.recipes import Step
from tests.support import accounting
from tests.support.injector import Injector
from tests.support.overtaking import Overtake
from tests.test_faults import Told

BLOCK = 64 << 10
LONG = 1000.0

KINDS = [
    pytest.param(lambda _: Anonymous(), id="anonymous"),
    pytest.param(lambda _: Anonymous(shared=True), id="anonymous shared"),
    pytest.param(lambda _: Memfd(), id="memfd"),
    pytest.param(lambda _: Memfd(shared=False), id="memfd private"),
    pytest.param(lambda folder: File(folder / "file"), id="file"),
    pytest.param(lambda folder: File(folder / "file", shared=False), id="file private"),
]


def write(region: Region, block: int, value: int) -> None:
    with region.view(block) as view:
        view[:] = bytes([value]) * region.block_size


def pending(region: Region) -> int:
    return region.stats().pending_size // region.block_size


@pytest.mark.parametrize("make", KINDS)
def test_such_blocks_are_unplugged_and_hold_their_memory(make: Callable[[Path], Backend], tmp_path: Path) -> None:
    told = Told()
    with Region("16M", block_size=BLOCK, backend=make(tmp_path), unplug_delay=LONG) as region:
        region.add_listener(told)
        region.plug(0, 8)
        assert region.unplug(2, 4) == 4
        assert told.blocks == {0, 1, 6, 7}
        assert list(region.plugged_runs()) == [(0, 2), (6, 2)]
        with pytest.raises(BlockStateError):
            region.view(3)
        with pytest.raises(BlockStateError):
            region.unplug(3)
        assert region.find_unplugged(3) == 2
        audit = region.audit()
        assert (audit.ok, audit.pending, audit.resident_size) == (True, ((2, 4),), 4 * BLOCK)
        assert "4 blocks pending" in str(audit)
        assert region.stats().pending_size == 4 * BLOCK
        assert region.stats().unplugged_bytes == 4 * BLOCK
        assert region.flush() == 4 * BLOCK
        audit = region.audit()
        assert (audit.ok, audit.pending, audit.resident_size) == (True, (), 4 * BLOCK)
        assert (pending(region), region.flush()) == (0, 0)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("reuse", ["zero", "keep"])
def test_a_replug_cancels_the_discard(make: Callable[[Path], Backend], reuse: str, tmp_path: Path) -> None:
    with Region("16M", block_size=BLOCK, backend=make(tmp_path), unplug_delay=LONG, reuse=reuse) as region:
        region.plug(0, 4)
        for block in range(4):
            write(region, block, 9)
        region.discard(BLOCK, 4096)
        region.unplug(0, 3)
        assert region.plug_runs([(1, 2), (8, 1)]) == 3
        assert pending(region) == 1
        expected = bytes(2 * BLOCK) if reuse == "zero" else bytes(4096) + b"\x09" * (2 * BLOCK - 4096)
        with region.view(1, 2) as view:
            assert view == expected
        with region.view(8) as view:
            assert view == bytes(BLOCK)
        with region.view(3) as view:
            assert view == b"\x09" * BLOCK
        region.flush()
        with region.view(1, 2) as view:
            assert view == expected
        assert region.audit().ok
        assert region.audit().resident_size == 4 * BLOCK


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("how", ["flush", "due"])
def test_a_replug_just_before_the_discard_keeps_its_block(
    make: Callable[[Path], Backend], how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is pending is looked at first and claimed afterwards: another thread may come in between."""
    delay = LONG if how == "flush" else 0.0
    with Region("16M", block_size=BLOCK, backend=make(tmp_path), unplug_delay=delay) as region:
        region.plug(0, 8)
        region.unplug(0, 8)

        class Late(Claim):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                monkeypatch.undo()
                region.plug_runs([(3, 1), (5, 1)])
                write(region, 3, 3)
                write(region, 5, 5)

        monkeypatch.setattr("sparsemem.operations.unplug.Claim", Late)
        if how == "flush":
            assert region.flush() == 6 * BLOCK
        else:
            region.plug(100)
        assert pending(region) == 0
        for block in (3, 5):
            with region.view(block) as view:
                assert view == bytes([block]) * BLOCK
        assert region.audit().ok


def test_a_fit_may_be_of_such_blocks() -> None:
    with Region("1M", block_size=BLOCK, unplug_delay=LONG) as region:
        region.plug(0, 16)
        write(region, 5, 1)
        region.unplug(5)
        assert region.plug_fit(1) == 5
        assert region.view(5)[0] == 0
        assert pending(region) == 0


def test_they_are_discarded_in_one_call_at_the_first_operation_after_that_time() -> None:
    with Region("64M", block_size=4096, unplug_delay=0.05) as region:
        region.plug(0, 4096)
        before = region.stats().system_calls
        for block in range(0, 64, 2):
            region.unplug(block)
        assert pending(region) == 32 or region.stats().system_calls > before  # a slow machine is past it
        time.sleep(0.06)
        region.plug(8192)
        assert pending(region) == 0
        assert region.audit().ok
        assert region.stats().system_calls - before < 32


def test_nothing_happens_by_itself() -> None:
    with Region("1M", block_size=BLOCK, unplug_delay=0.01) as region:
        region.plug(0, 4)
        region.unplug(0, 4)
        time.sleep(0.05)
        assert pending(region) == 4


def test_a_delay_of_nothing_is_the_next_operation() -> None:
    with Region("1M", block_size=BLOCK, unplug_delay=0) as region:
        region.plug(0, 4)
        region.unplug(0)
        assert pending(region) == 1
        region.unplug(1)
        assert pending(region) == 1
        assert region.audit().ok


@pytest.mark.parametrize("how", ["due", "flush"])
def test_what_was_in_other_hands_as_the_rest_was_discarded_is_still_due(how: str) -> None:
    with Region("4M", block_size=BLOCK, unplug_delay=LONG) as region:
        region.plug(0, 5)
        region.unplug_runs([(0, 2), (4, 1)])
        deferral = region._core.deferral
        assert deferral is not None

        class Refusing(Told):
            def on_unplug(self, first: int, count: int) -> None:
                deferral.delay = 0.0
                if how == "due":
                    region.plug(20)
                else:
                    assert (region.flush(), region.flush()) == (BLOCK, 0)  # the second one knows not since when
                assert pending(region) == 2, "blocks 0 and 1 are claimed by this unplug"
                raise LookupError

        refusing = Refusing()
        region.add_listener(refusing)
        with pytest.raises(ListenerVetoError):
            region.unplug(0, 4, missing_ok=True)
        assert pending(region) == 2
        region.plug(30)
        assert pending(region) == 0
        refusing.on_unplug = super(Refusing, refusing).on_unplug  # type: ignore[method-assign]


def test_memory_that_runs_out_is_found_there(tmpfs_mount: Any) -> None:
    folder = tmpfs_mount("1M")
    for headroom in ("check", "off"):
        backend = File(folder / headroom, delete=True)
        with Region("4M", block_size=BLOCK, backend=backend, headroom=headroom, unplug_delay=LONG) as region:
            region.plug(0, 16)
            region.unplug(0, 12)
            assert region.plug(20, 8) == 8
            assert pending(region) == 0
            assert region.plugged_blocks == 12
            with pytest.raises(BackendExhaustedError):
                region.plug(40, 5)
            assert region.audit().ok


def test_a_failure_taints_and_is_told_by_flush(inject: Injector) -> None:
    with Region("1M", block_size=BLOCK, unplug_delay=LONG) as region:
        region.plug(0, 16)
        region.unplug_runs([(2, 1), (5, 2)])
        inject.step(Step.DONTNEED, errno=errno.EIO, nth=2)
        with pytest.raises(DiscardError) as caught:
            region.flush()
        assert (caught.value.discarded, caught.value.tainted) == (((2, 1),), ((5, 2),))
        assert list(region.tainted_runs()) == [(5, 2)]
        assert (pending(region), region.plugged_blocks) == (0, 13)
        with pytest.raises(BlockStateError, match="tainted"):
            region.plug(5)
        assert region.flush() == 0
        assert region.scrub() == 2
        assert region.plug(5) == 1


def test_a_failure_in_passing_is_told_later(inject: Injector) -> None:
    with Region("1M", block_size=BLOCK, unplug_delay=0) as region:
        region.plug(0, 4)
        region.unplug(0)
        inject.step(Step.DONTNEED, errno=errno.EIO)
        assert region.plug(8) == 1
        assert list(region.tainted_runs()) == [(0, 1)]
        with pytest.raises(DiscardError):
            region.flush()
        assert region.flush() == 0
        region.unplug(1)
        inject.step(Step.DONTNEED, errno=errno.EIO)
        with pytest.raises(DiscardError):
            region.close()
        assert not region.closed
        assert region.scrub() == 2


def test_the_users_error_goes_before_a_late_one(inject: Injector) -> None:
    with pytest.raises(KeyError), Region("1M", block_size=BLOCK, unplug_delay=LONG) as region:
        region.plug(0)
        region.unplug(0)
        inject.step(Step.DONTNEED, errno=errno.EIO)
        raise KeyError
    assert region.closed


def test_what_outlives_the_region_is_given_back_as_it_closes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with Region("1M", block_size=BLOCK, backend=File(path), unplug_delay=LONG) as region:
        region.plug(0, 4)
        write(region, 1, 7)
        write(region, 3, 8)
        region.unplug(0, 3)
    data = path.read_bytes()
    assert data[: 3 * BLOCK] == bytes(3 * BLOCK)
    assert data[3 * BLOCK] == 8
    assert accounting.allocated_bytes(path) <= 2 * BLOCK


def test_what_an_unplug_in_flight_leaves_behind_is_given_back_too(tmp_path: Path, overtake: Overtake) -> None:
    path = tmp_path / "file"
    with Region("1M", block_size=BLOCK, backend=File(path), unplug_delay=LONG) as region:
        region.plug(0, 4)
        for block in range(4):
            write(region, block, 7)
        overtake(lambda: region.unplug_runs([(0, 1), (2, 1)]))
    assert path.read_bytes()[: 4 * BLOCK] == (bytes(BLOCK) + b"\x07" * BLOCK) * 2
    assert accounting.allocated_bytes(path) <= 3 * BLOCK
    with Region("1M", block_size=BLOCK, backend=File(path, existing="adopt")) as region:
        assert list(region.plugged_runs()) == [(1, 1), (3, 1)]


def test_a_failure_of_that_is_told_by_close(inject: Injector, overtake: Overtake) -> None:
    told = Told()
    with Region("1M", block_size=BLOCK, unplug_delay=LONG) as region:
        region.add_listener(told)
        region.plug(0, 8)
        overtake(lambda: region.unplug_runs([(0, 1), (2, 1), (4, 1)]))
        inject.step(Step.DONTNEED, errno=errno.EIO, nth=2)
        with pytest.raises(DiscardError) as caught:
            region.close()
        error = caught.value
        assert (error.discarded, error.tainted, error.remaining) == (((0, 1),), ((2, 1),), ((4, 1),))
        assert not region.closed
        assert list(region.tainted_runs()) == [(2, 1)]
        assert (pending(region), told.blocks) == (1, {1, 3, 5, 6, 7})
        assert (region.flush(), region.scrub()) == (BLOCK, 1)
        assert region.audit().ok
    assert (region.closed, told.blocks) == (True, set())


def test_a_close_by_an_error_goes_on_past_such_a_failure(inject: Injector, overtake: Overtake) -> None:
    told = Told()
    with pytest.raises(KeyError), Region("1M", block_size=BLOCK, unplug_delay=LONG) as region:
        region.add_listener(told)
        region.plug(0, 4)
        overtake(lambda: region.unplug(0))
        inject.step(Step.DONTNEED, errno=errno.EIO)
        raise KeyError
    assert (region.closed, told.blocks) == (True, set())


def test_a_close_that_is_refused_has_discarded_it_all_the_same(overtake: Overtake) -> None:
    class Refusing(Told):
        def on_unplug(self, first: int, count: int) -> None:
            if first == 2 and count == 2:
                raise LookupError
            super().on_unplug(first, count)

    with Region("1M", block_size=BLOCK, unplug_delay=LONG) as region:
        region.add_listener(Refusing())
        region.plug_runs([(0, 4)])
        overtake(lambda: region.unplug(0, 2))
        with pytest.raises(ListenerVetoError):
            region.close()
        assert (pending(region), region.plugged_blocks, region.audit().ok) == (0, 2, True)
        region.plug(4)
        assert region.plugged_blocks == 3


def test_a_failed_replug_leaves_such_a_block_discarded_and_unplugged(inject: Injector) -> None:
    with Region("1M", block_size=BLOCK, backend=Anonymous(strategy="populate_write"), unplug_delay=LONG) as region:
        region.plug(0, 4)
        for block in range(4):
            write(region, block, 3)
        region.unplug(0, 4)
        inject.step(Step.ZERO, errno=errno.EFAULT, repeat=9)
        with pytest.raises(OSError, match="Bad address"):
            region.plug(0, 2)
        assert list(region.plugged_runs()) == []
        assert not list(region.tainted_runs())
        inject.clear()
        assert region.audit().ok
        assert region.plug(0, 4) == 4
        with region.view(0, 4) as view:
            assert view == bytes(4 * BLOCK)


def test_it_can_be_watched_and_stopped() -> None:
    told: list[tuple[int, int]] = []
    cancel = threading.Event()
    cancel.set()
    with Region("1G", block_size="2M", unplug_delay=LONG) as region:
        region.plug(0, 8)
        region.unplug(0, 8)
        with pytest.raises(OperationCancelledError):
            region.flush(cancel=cancel)
        assert pending(region) == 8
        assert region.flush(progress=lambda done, total: told.append((done, total))) == 16 << 20
        assert told[-1] == (16 << 20, 16 << 20)
    with pytest.raises(RegionClosedError):
        region.flush()


@pytest.mark.promise("stops-when-told", found="an unplug that is put off told no progress and could not be cancelled")
def test_an_unplug_that_is_put_off_can_be_watched_and_stopped() -> None:
    told = Told()
    seen: list[tuple[int, int]] = []
    cancel = threading.Event()
    size = 4 * BLOCK

    def stop_at(at: int) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            if done == at:
                cancel.set()

        return progress

    with Region("1M", block_size=BLOCK, unplug_delay=LONG) as region:
        region.add_listener(told)
        region.plug(0, 4)
        for at in (0, size):  # even when all of it was told, nothing is unplugged yet
            cancel.clear()
            with pytest.raises(OperationCancelledError) as caught:
                region.unplug(0, 4, cancel=cancel, progress=stop_at(at))
            assert (caught.value.discarded, caught.value.remaining, caught.value.tainted) == ((), ((0, 4),), ())
            assert (pending(region), region.plugged_blocks, told.blocks) == (0, 4, {0, 1, 2, 3})
        with pytest.raises(DeadlineError):
            region.unplug_runs([(0, 1)], deadline=0)
        assert region.unplug(0, 4, progress=lambda *at: seen.append(at)) == 4
        assert seen == [(0, size), (size, size)]
        assert pending(region) == 4


@pytest.mark.promise("stops-when-told", found="with pending blocks a plug told its progress twice, each of a part")
@pytest.mark.parametrize("reuse", ["zero", "keep"])
def test_the_progress_of_a_plug_is_of_all_of_it_pending_or_not(reuse: str) -> None:
    seen: list[tuple[int, int]] = []
    with Region("1M", block_size=BLOCK, unplug_delay=LONG, reuse=reuse) as region:
        region.plug(0, 4)
        region.unplug(0, 4)
        region.plug(0, 8, progress=lambda *at: seen.append(at))
        assert seen == sorted(seen)
        assert {total for _, total in seen} == {8 * BLOCK}
        assert (seen[0][0], seen[-1][0]) == (0, 8 * BLOCK)
        region.unplug(0, 4)
        with pytest.raises(OperationCancelledError, match=f"cancelled after {4 * BLOCK} of {8 * BLOCK} bytes"):
            _cancelled_after(region, 4 * BLOCK)


def _cancelled_after(region: Region, size: int) -> None:
    cancel = threading.Event()
    region.plug_runs([(0, 4), (8, 4)], cancel=cancel, progress=lambda done, _: cancel.set() if done >= size else None)


@pytest.mark.promise("stops-when-told", found="nobody looked at cancel while an operation discarded what was due")
@pytest.mark.parametrize("operation", ["plug", "unplug"])
def test_an_operation_can_be_stopped_while_it_discards_what_is_due(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancel, discards = threading.Event(), []

    def latency(which: str, length: int) -> float:
        if which == "discard":
            discards.append(length)
            cancel.set()
        return 0.0

    monkeypatch.setattr(engine, "SLICE_NS", 0)
    with Region("1G", block_size="16M", backend=Simulated(latency=latency), unplug_delay=0) as region:
        region.plug(0, 16)
        region.unplug(0, 8)
        with pytest.raises(OperationCancelledError) as caught:
            region.plug(20, cancel=cancel) if operation == "plug" else region.unplug(8, 2, cancel=cancel)
        assert len(discards) == 1
        assert (caught.value.discarded, caught.value.tainted) == ((), ())
        assert caught.value.remaining == (((8, 2),) if operation == "unplug" else ())
        assert list(region.plugged_runs()) == [(8, 8)]
        assert pending(region) == 7
        assert region.audit().ok
        region.plug(20)
        assert pending(region) == 0, "the rest is due all the same"


@pytest.mark.parametrize("headroom", ["check", "off"])
def test_an_operation_can_be_stopped_while_it_gives_back_what_is_pending(
    headroom: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancel = threading.Event()

    def latency(which: str, length: int) -> float:
        if which == "discard":
            cancel.set()
        return 0.0

    monkeypatch.setattr(engine, "SLICE_NS", 0)
    backend = Simulated(latency=latency, capacity="128M")
    with Region("1G", block_size="16M", backend=backend, unplug_delay=LONG, headroom=headroom) as region:
        region.plug(0, 8)
        region.unplug(0, 8)
        with pytest.raises(OperationCancelledError):
            region.plug(20, cancel=cancel)
        assert region.plugged_blocks == 0
        assert pending(region) == 7
        assert region.audit().ok


@pytest.mark.parametrize("headroom", ["check", "off"])
def test_populating_within_a_block_finds_memory_there_too(headroom: str) -> None:
    backend = Simulated(capacity="4M")
    with Region("64M", block_size="1M", backend=backend, unplug_delay=LONG, headroom=headroom) as region:
        region.plug(0, 4)
        region.discard(0, 1 << 20)
        region.plug(10)
        region.unplug(2, 2)
        region.populate(0, 1 << 20)
        assert pending(region) == 0
        assert region.audit().ok
        assert region.audit().resident_size == 3 << 20
        region.discard(0, 1 << 20)
        region.plug(20, 2)
        with pytest.raises(BackendExhaustedError):
            region.populate(0, 1 << 20)


def test_populating_within_a_block_discards_what_is_due() -> None:
    with Region("1M", block_size=BLOCK, unplug_delay=0) as region:
        region.plug(0, 4)
        region.unplug(2, 2)
        region.populate(0, BLOCK)
        assert pending(region) == 0


def test_simulated_memory_does_it_too() -> None:
    with Region("1P", block_size="1G", backend=Simulated(capacity="4G"), unplug_delay=LONG) as region:
        region.plug(0, 4)
        region.unplug(0, 4)
        assert region.plug(2) == 1
        assert region.plug(100, 3) == 3
        assert pending(region) == 0
        assert region.audit().ok


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"unplug_delay": -1}, ValueError),
        ({"unplug_delay": math.inf}, ValueError),
        ({"unplug_delay": math.nan}, ValueError),
        ({"unplug_delay": "1"}, TypeError),
        ({"unplug_delay": True}, TypeError),
        ({"reuse": "zeroes"}, ValueError),
        ({"unplug_delay": 1, "fork": "inherit"}, ValueError),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        Region("1M", block_size=BLOCK, **options)


def test_where_it_cannot_be_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "template"
    path.write_bytes(b"x" * (1 << 20))
    with pytest.raises(UnsupportedError, match="template"):
        Region("1M", block_size=BLOCK, backend=File(path, shared=False), unplug_delay=1)
    with pytest.raises(UnsupportedError, match="memfd_secret"):
        Region("64K", block_size=4096, backend=Secret(), unplug_delay=1)


class Machine(RuleBasedStateMachine):
    """Plugs, unplugs and flushes at random, against a dict of what blocks hold."""

    blocks = st.integers(0, 31)

    @initialize(memfd=st.booleans())
    def make(self, memfd: bool) -> None:
        self.region = Region(32 * 4096, block_size=4096, backend=Memfd() if memfd else Anonymous(), unplug_delay=LONG)
        self.holds: dict[int, int] = {}
        self.late: set[int] = set()

    @rule(first=blocks, count=st.integers(1, 8), value=st.integers(1, 255))
    def plug(self, first: int, count: int, value: int) -> None:
        count = min(count, 32 - first)
        self.region.plug(first, count, exist_ok=True)
        for block in range(first, first + count):
            if block not in self.holds:
                with self.region.view(block) as view:
                    assert view == bytes(4096)
                write(self.region, block, value)
                self.holds[block] = value
        self.late -= set(self.holds)

    @rule(first=blocks, count=st.integers(1, 8))
    def unplug(self, first: int, count: int) -> None:
        count = min(count, 32 - first)
        self.region.unplug(first, count, missing_ok=True)
        for block in range(first, first + count):
            if self.holds.pop(block, None) is not None:
                self.late.add(block)

    @rule()
    def flush(self) -> None:
        assert self.region.flush() == 4096 * len(self.late)
        self.late.clear()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "region"):
            return
        assert {n for a, c in self.region.plugged_runs() for n in range(a, a + c)} == set(self.holds)
        audit = self.region.audit()
        assert audit.ok, audit
        assert {n for a, c in audit.pending for n in range(a, a + c)} == self.late
        for block, value in self.holds.items():
            with self.region.view(block) as view:
                assert view == bytes([value]) * 4096

    def teardown(self) -> None:
        if hasattr(self, "region"):
            self.region.close()


TestAgainstAModel = Machine.TestCase
TestAgainstAModel.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
