"""The main job, shown: reserve, plug, write, exhaust, roll back, unplug, audit.

Every figure is measured as it runs, and every claim is a `Check` against the
kernel's own accounting of that very mapping.  Prints nothing.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from attrs import Factory, define, frozen

from sparsemem._sys import calls as _calls
from sparsemem._sys import files, probe, residency
from sparsemem.backends import File, Memfd, Simulated
from sparsemem.backends.base import Backend
from sparsemem.errors import BackendExhaustedError, SparseMemError, UnsupportedError
from sparsemem.region import Region
from sparsemem.survey import Candidate, reason, reserve
from sparsemem.units import exact_size, format_size

# On disks st_blocks counts extent-tree blocks, too (up to 32 KiB seen).
_METADATA = 64 << 10


@frozen
class Check:
    """One claim and whether it held."""

    claim: str
    ok: bool


@frozen
class Figure:
    """What the kernel says that the mapping uses, at one moment; bytes."""

    moment: str
    plugged: int
    used: int


@define
class Report:
    """What came of one backend; `skipped` says why there is nothing."""

    name: str
    backend: str = ""
    strategy: str = ""
    size: int = 0
    block_size: int = 0
    note: str = ""
    skipped: str = ""
    figures: list[Figure] = Factory(list)
    checks: list[Check] = Factory(list)
    block_map: str = ""
    ranges: list[tuple[int, int, bool]] = Factory(list)

    @property
    def ok(self) -> bool:
        """Whether everything that was checked held."""
        return all(check.ok for check in self.checks)

    def check(self, claim: str, ok: bool) -> None:
        """Notes a claim."""
        self.checks.append(Check(claim, bool(ok)))


def used_bytes(region: Region) -> int:
    """What the kernel says that the region's memory uses.

    Where that is told differs: hugetlb pages have fields of their own in smaps, a
    shared file's pages are in its st_blocks, private pages are Anonymous.
    """
    if isinstance(region.backend, Simulated):
        return region.audit().resident_size
    fields = files.mapping_fields(region.address, region.size)
    if region.page_size > files.PAGE_SIZE:
        return fields.get("Private_Hugetlb", 0) + fields.get("Shared_Hugetlb", 0)
    try:
        in_file = residency.file_total(_calls.kernel, region.fileno())
    except UnsupportedError:
        return fields.get("Rss", 0)  # anonymous, private or shared
    if type(region.backend).__name__ == "Secret":
        return fields.get("Rss", 0)
    if getattr(region.backend, "shared", True):
        return in_file
    return fields.get("Anonymous", 0) + (in_file if region.fresh == "zero" else 0)


def demonstrate(candidate: Candidate, size: int, plug: int) -> Report:
    """Runs one backend through its life; what cannot run says why."""
    report = Report(candidate.name)
    try:
        backend = candidate.make()
        region, report.note = reserve(candidate, backend, min(size, candidate.size))
    except (SparseMemError, OSError, ValueError) as error:
        report.skipped = reason(error)
        return report
    with region:
        if region.plugged_size:
            # Adopted data: the demonstration ends by unplugging everything, which would discard it.
            report.skipped = f"it holds {exact_size(region.plugged_size)} of data, which a demonstration would discard"
            return report
        report.backend, report.strategy = str(backend), region.stats().strategy
        report.size, report.block_size = region.size, region.block_size
        count = max(4, min(plug // region.block_size, region.nblocks // 2))
        try:
            _live(report, region, count)
        except BackendExhaustedError as error:
            report.skipped = f"{exact_size(count * region.block_size)} cannot be had here: {reason(error)}"
            report.checks.clear()
    return report


def _live(report: Report, region: Region, count: int) -> None:
    def figure(moment: str) -> int:
        used = used_bytes(region)
        report.figures.append(Figure(moment, region.plugged_size, used))
        return used

    idle = figure("reserved")
    slack = _METADATA if report.name.startswith("disk file shared") else 0
    report.check(f"reserving {exact_size(region.size)} uses no memory", idle == 0)
    region.plug(0, count)
    plugged = figure("plugged")
    report.check("a plug takes exactly the plugged bytes", 0 <= plugged - region.plugged_size <= slack)
    _write(region, 0, count)
    report.check("every byte written reads back", _intact(region, 0, count))
    third = max(1, count // 3)
    try:
        region.unplug(third, third)
    except UnsupportedError as error:
        report.note = str(error)
    else:
        halved = figure("unplugged a third")
        report.check("an unplug gives exactly those bytes back", 0 <= halved - region.plugged_size <= slack)
        report.check(
            "the neighbours keep their content",
            _intact(region, 0, third) and _intact(region, 2 * third, count - 2 * third),
        )
        region.plug(third)
        report.check(f"a block plugged again reads {region.fresh}", _is_fresh(region, third))
        report.ranges = [(first, n, True) for first, n in region.plugged_runs()]
        report.ranges += [(first, n, False) for first, n in region.unplugged_runs()]
        report.ranges.sort()
    report.block_map = block_map(region, 2 * count)
    audit = region.audit()
    report.check(f"the audit agrees with the kernel: {audit}", audit.ok)
    if not report.note.startswith("memfd_secret"):
        region.unplug_all()
        report.check("unplugging everything gives everything back", figure("unplugged all") <= slack)


def block_map(region: Region, blocks: int) -> str:
    """The first blocks as characters: full is plugged, dotted is not."""
    shown = min(blocks, region.nblocks, 64)
    more = "…" if shown < region.nblocks else ""
    return "".join("█" if region.is_plugged(block) else "·" for block in range(shown)) + more


def _pattern(block: int, length: int) -> bytes:
    return (block.to_bytes(8, "little") + b"sparsemem-demo..")[:16] * (length // 16)


def _write(region: Region, first: int, count: int) -> None:
    if isinstance(region.backend, Simulated):
        return
    for block in range(first, first + count):
        with region.view(block) as view:
            view[:] = _pattern(block, len(view))


def _intact(region: Region, first: int, count: int) -> bool:
    if isinstance(region.backend, Simulated):
        return True
    for block in range(first, first + count):
        with region.view(block) as view:
            if view != _pattern(block, len(view)):
                return False
    return True


def _is_fresh(region: Region, block: int) -> bool:
    if isinstance(region.backend, Simulated):
        return True
    expected = bytes(region.block_size)
    if region.fresh == "file":
        start = region.offset(block)
        expected = os.pread(region.fileno(), region.block_size, start).ljust(region.block_size, b"\0")
    with region.view(block) as view:
        return view == expected


# ---- running out on purpose -------------------------------------------------------------


def exhaust() -> Report:
    """Runs a backend out of memory on purpose, the most telling one that this user can have."""
    report = Report("exhausted on purpose")
    for name, backend, room, borrowed in _exhaustible():
        report.name = f"exhausted on purpose: {name}"
        try:
            _run_out(report, backend, room)
        finally:
            if borrowed is not None:
                os.close(borrowed)
        return report
    return report


def _exhaustible() -> Iterator[tuple[str, Backend, int, int | None]]:
    """Backends with little room: a name, the backend, its bytes, and a descriptor to close."""
    room = 32 << 20
    try:
        fd = probe.detached_tmpfs_file(room)
    except OSError:
        pass
    else:
        yield f"a tmpfs of {exact_size(room)}", File(fd=fd), room, fd
    texts = files.shared_files()
    huge = files.default_huge_page(texts)
    pool = None if huge is None else files.huge_pool(texts, huge)
    if huge is not None and pool is not None and pool.available * huge <= 1 << 30:
        name = f"the pool of huge pages, {pool.available} of {exact_size(huge)} free"
        yield name, Memfd(hugetlb=True), pool.available * huge, None
    yield f"a simulated backend of {exact_size(room)}", Simulated(capacity=room), room, None


def _run_out(report: Report, backend: Backend, room: int) -> None:
    # headroom="off": the kernel itself shall refuse, half way through.
    with Region(1 << 40, backend=backend, headroom="off") as region:
        report.backend, report.strategy = str(backend), region.stats().strategy
        report.size, report.block_size = region.size, region.block_size
        half = room // region.block_size // 2
        if half:
            region.plug(0, half)
            _write(region, 0, half)
        before = used_bytes(region)
        report.figures.append(Figure("before", region.plugged_size, before))
        try:
            region.plug(half, room // region.block_size + 1)
        except BackendExhaustedError as error:
            code = errno.errorcode.get(error.errno or 0, "?")
            report.note = (
                f"{type(error).__name__} [{code}]: {error.cause.value}, "
                f"after {format_size(error.populated)} had been populated"
            )
            report.check("the plug failed with an error and not with SIGBUS", True)
            report.check("what had been populated was given back", error.rolled_back)
        else:
            report.check("the plug failed with an error and not with SIGBUS", False)
        after = used_bytes(region)
        report.figures.append(Figure("after", region.plugged_size, after))
        report.check("memory in use is as before", after == before)
        report.check("no block changed its state", region.plugged_blocks == half)
        report.check("the other blocks keep their content", _intact(region, 0, half))
        report.block_map = block_map(region, 4 * half + 1)
        report.check(f"the audit agrees with the kernel: {region.audit()}", region.audit().ok)
        if half:
            region.unplug(0)
            region.plug(half)
            report.check("with room again, the same plug works", region.is_plugged(half))
