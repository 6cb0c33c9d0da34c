"""Rules that plug and unplug, with who may refuse it, and that begin again with another region."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from sparsemem import (
    BackendExhaustedError,
    BlockStateError,
    DiscardError,
    ListenerVetoError,
    Memfd,
    OperationCancelledError,
    UnsupportedError,
    ViewsAliveError,
)
from tests.stateful.driver import Driver, Witness, counts, first_blocks, fits


class Changing(Driver):
    """Which blocks are plugged."""

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

    @precondition(lambda self: self.made.kind.discards)
    @rule(first=first_blocks, count=counts)
    def plug_without_memory(self, first: int, count: int) -> None:
        """As if they were plugged and discarded inside."""
        first, count = self._run(first, count)
        blocks = set(range(first, first + count))
        if not blocks <= set(self.model.free) - self.model.pending.keys() or not self._room(count):
            return
        if self.region.protection == "trap":
            with pytest.raises(UnsupportedError, match="trap"):
                self.region.plug(first, count, populate=False)
            return
        with self._unmoved():
            assert self.region.plug(first, count, populate=False) == count
        self._settle_pending(blocks)
        self.model.plug(blocks)
        self.model.discarded |= {(block, cell) for block in blocks for cell in range(self.cells)}

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
        self._settle_pending()
        assert self.region.stats().warm_size == self.options["warm"]

    @rule(unplugging=st.booleans())
    def cancel(self, unplugging: bool) -> None:
        """At once: nothing changes."""
        cancel = threading.Event()
        cancel.set()
        blocks = self.model.sound if unplugging else self.model.free
        free = [block for block in blocks if block not in {block for _, block in self.pins}]
        if not free or (unplugging and not self.made.kind.discards) or not self._room(1):
            return
        operation = self.region.unplug if unplugging else self.region.plug
        with self._unmoved(), pytest.raises(OperationCancelledError):
            operation(free[0], cancel=cancel)
        if not unplugging:
            self._settle_pending()

    # ---- listeners, budget --------------------------------------------------------------

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

    # ---- starting again -------------------------------------------------------------------

    @rule()
    def start_again(self) -> None:
        """Close, and make another: a file or a memfd that outlives the region is adopted with all that it holds."""
        if self.capacity is not None and len(self.model.plugged) * self.block > self.capacity:
            return  # some have no memory, and there is none for them all
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
        self.region = self._open(plugged=runs)
        self.model.discarded.clear()

    def _keep(self) -> bool:
        """Whether the memory outlives the region; it can be had again by its path, or a descriptor."""
        kind = self.made.kind
        if not kind.shared_file:
            return False
        if isinstance(self.backend, Memfd):
            if self.kept_fd < 0:
                self.kept_fd = os.dup(self.region.fileno())
            self.backend = Memfd(fd=self.kept_fd)
        return True
