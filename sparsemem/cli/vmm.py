"""A VMM's arguments that go with the devices that are served, ready to paste."""

from __future__ import annotations

import os
from collections.abc import Sequence
from shlex import quote
from typing import TYPE_CHECKING

from sparsemem.units import exact_size, format_size

if TYPE_CHECKING:
    from sparsemem.region import Region
    from sparsemem.virtio.vhost_user.service import Export

_RAM = 512 << 20
_MEM_ID, _BALLOON_ID = 24, 5


def qemu_lines(exports: Sequence[Export], region: Region | None, pid: int) -> list[str]:
    """What to start QEMU (and, for a balloon, user-mode Linux) with, ready to paste."""
    size = 0 if region is None else region.size
    arguments = [
        "-machine q35,memory-backend=ram",
        f"-object memory-backend-memfd,id=ram,size={format_size(_RAM)},share=on",
        f"-m {format_size(_RAM)},maxmem={_at_least(_RAM + size)},slots=4",
    ]
    for export in exports:
        name = "mem" if export.device.device_id == _MEM_ID else "balloon"
        if region is not None and name == "mem":
            arguments += [
                # Opened through /proc, a memfd is the same memory; so is a file that has a path.
                f"-object memory-backend-file,id=vm,size={exact_size(region.size)},share=on,"
                f"mem-path=/proc/{pid}/fd/{region.fileno()}",
                # Nothing in the guest drives this device: it puts the memory at its address.
                f"-device virtio-pmem-pci,memdev=vm,memaddr={export.device.address:#x}",  # type: ignore[attr-defined]
            ]
        device = export.device
        queues = device.queues(device.features)
        arguments += [
            f"-chardev socket,id={name},path={_path(export.socket)}",
            f"-device vhost-user-device-pci,chardev={name},virtio-id={device.device_id},"
            f"num_vqs={queues},vq_size=128,config_size={device.config_size}",
        ]
    lines = [
        "# QEMU 10 (later ones: vhost-user-test-device-pci), to which the kernel, the disks and so on are to be added",
        " \\\n  ".join(["qemu-system-x86_64", *arguments]),
    ]
    lines += [
        f"# user-mode Linux: virtio_uml.device={export.socket}:{_BALLOON_ID}"
        for export in exports
        if export.device.device_id == _BALLOON_ID
    ]
    return lines


def _path(path: str) -> str:
    """For QEMU, to which a comma ends it unless there are two, and for the shell."""
    return quote(os.path.abspath(path).replace(",", ",,"))


def _at_least(size: int) -> str:
    """Address space for so much and some devices: a power of two."""
    return format_size(1 << (2 * size - 1).bit_length())
