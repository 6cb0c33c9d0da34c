"""A file descriptor that is closed when nothing uses it any more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from sparsemem._sys.calls import Calls


class Descriptor:
    """Owns one descriptor; `close()` may be called twice.

    The calls object stays referenced, so that it works even while the
    interpreter shuts down and modules are emptied.
    """

    __slots__ = ("_calls", "fd")

    def __init__(self, fd: int, calls: Calls) -> None:
        self.fd = fd
        self._calls = calls

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self._calls.close(fd)

    @contextlib.contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Closes it if the body raises: the error's traceback would keep it open as long as that lives."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def __del__(self) -> None:
        # An interrupted constructor may have set nothing; EBADF means that
        # somebody closed it behind our back, which hurts nobody here.
        with contextlib.suppress(AttributeError, OSError):
            self.close()
