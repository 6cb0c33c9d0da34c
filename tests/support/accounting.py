"""What the kernel says about memory, read without any help from the library.

Every figure belongs to one address range, one file or one pool. System-wide figures such as MemAvailable are left out
on purpose: other processes move them, and the kernel keeps caches of its own.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
HUGE_2M = 2 << 20

Run = tuple[int, int]
"""Start and end of a range; the end is exclusive."""


# --- /proc/self/maps and smaps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vma:
    """One line of /proc/self/maps."""

    start: int
    end: int
    permissions: str
    offset: int
    device: str
    inode: int
    name: str

    @property
    def length(self) -> int:
        """Bytes of address space."""
        return self.end - self.start

    @property
    def span(self) -> Run:
        """Start and end."""
        return self.start, self.end

    def overlaps(self, start: int, length: int) -> bool:
        """Whether the VMA has an address in common with the range."""
        return self.start < start + length and start < self.end


_VMA_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) (\S+) (\d+) *(.*)")


def _parse_vma(line: str) -> Vma | None:
    match = _VMA_LINE.fullmatch(line.rstrip("\n"))
    if match is None:
        return None
    start, end, permissions, offset, device, inode, name = match.groups()
    return Vma(int(start, 16), int(end, 16), permissions, int(offset, 16), device, int(inode), name)


def vmas(start: int = 0, length: int = 1 << 64) -> list[Vma]:
    """The process's virtual memory areas that overlap a range (all of them without arguments), ascending."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        found = [vma for line in maps if (vma := _parse_vma(line))]
    return [vma for vma in found if vma.overlaps(start, length)]


def vma_count() -> int:
    """How many areas the process has (the limit is vm.max_map_count)."""
    with open("/proc/self/maps", "rb") as maps:
        return sum(1 for _ in maps)


@dataclass(frozen=True)
class Smaps:
    """The sum of smaps over the areas that overlap a range.

    smaps counts whole areas. Where an area reaches beyond the range (the kernel merges neighbours that are alike),
    the neighbours are counted too and `exact` is False: use `resident_bytes()` there.
    """

    areas: tuple[Vma, ...]
    bytes_of: dict[str, int]
    """Bytes by smaps' own field name, "Rss" for one; only fields that the kernel printed."""
    flags: tuple[frozenset[str], ...]
    """VmFlags of each area, "dd" (do not dump) for one."""
    exact: bool

    def __getitem__(self, name: str) -> int:
        """Bytes of a field; KeyError if this kernel does not print it."""
        return self.bytes_of[name]

    @property
    def hugetlb(self) -> int:
        """Bytes of hugetlb pages, which Rss does not count."""
        return self.bytes_of["Shared_Hugetlb"] + self.bytes_of["Private_Hugetlb"]

    @property
    def resident(self) -> int:
        """Bytes of every kind that the process has mapped here."""
        return self.bytes_of["Rss"] + self.hugetlb


def smaps(start: int, length: int) -> Smaps:
    """Add up smaps over a range.

    Args:
        start: First address.
        length: Bytes.

    Returns:
        The summed fields; all of what smaps prints, among them Rss, Pss, Anonymous, AnonHugePages, Swap,
        Shared_Hugetlb and Private_Hugetlb.

    Raises:
        LookupError: Nothing is mapped in the range.
    """
    areas: list[Vma] = []
    flags: list[frozenset[str]] = []
    totals: dict[str, int] = {}
    inside = False
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if (vma := _parse_vma(line)) is not None:
                if vma.start >= start + length:
                    break
                inside = vma.overlaps(start, length)
                if inside:
                    areas.append(vma)
            elif inside:
                name, _, rest = line.partition(":")
                if name == "VmFlags":
                    flags.append(frozenset(rest.split()))
                elif rest.endswith(" kB\n"):
                    totals[name] = totals.get(name, 0) + int(rest.split()[0]) * 1024
    if not areas:
        raise LookupError(f"nothing is mapped in {start:#x}-{start + length:#x}")
    exact = areas[0].start >= start and areas[-1].end <= start + length
    return Smaps(tuple(areas), totals, tuple(flags), exact)


# --- files and pools -------------------------------------------------------------------------------------------------


