"""Stray accesses, told after the fact: what came to unplugged blocks, and who did it.

The thread that lets an access go through is C and waits for nobody.  What it notes is
told by another one, of Python, which holds no lock meanwhile: the callback may use the
region, raise, or take its time.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

from attrs import frozen

from sparsemem._sys.stray import Watch

_log = logging.getLogger("sparsemem")


@frozen(kw_only=True)
class StrayAccess:
    """An access to a block that was not plugged.

    Attributes:
        block: The block.
        offset: Where in the region, in bytes; before Linux 5.18 where its page begins.
        write: Whether it was a store.
        thread: Who did it, as `threading.get_native_id()` has it.
    """

    block: int
    offset: int
    write: bool
    thread: int


Callback = Callable[[StrayAccess], object]
_alive: weakref.WeakSet[Catcher] = weakref.WeakSet()


class Catcher:
    """Tells a callback of stray accesses until it is closed.

    Args:
        watch: What notes them.
        shift: A block is `1 << shift` bytes.
        callback: Called in a thread of its own, one access after the other.
    """

    def __init__(self, watch: Watch, shift: int, callback: Callback) -> None:
        self._watch = watch
        self._pid = os.getpid()
        # It refers to no region, which could not die otherwise.
        self._thread = threading.Thread(
            target=_tell, args=(watch, shift, callback), name="sparsemem-strays", daemon=True
        )
        self._thread.start()
        _alive.add(self)

    def counts(self) -> tuple[int, int]:
        """Accesses caught, and how many of those the callback could not be told of."""
        return self._watch.counts()

    def close(self) -> None:
        """Stops both threads; all that was caught is told first, unless it is the callback that closes.

        Does nothing the second time, or in a child, which has no such threads.
        """
        self.stop()
        if self._pid == os.getpid() and self._thread is not threading.current_thread():
            self._thread.join()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # an interrupted constructor has set nothing
            self.stop()

    def stop(self) -> None:
        """Catches no more; what was caught is told nevertheless, but not waited for."""
        self._watch.stop()


def _tell(watch: Watch, shift: int, callback: Callback) -> None:
    while caught := watch.wait():
        for one in caught:
            event = StrayAccess(block=one.offset >> shift, offset=one.offset, write=one.write, thread=one.thread)
            try:
                callback(event)
            except Exception:
                _log.exception("catch_stray=%r failed on %r", callback, event)


def _close_all() -> None:
    """At the end of the process, while there is still an interpreter to tell with."""
    for catcher in list(_alive):
        catcher.close()


atexit.register(_close_all)


def check_callback(callback: Any, protection: str) -> None:
    """Whether there can be a callback.

    Raises:
        TypeError: It is none.
        ValueError: The protection has no such thing.
    """
    if callback is None:
        return
    if not callable(callback):
        raise TypeError(f"catch_stray must be callable, not {callback!r}")
    if protection != "trap":
        raise ValueError(f"catch_stray needs protection='trap': with {protection!r} nobody is told of accesses")
