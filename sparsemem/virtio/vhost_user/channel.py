"""The connection to the frontend: whole messages out of a socket, and answers into it.

Nothing here waits for the rest of a message.  What has come is kept, and the caller's
loop goes on serving the guest; a message that does not end in time ends the
connection.  No byte after a message is read with it, because descriptors come with the
bytes that they were sent with.
"""

from __future__ import annotations

import array
import contextlib
import select
import socket
import time
from typing import Any

from attrs import define, field, frozen

from sparsemem._sys import calls
from sparsemem._sys.descriptor import Descriptor
from sparsemem.virtio.vhost_user import messages
from sparsemem.virtio.vhost_user.messages import Header, ProtocolError, Request

PATIENCE_S = 5.0
"""How long the rest of a message may take, and the frontend to read an answer."""

_ANCILLARY = socket.CMSG_SPACE(messages.MAX_DESCRIPTORS * array.array("i").itemsize)


class Disconnected(Exception):
    """The frontend has gone."""


@frozen
class Message:
    """One request, whole; who takes it owns its descriptors."""

    request: Request
    need_reply: bool
    payload: Any
    descriptors: tuple[Descriptor, ...]


@define(eq=False)
class Channel:
    """A connected socket.  Not thread-safe; `close()` may be called twice."""

    _socket: socket.socket
    _data: bytearray = field(init=False, factory=bytearray)
    _header: Header | None = field(init=False, default=None)
    _descriptors: list[Descriptor] = field(init=False, factory=list)
    _deadline: float | None = field(init=False, default=None)

    def __attrs_post_init__(self) -> None:
        self._socket.setblocking(False)

    def fileno(self) -> int:
        """For poll(2)."""
        return self._socket.fileno()

    @property
    def deadline(self) -> float | None:
        """When the message that has begun must be whole (monotonic seconds); None between messages."""
        return self._deadline

    def receive(self) -> Message | None:
        """The next message, or None if it is not all there yet.

        Raises:
            ProtocolError: It is none; all its descriptors are closed.
            Disconnected: There will be no more.
        """
        try:
            return self._receive()
        except BaseException:
            self._drop()
            raise

    def _receive(self) -> Message | None:
        if self._header is None:
            if not self._fill(messages.HEADER_SIZE):
                return None
            self._header = messages.parse_header(bytes(self._data))
            self._data.clear()
        if not self._fill(self._header.size):
            return None
        header, data, descriptors = self._header, bytes(self._data), tuple(self._descriptors)
        payload = messages.parse_payload(header.request, data, len(descriptors))
        self._header, self._deadline = None, None
        self._data.clear()
        self._descriptors.clear()
        return Message(header.request, header.need_reply, payload, descriptors)

    def _fill(self, size: int) -> bool:
        """Reads up to so many bytes; whether they are all there."""
        while len(self._data) < size:
            if not self._read(size - len(self._data)):
                return False
        return True

    def _read(self, size: int) -> bool:
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(size, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            if self._deadline is not None and time.monotonic() > self._deadline:
                raise ProtocolError(f"the rest of a message did not come within {PATIENCE_S:g} s") from None
            return False
        except OSError as error:
            raise Disconnected(error.strerror) from None
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
                self._descriptors += [Descriptor(fd, calls.kernel) for fd in numbers]
        if flags & socket.MSG_CTRUNC or len(self._descriptors) > messages.MAX_DESCRIPTORS:
            raise ProtocolError(f"more than {messages.MAX_DESCRIPTORS} descriptors with one message")
        if not data:
            raise Disconnected("in the middle of a message" if self._deadline is not None else "")
        if self._deadline is None:
            self._deadline = time.monotonic() + PATIENCE_S
        self._data += data
        return True

    def send(self, data: bytes) -> None:
        """Sends an answer, whole.

        Raises:
            ProtocolError: The frontend does not read it.
            Disconnected: There is nobody to read it.
        """
        deadline = time.monotonic() + PATIENCE_S
        while data:
            try:
                sent = self._socket.send(data, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ProtocolError(f"an answer was not read within {PATIENCE_S:g} s") from None
                waiter = select.poll()
                waiter.register(self._socket, select.POLLOUT)
                waiter.poll(left * 1000)
                continue
            except OSError as error:
                raise Disconnected(error.strerror) from None
            data = data[sent:]

    def _drop(self) -> None:
        """What has come of a message that will not be one."""
        for descriptor in self._descriptors:
            descriptor.close()
        self._descriptors.clear()
        self._data.clear()
        self._header, self._deadline = None, None

    def close(self) -> None:
        """Ends the connection."""
        self._drop()
        with contextlib.suppress(OSError):
            self._socket.close()
