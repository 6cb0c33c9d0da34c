"""The operations on blocks, each a sequence that can stop anywhere.

Every operation is an object that knows how far it has come, so that `undo` can
put things right from any point: after an error, after a KeyboardInterrupt at
any bytecode, and again if the undoing itself was interrupted.  Steps that change
the state of blocks are one C call each.

The order within is what makes it safe, and is explained where it matters.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time

from attrs import define, field

from sparsemem import workers
from sparsemem.backends.base import Mapping
from sparsemem.blocks import BlockMap, Claim, Map, Want, runs_of
from sparsemem.deferral import Deferral
from sparsemem.engine import UNWATCHED, Control, StepFailedError, Work
from sparsemem.errors import (
    BackendExhaustedError,
    BlockStateError,
    DeadlineError,
    DiscardError,
    OperationCancelledError,
    PopulateError,
    ReserveError,
    Run,
    UnsupportedError,
)
from sparsemem.headroom import Gauge
from sparsemem.listeners import Announcement, Listener
from sparsemem.quick import Quick
from sparsemem.recipes import TRAP
from sparsemem.runs import EMPTY, Runs, clip, join, subtract, to_blocks
from sparsemem.statistics import Tally
from sparsemem.units import exact_size
from sparsemem.warm import Warm

_log = logging.getLogger("sparsemem")


@define(eq=False)
class Core:
    """What the operations of one region share."""

    mapping: Mapping
    blocks: BlockMap
    block_size: int
    gauge: Gauge
    tally: Tally
    threads: int | None = None
    listeners: tuple[Listener, ...] = ()
    deferral: Deferral | None = None
    warm: Warm | None = None
    shift: int = field(init=False)
    quick: Quick | None = field(init=False, default=None)

    def __attrs_post_init__(self) -> None:
        self.shift = self.block_size.bit_length() - 1
        # What is pending or due is for the long way to look at.
        if self.mapping.direct and self.deferral is None:
            self.quick = Quick(self.mapping, self.blocks, self.gauge, self.shift)

    def listen(self, listeners: tuple[Listener, ...]) -> None:
        """Sets who listens; only while a claim on everything is held."""
        self.listeners = listeners
        self.blocks.watch(bool(listeners))

    def counts(self) -> dict[str, float]:
        """What was done on both ways."""
        return self.tally.with_those(self.quick.counts if self.quick is not None else {})

    def work(self, operation: str, runs: Runs) -> Work:
        """The work of an operation on blocks, cut into parts for as many threads as it is worth."""
        mapping, size = self.mapping, runs.total << self.shift
        if not mapping.parallel:
            threads = 1
        elif self.threads is None:
            scattered = operation == "discard" and size < runs.n * workers.WORTH_A_FLUSH
            threads = 1 if scattered else workers.sensible(size, huge=mapping.huge)
        else:
            threads = workers.limited(self.threads, size)
        return Work(mapping, operation, runs, self.shift, threads=threads, unit=self.block_size)

    def block_runs(self, pairs: list[Run]) -> Runs:
        return runs_of(pairs, self.blocks.nblocks)

    def byte_runs(self, pairs: list[Run]) -> Runs:
        return runs_of(pairs, self.mapping.size)


class Operation:
    """One operation; `perform` does it, `undo` puts right what a stop left behind."""

    def __init__(self, core: Core, claim: Claim) -> None:
        self.core = core
        self.claim = claim

    def perform(self) -> int:
        raise NotImplementedError

    def undo(self, error: BaseException | None) -> None:
        """Puts things right; does nothing once the claim is finished, so it can be called again."""
        raise NotImplementedError


def execute(operation: Operation) -> int:
    """Performs an operation, or undoes what it did."""
    try:
        return operation.perform()
    except BaseException as error:
        operation.undo(error)
        raise
    finally:
        # Again, for an interrupt may have come in just before or in the middle
        # of the undo above.  After a finished operation this does nothing.
        operation.undo(None)


def plug_at_once(core: Core, first: int, count: int) -> bool:
    """The short way of a plug; False if nothing has changed.

    Raises:
        PopulateError: It failed, and so did giving back what was populated.
    """
    quick = core.quick
    # Only plain integers: whatever else may be one, or be refused, is for the long way to judge.
    if quick is None or not type(first) is type(count) is int:
        return False
    try:
        done = quick.plug(first, count)
    except OverflowError:
        return False
    if done < 0:
        core.gauge.forget()
        core.tally.failed(rolled_back=True)
        error = populate_error(core, -done, first << core.shift, 0)
        error.rolled_back = False
        raise error
    return done > 0


def unplug_at_once(core: Core, first: int, count: int) -> bool:
    """The short way of an unplug; False if nothing has changed.

    Raises:
        DiscardError: It failed; the blocks are tainted.
    """
    quick = core.quick
    if quick is None or not type(first) is type(count) is int:
        return False
    try:
        done = quick.unplug(first, count)
    except OverflowError:
        return False
    if done < 0:
        core.tally.failed(rolled_back=False)
        error = discard_error(-done, first)
        error.tainted = ((first, count),)
        raise error
    return done > 0


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
        flush_due(core)
        if self._fit is None:
            claim.take(Want.TO_PLUGGED, self._strict)
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
        for work in self._works:
            self._run(work)
        # Only now: a listener may use the memory at once.
        self._announcement = Announcement(core.listeners, "on_plug", new if core.listeners else ())
        self._announcement.tell()
        changed = claim.finish(plugged=new, empty=EMPTY if self._populate else new)
        core.tally.plugged(size, sum(work.calls for work in self._works), time.monotonic() - started)
        return changed

    def _populating(self, new: Runs) -> list[Work]:
        core, claim = self.core, self.claim
        # What is pending has its memory still, and is only made fresh.
        pending = claim.select(Map.PENDING, True) if core.deferral is not None else EMPTY
        fresh = core.block_runs(subtract(list(new), list(pending))) if pending.n else new
        # Up front, because a memory control group's limit has no errno.
        self._spend(fresh.total << core.shift)
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

    def _spend(self, size: int) -> None:
        core = self.core
        try:
            core.gauge.spend(size)
        except BackendExhaustedError:
            if not relieve(core):
                raise
            core.gauge.forget()
            core.gauge.spend(size)

    def _run(self, work: Work) -> None:
        core = self.core
        while True:
            try:
                return work.run(self._control)
            except StepFailedError as failure:
                if not relieve(core):
                    done = sum(work.bytes for work in self._works)
                    raise populate_error(core, failure.errno, failure.offset, done) from None
            work.retry()

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
            flush_due(core)
        claim.take(self._want, self._strict)
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
        if core.deferral is not None and self._want is Want.TO_UNPLUGGED and not claim.select(Map.TAINTED, True).n:
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
            return
        if self._settled is None:  # once: what is announced below must stay true
            self._settled = self._settle()
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

    def _settle(self) -> tuple[list[Run], list[Run]]:
        """Brings the work to a block boundary: blocks that are gone, and those of unknown content."""
        work, shift = self._work, self.core.shift
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
        pending = subtract(list(core.blocks.runs(Map.PENDING, True)), list(core.blocks.runs(Map.BUSY, True)))
        if not pending:
            return 0
        claim = Claim(core.blocks, core.block_runs(pending))
        return execute(Unplug(core, claim, want=Want.PENDING_ONLY, strict=False, control=control)) << core.shift
    except BaseException:
        deferral.since = since  # the rest of it is due all the same
        raise


def flush_due(core: Core) -> None:
    """Discards what has been pending for long enough; a failure is kept for `Region.flush` to tell."""
    if core.deferral is not None and core.deferral.due:
        _flush_quietly(core, core.deferral)


def _flush_quietly(core: Core, deferral: Deferral) -> int:
    try:
        return flush(core)
    except DiscardError as error:
        deferral.failure = error
    except BlockStateError:
        pass  # a circle of threads that wait for each other: later, then
    return 0


def protect(core: Core, *, look: bool) -> None:
    """Protects all blocks that start out unplugged; for a region that nobody else has yet.

    Args:
        core: The region's.
        look: Whether to see first if there is the memory that this takes.

    Raises:
        ReserveError: The kernel refused, or there is not the memory.
    """
    if not core.mapping.protects:
        return
    runs = core.block_runs(list(core.blocks.runs(Map.PLUGGED, False)))
    if look:
        core.mapping.room_to_protect(runs.total << core.shift)
    try:
        core.work("protect", runs).run()
    except StepFailedError as failure:
        raise ReserveError(
            failure.errno,
            f"cannot protect block {failure.offset >> core.shift} (protection={core.mapping.protection!r}): "
            f"{os.strerror(failure.errno)}",
        ) from None


def relieve(core: Core) -> bool:
    """Gives back what is not needed this moment, pending blocks and the warm pool; whether there was any."""
    given = 0 if core.deferral is None else _flush_quietly(core, core.deferral)
    if core.warm is not None:
        with contextlib.suppress(StepFailedError):
            given += core.warm.give_back()
    return given > 0


def refill(core: Core, control: Control = UNWATCHED) -> int:
    """Fills the warm pool; the bytes.

    Raises:
        BackendExhaustedError: There is not so much memory.
        PopulateError: It failed otherwise; the pool is as before.
    """
    warm = core.warm
    if warm is None or warm.ready == warm.size:
        return 0
    core.gauge.spend(warm.size - warm.ready)
    try:
        return warm.fill(control)
    except StepFailedError as failure:
        core.gauge.forget()
        raise populate_error(core, failure.errno, failure.offset, 0) from None


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
        claim.take(Want.WITHIN_PLUGGED, self._strict)
        if not self._strict:
            self._leave_out()
        size = self._runs.total
        if self._operation == "repopulate" and self._spend:
            core.gauge.spend(size)
        self._work = Work(core.mapping, self._operation, self._runs, 0)
        try:
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


class Whole(Operation):
    """Has the region to itself while listeners are told about all plugged blocks.

    Args:
        listeners: Whom to tell.
        event: What.
        close: Close the block map afterwards; then views must not live, unless
            `force`.
        force: Close whatever lives, and whatever listeners say.
    """

    def __init__(
        self, core: Core, listeners: tuple[Listener, ...], event: str, *, close: bool = False, force: bool = False
    ) -> None:
        super().__init__(core, Claim(core.blocks, EMPTY))
        self._listeners = listeners
        self._event = event
        self._close = close
        self._force = force
        self._before: tuple[Listener, ...] | None = None
        self._announcement: Announcement | None = None

    def perform(self) -> int:
        core = self.core
        self.claim.take(Want.WHOLE, strict=self._close and not self._force)
        self._before = core.listeners
        plugged = core.blocks.runs(Map.PLUGGED, True) if self._listeners else ()
        self._announcement = Announcement(self._listeners, self._event, plugged)
        try:
            self._announcement.tell()
        except Exception:
            if not self._force:
                raise
            _log.debug("a listener failed as the region closed", exc_info=True)
        self.commit()
        self.claim.finish(close=self._close)
        return 0

    def commit(self) -> None:
        """What else changes when everybody was told; in one step."""

    def undo(self, error: BaseException | None) -> None:
        if not self.claim.open:
            return
        if self._before is not None:
            # An interrupt may have come between the commit and the end of the claim.
            self.core.listen(self._before)
        if self._announcement is not None:
            self._announcement.take_back()
        self.claim.finish()


class Join(Whole):
    """Adds a listener, which is told of all plugged blocks."""

    def __init__(self, core: Core, listener: Listener) -> None:
        super().__init__(core, (listener,), "on_plug")
        self._listener = listener

    def commit(self) -> None:
        if any(known is self._listener for known in self.core.listeners):
            raise ValueError(f"{self._listener!r} is registered already")  # another thread was faster
        self.core.listen((*self.core.listeners, self._listener))


class Leave(Whole):
    """Removes a listener, which is told that all plugged blocks go."""

    def __init__(self, core: Core, listener: Listener) -> None:
        super().__init__(core, (listener,), "on_unplug")
        self._listener = listener

    def commit(self) -> None:
        # By identity: listeners that compare equal are still two.
        self.core.listen(tuple(known for known in self.core.listeners if known is not self._listener))


def require_discard(mapping: Mapping) -> None:
    """Raises UnsupportedError, before anything happens, if memory cannot be given back."""
    if not mapping.can_discard:
        raise UnsupportedError("memfd_secret memory cannot be given back: the region can only grow")


def resize(core: Core, target: int) -> int:
    """Plugs the lowest unplugged blocks or unplugs the highest plugged ones; the change in blocks.

    Raises:
        BlockStateError: Too few blocks can be plugged, since some are tainted.
        As Plug and Unplug.
    """
    while True:
        core.blocks.check_open()
        change = target - int(core.blocks.counts().plugged)
        if change == 0:
            return 0
        try:
            if change > 0:
                free = _lowest_free(core, change)
                if free is None:
                    continue
                runs = core.block_runs(free)
                return execute(Plug(core, Claim(core.blocks, runs)))
            plugged = list(core.blocks.runs(Map.PLUGGED, True))
            runs = core.block_runs(_highest(plugged, -change))
            return -execute(Unplug(core, Claim(core.blocks, runs)))
        except BlockStateError as error:
            # Somebody else has changed one of the blocks since we looked: look
            # again.  Without a block it is something that will not pass.
            if error.block is None:
                raise


def _lowest_free(core: Core, count: int) -> list[Run] | None:
    tainted = list(core.blocks.runs(Map.TAINTED, True))
    taken, left = [], count
    for first, n in subtract(core.blocks.runs(Map.PLUGGED, False), tainted):
        taken.append((first, min(n, left)))
        left -= taken[-1][1]
        if left == 0:
            return taken
    if left > sum(n for _, n in tainted):
        return None  # taint is not why: somebody else has plugged some since we counted
    raise BlockStateError(
        f"cannot grow by {count} blocks: all but {count - left} of the unplugged ones are tainted; scrub() mends them"
    )


def _highest(plugged: list[Run], count: int) -> list[Run]:
    taken, left = [], count
    for first, n in reversed(plugged):
        size = min(n, left)
        taken.append((first + n - size, size))
        left -= size
        if left == 0:
            break
    return taken
