"""userfaultfd, by which pages are filled and moved without a fault, and accesses to what is not there are trapped.

To fill alone, one descriptor serves all regions of the process, which share it while
they live.  Who traps has one of its own, for a range can be registered with one only.
"""

from __future__ import annotations

import contextlib
import enum
import os
import weakref
from typing import Any

from sparsemem._sys import ffi, lib
from sparsemem._sys.calls import Calls
from sparsemem._sys.files import PAGE_SIZE

COPY, ZEROPAGE, MOVE, POISON = 3, 4, 5, 8
"""What may be done with a registered range: numbers of bits, as of the ioctls (linux/userfaultfd.h)."""


class Purpose(enum.IntEnum):
    """What a descriptor is for besides filling."""

    FILL = lib.SM_UFFD_FILL
    TRAP = lib.SM_UFFD_TRAP
    """Accesses to what is not there are SIGBUS."""
    CATCH = lib.SM_UFFD_CATCH
    """They wait until whoever reads the descriptor has filled it in."""


class Userfaultfd:
    """Owns one descriptor, of this process alone; closed with the last who refers to it.

    Args:
        calls: The kernel.
        purpose: What it is for.
        page_size: Bytes of the largest page that is to be filled at once.

    Raises:
        OSError: The kernel has or allows no such thing (vm.unprivileged_userfaultfd
            does not matter: only faults of user code are asked for, from Linux 5.11 on).
    """

    def __init__(self, calls: Calls, purpose: Purpose = Purpose.FILL, page_size: int = PAGE_SIZE) -> None:
        self.calls = calls
        self.pid = os.getpid()
        self.c: Any = ffi.new("sm_uffd *", {"purpose": purpose, "nzeroes": page_size})
        calls.userfaultfd(self.c)

    def register(self, address: int, length: int) -> set[int]:
        """Allows a range to be filled, as long as it is mapped; what may be done there.

        Raises:
            OSError: EBUSY where somebody else's userfaultfd has it.
        """
        mask = self.calls.register(self.c, address, length)
        return {bit for bit in (COPY, ZEROPAGE, MOVE, POISON) if mask >> bit & 1}

    def release(self, address: int, length: int) -> None:
        """Lets a range go that is still mapped, and whoever waits in it; for one that traps.

        Closing does that, too, but only once no child has a copy of the descriptor.
        """
        lib.sm_uffd_unregister(self.c, address, length)

    def renew(self) -> None:
        """In a child: a descriptor of its own, with which nothing is registered yet.

        Raises:
            OSError: As when it was made; it is closed then.
        """
        self.close()
        self.pid = os.getpid()
        self.calls.userfaultfd(self.c)

    def close(self) -> None:
        """Closes it, or a child its copy, which would fill the parent's memory; a second time does nothing."""
        lib.sm_uffd_close(self.c)

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
