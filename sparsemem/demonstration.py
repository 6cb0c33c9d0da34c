"""The main job, shown: reserve, plug, write, unplug, audit, and running out of memory.

Every figure is measured as it runs, and every claim is a `Check`, most of them
against the kernel's own accounting of that very mapping.  Prints nothing.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import attrs
from attrs import Factory, define, frozen

from sparsemem._sys import calls as _calls
from sparsemem._sys import files, lib, residency, tmpfs
from sparsemem.backends import File, Memfd, Secret, Simulated
from sparsemem.backends.base import Backend
from sparsemem.errors import BackendExhaustedError, PopulateError, SparseMemError, UnsupportedError
from sparsemem.region import Progress, Region
from sparsemem.survey import Candidate, reason, reserve
from sparsemem.units import exact_size

# On disks st_blocks counts extent-tree blocks, too (up to 32 KiB seen).
_METADATA = 64 << 10
_MAP_WIDTH = 64


@frozen
class Check:
    """One claim and whether it held."""

    claim: str
    ok: bool


@define
class Step:
    """One thing that was done, and then: bytes that are plugged, bytes that the kernel says are used."""

    action: str
    plugged: int
    used: int
    checks: list[Check] = Factory(list)

    def check(self, claim: str, ok: bool) -> None:
        """Notes a claim."""
        self.checks.append(Check(claim, bool(ok)))


@define
class Report:
    """What came of one backend; `skipped` says why there is nothing.

    Attributes:
        source: Where the kernel's figures are from.
        notes: What to know about this one, a line each.
        skipped: Why it cannot run here; "" if it did.
        block_map: The first blocks; `#` is plugged, `.` is not.
        ranges: `(first block, count, plugged)` for all blocks, at the time of the block map.
    """

    name: str
    backend: str = ""
    strategy: str = ""
    source: str = ""
    size: int = 0
    block_size: int = 0
    notes: list[str] = Factory(list)
    skipped: str = ""
    steps: list[Step] = Factory(list)
    block_map: str = ""
    ranges: list[tuple[int, int, bool]] = Factory(list)

    @property
    def checks(self) -> list[Check]:
        """The checks of all steps."""
        return [check for step in self.steps for check in step.checks]

    def describe(self, region: Region) -> None:
        """Notes what the region is."""
        self.backend, self.strategy = str(region.backend), region.stats().strategy
        self.size, self.block_size = region.size, region.block_size
        self.source = measure(region)[1]

    def step(self, action: str, region: Region) -> Step:
        """Notes what was done, with the figures of this moment."""
        self.steps.append(Step(action, region.plugged_size, measure(region)[0]))
        return self.steps[-1]

    def show_blocks(self, region: Region, blocks: int) -> None:
        """Notes which blocks are plugged now."""
        shown = range(min(blocks, region.nblocks, _MAP_WIDTH))
        self.block_map = "".join("#" if region.is_plugged(block) else "." for block in shown)
        plugged = [(first, count, True) for first, count in region.plugged_runs()]
        self.ranges = sorted(plugged + [(first, count, False) for first, count in region.unplugged_runs()])


# ---- what the kernel says -----------------------------------------------------------------


def measure(region: Region) -> tuple[int, str]:
    """What the region's memory uses in bytes, and where that is told, which differs from kind to kind."""
    if isinstance(region.backend, Simulated):
        return region.audit().resident_size, "its own books, there is no memory"
    fields = files.mapping_fields(region.address, region.size)
    huge = region.page_size > files.PAGE_SIZE
    in_file = _file_total(region)
    if in_file is not None and getattr(region.backend, "shared", False):
        return in_file, "st_blocks of the file"
    names: tuple[str, ...] = ("Private_Hugetlb", "Shared_Hugetlb") if huge else ("Rss", "Swap")
    if in_file is not None:
        # A private mapping: the copies are what is used, and the file besides if it is our own.
        names = ("Private_Hugetlb",) if huge else ("Anonymous", "Swap")
    used, source = sum(fields.get(name, 0) for name in names), f"smaps: {' + '.join(names)}"
    if in_file is not None and region.fresh == "zero":
        return used + in_file, f"{source}; st_blocks of the file"
    return used, source


def _file_total(region: Region) -> int | None:
    """Bytes of the file behind the region; None if there is none that tells (a secret's st_blocks stay 0)."""
    if isinstance(region.backend, Secret):
        return None
    try:
        return residency.file_total(_calls.kernel, region.fileno())
    except UnsupportedError:
        return None


