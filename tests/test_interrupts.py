"""KeyboardInterrupt at every single bytecode of an operation, one after the other.

After each the state is that before or that after (an unplug may stop half way, and says so), nothing is held, what
listeners were told equals the bitmap, the bitmap equals the memory, and the region works on.
"""

from __future__ import annotations

import errno
import gc
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

import sparsemem
from sparsemem import Anonymous, Memfd, Region, Simulated, SparseMemError
from sparsemem.backends import Backend, Fault
from sparsemem.backends.simulated import SimulatedMapping

pytestmark = pytest.mark.promise("interrupt-safe")

MODULES = ("region", "advice", "listeners", "blocks", "engine")
OPERATIONS = ("operation", "plug", "unplug", "relief", "resize", "inner", "whole")
FILES = {
    *(sys.modules[f"sparsemem.{name}"].__file__ for name in MODULES),
    *(sys.modules[f"sparsemem.operations.{name}"].__file__ for name in OPERATIONS),
}
assert sparsemem
BLOCK = 64 << 10
PLUGGED = {0, 1, 6, 7}


class Told:
    def __init__(self) -> None:
        self.blocks: set[int] = set()
        self.twice: list[str] = []

    def on_plug(self, first: int, count: int) -> None:
        self._note("plug", self.blocks & set(range(first, first + count)))
        self.blocks |= set(range(first, first + count))

    def on_unplug(self, first: int, count: int) -> None:
        self._note("unplug", set(range(first, first + count)) - self.blocks)
        self.blocks -= set(range(first, first + count))

    def _note(self, what: str, blocks: set[int]) -> None:
        if blocks:
            self.twice.append(f"{what} of {blocks}")


class Refusing(Told):
    def on_plug(self, first: int, count: int) -> None:
        raise LookupError


