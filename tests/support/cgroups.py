"""Memory cgroups for tests, on the v1 or the v2 hierarchy, whichever has the memory controller."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "sparsemem-test-"
_numbers = itertools.count()


class CgroupUnavailableError(Exception):
    """No memory cgroup can be made; the text says why."""


@dataclass(frozen=True)
class Hierarchy:
    """Where the memory controller is mounted and under which group a new one can be made."""

    version: int
    parent: Path


@dataclass(frozen=True)
class MemoryCgroup:
    """A cgroup of one test.

    Processes in it that hit the limit are killed by the OOM killer: add only children made for that.
    """

    path: Path
    version: int

    def add(self, pid: int | None = None) -> None:
        """Move a process in; without a pid, the caller (so call it in a child)."""
        (self.path / "cgroup.procs").write_text(str(os.getpid() if pid is None else pid))

    def set_limit(self, limit: int | None) -> None:
        """Set the limit in bytes, or lift it."""
        if self.version == 1:
            (self.path / "memory.limit_in_bytes").write_text(str(-1 if limit is None else limit))
        else:
            (self.path / "memory.max").write_text("max" if limit is None else str(limit))

    @property
    def usage(self) -> int:
        """Bytes charged, page cache included."""
        return int((self.path / ("memory.usage_in_bytes" if self.version == 1 else "memory.current")).read_text())

    @property
    def pids(self) -> list[int]:
        """The processes in it."""
        return [int(line) for line in (self.path / "cgroup.procs").read_text().split()]

    def disable_oom_killer(self) -> None:
        """Let an allocation over the limit wait or fail instead of killing (v1 only)."""
        if self.version != 1:
            raise CgroupUnavailableError("v2 has no memory.oom_control")
        (self.path / "memory.oom_control").write_text("1")

    def close(self) -> None:
        """Kill what is left in it and remove it."""
        deadline = time.monotonic() + 5
        while True:
            with contextlib.suppress(FileNotFoundError):
                for pid in self.pids:
                    if pid == os.getpid():
                        (self.path.parent / "cgroup.procs").write_text(str(pid))
                    else:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
            try:
                self.path.rmdir()
            except FileNotFoundError:
                return
            except OSError:  # EBUSY for a moment after the last process has gone
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return


def find_hierarchy(
    mountinfo: Path = Path("/proc/self/mountinfo"), membership: Path = Path("/proc/self/cgroup")
) -> Hierarchy:
    """Find the memory controller.

    Args:
        mountinfo: The mounts, in the form of /proc/self/mountinfo.
        membership: The process's groups, in the form of /proc/self/cgroup.

    Raises:
        CgroupUnavailableError: It is mounted nowhere, or no group can be made there.
    """
    groups = dict(_membership(membership))
    v2: Path | None = None
    for line in mountinfo.read_text().splitlines():
        before, _, after = line.partition(" - ")
        mountpoint = Path(before.split()[4])
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup" and "memory" in options.split(","):
            return Hierarchy(1, _own_or_root(mountpoint, groups.get("memory", "/")))
        if kind == "cgroup2" and v2 is None:
            v2 = mountpoint
    if v2 is not None and "memory" in (v2 / "cgroup.controllers").read_text().split():
        # A v2 group that has processes may not hand controllers down (only the root may): go up to one that does.
        own = _own_or_root(v2, groups.get("", "/"))
        for group in (own, *own.parents):
            if "memory" in (group / "cgroup.subtree_control").read_text().split():
                return Hierarchy(2, group)
            if group == v2:
                break
        with contextlib.suppress(OSError):
            (v2 / "cgroup.subtree_control").write_text("+memory")
            return Hierarchy(2, v2)
    raise CgroupUnavailableError("the memory controller is on no hierarchy that can be used here")


def new_memory_cgroup(limit: int | None = None) -> MemoryCgroup:
    """Make a cgroup below the process's own (v1), or below the nearest that hands the memory controller down (v2).

    Raises:
        CgroupUnavailableError: It cannot be made.
    """
    hierarchy = find_hierarchy()
    path = hierarchy.parent / f"{_PREFIX}{os.getpid()}-{next(_numbers)}"
    try:
        path.mkdir()
    except OSError as error:
        raise CgroupUnavailableError(f"{path}: {error.strerror}") from error
    group = MemoryCgroup(path, hierarchy.version)
    try:
        if limit is not None:
            group.set_limit(limit)
    except OSError as error:
        group.close()
        raise CgroupUnavailableError(f"{path}: no limit can be set ({error.strerror})") from error
    return group


def _membership(file: Path) -> list[tuple[str, str]]:
    """Controller and group path; the controller's name is empty for v2."""
    pairs: list[tuple[str, str]] = []
    for line in file.read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        pairs.extend((controller, group) for controller in controllers.split(","))
    return pairs


def _own_or_root(mountpoint: Path, group: str) -> Path:
    # In a container the path may be the host's, which is not visible: the mount's root is the own group then.
    own = mountpoint / group.lstrip("/")
    return own if own.is_dir() else mountpoint
