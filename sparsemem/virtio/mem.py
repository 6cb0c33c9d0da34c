"""virtio-mem: a region as memory that a guest plugs and unplugs, as the host asks it to.

VIRTIO 1.2, section 5.15.  The rules in brackets are its requirements on devices, by
the numbers of tests/virtio/test_mem_rules.py.

A request is judged in QEMU's order, which drivers rely on: ERROR for blocks that
cannot be meant, NACK for more than was requested, ERROR for blocks in the wrong
state, BUSY if the host cannot do it now.  Nothing is recorded before it is done:
the region's bitmap is the only record, and changes with the memory or not at all.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable

from sparsemem.errors import (
    BlockRangeError,
    BlockStateError,
    DiscardError,
    ListenerVetoError,
    PopulateError,
    Run,
    SparseMemError,
    UnsupportedError,
    ViewsAliveError,
)
from sparsemem.region import BlockState, Region
from sparsemem.runs import collect, subtract
from sparsemem.units import Size, exact_size, parse_size
from sparsemem.virtio.device import Device, Element, GuestError
from sparsemem.virtio.watched import Watched
from sparsemem.virtio.wire import MemAnswer, MemConfig, MemFeature, MemOperation, MemRequest, MemResponse, MemState

_log = logging.getLogger("sparsemem")

WINDOW = 256 << 20
"""Bytes beyond the requested size that stay usable; QEMU's figure, of which Linux makes its choice of blocks."""

UsablePolicy = Callable[[int, int], int]
"""Told `(requested size, region size)`; the bytes that are usable, from the start of the region."""

# What a request may fail with on the host's side: the guest is told BUSY and tries again.
_BUSY = (PopulateError, DiscardError, BlockStateError, ViewsAliveError, ListenerVetoError, MemoryError)

_STATES = {
    BlockState.PLUGGED: MemState.PLUGGED,
    BlockState.UNPLUGGED: MemState.UNPLUGGED,
    BlockState.MIXED: MemState.MIXED,
}


def window(requested: int, region: int) -> int:
    """QEMU's policy: a little more than what is requested, and nothing if that is nothing."""
    return min(region, requested + WINDOW) if requested else 0


def everything(requested: int, region: int) -> int:
    """All of the region, whatever is requested."""
    return region


POLICIES: dict[str, UsablePolicy] = {"window": window, "all": everything}


class BrokenError(SparseMemError, RuntimeError):
    """An unplug failed half way, and so did plugging the blocks again: the guest lacks memory that it counts on."""


class MemListener:
    """Who wants to know what a virtio-mem device does; override what you need.

    Called without any lock held, in the thread that made it happen: the transport's,
    before the guest sees the answer, or the one that set the requested size.  What a
    method raises is logged and changes nothing.
    """

    def on_reached(self, size: int) -> None:
        """The guest has plugged as much as was requested."""

    def on_refused(self, size: int, error: Exception) -> None:
        """The host could not do what the guest asked for on its way to `size`; it will try again."""

    def on_answer(self, request: MemRequest, response: MemResponse) -> None:
        """A request is about to be answered."""


