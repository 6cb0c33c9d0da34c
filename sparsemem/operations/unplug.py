"""Unplugging, and what discards later what was unplugged: checked completely first, for a discard cannot be undone."""

from __future__ import annotations

import os
import time

from sparsemem.blocks import Claim, Map, Want
from sparsemem.engine import UNWATCHED, Control, StepFailedError, Work
from sparsemem.errors import BlockStateError, DeadlineError, DiscardError, OperationCancelledError, Run
from sparsemem.listeners import Announcement
from sparsemem.operations.operation import Core, Operation, execute, require_discard
from sparsemem.runs import EMPTY, clip, join, subtract, to_blocks


def unplug_at_once_error(core: Core, errno: int, first: int, count: int) -> DiscardError:
    """The error of an unplug by the short way: it failed, and the blocks are tainted."""
    core.tally.failed(rolled_back=False)
    error = discard_error(errno, first)
    error.tainted = ((first, count),)
    return error


def discard_error(errno: int, block: int, *, intact: bool = False) -> DiscardError:
    """The error of an unplug that failed on a block; `intact` if that is as it was."""
    did, left = ("protect", "the others are as they were") if intact else ("discard", _TAINTED)
    return DiscardError(
        errno, f"cannot {did} block {block}: {os.strerror(errno)}; what was discarded before is unplugged, {left}"
    )


_TAINTED = "the blocks that it failed on are tainted"


class Unplug(Operation):
    """claim -> listeners -> discard -> commit: checked completely first, for a discard cannot be undone.

    Also what mends tainted blocks (`Want.TAINTED_ONLY`): those that are plugged
    become unplugged then, as was asked for when they were tainted.  And what
    discards those that were unplugged before (`Want.PENDING_ONLY`).
    """

    def __init__(
        self,
        core: Core,
        claim: Claim,
        *,
        want: Want = Want.TO_UNPLUGGED,
        strict: bool = True,
        control: Control = UNWATCHED,
    ) -> None:
        super().__init__(core, claim)
        self._control = control
        self._want = want
        self._strict = strict
        self._victims = EMPTY
        self._announcement: Announcement | None = None
        self._work: Work | None = None
        self._settled: tuple[list[Run], list[Run]] | None = None

    def perform(self) -> int:
        core, claim = self.core, self.claim
        started = time.monotonic()
        require_discard(core.mapping)
        if self._want is Want.TO_UNPLUGGED:
            flush_due(core, self._control)
        claim.take(self._want, self._strict, self._control.before_all(claim.runs.total << core.shift))
        # A copy, since the claim will have the gaps in between, too.
        self._victims = claim.select(_VICTIMS[self._want], True)
        if self._victims.n == 0:
            claim.finish()
            return 0
        if core.listeners and self._want is not Want.PENDING_ONLY:
            plugged = claim.select(Map.PLUGGED, True)
            # Before the discard: afterwards nobody may fault the memory in again.
            self._announcement = Announcement(core.listeners, "on_unplug", plugged)
            self._announcement.tell()
            self.require_process()
        if core.deferral is not None and self._want is Want.TO_UNPLUGGED and not claim.select(Map.TAINTED, True).n:
            # All of it is told before the one call that does it: who stops it even then has stopped all of it.
            size = self._victims.total << core.shift
            self._control.check(0, size)
            self._control.check(size, size)
            changed = claim.finish(unplugged=self._victims, pending=self._victims)
            core.deferral.note()
            core.tally.unplugged(changed << core.shift, 0, time.monotonic() - started)
            return changed
        # Claimed only now: a listener may have worked on blocks in the gaps.
        self._work = core.work("discard", claim.bridge(self._victims, core.mapping.bridge >> core.shift))
        try:
            self._work.run(self._control)
        except StepFailedError as failure:
            intact = self._work.touched() == self._work.done()
            raise discard_error(failure.errno, failure.offset >> core.shift, intact=intact) from None
        changed = claim.finish(unplugged=self._victims, healed=self._victims)
        if self._want is Want.PENDING_ONLY:
            core.tally.flushed(self._work.calls, time.monotonic() - started)
            return self._victims.total
        core.tally.unplugged(changed << core.shift, self._work.calls, time.monotonic() - started)
        return changed

    def undo(self, error: BaseException | None) -> None:
        core, claim = self.core, self.claim
        if not claim.open:
            if isinstance(error, (OperationCancelledError, DeadlineError)):
                # It was stopped while it waited for others; so the state is that of this moment, and theirs.
                error.remaining = tuple(clip(claim.runs, core.blocks.runs(_VICTIMS[self._want], True)))
            return
        if self._settled is None:  # once: what is announced below must stay true
            self._settled = settle(self._work, core.shift)
        victims = list(self._victims)
        done, failed = (clip(runs, victims) for runs in self._settled)
        remaining = subtract(victims, done)
        if self._announcement is not None:
            self._announcement.take_back(only=remaining)
        gone, tainted = core.block_runs(done), core.block_runs(failed)
        changed = claim.finish(unplugged=gone, healed=gone, tainted=tainted)
        core.tally.failed(rolled_back=False, unplugged=changed << core.shift)
        if isinstance(error, (DiscardError, OperationCancelledError, DeadlineError)):
            error.discarded, error.tainted = tuple(done), tuple(failed)
            error.remaining = tuple(subtract(remaining, failed))


