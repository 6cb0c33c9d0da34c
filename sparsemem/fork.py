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
_held: list[Core] = []


def register(core: Core) -> None:
    """Includes a region's core in what fork() takes care of."""
    _cores.add(core)


def _before() -> None:
    # The mutexes are held across fork(), so that the child's copies of the maps
    # are whole.
    _held[:] = list(_cores)
    for core in _held:
        core.blocks.before_fork()


def _after_in_parent() -> None:
    for core in _held:
        core.blocks.after_fork(child=False)
    _held.clear()


def _after_in_child() -> None:
    for core in _held:
        refuse = not core.mapping.fork_inherits
        core.blocks.after_fork(child=True, refuse=refuse)
        core.tally.after_fork()
        if refuse:
            try:
                core.mapping.after_fork_in_child()
            except OSError:
                _log.debug("no placeholder for a mapping that the child does not have", exc_info=True)
    _held.clear()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
