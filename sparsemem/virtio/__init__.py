"""virtio-mem and virtio-balloon devices over regions, which unmodified guest drivers work with.

Four layers, none of which knows the insides of another: `wire` turns bytes into
requests and back; the devices (`mem`, `balloon`) decide what happens to memory;
`queue` reads requests out of guest memory; `vhost_user` talks to the VMM.
"""

from sparsemem.virtio.balloon import BalloonListener, VirtioBalloon
from sparsemem.virtio.device import Device, Element, GuestError
from sparsemem.virtio.guest_memory import FileRange, GuestMemory, GuestMemoryError, MemoryRange, RegionRange, Table
from sparsemem.virtio.mem import MemListener, VirtioMem
from sparsemem.virtio.wire import GuestStats

__all__ = [
    "BalloonListener",
    "Device",
    "Element",
    "FileRange",
    "GuestError",
    "GuestMemory",
    "GuestMemoryError",
    "GuestStats",
    "MemListener",
    "MemoryRange",
    "RegionRange",
    "Table",
    "VirtioBalloon",
    "VirtioMem",
]
