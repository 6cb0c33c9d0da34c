"""A device behind a listening socket, in a thread of its own.

A thread for each device, and not one event loop for all: a plug populates memory, which
takes a millisecond to seconds, and while C does it without the GIL the other devices and the
control socket go on.  One thread does all that concerns its device (messages, requests,
notices), so that no lock is needed between them, and the order is the one that the
protocol wants: GET_VRING_BASE is answered when no request is in flight.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time

from attrs import define, field

from sparsemem._sys import calls
from sparsemem._sys.descriptor import Descriptor
from sparsemem.virtio.vhost_user.backend import Backend
from sparsemem.virtio.vhost_user.channel import Channel, Disconnected
from sparsemem.virtio.vhost_user.listener import Listener
from sparsemem.virtio.vhost_user.messages import ProtocolError
from sparsemem.virtio.vhost_user.session import Session

_log = logging.getLogger("sparsemem")

_RETRY_S = 1.0
"""How long until the state file is tried again."""

_MESSAGES = 64
"""Messages in a row, before the rings have their turn."""


@define(eq=False)
class Server:
    """Serves a device to one frontend after the other, until it is closed.

    Usable as a context manager.

    Args:
        backend: The device; it belongs to the server from now on.
        path: Where the frontends connect.

    Raises:
        OSError: It cannot listen there.
    """

    backend: Backend
    path: str
    _listener: Listener = field(init=False)
    _wake: Descriptor = field(init=False)
    _waking: threading.Lock = field(init=False, factory=threading.Lock)
    _thread: threading.Thread = field(init=False)
    _session: Session | None = field(init=False, default=None)
    _stopping: bool = field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        self._listener = Listener(self.path)
        self._wake = Descriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), calls.kernel)
        self.backend.wake = self._awake
        # A daemon: a frontend whose memory never answers a fault must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=self.backend.name, daemon=True)
        self._thread.start()

    def _awake(self) -> None:
        with self._waking:  # else its number might be another descriptor's already
            if self._wake.fd >= 0:
                os.eventfd_write(self._wake.fd, 1)

    def close(self, timeout: float = 10.0) -> bool:
        """Ends it: the socket's file is gone, the connection too; whether the thread came to its end in that time."""
        self._stopping = True
        self._awake()
        self._thread.join(timeout)
        self._listener.close()
        if self._thread.is_alive():
            return False
        with self._waking:
            self._wake.close()
        return True

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                try:
                    self._turn()
                except Disconnected as why:
                    self._end(str(why) or "the frontend has gone")
                except ProtocolError as error:
                    _log.error("%s: %s", self.backend.name, error)
                    self._end("of that")
                except Exception:
                    _log.exception("%s: the connection is ended", self.backend.name)
                    self._end("an error of ours")
        finally:
            self._end("the backend ends")
            self.backend.close()

    def _turn(self) -> None:
        """Waits for something to do, and does it."""
        backend, session = self.backend, self._session
        more = False
        if session is not None:
            backend.catch_up()
            for vring in backend.vrings:
                more |= backend.serve(vring)
            session.notify()
        else:
            backend.catch_up()
        ready = self._wait(0.0 if more else self._timeout())
        if self._wake.fd in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake.fd)
        if session is not None:
            for vring in backend.vrings:
                if vring.kick is not None and vring.kick.fd in ready and not vring.drain():
                    raise ProtocolError(f"ring {vring.index}: its kick descriptor is broken")
            for _ in range(_MESSAGES):
                if not session.receive():
                    break
        if self._listener.fileno() in ready:
            self._accept()

    def _wait(self, timeout: float | None) -> set[int]:
        """The descriptors that are ready; few enough that a new list each time costs nothing."""
        poll, session = select.poll(), self._session
        fds = [self._wake.fd, self._listener.fileno()]
        if session is not None:
            fds.append(session.channel.fileno())
            fds += [vring.kick.fd for vring in self.backend.vrings if vring.kick is not None]
            if session.notices is not None:
                poll.register(session.notices, select.POLLOUT)
        for fd in fds:
            poll.register(fd, select.POLLIN)
        return {fd for fd, _ in poll.poll(None if timeout is None else timeout * 1000)}

    def _timeout(self) -> float | None:
        if self.backend.trouble:
            return _RETRY_S
        deadline = None if self._session is None else self._session.channel.deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic()) + 0.01

    def _accept(self) -> None:
        connected = self._listener.accept()
        if connected is None:
            return
        if self._session is not None:
            _log.warning("%s: a second frontend is turned away", self.backend.name)
            connected.close()
            return
        _log.info("%s: a frontend has connected", self.backend.name)
        self._session = Session(self.backend, Channel(connected))

    def _end(self, why: str) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()
            _log.info("%s: the connection has ended: %s", self.backend.name, why)
