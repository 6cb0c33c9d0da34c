"""Which tests are about the kernel and no matter of the interpreter: those need not run on every Python.

They get the marker `kernel`: what is held against the kernel itself, what sets the machine up first, and, of tests that
go through all kinds of mapping or all errnos, all but a few.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent.parent

FOLDERS = {"conformance", "sanitizers", "stateful"}
FILES = {
    "test_bench.py",
    "test_numa.py",
    "test_old_kernel.py",
    "test_protection.py",
    "test_security.py",
    "test_snapshot_dirty.py",
    "test_snapshot_faults.py",
    "test_support_accounting.py",
    "test_thp.py",
}
MACHINE = {
    "empty_pool",
    "ext4_mount",
    "huge_pool",
    "hugetlb_cgroup",
    "hugetlbfs_mount",
    "kernel_setting",
    "locked_pool",
    "memory_cgroup",
    "shmem_thp_mode",
    "strict_overcommit",
    "thp_mode",
    "tmpfs_mount",
}
"""Fixtures that change the machine: tests with these may not run beside each other, either."""

KINDS = {"anonymous private", "memfd shared", "memfd private", "simulated"}
CODES = {"ENOMEM", "EIO", "EFAULT", "EINVAL"}


def about_the_kernel(item: pytest.Item) -> bool:
    """Whether another interpreter could not make a difference."""
    path = item.path.relative_to(TESTS)
    if path.parts[0] in FOLDERS or path.name in FILES:
        return True
    if MACHINE & set(getattr(item, "fixturenames", ())):
        return True
    parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    kind = parameters["made"][0].id if "made" in parameters else None
    if path.name == "test_faults.py":
        kind = parameters.get("name")
    if "made" in parameters and parameters["made"][2] != "none":
        return True
    strategy = parameters["made"][1] if "made" in parameters else parameters.get("strategy", "auto")
    if kind is not None and (kind not in KINDS or (strategy not in ("auto", "populate_write"))):
        return True
    return path.name.startswith("test_faults") and parameters.get("code", "EIO") not in CODES


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them, before `-m` selects."""
    for item in items:
        if about_the_kernel(item):
            item.add_marker(pytest.mark.kernel)
