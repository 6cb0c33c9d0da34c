"""What the tests with real guests share; without the packages they are skipped, and say why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.guest.console import Guest
from tests.guest.ours import OurDevices
from tests.guest.packages import Packages, PackagesMissingError, packages
from tests.guest.qemu import Qemu, QemuGuest
from tests.guest.uml import UserModeLinux


@pytest.fixture(scope="session")
def guest_packages() -> Packages:
    """The unpacked packages."""
    try:
        return packages()
    except PackagesMissingError as error:
        pytest.skip(f"needs the guests' packages: {error}")


@pytest.fixture
def qemu(guest_packages: Packages, tmp_path: Path) -> Qemu:
    """A QEMU whose files go to this test's folder."""
    return Qemu(guest_packages, tmp_path)


@pytest.fixture
def user_mode_linux(guest_packages: Packages, tmp_path: Path) -> UserModeLinux:
    """A user-mode Linux whose files go to this test's folder."""
    return UserModeLinux(guest_packages, tmp_path)


@pytest.fixture
def vhost_user_device(qemu: Qemu) -> tuple[str, list[str]]:
    """The name of QEMU's device that speaks vhost-user, and the arguments that make it creatable."""
    try:
        return qemu.vhost_user()
    except PackagesMissingError as error:
        pytest.skip(f"needs a QEMU with a vhost-user device: {error}")


Start = Callable[[OurDevices], QemuGuest]


@pytest.fixture
def start(qemu: Qemu, vhost_user_device: tuple[str, list[str]]) -> Iterator[Start]:
    """Starts a guest that has these devices."""
    name, creatable = vhost_user_device
    with ExitStack() as stack:
        yield lambda devices: stack.enter_context(qemu.start(*creatable, *devices.arguments(name)))


def write(guest: Guest, size: int, name: str = "file") -> None:
    """Has the guest use so many bytes of its memory: for a file in /tmp."""
    guest.run(f"dd if=/dev/zero of=/tmp/{name} bs=1M count={size >> 20} 2>/dev/null")


def fill(guest: Guest, size: int) -> None:
    """Has the guest use so much of its free memory, and let go of it: afterwards the host has memory behind it."""
    write(guest, size)
    guest.run("rm /tmp/file")
