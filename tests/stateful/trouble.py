"""Rules that make system calls fail, and that mend what is left."""

from __future__ import annotations

import contextlib
import errno
from typing import Any

import attrs
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from sparsemem import DiscardError, PopulateError
from sparsemem.backends import Fault
from sparsemem.recipes import Step
from tests.stateful.contents import Contents
from tests.stateful.driver import first_blocks
from tests.stateful.model import FRESH

_POPULATE_CODES = (errno.ENOMEM, errno.EFAULT, errno.ENOSPC, errno.EIO)
_DISCARD_CODES = (errno.EIO, errno.ENOMEM, errno.EPERM)


class Trouble(Contents):
    """What fails."""

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

    def _steps(self, operation: str) -> list[Step | None]:
        if not self._views:
            return [None]
        mapping: Any = self.region._core.mapping
        how = self.region.protection
        if operation in ("release", "thin"):
            return list(getattr(mapping.recipe, operation)(how)) if self.made.kind.discards else []
        warm = "warm" in self.options
        return list(mapping.recipe.populate(mapping.strategy, huge=mapping.huge, warm=warm, protection=how))

    @property
    def _can_fail(self) -> bool:
        return self.injector is not None or not self._views

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
        discards = self._steps("release")
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
        self._mend_at_once()

    def _mend_at_once(self) -> None:
        """Tainted blocks may hold memory or not: where it is counted, they are mended before anything else."""
        if self.capacity is not None and self.model.tainted and self.made.kind.discards:
            self.scrub()

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
        wanted, steps = self._blocks(runs), self._steps("release")
        self._fault(steps[which % len(steps)], code, nth, self.cell if partial else 0, "discard")
        with self._unmoved():
            try:
                assert self.region.unplug_runs(runs) == len(wanted)
                self.model.unplug(wanted, later=self._late)
            except DiscardError as error:
                discarded, tainted, remaining = map(self._blocks, (error.discarded, error.tainted, error.remaining))
                assert discarded | tainted | remaining == wanted
                assert len(discarded) + len(tainted) + len(remaining) == len(wanted)
                assert tainted or self._protected, "only what access could not be taken from is as it was"
                self.model.unplug(discarded)
                self.model.taint(tainted)
        self._clear_faults()
        self._mend_at_once()

    # What is pending is no precondition: that may have gone or not, as the headroom was read just now or before.
    @precondition(lambda self: self._can_fail and self._late)
    @rule(nth=st.integers(1, 3), code=st.sampled_from(_DISCARD_CODES))
    def a_flush_fails(self, nth: int, code: int) -> None:
        self._fault(self._steps("release")[0], code, nth, 0, "discard")
        with contextlib.suppress(DiscardError):
            self.region.flush()
            self.late_failure = False
        self._clear_faults()
        self._settle_taint(())
        self._mend_at_once()

    @precondition(lambda self: self.injector is not None and self.model.sound and self.made.kind.discards)
    @rule(which=first_blocks, partial=st.booleans(), second=st.booleans(), code=st.sampled_from(_DISCARD_CODES))
    def a_discard_inside_fails(self, which: int, partial: bool, second: bool, code: int) -> None:
        block = self.model.sound[which % len(self.model.sound)]
        if self.capacity is not None:
            return  # what is written afterwards might not fit
        after = self.cell if partial and self.cells > 1 else 0
        self._fault(self._steps("thin")[-1 if second else 0], code, 1, after, "discard")
        with pytest.raises(DiscardError):
            self.region.discard(block * self.block, self.block)
        self._clear_faults()
        if self._protected:
            self.region.populate(block * self.block, self.block)
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
