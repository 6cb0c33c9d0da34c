"""The short way: a small plug or unplug of one run, in one call of C.

It does what `operations` do, in their order (claim, headroom, populate, commit), as
long as there is nothing more to it: nobody listens, no blocks to wait for, nothing
refused.  In every other case it changes nothing and says so; then the long way does
it, or says why not.  A single 4 KiB block costs 45 us on the long way, of which the
system calls are 4.
"""

from __future__ import annotations

from typing import Any

from sparsemem._sys import ffi, lib
from sparsemem.backends.base import Mapping
from sparsemem.blocks import BlockMap
from sparsemem.engine import prepared
from sparsemem.headroom import Gauge


class QuickFailedError(Exception):
    """It failed, and left its blocks tainted; internal, as `engine.StepFailedError`.

    Attributes:
        errno: The kernel's.
    """

    def __init__(self, errno: int) -> None:
        super().__init__(errno)
        self.errno = errno


class Quick:
    """Plugs and unplugs for one region; thread-safe.

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

    def plug(self, first: int, count: int) -> bool:
        """Plugs the blocks; False if it changed nothing, whatever it was given.

        Raises:
            QuickFailedError: They could not be populated, nor what was populated be given back.
        """
        return self._try(lib.sm_quick_plug, first, count)

    def unplug(self, first: int, count: int) -> bool:
        """Unplugs the blocks; False if it changed nothing, whatever it was given.

        Raises:
            QuickFailedError: They could not be discarded.
        """
        return self._try(lib.sm_quick_unplug, first, count)

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

    def _try(self, call: Any, first: int, count: int) -> bool:
        # Only plain integers: whatever else may be one, or be refused, is for the long way to judge.
        if not type(first) is type(count) is int:
            return False
        try:
            code = call(self._c, first, count)
        except OverflowError:
            return False
        if code < 0:
            raise QuickFailedError(-code)
        return bool(code)
