"""What works on this machine, found by trying: every kind of backend, with every strategy.

Used by `sparsemem probe` and `sparsemem demo`; prints nothing.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs
from attrs import frozen

from sparsemem._sys import calls, files, lib, probe
from sparsemem.backends import Anonymous, File, Memfd, Secret, Simulated
from sparsemem.backends.base import Backend
from sparsemem.errors import Cause, SparseMemError, UnsupportedError
from sparsemem.recipes import FUTEX, POPULATE_WRITE
from sparsemem.region import Region
from sparsemem.units import exact_size

STRATEGIES = (POPULATE_WRITE, FUTEX)
_TEMPLATE_BYTES = 64 << 20


@frozen
class Candidate:
    """One kind of mapping to try.

    Attributes:
        name: What people call it.
        make: Makes the backend; may raise what explains why it cannot be had.
        size: Bytes to reserve where nothing says otherwise.
    """

    name: str
    make: Callable[[], Backend]
    size: int = 1 << 40


@frozen
class Finding:
    """What came of trying one kind of mapping with one strategy."""

    name: str
    strategy: str
    works: bool
    why: str = ""


@contextmanager
def candidates() -> Iterator[list[Candidate]]:
    """Every kind of mapping, with folders for the files that some need, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="sparsemem-") as disk, _folder_on_tmpfs() as shm:
        template = os.path.join(disk, "template")
        with open(template, "wb") as file:
            file.write(b"template" * 512)
            file.truncate(_TEMPLATE_BYTES)
        yield [
            Candidate("anonymous private", lambda: Anonymous()),
            Candidate("anonymous shared", lambda: Anonymous(shared=True)),
            Candidate("anonymous hugetlb", lambda: Anonymous(hugetlb=True)),
            Candidate("memfd shared", lambda: Memfd()),
            Candidate("memfd private", lambda: Memfd(shared=False)),
            Candidate("memfd hugetlb shared", lambda: Memfd(hugetlb=True)),
            Candidate("memfd hugetlb private", lambda: Memfd(hugetlb=True, shared=False)),
            Candidate("tmpfs file shared", lambda: File(_in(shm, "shared"), delete=True)),
            Candidate("tmpfs file private", lambda: File(_in(shm, "private"), shared=False, delete=True)),
            Candidate("hugetlbfs file shared", lambda: File(_on_hugetlbfs(), delete=True)),
            Candidate("disk file shared", lambda: File(_in(disk, "shared"), delete=True)),
            Candidate("disk file private", lambda: File(_in(disk, "private"), shared=False, delete=True)),
            Candidate("disk file template", lambda: File(template, shared=False), _TEMPLATE_BYTES),
            Candidate("memfd_secret", lambda: Secret()),
            Candidate("simulated", lambda: Simulated(), 1 << 50),
        ]


@contextmanager
def _folder_on_tmpfs() -> Iterator[str | None]:
    for parent in ("/dev/shm", os.environ.get("XDG_RUNTIME_DIR", "")):
        if parent and os.access(parent, os.W_OK):
            with tempfile.TemporaryDirectory(prefix="sparsemem-", dir=parent) as folder:
                yield folder
                return
    yield None


def _in(folder: str | None, name: str) -> str:
    if folder is None:
        raise UnsupportedError("no tmpfs that this user may write to (/dev/shm)")
    return os.path.join(folder, name)


def _on_hugetlbfs() -> str:
    for line in files.shared_files().whole_text("/proc/self/mountinfo").splitlines():
        if " - hugetlbfs " in line and os.access(line.split()[4], os.W_OK):
            return os.path.join(line.split()[4], f"sparsemem-{os.getpid()}")
    raise UnsupportedError("no hugetlbfs is mounted where this user may write")


def reserve(candidate: Candidate, backend: Backend, size: int, *, headroom: str = "check") -> tuple[Region, str]:
    """A region of `size` bytes, or as large as the backend allows; the second is why it is smaller."""
    try:
        return Region(size, backend=backend, headroom=headroom), ""
    except OSError as error:
        smaller = max(1 << 26, backend.page_size * 4)
        if size <= smaller:
            raise
        region = Region(smaller, backend=backend, headroom=headroom)
        return region, f"only {exact_size(smaller)}: {error.strerror}"


def attempt(candidate: Candidate, strategy: str) -> Finding:
    """Reserves, plugs, writes, reads, unplugs and audits one block."""
    try:
        backend = candidate.make()
        if isinstance(backend, (Anonymous, Memfd, File)):
            backend = attrs.evolve(backend, strategy=strategy)
        elif isinstance(backend, Secret) and strategy != FUTEX:
            return Finding(candidate.name, strategy, False, "MADV_POPULATE_WRITE is EINVAL on memfd_secret")
        region, _ = reserve(candidate, backend, min(candidate.size, 1 << 30))
        with region:
            region.plug(1)
            if not isinstance(backend, Simulated):
                with region.view(1) as view:
                    view[0] = view[-1] = 0x5A
                    if view[0] != 0x5A or view[-1] != 0x5A:
                        return Finding(candidate.name, strategy, False, "what was written does not read back")
            why = ""
            try:
                region.unplug(1)
            except UnsupportedError:
                why = "plug-only: it gives nothing back"
            audit = region.audit()
            if not audit.ok:
                return Finding(candidate.name, strategy, False, str(audit))
            return Finding(candidate.name, strategy, True, why)
    except (SparseMemError, OSError, ValueError) as error:
        return Finding(candidate.name, strategy, False, reason(error))


def reason(error: BaseException) -> str:
    """One line that says why, without the errno's number."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Cause) and cause is not Cause.UNKNOWN:
        return str(cause.value)
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())


def survey() -> list[Finding]:
    """Tries everything."""
    with candidates() as known:
        return [
            attempt(candidate, strategy)
            for candidate in known
            for strategy in (STRATEGIES if candidate.name != "simulated" else ("simulated",))
        ]


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
        "overcommit_memory": texts.number(files.OVERCOMMIT),
        "largest_reservation": probe.largest_reservation(kernel),
        "cgroup_limits": [attrs.asdict(limit) for limit in files.group_limits(texts)],
        "populate_write": probe.populate_write(kernel),
        "pagemap_scan": probe.scans_pagemap(kernel),
        "wipe_on_fork": probe.advises(kernel, lib.MADV_WIPEONFORK),
        "named_mappings": probe.names_mappings(kernel),
    }
