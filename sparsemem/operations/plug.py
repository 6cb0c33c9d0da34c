"""Plugging: all of it, or nothing."""

from __future__ import annotations

import logging
import os
import time

from sparsemem.blocks import Claim, Map, Want
from sparsemem.engine import UNWATCHED, Control, StepFailedError, Work
from sparsemem.errors import BackendExhaustedError, PopulateError, UnsupportedError
from sparsemem.listeners import Announcement
from sparsemem.operations.operation import Core, Operation, require_discard
from sparsemem.operations.relief import spend, work_off
from sparsemem.operations.unplug import flush_due
from sparsemem.recipes import TRAP
from sparsemem.runs import EMPTY, Runs, join, subtract, to_blocks
from sparsemem.units import exact_size

_log = logging.getLogger("sparsemem")


def plug_at_once_error(core: Core, errno: int, first: int) -> PopulateError:
    """The error of a plug by the short way: it failed, and so did giving back what was populated."""
    core.gauge.forget()
    core.tally.failed(rolled_back=True)
    error = populate_error(core, errno, first << core.shift, 0)
    error.rolled_back = False
    return error


class Plug(Operation):
    """claim -> headroom -> populate -> listeners -> commit, and all of it or nothing."""

    def __init__(
        self,
        core: Core,
        claim: Claim,
        *,
        strict: bool = True,
        fit: tuple[int, int, str] | None = None,
        populate: bool = True,
        control: Control = UNWATCHED,
    ) -> None:
        super().__init__(core, claim)
        self._strict = strict
        self._fit = fit
        self._populate = populate
        self._control = control
        self.found: int | None = None
        """The first block that `fit`, a count, an alignment and a kind of fit, has found."""
        self._works: list[Work] = []
        self._announcement: Announcement | None = None
        self._rollback: Work | None = None

    def perform(self) -> int:
        core, claim = self.core, self.claim
        started = time.monotonic()
        flush_due(core, self._control)
        if self._fit is None:
            claim.take(Want.TO_PLUGGED, self._strict, self._control.before_all(claim.runs.total << core.shift))
        else:
            self.found = claim.take_fit(*self._fit)
            if self.found is None:
                return 0
        # With exist_ok only what is new is populated, and only that is ever
        # rolled back: blocks that were plugged before keep their content.
        new = claim.runs if self._strict else claim.select(Map.PLUGGED, False)
        size = new.total << core.shift
        if size == 0:
            claim.finish()
            return 0
        self._works = self._populating(new) if self._populate else self._emptying(new)
        claim.charge(size)
        self._run(size)
        # Only now: a listener may use the memory at once.
        self._announcement = Announcement(core.listeners, "on_plug", new if core.listeners else ())
        self._announcement.tell()
        self.require_process()
        changed = claim.finish(plugged=new, empty=EMPTY if self._populate else new)
        core.tally.plugged(size, sum(work.calls for work in self._works), time.monotonic() - started)
        return changed

    def _populating(self, new: Runs) -> list[Work]:
        core, claim = self.core, self.claim
        # What is pending has its memory still, and is only made fresh.
        pending = claim.select(Map.PENDING, True) if core.deferral is not None else EMPTY
        fresh = core.block_runs(subtract(list(new), list(pending))) if pending.n else new
        # Up front, because a memory control group's limit has no errno.
        spend(core, fresh.total << core.shift, self._control.within(0, new.total << core.shift))
        works = [core.work("populate", fresh)] if fresh.n else []
        if pending.n:
            keep = core.deferral is not None and core.deferral.keep
            works.append(core.work("repopulate" if keep else "recycle", pending))
        return works

    def _emptying(self, new: Runs) -> list[Work]:
        """As if it were populated and discarded at once: nothing stray or pending may show."""
        core = self.core
        require_discard(core.mapping)
        if core.mapping.protection == TRAP:
            raise UnsupportedError("populate=False does not go with protection='trap': the first access would trap")
        core.blocks.mark_pages(EMPTY, True)
        return [core.work("empty", new)]

    def _run(self, size: int) -> None:
        done = 0
        try:
            for work in self._works:
                work_off(self.core, work, self._control.within(done, size))
                done += work.bytes
        except StepFailedError as failure:
            done = sum(work.bytes for work in self._works)
            raise populate_error(self.core, failure.errno, failure.offset, done) from None

    def undo(self, error: BaseException | None) -> None:
        core, claim = self.core, self.claim
        if not claim.open:
            return
        if self._announcement is not None:
            # Before the discard, so that nobody still uses what goes away.
            self._announcement.take_back()
        tainted = gone = EMPTY
        begun = join([run for work in self._works for run in work.begun()])
        if begun:
            if core.deferral is not None:
                # A part of a block that was pending is discarded with the rest of it.
                begun = [(first << core.shift, n << core.shift) for first, n in to_blocks(begun, core.shift)]
            if self._rollback is None:
                self._rollback = Work(core.mapping, "discard", core.byte_runs(begun), 0)
            self._rollback.run_through()
            # Memory that cannot be given back (memfd_secret) is zeroed and kept
            # apart, as is memory whose discard failed.
            kept = self._rollback.failed if core.mapping.can_discard else begun
            tainted = core.block_runs(to_blocks(kept, core.shift))
            gone = core.block_runs(to_blocks(begun, core.shift))
            core.gauge.forget()
        claim.finish(unplugged=gone, tainted=tainted)
        core.tally.failed(rolled_back=self._rollback is not None)
        if tainted.n and isinstance(error, PopulateError):
            error.rolled_back = False
        if tainted.n:
            _log.debug("rollback left tainted blocks %r", list(tainted))


def populate_error(core: Core, errno: int, offset: int, populated: int) -> PopulateError:
    """The error of a plug that failed at an offset, after so many bytes."""
    cause = core.mapping.diagnose(errno, offset)
    make = BackendExhaustedError if cause.exhausted else PopulateError
    return make(
        errno,
        f"cannot populate block {offset >> core.shift}: {cause.value} "
        f"({os.strerror(errno)} after {exact_size(populated)})",
        offset=offset,
        populated=populated,
        cause=cause,
    )


def refill(core: Core, control: Control = UNWATCHED) -> int:
    """Fills the warm pool; the bytes.

    Raises:
        BackendExhaustedError: There is not so much memory.
        PopulateError: It failed otherwise; the pool is as before.
        What `Control.check` raises; likewise.
    """
    warm = core.warm
    if warm is None or warm.ready == warm.size:
        return 0

    def populate(work: Work) -> None:
        # The pool is ours now, so a relief does not take away what it is about.
        spend(core, work.total, control)
        work_off(core, work, control)

    try:
        return warm.fill(populate, control.before_all(warm.size))
    except StepFailedError as failure:
        core.gauge.forget()
        raise populate_error(core, failure.errno, failure.offset, 0) from None
