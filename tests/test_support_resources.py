"""The resources are what they say, and nothing of them is left afterwards."""

import contextlib
import ctypes
import errno
import mmap
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import accounting, resources
from tests.support.accounting import HUGE_2M
from tests.support.cgroups import CgroupUnavailableError, find_hierarchy
from tests.support.children import Outcome, run_child, unprivileged

MIB = 1 << 20


def fill(path, size):
    """Bytes that could be allocated, and the errno that ended it."""
    with open(path, "wb", buffering=0) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            return error.errno
    return 0


# --- children


def test_child_hands_back_values_and_errors():
    assert run_child(lambda: (1, "two")).result() == (1, "two")
    assert run_child(lambda: bytes(1 << 20)).result() == bytes(1 << 20)
    with pytest.raises(ZeroDivisionError):
        run_child(lambda: 1 // 0).result()
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        run_child(lambda: lambda: None).result()
    assert isinstance(run_child(signal.raise_signal, signal.SIGINT).error, KeyboardInterrupt)


def test_child_that_is_killed_or_leaves():
    assert run_child(ctypes.string_at, 0) == Outcome(signal=signal.SIGSEGV)
    with pytest.raises(AssertionError, match="SIGSEGV"):
        run_child(ctypes.string_at, 0).result()
    assert run_child(os._exit, 3) == Outcome(exit_status=3)


def test_child_that_takes_too_long():
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="did not end"):
        run_child(time.sleep, 60, timeout=0.2)
    assert time.monotonic() - began < 10


def test_child_whose_own_child_holds_the_pipe():
    def leave_a_grandchild():
        if os.fork() == 0:
            time.sleep(2)
            os._exit(0)
        return "done"

    began = time.monotonic()
    assert run_child(leave_a_grandchild).result() == "done"
    assert time.monotonic() - began < 1.5


def test_child_with_limits(tmp_path):
    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        return fill(tmp_path / "file", 8192)

    assert run_child(write, limits={resource.RLIMIT_FSIZE: 4096}).result() == errno.EFBIG
    with pytest.raises((OSError, MemoryError)):
        run_child(mmap.mmap, -1, 1 << 40, limits={resource.RLIMIT_AS: 1 << 30}).result()


def test_unprivileged_child(tmp_path):
    def look():
        with contextlib.suppress(OSError):
            os.setuid(0)
        return os.geteuid(), len(accounting.vmas()) > 0, accounting.have_pagemap_scan()

    euid, sees_maps, sees_pages = unprivileged(look).result()
    assert euid != 0
    assert sees_maps
    assert sees_pages == accounting.have_pagemap_scan()


# --- mounts


def test_tmpfs(tmpfs_mount):
    small, other = tmpfs_mount("1M"), tmpfs_mount(size=4 * MIB, huge="never")
    assert small != other
    assert fill(small / "file", 2 * MIB) == errno.ENOSPC
    assert fill(other / "file", 2 * MIB) == 0
    assert accounting.allocated_bytes(other / "file") == 2 * MIB


def test_ext4(ext4_mount):
    folder = ext4_mount(64)
    assert fill(folder / "file", MIB) == 0
    assert accounting.allocated_bytes(folder / "file") >= MIB
    assert fill(folder / "full", 64 * MIB) == errno.ENOSPC
    (folder / "full").unlink(missing_ok=True)
    assert unprivileged(fill, folder / "nobody", MIB).result() == 0


def test_hugetlbfs_is_limited_by_its_size(huge_pool, hugetlbfs_mount):
    huge_pool(4)
    folder = hugetlbfs_mount(pages=2)
    assert fill(folder / "file", 2 * HUGE_2M) == 0
    assert accounting.allocated_bytes(folder / "file") == 2 * HUGE_2M
    assert fill(folder / "more", HUGE_2M) == errno.ENOSPC


def test_mounts_are_gone_afterwards():
    resources.need_root("to mount")
    with resources.mount_tmpfs("1M") as folder:
        assert os.path.ismount(folder)
        assert str(folder) in Path("/proc/self/mounts").read_text()
        # Only this process sees it: a mount namespace of its own.
        assert str(folder) not in Path("/proc/1/mounts").read_text()
    assert not folder.exists()


def test_a_mount_in_use_is_reported_and_goes_all_the_same():
    resources.need_root("to mount")
    with contextlib.ExitStack() as stack:
        with pytest.raises(RuntimeError, match="still uses"), resources.mount_tmpfs("1M") as folder:
            stack.enter_context(open(folder / "file", "w"))
        assert not folder.exists()


# --- huge pages


def test_huge_pool_gives_and_gives_back():
    with resources.huge_pool_lock():
        before = accounting.huge_pool()
        wanted = before.available + 3
        with resources.huge_pages(wanted):
            assert accounting.huge_pool().available >= wanted
        assert accounting.huge_pool() == before


def test_huge_pool_and_empty_pool_in_one_test(huge_pool):
    huge_pool(3)
    with resources.exhausted_pool():
        assert accounting.huge_pool().available == 0
        with pytest.raises(OSError, match="memory"):
            mmap.mmap(-1, HUGE_2M, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)
    assert accounting.huge_pool().available >= 3


