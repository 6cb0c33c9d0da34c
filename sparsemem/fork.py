"""What fork() does to regions.

In the child of a region with `fork="refuse"` every operation raises
ForkedRegionError, and nothing of the child's ever punches, unlinks or notifies:
the memory is the parent's.  Only the forking thread lives on in the child, so
with `fork="inherit"` what other threads had in hand becomes tainted there.
"""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsemem.operations import Core

MODES = ("refuse", "inherit")

_cores: weakref.WeakSet[Core] = weakref.WeakSet()


def register(core: Core) -> None:
    """Includes a region's core in what fork() takes care of."""
    _cores.add(core)


def _after_in_child() -> None:
    cores = list(_cores)
    for core in cores:
        core.blocks.after_fork(refuse=not core.mapping.fork_inherits)
        core.tally.after_fork()
        if core.warm is not None:
            core.warm.after_fork()
    for core in cores:
        core.mapping.after_fork_in_child()  # last: a backend of somebody else's may raise


# The maps' mutexes are seen to in the shim (pthread_atfork): no Python may run while they are held.
os.register_at_fork(after_in_child=_after_in_child)
