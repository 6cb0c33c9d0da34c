"""Records what real guests send, for the fuzzer to begin with: `python -m tests.guest.record`, in the repository."""

from __future__ import annotations

import tempfile
from pathlib import Path

from sparsemem import Memfd, Region
from sparsemem.virtio.balloon import VirtioBalloon
from sparsemem.virtio.guest_memory import GuestMemory
from sparsemem.virtio.vhost_user import Backend, Server
from tests.guest.console import until
from tests.guest.ours import Hints, OurDevices
from tests.guest.packages import Packages, packages
from tests.guest.qemu import MIB, Qemu
from tests.guest.uml import BALLOON, UserModeLinux
from tests.virtio.recording import FOLDER, recorded


def exercise(balloon: VirtioBalloon) -> None:
    """A little of all that a balloon can do."""
    for size in (2 * MIB, 3 * MIB, MIB, 0):
        balloon.target = size
        until(lambda: balloon.actual == balloon.target, "the balloon")
        balloon.request_stats(60)
    hints = Hints()
    balloon.add_listener(hints)
    for sessions in (1, 2):
        balloon.start_hinting()
        hints.wait_done(sessions)
        balloon.finish_hinting()
    reported = balloon.discarded_size
    until(lambda: balloon.discarded_size > reported, "a report of free pages")


def with_qemu(found: Packages, folder: Path) -> None:
    """Both devices, a reboot, and the end."""
    qemu = Qemu(found, folder)
    name, creatable = qemu.vhost_user()
    with (
        Region("4G", backend=Memfd()) as region,
        OurDevices(region, folder) as devices,
        qemu.start(*creatable, *devices.arguments(name)) as guest,
    ):
        for size in (256, 640, 642, 100, 0, 512):
            devices.resize(size * MIB)
        guest.reboot()
        until(lambda: devices.plugged() == 512 * MIB, "512 MiB again")
        devices.resize(128 * MIB)
        exercise(devices.balloon_device)


def with_user_mode_linux(found: Packages, folder: Path) -> None:
    """The balloon, and the end."""
    balloon, socket = VirtioBalloon(GuestMemory()), folder / "balloon"
    with (
        Server(Backend("balloon", balloon, balloon.memory), str(socket)),
        UserModeLinux(found, folder).start(f"virtio_uml.device={socket}:{BALLOON}"),
    ):
        exercise(balloon)


def main() -> None:
    """Writes the recordings."""
    found = packages()
    for name, run in (("qemu", with_qemu), ("user-mode-linux", with_user_mode_linux)):
        with tempfile.TemporaryDirectory() as folder, recorded(FOLDER / f"{name}.jsonl", most=400):
            run(found, Path(folder))


if __name__ == "__main__":
    main()
