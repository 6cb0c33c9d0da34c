"""What works on this machine, found by trying: every kind of backend, with every strategy.

Used by `sparsemem probe` and `sparsemem demo`; prints nothing.
"""

from __future__ import annotations

import errno
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import attrs
from attrs import frozen

from sparsemem._sys import calls, files, lib, numa, probe
from sparsemem.backends import Anonymous, File, Memfd, Secret, Simulated, Tmpfs
from sparsemem.backends.base import Backend
from sparsemem.errors import Cause, SparseMemError, UnsupportedError
from sparsemem.recipes import FUTEX, POPULATE_WRITE, PROTECTIONS, RECIPES, Kind
from sparsemem.region import Region
from sparsemem.units import exact_size

# What is answered where a mapping is too large for the machine, the user or the file.
_TOO_LARGE = frozenset({errno.ENOMEM, errno.EAGAIN, errno.EFBIG, errno.EINVAL, errno.ENOSPC})

# Without map_files the kernel is asked about every single page: 14 s for 1 TiB, measured.
_AUDITED_BY_PAGE = 32 << 30


@frozen
class Candidate:
    """One kind of mapping to try.

    Attributes:
        name: What people call it.
        make: Makes the backend; may raise what explains why it cannot be had.
        kind: What it is to the kernel; None if it is not the kernel's.
        audited: Bytes that can be audited in good time; None is any number.
    """

    name: str
    make: Callable[[], Backend]
    kind: Kind | None = None
    audited: int | None = None

    @property
    def strategies(self) -> tuple[str, ...]:
        """The ways to populate that such a mapping may have."""
        if self.kind is None:
            return (self.name,)
        # Of secret memory what is known to fail, too: a newer kernel may do it.
        return (POPULATE_WRITE, FUTEX) if self.kind is Kind.SECRET else tuple(RECIPES[self.kind].ways(huge=True))


@frozen
class Finding:
    """What came of trying one kind of mapping with one strategy; `chosen` if `auto` takes it."""

    name: str
    strategy: str
    works: bool
    why: str = ""
    chosen: bool = False


# ---- what there is to try -----------------------------------------------------------------


@contextmanager
def candidates() -> Iterator[list[Candidate]]:
    """Every kind of mapping, with folders for the files that some need, removed afterwards."""
    with ExitStack() as stack:
        disk = _Folder(stack, "disk", _disks())
        shm = _Folder(stack, "tmpfs", _on(lib.TMPFS_MAGIC, _tmpfses()))
        huge = _Folder(stack, "hugetlbfs", _on(lib.HUGETLBFS_MAGIC, files.mounts("hugetlbfs")))
        yield [
            Candidate("anonymous private", lambda: Anonymous(), Kind.ANONYMOUS_PRIVATE),
            Candidate(
                "anonymous shared",
                lambda: Anonymous(shared=True),
                Kind.ANONYMOUS_SHARED,
                audited=None if probe.opens_map_files() else _AUDITED_BY_PAGE,
            ),
            Candidate("anonymous hugetlb", lambda: Anonymous(hugetlb=True), Kind.ANONYMOUS_HUGETLB),
            Candidate(
                "anonymous hugetlb shared", lambda: Anonymous(hugetlb=True, shared=True), Kind.ANONYMOUS_HUGETLB_SHARED
            ),
            Candidate("memfd shared", lambda: Memfd(), Kind.SHMEM_SHARED),
            Candidate("memfd private", lambda: Memfd(shared=False), Kind.SHMEM_PRIVATE),
            Candidate("memfd hugetlb shared", lambda: Memfd(hugetlb=True), Kind.HUGETLB_SHARED),
            Candidate("memfd hugetlb private", lambda: Memfd(hugetlb=True, shared=False), Kind.HUGETLB_PRIVATE),
            Candidate("tmpfs file shared", lambda: File(shm / "shared", delete=True), Kind.SHMEM_SHARED),
            Candidate(
                "tmpfs file private", lambda: File(shm / "private", shared=False, delete=True), Kind.SHMEM_PRIVATE
            ),
            Candidate("tmpfs of its own", lambda: Tmpfs(), Kind.SHMEM_SHARED),
            Candidate("hugetlbfs file shared", lambda: File(huge / "shared", delete=True), Kind.HUGETLB_SHARED),
            Candidate(
                "hugetlbfs file private",
                lambda: File(huge / "private", shared=False, delete=True),
                Kind.HUGETLB_PRIVATE,
            ),
            Candidate("disk file shared", lambda: File(disk / "shared", delete=True), Kind.DISK_SHARED),
            Candidate(
                "disk file private", lambda: File(disk / "private", shared=False, delete=True), Kind.DISK_PRIVATE
            ),
            Candidate("disk file template", lambda: File(_template(disk / "template"), shared=False), Kind.TEMPLATE),
            Candidate("memfd_secret", lambda: Secret(), Kind.SECRET),
            Candidate("simulated", lambda: Simulated()),
        ]


