"""The whole specification on a kernel without MADV_POPULATE and PAGEMAP_SCAN, which seccomp makes of this one."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import seccomp

ROOT = Path(__file__).parent.parent
_MADVISE = {"x86_64": 28, "aarch64": 233}
_IOCTL = {"x86_64": 16, "aarch64": 29}

# Run in a process of its own: the filter stays for good, and for all that it starts.
_BEFORE = "from tests.test_old_kernel import become_old; become_old({scan})"


def become_old(scan: bool) -> None:
    """madvise with advice 22 or 23 is EINVAL, ioctl(PAGEMAP_SCAN) is ENOTTY unless `scan`, all else is allowed."""
    machine = platform.machine()
    seccomp.install(
        [
            seccomp.load_number(),
            seccomp.jump_unless(_MADVISE[machine], 5),
            seccomp.load_argument(2),
            seccomp.jump_unless(22, 1),
            seccomp.fail(errno.EINVAL),
            seccomp.jump_unless(23, 1),
            seccomp.fail(errno.EINVAL),
            seccomp.load_number(),
            seccomp.jump_unless(_IOCTL[machine], 3),
            seccomp.load_argument(1),
            seccomp.jump_unless(3 << 30 | 96 << 16 | ord("f") << 8 | 16, 1),
            seccomp.allow() if scan else seccomp.fail(errno.ENOTTY),
            seccomp.allow(),
        ]
    )


def bar(*numbers: int) -> None:
    """Makes system calls EPERM in this process, as containers do."""
    steps = [seccomp.load_number()]
    for number in numbers:
        steps += [seccomp.jump_unless(number, 1), seccomp.fail(errno.EPERM)]
    seccomp.install([*steps, seccomp.allow()])


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
