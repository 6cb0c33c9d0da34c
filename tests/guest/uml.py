"""User-mode Linux as the tests run it: a kernel that is a process, for which a virtio device is a socket."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

from attrs import frozen

from tests.guest import initramfs
from tests.guest.console import DIE_TOGETHER, Guest
from tests.guest.packages import Packages
from tests.support import seccomp

BALLOON = 5
_PTRACE = 101  # x86-64
_GETREGSET, _X86_XSTATE = 0x4204, 0x202
# What the kernel does not know becomes init's environment. Registers that only a full restore would bring back after a
# page fault must not be used.
_NARROW = "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-AVX512BW,-AVX_Fast_Unaligned_Load,-ERMS"
_REPOSITORY = Path(__file__).parent.parent.parent
_START = "import sys; from tests.guest import uml; uml.hide_wide_registers(); uml.execute(sys.argv[1:])"


def hide_wide_registers() -> None:
    """Lets PTRACE_GETREGSET of the extended registers fail in this process and those that it starts.

    User-mode Linux 6.1 has room of a fixed size for them, and the host's kernel takes them
    back as a whole or not at all (EFAULT).  On a processor whose registers need more (AMX) no
    process could run.  Without that request it uses an older one, which always fits, but
    leaves out the wide halves of the vector registers.
    """
    seccomp.install(
        [
            seccomp.load_number(),
            seccomp.jump_unless(_PTRACE, 5),
            seccomp.load_argument(0),
            seccomp.jump_unless(_GETREGSET, 3),
            seccomp.load_argument(2),
            seccomp.jump_unless(_X86_XSTATE, 1),
            seccomp.fail(errno.EIO),
            seccomp.allow(),
        ]
    )


def execute(command: list[str]) -> None:
    """Turns this process into the program."""
    os.execv(command[0], command)


@frozen
class UserModeLinux:
    """How to start a guest.

    Attributes:
        packages: Where the kernel and its modules are.
        folder: Where files of the run go.
    """

    packages: Packages
    folder: Path

    def start(self, *devices: str, memory: str = "256M") -> Guest:
        """Starts a guest and waits until init obeys.

        Args:
            devices: More of the kernel's command line, `virtio_uml.device=SOCKET:5` for a balloon.
            memory: How much the guest has.
        """
        archive = self.folder / "initramfs.cpio"
        if not archive.exists():
            modules = {"virtio_balloon": self.packages.module("virtio_balloon", "usr/lib/uml/modules")}
            initramfs.write(archive, self.packages, modules, "tty0")
        command = [
            *DIE_TOGETHER,
            *(sys.executable, "-c", _START),
            str(self.packages.one("usr/bin/linux.uml")),
            *(f"mem={memory}", f"initrd={archive}", "root=/dev/ram0", "con=null", "con0=fd:0,fd:1", _NARROW),
            *("con1=fd:2", "console=tty1", "loglevel=5"),
            *(f"uml_dir={self.folder}/", "umid=guest"),
            *devices,
        ]
        kernel_log = self.folder / "kernel.log"
        with kernel_log.open("wb") as log:
            process = subprocess.Popen(
                command,
                # Its memory is a file, in the folder for temporary ones.
                env={**os.environ, "PYTHONPATH": str(_REPOSITORY), "TMPDIR": "/dev/shm"},
                cwd=self.folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        guest = Guest(process, kernel_log)
        try:
            guest.wait_up()
        except BaseException:
            guest.close()
            raise
        return guest
