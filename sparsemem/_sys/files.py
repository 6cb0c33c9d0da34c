"""What the kernel tells in text files: memory, huge pages, control groups.

`KernelFiles` keeps descriptors open and rereads them with pread: 7 us for
/proc/meminfo instead of 20, and 1.2 us for a control group's file instead of 16
(measured).  A test points `root` at a recorded tree.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import weakref
from collections.abc import Hashable
from pathlib import PurePosixPath
from typing import Any

from attrs import frozen

PAGE_SIZE = os.sysconf("SC_PAGESIZE")
MEMINFO = "/proc/meminfo"
OVERCOMMIT = "/proc/sys/vm/overcommit_memory"
THP = "/sys/kernel/mm/transparent_hugepage"
MAX_MAPPINGS = "/proc/sys/vm/max_map_count"
HUGE_POOLS = "/sys/kernel/mm/hugepages"


class KernelFiles:
    """Small kernel text files by absolute path, each opened once.  Thread-safe."""

    def __init__(self, root: str = "") -> None:
        self._root = root.rstrip("/")
        self._fds: dict[str, int] = {}
        # Reentrant: a signal handler or a __del__ may come in the middle and plug.
        self._lock = threading.RLock()
        self.memo: dict[Hashable, Any] = {}
        """What readers work out once and keep as long as what it depends on stays."""

    def text(self, path: str) -> str | None:
        """The content, or None where there is no such file or no permission."""
        with self._lock:
            try:
                fd = self._fds.get(path)
                if fd is None:
                    fd = self._fds[path] = os.open(self._root + path, os.O_RDONLY | os.O_CLOEXEC)
                return os.pread(fd, 1 << 16, 0).decode("ascii", "replace")
            except OSError:
                # A control group that was removed reads ENODEV; look anew next time.
                self._forget(path)
                return None

    def whole_text(self, path: str) -> str:
        """A file that may be long and is seldom read; "" if there is none."""
        try:
            with open(self._root + path, encoding="utf-8", errors="replace") as file:
                return file.read()
        except OSError:
            return ""

    def lines(self, path: str) -> int:
        """How many lines a file has that may be long; 0 if there is none.

        By small pieces: memory for all of it would be a mapping, and there may be none to be had.
        """
        try:
            fd = os.open(self._root + path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return 0
        try:
            return sum(piece.count(b"\n") for piece in iter(lambda: os.read(fd, 1 << 14), b""))
        finally:
            os.close(fd)

    def number(self, path: str) -> int | None:
        """The content as an integer; None if there is none or it says `max`."""
        text = self.text(path)
        try:
            return None if text is None else int(text)
        except ValueError:
            return None

    def fields(self, path: str) -> dict[str, int]:
        """`name value` or `name: value kB` lines; kB become bytes."""
        fields = {}
        for line in (self.text(path) or "").splitlines():
            words = line.replace(":", " ").split()
            if len(words) >= 2 and words[1].isdigit():
                fields[words[0]] = int(words[1]) * (1024 if words[-1] == "kB" else 1)
        return fields

    def names(self, path: str) -> list[str]:
        """The entries of a folder, [] if there is none."""
        try:
            return sorted(os.listdir(self._root + path))
        except OSError:
            return []

    def _forget(self, path: str) -> None:
        fd = self._fds.pop(path, None)
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        """Closes the descriptors; the next look opens them again."""
        for path in list(self._fds):
            self._forget(path)

    def after_fork(self) -> None:
        """In a child: what /proc/self was opened for is the parent, and a thread may have held the lock."""
        self._lock = threading.RLock()
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # an interrupted constructor has opened nothing
            self.close()


def mappings_used_up(files: KernelFiles) -> bool:
    """Whether this process can hardly have another mapping: cutting one in three takes two more."""
    most = files.number(MAX_MAPPINGS)
    return most is not None and files.lines("/proc/self/maps") > most - 2


_shared: weakref.ref[KernelFiles] | None = None


def shared_files() -> KernelFiles:
    """The machine's files, shared by all who hold them and closed with the last."""
    global _shared
    files = None if _shared is None else _shared()
    if files is None:
        files = KernelFiles()
        _shared = weakref.ref(files)
    return files