class VirtioMem(Device, Watched[MemListener]):
    """A virtio-mem device over a region, which it is the only one to plug and unplug.

    Args:
        region: Its memory; it stays the caller's, who closes it.
        address: Where it begins in the guest; a multiple of the block size.
        requested_size: What the guest is to plug, at first.
        node_id: The guest's NUMA node that it belongs to (ACPI proximity domain), or None.
        prealloc: Populate on plug, so that a guest whose host is out of memory is told
            BUSY.  With False the memory comes by the guest's own accesses, and when there
            is none left they fail, as with any overcommitted memory.
        usable: How much of the region may be plugged at all: "window" is QEMU's policy
            (`requested + 256 MiB`), "all" the whole region, or a function of (requested
            size, region size).  It never shrinks but with all unplugged [7].
        unplugged_inaccessible: Whether drivers are told not to read unplugged memory:
            "offer", "require" refuses those who would [9], "off" does not ask for it.

    Raises:
        ValueError: A size or address that does not fit.
        UnsupportedError: The region's memory cannot be given back.
    """

    device_id = 24
    config_size = MemConfig.SIZE

    def __init__(
        self,
        region: Region,
        *,
        address: int,
        requested_size: Size = 0,
        node_id: int | None = None,
        prealloc: bool = True,
        usable: str | UsablePolicy = "window",
        unplugged_inaccessible: str = "offer",
    ) -> None:
        super().__init__()
        if not region.can_unplug:
            raise UnsupportedError(f"{region.backend} cannot give memory back: no virtio-mem device can be made of it")
        if address < 0 or address % region.block_size or address + region.size > 1 << 64:
            raise ValueError(f"address {address:#x} is not a multiple of {exact_size(region.block_size)} below 2**64")
        if node_id is not None and not 0 <= node_id < 1 << 16:
            raise ValueError(f"node_id {node_id} is out of range: 0 <= node_id < 2**16")
        if unplugged_inaccessible not in ("offer", "require", "off"):
            raise ValueError(f"unplugged_inaccessible {unplugged_inaccessible!r} is none of 'offer', 'require', 'off'")
        if isinstance(usable, str) and usable not in POLICIES:
            raise ValueError(f"usable {usable!r} is none of {', '.join(map(repr, POLICIES))}")
        self.region = region
        self.address = address
        self.prealloc = prealloc
        self.node_id = node_id
        self._policy = POLICIES[usable] if isinstance(usable, str) else usable
        self._required = MemFeature.UNPLUGGED_INACCESSIBLE if unplugged_inaccessible == "require" else MemFeature(0)
        self.features = int(
            (MemFeature.ACPI_PXM if node_id is not None else 0)
            | (MemFeature.UNPLUGGED_INACCESSIBLE if unplugged_inaccessible != "off" else 0)
        )
        self.negotiated = MemFeature(0)
        self._answers: Counter[tuple[MemOperation, MemAnswer]] = Counter()
        self._requested = self._parse_requested(requested_size)
        self._usable = max(self._usable_for(self._requested), self._highest_plugged())

    # ---- the host's side ------------------------------------------------------------------

    @property
    def block_size(self) -> int:
        """Bytes of a block."""
        return self.region.block_size

    @property
    def plugged_size(self) -> int:
        """Bytes that are plugged."""
        return self.region.plugged_size

    @property
    def usable_size(self) -> int:
        """Bytes from the start of the region within which the guest may plug."""
        return self._usable

    @property
    def requested_size(self) -> int:
        """Bytes that the guest is asked to plug; set it, as a size, from any thread."""
        return self._requested

    @requested_size.setter
    def requested_size(self, size: Size) -> None:
        requested = self._parse_requested(size)
        usable = self._usable_for(requested)
        with self._changed:
            self._requested = requested
            self._usable = max(self._usable, usable)
        self.config_changed()
        self._tell_reached()

    @property
    def answers(self) -> dict[tuple[MemOperation, MemAnswer], int]:
        """How often each operation was answered how."""
        return dict(self._answers)

    def wait_reached(self, timeout: float | None = None) -> bool:
        """Waits until as much is plugged as is requested; False if that takes longer than so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self.plugged_size == self._requested, timeout)

    # ---- the transport's side ---------------------------------------------------------------

    def queues(self, features: int) -> int:
        return 1

    def negotiate(self, features: int) -> None:
        if features & ~self.features:
            raise GuestError(f"feature bits {features & ~self.features:#x} of virtio-mem were not offered")
        if self._required & ~features:
            raise GuestError("the driver does not accept UNPLUGGED_INACCESSIBLE, which this device requires")
        self.negotiated = MemFeature(features)

    def read_config(self) -> bytes:
        with self._changed:
            requested, usable = self._requested, self._usable
        return MemConfig(
            block_size=self.block_size,
            node_id=self.node_id or 0,
            address=self.address,
            region_size=self.region.size,
            usable_region_size=usable,
            plugged_size=self.plugged_size,
            requested_size=requested,
        ).pack()

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver may write nothing; a VMM that writes back what it has read is ignored."""
        if offset < 0 or offset + len(data) > self.config_size:
            raise GuestError(f"{len(data)} bytes at offset {offset} are not in a configuration of {self.config_size}")

    def handle(self, queue: int, element: Element) -> bytes:
        if queue != 0:
            raise GuestError(f"virtio-mem has queue 0, and no queue {queue}")
        request = MemRequest.unpack(element.data)
        # Before anything is done: what cannot be answered must not have happened.
        room = sum(length for _, length in element.room)
        if room < MemResponse.SIZE:
            raise GuestError(f"a virtio-mem response has {MemResponse.SIZE} bytes; there is room for {room}")
        before = self.plugged_size
        try:
            response = self._answer(request)
        except (*_BUSY, BrokenError) as error:
            _log.debug("virtio-mem at %#x: %s", self.address, error)
            # BUSY says that nothing has changed; where that cannot be made true, it must not be said.
            response = MemResponse(MemAnswer.ERROR if isinstance(error, BrokenError) else MemAnswer.BUSY)
            self._tell("on_refused", self._requested, error)
        self._answers[request.operation, response.answer] += 1
        self._tell("on_answer", request, response)
        if self.plugged_size != before:
            self._tell_reached()
        return response.pack()

    def reset(self, *, system: bool = False) -> None:
        """A device reset changes no block; a system reset unplugs all, or as much as can be [10]."""
        self.negotiated = MemFeature(0)
        if not system:
            return
        try:
            self.region.unplug_all()
        except _BUSY as error:
            _log.debug("virtio-mem at %#x: a system reset could not unplug all: %s", self.address, error)
            self._tell("on_refused", self._requested, error)
            return
        self._shrink_usable()

    # ---- requests ---------------------------------------------------------------------------

    def _answer(self, request: MemRequest) -> MemResponse:
        if request.operation is MemOperation.UNPLUG_ALL:
            self._undone(self.region.unplug_all)
            self._shrink_usable()
            return MemResponse(MemAnswer.ACK)
        run = self._run(request)
        if run is None:
            return MemResponse(MemAnswer.ERROR)
        state = self.region.state(*run)
        if request.operation is MemOperation.STATE:
            return MemResponse(MemAnswer.ACK, _STATES[state])
        if request.operation is MemOperation.PLUG:
            if self.plugged_size + run[1] * self.block_size > self._requested:
                return MemResponse(MemAnswer.NACK)
            if state is not BlockState.UNPLUGGED:
                return MemResponse(MemAnswer.ERROR)
            self._plug(run)
        else:
            if state is not BlockState.PLUGGED:
                return MemResponse(MemAnswer.ERROR)
            self._undone(lambda: self.region.unplug(*run))
        return MemResponse(MemAnswer.ACK)

    def _run(self, request: MemRequest) -> Run | None:
        """The blocks of a request, or None if there are none such in the usable region [14]."""
        offset, size = request.address - self.address, request.count * self.block_size
        if offset < 0 or offset % self.block_size or not size or offset + size > self._usable:
            return None
        return offset // self.block_size, request.count

    def _plug(self, run: Run) -> None:
        try:
            self.region.plug(*run, populate=self.prealloc)
        except BlockStateError:
            # Left by a plug whose rollback failed; unplugged, so there is nothing to lose.
            if self.region.state(*run) is not BlockState.UNPLUGGED or not self.region.scrub(*run):
                raise
            self.region.plug(*run, populate=self.prealloc)

    def _undone(self, unplug: Callable[[], int]) -> None:
        """Unplugs; if that fails half way, the guest is told BUSY and has its blocks back [16].

        Their content is gone, but the driver has let go of it.  What cannot even be
        discarded at the second try stays plugged, and tainted.
        """
        try:
            unplug()
        except DiscardError as error:
            gone = list(error.discarded)
            for first, count in error.tainted:
                with contextlib.suppress(*_BUSY):
                    self.region.scrub(first, count)
                gone += subtract([(first, count)], self.region.plugged_runs())
            if gone:
                self._put_back(gone)
            raise

    def _put_back(self, runs: list[Run]) -> None:
        """Plugs blocks again, if need be without memory: they must not be missing."""
        try:
            self.region.plug_runs(runs, populate=self.prealloc)
        except _BUSY:
            try:
                self.region.plug_runs(runs, populate=False)
            except _BUSY as error:
                raise BrokenError(f"blocks {runs} are unplugged, and cannot be plugged again: {error}") from error

    # ---- sizes ------------------------------------------------------------------------------

    def _parse_requested(self, size: Size) -> int:
        requested = parse_size(size, "requested_size")
        if requested % self.block_size:
            raise ValueError(f"requested_size {requested} is not a multiple of the block size {self.block_size}")
        if requested > self.region.size:
            raise ValueError(f"requested_size {requested} is more than the region's size {self.region.size}")
        return requested

    def _usable_for(self, requested: int) -> int:
        usable = self._policy(requested, self.region.size)
        if not requested <= usable <= self.region.size:
            raise ValueError(f"usable {usable} is not between requested_size {requested} and {self.region.size}")
        return -(-usable // self.block_size) * self.block_size

    def _highest_plugged(self) -> int:
        """Bytes up to the end of the last plugged block."""
        return max((sum(run) for run in self.region.plugged_runs()), default=0) * self.block_size

    def _shrink_usable(self) -> None:
        """Only when nothing is plugged [7]; the driver is not told, for it has caused it [8]."""
        while True:
            requested = self._requested
            usable = self._usable_for(requested)  # the user's code: not under the lock
            with self._changed:
                if self._requested == requested:
                    self._usable = usable
                    return

    # ---- events -----------------------------------------------------------------------------

    def _tell_reached(self) -> None:
        with self._changed:
            self._changed.notify_all()
            requested = self._requested
        if self.plugged_size == requested:
            self._tell("on_reached", requested)

    # ---- migration ----------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        with self._changed:
            requested, usable = self._requested, self._usable
        return {
            "device": "virtio-mem",
            "address": self.address,
            "block_size": self.block_size,
            "region_size": self.region.size,
            "requested_size": requested,
            "usable_region_size": usable,
            "plugged": [list(run) for run in self.region.plugged_runs()],
        }

    def load(self, state: dict[str, object]) -> None:
        """Takes over what `save` gave: afterwards exactly those blocks are plugged.

        Blocks that are plugged already keep their content, as those of an adopted file do.

        Raises:
            ValueError: It is not this device's, or does not fit; nothing has changed.
            PopulateError: There is no memory for the blocks; nothing has changed.
            DiscardError: Surplus blocks could not be unplugged.
        """
        expected = {
            "device": "virtio-mem",
            "address": self.address,
            "block_size": self.block_size,
            "region_size": self.region.size,
        }
        for name, value in expected.items():
            if state.get(name) != value:
                raise ValueError(f"the state is of another device: {name} is {state.get(name)!r} and not {value!r}")
        requested = self._parse_requested(_whole(state, "requested_size"))
        usable = _whole(state, "usable_region_size")
        if usable % self.block_size or not requested <= usable <= self.region.size:
            raise ValueError(f"the state's usable_region_size {usable} does not fit")
        plugged = _runs(state.get("plugged"), usable // self.block_size)
        there = list(self.region.plugged_runs())
        missing, surplus = subtract(plugged, there), subtract(there, plugged)
        if missing:
            self.region.plug_runs(missing, populate=self.prealloc)
        if surplus:
            self.region.unplug_runs(surplus)  # last, for it cannot be undone
        with self._changed:
            self._requested, self._usable = requested, usable


def _whole(state: dict[str, object], name: str) -> int:
    value = state.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"the state's {name} is {value!r} and no whole number")
    return value


def _runs(value: object, limit: int) -> list[Run]:
    try:
        return list(collect([(first, count) for first, count in value], limit))  # type: ignore[attr-defined]
    except (TypeError, BlockRangeError) as error:
        raise ValueError(f"the state's plugged runs do not fit: {error}") from error
    except ValueError as error:
        raise ValueError(f"the state's plugged runs are no pairs: {error}") from error
