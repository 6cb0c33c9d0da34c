"""Fixtures for what only root can get: mounts, huge pages, cgroups, kernel settings.

Each is a context manager underneath, gives back what it took, and skips the test with a reason that names what is
missing. Reasons that begin with "needs root" are the ones that an unprivileged run is expected to print.

Mounts are made in a private mount namespace, so that even a killed test run leaves none behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import gc
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import accounting
from tests.support.accounting import HUGE_2M
from tests.support.cgroups import CgroupUnavailableError, MemoryCgroup, new_memory_cgroup

THP_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SHMEM_THP_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_CLONE_NEWNS = 0x20000
_MAP_HUGETLB = 0x40000


def is_root() -> bool:
    """Whether this process may do what root does (as far as the user id tells)."""
    return os.geteuid() == 0


def need_root(purpose: str) -> None:
    """Skip unless root."""
    if not is_root():
        pytest.skip(f"needs root: {purpose}")


# --- mounts ----------------------------------------------------------------------------------------------------------


@functools.cache
def _enter_private_mounts() -> str:
    """Give this process (the calling thread, and what it starts) mounts of its own; returns why not, or ""."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        return f"needs root: a private mount namespace (unshare: {os.strerror(ctypes.get_errno())})"
    done = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, text=True, check=False)
    return f"needs root: private mounts ({done.stderr.strip()})" if done.returncode else ""


@contextmanager
def mounted(kind: str, source: str, options: str, **run: Any) -> Iterator[Path]:
    """Mount a file system on a fresh folder; a test that still uses it at its end has failed."""
    need_root(f"to mount {kind}")
    if why := _enter_private_mounts():
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix=f"sparsemem-{kind}-"))
    try:
        command = ["mount", "-t", kind, "-o", options, source, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, **run)
        if done.returncode:
            pytest.skip(f"needs a kernel that mounts {kind} ({done.stderr.strip()})")
        try:
            yield folder
        finally:
            _unmount(folder)
    finally:
        folder.rmdir()


def _unmount(folder: Path) -> None:
    if subprocess.run(["umount", str(folder)], capture_output=True, check=False).returncode:
        gc.collect()  # a mapping that only a reference cycle holds
        if subprocess.run(["umount", str(folder)], capture_output=True, check=False).returncode:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
            raise RuntimeError(f"the test still uses files on {folder} after its end")


def _options(**options: object) -> str:
    named = [name if value is True else f"{name}={value}" for name, value in options.items() if value is not None]
    return ",".join(["rw", *named])


@contextmanager
def mount_tmpfs(size: int | str = "64M", **options: object) -> Iterator[Path]:
    """A tmpfs of its own; `options` are mount's, `huge="always"` or `nr_inodes=10` for two."""
    with mounted("tmpfs", "sparsemem-test", _options(size=size, mode="1777", **options)) as folder:
        yield folder


@contextmanager
def mount_hugetlbfs(size: int | str | None = None, pages: int | None = None, **options: object) -> Iterator[Path]:
    """A hugetlbfs of 2 MiB pages, limited to `size` bytes or `pages` pages; takes no page from the pool by itself."""
    if pages is not None:
        size = pages * HUGE_2M
    text = _options(pagesize="2M", size=size, mode="1777", **options)
    with mounted("hugetlbfs", "sparsemem-test", text) as folder:
        yield folder


