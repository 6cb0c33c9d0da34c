"""Listening Unix sockets that only their user may connect to."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from attrs import define, field

_BACKLOG = 64
_LONGEST = 107
"""Bytes of a socket's path: sun_path has 108 (unix(7)), the zero at its end included."""


@define(eq=False)
class Listener:
    """A listening Unix socket that only its user may connect to.

    A file that nobody listens at any more, left by a crash, is replaced; one at which
    somebody does is not.

    Args:
        path: Where; at most 107 bytes, as an absolute path.

    Raises:
        ValueError: It is longer.
        OSError: There is something else, or somebody listens there.
    """

    path: str
    listening: socket.socket = field(init=False)
    _identity: tuple[int, int] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.path = os.path.abspath(self.path)
        size = len(os.fsencode(self.path))
        if size > _LONGEST:
            raise ValueError(f"{self.path}: {size} bytes, where a socket's path has {_LONGEST} at most")
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.listening.setblocking(False)
            # The file gets the mode that the socket has (unix_bind() in the kernel does that; the test
            # looks): so there is no moment at which others may connect, and no umask that other threads see.
            os.fchmod(self.listening.fileno(), 0o600)
            self._bind()
            about = os.lstat(self.path)
            self._identity = about.st_dev, about.st_ino
            self.listening.listen(_BACKLOG)
        except BaseException:
            self.listening.close()
            raise

    def _bind(self) -> None:
        try:
            self.listening.bind(self.path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not self._is_stale():
                raise OSError(error.errno, f"{self.path}: {error.strerror or error}") from None
            os.unlink(self.path)
            self.listening.bind(self.path)

    def _is_stale(self) -> bool:
        if not stat.S_ISSOCK(os.lstat(self.path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            return probe.connect_ex(self.path) == errno.ECONNREFUSED

    def fileno(self) -> int:
        """For poll(2)."""
        return self.listening.fileno()

    def accept(self) -> socket.socket | None:
        """The next connection, or None if it went away again."""
        try:
            connected, _ = self.listening.accept()
        except OSError:
            return None
        connected.setblocking(False)
        return connected

    def close(self) -> None:
        """Stops listening and removes the file, if it is still the one that was made."""
        self.listening.close()
        with contextlib.suppress(OSError):
            about = os.lstat(self.path)
            if (about.st_dev, about.st_ino) == self._identity:
                os.unlink(self.path)