def test_empty_pool(empty_pool):
    assert accounting.huge_pool().free == 0


def test_unprivileged_user_can_use_the_pool(huge_pool):
    huge_pool(2)

    def use():
        # As the fixtures do in a process that was never root.
        with resources.huge_pages(1), mmap.mmap(-1, HUGE_2M, flags=mmap.MAP_PRIVATE | 0x60) as mapping:
            mapping[0] = 1
        with pytest.raises(pytest.skip.Exception, match="needs root: to reserve"), resources.huge_pages(1 << 20):
            pass

    unprivileged(use).result()


# --- settings


@pytest.mark.parametrize("mode", ["never", "madvise", "always"])
def test_thp_mode(mode, thp_mode):
    thp_mode(mode)
    assert f"[{mode}]" in resources.THP_ENABLED.read_text()


def test_settings_are_put_back():
    resources.need_root("to set")
    before = resources.THP_ENABLED.read_text()
    with resources.setting(resources.THP_ENABLED, "never"), resources.setting(resources.THP_ENABLED, "always"):
        assert "[always]" in resources.THP_ENABLED.read_text()
    assert resources.THP_ENABLED.read_text() == before
    with pytest.raises(pytest.skip.Exception, match="to accept 'sometimes'"):
        contextlib.ExitStack().enter_context(resources.setting(resources.THP_ENABLED, "sometimes"))


def test_plain_settings(kernel_setting):
    kernel_setting("/proc/sys/vm/overcommit_ratio", 51)
    assert Path("/proc/sys/vm/overcommit_ratio").read_text() == "51\n"


# --- cgroups


def test_memory_cgroup_limits_a_child(memory_cgroup):
    group = memory_cgroup(64 * MIB)
    assert group.pids == []

    def touch(size):
        Path("/proc/self/oom_score_adj").write_text("1000")
        group.add()
        with mmap.mmap(-1, size) as mapping:
            for page in range(0, size, 4096):
                mapping[page] = 1
            return group.usage

    assert 8 * MIB <= run_child(touch, 8 * MIB).result() <= 64 * MIB
    assert run_child(touch, 128 * MIB).signal == signal.SIGKILL


def test_memory_cgroup_is_removed_with_what_is_in_it(memory_cgroup):
    group = memory_cgroup()
    with subprocess.Popen(["sleep", "60"]) as process:
        group.add(process.pid)
        assert group.pids == [process.pid]
        group.close()
        assert process.wait(10) == -signal.SIGKILL
    assert not group.path.exists()


def test_memory_controller_is_found_on_v2(tmp_path):
    (tmp_path / "own" / "deep").mkdir(parents=True)
    for folder, handed_down in (
        (tmp_path, "memory pids"),
        (tmp_path / "own", "cpu memory"),
        (tmp_path / "own/deep", ""),
    ):
        (folder / "cgroup.controllers").write_text("cpu memory pids")
        (folder / "cgroup.subtree_control").write_text(handed_down)
    mountinfo, membership = tmp_path / "mountinfo", tmp_path / "membership"
    mountinfo.write_text(f"30 24 0:26 / {tmp_path} rw,relatime - cgroup2 cgroup2 rw\n")
    membership.write_text("0::/own/deep\n")
    found = find_hierarchy(mountinfo, membership)
    assert (found.version, found.parent) == (2, tmp_path / "own")
    mountinfo.write_text("30 24 0:26 / / rw,relatime - ext4 /dev/x rw\n")
    with pytest.raises(CgroupUnavailableError):
        find_hierarchy(mountinfo, membership)


# --- the leak check


def run_pytest(folder, source, **environment):
    (folder / "test_it.py").write_text(source)
    root = str(Path(resources.__file__).parents[2])
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(folder), "-p", "no:cacheprovider"]
    plugins = ["-p", "tests.support.leaks", "-p", "tests.support.skips"]
    return subprocess.run(
        [*command, *plugins, "-q", "test_it.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


LEAKS = """
import mmap, os, pytest
kept = []

def test_descriptor(): kept.append(os.memfd_create("one"))
def test_memfd_mapping():
    fd = os.memfd_create("sparsemem-leak")
    os.ftruncate(fd, 4096)
    kept.append(mmap.mmap(fd, 4096))
    os.close(fd)
def test_reservation(): kept.append(mmap.mmap(-1, 1 << 40, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000))
def test_file_mapping(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 4096)
    with open(tmp_path / "file", "r+b") as file:
        kept.append(mmap.mmap(file.fileno(), 4096))

@pytest.mark.leaky
def test_allowed(): kept.append(os.memfd_create("two"))
def test_cycle():
    cycle = [mmap.mmap(-1, 4096)]
    cycle.append(cycle)
def test_clean(): assert True
"""


def test_leaks_are_found(tmp_path):
    done = run_pytest(tmp_path, LEAKS)
    failed = {line.split()[1].partition("::")[2] for line in done.stdout.splitlines() if line.startswith("ERROR ")}
    assert failed == {"test_descriptor", "test_memfd_mapping", "test_reservation", "test_file_mapping"}, done.stdout
    assert "/memfd:sparsemem-leak" in done.stdout
    assert "7 passed, 4 errors" in done.stdout