def _after_fork_in_child() -> None:
    files = None if _shared is None else _shared()
    if files is not None:
        files.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)


def mapping_fields(address: int, length: int) -> dict[str, int]:
    """The fields of /proc/self/smaps in bytes, summed over the mappings that lie in a range.

    The kernel's own accounting of that very mapping: Rss, Anonymous,
    AnonHugePages, Private_Hugetlb and the rest.
    """
    sums: dict[str, int] = {}
    inside = False
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as file:
        for line in file:
            words = line.split()
            if not words[0].endswith(":"):
                start, end = (int(part, 16) for part in words[0].split("-"))
                inside = start < address + length and end > address
            elif inside and words[-1] == "kB":
                name = words[0][:-1]
                sums[name] = sums.get(name, 0) + int(words[1]) * 1024
    return sums


def mounts(kind: str) -> list[str]:
    """Where file systems of a kind are mounted."""
    found = []
    for line in shared_files().whole_text("/proc/self/mountinfo").splitlines():
        mount, _, about = line.partition(" - ")
        if about.split(" ", 1)[0] == kind:
            found.append(_unescaped(mount.split()[4]))
    return found


def _unescaped(path: str) -> str:
    r"""A path of mountinfo, in which a blank is `\040`."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), path)


def user_reserve(files: KernelFiles) -> int:
    """Bytes of the commit limit that this process may not use up, with overcommit_memory=2.

    The smaller one of vm.user_reserve_kbytes and 1/32 of the process's size, so that a
    shell can still be had (Documentation/admin-guide/sysctl/vm.rst).
    """
    reserve = files.number("/proc/sys/vm/user_reserve_kbytes") or 0
    mapped = (files.text("/proc/self/statm") or "0").split()[0]
    return min(reserve << 10, int(mapped) * PAGE_SIZE // 32)


# ---- huge pages ------------------------------------------------------------------


def thp_size(files: KernelFiles) -> int | None:
    """Bytes of a transparent huge page (read, since 2 MiB is only one machine's value), or None."""
    return files.number(f"{THP}/hpage_pmd_size")


def thp_mode(files: KernelFiles) -> str | None:
    """`always`, `madvise` or `never`, or None on a kernel without THP."""
    text = files.text(f"{THP}/enabled") or ""
    return text.partition("[")[2].partition("]")[0] or None


def huge_page_sizes(files: KernelFiles) -> list[int]:
    """Bytes of every huge page size that has a pool, ascending."""
    names = (name.removeprefix("hugepages-").removesuffix("kB") for name in files.names(HUGE_POOLS))
    return sorted(int(name) * 1024 for name in names if name.isdigit())


def default_huge_page(files: KernelFiles) -> int | None:
    """Bytes of the page that MAP_HUGETLB without a size gives."""
    return files.fields(MEMINFO).get("Hugepagesize")


@frozen
class HugePool:
    """One pool of huge pages; all in pages."""

    total: int
    free: int
    reserved: int
    surplus: int
    overcommit: int

    @property
    def available(self) -> int:
        """Free pages that nobody has reserved, and those the kernel may still make."""
        return max(0, self.free - self.reserved) + max(0, self.overcommit - self.surplus)


def huge_pool(files: KernelFiles, page_size: int) -> HugePool | None:
    """The pool of that page size, or None if the machine has none."""
    folder = f"{HUGE_POOLS}/hugepages-{page_size // 1024}kB"
    names = ("nr_hugepages", "free_hugepages", "resv_hugepages", "surplus_hugepages", "nr_overcommit_hugepages")
    numbers = [files.number(f"{folder}/{name}") for name in names]
    return None if numbers[0] is None else HugePool(*(number or 0 for number in numbers))


# ---- control groups ----------------------------------------------------------------


@frozen
class GroupLimit:
    """One finite limit of one control group, in bytes."""

    group: str
    limit: int
    usage: int
    reclaimable: int

    @property
    def available(self) -> int:
        return max(0, self.limit - self.usage + self.reclaimable)


# "No limit" in version 1 is the largest multiple of the page size in an int64.
_V1_UNLIMITED = 1 << 62


def _controller_folders(files: KernelFiles, controller: str) -> list[tuple[str, bool]]:
    """The folder of this process's group and of each ancestor, innermost first.

    With each comes whether it is of version 2.  A controller lives in one
    hierarchy only; a group path that lies outside what is mounted (in a
    container) is cut off at the mount.
    """
    groups = files.text("/proc/self/cgroup") or ""
    # One name for one dict: another thread may see the move first and replace it.
    memo = files.memo
    if memo.get("cgroup") != groups:  # moved to another group, or the first look
        memo = files.memo = {"cgroup": groups}
    if controller not in memo:
        memo[controller] = _find_controller_folders(files, controller, groups)
    found: list[tuple[str, bool]] = memo[controller]
    return found


def _find_controller_folders(files: KernelFiles, controller: str, groups: str) -> list[tuple[str, bool]]:
    membership = {}
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            membership[name] = path  # version 2 has the name ""
    found: list[tuple[str, bool]] = []
    for line in files.whole_text("/proc/self/mountinfo").splitlines():
        mount, _, about = line.partition(" - ")
        root, at = mount.split()[3:5]
        fstype, _, options = about.split()[:3]
        version2 = fstype == "cgroup2"
        name = "" if version2 else controller
        if fstype not in ("cgroup", "cgroup2") or name not in membership:
            continue
        if not version2 and controller not in options.split(","):
            continue
        inside = PurePosixPath(membership[name])
        inside = inside.relative_to(root) if inside.is_relative_to(root) else PurePosixPath()
        folders = [str(PurePosixPath(at, part)) for part in (inside, *inside.parents)]
        found += [(folder, version2) for folder in dict.fromkeys(folders)]
    return found


def group_limits(files: KernelFiles) -> list[GroupLimit]:
    """The finite memory limits of this process's control group and all its ancestors."""
    limits = []
    for folder, version2 in _controller_folders(files, "memory"):
        names = ("memory.max", "memory.current") if version2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit = files.number(f"{folder}/{names[0]}")
        if limit is None or limit >= _V1_UNLIMITED:
            continue
        usage = files.number(f"{folder}/{names[1]}") or 0
        # Page cache that is not in use is given up before anything is refused.
        reclaimable = files.fields(f"{folder}/memory.stat").get("inactive_file" if version2 else "total_inactive_file")
        limits.append(GroupLimit(folder, limit, usage, reclaimable or 0))
    return limits


def huge_group_limits(files: KernelFiles, page_size: int) -> list[GroupLimit]:
    """The finite limits on huge pages of that size, as `group_limits`."""
    # As the kernel names them: 1GB, 2MB, 64KB (arm64).
    unit = next(bits for bits in (30, 20, 10) if page_size >> bits)
    text = f"{page_size >> unit}{ {30: 'GB', 20: 'MB', 10: 'KB'}[unit] }"
    limits = []
    for folder, version2 in _controller_folders(files, "hugetlb"):
        names = ("max", "current") if version2 else ("limit_in_bytes", "usage_in_bytes")
        limit = files.number(f"{folder}/hugetlb.{text}.{names[0]}")
        if limit is None or limit >= _V1_UNLIMITED:
            continue
        limits.append(GroupLimit(folder, limit, files.number(f"{folder}/hugetlb.{text}.{names[1]}") or 0, 0))
    return limits