def _slack(region: Region) -> int:
    """What a file system may use for itself beside the data."""
    if not (isinstance(region.backend, File) and region.backend.shared):
        return 0
    magic, _ = _calls.kernel.filesystem(region.fileno())
    return 0 if magic in (lib.TMPFS_MAGIC, lib.HUGETLBFS_MAGIC) else _METADATA


# ---- a region's life -----------------------------------------------------------------------


def demonstrate(candidate: Candidate, size: int, plug: int, progress: Progress | None = None) -> Report:
    """Takes one backend through its life; what cannot run says why.

    Args:
        candidate: The backend.
        size: Bytes to reserve.
        plug: Bytes to plug.
        progress: Watches the large plug; see `Region.plug`.
    """
    report = Report(candidate.name)
    try:
        backend = candidate.make()
        if isinstance(backend, File) and backend.path is not None and not os.path.lexists(backend.path):
            backend = attrs.evolve(backend, delete=True)  # what we make we remove, whoever asked for it
        region, why = reserve(backend, size, plug)
        if why:
            report.notes.append(f"no more than {exact_size(region.size)}: {why}")
        if candidate.audited is not None and region.size > candidate.audited:
            region = _smaller(report, region, candidate.audited, plug)
    except (SparseMemError, OSError, ValueError) as error:
        report.skipped = reason(error)
        return report
    with region:
        report.describe(region)
        if region.plugged_blocks:
            report.skipped = "it holds data already, which this demonstration would discard"
            return report
        count = max(3, min(plug // region.block_size, region.nblocks // 2))
        try:
            _live(report, region, count, progress)
        except BackendExhaustedError as error:
            report.skipped = f"{exact_size(count * region.block_size)} cannot be had: {reason(error)}"
            report.steps.clear()
    return report


def _smaller(report: Report, region: Region, size: int, plug: int) -> Region:
    """Goes on with a region that can be audited in good time."""
    with region:
        step = report.step(f"reserve {exact_size(region.size)}", region)
        step.check("uses no memory", step.used == 0)
    region, _ = reserve(region.backend, size, plug)
    report.notes.append(f"from here on {exact_size(size)}: an audit without privileges asks page by page")
    return region


def _live(report: Report, region: Region, count: int, progress: Progress | None) -> None:
    slack = _slack(region)
    step = report.step(f"reserve {exact_size(region.size)}", region)
    step.check("uses no memory", step.used == 0)

    region.plug(0, count, progress=progress)
    step = report.step(f"plug {_blocks(0, count)}", region)
    step.check("takes exactly the plugged bytes", 0 <= step.used - step.plugged <= slack)

    if not isinstance(region.backend, Simulated):
        _write(region, 0, count)
        step = report.step("write a pattern", region)
        step.check("every byte reads back", _intact(region, 0, count))
        step.check("takes no more than before", 0 <= step.used - step.plugged <= slack)

    third = count // 3
    try:
        region.unplug(third, third)
    except UnsupportedError as error:
        report.notes.append(str(error))
        _audit(report, region, count)
        return
    step = report.step(f"unplug {_blocks(third, third)}", region)
    step.check("gives exactly those bytes back", 0 <= step.used - step.plugged <= slack)
    if not isinstance(region.backend, Simulated):
        rest = _intact(region, 0, third) and _intact(region, 2 * third, count - 2 * third)
        step.check("the neighbours keep their content", rest)

    region.plug(third)
    step = report.step(f"plug {_blocks(third, 1)} again", region)
    if not isinstance(region.backend, Simulated):
        fresh = "the file's content" if region.fresh == "file" else "zero, not the old data"
        step.check(f"reads {fresh}", _is_fresh(region, third))

    _audit(report, region, count)
    region.unplug_all()
    step = report.step("unplug all", region)
    step.check("gives everything back", step.used <= slack)


def _audit(report: Report, region: Region, count: int) -> None:
    audit = region.audit()
    step = report.step("audit", region)
    if audit.unknown:
        step.check("nothing is tainted (of such memory the kernel does not tell which page is there)", audit.ok)
    else:
        step.check(f"every block is as the block map says: {str(audit).removeprefix('ok: ')}", audit.ok)
    report.show_blocks(region, 2 * count)


def _blocks(first: int, count: int) -> str:
    return f"block {first}" if count == 1 else f"blocks {first}-{first + count - 1}"


def _pattern(block: int, length: int) -> bytes:
    return (block.to_bytes(8, "little") + b"sparsemem-demo..")[:16] * (length // 16)


def _write(region: Region, first: int, count: int) -> None:
    for block in range(first, first + count):
        with region.view(block) as view:
            view[:] = _pattern(block, len(view))


def _intact(region: Region, first: int, count: int) -> bool:
    for block in range(first, first + count):
        with region.view(block) as view:
            if bytes(view) != _pattern(block, len(view)):
                return False
    return True


def _is_fresh(region: Region, block: int) -> bool:
    expected = bytes(region.block_size)
    if region.fresh == "file":
        read = _calls.kernel.pread(region.fileno(), region.block_size, region.offset(block))
        expected = read.ljust(region.block_size, b"\0")
    with region.view(block) as view:
        return bytes(view) == expected


# ---- running out on purpose -------------------------------------------------------------


@frozen
class _Scarce:
    """A backend that has little to give: what it is, and how much."""

    what: str
    backend: Backend
    room: int
    truncate: bool = False


def exhaust() -> Report:
    """Runs a backend out of memory on purpose, by the most telling limit that this user can have."""
    with _scarce() as scarce:
        report = Report("exhausted on purpose", notes=[scarce.what])
        _run_out(report, scarce)
    return report


@contextmanager
def _scarce() -> Iterator[_Scarce]:
    """A real limit of the kernel's that hurts nobody else."""
    room = 32 << 20
    for make, how in ((tmpfs.detached_file, "mounted nowhere"), (tmpfs.user_file, "of a user namespace")):
        try:
            fd = make(room)
        except OSError:
            continue
        try:
            yield _Scarce(f"a tmpfs of {exact_size(room)}, {how}", File(fd=fd), room)
        finally:
            os.close(fd)
        return
    texts = files.shared_files()
    huge = files.default_huge_page(texts)
    pool = None if huge is None else files.huge_pool(texts, huge)
    if pool is not None and pool.available == 0:
        # (One with pages is left alone: others may be about to use them.)
        yield _Scarce("the pool of huge pages, which is empty", Memfd(hugetlb=True), 0)
    else:
        yield _Scarce(f"a memfd that was truncated to {exact_size(room)}", Memfd(seal=False), room, truncate=True)


def _run_out(report: Report, scarce: _Scarce) -> None:
    # headroom="off": the kernel itself shall refuse, half way through.
    with Region(1 << 40, backend=scarce.backend, headroom="off") as region:
        report.describe(region)
        half = scarce.room // region.block_size // 2
        if scarce.truncate:
            _calls.kernel.ftruncate(region.fileno(), scarce.room)
        step = report.step(f"reserve {exact_size(region.size)}", region)
        step.check("uses no memory", step.used == 0)
        if half:
            region.plug(0, half)
            _write(region, 0, half)
            step = report.step(f"plug and write {_blocks(0, half)}", region)
            step.check("takes exactly the plugged bytes", step.used == step.plugged)
        too_many = scarce.room // region.block_size + 1
        before = report.steps[-1].used
        error = _plug_too_many(region, half, too_many)
        step = report.step(f"plug {_blocks(half, too_many)}", region)
        if error is None:
            step.check("fails with an error", False)
        else:
            code = errno.errorcode.get(error.errno or 0, "?")
            report.notes.append(f"{type(error).__name__} [{code}]: {error.strerror}")
            step.check(f"fails with an error and not with SIGBUS: {error.cause.value}", True)
            done = f", with {exact_size(error.populated)} or more populated by then" if error.populated else ""
            step.check(f"rolled back{done}", error.rolled_back and step.used == before)
        step.check("no block has changed its state", region.plugged_blocks == half)
        if half:
            step.check("the other blocks keep their content", _intact(region, 0, half))
        _audit(report, region, 2 * half + 1)
        if error is not None and half:
            region.unplug(0)
            region.plug(half)
            step = report.step(f"unplug block 0, plug {_blocks(half, 1)}", region)
            step.check("with room again it works", region.is_plugged(half) and step.used == before)


def _plug_too_many(region: Region, first: int, count: int) -> PopulateError | None:
    try:
        region.plug(first, count)
    except PopulateError as error:
        return error.with_traceback(None)
    return None
