"""What takes the whole region: listeners that come and go, its protection, its end."""

from __future__ import annotations

import logging
import os
import time

from sparsemem.blocks import Claim, Map, Want
from sparsemem.engine import StepFailedError, Work
from sparsemem.errors import DiscardError, ReserveError, Run
from sparsemem.listeners import Announcement, Listener
from sparsemem.operations.operation import Core, Operation
from sparsemem.operations.unplug import discard_error, settle
from sparsemem.runs import EMPTY, subtract

_log = logging.getLogger("sparsemem")


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


class Whole(Operation):
    """Has the region to itself while listeners are told about all plugged blocks.

    Args:
        event: What they are told.
        strict: Refuse while views live.
    """

    def __init__(self, core: Core, event: str, *, strict: bool = False) -> None:
        super().__init__(core, Claim(core.blocks, EMPTY))
        self._event = event
        self._strict = strict
        self._before: tuple[Listener, ...] | None = None
        self._announcement: Announcement | None = None

    def perform(self) -> int:
        core = self.core
        self.claim.take(Want.WHOLE, self._strict)
        self._before = core.listeners
        # Only now: another thread may have added or removed one while this one waited.
        listeners = self.whom()
        plugged = core.blocks.runs(Map.PLUGGED, True) if listeners else ()
        self._announcement = Announcement(listeners, self._event, plugged)
        self.tell(self._announcement)
        self.require_process()
        self.commit()
        self.claim.finish()
        return 0

    def whom(self) -> tuple[Listener, ...]:
        """Whom to tell.

        Raises:
            ValueError: It has come to nothing meanwhile.
        """
        raise NotImplementedError

    def tell(self, announcement: Announcement) -> None:
        """Tells them."""
        announcement.tell()

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
        self.let_go(error)

    def let_go(self, error: BaseException | None) -> None:
        """Ends the claim of what did not come to its end."""
        self.claim.finish()


class Join(Whole):
    """Adds a listener, which is told of all plugged blocks."""

    def __init__(self, core: Core, listener: Listener) -> None:
        super().__init__(core, "on_plug")
        self._listener = listener

    def whom(self) -> tuple[Listener, ...]:
        check_listens(self.core, self._listener, False)
        return (self._listener,)

    def commit(self) -> None:
        self.core.listen((*self.core.listeners, self._listener))


class Leave(Whole):
    """Removes a listener, which is told that all plugged blocks go."""

    def __init__(self, core: Core, listener: Listener) -> None:
        super().__init__(core, "on_unplug")
        self._listener = listener

    def whom(self) -> tuple[Listener, ...]:
        check_listens(self.core, self._listener, True)
        return (self._listener,)

    def commit(self) -> None:
        self.core.listen(tuple(known for known in self.core.listeners if known is not self._listener))


class Close(Whole):
    """Closes the block map, once what is pending is discarded and everybody was told that all plugged blocks go.

    Args:
        force: Close whatever lives, and whatever listeners say.
    """

    def __init__(self, core: Core, *, force: bool = False) -> None:
        super().__init__(core, "on_unplug", strict=not force)
        self._force = force
        self._pending = EMPTY
        self._late: Work | None = None

    def whom(self) -> tuple[Listener, ...]:
        self._discard_pending()  # first: if that fails, nobody was told anything yet
        return self.core.listeners

    def _discard_pending(self) -> None:
        """Discards what those who were in flight have left: of what comes after the flush nobody else ever would.

        That flush remains, as it holds nobody off: here there is mostly nothing.
        """
        core = self.core
        # Asked first: to look through the map of a large region takes a millisecond, and memory.
        if not core.blocks.counts().pending:
            return
        self._pending = core.block_runs(list(core.blocks.runs(Map.PENDING, True)))
        started = time.monotonic()
        self._late = core.work("discard", self._pending)
        try:
            self._late.run()
        except StepFailedError as failure:
            if not self._force:
                raise discard_error(failure.errno, failure.offset >> core.shift) from None
            _log.debug("a late discard failed as the region closed", exc_info=True)
        core.tally.flushed(self._late.calls, time.monotonic() - started)

    def tell(self, announcement: Announcement) -> None:
        try:
            announcement.tell()
        except Exception:
            if not self._force:
                raise
            _log.debug("a listener failed as the region closed", exc_info=True)

    def commit(self) -> None:
        self._finish(*settle(self._late, self.core.shift), close=True)

    def let_go(self, error: BaseException | None) -> None:
        done, failed = settle(self._late, self.core.shift)
        self._finish(done, failed)
        if isinstance(error, DiscardError):
            error.discarded, error.tainted = tuple(done), tuple(failed)
            error.remaining = tuple(subtract(subtract(self._pending, done), failed))

    def _finish(self, done: list[Run], failed: list[Run], *, close: bool = False) -> None:
        block_runs = self.core.block_runs
        self.claim.finish(unplugged=block_runs(done), tainted=block_runs(failed), close=close)


def check_listens(core: Core, listener: Listener, registered: bool) -> None:
    """Raises ValueError unless the listener is registered, or is not; by identity, as equal ones are still two."""
    if any(known is listener for known in core.listeners) is not registered:
        raise ValueError(f"{listener!r} is {'not registered' if registered else 'registered already'}")
