"""Drives a region of any kind with every operation, and compares it with a dict after each step.

What may be chosen when a region is made (headroom, fork, late discards, a warm pool, a budget, faults) is drawn for
each example. Where an outcome is not determined (threads, a failed discard), what came of it must be one of those
allowed, and the model is brought in line with it.

The rules are in layers: `changing`, `contents`, `trouble`, `saving`, and those of several threads and processes here.
"""

from __future__ import annotations

import threading

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import rule

from sparsemem import BlockStateError, ForkedRegionError
from tests.stateful.driver import counts, first_blocks
from tests.stateful.model import FRESH
from tests.stateful.saving import Saving
from tests.support.children import run_child


class RegionMachine(Saving):
    """All rules; those that come last are about who else is there."""

    @rule(
        work=st.lists(st.tuples(st.booleans(), first_blocks, counts), min_size=3, max_size=9),
    )
    def threads(self, work: list[tuple[bool, int, int]]) -> None:
        """Three threads plug and unplug what overlaps; each block ends as one of them left it."""
        if self.pins or self.capacity is not None or self.options["budget"] or not self.made.kind.discards:
            return
        if self.late_failure:
            return  # the flush below would tell of it
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
        # Which of them are plugged now is chance: for what comes after, an example must do the same each time.
        with self._unmoved():
            self.region.scrub()
            self.region.unplug_runs([(block, 1) for block in touched], missing_ok=True)
            self.region.flush()
        self.model.scrub()
        self.model.unplug(touched & self.model.plugged.keys())
        self.model.flush()

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
        if before is None or any(at[0] == block for at in model.discarded):
            self._let_in(block)
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
            self._give_double_back(block, self.block)

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
