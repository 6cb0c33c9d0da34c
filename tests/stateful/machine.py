"""Drives a region of any kind with every operation, and compares it with a dict after each step.

What may be chosen when a region is made (headroom, fork, late discards, a warm pool, a budget, faults) is drawn for each
example. Where an outcome is not determined (threads, a failed discard), what came of it must be one of those allowed, and
the model is brought in line with it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sparsemem import (
    AdviceError,
    BackendExhaustedError,
    BlockStateError,
    Budget,
    DiscardError,
    File,
    ForkedRegionError,
    HugePageSplitWarning,
    ListenerVetoError,
    Memfd,
    OperationCancelledError,
    PopulateError,
    Region,
    Simulated,
    UnsupportedError,
    ViewsAliveError,
)
from sparsemem._sys import calls as calls_module
from sparsemem.backends import Fault
from sparsemem.recipes import STRATEGIES, Step
from tests.stateful.model import FRESH, Cells, Model
from tests.support.children import run_child
from tests.support.evidence import STEPS
from tests.support.injector import Injector
from tests.support.kinds import Made

LONG = 1000.0
SMALL = 16 << 10
_POPULATE_CODES = (errno.ENOMEM, errno.EFAULT, errno.ENOSPC, errno.EIO)
_DISCARD_CODES = (errno.EIO, errno.ENOMEM, errno.EPERM)

first_blocks = st.integers(0, 23)
counts = st.integers(1, 6)
values = st.integers(1, 255)
fits = st.sampled_from(["first", "last", "best"])


class Witness:
    """A listener that keeps what it was told, and refuses when it is to."""

    def __init__(self) -> None:
        self.blocks: set[int] = set()
        self.refuses: str | None = None

    def on_plug(self, first: int, count: int) -> None:
        self._hear("plug")
        run = set(range(first, first + count))
        assert not run & self.blocks, "told twice of a plug"
        self.blocks |= run

    def on_unplug(self, first: int, count: int) -> None:
        self._hear("unplug")
        run = set(range(first, first + count))
        assert run <= self.blocks, "told of an unplug of what was never plugged"
        self.blocks -= run

    def _hear(self, event: str) -> None:
        if self.refuses == event:
            self.refuses = None  # the announcements that undo it are heard
            raise LookupError(event)


class RegionMachine(RuleBasedStateMachine):
    """One region after the other of a kind, against a `Model`.

    Attributes:
        made: The kind, and the backend to make regions of.
        capacity: Bytes that the backend has, where that is less than the region's size.
        again: Whether an existing file is there from the start (adopted, or a template).
    """

    made: ClassVar[Made]
    capacity: ClassVar[int | None] = None

    # ---- making -------------------------------------------------------------------------

    @initialize(
        faulty=st.booleans(),
        headroom=st.sampled_from(["check", "off"]),
        inherit=st.booleans(),
        late=st.sampled_from([None, None, "zero", "keep"]),
        warm=st.booleans(),
        budget=st.booleans(),
        strategy=st.sampled_from(STRATEGIES),
    )
    def make(
        self, faulty: bool, headroom: str, inherit: bool, late: str | None, warm: bool, budget: bool, strategy: str
    ) -> None:
        kind = self.made.kind
        self.block = SMALL if kind.block_size == 64 << 10 else kind.block_size
        self.nblocks = 24 if self.block <= SMALL else 8
        self.cells = 1 if kind.huge or self.block == 4096 else 4
        self.cell = self.block // self.cells
        self.injector = Injector() if faulty and kind.has_memory else None
        private_huge = kind.huge and not kind.shared_file
        self.options: dict[str, Any] = {
            "headroom": headroom,
            "fork": "inherit" if inherit and not private_huge else "refuse",
            "budget": Budget(self.nblocks * self.block * 2 // 3) if budget else None,
        }
        if late and kind.discards and "template" not in kind.id:
            self.options |= {"unplug_delay": LONG, "reuse": late, "fork": "refuse"}
        elif warm and kind.id.startswith("anonymous private"):
            self.options["warm"] = 2 * self.block
        self.backend = self.made.backend
        if strategy != "auto" and hasattr(self.backend, "strategy"):
            self.backend = attrs.evolve(self.backend, strategy=strategy)  # type: ignore[misc]
        self.model = Model(self.nblocks, self.cells)
        self.witness: Witness | None = None
        self.pins: list[tuple[memoryview, int]] = []
        self.kept_fd = -1
        self.late_failure = False
        self.counter = 0
        self.untold = 0
        try:
            self.region = self._open()
        except UnsupportedError:  # the kind has no such strategy, or the kernel no UFFDIO_MOVE
            self.options.pop("warm", None)
            self.backend = self.made.backend
            self.region = self._open()
        note(f"{kind.id}: {self.region!r} {self.options}")

    def _open(self, **options: Any) -> Region:
        with self._kernel():
            return Region(
                self.nblocks * self.block, block_size=self.block, backend=self.backend, **{**self.options, **options}
            )

    @contextlib.contextmanager
    def _kernel(self) -> Iterator[None]:
        """The injector in the kernel's place, as long as a region is made."""
        before = calls_module.kernel
        try:
            if self.injector is not None:
                calls_module.kernel = self.injector
            yield
        finally:
            calls_module.kernel = before

    def teardown(self) -> None:
        if not hasattr(self, "region"):
            return
        for view, _ in self.pins:
            view.release()
        self._clear_faults()
        if self.witness is not None:
            self.witness.refuses = None
        if self.made.kind.discards:
            self.region.scrub()
            self.region.unplug_all()
        self._close()
        self._remove_file()
        if self.kept_fd >= 0:
            os.close(self.kept_fd)

    def _close(self) -> None:
        try:
            self.region.close()
        except DiscardError:  # kept from an earlier late discard that failed
            assert self.late_failure
            self.region.scrub()
            self.region.close()
        self.late_failure = False

    def _remove_file(self) -> None:
        backend = self.made.backend
        if isinstance(backend, File) and backend.path and not self._was_there:
            Path(backend.path).unlink(missing_ok=True)

    @property
    def _was_there(self) -> bool:
        return "template" in self.made.kind.id or "adopted" in self.made.kind.id

    # ---- helpers ------------------------------------------------------------------------

    def _run(self, first: int, count: int) -> tuple[int, int]:
        first %= self.nblocks
        return first, min(count, self.nblocks - first)

    def _blocks(self, runs: Iterable[tuple[int, int]]) -> set[int]:
        return {block for first, count in runs for block in range(first, first + count)}

    @property
    def _views(self) -> bool:
        return self.made.kind.has_memory

    @property
    def _late(self) -> bool:
        return "unplug_delay" in self.options

    def _room(self, blocks: int) -> bool:
        """Whether the backend and the budget have so many blocks more."""
        budget = self.options["budget"]
        if budget is not None and budget.available < blocks * self.block:
            return False
        if self.capacity is None:
            return True
        kept = self.model.resident_cells - len(self.model.pending) * self.cells + len(self.model.pending_discarded)
        return kept * self.cell + blocks * self.block <= self.capacity

    def _expected(self, value: int | None, length: int, offset: int) -> bytes:
        if value is not FRESH:
            return bytes([value]) * length
        whole = self.made.kind.fresh(8 + length)
        return whole[offset % 8 : offset % 8 + length]

    def _check_cells(self, view: memoryview, cells: Cells, skip: set[int], base: int = 0) -> None:
        """No slice is given a name: a traceback would keep it, and so the pin."""
        for cell, value in enumerate(cells):
            if cell in skip:
                continue
            start, end = base + cell * self.cell, base + (cell + 1) * self.cell
            if self.cell <= SMALL:
                same = bytes(view[start:end]) == self._expected(value, self.cell, 0)
            else:  # the first bytes of every 8th page, and the last byte
                expected = self._expected(value, 8, 0)
                same = all(bytes(view[at : at + 8]) == expected for at in range(start, end, 8 * 4096))
                same = same and view[end - 1] == expected[7]
            assert same, f"cell {cell} is not {value}"

    def _write(self, block: int, cells: Iterable[int], view: memoryview | None = None) -> None:
        if not self._views:
            return
        held = self.region.view(block) if view is None else view
        for cell in cells:
            self.counter = self.counter % 255 + 1
            held[cell * self.cell : (cell + 1) * self.cell] = bytes([self.counter]) * self.cell
            self.model.plugged[block][cell] = self.counter
            self.model.discarded.discard((block, cell))
        if view is None:
            held.release()

    def _plugged_now(self, blocks: Iterable[int]) -> None:
        """A plug of these blocks succeeded: they are fresh, or what they held if that is to be kept."""
        for block in sorted(blocks):
            held = self.model.pending.get(block)
            self.model.plug([block])
            if not self._views:
                continue
            with self.region.view(block) as view:
                if held is not None and self.options.get("reuse") == "keep":
                    # Or zero, if the discard came first; all of it or none.
                    if any(value is not FRESH for value in held) and not any(view[:: self.cell]):
                        held = [FRESH] * self.cells
                    self.model.plugged[block] = list(held)
                self._check_cells(view, self.model.plugged[block], set())
            # One cell is written and the rest left fresh: both must survive what comes.
            self._write(block, [block % self.cells])

    def _settle_pending(self, new: Iterable[int] = ()) -> None:
        """What is pending may have been discarded on the way, because memory was short; `new` was plugged."""
        still, new = self._blocks(self.region.audit().pending), set(new)
        assert not still & new
        assert still <= self.model.pending.keys()
        self.model.flush(self.model.pending.keys() - still - new)

    def _settle_taint(self, allowed: Iterable[int], new: Iterable[int] = ()) -> None:
        """Discards have failed: what is tainted now must be among these blocks, or pending before."""
        tainted = self._blocks(self.region.tainted_runs())
        fresh = tainted - self.model.tainted
        late = fresh & self.model.pending.keys()
        assert fresh <= set(allowed) | late, f"tainted: {sorted(fresh)}"
        self.late_failure = self.late_failure or bool(late)
        self.model.taint(fresh)
        self._settle_pending(new)

    def _fault(self, step: Step | None, code: int, nth: int, after: int, operation: str) -> None:
        """Makes a step fail, by whatever can do that here."""
        if not self._views:
            mapping: Any = self.region._core.mapping
            calls = mapping._calls[operation]
            faults = (*mapping._backend.faults, Fault(operation, nth=calls + nth, errno=code, after=after))
            mapping._backend = attrs.evolve(mapping._backend, faults=faults)
        elif self.injector is not None:
            assert step is not None
            self.injector.step(step, errno=code, nth=nth, after=after)

    def _clear_faults(self) -> None:
        if self.injector is not None:
            self.injector.clear()
        if not self._views:
            mapping: Any = self.region._core.mapping
            mapping._backend = attrs.evolve(mapping._backend, faults=())

    def _steps(self, operation: str) -> list[Step | None]:
        if not self._views:
            return [None]
        mapping: Any = self.region._core.mapping
        if operation == "discard":
            return list(mapping.recipe.discard)
        return list(mapping.recipe.populate(mapping.strategy, huge=mapping.huge, warm="warm" in self.options))

    @property
    def _can_fail(self) -> bool:
        return self.injector is not None or not self._views

    # ---- plugging -----------------------------------------------------------------------

    def _plug(self, wanted: set[int], call: Callable[[], Any], *, lenient: bool = False) -> None:
        """A plug with the outcome that the model says."""
        new = wanted - self.model.plugged.keys()
        if wanted & self.model.tainted or (not lenient and len(new) < len(wanted)):
            with pytest.raises(BlockStateError):
                call()
            return
        if new and not self._room(len(new)):
            with pytest.raises(BackendExhaustedError) as caught:
                call()
            assert caught.value.rolled_back
            self._settle_pending()
            return
        if new and self.witness is not None and self.witness.refuses == "plug":
            with pytest.raises(ListenerVetoError):
                call()
            # What was pending and populated again has been discarded with the rest.
            self._settle_pending()
            if not self.made.kind.discards:
                self._settle_taint(new)
            return
        assert call() == len(new)
        self._settle_pending(new)
        self._plugged_now(new)

    @rule(first=first_blocks, count=counts, lenient=st.booleans())
    def plug(self, first: int, count: int, lenient: bool) -> None:
        first, count = self._run(first, count)
        wanted = set(range(first, first + count))
        self._plug(wanted, lambda: self.region.plug(first, count, exist_ok=lenient), lenient=lenient)

    def _some_runs(self, among: Iterable[int], blocks: list[int]) -> list[tuple[int, int]]:
        chosen = sorted({block % self.nblocks for block in blocks} & set(among))
        runs: list[tuple[int, int]] = []
        for block in chosen:
            if runs and sum(runs[-1]) == block and block % 3:  # runs that touch stay two now and then
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((block, 1))
        return runs[::-1]

    @rule(blocks=st.lists(first_blocks, min_size=1, max_size=10), lenient=st.booleans(), as_array=st.booleans())
    def plug_runs(self, blocks: list[int], lenient: bool, as_array: bool) -> None:
        runs: Any = self._some_runs(range(self.nblocks) if lenient else self.model.free, blocks)
        if not runs:
            return
        wanted = self._blocks(runs)
        if as_array:
            flat = memoryview(b"".join(n.to_bytes(8, "little") for run in runs for n in run))
            runs = flat.cast("Q", (len(runs), 2))
        self._plug(wanted, lambda: self.region.plug_runs(runs, exist_ok=lenient), lenient=lenient)

    @rule(count=counts, align=st.sampled_from([1, 2, 4]), fit=fits)
    def plug_fit(self, count: int, align: int, fit: str) -> None:
        found = self.region.find_unplugged(count, align=align, fit=fit)
        if found is None:
            assert self.region.plug_fit(count, align=align, fit=fit) is None
            return
        assert found % align == 0

        def call() -> int:
            assert self.region.plug_fit(count, align=align, fit=fit) == found
            return count

        self._plug(set(range(found, found + count)), call)

    @rule(blocks=st.integers(0, 24))
    def resize(self, blocks: int) -> None:
        blocks = min(blocks, self.nblocks)
        change = blocks - len(self.model.plugged)
        call = lambda: self.region.resize(blocks * self.block) // self.block  # noqa: E731
        if change > len(self.model.free):
            with pytest.raises(BlockStateError, match="tainted"):
                call()
        elif change >= 0:
            self._plug(set(self.model.free[:change]), call)
        else:
            self._unplug(set(sorted(self.model.plugged)[change:]), lambda: -call())

    # ---- unplugging ---------------------------------------------------------------------

    def _unplug(self, wanted: set[int], call: Callable[[], Any], *, lenient: bool = False) -> None:
        """An unplug with the outcome that the model says."""
        gone = wanted & self.model.plugged.keys()
        if not self.made.kind.discards:
            if gone or not wanted:
                with pytest.raises(UnsupportedError):
                    call()
            return
        if not lenient and gone < wanted:
            with pytest.raises(BlockStateError):
                call()
            return
        if wanted & {block for _, block in self.pins}:
            with pytest.raises(ViewsAliveError):
                call()
            return
        if gone and self.witness is not None and self.witness.refuses == "unplug":
            with pytest.raises(ListenerVetoError):
                call()
            return
        # Nothing is put off where a block in the range is tainted.
        later = self._late and not wanted & self.model.tainted
        assert call() == len(gone)
        self.model.tainted -= gone
        self.model.unplug(gone, later=later)

    @rule(first=first_blocks, count=counts, lenient=st.booleans())
    def unplug(self, first: int, count: int, lenient: bool) -> None:
        first, count = self._run(first, count)
        wanted = set(range(first, first + count))
        self._unplug(wanted, lambda: self.region.unplug(first, count, missing_ok=lenient), lenient=lenient)

    @rule(blocks=st.lists(first_blocks, min_size=1, max_size=10))
    def unplug_runs(self, blocks: list[int]) -> None:
        if runs := self._some_runs(self.model.plugged, blocks):
            self._unplug(self._blocks(runs), lambda: self.region.unplug_runs(runs))

    @rule()
    def unplug_all(self) -> None:
        self._unplug(set(range(self.nblocks)), self.region.unplug_all, lenient=True)

    @precondition(lambda self: self._late)
    @rule()
    def flush(self) -> None:
        size = (len(self.model.pending) * self.block) if self.model.pending else 0
        try:
            assert self.region.flush() == size
        except DiscardError:
            assert self.late_failure
            self.late_failure = False
        self.model.flush()

    @precondition(lambda self: "warm" in self.options)
    @rule()
    def refill(self) -> None:
        self.region.refill()
        assert self.region.stats().warm_size == self.options["warm"]

    @rule(unplugging=st.booleans())
    def cancel(self, unplugging: bool) -> None:
        """At once: nothing changes."""
        cancel = threading.Event()
        cancel.set()
        blocks = self.model.sound if unplugging else self.model.free
        free = [block for block in blocks if block not in {block for _, block in self.pins}]
        if not free or (unplugging and (self._late or not self.made.kind.discards)) or not self._room(1):
            return
        operation = self.region.unplug if unplugging else self.region.plug
        with self._unmoved(), pytest.raises(OperationCancelledError):
            operation(free[0], cancel=cancel)
        if not unplugging:
            self._settle_pending()

    @contextlib.contextmanager
    def _unmoved(self) -> Iterator[None]:
        """No veto meanwhile."""
        refuses, witness = None, self.witness
        if witness is not None:
            refuses, witness.refuses = witness.refuses, None
        yield
        if witness is not None:
            witness.refuses = refuses

    # ---- content ------------------------------------------------------------------------

    @precondition(lambda self: self._views and self.model.sound)
    @rule(which=first_blocks, cell=st.integers(0, 3))
    def write(self, which: int, cell: int) -> None:
        block = self.model.sound[which % len(self.model.sound)]
        if (block, cell % self.cells) not in self.model.discarded:  # see touch_what_was_discarded
            self._write(block, [cell % self.cells])

    @precondition(lambda self: self._views and self.model.sound and len(self.pins) < 3)
    @rule(which=first_blocks)
    def pin(self, which: int) -> None:
        block = self.model.sound[which % len(self.model.sound)]
        self.pins.append((self.region.view(block), block))

    @precondition(lambda self: self.pins)
    @rule(writing=st.booleans())
    def let_go(self, writing: bool) -> None:
        view, block = self.pins.pop()
        if writing and block not in self.model.tainted and self.capacity is None:
            self._write(block, range(self.cells), view)
        view.release()

    @precondition(lambda self: self.model.sound and self.made.kind.discards)
    @rule(which=first_blocks, cell=st.integers(0, 3), more=st.integers(0, 3))
    def discard_inside(self, which: int, cell: int, more: int) -> None:
        block, cell = self.model.sound[which % len(self.model.sound)], cell % self.cells
        cells = range(cell, min(self.cells, cell + 1 + more))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HugePageSplitWarning)
            self.region.discard(block * self.block + cell * self.cell, len(cells) * self.cell)
        for at in cells:
            self.model.plugged[block][at] = FRESH
            self.model.discarded.add((block, at))

    @precondition(lambda self: self.model.discarded)
    @rule(which=st.integers(0, 95))
    def populate_inside(self, which: int) -> None:
        block, cells = self._discarded_cells(which)
        if self._has_memory_for(cells):
            for cell in cells:
                self.region.populate(block * self.block + cell * self.cell, self.cell)
                self.model.discarded.discard((block, cell))

    @precondition(lambda self: self.model.discarded and self._views)
    @rule(which=st.integers(0, 95))
    def touch_what_was_discarded(self, which: int) -> None:
        block, cells = self._discarded_cells(which)
        if self._has_memory_for(cells):
            with self.region.view(block) as view:
                self._check_cells(view, self.model.plugged[block], set(range(self.cells)) - cells)
            self._write(block, sorted(cells))
            self._give_double_back(block, len(cells) * self.cell)

    def _give_double_back(self, block: int, size: int) -> None:
        """A fault in a private file takes a page of the file and copies it; a populate gives the file's back."""
        if self.made.kind.id in ("memfd private", "tmpfs file private"):
            assert self.region.audit().unaccounted_size <= size
            self.region.populate(block * self.block, self.block)
            self.model.discarded = {at for at in self.model.discarded if at[0] != block}

    def _discarded_cells(self, which: int) -> tuple[int, set[int]]:
        """One, with its block; all of a block whose pages may be huge, for they may come back as one."""
        block, cell = sorted(self.model.discarded)[which % len(self.model.discarded)]
        if self.region._core.mapping.huge:
            return block, {cell for at, cell in self.model.discarded if at == block}
        return block, {cell}

    def _has_memory_for(self, cells: set[int]) -> bool:
        return self.capacity is None or (self.model.resident_cells + len(cells)) * self.cell <= self.capacity

    @precondition(lambda self: self._views)
    @rule(which=first_blocks)
    def stray_write(self, which: int) -> None:
        """Into an unplugged block: the audit sees it, and whoever plugs the block does not."""
        free = [block for block in self.model.free if block not in self.model.pending]
        if not free or not self._room(1) or (self.capacity is not None and self.model.pending):
            return
        block = free[which % len(free)]
        with self.region.view() as whole:
            whole[block * self.block + 5] = 9
        if self.made.kind.discards:  # nobody can tell of memfd_secret
            assert block in self._blocks(self.region.audit().leaks)
        with self._unmoved():
            self._plug({block}, lambda: self.region.plug(block))

    # ---- listeners, budget ----------------------------------------------------------------

    @rule()
    def add_or_remove_listener(self) -> None:
        if self.witness is None:
            self.witness = Witness()
            self.region.add_listener(self.witness)
        else:
            self.witness.refuses = None
            self.region.remove_listener(self.witness)
            assert not self.witness.blocks
            self.witness = None

    @precondition(lambda self: self.witness is not None)
    @rule(event=st.sampled_from(["plug", "unplug", None]))
    def be_refused(self, event: str | None) -> None:
        assert self.witness is not None
        self.witness.refuses = event

    @precondition(lambda self: self.options["budget"] is not None)
    @rule(blocks=st.integers(0, 24))
    def set_budget(self, blocks: int) -> None:
        self.options["budget"].limit = blocks * self.block

    # ---- faults -------------------------------------------------------------------------

    @precondition(lambda self: self._can_fail)
    @rule(
        blocks=st.lists(first_blocks, min_size=1, max_size=6),
        which=st.integers(0, 5),
        nth=st.integers(1, 5),
        partial=st.booleans(),
        code=st.sampled_from(_POPULATE_CODES),
        rollback_fails=st.sampled_from([0, 0, 1, 2]),
    )
    def a_plug_fails(
        self, blocks: list[int], which: int, nth: int, partial: bool, code: int, rollback_fails: int
    ) -> None:
        runs = self._some_runs(self.model.free, blocks)
        new = self._blocks(runs)
        if not runs or not self._room(len(new)):
            return
        steps = self._steps("populate")
        self._fault(steps[which % len(steps)], code, nth, self.cell if partial else 0, "populate")
        discards = self._steps("discard")
        if rollback_fails and discards:
            self._fault(discards[0], errno.EIO, rollback_fails, 0, "discard")
        with self._unmoved():
            try:
                assert self.region.plug_runs(runs) == len(new)
            except PopulateError as error:
                self._clear_faults()
                assert error.rolled_back is not bool(self._blocks(self.region.tainted_runs()) & new)
                self._settle_taint(new)
            else:  # the fault was never met, or overcome with memory that was given back
                self._clear_faults()
                self._settle_taint((), new)
                self._plugged_now(new)

    @precondition(lambda self: self._can_fail and self.made.kind.discards)
    @rule(
        blocks=st.lists(first_blocks, min_size=1, max_size=6),
        which=st.integers(0, 1),
        nth=st.integers(1, 4),
        partial=st.booleans(),
        code=st.sampled_from(_DISCARD_CODES),
    )
    def an_unplug_fails(self, blocks: list[int], which: int, nth: int, partial: bool, code: int) -> None:
        pinned = {block for _, block in self.pins}
        runs = self._some_runs([block for block in self.model.sound if block not in pinned], blocks)
        if not runs:
            return
        wanted, steps = self._blocks(runs), self._steps("discard")
        self._fault(steps[which % len(steps)], code, nth, self.cell if partial else 0, "discard")
        with self._unmoved():
            try:
                assert self.region.unplug_runs(runs) == len(wanted)
                self.model.unplug(wanted, later=self._late)
            except DiscardError as error:
                discarded, tainted, remaining = map(self._blocks, (error.discarded, error.tainted, error.remaining))
                assert discarded | tainted | remaining == wanted
                assert len(discarded) + len(tainted) + len(remaining) == len(wanted)
                assert tainted
                self.model.unplug(discarded)
                self.model.taint(tainted)
        self._clear_faults()

    @precondition(lambda self: self._can_fail and self._late and self.model.pending)
    @rule(nth=st.integers(1, 3), code=st.sampled_from(_DISCARD_CODES))
    def a_flush_fails(self, nth: int, code: int) -> None:
        self._fault(self._steps("discard")[0], code, nth, 0, "discard")
        with contextlib.suppress(DiscardError):
            self.region.flush()
            self.late_failure = False
        self._clear_faults()
        self._settle_taint(())

    @precondition(lambda self: self.injector is not None and self.model.sound and self.made.kind.discards)
    @rule(which=first_blocks, partial=st.booleans(), second=st.booleans(), code=st.sampled_from(_DISCARD_CODES))
    def a_discard_inside_fails(self, which: int, partial: bool, second: bool, code: int) -> None:
        block = self.model.sound[which % len(self.model.sound)]
        if self.capacity is not None:
            return  # what is written afterwards might not fit
        after = self.cell if partial and self.cells > 1 else 0
        self._fault(self._steps("discard")[-1 if second else 0], code, 1, after, "discard")
        with pytest.raises(DiscardError):
            self.region.discard(block * self.block, self.block)
        self._clear_faults()
        with self.region.view(block) as view:  # each cell is as before, or fresh
            for cell, value in enumerate(self.model.plugged[block]):
                part = view[cell * self.cell : cell * self.cell + 8]
                assert bytes(part) in (self._expected(value, 8, 0), self._expected(FRESH, 8, 0))
        self._write(block, range(self.cells))
        self._give_double_back(block, self.block)

    @precondition(lambda self: self.injector is not None)
    @rule(call=st.sampled_from(["lseek", "statvfs", "pread", "fstat", "madvise"]), nth=st.integers(1, 2))
    def looking_fails(self, call: str, nth: int) -> None:
        """An audit or a headroom that cannot look says so; nothing changes."""
        assert self.injector is not None
        self.injector.call(call, errno=errno.EIO, nth=nth)
        for look in (self.region.audit, self.region.headroom):
            with contextlib.suppress(OSError):
                look()
        self._clear_faults()

    @precondition(lambda self: self.made.kind.discards)
    @rule()
    def scrub(self) -> None:
        pinned = {block for _, block in self.pins} & self.model.tainted
        if pinned:
            return
        with self._unmoved():
            assert self.region.scrub() == len(self.model.tainted)
        self.model.scrub()

    # ---- threads and processes ------------------------------------------------------------

    @rule(
        work=st.lists(st.tuples(st.booleans(), first_blocks, counts), min_size=3, max_size=9),
    )
    def threads(self, work: list[tuple[bool, int, int]]) -> None:
        """Three threads plug and unplug what overlaps; each block ends as one of them left it."""
        if self.pins or self.capacity is not None or self.options["budget"] or not self.made.kind.discards:
            return
        failures: list[BaseException] = []

        def carry_out(part: list[tuple[bool, int, int]]) -> None:
            try:
                for plugging, *run in part:
                    first, count = self._run(*run)
                    if plugging:
                        self.region.plug(first, count, exist_ok=True)
                    else:
                        self.region.unplug(first, count, missing_ok=True)
            except BlockStateError as error:
                if "tainted" not in str(error):
                    failures.append(error)
            except BaseException as error:
                failures.append(error)

        with self._unmoved():
            workers = [threading.Thread(target=carry_out, args=(work[i::3],)) for i in range(3)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        assert not failures
        now = self._blocks(self.region.plugged_runs())
        touched = {block for _, *run in work for block in range(self._run(*run)[0], sum(self._run(*run)))}
        assert (now ^ self.model.plugged.keys()) <= touched
        assert self._blocks(self.region.tainted_runs()) <= self.model.tainted
        self.model.tainted &= self._blocks(self.region.tainted_runs())
        pending = self._blocks(self.region.audit().pending)
        for block in touched:
            self._settle_block(block, block in now, block in pending)

    def _settle_block(self, block: int, plugged: bool, pending: bool) -> None:
        """Of a block that several had in hand: what it holds is as before, or fresh."""
        model, before = self.model, self.model.plugged.get(block)
        if not plugged:
            if before is not None:
                model.unplug([block], later=pending)
                self.model.tainted.discard(block)
            if block in model.pending and not pending:
                model.flush([block])
            elif pending and block not in model.pending:
                model.pending[block] = [FRESH] * self.cells
            if pending:  # what it holds was seen by nobody: it may be anything that it held
                model.pending_discarded = {at for at in model.pending_discarded if at[0] != block}
                self.untold += 1
            return
        if block in model.tainted:
            return
        model.plug([block])
        if self._views:
            with self.region.view(block) as view:
                for cell in range(self.cells):
                    part = bytes(view[cell * self.cell : (cell + 1) * self.cell])
                    known = (before or model.pending.get(block) or [FRESH] * self.cells)[cell]
                    allowed = {FRESH, known}
                    if self.options.get("reuse") != "keep":
                        assert any(part == self._expected(value, self.cell, 0) for value in allowed)
            self._write(block, range(self.cells))

    @rule(first=first_blocks)
    def fork(self, first: int) -> None:
        """A child that has a look, and perhaps plugs and unplugs a block, changes nothing for the parent."""
        model, region = self.model, self.region
        inherit = self.options["fork"] == "inherit"
        free = [b for b in model.free if b not in model.pending]
        other = free[first % len(free)] if free and self._room(1) and self.made.kind.discards else None
        same = model.sound[first % len(model.sound)] if model.sound and self._views else None
        if same is not None and any((same, cell) in model.discarded for cell in range(self.cells)):
            same = None

        def child() -> str:
            assert self._blocks(region.plugged_runs()) == model.plugged.keys()
            if not inherit:
                for operation in (lambda: region.plug(0), lambda: region.headroom(), region.audit, region.view):
                    with pytest.raises(ForkedRegionError):
                        operation()
            else:
                if self.witness is not None:
                    region.remove_listener(self.witness)
                if same is not None:
                    with region.view(same) as view:
                        self._check_cells(view, model.plugged[same], set())
                if other is not None:
                    assert region.plug(other) == 1
                    assert region.unplug(other) == 1
                for view, _ in self.pins:
                    view.release()
            region.close()
            return "done"

        with self._unmoved():
            assert run_child(child, timeout=60).result() == "done"

    # ---- advice, and starting again ---------------------------------------------------------

    @precondition(lambda self: self.model.sound and self._views)
    @rule(which=first_blocks, advice=st.sampled_from(["collapse", "cold", "pageout"]))
    def advise(self, which: int, advice: str) -> None:
        block = self.model.sound[which % len(self.model.sound)]
        if any(at[0] == block for at in self.model.discarded):
            return  # a collapse fills what was discarded
        if advice == "pageout" and self.block > SMALL and FRESH in self.model.plugged[block]:
            # A huge page that is split gives its zeroes back to the zero page: the audit would call that a gap.
            return
        with contextlib.suppress(UnsupportedError, AdviceError):
            getattr(self.region, advice)(block)
        with self.region.view(block) as view:  # what a pageout has only unmapped, for want of swap, is mapped again
            self._check_cells(view, self.model.plugged[block], set())

    @rule()
    def start_again(self) -> None:
        """Close, and make another: a file or a memfd that outlives the region is adopted with all that it holds."""
        for view, _ in self.pins:
            view.release()
        self.pins.clear()
        with self._unmoved():
            if self.made.kind.discards:
                self.region.scrub()
                self.model.scrub()
            kept = self._keep()
            runs = list(self.region.plugged_runs())
            if self.witness is not None:
                self.region.remove_listener(self.witness)
                self.witness = None
            self._close()
        if not kept:
            self._remove_file()
            self.model.clear()
            if self.options["budget"] is not None:
                assert self.options["budget"].used == 0
            self.region = self._open()
            return
        budget = self.options["budget"]
        if budget is not None and budget.limit < len(self.model.plugged) * self.block:
            budget.limit = self.nblocks * self.block
        self.model.flush()
        # Adopted blocks have all of their memory.
        if self.capacity is not None and len(self.model.plugged) * self.block > self.capacity:
            raise AssertionError("more plugged than there is")
        self.region = self._open(plugged=runs)
        self.model.discarded.clear()

    def _keep(self) -> bool:
        """Whether the memory outlives the region; it can be had again by its path, or a descriptor."""
        kind = self.made.kind
        if not kind.shared_file or not kind.discards:
            return False
        if isinstance(self.backend, Memfd):
            if self.kept_fd < 0:
                self.kept_fd = os.dup(self.region.fileno())
            self.backend = Memfd(fd=self.kept_fd)
        return not isinstance(self.backend, Simulated)

    # ---- the truth ------------------------------------------------------------------------

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "region"):
            return
        STEPS[self.made.kind.id] += 1
        region, model = self.region, self.model
        assert self._blocks(region.plugged_runs()) == model.plugged.keys()
        bits = region.bitmap
        assert {n for n in range(self.nblocks) if bits[n // 8] >> n % 8 & 1} == model.plugged.keys()
        assert region.plugged_size == len(model.plugged) * self.block
        assert self._blocks(region.tainted_runs()) == model.tainted
        if self.witness is not None:
            assert self.witness.blocks == model.plugged.keys()
        if self.options["budget"] is not None:
            assert self.options["budget"].used == region.plugged_size
        state = region._core.blocks.counts()
        assert (state.busy, state.claims, state.pins) == (0, 0, len(self.pins))
        self._agrees_with_the_kernel()
        if self._views:
            self._agrees_in_content()

    def _agrees_with_the_kernel(self) -> None:
        region, model, kind = self.region, self.model, self.made.kind
        audit = region.audit()
        assert not audit.leaks
        assert not audit.gaps
        assert self._blocks(audit.tainted) == model.tainted
        assert self._blocks(audit.pending) == model.pending.keys()
        known = {at for at in model.discarded if at[0] not in model.tainted}
        if kind.discards:
            assert audit.discarded_size == len(known) * self.cell
        if not model.tainted:
            assert audit.ok, str(audit)
            slack = kind.slack + self.block * len(model.pending) * bool(self.untold)
            used = self.made.used(region) if kind.has_memory else region._core.mapping.resident_total()
            assert used is not None
            assert -slack <= used - model.resident_cells * self.cell <= slack

    def _agrees_in_content(self) -> None:
        model = self.model
        for first, count in self.region.plugged_runs():
            blocks = [block for block in range(first, first + count) if block not in model.tainted]
            if len(blocks) == count:
                with self.region.view(first, count) as view:
                    for block in blocks:
                        self._agrees_in_block(block, view, (block - first) * self.block)
            else:
                for block in blocks:
                    with self.region.view(block) as view:
                        self._agrees_in_block(block, view)

    def _agrees_in_block(self, block: int, view: memoryview, base: int = 0) -> None:
        skip = {cell for cell in range(self.cells) if (block, cell) in self.model.discarded}
        self._check_cells(view, self.model.plugged[block], skip, base)
