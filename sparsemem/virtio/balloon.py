"""virtio-balloon: a guest gives pages back, and may have them again.

VIRTIO 1.2, section 5.5.  The driver's page frames have 4 KiB, whatever the pages of
the host: where those are larger, all that are partly in the balloon are remembered,
and discarded when whole.

No request has an answer that could tell of a failure, and none needs one: a page
that could not be discarded is only memory that was not saved.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterable

from sparsemem.bitmap import Bitmap
from sparsemem.errors import DeadlineError, DiscardError, UnsupportedError
from sparsemem.region import Region
from sparsemem.runs import Runs, single
from sparsemem.units import Size, exact_size, parse_size
from sparsemem.virtio.device import Device, Element, GuestError
from sparsemem.virtio.guest_memory import GuestMemory, MemoryRange, Table
from sparsemem.virtio.watched import Watched
from sparsemem.virtio.wire import (
    FRAME_SHIFT,
    FRAME_SIZE,
    HINT_DONE,
    HINT_FIRST,
    HINT_STOP,
    BalloonConfig,
    BalloonFeature,
    GuestStats,
    unpack_command,
    unpack_frames,
)

_log = logging.getLogger("sparsemem")

_NUMBERS = 1 << 32

INFLATE, DEFLATE, STATS, FREE_PAGE, REPORTING = "inflate", "deflate", "stats", "free_page", "reporting"

_OPTIONAL_QUEUES = (
    (STATS, BalloonFeature.STATS_VQ),
    (FREE_PAGE, BalloonFeature.FREE_PAGE_HINT),
    (REPORTING, BalloonFeature.REPORTING),
)


def queue_names(features: int) -> tuple[str, ...]:
    """What the queues are for, by number: they are counted over the features negotiated."""
    return (INFLATE, DEFLATE, *(name for name, feature in _OPTIONAL_QUEUES if features & feature))


class BalloonListener:
    """Who wants to know what a balloon does; override what you need.

    Called without any lock held, in the transport's thread.  What a method raises is
    logged and changes nothing.
    """

    def on_reached(self, size: int) -> None:
        """The balloon has the size that it should have."""

    def on_stats(self, stats: GuestStats) -> None:
        """The guest has sent statistics."""

    def on_hint(self, command: int, address: int, length: int) -> None:
        """The guest does not use these bytes at the moment, in the session of free page hints that is on.

        A migration need not send them, as long as it sends what is written later.  They
        must not be discarded: Linux takes hinted pages back when memory is short, and
        does not ask.
        """

    def on_hints_done(self, command: int) -> None:
        """The guest has sent all its hints; `finish_hinting` lets it have the pages back."""

    def on_failed(self, error: Exception) -> None:
        """Pages could not be discarded."""


class _Partial:
    """The frames of a region that are in the balloon, where they are smaller than what can be discarded.

    Listens to the region, if blocks of it come and go: a block that does starts with none.
    """

    def __init__(self, region: Region, unit: int) -> None:
        self.region = region
        self._shift = (unit >> FRAME_SHIFT).bit_length() - 1
        self._block = region.block_size >> FRAME_SHIFT
        frames, whole = region.size >> FRAME_SHIFT, 1 << self._shift
        self._map = Bitmap(-(-frames // whole) * whole)
        self._lock = threading.Lock()  # the region's listeners are called from other threads

    def inflate(self, frames: Runs, *, keep: bool) -> Runs:
        """Puts frames in; the runs of frames that are whole units now.  Without `keep`, all are forgotten again."""
        with self._lock:
            frames.fill(self._map, True)
            whole = frames.whole(self._map, self._shift).scaled(self._shift)
            if not keep:
                frames.fill(self._map, False)
        return whole

    def deflate(self, frames: Runs) -> None:
        """Takes frames out."""
        with self._lock:
            frames.fill(self._map, False)

    def clear(self) -> None:
        """Takes all frames out."""
        with self._lock:
            self._map.clear(0, self._map.nbits)

    @property
    def frames(self) -> int:
        """How many are in."""
        with self._lock:
            return self._map.count(0, self._map.nbits)

    def on_plug(self, first: int, count: int) -> None:
        self.on_unplug(first, count)

    def on_unplug(self, first: int, count: int) -> None:
        with self._lock:
            self._map.clear(first * self._block, count * self._block)


class VirtioBalloon(Device, Watched[BalloonListener]):
    """A virtio-balloon device over guest memory.

    Args:
        memory: The guest's memory, or a region that is all of it, from address 0 on.
        target: How large the balloon should be, at first; a multiple of 4 KiB.
        stats: Offer statistics.
        deflate_on_oom: Let the guest take pages out when it runs out of memory.
        hinting: Offer free page hints; see `start_hinting`.
        reporting: Offer free page reporting: the guest's free pages are discarded as
            they come, whatever the target.
        page_poison: Let the guest say what it fills free pages with; those are not
            discarded on a report unless that is zero.
        granularity: Discard no less than this much at once, a power of two; pages are
            collected until so much is whole.  2 MiB keeps the host's huge pages.

    Raises:
        ValueError: A size that does not fit.
    """

    device_id = 5
    config_size = BalloonConfig.SIZE

    def __init__(
        self,
        memory: GuestMemory | Region,
        *,
        target: Size = 0,
        stats: bool = True,
        deflate_on_oom: bool = True,
        hinting: bool = True,
        reporting: bool = True,
        page_poison: bool = True,
        granularity: Size = FRAME_SIZE,
    ) -> None:
        super().__init__()
        self.memory = GuestMemory.of(memory) if isinstance(memory, Region) else memory
        self.granularity = parse_size(granularity, "granularity")
        if self.granularity < FRAME_SIZE or self.granularity & (self.granularity - 1):
            raise ValueError(f"granularity {self.granularity} is not a power of two of at least {FRAME_SIZE}")
        wanted = {
            # Pages are collected only from drivers that wait before they use them again.
            BalloonFeature.MUST_TELL_HOST: True,
            BalloonFeature.STATS_VQ: stats,
            BalloonFeature.DEFLATE_ON_OOM: deflate_on_oom,
            BalloonFeature.FREE_PAGE_HINT: hinting,
            BalloonFeature.PAGE_POISON: page_poison,
            BalloonFeature.REPORTING: reporting,
        }
        self.features = sum(int(feature) for feature, on in wanted.items() if on)
        self._accept(0)
        self._target = _pages(target, "target")
        self._actual = 0
        self._poison = 0
        self._partial: dict[int, _Partial] = {}
        self._seen: tuple[MemoryRange, ...] = ()
        self._stats: GuestStats | None = None
        self._stats_received = 0
        self._stats_held = False
        self._command = HINT_STOP
        self._last_command = HINT_FIRST - 1
        self._open_since: int | None = None
        self._guest_command: int | None = None
        self.discarded_size = 0
        """Bytes given back in all; a page that was given back twice counts twice."""
        self.failures = 0
        """Requests whose pages could not all be discarded."""

    # ---- the host's side: size -------------------------------------------------------------

    @property
    def target(self) -> int:
        """Bytes that the balloon should have; set it, as a size, from any thread."""
        return self._target << FRAME_SHIFT

    @target.setter
    def target(self, size: Size) -> None:
        pages = _pages(size, "target")
        with self._changed:
            self._target = pages
            self._changed.notify_all()
        self.config_changed()

    @property
    def num_pages(self) -> int:
        """The target in pages of 4 KiB, as the driver sees it."""
        return self._target

    @property
    def actual(self) -> int:
        """Bytes that the balloon has, as the driver says."""
        return self._actual << FRAME_SHIFT

    @property
    def partial_size(self) -> int:
        """Bytes that are in the balloon where host pages are larger than the guest's, discarded or not."""
        return sum(partial.frames for partial in list(self._partial.values())) << FRAME_SHIFT

    def wait_reached(self, timeout: float | None = None) -> bool:
        """Waits until the balloon has its size; False if that takes longer than so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._actual == self._target, timeout)

    def close(self) -> None:
        """Lets go of the regions that it listens to."""
        self._seen = ()
        for partial in [self._partial.pop(key) for key in list(self._partial)]:
            _stop_listening(partial)

    # ---- the host's side: statistics ----------------------------------------------------------

    @property
    def stats(self) -> GuestStats | None:
        """The last statistics that came; None if there are none yet."""
        return self._stats

    def request_stats(self, timeout: float | None = None) -> GuestStats:
        """Asks the guest for statistics and waits for them; from any thread but the transport's.

        Raises:
            UnsupportedError: The driver has none.
            DeadlineError: They did not come within so many seconds.
        """
        if not self.negotiated & BalloonFeature.STATS_VQ:
            raise UnsupportedError("the driver does not send statistics (STATS_VQ)")
        with self._changed:
            before = self._stats_received
            ask, self._stats_held = self._stats_held, False
            queue = self._queues.index(STATS)
        if ask:
            self.answer_late(queue, b"")
        with self._changed:
            if not self._changed.wait_for(lambda: self._stats_received != before, timeout):
                raise DeadlineError(f"the guest sent no statistics within {timeout} s")
            assert self._stats is not None
            return self._stats

    # ---- the host's side: hints -----------------------------------------------------------------

    def start_hinting(self) -> int:
        """Asks the guest to say which of its pages are free, once; the id of the session.

        Until `finish_hinting` or `stop_hinting` the guest keeps those pages aside.

        Raises:
            UnsupportedError: The driver gives no hints.
        """
        if not self.negotiated & BalloonFeature.FREE_PAGE_HINT:
            raise UnsupportedError("the driver gives no free page hints (FREE_PAGE_HINT)")
        with self._changed:
            command = self._last_command + 1
            if command == _NUMBERS:
                command = HINT_FIRST
            # An id that the guest may still be sending hints for would make old ones look new.
            if command == self._open_since:
                raise UnsupportedError("the guest has ended none of 2**32 - 2 sessions of free page hints")
            if self._open_since is None:
                self._open_since = command
            self._last_command = self._command = command
        self.config_changed()
        return command

    def finish_hinting(self) -> None:
        """The hints were used: the guest may have its pages back."""
        self._set_command(HINT_DONE)

    def stop_hinting(self) -> None:
        """No more hints are wanted."""
        self._set_command(HINT_STOP)

    def _set_command(self, command: int) -> None:
        with self._changed:
            self._command = command
        self.config_changed()

    # ---- the transport's side --------------------------------------------------------------------

    def queues(self, features: int) -> int:
        return len(queue_names(features))

    def negotiate(self, features: int) -> None:
        if features & ~self.features:
            raise GuestError(f"feature bits {features & ~self.features:#x} of virtio-balloon were not offered")
        with self._changed:
            self._accept(features)

    def _accept(self, features: int) -> None:
        self.negotiated = BalloonFeature(features)
        self._queues = queue_names(features)
        # Whoever need not tell us first may use a page again while its neighbours still come.
        self._waits = bool(features & BalloonFeature.MUST_TELL_HOST)

    def read_config(self) -> bytes:
        with self._changed:
            return BalloonConfig(self._target, self._actual, self._command, self._poison).pack()

    def write_config(self, offset: int, data: bytes) -> None:
        """Takes `actual` and `poison_val`; VMMs write back all of it, and the rest is the device's."""
        if offset < 0 or offset + len(data) > self.config_size:
            raise GuestError(f"{len(data)} bytes at offset {offset} are not in a configuration of {self.config_size}")
        with self._changed:
            whole = bytearray(BalloonConfig(self._target, self._actual, self._command, self._poison).pack())
            whole[offset : offset + len(data)] = data
            written = BalloonConfig.unpack(bytes(whole))
            moved = written.actual != self._actual
            self._actual, self._poison = written.actual, written.poison_val
            reached = moved and self._actual == self._target
            self._changed.notify_all()
        if reached:
            self._tell("on_reached", written.actual << FRAME_SHIFT)

    def handle(self, queue: int, element: Element) -> bytes | None:
        names = self._queues
        if not 0 <= queue < len(names):
            raise GuestError(f"virtio-balloon has {len(names)} queues with these features, and no queue {queue}")
        if names[queue] == STATS:
            self._hold_stats(element)
            return None
        if names[queue] == INFLATE:
            self._inflate(unpack_frames(element.data))
        elif names[queue] == DEFLATE:
            self._deflate(unpack_frames(element.data))
        elif names[queue] == FREE_PAGE:
            self._hint(element)
        else:
            self._report(element)
        return b""

    def reset(self, *, system: bool = False) -> None:
        """The balloon is empty for a driver that begins anew; the target stays."""
        with self._changed:
            self._accept(0)
            self._stats_held = False
            self._command = HINT_STOP
            self._guest_command = self._open_since = None
            # Written by the driver only; the next one writes when its balloon has changed, and not before.
            self._actual = 0
            self._changed.notify_all()
        for partial in list(self._partial.values()):
            partial.clear()

    # ---- requests -----------------------------------------------------------------------------------

    def _inflate(self, frames: Runs) -> None:
        with self.memory.table() as table:
            for entry, within in table.frames(frames):
                partial = self._partial_of(table, entry)
                whole = within if partial is None else partial.inflate(within, keep=self._waits)
                self._discard(entry, whole.scaled(FRAME_SHIFT))

    def _deflate(self, frames: Runs) -> None:
        with self.memory.table() as table:
            for entry, within in table.frames(frames):
                partial = self._partial_of(table, entry)
                if partial is not None:
                    partial.deflate(within)

    def _report(self, element: Element) -> None:
        """Discards free pages, all of which are checked first."""
        with self.memory.table() as table:
            pieces = [piece for address, length in element.room for piece in table.pieces(address, length)]
            # The guest relies on its pattern being there still.
            if self.negotiated & BalloonFeature.PAGE_POISON and self._poison:
                return
            for entry, offset, length in pieces:
                page = max(entry.region.page_size, FRAME_SIZE)
                first, end = -(-offset // page) * page, (offset + length) // page * page
                if first < end:
                    self._discard(entry, single(first, end - first, entry.region.size))

    def _discard(self, entry: MemoryRange, pages: Runs) -> None:
        """Gives byte runs of a region back, but for what is in unplugged blocks."""
        if not pages.n or not entry.region.can_unplug:
            return
        try:
            self.discarded_size += entry.region.discard_runs(pages, missing_ok=True)
        except DiscardError as error:
            self.discarded_size += sum(length for _, length in error.discarded)
            self.failures += 1
            _log.debug("virtio-balloon: %s", error)
            self._tell("on_failed", error)

    def _hint(self, element: Element) -> None:
        if element.data:
            command = unpack_command(element.data)
            with self._changed:
                ended, self._guest_command = self._guest_command, command
                if command == HINT_STOP and ended == self._last_command:
                    self._open_since = None  # no session is open; else newer ones are
            if command == HINT_STOP and ended is not None and ended >= HINT_FIRST:
                self._tell("on_hints_done", ended)
        with self.memory.table() as table:
            for address, length in element.room:
                table.pieces(address, length)
        command = self._command
        if command >= HINT_FIRST and self._guest_command == command:
            for address, length in element.room:
                self._tell("on_hint", command, address, length)

    def _hold_stats(self, element: Element) -> None:
        stats = GuestStats.unpack(element.data)
        with self._changed:
            self._stats = stats
            self._stats_received += 1
            self._stats_held = True
            self._changed.notify_all()
        self._tell("on_stats", stats)

    # ---- partly ballooned pages -------------------------------------------------------------------

    def _partial_of(self, table: Table, entry: MemoryRange) -> _Partial | None:
        """What is kept of the frames of a range's region; None where a frame can be discarded alone."""
        if table.ranges is not self._seen:
            self._look(table.ranges)
        return self._partial.get(id(entry.region))

    def _look(self, ranges: Iterable[MemoryRange]) -> None:
        """Brings the bookkeeping in line with a new table."""
        regions = {id(entry.region): entry for entry in ranges}
        for key in [key for key in self._partial if key not in regions]:
            _stop_listening(self._partial.pop(key))
        for key, entry in regions.items():
            unit = max(entry.region.page_size, self.granularity)
            if key not in self._partial and unit > FRAME_SIZE:
                partial = _Partial(entry.region, unit)
                if not entry.owned:
                    entry.region.add_listener(partial)
                self._partial[key] = partial
        self._seen = tuple(ranges)

    # ---- events ---------------------------------------------------------------------------------------

    # ---- migration ---------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        """What must outlive this process.

        Pages that are only partly in the balloon are not part of it: the guest may have
        been started anew before somebody loads it, and then they would be in use.
        """
        with self._changed:
            return {
                "device": "virtio-balloon",
                "target": self.target,
                "actual": self.actual,
                "poison": self._poison,
                "last_command": self._last_command,
            }

    def load(self, state: dict[str, object]) -> None:
        if state.get("device") != "virtio-balloon":
            raise ValueError(f"the state is of another device: {state.get('device')!r}")
        target, actual = (_pages(_number(state, name, 1 << 63), name) for name in ("target", "actual"))
        poison, last = _number(state, "poison", _NUMBERS), _number(state, "last_command", _NUMBERS)
        with self._changed:
            self._target, self._actual, self._poison = target, actual, poison
            self._last_command = max(last, HINT_FIRST - 1)


def _stop_listening(partial: _Partial) -> None:
    if not partial.region.closed:
        # What was made for the table has no listener: nobody else plugs there.
        with contextlib.suppress(ValueError):
            partial.region.remove_listener(partial)


def _pages(size: Size, what: str) -> int:
    value = parse_size(size, what)
    if value % FRAME_SIZE or value >> FRAME_SHIFT >= _NUMBERS:
        raise ValueError(f"{what} {value} is not a multiple of {FRAME_SIZE} below {exact_size(_NUMBERS * FRAME_SIZE)}")
    return value >> FRAME_SHIFT


def _number(state: dict[str, object], name: str, limit: int) -> int:
    value = state.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        raise ValueError(f"the state's {name} is {value!r}, and no whole number below {limit}")
    return value
