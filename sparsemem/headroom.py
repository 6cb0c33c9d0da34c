"""How much can still be plugged, and what limits it.

Looking first is the only protection where running out means being killed: at a
memory control group's limit there is no errno, only the OOM killer.  It is
advisory all the same, for others take memory too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from attrs import frozen

from sparsemem._sys import ffi
from sparsemem.backends.base import Limit
from sparsemem.errors import BackendExhaustedError
from sparsemem.units import exact_size

HEADROOM = ("check", "off")
_MAX_AGE_NS = 100_000_000


@frozen(kw_only=True)
class Headroom:
    """What can still be given, in bytes.

    Attributes:
        available: The smallest of all limits, or None if nothing limits.
        binding: The limit that it comes from.
        limits: All of them, the tightest first.
    """

    available: int | None
    binding: Limit | None
    limits: tuple[Limit, ...]


def read(limits: Iterable[Limit]) -> Headroom:
    """Looks at all limits now."""
    ordered = tuple(sorted(limits, key=lambda limit: limit.available))
    binding = ordered[0] if ordered else None
    return Headroom(available=binding.available if binding else None, binding=binding, limits=ordered)


class Gauge:
    """A reading as a budget, from which each plug spends.

    It is read again once half of it is spent, when it is 100 ms old, and before
    anything is refused: a bare plug of one page takes 4 us, reading costs 20.
    """

    def __init__(self, limits: Callable[[], Iterable[Limit]], mode: str) -> None:
        self._limits = limits
        # Shared with the short way (`quick`), which spends in C.
        self.c = ffi.new("sm_gauge *", {"left": 0, "floor": 1, "expires_ns": 0, "off": mode == "off"})

    def spend(self, size: int) -> None:
        """Counts on `size` bytes.

        Raises:
            BackendExhaustedError: There are not that many; names the limit.
        """
        c = self.c
        if c.off:
            return
        now = time.monotonic_ns()
        if c.left - size < c.floor or now > c.expires_ns:
            headroom = read(self._limits())
            if headroom.binding is None:
                # Nothing to watch: look again later, in case a limit comes up.
                c.left, c.floor, c.expires_ns = 1 << 62, 0, now + _MAX_AGE_NS
                return
            limit = headroom.binding
            if size > limit.available:
                raise BackendExhaustedError(
                    limit.errno,
                    f"refused up front: {exact_size(size)} is more than the {exact_size(limit.available)} "
                    f"that are left ({limit.cause.value}: {limit.source})",
                    cause=limit.cause,
                )
            c.left, c.floor = limit.available, limit.available // 2
            c.expires_ns = now + _MAX_AGE_NS
        c.left -= size

    def forget(self) -> None:
        """The reading is worth nothing any more: a plug within it failed.

        Memory that is given back needs no new reading, since there is always one
        before anything is refused.
        """
        self.c.expires_ns = 0


def check_mode(mode: str) -> str:
    """The mode, or a ValueError that lists the modes."""
    if mode not in HEADROOM:
        raise ValueError(f"headroom {mode!r} is none of {', '.join(map(repr, HEADROOM))}")
    return mode
