"""Pages inside plugged blocks."""

from __future__ import annotations

import os

from sparsemem.blocks import Claim, Map, Want
from sparsemem.engine import StepFailedError, Work
from sparsemem.errors import BackendExhaustedError, DiscardError, PopulateError
from sparsemem.operations.operation import Core, Operation, require_discard
from sparsemem.operations.relief import spend, work_off
from sparsemem.operations.unplug import flush_due
from sparsemem.runs import EMPTY, Runs, clip, subtract
from sparsemem.units import exact_size


class Inner(Operation):
    """Discards or populates pages inside plugged blocks, which stay plugged.

    Args:
        core: The region's.
        runs: Byte runs of whole pages.
        operation: "thin", which discards, or "repopulate".
        strict: Refuse blocks that are not plugged, or tainted; else they are left out.
        spend: Whether it counts against the headroom.
    """

    def __init__(self, core: Core, runs: Runs, operation: str, *, strict: bool = True, spend: bool = True) -> None:
        super().__init__(core, Claim(core.blocks, runs.widened(core.shift)))
        self._operation = operation
        self._strict = strict
        self._spend = spend
        self._runs = runs
        self._work: Work | None = None

    def perform(self) -> int:
        core, claim = self.core, self.claim
        if self._operation == "thin":
            require_discard(core.mapping)
            # The map of such pages is made first: without it nothing may be discarded.
            core.blocks.mark_pages(EMPTY, True)
        else:
            flush_due(core)
        claim.take(Want.WITHIN_PLUGGED, self._strict)
        if not self._strict:
            self._leave_out()
        size = self._runs.total
        if self._operation == "repopulate" and self._spend:
            spend(core, size)
        self._work = Work(core.mapping, self._operation, self._runs, 0)
        try:
            if self._operation == "repopulate":
                work_off(core, self._work)
            else:
                self._work.run()
        except StepFailedError as failure:
            raise self._explain(failure) from None
        core.blocks.mark_pages(self._runs, self._operation == "thin")
        claim.finish()
        return size

    def _leave_out(self) -> None:
        """Keeps only what lies in blocks that are plugged and not tainted."""
        core, claim = self.core, self.claim
        plugged, tainted = claim.select(Map.PLUGGED, True), claim.select(Map.TAINTED, True)
        if plugged.total == claim.runs.total and not tainted.n:
            return
        usable = [(first << core.shift, n << core.shift) for first, n in subtract(plugged, tainted)]
        self._runs = core.byte_runs(clip(self._runs, usable))

    def undo(self, error: BaseException | None) -> None:
        # What was populated stays, since it may hold content from before; what
        # was discarded is gone, as was asked.
        if not self.claim.open:
            return
        if self._work is not None:
            self._mark()
        self.claim.finish()
        self.core.tally.failed(rolled_back=False)

    def _mark(self) -> None:
        assert self._work is not None
        discards = self._operation == "thin"
        # A discard that failed may have done any part of its range: such pages may be absent, and that is no gap.
        runs = self._work.begun() if discards else self._work.done()
        self.core.blocks.mark_pages(self.core.byte_runs(runs), discards)

    def _explain(self, failure: StepFailedError) -> PopulateError | DiscardError:
        assert self._work is not None
        did, text = exact_size(self._work.bytes), os.strerror(failure.errno)
        if self._operation == "thin":
            done, begun = self._work.done(), self._work.begun()
            return DiscardError(
                failure.errno,
                f"cannot discard at offset {failure.offset}: {text}; {did} were",
                discarded=tuple(done),
                tainted=tuple(subtract(begun, done)),
                remaining=tuple(subtract(self._runs, begun)),
            )
        cause = self.core.mapping.diagnose(failure.errno, failure.offset)
        make = BackendExhaustedError if cause.exhausted else PopulateError
        return make(
            failure.errno,
            f"cannot populate at offset {failure.offset}: {cause.value} ({text}); {did} were and stay populated",
            offset=failure.offset,
            populated=self._work.bytes,
            rolled_back=False,
            cause=cause,
        )
