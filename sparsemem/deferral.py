"""Unplugs whose discard comes later: when, and what a replug may do with such memory."""

from __future__ import annotations

import math
import time

from attrs import define, field

from sparsemem.errors import DiscardError

REUSE = ("zero", "keep")


@define(eq=False)
class Deferral:
    """What a region with `unplug_delay=` keeps in mind; which blocks are pending is in the block map.

    Attributes:
        delay: Seconds.
        keep: Whether a replugged block keeps its content, rather than being zeroed.
        since: When the first of what is pending was unplugged; None if nothing is.
        failure: What went wrong when nobody was there to be told.
    """

    delay: float
    keep: bool
    since: float | None = field(init=False, default=None)
    failure: DiscardError | None = field(init=False, default=None)

    def note(self) -> None:
        """Something is pending now."""
        if self.since is None:
            self.since = time.monotonic()

    def put_back(self, since: float | None) -> None:
        """What has been pending since then is not all gone; None, another thread knows since when: from now on."""
        noted = self.since  # once: other threads set it, too
        if since is None:
            self.note()
        else:
            self.since = since if noted is None else min(since, noted)

    @property
    def due(self) -> bool:
        """Whether what is pending has waited for long enough."""
        return self.since is not None and time.monotonic() >= self.since + self.delay


def check_deferral(delay: object, reuse: str) -> Deferral | None:
    """The deferral that was asked for, or None.

    Raises:
        TypeError: The delay is no number.
        ValueError: It is negative or endless, or there is no such reuse.
    """
    if reuse not in REUSE:
        raise ValueError(f"reuse {reuse!r} is none of {', '.join(map(repr, REUSE))}")
    if delay is None:
        return None
    if isinstance(delay, bool) or not isinstance(delay, (int, float)):
        raise TypeError(f"unplug_delay must be seconds, not {delay!r}")
    if not 0 <= delay < math.inf:
        raise ValueError(f"unplug_delay {delay} is not a number of seconds, 0 or more")
    return Deferral(float(delay), reuse == "keep")
