"""A small vhost-user frontend and the guest behind it, in Python: what the tests drive a backend with.

`Frontend` speaks the protocol as QEMU or user-mode Linux do; `Ring` is a driver's
virtqueue in a memfd that stands for the guest's memory.  Both can be told to do what no
real one does.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import select
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from attrs import define, field, frozen

from sparsemem.virtio.vhost_user.messages import Request

PATIENCE_S = 10.0
"""Until a test gives up on an answer; far more than anything takes."""

USER_BASE = 0x7F00_0000_0000
"""Where the frontend says that guest-physical address 0 is in its own memory."""

VERSION_1, PROTOCOL_FEATURES, INDIRECT, EVENT_IDX = 1 << 32, 1 << 30, 1 << 28, 1 << 29
NEXT, WRITE, TABLE = 1, 2, 4

_HEADER = struct.Struct("<III")


def _user(guest_physical: int) -> int:
    return (USER_BASE + guest_physical) % (1 << 64)


class Gone(Exception):
    """The backend has ended the connection."""


@frozen
class Buffer:
    """A piece of guest memory that a descriptor points to."""

    address: int
    length: int
    writable: bool = False


class Guest:
    """Guest memory: a memfd from guest-physical address `base` on."""

    def __init__(self, size: int = 16 << 20, base: int = 0) -> None:
        self.size, self.base = size, base
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, size)
        self.memory = mmap.mmap(self.fd, size)
        self._free = 0x1000

    def allocate(self, length: int, align: int = 16) -> int:
        """The guest-physical address of so many bytes that nothing else uses."""
        at = -(-self._free // align) * align
        self._free = at + length
        assert self._free <= self.size, "the test's guest has no more memory"
        return self.base + at

    def write(self, address: int, data: bytes) -> None:
        at = address - self.base
        self.memory[at : at + len(data)] = data

    def read(self, address: int, length: int) -> bytes:
        at = address - self.base
        return self.memory[at : at + length]

    def put(self, data: bytes) -> Buffer:
        """A buffer with this content for the device to read."""
        address = self.allocate(len(data))
        self.write(address, data)
        return Buffer(address, len(data))

    def room(self, length: int) -> Buffer:
        """A buffer for the device to write."""
        return Buffer(self.allocate(length), length, writable=True)

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)


class Ring:
    """The driver's side of one split virtqueue."""

    def __init__(self, guest: Guest, size: int = 64) -> None:
        self.guest, self.size = guest, size
        self.descriptors = guest.allocate(16 * size)
        self.available = guest.allocate(6 + 2 * size)
        self.used = guest.allocate(6 + 8 * size)
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_NONBLOCK)
        self.err = os.eventfd(0, os.EFD_NONBLOCK)
        self.added = self.seen = 0
        self._head = 0

    def reset(self) -> None:
        """What a driver does that begins anew: the rings are zero."""
        for address, length in (
            (self.descriptors, 16 * self.size),
            (self.available, 6 + 2 * self.size),
            (self.used, 6 + 8 * self.size),
        ):
            self.guest.write(address, bytes(length))
        self.added = self.seen = self._head = 0

    def describe(self, slot: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        """Writes one descriptor, whatever it may be."""
        raw = struct.pack("<QIHH", address & (1 << 64) - 1, length & 0xFFFFFFFF, flags & 0xFFFF, following & 0xFFFF)
        self.guest.write(self.descriptors + 16 * slot, raw)

    def chain(self, buffers: Sequence[Buffer], *, indirect: bool = False) -> int:
        """Describes the buffers; the head."""
        if indirect:
            table = b"".join(
                struct.pack("<QIHH", b.address, b.length, self._flags(b, i, buffers), i + 1)
                for i, b in enumerate(buffers)
            )
            at = self.guest.put(table)
            head = self._slot()
            self.describe(head, at.address, at.length, TABLE)
            return head
        slots = [self._slot() for _ in buffers]
        for i, (slot, buffer) in enumerate(zip(slots, buffers, strict=True)):
            following = slots[i + 1] if i + 1 < len(slots) else 0
            self.describe(slot, buffer.address, buffer.length, self._flags(buffer, i, buffers), following)
        return slots[0]

    def _slot(self) -> int:
        self._head = (self._head + 1) % self.size
        return self._head

    @staticmethod
    def _flags(buffer: Buffer, i: int, buffers: Sequence[Buffer]) -> int:
        return (WRITE if buffer.writable else 0) | (NEXT if i + 1 < len(buffers) else 0)

    def offer(self, head: int) -> None:
        """Makes a chain available."""
        self.guest.write(self.available + 4 + 2 * (self.added % self.size), struct.pack("<H", head))
        self.added = (self.added + 1) % (1 << 16)
        self.guest.write(self.available + 2, struct.pack("<H", self.added))

    def notify(self) -> None:
        """Kicks."""
        os.eventfd_write(self.kick, 1)

    def used_index(self) -> int:
        return int(struct.unpack("<H", self.guest.read(self.used + 2, 2))[0])

    def used_entry(self, index: int) -> tuple[int, int]:
        """`(head, bytes written)`."""
        head, length = struct.unpack("<II", self.guest.read(self.used + 4 + 8 * (index % self.size), 8))
        return head, length

    def wait(self) -> tuple[int, int]:
        """The next used entry; waits for the interrupt."""
        self.guest.write(self.available + 4 + 2 * self.size, struct.pack("<H", self.seen))
        while self.used_index() == self.seen:
            if not select.select([self.call], [], [], PATIENCE_S)[0]:
                raise TimeoutError("no answer")
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.call)
        entry = self.used_entry(self.seen)
        self.seen = (self.seen + 1) % (1 << 16)
        return entry

    def request(self, data: bytes = b"", room: int = 0, *, indirect: bool = False) -> bytes:
        """Sends a request and waits for its answer."""
        buffers = ([self.guest.put(data)] if data else []) + ([self.guest.room(room)] if room else [])
        head = self.chain(buffers, indirect=indirect)
        self.offer(head)
        self.notify()
        back, length = self.wait()
        assert back == head
        return self.guest.read(buffers[-1].address, length) if room else b""

    def close(self) -> None:
        for fd in (self.kick, self.call, self.err):
            os.close(fd)