class _Folder:
    """A temporary folder in the first place that can be written to; `/` is a path in it or says that there is none."""

    def __init__(self, stack: ExitStack, what: str, places: Iterable[str]) -> None:
        self._what = what
        self._path = None
        for place in places:
            try:
                self._path = stack.enter_context(tempfile.TemporaryDirectory(prefix="sparsemem-", dir=place))
                return
            except OSError:
                continue

    def __truediv__(self, name: str) -> str:
        if self._path is None:
            raise UnsupportedError(f"there is no {self._what} here that this user may write to")
        return os.path.join(self._path, name)


def _disks() -> list[str]:
    """Folders that are not in memory (/tmp often is)."""
    in_memory = (0, lib.TMPFS_MAGIC, lib.HUGETLBFS_MAGIC)
    places = (tempfile.gettempdir(), "/var/tmp", os.path.expanduser("~"), os.getcwd())
    return [place for place in places if probe.file_system(place) not in in_memory]


def _tmpfses() -> tuple[str, ...]:
    return ("/dev/shm", os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir())


def _on(magic: int, places: Iterable[str]) -> list[str]:
    return [place for place in places if place and probe.file_system(place) == magic]


def _template(path: str) -> str:
    """A sparse file with something in it here and there."""
    if not os.path.exists(path):
        with open(path, "wb") as file:
            for offset in range(0, 64 << 20, 1 << 20):
                file.seek(offset)
                file.write(b"template" * 512)
            size = 1 << 40
            while True:
                try:
                    file.truncate(size)
                    break
                except OSError:  # a limit on the size of files
                    size >>= 1
                    if size < 64 << 20:
                        raise
    return path


# ---- trying it ------------------------------------------------------------------------------


