"""The short way: a small plug or unplug of one run, in one call of C.

It does what `operations` do, in their order (claim, headroom, populate, commit), as
long as there is nothing more to it: nobody listens, no blocks to wait for, nothing
refused.  In every other case it changes nothing and says so; then the long way does
it, or says why not.  A single 4 KiB block costs 45 us on the long way, of which the
system calls are 4.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from sparsemem._sys import ffi, lib
from sparsemem.backends.base import Mapping
from sparsemem.blocks import BlockMap
from sparsemem.engine import prepared
from sparsemem.headroom import Gauge


def not_at_once(first: int, count: int) -> int:
    """What stands in for `Quick.plug` and `Quick.unplug` where there is no short way: nothing has changed."""
    return 0


class Quick:
    """Plugs and unplugs for one region; thread-safe.

    `plug` and `unplug` take the first block and how many, and return 1 if that is done,
    0 if nothing has changed, and -errno if it failed and left its blocks tainted.  They
    are C functions, bound: with a method of Python for each, one block takes 1 us more.

    Args:
        mapping: Memory that C alone can work on (`Mapping.direct`).
        blocks: Its block map.
        gauge: Its headroom.
        shift: A block is `1 << shift` bytes.
    """

    def __init__(self, mapping: Mapping, blocks: BlockMap, gauge: Gauge, shift: int) -> None:
        self.jobs = [prepared(mapping, operation, shift) for operation in ("populate", "discard")]
        self._refers_to = (blocks, gauge)
        self._c = ffi.new("sm_quick *", {"blocks": blocks.c, "gauge": gauge.c})
        self._c.plug, self._c.unplug = self.jobs
        self.plug: Callable[[int, int], int] = MethodType(lib.sm_quick_plug, self._c)
        self.unplug: Callable[[int, int], int] = MethodType(lib.sm_quick_unplug, self._c)

    @property
    def counts(self) -> dict[str, float]:
        """What was done, as in `statistics.Tally.counts`."""
        c: Any = self._c
        shift = self.jobs[0].shift
        return {
            "plugs": c.plugs,
            "plugged_bytes": c.plugged_blocks << shift,
            "unplugs": c.unplugs,
            "unplugged_bytes": c.unplugged_blocks << shift,
            "system_calls": c.calls,
            "seconds": c.ns / 1e9,
        }
