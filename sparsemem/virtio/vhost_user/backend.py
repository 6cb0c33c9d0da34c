"""One device behind vhost-user: what outlives a frontend, and how a request is served.

A request goes through these steps, and may be cut off between any two (by kill -9, at
worst); what follows tells how it is answered the same way all the same:

1. taken off the queue; the used index still says that it is to come;
2. done by the device;
3. recorded: the device's state and the answer, in one file that is replaced as a whole;
4. answered in the guest's memory, the used index last;
5. told.

Cut off before 3, the record is of the time before the request: the device is made from
that state again (whatever a plug had populated is discarded, whatever an unplug had
still to discard is discarded now), and doing it again gives the answer that it would
have had.  Cut off after 3, the request is found at the index that the record names, and
gets the recorded answer without being done again: done twice, a plug would be an ERROR,
after which the guest's driver gives up for good.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator

from attrs import define, field, frozen

from sparsemem.virtio.device import Device, GuestError
from sparsemem.virtio.guest_memory import GuestMemory, GuestMemoryError, RegionRange
from sparsemem.virtio.queue import EVENT_IDX, INDIRECT, Chain, Queue, check_room
from sparsemem.virtio.vhost_user.state import Answer, Journal, digest
from sparsemem.virtio.vhost_user.vring import Vring, signal

_log = logging.getLogger("sparsemem")

VERSION_1 = 1 << 32
PROTOCOL_FEATURES = 1 << 30
TRANSPORT_FEATURES = VERSION_1 | PROTOCOL_FEATURES | EVENT_IDX | INDIRECT

NEEDS_RESET = 0x40
"""The status bit of a device that cannot go on."""

_TURN = 64
"""Requests served before the loop looks at the frontend again: a guest that never ends keeps nobody out."""


@frozen
class BackendStats:
    """What one device has done, at one moment.

    Attributes:
        connected: Whether a frontend is there.
        frontends: How many there have been.
        running: Rings that run.
        answered: Requests answered, by queue.
        failures: How often the device came to need a reset.
        needs_reset: Why it does now, or "".
        last_failure: Why it last did, or "".
        trouble: What the host cannot do at present (write the state file, say), or "".
        records: How often the state file was written.
    """

    connected: bool
    frontends: int
    running: int
    answered: tuple[int, ...]
    failures: int
    needs_reset: str
    last_failure: str
    trouble: str
    records: int


@define(eq=False)
class Backend:
    """A device with its rings.

    One thread at a time calls it, but for `stats`, and for `config_changed` and
    `answer_late`, which it gives to the device.

    Attributes:
        name: For the log.
        device: What is served.
        memory: The guest's memory, which the session fills in.
        journal: Where the state is kept, or None.
        expected: Where the device's own memory must be in the guest; else it says so.
        wake: Called, from any thread, when there is something to do; set by the server.
    """

    name: str
    device: Device
    memory: GuestMemory
    journal: Journal | None = None
    expected: RegionRange | None = None
    wake: Callable[[], None] = field(init=False, default=lambda: None)
    vrings: tuple[Vring, ...] = field(init=False)
    features: int = field(init=False, default=0)
    status: int = field(init=False, default=0)
    config_pending: bool = field(init=False, default=False)
    connected: bool = field(init=False, default=False)
    frontends: int = field(init=False, default=0)
    needs_reset: str = field(init=False, default="")
    trouble: str = field(init=False, default="")
    _misplaced: str = field(init=False, default="")
    _last: Answer | None = field(init=False, default=None)
    _recorded: dict[str, object] | None = field(init=False, default=None)
    _used: bool = field(init=False, default=False)  # by a driver, since the device was last reset
    _left: bool = field(init=False, default=False)  # by that driver: it has stopped all rings
    _failures: int = field(init=False, default=0)
    _last_failure: str = field(init=False, default="")
    _unsaved: bool = field(init=False, default=False)
    _late: deque[tuple[int, bytes]] = field(init=False, factory=deque)

    def __attrs_post_init__(self) -> None:
        self.vrings = tuple(Vring(index) for index in range(self.device.queues(self.device.features)))
        found = None if self.journal is None else self.journal.load()
        if found is not None:
            state, self._last = found
            self.device.load(state)
            self._used = self._left = True
            self._recorded = state
        self.device.config_changed = self._config_changed
        self.device.answer_late = self._answer_late
        if self.journal is not None and found is None:
            # Now, so that a place where nothing can be written is known before a guest is there.
            self._recorded = self.device.save()
            self.journal.record(self._recorded, None)

    # ---- from any thread ------------------------------------------------------------------

    def _config_changed(self) -> None:
        self.config_pending = self._unsaved = True
        self.wake()

    def _answer_late(self, queue: int, answer: bytes) -> None:
        self._late.append((queue, answer))
        self.wake()

    def stats(self) -> BackendStats:
        """What it has done."""
        return BackendStats(
            connected=self.connected,
            frontends=self.frontends,
            running=sum(vring.running for vring in self.vrings),
            answered=tuple(vring.answered for vring in self.vrings),
            failures=self._failures,
            needs_reset=self.needs_reset,
            last_failure=self._last_failure,
            trouble=self.trouble or self._misplaced,
            records=0 if self.journal is None else self.journal.written,
        )

    # ---- frontends ------------------------------------------------------------------------

    @property
    def offered(self) -> int:
        """The features that a driver may accept."""
        return self.device.features | TRANSPORT_FEATURES

    @property
    def running(self) -> bool:
        """Whether any ring runs."""
        return any(vring.running for vring in self.vrings)

    def connect(self) -> None:
        """A frontend is there; what the last one set up is gone."""
        self.disconnect()
        self.connected = True
        self.frontends += 1

    def disconnect(self) -> None:
        """The frontend has gone; the device's own state stays."""
        for vring in self.vrings:
            self.stop(vring)
            vring.close()
        self.memory.replace(())
        self.features = self.status = 0
        self._misplaced = ""
        self.recover()
        self.connected = False

    def negotiate(self, features: int) -> None:
        """Takes the features that the driver has accepted.

        Raises:
            GuestError: They were not offered, or the device refuses to work so.
        """
        if features & ~self.offered:
            raise GuestError(f"features {features & ~self.offered:#x}, which were not offered")
        if not features & VERSION_1:
            raise GuestError("a driver of before VIRTIO 1.0")
        self.device.negotiate(features & self.device.features)
        self.features = features

    def stop(self, vring: Vring) -> int:
        """Stops a ring; where the device stands in it."""
        base = vring.stop()
        if not self.running:
            self._left = self._used
            self.recover()
        return base

    def new_driver(self) -> None:
        """A driver begins anew.  Resets the device, if another has worked with it.

        A reset does not show in vhost-user: a guest that reboots and one that is only paused
        stop the rings in the same way.  But a driver that begins anew writes to the configuration
        before its rings run, or has rings that begin at 0 and did not stop there.
        """
        if not self._left:
            return
        self._used = self._left = False
        self.device.reset()
        if self.features:
            # The reset is of the time before; what the new driver has accepted already stands.
            self.device.negotiate(self.features & self.device.features)

    def fail(self, reason: str, vring: Vring | None = None) -> None:
        """The device needs a reset: nothing is served until the rings are stopped, or the status is 0."""
        self._failures += 1
        self.needs_reset = self._last_failure = reason
        _log.error("%s: needs a reset: %s", self.name, reason)
        for each in self.vrings if vring is None else (vring,):
            signal(each.err)
        self._config_changed()  # which is how a driver comes to look at the status

    def recover(self) -> None:
        """The rings were stopped, or the status is 0: whatever was wrong is over."""
        self.needs_reset = ""

    def check_place(self) -> None:
        """Says so where the guest does not have the device's memory where the device says that it is."""
        expected = self.expected
        if expected is None:
            return
        there = any(
            entry.region is expected.region and entry.address - entry.offset == expected.address - expected.offset
            for entry in self.memory.ranges
        )
        misplaced = "" if there else f"the guest does not have the device's memory at {expected.address:#x}"
        if misplaced and misplaced != self._misplaced:
            _log.warning("%s: %s", self.name, misplaced)
        self._misplaced = misplaced

    # ---- requests -------------------------------------------------------------------------

    def serve(self, vring: Vring) -> bool:
        """Serves a ring for a while; whether there may be more to do at once."""
        more = False
        with self._failing(vring):
            queue = None if self.needs_reset else vring.ready(self.memory, self.features)
            if queue is not None:
                self._used = True
                more = all(vring.held is None and self._serve_one(vring, queue) for _ in range(_TURN))
        return more

    @contextlib.contextmanager
    def _failing(self, vring: Vring) -> Iterator[None]:
        """What goes wrong within it is the device's, and nobody else's."""
        try:
            yield
        except (GuestError, GuestMemoryError) as error:
            self.fail(f"queue {vring.index}: {error}", vring)
        except Exception as error:  # an error of ours: the other guests of this process go on
            _log.exception("%s: queue %d", self.name, vring.index)
            self.fail(f"queue {vring.index}: {type(error).__name__}: {error}", vring)

    def _serve_one(self, vring: Vring, queue: Queue) -> bool:
        """One request; False if there is none, or if the host cannot go on with it now."""
        chain = queue.pop()
        if chain is None:
            return False
        request = digest(chain.head, chain.element.data, chain.element.room)
        last = self._last
        if last is not None and (last.queue, last.index, last.request) == (vring.index, chain.index, request):
            answer: bytes | None = bytes.fromhex(last.answer)
        else:
            answer = self.device.handle(vring.index, chain.element)
        if answer is None:
            vring.held = chain
            return False
        return self._finish(vring, queue, chain, Answer(vring.index, chain.index, request, answer.hex()), answer)

    def _finish(self, vring: Vring, queue: Queue, chain: Chain, record: Answer, answer: bytes) -> bool:
        check_room(chain.element, answer)
        self._last = record
        if not self.save():
            queue.rewind()
            return False
        wanted = queue.push(chain, answer)
        self._last = None
        vring.answered += 1
        if wanted:
            signal(vring.call)
        return True

    def catch_up(self) -> None:
        """Does what other threads have left to do: a state to write, requests whose answers have come meanwhile."""
        if self._unsaved:
            self._unsaved = False
            self._unsaved = not self.save()
        while self._late:
            index, answer = self._late.popleft()
            vring = self.vrings[index]
            queue, chain = vring.queue, vring.held
            if queue is None or chain is None or self.needs_reset:
                continue  # it was stopped: the request is found again when it goes on
            vring.held = None
            request = digest(chain.head, chain.element.data, chain.element.room)
            with self._failing(vring):
                self._finish(vring, queue, chain, Answer(index, chain.index, request, answer.hex()), answer)

    def close(self) -> None:
        """The end: the device is let go of, and the guest's memory."""
        self.disconnect()
        self.device.config_changed = self.device.answer_late = _ignore
        self.memory.close()

    def save(self) -> bool:
        """Writes the state file, if there is one; False if that failed, and then nothing may be answered.

        A request that left the state as it was needs no record: done again it comes to the same, or
        to what is right then (a balloon's pages, a question, what is refused).
        """
        if self.journal is None:
            return True
        state = self.device.save()
        if state == self._recorded:
            return True
        try:
            self.journal.record(state, self._last)
        except OSError as error:
            trouble = f"{self.journal.path}: {error.strerror}: requests wait until it can be written"
            if trouble != self.trouble:
                _log.error("%s: %s", self.name, trouble)
            self.trouble = trouble
            return False
        self.trouble, self._recorded = "", state
        return True


def _ignore(*_: object) -> None:
    """For a device without a transport."""