def interrupted(operation: Callable[[], Any], n: int, event: str, again: int = 0) -> bool:
    """Runs it with an interrupt at the nth event in the modules, and `again` events later; whether it came that far."""
    count = 0

    def trace(frame: FrameType, what: str, _: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in FILES or frame.f_code.co_name in ("__del__", "audit"):
            return None
        frame.f_trace_opcodes = event == "opcode"
        if what == event:
            count += 1
            if count == n or (again and count == n + again):
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        operation()
    except KeyboardInterrupt:
        return True
    except SparseMemError:
        pass
    finally:
        sys.settrace(None)
    return False


def plugged(region: Region) -> set[int]:
    return {block for first, count in region.plugged_runs() for block in range(first, first + count)}


OPERATIONS: dict[str, tuple[Callable[[Region], Any], set[int]]] = {
    "plug": (lambda r: r.plug(2, 3), PLUGGED | {2, 3, 4}),
    "plug without memory": (lambda r: r.plug(2, 3, populate=False), PLUGGED | {2, 3, 4}),
    "plug exist_ok": (lambda r: r.plug(0, 10, exist_ok=True), set(range(10))),
    "plug_runs": (lambda r: r.plug_runs([(9, 1), (3, 2)]), PLUGGED | {3, 4, 9}),
    "plug_fit": (lambda r: r.plug_fit(3), PLUGGED | {2, 3, 4}),
    "unplug": (lambda r: r.unplug(0, 2), {6, 7}),
    "unplug_runs": (lambda r: r.unplug_runs([(0, 1), (6, 2)]), {1}),
    "unplug_all": (lambda r: r.unplug_all(), set()),
    "grow": (lambda r: r.resize(6 * BLOCK), PLUGGED | {2, 3}),
    "shrink": (lambda r: r.resize(BLOCK), {0}),
    "discard": (lambda r: r.discard(4096, 8192), PLUGGED),
    "discard_runs": (lambda r: r.discard_runs([(4096, 8192), (3 * BLOCK, 4096)], missing_ok=True), PLUGGED),
    "populate": (lambda r: r.populate(4096, 8192), PLUGGED),
    "view": (lambda r: r.view(0).release(), PLUGGED),
    "add_listener": (lambda r: r.add_listener(Told()), PLUGGED),
    "remove_listener": (lambda r: r.remove_listener(r._core.listeners[0]), PLUGGED),
    "scrub": (lambda r: r.scrub(), PLUGGED),
    "close": (lambda r: r.close(), PLUGGED),
}


def check(region: Region, told: Told, before: set[int], after: set[int], n: int) -> None:
    counts = region._core.blocks.counts()
    if isinstance(region._core.mapping, SimulatedMapping):
        region._core.mapping._backend = Simulated()  # faults were for the operation, not for looking afterwards
    assert (counts.claims, counts.busy, counts.pins) == (0, 0, 0), f"event {n}: something is still held"
    now = plugged(region)
    shrinking = after < before
    assert now in (before, after) or (shrinking and after <= now <= before), f"event {n}: {now}"
    if region._core.blocks.is_open:
        assert not list(region.tainted_runs()), f"event {n}: tainted"
        assert region.audit().ok, f"event {n}: {region.audit()}"
        if told in region._core.listeners:
            assert told.blocks == now, f"event {n}: the listener was told otherwise"
        assert not told.twice, f"event {n}: told twice: {told.twice}"
        region.unplug_all()
        region.plug(0, 16)
    region.close()


def every_interrupt(
    make: Callable[[], tuple[Region, Told]], operation: Callable[[Region], Any], after: set[int], event: str
) -> int:
    n = 0
    while True:
        n += 1
        region, told = make()
        before = plugged(region)
        came = interrupted(lambda: operation(region), n, event)  # noqa: B023 - called at once
        check(region, told, before, after, n)
        if not came:
            return n


def maker(backend: Backend) -> Callable[[], tuple[Region, Told]]:
    def make() -> tuple[Region, Told]:
        region, told = Region("1M", block_size=BLOCK, backend=backend), Told()
        region.plug_runs([(0, 2), (6, 2)])
        region.add_listener(told)
        return region, told

    return make


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_interrupt_at_every_line(name: str) -> None:
    operation, after = OPERATIONS[name]
    assert every_interrupt(maker(Memfd()), operation, after, "line") > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_interrupt_at_every_bytecode(name: str) -> None:
    operation, after = OPERATIONS[name]
    assert every_interrupt(maker(Anonymous()), operation, after, "opcode") > 20


@pytest.mark.parametrize("event", ["line", pytest.param("opcode", marks=pytest.mark.slow)])
def test_an_interrupt_in_the_handling_of_a_failure(event: str) -> None:
    """The populate fails in its third block; the interrupt comes while that is rolled back."""
    backend = Simulated(faults=[Fault("populate", nth=5, errno=errno.EIO, after=4096)])
    every_interrupt(maker(backend), lambda r: r.plug_runs([(2, 1), (4, 1), (9, 2)]), PLUGGED, event)


FAILING: dict[str, tuple[Callable[[Region], Any], Fault]] = {
    "grow": (lambda r: r.resize(9 * BLOCK), Fault("populate", nth=4, after=4096)),
    "plug_fit": (lambda r: r.plug_fit(4), Fault("populate", nth=3, after=4096)),
    "exist_ok": (lambda r: r.plug(0, 12, exist_ok=True), Fault("populate", nth=4, after=4096)),
    "populate": (lambda r: r.populate(0, 2 * BLOCK), Fault("populate", nth=3, after=4096)),
}


@pytest.mark.parametrize("name", FAILING)
def test_an_interrupt_at_every_line_of_what_fails(name: str) -> None:
    operation, fault = FAILING[name]
    assert every_interrupt(maker(Simulated(faults=[fault])), operation, PLUGGED, "line") > 20


@pytest.mark.parametrize("nth", [1, 2])
def test_an_interrupt_at_every_line_of_an_unplug_that_fails(nth: int) -> None:
    """What was asked for may have happened, in part and with taint; but told, bitmap and memory agree."""
    make = maker(Simulated(faults=[Fault("discard", nth=nth, errno=errno.EIO, after=4096)]))
    n, came, tainted = 0, True, set()
    while came:
        n += 1
        region, told = make()
        came = interrupted(lambda: region.unplug_runs([(0, 2), (6, 2)]), n, "line")  # noqa: B023 - called at once
        counts = region._core.blocks.counts()
        assert (counts.claims, counts.busy) == (0, 0), f"event {n}"
        assert told.blocks == plugged(region) <= PLUGGED, f"event {n}"
        assert not told.twice, f"event {n}: {told.twice}"
        tainted = {block for first, count in region.tainted_runs() for block in range(first, first + count)}
        assert tainted <= plugged(region), f"event {n}: a failed unplug leaves blocks plugged"
        region._core.mapping._backend = Simulated()  # an interrupt may have come before the fault
        region.scrub()
        assert told.blocks == plugged(region) == plugged(region) - tainted, f"event {n}: scrub() unplugs them"
        assert region.audit().ok, f"event {n}: {region.audit()}"
        region.unplug_all()
        assert region.plug(0, 16) == 16
        region.close()
    assert n > 20
    assert tainted == ({0, 1} if nth == 1 else {6, 7}), "without an interrupt it failed"


@pytest.mark.parametrize("name", ["plug_runs", "unplug_runs", "grow", "discard", "close"])
def test_two_interrupts_leave_at_most_tainted_blocks(name: str) -> None:
    """The second one comes while the first one is dealt with: whatever it hits, nothing stays held."""
    operation, after = OPERATIONS[name]
    for n in range(1, 400):
        for more in (1, 2, 3, 5, 8, 13):
            region, _ = maker(Simulated())()
            before = plugged(region)
            came = interrupted(lambda: operation(region), n, "line", again=more)  # noqa: B023 - called at once
            counts = region._core.blocks.counts()
            if counts.claims or counts.pins:
                gc.collect()  # a traceback may hold what was cut off, for as long as it lives
                counts = region._core.blocks.counts()
            assert (counts.claims, counts.busy, counts.pins) == (0, 0, 0), f"events {n} and {more} more"
            tainted = {block for first, count in region.tainted_runs() for block in range(first, first + count)}
            assert plugged(region) ^ before <= before ^ after, f"events {n} and {more} more"
            if region._core.blocks.is_open:
                assert tainted <= before | after, f"events {n} and {more} more"
                region._core.listeners = ()  # what they were told may be wrong now, as the taint says
                region.scrub()
                region.unplug_all()
                assert region.audit().ok, f"events {n} and {more} more: {region.audit()}"
                assert region.plug(0, 16) == 16
            region.close()
            if not came:
                return
    raise AssertionError("the operation never ended")


@pytest.mark.parametrize("event", ["line", pytest.param("opcode", marks=pytest.mark.slow)])
def test_an_interrupt_in_the_handling_of_a_veto(event: str) -> None:
    def make() -> tuple[Region, Told]:
        region, told = maker(Anonymous())()
        region._core.listeners = (*region._core.listeners, Refusing())
        return region, told

    def again(region: Region) -> None:
        try:
            region.plug(2, 3)
        finally:
            region._core.listeners = region._core.listeners[:1]

    every_interrupt(make, again, PLUGGED, event)


@pytest.mark.parametrize("thp", [None, False])
def test_ctrl_c_ends_a_plug_of_many_gigabytes_and_leaves_nothing(thp: bool | None) -> None:
    size = 6 << 30
    with Region("1T", backend=Anonymous(thp=thp), headroom="off") as region:
        timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
        old = signal.signal(signal.SIGINT, signal.default_int_handler)
        timer.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                region.resize(size)
                raise AssertionError("the plug was faster than the signal")
        finally:
            timer.cancel()
            timer.join()
            signal.signal(signal.SIGINT, old)
        assert region.plugged_size == 0
        audit = region.audit()
        assert audit.ok
        assert audit.resident_size == 0
        assert region.stats().busy_size == 0
        assert region.plug(0, 4) == 4
