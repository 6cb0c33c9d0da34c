"""Who wants to know when blocks come and go, and may veto it.

The invariant: what listeners were told equals the bitmap.  `on_plug` comes after
the populate and before the blocks count as plugged.  `on_unplug` comes *before*
the discard, so that nobody faults the memory back in afterwards, and a veto
costs nothing; if the discard then fails, what stays plugged is announced again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from itertools import starmap
from typing import Protocol

from sparsemem.errors import ListenerVetoError, Run
from sparsemem.runs import clip

_log = logging.getLogger("sparsemem")


class Listener(Protocol):
    """Called in the thread that changes the region, without any lock held.

    A callback that raises vetoes the change, and must leave its own state as it
    was.  It may work on other blocks of the region, but not on the ones being
    changed.
    """

    def on_plug(self, first: int, count: int) -> None:
        """Blocks [first, first + count) are about to be plugged; their memory is there."""

    def on_unplug(self, first: int, count: int) -> None:
        """Blocks [first, first + count) are about to be discarded."""


_OPPOSITE = {"on_plug": "on_unplug", "on_unplug": "on_plug"}


class Announcement:
    """Tells listeners of one event, and can take back exactly what was told.

    Args:
        listeners: In registration order; an unplug goes in reverse.
        event: "on_plug" or "on_unplug".
        runs: One call for each.
    """

    def __init__(self, listeners: Iterable[Listener], event: str, runs: Iterable[Run]) -> None:
        ordered = list(listeners)
        self._listeners = ordered if event == "on_plug" else ordered[::-1]
        self._event = event
        self._runs = list(runs)
        self._told: list[tuple[Listener, deque[None]]] = []
        self._back: list[tuple[Callable[[int, int], None], list[Run], deque[None]]] | None = None

    def tell(self) -> None:
        """Tells everybody, one call a run.

        Raises:
            ListenerVetoError: One raised; nobody after it was told.
        """
        for listener in self._listeners:
            done: deque[None] = deque()
            self._told.append((listener, done))
            try:
                # extend() counts the calls that returned, in C: an interrupt
                # cannot fall between a call's return and its being counted.
                done.extend(starmap(getattr(listener, self._event), self._runs))
            except Exception as error:
                first, count = self._runs[len(done)]
                raise ListenerVetoError(f"{listener!r} refused {self._event}({first}, {count}): {error!r}") from error

    def take_back(self, only: list[Run] | None = None) -> None:
        """Tells the opposite to those who were told, last first; nobody can veto that.

        After an interrupt it is called again, and goes on where it was.

        Args:
            only: Ascending runs that are to be taken back; None is all.
        """
        if self._back is None:
            self._back = [self._opposite(listener, len(done), only) for listener, done in reversed(self._told)]
        for call, runs, done in self._back:
            while len(done) < len(runs):
                left = runs[len(done) :]
                try:
                    done.extend(starmap(call, left))  # counts in C, as tell() does
                except Exception:
                    _log.debug("%r failed as a change was taken back", call, exc_info=True)
                    done.append(None)

    def _opposite(
        self, listener: Listener, told: int, only: list[Run] | None
    ) -> tuple[Callable[[int, int], None], list[Run], deque[None]]:
        runs = self._runs[:told]
        return getattr(listener, _OPPOSITE[self._event]), (runs if only is None else clip(runs, only))[::-1], deque()
