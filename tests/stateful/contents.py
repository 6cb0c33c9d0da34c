"""Rules about what blocks hold: views, pages given back within blocks, stray writes, advice."""

from __future__ import annotations

import contextlib
import errno
import os
import warnings

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from sparsemem import AdviceError, HugePageSplitWarning, UnsupportedError
from tests.stateful.changing import Changing
from tests.stateful.driver import SMALL, first_blocks
from tests.stateful.model import FRESH


class Contents(Changing):
    """What blocks hold."""

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
            self._let_in(block)
            back = sum(at[0] == block for at in self.model.discarded)
            self._write(block, range(self.cells), view)
            if back:
                self._give_double_back(block, back * self.cell)
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

    @precondition(lambda self: self.made.kind.discards)
    @rule(blocks=st.lists(first_blocks, min_size=1, max_size=6), cell=st.integers(0, 3))
    def discard_runs(self, blocks: list[int], cell: int) -> None:
        """Scattered cells, of which those are left out that lie in blocks which are not plugged, or tainted."""
        cell %= self.cells
        chosen = {block % self.nblocks for block in blocks}
        there = chosen & set(self.model.sound)
        runs = [(block * self.block + cell * self.cell, self.cell) for block in chosen]
        assert self.region.discard_runs(runs, missing_ok=True) == len(there) * self.cell
        for block in there:
            self.model.plugged[block][cell] = FRESH
            self.model.discarded.add((block, cell))

    @precondition(lambda self: self.model.discarded)
    @rule(which=st.integers(0, 95))
    def populate_inside(self, which: int) -> None:
        block, cells = self._discarded_cells(which)
        if self._has_memory_for(cells):
            for cell in cells:
                self.region.populate(block * self.block + cell * self.cell, self.cell)
                self.model.discarded.discard((block, cell))
            self._settle_pending()

    @precondition(lambda self: self.model.discarded and self._views)
    @rule(which=st.integers(0, 95))
    def touch_what_was_discarded(self, which: int) -> None:
        block, cells = self._discarded_cells(which)
        if self._has_memory_for(cells):
            self._let_in(block)
            with self.region.view(block) as view:
                self._check_cells(view, self.model.plugged[block], set(range(self.cells)) - cells)
            self._write(block, sorted(cells))
            if self._protected:
                self.model.discarded = {at for at in self.model.discarded if at[0] != block}
            self._give_double_back(block, len(cells) * self.cell)

    def _give_double_back(self, block: int, size: int) -> None:
        """A fault in a private file takes a page of the file and copies it; a populate gives the file's back."""
        if self.made.kind.id in ("memfd private", "tmpfs file private"):
            # A plug that failed, and its rollback, too, may have left pages of the file.
            assert self.region.audit().unaccounted_size <= size + len(self.model.tainted) * self.block
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
        # What it takes is not there for the plug, as far as the headroom can tell.
        if not free or not self._room(2) or (self.capacity is not None and self.model.pending):
            return
        block = free[which % len(free)]
        if self._protected:
            # As a system call, which gets EFAULT where a store would get a signal.
            start, caught = block * self.block, pytest.raises(OSError, match=os.strerror(errno.EFAULT))
            with self.region.view() as whole, open("/dev/zero", "rb", buffering=0) as zeroes, caught:
                os.readv(zeroes.fileno(), [whole[start : start + 8]])
            assert not self.region.audit().leaks
            return
        with self.region.view() as whole:
            whole[block * self.block + 5] = 9
        if self.made.kind.discards:  # nobody can tell of memfd_secret
            assert block in self._blocks(self.region.audit().leaks)
        with self._unmoved():
            self._plug({block}, lambda: self.region.plug(block))

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