@define(eq=False)
class Frontend:
    """A connection to a backend."""

    path: str
    protocol: int = field(default=0x229, kw_only=True)  # MQ, REPLY_ACK, BACKEND_REQ, CONFIG: as QEMU has it
    socket: socket.socket = field(init=False)
    notices: socket.socket | None = field(init=False, default=None)
    record: list[tuple[bytes, int]] | None = field(
        default=None, kw_only=True
    )  # what was sent, and how many descriptors

    def __attrs_post_init__(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(self.path)

    # ---- messages --------------------------------------------------------------------------

    def send_raw(self, data: bytes, fds: Iterable[int] = ()) -> None:
        numbers = array.array("i", fds)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if numbers else []
        if self.record is not None:
            self.record.append((data, len(numbers)))
        try:
            self.socket.sendmsg([data], ancillary)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Gone from error

    def send(self, request: int, payload: bytes = b"", fds: Iterable[int] = (), *, need_reply: bool = False) -> None:
        self.send_raw(_HEADER.pack(request, 1 | (8 if need_reply else 0), len(payload)) + payload, fds)

    def receive(self) -> tuple[int, bytes]:
        """The next answer: request and payload."""
        header = self._exactly(_HEADER.size)
        request, flags, size = _HEADER.unpack(header)
        assert flags == 5, "version 1, and a reply"
        return request, self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                more = self.socket.recv(size - len(data))
            except ConnectionResetError as error:
                raise Gone from error
            if not more:
                raise Gone
            data += more
        return data

    def ask(self, request: int, payload: bytes = b"", fds: Iterable[int] = ()) -> bytes:
        """Sends and returns the answer's payload."""
        self.send(request, payload, fds)
        got, answer = self.receive()
        assert got == request
        return answer

    def number(self, request: int, payload: bytes = b"") -> int:
        return int(struct.unpack("<Q", self.ask(request, payload))[0])

    def do(self, request: int, payload: bytes = b"", fds: Iterable[int] = ()) -> int:
        """Sends with need_reply: 0 if it was done.  Without REPLY_ACK, waits until it was handled."""
        if self.protocol & 1 << 3:
            self.send(request, payload, fds, need_reply=True)
            got, answer = self.receive()
            assert got == request
            return int(struct.unpack("<Q", answer)[0])
        self.send(request, payload, fds)
        self.number(Request.GET_FEATURES)
        return 0

    # ---- what every frontend does ------------------------------------------------------------

    def introduce(self) -> int:
        """As QEMU does before the guest runs; the features offered."""
        offered = self.number(Request.GET_FEATURES)
        assert self.number(Request.GET_PROTOCOL_FEATURES) & self.protocol == self.protocol
        self.send(Request.SET_PROTOCOL_FEATURES, struct.pack("<Q", self.protocol))
        if self.protocol & 1:
            self.number(Request.GET_QUEUE_NUM)
        if self.protocol & 1 << 5:
            self.notices, theirs = socket.socketpair()
            self.notices.settimeout(PATIENCE_S)
            assert self.do(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()]) == 0
            theirs.close()
        self.send(Request.SET_OWNER)
        return offered

    def share(self, ranges: Sequence[tuple[int, int, int]]) -> int:
        """SET_MEM_TABLE of `(guest-physical, size, fd)`."""
        table = b"".join(struct.pack("<QQQQ", base, size, _user(base), 0) for base, size, _ in ranges)
        return self.do(Request.SET_MEM_TABLE, struct.pack("<II", len(ranges), 0) + table, [fd for _, _, fd in ranges])

    def add_region(self, base: int, size: int, fd: int) -> int:
        return self.do(Request.ADD_MEM_REG, struct.pack("<8xQQQQ", base, size, _user(base), 0), [fd])

    def remove_region(self, base: int, size: int) -> int:
        return self.do(Request.REM_MEM_REG, struct.pack("<8xQQQQ", base, size, _user(base), 0))

    def start(self, rings: Sequence[Ring], features: int, bases: Sequence[int] | None = None) -> None:
        """What comes at DRIVER_OK, but for the memory."""
        assert self.do(Request.SET_FEATURES, struct.pack("<Q", features | VERSION_1 | PROTOCOL_FEATURES)) == 0
        for i, ring in enumerate(rings):
            self.start_ring(i, ring, bases[i] if bases is not None else 0)

    def start_ring(self, i: int, ring: Ring, base: int = 0) -> None:
        assert self.do(Request.SET_VRING_NUM, struct.pack("<II", i, ring.size)) == 0
        assert self.do(Request.SET_VRING_BASE, struct.pack("<II", i, base)) == 0
        assert self.address(i, ring) == 0
        assert self.do(Request.SET_VRING_ERR, struct.pack("<Q", i), [ring.err]) == 0
        assert self.do(Request.SET_VRING_CALL, struct.pack("<Q", i), [ring.call]) == 0
        assert self.do(Request.SET_VRING_KICK, struct.pack("<Q", i), [ring.kick]) == 0
        assert self.do(Request.SET_VRING_ENABLE, struct.pack("<II", i, 1)) == 0

    def address(self, i: int, ring: Ring) -> int:
        where = struct.pack(
            "<IIQQQQ", i, 0, USER_BASE + ring.descriptors, USER_BASE + ring.used, USER_BASE + ring.available, 0
        )
        return self.do(Request.SET_VRING_ADDR, where)

    def stop_ring(self, i: int) -> int:
        """As QEMU does when the guest reboots or is paused; where the ring stands."""
        self.send(Request.SET_VRING_ENABLE, struct.pack("<II", i, 0))
        index, base = struct.unpack("<II", self.ask(Request.GET_VRING_BASE, struct.pack("<II", i, 0)))
        assert index == i
        return int(base)

    def config(self, size: int, offset: int = 0) -> bytes:
        answer = self.ask(Request.GET_CONFIG, struct.pack("<III", offset, size, 0) + bytes(size))
        return answer[12:]

    def set_config(self, offset: int, data: bytes) -> int:
        return self.do(Request.SET_CONFIG, struct.pack("<III", offset, len(data), 0) + data)

    def wait_for_notice(self) -> None:
        """Until the backend tells that the configuration has changed."""
        assert self.notices is not None
        data = b""
        while len(data) < 12:
            more = self.notices.recv(12 - len(data))
            assert more, "the backend has closed its channel"
            data += more
        assert _HEADER.unpack(data) == (2, 1, 0)

    def close(self) -> None:
        self.socket.close()
        if self.notices is not None:
            self.notices.close()


@contextlib.contextmanager
def connected(path: str, guest: Guest, rings: Sequence[Ring], features: int = 0, **more: Any) -> Iterator[Frontend]:
    """A frontend whose guest runs, with all its memory in one range."""
    frontend = Frontend(path, **more)
    try:
        frontend.introduce()
        assert frontend.share([(guest.base, guest.size, guest.fd)]) == 0
        frontend.start(rings, features)
        yield frontend
    finally:
        frontend.close()