def on_tmpfs(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder's files are memory, by the mount that it is on."""
    path = os.path.realpath(folder)
    best, kind = "", ""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            before, _, after = line.partition(" - ")
            at = before.split()[4]
            # Of two mounts on one folder the later is on top.
            if len(at) >= len(best) and (path == at or path.startswith(at.rstrip("/") + "/")):
                best, kind = at, after.split()[0]
    return kind in ("tmpfs", "ramfs")


def allocated_bytes(file: int | str | os.PathLike[str]) -> int:
    """Bytes that a file really occupies (st_blocks); true for memfd, tmpfs, hugetlbfs and disk files alike.

    On ext4 this includes blocks of the extent tree (up to 32 KiB have been seen): do not compare exactly there.
    """
    status = os.fstat(file) if isinstance(file, int) else os.stat(file)
    return status.st_blocks * 512


@dataclass(frozen=True)
class HugePool:
    """One pool of hugetlb pages; counts are pages."""

    total: int
    free: int
    reserved: int
    surplus: int
    overcommit: int

    @property
    def available(self) -> int:
        """Free pages that nobody has a claim on."""
        return self.free - self.reserved


def huge_pool_folder(page_size: int = HUGE_2M) -> Path:
    """The pool's folder in sysfs; it need not exist."""
    return Path(f"/sys/kernel/mm/hugepages/hugepages-{page_size >> 10}kB")


def huge_pool(page_size: int = HUGE_2M) -> HugePool:
    """The state of a pool; FileNotFoundError if the kernel has no such page size."""
    folder = huge_pool_folder(page_size)
    names = ("nr_hugepages", "free_hugepages", "resv_hugepages", "surplus_hugepages", "nr_overcommit_hugepages")
    return HugePool(*(int((folder / name).read_text()) for name in names))


def open_descriptors() -> dict[int, str]:
    """The process's open descriptors and what each refers to."""
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the descriptor that listed the folder
            continue
    return found


# --- per page: PAGEMAP_SCAN, pagemap, mincore ------------------------------------------------------------------------


class Page:
    """Categories of PAGEMAP_SCAN (linux/fs.h, PAGE_IS_*)."""

    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    PFNZERO = 1 << 5
    HUGE = 1 << 6
    GUARD = 1 << 8


_SCAN_ARGUMENT = struct.Struct("=12Q")  # struct pm_scan_arg
_PAGEMAP_SCAN = 3 << 30 | 96 << 16 | ord("f") << 8 | 16  # _IOWR('f', 16, struct pm_scan_arg)
_WALK_END = 4  # index of the word that says how far the kernel came


def pagemap_scan(start: int, length: int, *, all_of: int = 0, any_of: int = 0, none_of: int = 0) -> list[Run]:
    """Runs of pages in the categories asked for, by ioctl(PAGEMAP_SCAN) (Linux 6.7).

    Args:
        start: First address, page-aligned.
        length: Bytes, a multiple of the page size.
        all_of: Categories (`Page`) that a page must be in, every one.
        any_of: Categories of which a page must be in at least one; 0 for no such condition.
        none_of: Categories that a page must not be in.

    Returns:
        Maximal runs, ascending.

    Raises:
        OSError: ENOTTY on a kernel without it, EINVAL or EFAULT for a bad range.
    """
    # Linux 6.18 gathers at most 512 runs at a time inside. With room for more, the walk_end that it hands back can lie
    # before runs that it has reported already, and the next call reports those again.
    capacity = 512
    vector = (ctypes.c_uint64 * (3 * capacity))()
    runs: list[Run] = []
    end = start + length
    descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        while start < end:
            # The kernel merges neighbours only if what it reports of them is equal: report what all of them have.
            words = (
                _SCAN_ARGUMENT.size,
                0,  # flags: only look
                start,
                end,
                0,  # walk_end: set by the kernel
                ctypes.addressof(vector),
                capacity,
                0,  # max_pages: no limit
                none_of,  # category_inverted
                all_of | none_of,  # category_mask
                any_of,  # category_anyof_mask
                all_of,  # return_mask
            )
            buffer = bytearray(_SCAN_ARGUMENT.pack(*words))
            filled = fcntl.ioctl(descriptor, _PAGEMAP_SCAN, buffer)
            _append_merged(runs, ((vector[3 * i], vector[3 * i + 1]) for i in range(filled)))
            start = _SCAN_ARGUMENT.unpack(buffer)[_WALK_END]
    finally:
        os.close(descriptor)
    return runs


def have_pagemap_scan() -> bool:
    """Whether this kernel has PAGEMAP_SCAN."""
    probe = ctypes.create_string_buffer(1)
    try:
        pagemap_scan(ctypes.addressof(probe) // PAGE_SIZE * PAGE_SIZE, PAGE_SIZE, all_of=Page.PRESENT)
    except OSError:
        return False
    return True


class PagemapBit:
    """Bits of an entry of /proc/self/pagemap that need no privilege."""

    PRESENT = 1 << 63
    SWAPPED = 1 << 62
    FILE_OR_SHARED = 1 << 61
    SOFT_DIRTY = 1 << 55


def pagemap_entries(start: int, length: int) -> list[int]:
    """The 64-bit entries of /proc/self/pagemap, one a page (8 bytes of list for each: not for huge ranges)."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        raw = os.pread(pagemap.fileno(), length // PAGE_SIZE * 8, start // PAGE_SIZE * 8)
    return list(struct.unpack(f"={len(raw) // 8}Q", raw))


def resident_runs(start: int, length: int) -> list[Run]:
    """Runs of pages that are in memory or swapped out, the shared zero page not counted.

    The truth for anonymous and other private mappings. A shared file's pages count only while they are mapped into
    this process: ask `allocated_bytes()` there. Falls back to pagemap's entries, which cannot tell the zero page.
    """
    try:
        return pagemap_scan(start, length, any_of=Page.PRESENT | Page.SWAPPED, none_of=Page.PFNZERO)
    except OSError:
        runs: list[Run] = []
        mask = PagemapBit.PRESENT | PagemapBit.SWAPPED
        entries = enumerate(pagemap_entries(start, length))
        addresses = (start + index * PAGE_SIZE for index, entry in entries if entry & mask)
        _append_merged(runs, ((address, address + PAGE_SIZE) for address in addresses))
        return runs


def resident_bytes(start: int, length: int) -> int:
    """The bytes in `resident_runs()`."""
    return sum(run_end - run_start for run_start, run_end in resident_runs(start, length))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def mincore_pages(start: int, length: int) -> int:
    """How many pages mincore(2) says are in core.

    It says yes to the anonymous zero page, and no to fallocated, untouched shmem and to unmapped hugetlb pages.
    """
    pages = -(-length // PAGE_SIZE)
    vector = (ctypes.c_ubyte * pages)()
    if _libc.mincore(start, length, ctypes.addressof(vector)):
        error = ctypes.get_errno()
        raise OSError(error, f"mincore({start:#x}, {length:#x}): {os.strerror(error)}")
    return sum(entry & 1 for entry in vector)


def _append_merged(runs: list[Run], more: Iterable[Run]) -> None:
    for start, end in more:
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
