"""userfaultfd, by which pages are filled and moved without a fault.

One descriptor serves all regions of the process, which share it while they live.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from typing import Any

from sparsemem._sys import ffi, lib
from sparsemem._sys.calls import Calls

COPY, ZEROPAGE, MOVE = 3, 4, 5
"""What may be done with a registered range: numbers of bits, as of the ioctls (linux/userfaultfd.h)."""


class Userfaultfd:
    """Owns one descriptor, of this process alone; closed with the last who refers to it.

    Raises:
        OSError: The kernel has or allows no such thing (vm.unprivileged_userfaultfd
            does not matter: only faults of user code are asked for, from Linux 5.11 on).
    """

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.pid = os.getpid()
        self.c: Any = ffi.new("sm_uffd *")
        calls.userfaultfd(self.c)

    def register(self, address: int, length: int) -> set[int]:
        """Allows a range to be filled, as long as it is mapped; what may be done there.

        Raises:
            OSError: EBUSY where somebody else's userfaultfd has it.
        """
        mask = self.calls.register(self.c, address, length)
        return {bit for bit in (COPY, ZEROPAGE, MOVE) if mask >> bit & 1}

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            lib.sm_uffd_close(self.c)


_shared: weakref.ref[Userfaultfd] | None = None


def shared(calls: Calls) -> Userfaultfd:
    """The process's own; a child's is another one than its parent's.

    Raises:
        OSError: As `Userfaultfd`.
    """
    global _shared
    found = None if _shared is None else _shared()
    if found is None or found.pid != os.getpid() or found.calls is not calls:
        found = Userfaultfd(calls)
        _shared = weakref.ref(found)
    return found
