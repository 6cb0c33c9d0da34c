"""What surrounds a mapping: the limits that it may run into, and which one it was.

Read before a plug (headroom) and after one failed (diagnosis).  Both are
inferences: another process may take memory in between.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from sparsemem._sys import lib, numa
from sparsemem._sys.calls import Calls
from sparsemem._sys.descriptor import Descriptor
from sparsemem._sys.files import (
    MEMINFO,
    OVERCOMMIT,
    PAGE_SIZE,
    KernelFiles,
    group_limits,
    huge_group_limits,
    huge_pool,
    mappings_used_up,
    user_reserve,
)
from sparsemem.backends.base import Limit
from sparsemem.errors import Cause
from sparsemem.recipes import Kind

_SHMEM = (Kind.ANONYMOUS_SHARED, Kind.SHMEM_SHARED, Kind.SHMEM_PRIVATE)
# Whose pages come out of the file system that the file is on.
_ON_FILE_SYSTEM = (
    Kind.SHMEM_SHARED,
    Kind.SHMEM_PRIVATE,
    Kind.HUGETLB_SHARED,
    Kind.HUGETLB_PRIVATE,
    Kind.DISK_SHARED,
)
# hugetlbfs with only min_size= reports all ones for "no size".
_UNLIMITED = 1 << 62
_CHUNK = 2 << 20
# A control group is charged for more than the pages: their page tables (1/512), a file's index of its pages (1/455),
# whatever the process allocates besides.  Plugged to the last byte, block by block, processes were killed (measured).
_OVERHEAD = 200
_SPARE = 1 << 20
_EHWPOISON = getattr(errno, "EHWPOISON", 133)  # not in the errno module of every Python


class Surroundings:
    """The limits of one mapping of `size` bytes, which begins at byte `start` of its file."""

    def __init__(
        self,
        calls: Calls,
        files: KernelFiles,
        kind: Kind,
        page_size: int,
        fd: Descriptor | None,
        size: int,
        numa_node: int | None = None,
        start: int = 0,
    ) -> None:
        self._node = numa_node
        self._start = start
        self._size = size
        self._calls = calls
        self._files = files
        self._kind = kind
        self._page_size = page_size
        self._fd = fd
        self._huge = page_size > PAGE_SIZE

    def limits(self) -> Iterable[Limit]:
        """Every limit that a populate may run into."""
        if self._huge:
            yield from self._huge_pages()
        elif self._kind is not Kind.DISK_SHARED:
            yield from self.memory()
        # A hugetlbfs counts the private copies of its pages as well, a template's included.
        if self._fd is not None and (self._kind in _ON_FILE_SYSTEM or self._huge):
            yield from self._file_system()

    def diagnose(self, code: int, offset: int) -> Cause:
        """The cause of an errno at a byte offset."""
        if code == _EHWPOISON:
            return Cause.POISONED
        if code in (errno.EINVAL, errno.EPERM, errno.EACCES, errno.EBADF):
            return Cause.PROTECTION
        if self._truncated(offset):
            return Cause.FILE_TRUNCATED
        if code in (errno.ENOSPC, errno.EDQUOT) and not self._huge:
            return self._full_file_system()
        # What is used up has less left than one chunk asks for (file systems and
        # per-CPU caches hold a little back).
        limits = [*self.limits(), *self._holes()]
        tight = [limit for limit in limits if limit.available < max(self._page_size, _CHUNK)]
        if tight:
            return min(tight, key=lambda limit: limit.available).cause
        if code == errno.ENOMEM:
            return Cause.MAPPINGS if mappings_used_up(self._files) else Cause.MAPPING_HOLE
        # A fault that nothing else explains: a guard page, or a userfaultfd.
        return Cause.PROTECTION if code == errno.EFAULT else Cause.UNKNOWN

    # ---- memory ------------------------------------------------------------------------

    def memory(self) -> Iterable[Limit]:
        """Those of memory as such, wherever the pages come from."""
        meminfo = self._files.fields(MEMINFO)
        if "MemAvailable" in meminfo:
            available = meminfo["MemAvailable"] + meminfo.get("SwapFree", 0)
            yield Limit(Cause.SYSTEM_MEMORY, available, f"{MEMINFO}: MemAvailable + SwapFree", errno.ENOMEM)
        yield from self._node_memory()
        # A private file's page and its copy are both there until the page is punched.
        spare = _SPARE + (_CHUNK if self._kind is Kind.SHMEM_PRIVATE else 0)
        for group in group_limits(self._files):
            left = max(0, group.available - group.available // _OVERHEAD - spare)
            yield Limit(Cause.MEMORY_CGROUP, left // PAGE_SIZE * PAGE_SIZE, group.group, errno.ENOMEM)
        # Under strict overcommit shmem is charged page by page as it comes; private
        # memory was charged when it was reserved.
        if self._kind in _SHMEM and self._files.number(OVERCOMMIT) == 2 and "CommitLimit" in meminfo:
            left = meminfo["CommitLimit"] - meminfo.get("Committed_AS", 0) - user_reserve(self._files)
            source = f"{MEMINFO}: CommitLimit - Committed_AS - user reserve"
            yield Limit(Cause.OVERCOMMIT, max(0, left), source, errno.ENOMEM)

    def _node_memory(self) -> Iterable[Limit]:
        """What a NUMA node has left: memory that is bound to it has nowhere else to go but to the OOM killer."""
        left = None if self._node is None else numa.available(self._files, self._node)
        if self._node is not None and left is not None:
            source = f"{numa.meminfo(self._node)}: MemFree + Inactive(file)"
            yield Limit(Cause.SYSTEM_MEMORY, left, source, errno.ENOMEM)

    def _huge_pages(self) -> Iterable[Limit]:
        pool = huge_pool(self._files, self._page_size)
        if pool is not None:
            source = f"hugepages-{self._page_size // 1024}kB: free - reserved + surplus"
            yield Limit(Cause.HUGETLB_POOL, pool.available * self._page_size, source, errno.ENOMEM)
            if self._node is not None:
                left = numa.free_huge_pages(self._files, self._node, self._page_size)
                more = max(0, pool.overcommit - pool.surplus) * self._page_size  # which the kernel makes on the node
                if left is not None:
                    source = f"node{self._node}: free huge pages + surplus"
                    yield Limit(Cause.HUGETLB_POOL, left + more, source, errno.ENOMEM)
        for group in huge_group_limits(self._files, self._page_size):
            yield Limit(Cause.HUGETLB_CGROUP, group.available, group.group, errno.ENOMEM)

    # ---- the file's own -----------------------------------------------------------------

    def _file_system(self) -> Iterable[Limit]:
        assert self._fd is not None
        try:
            about = self._calls.statvfs(self._fd.fd)
        except OSError:
            return
        # No size at all: the kernel's own shmem mount, or hugetlbfs without size=.
        if about.f_blocks == 0 or about.f_blocks >= _UNLIMITED:
            return
        # Not f_bfree: ext4 counts blocks in it that it keeps for itself, from root, too.
        free = about.f_bavail * about.f_frsize
        # A private file is populated a chunk at a time, each chunk's file pages given
        # back before the next one's: room for one is enough.
        if self._kind is Kind.SHMEM_PRIVATE and free >= _CHUNK:
            return
        yield Limit(self._full_file_system(), free, "statvfs: available blocks", errno.ENOSPC)

    def _holes(self) -> Iterable[Limit]:
        """The room for a template's holes, which on tmpfs (and only there) get file pages as they are copied.

        No limit beforehand, for who says that there are holes?
        """
        if self._kind is Kind.TEMPLATE and not self._huge and self._on_tmpfs():
            yield from self._file_system()

    def _on_tmpfs(self) -> bool:
        assert self._fd is not None
        try:
            return bool(self._calls.filesystem(self._fd.fd)[0] == lib.TMPFS_MAGIC)
        except OSError:
            return False

    def _full_file_system(self) -> Cause:
        if self._huge:
            return Cause.HUGETLBFS_SIZE
        shmem = self._kind in _SHMEM or (self._kind is Kind.TEMPLATE and self._on_tmpfs())
        return Cause.TMPFS_FULL if shmem else Cause.FILESYSTEM_FULL

    def _truncated(self, offset: int) -> bool:
        if self._fd is None or self._kind is Kind.SECRET:
            return False
        # Anywhere in the chunk that failed, of which the errno does not tell the page.
        end = min(self._size, offset + max(self._page_size, _CHUNK))
        try:
            return self._calls.fstat(self._fd.fd).st_size < self._start + end
        except OSError:
            return False
