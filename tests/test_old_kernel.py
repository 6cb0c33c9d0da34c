"""The whole specification on a kernel without MADV_POPULATE and PAGEMAP_SCAN, which seccomp makes of this one."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_MADVISE = {"x86_64": 28, "aarch64": 233}
_IOCTL = {"x86_64": 16, "aarch64": 29}

# Run in a process of its own: the filter stays for good, and for all that it starts.
_BEFORE = "from tests.test_old_kernel import become_old; become_old({scan})"


def _filter(scan: bool) -> bytes:
    """BPF: madvise with advice 22 or 23 is EINVAL, ioctl(PAGEMAP_SCAN) is ENOTTY, all else is allowed."""
    machine = platform.machine()

    def load(offset: int) -> tuple[int, int, int, int]:
        return 0x20, 0, 0, offset

    def jump_unless(value: int, skip: int) -> tuple[int, int, int, int]:
        return 0x15, 0, skip, value

    def answer(value: int) -> tuple[int, int, int, int]:
        return 0x06, 0, 0, value

    errno_, allow = 0x00050000, 0x7FFF0000
    program = [
        load(0),  # nr
        jump_unless(_MADVISE[machine], 5),
        load(16 + 2 * 8),  # the third argument
        jump_unless(22, 1),
        answer(errno_ | 22),
        jump_unless(23, 1),
        answer(errno_ | 22),
        load(0),
        jump_unless(_IOCTL[machine], 3),
        load(16 + 8),
        jump_unless(3 << 30 | 96 << 16 | ord("f") << 8 | 16, 1),
        answer(allow if scan else errno_ | 25),
        answer(allow),
    ]
    return b"".join(struct.pack("HBBI", *step) for step in program)


def become_old(scan: bool) -> None:
    """Installs the filter in this process; with `scan`, PAGEMAP_SCAN still works."""
    install(_filter(scan))


def bar(*numbers: int) -> None:
    """Makes system calls EPERM in this process, as containers do."""
    load_nr, skip_over, eperm, allow = (0x20, 0, 0, 0), 0x15, 0x00050001, 0x7FFF0000
    program = [load_nr]
    for number in numbers:
        program += [(skip_over, 0, 1, number), (0x06, 0, 0, eperm)]
    install(b"".join(struct.pack("HBBI", *step) for step in [*program, (0x06, 0, 0, allow)]))


def install(filter_: bytes) -> None:
    """Installs a seccomp filter in this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(filter_)
    program = struct.pack("HxxxxxxP", (len(code) - 1) // 8, ctypes.addressof(code))
    pr_set_no_new_privs, pr_set_seccomp, mode_filter = 38, 22, 2
    if libc.prctl(pr_set_no_new_privs, 1, 0, 0, 0) or libc.prctl(pr_set_seccomp, mode_filter, program, 0, 0):
        raise OSError(ctypes.get_errno(), "no seccomp filter can be installed here")


def python(code: str, *, scan: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment.pop("SPARSEMEM_SKIP_POLICY", None)
    return subprocess.run(
        [sys.executable, "-c", f"{_BEFORE.format(scan=scan)}\n{code}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
        timeout=280,
    )


pytestmark = pytest.mark.skipif(
    platform.machine() not in _MADVISE, reason="needs the numbers of this architecture's calls"
)


def test_the_kernel_is_old_then() -> None:
    done = python(
        "from sparsemem import Region, Memfd\n"
        "from sparsemem._sys import calls, probe\n"
        "assert not probe.populate_write(calls.kernel)\n"
        "assert not probe.scans_pagemap(calls.kernel)\n"
        "with Region('1T', backend=Memfd()) as region:\n"
        "    region.plug(0, 2)\n"
        "    print(region.stats().strategy, region.audit().ok)\n"
    )
    assert done.stdout == "futex True\n", done.stderr


def test_a_strategy_that_it_does_not_have_is_refused() -> None:
    done = python("from sparsemem import Anonymous, Region\nRegion('1G', backend=Anonymous(strategy='populate_write'))")
    assert "does not work here: this kernel has no MADV_POPULATE_WRITE" in done.stderr


def test_the_specification_holds_on_it() -> None:
    """The tests' own accounting needs PAGEMAP_SCAN, so only MADV_POPULATE is taken away."""
    tests = ["test_mappings.py", "test_views.py", "test_listeners.py", "test_region.py", "test_no_double_memory.py"]
    done = python(
        "import sys, pytest\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *{[f'tests/{name}' for name in tests]},"
        " '-k', 'not populate_write']))",
        scan=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
