"""One ring of a device, as the frontend has set it up: numbers, addresses, descriptors, and whether it runs."""

from __future__ import annotations

import contextlib
import os
import stat

from attrs import define, field

from sparsemem._sys import calls
from sparsemem._sys.descriptor import Descriptor
from sparsemem.virtio.queue import Chain, Memory, Queue, Rings


def check_event(descriptor: Descriptor) -> Descriptor:
    """Refuses what is no eventfd (or the pipe or socket that stands for one).

    An ordinary file or a device would always be ready, and keep us busy for ever.

    Raises:
        ValueError: It is something else.
    """
    # What eventfd(2) makes has no file type at all.
    kind = stat.S_IFMT(calls.kernel.fstat(descriptor.fd).st_mode)
    if kind not in (0, stat.S_IFIFO, stat.S_IFSOCK):
        raise ValueError(f"a descriptor of type {kind:#o} for an event")
    # Else a counter that the other side has filled would hold us up.
    os.set_blocking(descriptor.fd, False)
    return descriptor


def signal(descriptor: Descriptor | None) -> None:
    """Tells the other side, if it wants to be told and has not been already."""
    if descriptor is not None:
        with contextlib.suppress(OSError):  # full: it has been told; gone: nobody listens
            os.eventfd_write(descriptor.fd, 1)


@define(eq=False)
class Vring:
    """A ring; it runs from its kick descriptor on until it is stopped, and is served while it is enabled.

    Attributes:
        index: Which queue of the device it is.
        size: Entries.
        base: Where the frontend says that the device is.
        stopped_at: Where the device was when it last stopped; None if it never ran.
        rings: Where it is, once that is known.
        kick: What the driver signals.
        call: What the driver is signalled by.
        err: What the frontend is signalled by when something is wrong.
        enabled: Whether it may be served.
        queue: While it runs.
        held: A request that the device kept back, to be answered later.
        answered: Requests given back, since it was made.
    """

    index: int
    size: int = 0
    base: int = 0
    stopped_at: int | None = None
    rings: Rings | None = None
    kick: Descriptor | None = None
    call: Descriptor | None = None
    err: Descriptor | None = None
    enabled: bool = False
    queue: Queue | None = None
    held: Chain | None = None
    answered: int = field(default=0)

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped since."""
        return self.kick is not None

    def ready(self, memory: Memory, features: int) -> Queue | None:
        """The queue if it may be served now.

        Raises:
            GuestError: It is set up in a way that no driver does.
        """
        if not self.enabled or not self.running or self.rings is None:
            return None
        if self.queue is None:
            self.queue = Queue(memory, self.rings, features=features, base=self.base)
        return self.queue

    def drain(self) -> bool:
        """Takes the driver's notifications; False if there will be none any more."""
        if self.kick is None:
            return False
        try:
            os.eventfd_read(self.kick.fd)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True

    def stop(self) -> int:
        """Stops it; where the device stands, which is the first request that is not answered."""
        if self.queue is not None:
            self.base = self.stopped_at = self.queue.used
        self.queue = self.held = None
        replace(self, "kick", None)
        return self.base

    def close(self) -> None:
        """Stops it and forgets all that the frontend gave."""
        self.stop()
        for name in ("call", "err"):
            replace(self, name, None)
        self.size, self.rings, self.enabled = 0, None, False


def replace(vring: Vring, name: str, descriptor: Descriptor | None) -> None:
    """Puts a descriptor in place of another, which is closed."""
    old: Descriptor | None = getattr(vring, name)
    setattr(vring, name, descriptor)
    if old is not None:
        old.close()
