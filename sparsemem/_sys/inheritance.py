"""Address space that forked children do not inherit stays taken in them.

With MADV_DONTFORK a child lacks the mapping, but not the objects that refer to
it.  Views that it has inherited would reach nothing there (SIGSEGV), or whatever
comes to lie there, and unmapping it at last would hit that.  So something
harmless is put in its place, for as long as anything refers to it.
"""

from __future__ import annotations

import logging
import os
import weakref
from typing import Any

from sparsemem._sys import calls

_log = logging.getLogger("sparsemem")
_absent: weakref.WeakValueDictionary[tuple[int, int], Any] = weakref.WeakValueDictionary()


def keep_place(owner: Any, address: int, size: int) -> None:
    """In children, has plain zero memory at `address` while `owner`, a cffi pointer, lives."""
    _absent[address, size] = owner


def _after_in_child() -> None:
    for (address, size), _owner in list(_absent.items()):
        try:
            calls.kernel.reserve_placeholder(address, size)
        except OSError as error:  # a grandchild has its parent's placeholder
            _log.debug("no placeholder for %d bytes at %#x: %s", size, address, error)


os.register_at_fork(after_in_child=_after_in_child)
