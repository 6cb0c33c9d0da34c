"""The balloon against the driver of user-mode Linux, an older one (6.1) whose transport speaks vhost-user itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsemem.virtio.balloon import VirtioBalloon
from sparsemem.virtio.guest_memory import GuestMemory
from sparsemem.virtio.vhost_user import Backend, Server
from tests.guest.conftest import fill, write
from tests.guest.console import Guest, until
from tests.guest.ours import Hints, backed
from tests.guest.uml import BALLOON, UserModeLinux

pytestmark = [pytest.mark.guest, pytest.mark.slow]

MIB = 1 << 20
MEMORY = 256 * MIB
SLACK = 16 * MIB


@pytest.fixture
def balloon() -> VirtioBalloon:
    return VirtioBalloon(GuestMemory())


@pytest.fixture
def guest(user_mode_linux: UserModeLinux, balloon: VirtioBalloon, tmp_path: Path) -> Iterator[Guest]:
    socket = tmp_path / "balloon"
    with (
        Server(Backend("balloon", balloon, balloon.memory), str(socket)),
        user_mode_linux.start(f"virtio_uml.device={socket}:{BALLOON}", memory=str(MEMORY)) as guest,
    ):
        yield guest


def host_memory(balloon: VirtioBalloon) -> int:
    """What the host has behind the guest's memory: one file, which it may have sent in several pieces."""
    return max(backed(entry.region) for entry in balloon.memory.ranges)


def test_what_the_balloon_takes_the_host_gets(guest: Guest, balloon: VirtioBalloon) -> None:
    fill(guest, 192 * MIB)
    free, used = guest.meminfo()["MemFree"], host_memory(balloon)
    for size in (64, 128, 16, 0):
        resize(balloon, size * MIB)
        assert abs(free - size * MIB - guest.meminfo()["MemFree"]) < SLACK
        if size == 128:
            assert host_memory(balloon) < used - 96 * MIB
    fill(guest, 160 * MIB)
    assert balloon.failures == 0


def test_statistics_are_the_guests_own_figures(guest: Guest, balloon: VirtioBalloon) -> None:
    stats = balloon.request_stats(60)
    told = guest.meminfo()
    assert stats.total == told["MemTotal"]
    assert stats.free is not None
    assert abs(stats.free - told["MemFree"]) < SLACK


def test_free_pages_are_reported_and_hinted(guest: Guest, balloon: VirtioBalloon) -> None:
    free = guest.meminfo()["MemFree"]
    write(guest, 160 * MIB)
    used = host_memory(balloon)
    guest.run("rm /tmp/file")
    until(lambda: used - host_memory(balloon) > 128 * MIB, "the file's memory is given back")
    hints = Hints()
    balloon.add_listener(hints)
    session = balloon.start_hinting()
    hints.wait_done(1)
    assert hints.done == [session]
    assert free / 2 < sum(length for _, _, length in hints.runs) <= free + SLACK
    balloon.finish_hinting()
    until(lambda: guest.meminfo()["MemFree"] > free - SLACK, "the guest has its pages back")


def test_a_guest_that_starts_anew_finds_an_empty_balloon_and_fills_it(
    user_mode_linux: UserModeLinux, balloon: VirtioBalloon, tmp_path: Path
) -> None:
    socket = tmp_path / "balloon"
    with Server(Backend("balloon", balloon, balloon.memory), str(socket)):
        for _ in range(2):
            with user_mode_linux.start(f"virtio_uml.device={socket}:{BALLOON}", memory=str(MEMORY)) as guest:
                resize(balloon, 64 * MIB)
                free = guest.meminfo()["MemFree"]
                assert free < MEMORY - 64 * MIB
            until(lambda: not balloon.memory.ranges, "the end of the connection")


def resize(balloon: VirtioBalloon, size: int) -> None:
    balloon.target = size
    until(lambda: balloon.actual == size, f"a balloon of {size:#x}")
