"""QEMU as the tests run it: emulated without KVM, a Debian kernel, our initramfs, and QMP for the host's side."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from tests.guest import initramfs
from tests.guest.console import DIE_TOGETHER, WATCHDOG, Guest, StuckError
from tests.guest.packages import Packages, PackagesMissingError

MIB = 1 << 20
# The memory that the guest boots with, and where a device's range lies: above it, and above what lies below 4 GiB.
RAM = 512 * MIB
RANGE_ADDRESS = 0x1_4000_0000
MEMORY = (
    *("-machine", "q35,memory-backend=ram"),
    *("-m", f"size={RAM >> 20}M,maxmem=16G,slots=4"),
    *("-object", f"memory-backend-memfd,id=ram,size={RAM},share=on"),
)
PLUGIN_SOURCE = Path(__file__).with_name("creatable.c")
VHOST_USER_DEVICE = "vhost-user-device-pci"
# What newer QEMUs call it; there it may be created without more ado.
VHOST_USER_TEST_DEVICE = "vhost-user-test-device-pci"


class Qmp:
    """QEMU's control connection."""

    def __init__(self, connection: socket.socket) -> None:
        """Takes over a connected socket."""
        self.events: list[dict[str, Any]] = []
        connection.settimeout(WATCHDOG)
        self._connection = connection
        self._lines = connection.makefile("rb")
        try:
            self._next()  # the greeting
            self.command("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def command(self, name: str, **arguments: object) -> Any:
        """Executes a command and returns its answer; arguments with a `-` in their names are written with `_`."""
        asked = {"execute": name, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}
        self._connection.sendall(json.dumps(asked).encode() + b"\n")
        while True:
            told = self._next()
            if "return" in told:
                return told["return"]
            if "error" in told:
                raise RuntimeError(f"QMP {name}: {told['error']['desc']}")
            self.events.append(told)

    def wait_event(self, name: str) -> dict[str, Any]:
        """Waits for the next event of this name, and forgets those before it."""
        while True:
            told = self.events.pop(0) if self.events else self._next()
            if told.get("event") == name:
                return told

    def close(self) -> None:
        """Closes the connection."""
        self._lines.close()
        self._connection.close()

    def _next(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise StuckError("QEMU has closed its control connection")
        told: dict[str, Any] = json.loads(line)
        return told


class QemuGuest(Guest):
    """A guest in QEMU, with its control connection.

    Attributes:
        qmp: The connection.
        log: The file with QEMU's own messages and traces.
    """

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, qmp: socket.socket) -> None:
        """Takes a process that has been started just now."""
        super().__init__(process, folder / "kernel.log")
        self.log = folder / "qemu.log"
        try:
            self.qmp = Qmp(qmp)
        except (StuckError, OSError):
            super().close()
            raise StuckError(f"QEMU does not start: {self.log.read_text()}") from None

    def close(self) -> None:
        super().close()
        self.qmp.close()

    def __enter__(self) -> QemuGuest:
        return self


@frozen
class Qemu:
    """How to start a guest.

    Attributes:
        packages: Where QEMU, kernel and modules are.
        folder: Where files of the run go: initramfs, logs, the plugin.
    """

    packages: Packages
    folder: Path

    def start(self, *devices: str, memory: Sequence[str] = MEMORY, traces: tuple[str, ...] = ()) -> QemuGuest:
        """Starts a guest and waits until init obeys.

        Args:
            devices: More arguments for QEMU.
            memory: The arguments for the machine and the memory that it boots with.
            traces: Trace events written to its log.
        """
        ours, its = socket.socketpair()
        traced = [word for name in traces for word in ("-trace", name)]
        with its, (self.folder / "qemu.log").open("wb") as log:
            process = subprocess.Popen(
                [*DIE_TOGETHER, *self.arguments(its.fileno()), *memory, *traced, *devices],
                env=self.packages.environment,
                cwd=self.folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=(its.fileno(),),
                start_new_session=True,
            )
        guest = QemuGuest(process, self.folder, ours)
        try:
            guest.wait_up()
        except BaseException:
            guest.close()
            raise
        return guest

    def arguments(self, qmp: int) -> list[str]:
        """The command line but for memory and devices; `qmp` is the descriptor of the control connection."""
        share = self.packages.root / "usr/share"
        archive = self.folder / "initramfs.cpio"
        if not archive.exists():
            modules = {name: self.packages.module(name) for name in ("virtio_balloon", "virtio_mem")}
            initramfs.write(archive, self.packages, modules, "ttyS0")
        return [
            str(self.packages.one("usr/bin/qemu-system-x86_64")),
            *("-L", str(share / "qemu"), "-L", str(share / "seabios")),
            *("-nodefaults", "-no-user-config", "-display", "none"),
            *("-accel", "tcg", "-cpu", "max"),
            *("-kernel", str(self.packages.one("boot/vmlinuz-*")), "-initrd", str(archive)),
            *("-append", "console=ttyS1 panic=-1 loglevel=5 nokaslr"),
            *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
            *("-serial", f"file:{self.folder / 'kernel.log'}"),
            *("-chardev", f"socket,id=qmp,fd={qmp}", "-mon", "chardev=qmp,mode=control"),
        ]

    def vhost_user(self) -> tuple[str, list[str]]:
        """The name of the device that speaks vhost-user, and the arguments that make it creatable.

        Raises:
            PackagesMissingError: This QEMU's cannot be created, with its version.
        """
        if VHOST_USER_TEST_DEVICE in self._ask("-device", "help"):
            return VHOST_USER_TEST_DEVICE, []
        plugin = self.folder / "creatable.so"
        compile_plugin(plugin)
        arguments = ["-plugin", f"{plugin},device={VHOST_USER_DEVICE}"]
        # QEMU lists its devices before it loads the plugin. So one is asked for, of a machine that has no place for it,
        # which is found out only after whether it may be created.
        told = self._ask("-accel", "tcg", *arguments, "-device", VHOST_USER_DEVICE)
        if "was 0 and is 1" not in told or "No 'PCI' bus" not in told:
            version = self._ask("-version").splitlines()[0]
            raise PackagesMissingError(f"its vhost-user device cannot be created: {version}: {told[-300:]}")
        return VHOST_USER_DEVICE, arguments

    def _ask(self, *arguments: str) -> str:
        command = [str(self.packages.one("usr/bin/qemu-system-x86_64")), "-machine", "none", *arguments]
        told = subprocess.run(command, env=self.packages.environment, capture_output=True, text=True, check=False)
        return told.stdout + told.stderr


def compile_plugin(target: Path) -> None:
    """Compiles the plugin.

    Raises:
        PackagesMissingError: There is no compiler.
    """
    command = [os.environ.get("CC", "gcc"), "-O1", "-shared", "-fPIC", "-o", str(target), str(PLUGIN_SOURCE)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PackagesMissingError(f"the plugin for QEMU cannot be compiled: {error}") from error
