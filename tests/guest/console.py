"""A running guest: its process, its console, and waiting for what it does.

Nothing here waits for a time to pass.  Every wait is for a condition, and ends in an error
only when a watchdog says that the guest must be stuck.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

# Far beyond what anything takes here, even beside other work on two processors.
WATCHDOG = 150.0
POLL = 0.01

# A guest must not outlive whoever started it, however that ended. (Not a hook of Popen's: this process has threads.)
DIE_TOGETHER = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []

Answer = TypeVar("Answer")


class StuckError(AssertionError):
    """The guest did not do what it was waited for."""


def until(condition: Callable[[], Answer], what: str, watchdog: float = WATCHDOG) -> Answer:
    """Waits for the condition to be true, and returns its answer.

    Args:
        condition: Asked again and again.
        what: What is waited for, in words.
        watchdog: Seconds after which it is given up.

    Raises:
        StuckError: The watchdog barked.
    """
    end = time.monotonic() + watchdog
    while not (answer := condition()):
        if time.monotonic() > end:
            raise StuckError(f"not within {watchdog:.0f} s: {what}")
        time.sleep(POLL)
    return answer


class Guest:
    """A guest whose init obeys the console (see `initramfs`).

    Attributes:
        process: What runs it.
        kernel_log: The file with the kernel's own messages.
    """

    def __init__(self, process: subprocess.Popen[bytes], kernel_log: Path) -> None:
        """Takes a process, leader of a group of its own, whose standard input and output are the guest's console."""
        self.process = process
        self.kernel_log = kernel_log
        self._number = 0
        self._read = b""

    def wait_up(self) -> None:
        """Waits until init obeys."""
        self._until(rb"<<up>>\r?\n")

    def run(self, command: str, *, check: bool = True) -> str:
        """Runs one line of shell in the guest.

        Args:
            command: A line; commands that stay are put into the background with their output elsewhere.
            check: Whether a status other than 0 is an error.

        Returns:
            What it printed.
        """
        self.start(command)
        return self.finish(check=check)

    def start(self, command: str) -> None:
        """Hands over a command without waiting for its end; `finish` must follow before the next one."""
        self._number += 1
        self._write(f"{self._number} {command}\n".encode())

    def finish(self, *, check: bool = True) -> str:
        """Waits for the end of what `start` handed over."""
        printed, status = self._until(rb"<<%d (\d+)>>\r?\n" % self._number)
        text = printed.decode(errors="replace").replace("\r\n", "\n")
        if check and int(status):
            raise RuntimeError(f"the guest's command ended with {int(status)}: {text}")
        return text

    def reboot(self) -> None:
        """Restarts the guest's machine and waits until init obeys again."""
        self._number += 1
        self._write(f"{self._number} reboot -f\n".encode())
        self.wait_up()

    def meminfo(self) -> dict[str, int]:
        """The guest's /proc/meminfo, in bytes."""
        lines = (line.split() for line in self.run("cat /proc/meminfo").splitlines())
        return {line[0].rstrip(":"): int(line[1]) * (1024 if line[2:] == ["kB"] else 1) for line in lines if line}

    def messages(self) -> str:
        """What the kernel has said so far."""
        return self.kernel_log.read_text(errors="replace") if self.kernel_log.exists() else ""

    def close(self) -> None:
        """Ends the guest at once, as when its power goes."""
        # A user-mode kernel is several processes, of one group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def _until(self, pattern: bytes, watchdog: float = WATCHDOG) -> tuple[bytes, bytes]:
        """Reads the console up to the pattern; returns what came before it, and its first group."""
        assert self.process.stdout is not None
        console = self.process.stdout.fileno()
        end = time.monotonic() + watchdog
        while (match := re.search(pattern, self._read)) is None:
            left = end - time.monotonic()
            ready = select.select([console], [], [], max(left, 0))[0]
            chunk = os.read(console, 1 << 16) if ready else b""
            if not chunk:
                why = f"not within {watchdog:.0f} s" if not ready else f"the guest has ended: {self.process.poll()}"
                said = self._read.decode(errors="replace")
                raise StuckError(f"{why}: {pattern!r}; console: {said[-2000:]!r}; kernel: {self.messages()[-3000:]}")
            self._read += chunk
        before, self._read = self._read[: match.start()], self._read[match.end() :]
        return before, match.group(1) if match.lastindex else b""
