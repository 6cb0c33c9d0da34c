"""The same guest and the same plan with QEMU's own virtio-mem device and with ours: the driver sees no difference."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsemem import Memfd, Region
from tests.guest.conftest import Start
from tests.guest.console import until
from tests.guest.devices import TRACES, Devices, OwnDevices, own_arguments
from tests.guest.ours import OurDevices
from tests.guest.qemu import MIB, RAM, Qemu, QemuGuest

pytestmark = [pytest.mark.guest, pytest.mark.slow]

SIZE, BLOCK = 4096 * MIB, 2 * MIB
# Up and down, by whole memory blocks of the guest (128 MiB), by parts of them, and by a single block of ours.
PLAN = [256, 1024, 640, 642, 100, 600, 130, 0, 512, 2, 0]


def settle(guest: QemuGuest, devices: Devices, without: int, size: int) -> None:
    """Brings the guest to the size, and waits until its kernel has done all that belongs to it."""
    devices.resize(size)
    until(lambda: guest.meminfo()["MemTotal"] == without + size, f"{size:#x} bytes in the guest")


def follow(guest: QemuGuest, devices: Devices) -> list[tuple[int, int, int, int]]:
    """Follows the plan; what the driver asked for, and what it was answered."""
    without = guest.meminfo()["MemTotal"]
    for size in PLAN:
        settle(guest, devices, without, size * MIB)
    return [request.facts for request in devices.requests()]


def test_requests_and_answers_are_those_of_qemus_own_device(qemu: Qemu, start: Start, tmp_path: Path) -> None:
    with qemu.start(*own_arguments(SIZE, block_size=BLOCK), traces=TRACES) as guest:
        theirs = follow(guest, OwnDevices(guest, RAM))
    with (
        Region(SIZE, block_size=BLOCK, backend=Memfd()) as region,
        OurDevices(region, tmp_path, reporting=False) as devices,
    ):
        guest = start(devices)
        ours = follow(guest, devices)
        guest.close()
    assert len(theirs) > 100
    assert ours == theirs
