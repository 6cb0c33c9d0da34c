"""The control socket: one JSON object a line in, one a line out.

    {"command": "resize", "size": "2G"}
    {"ok": true, "result": {...}}      or      {"ok": false, "error": "..."}

A thread of its own, which serves all connections in turn: no command takes long.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

from attrs import define, field

from sparsemem._sys import calls
from sparsemem._sys.descriptor import Descriptor
from sparsemem.errors import SparseMemError
from sparsemem.virtio.vhost_user.listener import Listener

_log = logging.getLogger("sparsemem")

Command = Callable[..., object]
"""Called with the request's other members as keyword arguments; its result becomes JSON."""

_LONGEST = 64 << 10
_MOST_CLIENTS = 16


class ControlError(SparseMemError, ValueError):
    """A command that cannot be done, or that the other side refused; says why."""


@define(eq=False)
class _Client:
    """A connection, what has come of its next line, and what it has still to be sent.

    While that is something nothing more is read: who does not listen is not listened to.
    """

    connection: socket.socket
    data: bytearray = field(factory=bytearray)
    answers: bytearray = field(factory=bytearray)


@define(eq=False)
class ControlServer:
    """Answers commands at a socket that only its user may connect to, until it is closed.

    Args:
        path: Where.
        commands: By name.

    Raises:
        OSError: It cannot listen there.
    """

    path: str
    commands: Mapping[str, Command]
    _listener: Listener = field(init=False)
    _wake: Descriptor = field(init=False)
    _thread: threading.Thread = field(init=False)
    _clients: dict[int, _Client] = field(init=False, factory=dict)
    _stopping: bool = field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        self._listener = Listener(self.path)
        self._wake = Descriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), calls.kernel)
        self._thread = threading.Thread(target=self._run, name=f"control {self.path}", daemon=True)
        self._thread.start()

    def close(self, timeout: float = 10.0) -> None:
        """Ends it; the socket's file is gone, and the connections."""
        self._stopping = True
        if self._wake.fd >= 0:
            os.eventfd_write(self._wake.fd, 1)
        self._thread.join(timeout)
        self._listener.close()
        if not self._thread.is_alive():
            self._wake.close()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        finally:
            for fd in list(self._clients):
                self._drop(fd)

    def _turn(self) -> None:
        poll = select.poll()
        listening = self._listener.fileno()
        for fd in (self._wake.fd, listening):
            poll.register(fd, select.POLLIN)
        for fd, client in self._clients.items():
            poll.register(fd, select.POLLOUT if client.answers else select.POLLIN)
        for fd, _ in poll.poll():
            if fd == listening:
                self._accept()
            elif fd in self._clients:
                client = self._clients[fd]
                try:
                    if not client.answers:
                        self._receive(client)
                    self._answer_lines(client)
                except (OSError, ControlError) as error:
                    _log.debug("control: %s", error)
                    self._drop(fd)

    def _accept(self) -> None:
        connected = self._listener.accept()
        if connected is None:
            return
        if len(self._clients) >= _MOST_CLIENTS:
            connected.close()
            return
        self._clients[connected.fileno()] = _Client(connected)

    def _drop(self, fd: int) -> None:
        self._clients.pop(fd).connection.close()

    @staticmethod
    def _receive(client: _Client) -> None:
        try:
            data = client.connection.recv(_LONGEST)
        except BlockingIOError:
            return
        if not data:
            raise ControlError("the client has gone")
        client.data += data

    def _answer_lines(self, client: _Client) -> None:
        """Answers what is whole, one line after the other, as long as the answers are read."""
        while True:
            if client.answers:
                try:
                    del client.answers[: client.connection.send(client.answers, socket.MSG_NOSIGNAL)]
                except BlockingIOError:
                    return
                continue
            line, newline, rest = bytes(client.data).partition(b"\n")
            if not newline:
                break
            client.data[:] = rest
            client.answers += json.dumps(self._answer(line)).encode() + b"\n"
        if len(client.data) > _LONGEST:
            raise ControlError(f"a line of more than {_LONGEST} bytes")

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            if not isinstance(request, dict) or not isinstance(request.get("command"), str):
                raise ControlError('not an object with a "command"')
            name = request.pop("command")
            if name not in self.commands:
                raise ControlError(f"no command {name!r}; there are {', '.join(sorted(self.commands))}")
            return {"ok": True, "result": self.commands[name](**request)}
        except (SparseMemError, OSError, ValueError, TypeError, RecursionError) as error:
            return {"ok": False, "error": str(error)}
        except Exception as error:
            _log.exception("control: %r", line)
            return {"ok": False, "error": f"{type(error).__name__}: {error}"}


def ask(path: str, command: str, timeout: float = 30.0, **arguments: object) -> Any:
    """Has a command done at a control socket; its result.

    Raises:
        OSError: Nobody answers there.
        ControlError: It was refused, and why.
    """
    with socket.socket(socket.AF_UNIX) as connected:
        connected.settimeout(timeout)
        try:
            connected.connect(path)
            connected.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            line = _line(connected)
        except OSError as error:
            raise OSError(error.errno, f"{path}: {error.strerror or error}") from None
    answer = json.loads(line)
    if not answer["ok"]:
        raise ControlError(answer["error"])
    return answer["result"]


def _line(connected: socket.socket) -> bytes:
    data = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while not data.endswith(b"\n"):
            more = connected.recv(1 << 16)
            if not more:
                break
            data += more
    if not data.endswith(b"\n"):
        raise ControlError("the connection ended before the answer")
    return bytes(data)
