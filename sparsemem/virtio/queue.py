"""A split virtqueue, as the device sees it (VIRTIO 1.2, section 2.7).

The driver owns the memory of the rings and may write anything there, at any moment.
So every field is read once, into a copy; what is read is checked completely before
anybody acts on it; and requests are taken and answered strictly in order.  Then the
used index alone says how far the device came, and a device that was stopped or
killed goes on there.

Ordering.  The driver writes descriptors, then the available index; we load that index
with acquire, so the descriptors are there.  We write the answer and the used entry,
then store the used index with release, so the driver that sees it sees them.  Two
places need more: after we have told how far we read (`avail_event`) or wrote (the used
index), we look at the other side's index or wish again, and that load must not come
first, which even x86 would do; so each store is followed by a full fence.  Both are
single 16-bit accesses in the shim, for Python promises neither.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Protocol

from attrs import define, field, frozen

from sparsemem.virtio.device import Element, GuestError

INDIRECT = 1 << 28
"""VIRTIO_F_INDIRECT_DESC"""
EVENT_IDX = 1 << 29
"""VIRTIO_F_EVENT_IDX"""

MAX_SIZE = 1 << 15
"""Entries of a split queue at most."""

MAX_DATA = 64 << 10
"""Bytes of a request at most: sixty times what the balloon driver sends at once."""

_MAX_BYTES = 1 << 32  # of a whole chain (VIRTIO 1.2, 2.7.5)

_DESCRIPTOR = struct.Struct("<QIHH")
_USED = struct.Struct("<II")
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_NO_INTERRUPT = 1
_RING = 4  # flags and index come before the entries of both rings
_LAP = 1 << 16  # indices count on and wrap


class Memory(Protocol):
    """What a queue needs of guest memory; all raise GuestError outside of it."""

    def check(self, address: int, length: int) -> None:
        """Refuses what is not all guest memory."""

    def read(self, address: int, length: int) -> bytes:
        """A copy."""

    def write(self, address: int, data: bytes) -> None:
        """Writes."""

    def load16(self, address: int) -> int:
        """One access, with acquire."""

    def store16(self, address: int, value: int) -> None:
        """One access, with release, and a full fence after it."""


@frozen
class Rings:
    """Where a queue is, in guest-physical addresses, and how many entries it has."""

    size: int
    descriptors: int
    available: int
    used: int

    def check(self, memory: Memory) -> None:
        """Refuses rings that no driver may make.

        Raises:
            GuestError: The size, an alignment, a range or an overlap is wrong.
        """
        size = self.size
        if not 0 < size <= MAX_SIZE or size & (size - 1):
            raise GuestError(f"a queue of {size} entries, where a power of two up to {MAX_SIZE} is right")
        parts = (
            ("descriptor table", self.descriptors, _DESCRIPTOR.size * size, 16),
            ("available ring", self.available, _RING + 2 * size + 2, 2),
            ("used ring", self.used, _RING + _USED.size * size + 2, 4),
        )
        for what, address, length, align in parts:
            if address % align:
                raise GuestError(f"the {what} at {address:#x} is not aligned to {align} bytes")
            memory.check(address, length)
        ordered = sorted((address, address + length, what) for what, address, length, _ in parts)
        for (_, end, what), (start, _, other) in pairwise(ordered):
            if start < end:
                raise GuestError(f"the {what} and the {other} overlap at {start:#x}")


@frozen
class Chain:
    """A request that was taken off the queue.

    Attributes:
        index: The queue's index at which it was taken, modulo 2^16.
        head: Its first descriptor, by which it is given back.
        element: What it says.
    """

    index: int
    head: int
    element: Element


@define(eq=False)
class Queue:
    """One queue that is running.  Not thread-safe.

    It begins where the used index stands: what was taken and not answered is taken again.

    Args:
        memory: Where its rings and buffers are.
        rings: Checked here.
        features: Those negotiated; INDIRECT and EVENT_IDX count.
        base: Where the other side thinks that the device is; not before the used index.

    Raises:
        GuestError: The rings are wrong, or the base.
    """

    _memory: Memory
    _rings: Rings
    _features: int = field(kw_only=True)
    _base: int = field(kw_only=True)
    _used: int = field(init=False)
    _next: int = field(init=False)
    _signalled: int = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._rings.check(self._memory)
        self._used = self._next = self._signalled = self._memory.load16(self._rings.used + 2)
        ahead = (self._base - self._used) % _LAP
        if ahead > self._rings.size:
            raise GuestError(f"a base of {self._base} where the used index is {self._used}")
        self._memory.store16(self._rings.used, 0)  # notifications are wanted

    @property
    def used(self) -> int:
        """The used index: all before it is answered."""
        return self._used

    @property
    def unanswered(self) -> int:
        """Requests that were taken and not given back."""
        return (self._next - self._used) % _LAP

    def pop(self) -> Chain | None:
        """The next request, or None where there is none; then the driver will notify us of the next.

        Nothing is changed by a request that is refused: it stays the next.

        Raises:
            GuestError: It is none that a driver may make.
        """
        waiting = self._waiting()
        if waiting == 0 and self._features & EVENT_IDX:
            rings = self._rings
            self._memory.store16(rings.used + _RING + _USED.size * rings.size, self._next)
            waiting = self._waiting()
        if waiting == 0:
            return None
        slot = self._next % self._rings.size
        head = self._memory.load16(self._rings.available + _RING + 2 * slot)
        if head >= self._rings.size:
            raise GuestError(f"descriptor {head} of a queue with {self._rings.size}")
        chain = Chain(self._next, head, self._element(head))
        self._next = (self._next + 1) % _LAP
        return chain

    def push(self, chain: Chain, answer: bytes) -> bool:
        """Gives a request back with its answer; whether the driver wants an interrupt.

        The caller has made sure of the answer's room (see `check_room`), and gives back in order.

        Raises:
            GuestError: The guest's memory went away.
        """
        memory, rings = self._memory, self._rings
        rest = memoryview(answer)
        for address, length in chain.element.room:
            if not rest:
                break
            memory.write(address, bytes(rest[:length]))
            rest = rest[length:]
        slot = self._used % rings.size
        memory.write(rings.used + _RING + _USED.size * slot, _USED.pack(chain.head, len(answer)))
        new = (self._used + 1) % _LAP
        memory.store16(rings.used + 2, new)
        self._used = new
        return self._wants_interrupt()

    def rewind(self) -> None:
        """Forgets what was taken and not given back: it is taken again."""
        self._next = self._used

    def _waiting(self) -> int:
        available = self._memory.load16(self._rings.available + 2)
        waiting = (available - self._next) % _LAP
        if waiting > self._rings.size:
            raise GuestError(
                f"an available index of {available}, with {self._next} taken and {self._rings.size} entries"
            )
        return waiting

    def _wants_interrupt(self) -> bool:
        memory, rings = self._memory, self._rings
        old, self._signalled = self._signalled, self._used
        if not self._features & EVENT_IDX:
            return not memory.load16(rings.available) & _NO_INTERRUPT
        event = memory.load16(rings.available + _RING + 2 * rings.size)
        # Whether the index has passed the one that the driver waits for.
        return (self._used - event - 1) % _LAP < (self._used - old) % _LAP

    def _element(self, head: int) -> Element:
        readable: list[tuple[int, int]] = []
        room: list[tuple[int, int]] = []
        for address, length, writable in self._buffers(head):
            if writable:
                room.append((address, length))
            elif room:
                raise GuestError(f"a chain at descriptor {head} with something to read after something to write")
            else:
                readable.append((address, length))
        size = sum(length for _, length in readable)
        if size > MAX_DATA:
            raise GuestError(f"a request of {size} bytes, where {MAX_DATA} is the most")
        if size + sum(length for _, length in room) > _MAX_BYTES:
            raise GuestError(f"a chain at descriptor {head} of more than 4 GiB")
        for part in readable + room:
            self._memory.check(*part)
        return Element(b"".join(self._memory.read(*part) for part in readable), tuple(room))

    def _buffers(self, head: int) -> list[tuple[int, int, bool]]:
        """The buffers of a chain; each descriptor is read once."""
        table, entries, at = self._rings.descriptors, self._rings.size, head
        inside = False  # of an indirect table
        buffers: list[tuple[int, int, bool]] = []
        seen = 0
        while True:
            # A chain has at most as many descriptors as the queue, an indirect one, too: more is a loop.
            seen += 1
            if seen > self._rings.size:
                raise GuestError(f"a chain at descriptor {head} of more than {self._rings.size}, or a loop")
            raw = self._memory.read(table + _DESCRIPTOR.size * at, _DESCRIPTOR.size)
            address, length, flags, following = _DESCRIPTOR.unpack(raw)
            if flags & _INDIRECT:
                # It may come after others, and WRITE in it says nothing (2.7.5.3.2).
                if not self._features & INDIRECT or inside or flags & _NEXT:
                    raise GuestError(f"an indirect descriptor where none may be, in the chain at {head}")
                entries, rest = divmod(length, _DESCRIPTOR.size)
                if rest or not 0 < entries <= self._rings.size:
                    raise GuestError(f"an indirect table of {length} bytes, in the chain at {head}")
                self._memory.check(address, length)
                table, at, inside, seen = address, 0, True, seen - 1
                continue
            if not length:
                raise GuestError(f"an empty buffer in the chain at descriptor {head}")
            buffers.append((address, length, bool(flags & _WRITE)))
            if not flags & _NEXT:
                return buffers
            if following >= entries:
                raise GuestError(f"descriptor {following} of a table with {entries}, in the chain at {head}")
            at = following


def check_room(element: Element, answer: bytes) -> None:
    """Refuses a request that has no room for its answer.

    Raises:
        GuestError: It has less.
    """
    room = sum(length for _, length in element.room)
    if len(answer) > room:
        raise GuestError(f"room for {room} bytes, where the answer has {len(answer)}")
