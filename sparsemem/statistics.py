"""What a region has done so far, in numbers."""

from __future__ import annotations

import threading

from attrs import frozen


@frozen(kw_only=True)
class Stats:
    """Figures of one moment; sizes in bytes.

    Attributes:
        size: The reservation.
        plugged_size: What is plugged.
        pending_size: What is unplugged but not yet discarded.
        warm_size: What the warm pool holds ready.
        tainted_size: What an earlier failure left in an unknown state.
        busy_size: What operations in flight hold.
        views: Views that are alive.
        plugs: Plug operations that succeeded; likewise `unplugs`.
        plugged_bytes: Bytes that they populated.
        unplugged_bytes: Bytes that were unplugged, by unplugs that stopped half
            way, too.
        system_calls: System calls that both made.
        failures: Operations that failed, were vetoed or interrupted.
        rollbacks: How many of those had something to roll back.
        seconds: Time spent in operations that succeeded.
        strategy: How the region populates.
        strays: Accesses to unplugged blocks that `catch_stray` has caught.
        strays_dropped: How many of those came too fast for it to be told of.
    """

    size: int
    plugged_size: int
    pending_size: int
    warm_size: int
    tainted_size: int
    busy_size: int
    views: int
    plugs: int
    plugged_bytes: int
    unplugs: int
    unplugged_bytes: int
    system_calls: int
    failures: int
    rollbacks: int
    seconds: float
    strategy: str
    strays: int = 0
    strays_dropped: int = 0


class Tally:
    """Counts operations; thread-safe."""

    def __init__(self) -> None:
        # Reentrant: a signal handler or a __del__ may come in the middle and use a region.
        self._lock = threading.RLock()
        self.counts: dict[str, float] = dict.fromkeys(
            (
                "plugs",
                "plugged_bytes",
                "unplugs",
                "unplugged_bytes",
                "system_calls",
                "failures",
                "rollbacks",
                "seconds",
            ),
            0,
        )

    def with_those(self, others: dict[str, float]) -> dict[str, float]:
        """The counts, and what somebody else has counted."""
        with self._lock:
            return {name: count + others.get(name, 0) for name, count in self.counts.items()}

    def plugged(self, size: int, calls: int, seconds: float) -> None:
        """Counts a plug that succeeded."""
        self._add(plugs=1, plugged_bytes=size, system_calls=calls, seconds=seconds)

    def unplugged(self, size: int, calls: int, seconds: float) -> None:
        """Counts an unplug that succeeded."""
        self._add(unplugs=1, unplugged_bytes=size, system_calls=calls, seconds=seconds)

    def flushed(self, calls: int, seconds: float) -> None:
        """Counts the discard of what was unplugged before."""
        self._add(system_calls=calls, seconds=seconds)

    def failed(self, *, rolled_back: bool, unplugged: int = 0) -> None:
        """Counts an operation that did not come to its end, and the bytes that an unplug gave back before."""
        self._add(failures=1, rollbacks=int(rolled_back), unplugged_bytes=unplugged)

    def after_fork(self) -> None:
        """In a child the lock may be held by a thread that does not exist there."""
        self._lock = threading.RLock()

    def _add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self.counts[name] += amount
