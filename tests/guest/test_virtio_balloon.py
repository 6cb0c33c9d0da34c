"""The unmodified virtio_balloon driver of a Debian kernel against our device, seen from both sides."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsemem import Memfd, Region
from tests.guest.conftest import Start, fill, write
from tests.guest.console import Guest, until
from tests.guest.devices import ACK
from tests.guest.ours import Hints, OurDevices
from tests.guest.qemu import MIB, RAM

pytestmark = [pytest.mark.guest, pytest.mark.slow]

# What the kernel needs for itself while the balloon moves: it is never exact to the page.
SLACK = 24 * MIB


def wait_free(guest: Guest, size: int) -> None:
    # Not at once: what its processors hold of free pages is not counted, for a while.
    until(lambda: guest.meminfo()["MemFree"] > size, "the guest has its pages back")


def test_what_the_balloon_takes_the_host_gets(start: Start, tmp_path: Path) -> None:
    with Region("1G", backend=Memfd()) as region, OurDevices(region, tmp_path, reporting=False) as devices:
        guest = start(devices)
        fill(guest, 320 * MIB)
        free = guest.meminfo()["MemFree"]
        assert devices.ram_backed() > RAM - 192 * MIB
        for size in (192, 64, 256, 0):
            devices.balloon(size * MIB)
            wait_free(guest, free - size * MIB - SLACK)
            assert guest.meminfo()["MemFree"] < free - size * MIB + SLACK
            # Whatever is in the balloon has no memory of the host's behind it.
            assert devices.ram_backed() <= RAM - size * MIB
        fill(guest, 256 * MIB)
        assert devices.balloon_device.failures == 0
        guest.close()


def test_statistics_are_the_guests_own_figures(start: Start, tmp_path: Path) -> None:
    with Region("1G", backend=Memfd()) as region, OurDevices(region, tmp_path) as devices:
        guest = start(devices)
        before = devices.balloon_device.request_stats(60)
        told = guest.meminfo()
        assert before.total == told["MemTotal"]
        assert before.free is not None
        assert before.available is not None
        assert abs(before.free - told["MemFree"]) < SLACK
        assert abs(before.available - told["MemAvailable"]) < SLACK
        write(guest, 100 * MIB)
        after = devices.balloon_device.request_stats(60)
        assert after.free is not None
        assert abs(before.free - after.free - 100 * MIB) < SLACK
        devices.resize(256 * MIB)
        until(lambda: devices.balloon_device.request_stats(60).total == told["MemTotal"] + 256 * MIB, "the new total")
        guest.close()


def test_free_pages_are_reported_by_the_guest_of_its_own_accord(start: Start, tmp_path: Path) -> None:
    with Region("1G", backend=Memfd()) as region, OurDevices(region, tmp_path, reporting=True) as devices:
        guest = start(devices)
        devices.resize(256 * MIB)
        # As it was populated; and soon the guest tells that it has no use for most of it.
        until(lambda: devices.backed() < 32 * MIB, "the plugged memory is given back")
        write(guest, 400 * MIB)
        used = devices.backed() + devices.ram_backed()
        assert used > 400 * MIB
        guest.run("rm /tmp/file")
        until(lambda: used - devices.backed() - devices.ram_backed() > 300 * MIB, "the file's memory is given back")
        # None of it is unplugged or in the balloon.
        assert (devices.plugged(), devices.ballooned()) == (256 * MIB, 0)
        guest.close()


def test_free_pages_are_hinted_when_asked_and_the_guest_has_them_back_afterwards(start: Start, tmp_path: Path) -> None:
    with Region("1G", backend=Memfd()) as region, OurDevices(region, tmp_path, reporting=False) as devices:
        guest = start(devices)
        device = devices.balloon_device
        hints = Hints()
        device.add_listener(hints)
        for sessions in (1, 2):
            free = guest.meminfo()["MemFree"]
            asked = device.start_hinting()
            hints.wait_done(sessions)
            runs = [(address, length) for command, address, length in hints.runs if command == asked]
            hinted = sum(length for _, length in runs)
            assert hints.done[-1] == asked
            # All that was free in large pieces, each once.
            assert free / 2 < hinted <= free + SLACK
            assert len({address for address, _ in runs}) == len(runs)
            assert all(address + length <= RAM for address, length in runs)
            # A hint is no leave to discard: the pages are the host's to skip, not to take.
            assert device.discarded_size == 0
            device.finish_hinting()
            wait_free(guest, free - SLACK)
        guest.close()


def test_a_guest_short_of_memory_takes_pages_out_of_the_balloon_itself(start: Start, tmp_path: Path) -> None:
    with Region("1G", backend=Memfd()) as region, OurDevices(region, tmp_path) as devices:
        guest = start(devices)
        devices.balloon(256 * MIB)
        write(guest, 200 * MIB)
        assert 0 < devices.ballooned() < 256 * MIB
        assert guest.run("wc -c </tmp/file").strip() == str(200 * MIB)
        guest.close()


def test_the_balloon_takes_plugged_memory_too_and_it_can_still_be_unplugged(start: Start, tmp_path: Path) -> None:
    with Region("1G", backend=Memfd()) as region, OurDevices(region, tmp_path, reporting=False) as devices:
        guest = start(devices)
        devices.resize(512 * MIB)
        assert devices.backed() == 512 * MIB
        devices.balloon(640 * MIB)
        # More than there is elsewhere: a good part of it lies in what was plugged.
        inside = 512 * MIB - devices.backed()
        assert inside > 200 * MIB
        assert not region.audit().gaps
        # The driver moves pages of the balloon away from what is to be unplugged.
        devices.balloon(256 * MIB)
        devices.resize(128 * MIB)
        assert devices.backed() <= 128 * MIB
        assert not region.audit().leaks
        devices.balloon(0)
        fill(guest, 256 * MIB)
        assert {request.answer for request in devices.requests()} == {ACK}
        guest.close()