@contextmanager
def mount_ext4(size_mib: int = 64, options: str = "rw") -> Iterator[Path]:
    """An ext4 on a loop device over a sparse image; all of it usable (no reserved blocks).

    Less than 64 MiB leaves too little room beside the journal. The image lies on disk, not on a tmpfs, so that its
    pages are not counted as shmem.
    """
    need_root("to mount ext4 on a loop device")
    if shutil.which("mkfs.ext4", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
        pytest.skip("needs mkfs.ext4 (Debian: e2fsprogs)")
    folder = "/var/tmp" if os.access("/var/tmp", os.W_OK) else None
    with tempfile.NamedTemporaryFile(prefix="sparsemem-ext4-", suffix=".img", dir=folder) as image:
        image.truncate(size_mib << 20)
        environment = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
        make = ["mkfs.ext4", "-q", "-F", "-m0", image.name]
        subprocess.run(make, check=True, capture_output=True, env=environment)
        # mount's own loop devices have autoclear set: they go with the mount, however it ends.
        with mounted("ext4", image.name, f"loop,{options}") as mountpoint:
            if "ro" not in options.split(","):
                mountpoint.chmod(0o1777)
            yield mountpoint


# --- settings of the kernel ------------------------------------------------------------------------------------------


def _selected(text: str) -> str:
    """The word in brackets of "always [madvise] never"; the whole text of a plain setting."""
    return text.partition("[")[2].partition("]")[0] or text.strip()


@contextmanager
def setting(path: str | os.PathLike[str], value: object) -> Iterator[None]:
    """Write a file of /proc/sys or /sys and put the old value back."""
    file = Path(path)
    try:
        before = _selected(file.read_text())
    except FileNotFoundError:
        pytest.skip(f"needs a kernel with {file}")
    if before == str(value):
        yield
        return
    need_root(f"to set {file} to {value}")
    try:
        file.write_text(str(value))
    except OSError as error:
        pytest.skip(f"needs {file} to accept {value!r} ({error.strerror})")
    try:
        yield
    finally:
        file.write_text(before)


# --- huge pages ------------------------------------------------------------------------------------------------------


@contextmanager
def huge_pool_lock() -> Iterator[None]:
    """One process at a time may use the pool: its counts are the evidence of tests."""
    path = Path("/tmp/sparsemem-hugepages.lock")
    try:
        # Not created if there: a sticky folder refuses O_CREAT on another user's file. flock needs no write access.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # said aloud: a forked child may still hold the descriptor
        os.close(descriptor)


@contextmanager
def huge_pages(count: int, page_size: int = HUGE_2M) -> Iterator[None]:
    """See to it that at least `count` huge pages are free; the caller holds the lock."""
    folder = accounting.huge_pool_folder(page_size)
    if not folder.exists():
        pytest.skip(f"needs a kernel with hugetlb pages of {page_size >> 10} KiB")
    before = accounting.huge_pool(page_size)
    if before.available >= count:
        yield
        return
    need_root(f"to reserve {count} huge pages ({before.available} are free)")
    total = folder / "nr_hugepages"
    try:
        for attempt in range(3):
            Path("/proc/sys/vm/compact_memory").write_text("1")
            pool = accounting.huge_pool(page_size)
            total.write_text(str(pool.total + max(0, count - pool.available)))
            available = accounting.huge_pool(page_size).available
            if available >= count:
                break
            if attempt == 1:
                Path("/proc/sys/vm/drop_caches").write_text("3")
        else:
            pytest.skip(f"needs {count} huge pages: memory is too scattered ({available} could be had)")
        yield
    finally:
        gc.collect()  # pages that a reference cycle holds would turn into surplus pages
        total.write_text(str(before.total))


@contextmanager
def exhausted_pool(page_size: int = HUGE_2M) -> Iterator[None]:
    """Leave no huge page free, by mapping those that are; the caller holds the lock."""
    folder = accounting.huge_pool_folder(page_size)
    if not folder.exists():
        pytest.skip(f"needs a kernel with hugetlb pages of {page_size >> 10} KiB")
    with setting(folder / "nr_overcommit_hugepages", 0), ExitStack() as stack:
        if pages := accounting.huge_pool(page_size).available:
            page_size_flag = (page_size.bit_length() - 1) << 26  # MAP_HUGE_SHIFT
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_HUGETLB | page_size_flag
            filler = stack.enter_context(mmap.mmap(-1, pages * page_size, flags=flags))
            for page in range(pages):
                filler[page * page_size] = 1
        yield


# --- the fixtures ----------------------------------------------------------------------------------------------------


def _factory(manager: Callable[..., contextlib.AbstractContextManager[Any]]) -> Callable[[], Iterator[Any]]:
    """A generator for a fixture: what it yields enters the manager with its arguments; all are left at teardown."""

    def generate() -> Iterator[Callable[..., Any]]:
        with ExitStack() as stack:
            yield lambda *args, **kwargs: stack.enter_context(manager(*args, **kwargs))

    generate.__doc__ = f"Factory, as often as needed in a test. {manager.__doc__}"
    return generate


tmpfs_mount = pytest.fixture(_factory(mount_tmpfs), name="tmpfs_mount")
hugetlbfs_mount = pytest.fixture(_factory(mount_hugetlbfs), name="hugetlbfs_mount")
ext4_mount = pytest.fixture(_factory(mount_ext4), name="ext4_mount")
kernel_setting = pytest.fixture(_factory(setting), name="kernel_setting")
thp_mode = pytest.fixture(_factory(functools.partial(setting, THP_ENABLED)), name="thp_mode")
shmem_thp_mode = pytest.fixture(_factory(functools.partial(setting, SHMEM_THP_ENABLED)), name="shmem_thp_mode")


@pytest.fixture
def locked_pool() -> Iterator[None]:
    """The lock of the hugetlb pool, taken once for all fixtures of a test that use the pool."""
    with huge_pool_lock():
        yield


@pytest.fixture
def huge_pool(locked_pool: None) -> Iterator[Callable[..., None]]:
    """Factory: `huge_pool(count, page_size=2 MiB)` makes at least so many pages free until the test's end."""
    yield from _factory(huge_pages)()


@pytest.fixture
def empty_pool(locked_pool: None) -> Iterator[None]:
    """A hugetlb pool of 2 MiB pages in which none is free."""
    with exhausted_pool():
        yield


@pytest.fixture
def memory_cgroup() -> Iterator[Callable[..., MemoryCgroup]]:
    """Factory: `memory_cgroup(limit=None)` is a fresh memory cgroup, v1 or v2, to which children are added."""
    need_root("to make a memory cgroup")
    with ExitStack() as stack:

        def make(limit: int | None = None) -> MemoryCgroup:
            try:
                group = new_memory_cgroup(limit)
            except CgroupUnavailableError as error:
                pytest.skip(f"needs a memory cgroup: {error}")
            stack.callback(group.close)
            return group

        yield make


@pytest.fixture
def hugetlb_cgroup() -> Iterator[Callable[[int], Path]]:
    """Factory: a group on the version 2 hierarchy that may use so many bytes of 2 MiB huge pages."""
    need_root("to make a hugetlb cgroup")
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    top = next((Path(words[1]) for words in mounts if words[2] == "cgroup2"), None)
    if top is None or "hugetlb" not in (top / "cgroup.controllers").read_text().split():
        pytest.skip("needs the hugetlb controller on a version 2 hierarchy")
    switch = top / "cgroup.subtree_control"
    was_on = "hugetlb" in switch.read_text().split()
    path = top / f"sparsemem-test-{os.getpid()}"
    switch.write_text("+hugetlb")
    try:
        path.mkdir()

        def limit(size: int) -> Path:
            (path / "hugetlb.2MB.max").write_text(str(size))
            return path

        yield limit
        path.rmdir()
    finally:
        if not was_on:
            with contextlib.suppress(OSError):  # EBUSY: somebody else uses it by now
                switch.write_text("-hugetlb")


@pytest.fixture
def strict_overcommit(kernel_setting: Callable[[str, object], None]) -> Callable[[], None]:
    """Strict overcommit under which everybody else keeps 1 GiB, whatever the test takes.

    A process must leave min(vm.user_reserve_kbytes, 1/32 of its own size) of the commit limit, and one with a large
    reservation is large: so the test runs out of it 1 GiB before anybody else does.
    """

    def switch_on() -> None:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limit, used = (int(fields[name].split()[0]) for name in ("CommitLimit", "Committed_AS"))
        if limit - used < 2 << 20:
            pytest.skip("needs 2 GiB that strict overcommit leaves")
        kernel_setting("/proc/sys/vm/user_reserve_kbytes", 1 << 20)
        kernel_setting("/proc/sys/vm/overcommit_memory", 2)

    return switch_on
