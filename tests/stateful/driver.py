"""What all rules of the state machine share: making a region, the model, and comparing the two."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import attrs
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

from sparsemem import Budget, DiscardError, File, Region, UnsupportedError
from sparsemem._sys import calls as calls_module
from sparsemem.recipes import PROTECTIONS, STRATEGIES
from tests.stateful.model import FRESH, Cells, Model
from tests.support.evidence import STEPS
from tests.support.injector import Injector
from tests.support.kinds import Made

LONG = 1000.0
SMALL = 16 << 10

first_blocks = st.integers(0, 23)
counts = st.integers(1, 6)
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


class Driver(RuleBasedStateMachine):
    """One region after the other of a kind, against a `Model`; the rules are in the classes made from it.

    Attributes:
        made: The kind, and the backend to make regions of.
        capacity: Bytes that the backend has, where that is less than the region's size.
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
        protection=st.sampled_from(["none", "none", *PROTECTIONS]),
    )
    def make(
        self,
        faulty: bool,
        headroom: str,
        inherit: bool,
        late: str | None,
        warm: bool,
        budget: bool,
        strategy: str,
        protection: str,
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
        elif protection in kind.protections:
            self.options["protection"] = protection
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
        self._remove_file()  # of an example that failed
        try:
            self.region = self._open()
        except (UnsupportedError, ValueError):  # the kind has no such strategy, or the kernel no such thing
            self.options.pop("warm", None)
            self.options.pop("protection", None)
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
    def _protected(self) -> bool:
        return self.region.protection != "none"

    def _let_in(self, block: int) -> None:
        """With a trap, pages that were discarded within a block are caught until they are populated."""
        if self._protected and any(at[0] == block for at in self.model.discarded):
            self.region.populate(block * self.block, self.block)

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

    def _some_runs(self, among: Iterable[int], blocks: list[int]) -> list[tuple[int, int]]:
        chosen = sorted({block % self.nblocks for block in blocks} & set(among))
        runs: list[tuple[int, int]] = []
        for block in chosen:
            if runs and sum(runs[-1]) == block and block % 3:  # runs that touch stay two now and then
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((block, 1))
        return runs[::-1]

    def _clear_faults(self) -> None:
        if self.injector is not None:
            self.injector.clear()
        if not self._views:
            mapping: Any = self.region._core.mapping
            mapping._backend = attrs.evolve(mapping._backend, faults=())

    @contextlib.contextmanager
    def _unmoved(self) -> Iterator[None]:
        """No veto meanwhile."""
        refuses, witness = None, self.witness
        if witness is not None:
            refuses, witness.refuses = witness.refuses, None
        yield
        if witness is not None:
            witness.refuses = refuses

    # ---- the truth ----------------------------------------------------------------------

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
        if self.capacity is not None:
            # A reading of the headroom is good for 100 ms; what pending blocks become must not depend on that.
            region._core.gauge.forget()

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