def reserve(backend: Backend, size: int, plug: int, *, headroom: str = "check") -> tuple[Region, str]:
    """A region of `size` bytes, or as large as the backend allows; the second is why it is smaller.

    The blocks are such that `plug` bytes are some, and that there are more than those.
    """
    page, why = backend.page_size, ""
    while True:
        block = max(page, min(backend.preferred_block_size, _power_of_two(plug // 4), _power_of_two(size // 16)))
        try:
            return Region(size, block_size=block, backend=backend, headroom=headroom), why
        except OSError as error:
            if error.errno not in _TOO_LARGE or size < 8 * page:
                raise
            why = why or reason(error)
            size = _power_of_two(size - 1)


def _power_of_two(size: int) -> int:
    """The largest one that is not above."""
    return 1 << max(0, size.bit_length() - 1)


def attempt(candidate: Candidate, strategy: str) -> Finding:
    """Reserves, plugs, writes, reads, unplugs and audits one block."""
    try:
        backend = candidate.make()
        if isinstance(backend, (Anonymous, Memfd, File, Tmpfs)):
            backend = attrs.evolve(backend, strategy=strategy)
        region, _ = reserve(backend, 1 << 30, 8 << 20)
        with region:
            problem, remark = _try_secret(region, strategy) if isinstance(backend, Secret) else ("", "")
            problem = problem or _try_block(region)
            used = region.stats().strategy if strategy == "auto" else strategy
            return Finding(candidate.name, used, not problem, problem or remark, chosen=strategy == "auto")
    except (SparseMemError, OSError, ValueError) as error:
        return Finding(candidate.name, strategy, False, reason(error))


def _try_block(region: Region) -> str:
    """One block through its life; what is wrong, or ""."""
    region.plug(1)
    if not isinstance(region.backend, Simulated):
        with region.view(1) as view:
            view[0] = view[-1] = 0x5A
            if view[0] != 0x5A or view[-1] != 0x5A:
                return "what was written does not read back"
    plugged = region.audit()
    if not plugged.ok:
        return f"plugged: {plugged}"
    if not isinstance(region.backend, Secret):
        region.unplug(1)
    unplugged = region.audit()
    return "" if unplugged.ok else f"unplugged: {unplugged}"


def _try_secret(region: Region, strategy: str) -> tuple[str, str]:
    """Tries what the library never does, since it is known to fail: a problem, a remark."""
    advice = lib.MADV_POPULATE_WRITE if strategy == POPULATE_WRITE else lib.MADV_REMOVE
    try:
        calls.kernel.madvise(region.address, region.page_size, advice)
    except OSError as error:
        if strategy == POPULATE_WRITE:
            return f"MADV_POPULATE_WRITE on secret memory: {error.strerror}", ""
        return "", f"plug-only, it gives nothing back (MADV_REMOVE: {error.strerror})"
    return "", f"this kernel can do more than sparsemem uses: advice {advice} works"


def reason(error: BaseException) -> str:
    """One line that says why, without the errno's number."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Cause) and cause is not Cause.UNKNOWN:
        return str(cause.value)
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())


def survey() -> list[Finding]:
    """Tries everything: the way that `auto` takes and, if that works, all others."""
    found = []
    with candidates() as known:
        for candidate in known:
            best = attempt(candidate, "auto")
            others = candidate.strategies if best.works else ()
            found += [best, *(attempt(candidate, name) for name in others if name != best.strategy)]
    return found


@frozen
class Shield:
    """What came of trying one kind of mapping with one protection of its unplugged blocks."""

    name: str
    protection: str
    works: bool
    why: str = ""


def shields() -> list[Shield]:
    """Tries every protection on every kind of mapping that can be had."""
    found = []
    with candidates() as known:
        for candidate in known:
            if attempt(candidate, "auto").works:
                found += [_shield(candidate, name) for name in PROTECTIONS if name != "none"]
    return found


def _shield(candidate: Candidate, protection: str) -> Shield:
    """One block through its life; before it and after it a system call must find nothing to write to."""
    try:
        backend = candidate.make()
        block = max(64 << 10, backend.page_size)
        with Region(16 * block, block_size=block, backend=backend, protection=protection) as region:
            open_before = _writable(region, block)
            problem = _try_block(region)
            if not problem and (open_before or _writable(region, block)):
                problem = "an unplugged block is accessible"
            return Shield(candidate.name, protection, not problem, problem)
    except (SparseMemError, OSError, ValueError) as error:
        return Shield(candidate.name, protection, False, reason(error))


def _writable(region: Region, offset: int) -> bool:
    with region.view() as whole:
        return probe.writable(whole[offset : offset + 1])


def machine() -> dict[str, object]:
    """General facts; sizes in bytes, None where the machine has no such thing."""
    kernel, texts = calls.kernel, files.shared_files()
    pools = {size: files.huge_pool(texts, size) for size in files.huge_page_sizes(texts)}
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "user": "root" if os.geteuid() == 0 else f"uid {os.geteuid()}",
        "page_size": files.PAGE_SIZE,
        "thp_size": files.thp_size(texts),
        "thp_mode": files.thp_mode(texts),
        "huge_pages": {exact_size(size): attrs.asdict(pool) for size, pool in pools.items() if pool is not None},
        "numa_nodes": numa.online_nodes(texts),
        "overcommit_memory": texts.number(files.OVERCOMMIT),
        "largest_reservation": probe.largest_reservation(kernel),
        "cgroup_limits": [attrs.asdict(limit) for limit in files.group_limits(texts)],
        "populate_write": probe.populate_write(kernel),
        "pagemap_scan": probe.scans_pagemap(kernel),
        "memfd_secret": probe.makes_secrets(kernel),
        "locked_memory_limit": probe.lockable(),
        "wipe_on_fork": probe.advises(kernel, lib.MADV_WIPEONFORK),
        "named_mappings": probe.names_mappings(kernel),
        "vectored": probe.vectored(kernel),
        "uffd_copy": probe.uffd_copy(kernel),
        "uffd_shmem": probe.uffd_shmem(kernel),
        "uffd_move": probe.uffd_move(kernel),
        "collapse": probe.collapse(kernel),
        "collapse_private": probe.collapse_private(kernel),
        "cold": probe.cold(kernel) and probe.pageout(kernel),
        "trap": probe.trap(kernel),
        "catch": probe.catch(kernel),
        "guard": probe.guard(kernel),
    }
