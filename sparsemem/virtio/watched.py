"""Whoever wants to know what a device does."""

from __future__ import annotations

import logging
import threading
from typing import Generic, TypeVar

_log = logging.getLogger("sparsemem")

L = TypeVar("L")


class Watched(Generic[L]):
    """Has listeners, and tells them; thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # its lock guards what the device's threads share
        self._listeners: tuple[L, ...] = ()

    def add_listener(self, listener: L) -> None:
        """Has a listener told of what happens from now on."""
        with self._changed:
            self._listeners = (*self._listeners, listener)

    def remove_listener(self, listener: L) -> None:
        """Has a listener told no more."""
        with self._changed:
            self._listeners = tuple(known for known in self._listeners if known is not listener)

    def _tell(self, event: str, *details: object) -> None:
        """Without any lock held; what a listener raises is logged and changes nothing."""
        for listener in self._listeners:
            try:
                getattr(listener, event)(*details)
            except Exception:
                _log.exception("%r failed in %s", listener, event)
