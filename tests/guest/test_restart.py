"""A backend that is killed and started again: as the command line serves it, with the arguments that it prints.

QEMU 10.0's device for any vhost-user backend cannot connect again: with a chardev that does (`reconnect-ms`) it
does not start, because it wants the connection when it is made; without, what it has is lost until QEMU itself is
started anew, and a guest that reboots meanwhile ends it with a failed assertion.  User-mode Linux does not connect
again either.  So the guest goes on with the memory that it has, and it is the next one that finds the backend's state.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sparsemem.virtio.vhost_user import ask
from tests.guest.console import DIE_TOGETHER, until
from tests.guest.qemu import MIB, Qemu, QemuGuest

pytestmark = [pytest.mark.guest, pytest.mark.slow]

SIZE = 4096 * MIB


class Served:
    """`sparsemem vhost-user` in a process of its own."""

    def __init__(self, folder: Path, memory: Path) -> None:
        self._control = str(folder / "control")
        self.process = subprocess.Popen(
            [
                *DIE_TOGETHER,
                *(sys.executable, "-m", "sparsemem", "vhost-user", "mem", "--size", str(SIZE)),
                *("--region", f"file:{memory}", "--state", str(folder / "state"), "--control", self._control),
                *("--socket", str(folder / "mem"), "--with-balloon", str(folder / "balloon")),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        lines: list[str] = []
        while not lines or not lines[-1].startswith("# user-mode Linux"):
            lines.append(self.process.stdout.readline())
            assert lines[-1], "it has ended"
        self.arguments = "".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")

    def ask(self, command: str, **arguments: Any) -> Any:
        return ask(self._control, command, **arguments)

    def plugged(self) -> int:
        size: int = self.ask("stats")["mem"]["plugged_size"]
        return size

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()


@pytest.fixture
def memory() -> Iterator[Path]:
    """A file for virtio-mem's memory, which outlives the processes."""
    path = Path(f"/dev/shm/sparsemem-guest-{os.getpid()}")
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def start(qemu: Qemu, vhost_user_device: tuple[str, list[str]]) -> Iterator[Callable[[Served], QemuGuest]]:
    """Starts a guest with the arguments that the command line prints."""
    name, creatable = vhost_user_device
    with ExitStack() as stack:

        def begin(served: Served) -> QemuGuest:
            program, *arguments = shlex.split(served.arguments.replace("vhost-user-device-pci", name))
            assert program == "qemu-system-x86_64"
            return stack.enter_context(qemu.start(*creatable, *arguments, memory=()))

        yield begin


def backed(memory: Path) -> int:
    return memory.stat().st_blocks * 512


def test_the_guest_outlives_its_backend_whose_successor_knows_what_was_plugged(
    start: Callable[[Served], QemuGuest], tmp_path: Path, memory: Path
) -> None:
    with Served(tmp_path, memory) as served:
        guest = start(served)
        without = guest.meminfo()["MemTotal"]
        served.ask("resize", size="512M")
        until(lambda: served.plugged() == 512 * MIB, "512 MiB")
        until(lambda: guest.meminfo()["MemTotal"] == without + 512 * MIB, "512 MiB more in the guest")
        guest.run("dd if=/dev/urandom of=/tmp/random bs=1M count=4 2>/dev/null")
        guest.run("for i in $(seq 110); do cat /tmp/random; done >/tmp/file")
        written = guest.run("md5sum </tmp/file")
        served.kill()
        assert guest.run("md5sum </tmp/file") == written
        assert guest.meminfo()["MemTotal"] == without + 512 * MIB
        guest.close()
    with Served(tmp_path, memory) as served:
        assert served.plugged() == 512 * MIB
        guest = start(served)
        until(lambda: guest.meminfo()["MemTotal"] == without + 512 * MIB, "512 MiB more in the next guest")
        answers = served.ask("stats")["mem"]["answers"]
        assert answers.pop("UNPLUG_ALL ACK") == 1
        assert list(answers) == ["PLUG ACK"]
        assert served.plugged() == 512 * MIB
        guest.close()


def test_killed_in_the_middle_of_a_plug_nothing_is_left_half_done(
    start: Callable[[Served], QemuGuest], tmp_path: Path, memory: Path
) -> None:
    with Served(tmp_path, memory) as served:
        guest = start(served)
        served.ask("resize", size="896M")
        until(lambda: served.plugged() >= 128 * MIB, "a part of it")
        served.kill()
        # Its driver waits for ever for an answer; the guest itself does not.
        assert guest.run("echo still here") == "still here\n"
        guest.close()
    before = backed(memory)
    assert before < 896 * MIB
    with Served(tmp_path, memory) as served:
        plugged = served.plugged()
        assert 128 * MIB <= plugged < 896 * MIB
        assert backed(memory) <= min(plugged, before)
        served.ask("resize", size="512M")
        guest = start(served)
        until(lambda: served.plugged() == 512 * MIB, "512 MiB in the next guest")
        guest.close()
