"""System calls of a running process made to fail from outside: strace(1), attached to it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


class Tampered:
    """A Python program that is attached to once it says that it is ready.

    Attributes:
        injected: Calls that strace let fail; known when all is over.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.injected = 0

    def go_on(self, timeout: float = 60) -> str:
        """Lets the program go on to its end; what it printed after it was ready."""
        output, errors = self._process.communicate("go\n", timeout=timeout)
        assert self._process.returncode == 0, errors
        return output


@contextlib.contextmanager
def tampered(program: str, inject: str, *arguments: str) -> Iterator[Tampered]:
    """Starts a program and attaches strace to it, with all its threads, at the point where it calls `ready()`.

    Args:
        program: Python; `ready()` is defined in it, and returns once strace is attached.
        inject: As for `strace -e inject=`; `when=` counts the calls of each thread from then on.
        *arguments: The program's `sys.argv[1:]`.
    """
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    ready = "import sys\ndef ready():\n    print('ready', flush=True)\n    sys.stdin.readline()\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("LD_PRELOAD", None)
    with contextlib.ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sparsemem-strace-"))) / "log"
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-W", "error", "-c", ready + program, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
        stack.callback(process.kill)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == "ready\n", (line, process.communicate()[1])
        # The call has to be traced for anything to be injected into it.
        name = inject.partition(":")[0]
        command = ["strace", "-f", "-qq", "-o", str(log), "-e", f"trace={name}", "-e", f"inject={inject}"]
        tracer = stack.enter_context(subprocess.Popen([*command, "-p", str(process.pid)], stderr=subprocess.PIPE))
        stack.callback(tracer.kill)
        _await_attached(process.pid, tracer)
        attached = Tampered(process)
        yield attached
        process.wait(10)
        tracer.wait(10)  # its log is whole then
        attached.injected = log.read_text().count("(INJECTED)")


def _await_attached(pid: int, tracer: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/status").read_text()
        if f"TracerPid:\t{tracer.pid}\n" in status:
            return
        if tracer.poll() is not None:
            assert tracer.stderr is not None
            pytest.skip(f"needs root: to trace another process ({tracer.stderr.read().decode().strip()})")
        time.sleep(0.01)
    raise TimeoutError("strace did not attach")