def settle(work: Work | None, shift: int) -> tuple[list[Run], list[Run]]:
    """Brings a discard to a block boundary: blocks that are gone, and those of unknown content."""
    if work is None:
        return [], []
    step_failed = work.step_failed
    if not step_failed:
        try:
            work.complete_unit(shift)
        except StepFailedError:
            step_failed = True
    done = [(first >> shift, count >> shift) for first, count in join(work.done()) if count >> shift]
    # All of a failed call's range: MADV_DONTNEED goes on past a hole and
    # still returns ENOMEM.
    begun = to_blocks(work.touched(), shift)
    return done, subtract(begun, done) if step_failed else []


_VICTIMS = {
    Want.TO_UNPLUGGED: Map.PLUGGED,
    Want.TAINTED_ONLY: Map.TAINTED,
    Want.PENDING_ONLY: Map.PENDING,
}


def flush(core: Core, control: Control = UNWATCHED) -> int:
    """Discards what is pending and in nobody's hands; the bytes.

    Raises:
        As Unplug: what failed is tainted, and pending no more.
    """
    deferral = core.deferral
    if deferral is None:
        return 0
    since, deferral.since = deferral.since, None
    try:
        found = list(core.blocks.runs(Map.PENDING, True))
        pending = subtract(found, list(core.blocks.runs(Map.BUSY, True)))
        done = 0
        if pending:
            claim = Claim(core.blocks, core.block_runs(pending))
            done = execute(Unplug(core, claim, want=Want.PENDING_ONLY, strict=False, control=control))
        if pending != found:
            deferral.put_back(since)  # whoever has them in hand may well leave them as they are
        return done << core.shift
    except BaseException:
        deferral.put_back(since)  # the rest of it is due all the same
        raise


def flush_due(core: Core, control: Control = UNWATCHED) -> None:
    """Discards what has been pending for long enough."""
    if core.deferral is not None and core.deferral.due:
        flush_quietly(core, control)


def flush_quietly(core: Core, control: Control = UNWATCHED) -> int:
    """Discards what is pending, in passing of something else; a failure is kept for `Region.flush` to tell."""
    try:
        return flush(core, control.untold())
    except DiscardError as error:
        assert core.deferral is not None
        core.deferral.failure = error
    except (OperationCancelledError, DeadlineError):
        pass  # what this is done in passing of is stopped, and says so itself
    except BlockStateError:
        pass  # a circle of threads that wait for each other: later, then
    return 0
