"""What fork() does to regions.

In the child of a region with `fork="refuse"` every operation raises
ForkedRegionError, and nothing of the child's ever punches, unlinks or notifies:
the memory is the parent's.  Only the forking thread lives on in the child, so
with `fork="inherit"` what other threads had in hand becomes tainted there.
"""

from __future__ import annotations

import logging
import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsemem.operations import Core

MODES = ("refuse", "inherit")

_log = logging.getLogger("sparsemem")
_cores: weakref.WeakSet[Core] = weakref.WeakSet()


def register(core: Core) -> None:
    """Includes a region's core in what fork() takes care of."""
    _cores.add(core)


def _after_in_child() -> None:
    for core in list(_cores):
        refuse = not core.mapping.fork_inherits
        core.blocks.after_fork(refuse=refuse)
        core.tally.after_fork()
        if refuse:
            try:
                core.mapping.after_fork_in_child()
            except OSError:
                _log.debug("no placeholder for a mapping that the child does not have", exc_info=True)


# The maps' mutexes are seen to in the shim (pthread_atfork): no Python may run while they are held.
os.register_at_fork(after_in_child=_after_in_child)
