"""What takes the whole region: listeners that come and go, its protection, its end."""

from __future__ import annotations

import logging
import os

from sparsemem.blocks import Claim, Map, Want
from sparsemem.engine import StepFailedError
from sparsemem.errors import ReserveError
from sparsemem.listeners import Announcement, Listener
from sparsemem.operations.operation import Core, Operation
from sparsemem.runs import EMPTY

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
        self.require_process()
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
