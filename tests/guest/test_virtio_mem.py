"""The unmodified virtio_mem driver of a Debian kernel against our device, seen from both sides."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsemem import File, Memfd, Region
from tests.guest.conftest import Start
from tests.guest.console import until
from tests.guest.devices import ACK, BUSY, PLUG, UNPLUG_ALL
from tests.guest.ours import OurDevices
from tests.guest.qemu import MIB, QemuGuest

pytestmark = [pytest.mark.guest, pytest.mark.slow]


def total(guest: QemuGuest) -> int:
    return guest.meminfo()["MemTotal"]


def wait_total(guest: QemuGuest, size: int) -> None:
    until(lambda: total(guest) == size, f"{size:#x} bytes in the guest")


def test_grows_and_shrinks_as_told_seen_from_the_guest_and_from_the_host(start: Start, tmp_path: Path) -> None:
    with Region("4G", backend=Memfd()) as region, OurDevices(region, tmp_path, reporting=False) as devices:
        guest = start(devices)
        without = total(guest)
        for size in (128, 512, 130, 640, 2, 1024, 896, 258, 256, 0):
            devices.resize(size * MIB)
            wait_total(guest, without + size * MIB)
            assert region.plugged_size == size * MIB
            # Populated as it was plugged, and nothing is left of what was unplugged.
            assert devices.backed() == size * MIB
        assert {request.answer for request in devices.requests()} == {ACK}
        assert not region.audit().leaks
        guest.close()


def test_the_guest_uses_what_was_plugged(start: Start, tmp_path: Path) -> None:
    with Region("4G", backend=Memfd()) as region, OurDevices(region, tmp_path) as devices:
        guest = start(devices)
        devices.resize(1024 * MIB)
        # More than there was without it; and what is read is what was written, wherever the driver has moved it to.
        guest.run("dd if=/dev/urandom of=/tmp/random bs=1M count=4 2>/dev/null")
        guest.run("for i in $(seq 110); do cat /tmp/random; done >/tmp/file")
        written = guest.run("md5sum </tmp/file")
        devices.resize(256 * MIB)
        assert guest.run("md5sum </tmp/file") == written
        # What is in use stays plugged, and the guest is none the worse for it.
        devices.request(0)
        until(lambda: devices.plugged() < 256 * MIB, "some of it is unplugged")
        assert guest.run("md5sum </tmp/file") == written
        assert devices.plugged() > 0
        guest.run("rm /tmp/file")
        devices.resize(0)
        guest.close()


def test_a_reboot_gives_everything_back_and_gets_it_again(start: Start, tmp_path: Path) -> None:
    with Region("4G", backend=Memfd()) as region, OurDevices(region, tmp_path) as devices:
        guest = start(devices)
        without = total(guest)
        devices.resize(512 * MIB)
        devices.balloon(64 * MIB)
        asked = len(devices.requests())
        guest.reboot()
        until(lambda: devices.plugged() == 512 * MIB and total(guest) - without == 512 * MIB, "512 MiB again")
        until(lambda: devices.ballooned() == 64 * MIB, "the balloon again")
        since = devices.requests()[asked:]
        assert since[0].facts == (UNPLUG_ALL, 0, 0, ACK)
        assert {(request.kind, request.answer) for request in since[1:]} == {(PLUG, ACK)}
        assert sum(request.blocks for request in since) * region.block_size == 512 * MIB
        guest.close()


def test_a_guest_that_is_gone_leaves_its_plug_state_to_the_next(start: Start, tmp_path: Path) -> None:
    with Region("4G", backend=Memfd()) as region, OurDevices(region, tmp_path) as devices:
        guest = start(devices)
        devices.resize(512 * MIB)
        guest.close()
        assert region.plugged_size == 512 * MIB
        asked = len(devices.requests())
        guest = start(devices)
        until(lambda: devices.requests()[asked:] and devices.plugged() == 512 * MIB, "512 MiB again")
        assert devices.requests()[asked].facts == (UNPLUG_ALL, 0, 0, ACK)
        guest.close()


def test_a_host_without_memory_is_busy_and_the_guest_goes_on_and_tries_again(
    start: Start, tmp_path: Path, tmpfs_mount: Callable[..., Path]
) -> None:
    folder = tmpfs_mount("200M")
    with (
        Region("4G", backend=File(folder / "memory"), headroom="off") as region,
        OurDevices(region, tmp_path, reporting=False) as devices,
    ):
        guest = start(devices)
        without = total(guest)

        def busy() -> int:
            return sum(request.answer == BUSY for request in devices.requests())

        devices.request(512 * MIB)
        until(busy, "BUSY")
        # What could be had whole is there, in a guest that works; nothing is left of what could not.
        assert region.plugged_size == devices.backed() == 128 * MIB
        assert total(guest) - without == 128 * MIB
        assert region.stats().rollbacks == busy()

        # News of the configuration make the driver try at once.
        devices.request(510 * MIB)
        until(lambda: busy() == 2, "BUSY once more")
        assert region.plugged_size == devices.backed() == 128 * MIB

        # Without any, it tries by its own timer.
        subprocess.run(["mount", "-o", "remount,size=1G", folder], check=True)
        last = devices.requests()[-1].time
        until(lambda: devices.plugged() == 510 * MIB, "510 MiB")
        assert next(request for request in devices.requests() if request.time > last).time - last > 40
        wait_total(guest, without + 510 * MIB)
        assert devices.backed() == 510 * MIB
        devices.resize(0)
        assert devices.backed() == 0
        guest.close()
