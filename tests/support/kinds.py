"""Every kind of mapping that a region can be made of, as one parametrised fixture.

A `Kind` makes the backend and says, by the kernel's own accounting of that very mapping and independently of the
library, how much memory a region of it uses.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attrs
import pytest

from sparsemem import Anonymous, File, Memfd, Region, Secret, Simulated
from sparsemem._sys import calls, probe
from sparsemem.backends import Backend
from tests.support import accounting
from tests.support.accounting import Page

TIB = 1 << 40
GUARDED = 1 << 30
TEMPLATE_DATA = 16 << 20
TEMPLATE_PATTERN = b"template"


def private_bytes(region: Region) -> int:
    """Pages of the process's own, present or swapped; the zero page and file pages do not count."""
    # A guard is told from a swapped page by that alone; older kernels have neither guards nor the category.
    none_of = Page.PFNZERO | Page.FILE | (Page.GUARD if region.protection == "guard" else 0)
    runs = accounting.pagemap_scan(region.address, region.size, any_of=Page.PRESENT | Page.SWAPPED, none_of=none_of)
    return sum(end - start for start, end in runs)


def private_huge_bytes(region: Region) -> int:
    """The same of huge pages."""
    return accounting.smaps(region.address, region.size)["Private_Hugetlb"]


def _mapped(region: Region) -> int:
    return accounting.smaps(region.address, region.size)["Rss"]


def _in_file(region: Region) -> int:
    return accounting.allocated_bytes(region.fileno())


def _private_and_file(region: Region) -> int:
    return private_bytes(region) + _in_file(region)


def _hugetlb(region: Region) -> int:
    return accounting.smaps(region.address, region.size).hugetlb


def _simulated(region: Region) -> int:
    return region.audit().resident_size


@dataclass(frozen=True)
class Kind:
    """One kind of mapping.

    Attributes:
        id: Its name.
        make: The backend, from a folder to put files in.
        used: Bytes that a region of it uses.
        block_size: The block size to test it with.
        size: What can be reserved.
        slack: Bytes that the file system may add for itself.
        tmpfs, huge, hugetlbfs, ext4: What it needs.
    """

    id: str
    make: Callable[[Path], Backend]
    used: Callable[[Region], int]
    block_size: int = 64 << 10
    size: int = TIB
    slack: int = 0
    tmpfs: bool = False
    huge: bool = False
    hugetlbfs: bool = False
    ext4: bool = False

    @property
    def has_memory(self) -> bool:
        return self.id != "simulated"

    @property
    def discards(self) -> bool:
        return self.id != "memfd_secret"

    @property
    def protections(self) -> tuple[str, ...]:
        """What can keep accesses off its unplugged blocks."""
        if not (self.has_memory and self.discards):
            return ()
        trap = () if "disk" in self.id or "template" in self.id or self.ext4 else ("trap",)
        guard = () if self.huge else ("guard",)
        return (*trap, *guard, "prot_none")

    @property
    def has_file(self) -> bool:
        """Whether there is a file that belongs to the region."""
        return self.has_memory and "anonymous" not in self.id and self.discards and "template" not in self.id

    @property
    def shared_file(self) -> bool:
        """Whether others can change the memory through a descriptor."""
        return self.used is _in_file

    def fresh(self, length: int) -> bytes:
        """What a freshly plugged range at the start of a block reads."""
        return (TEMPLATE_PATTERN * (length // 8 + 1))[:length] if "template" in self.id else bytes(length)


def _template(folder: Path) -> File:
    path = folder / "template"
    if not path.exists():
        with path.open("wb") as file:
            file.write(TEMPLATE_PATTERN * (TEMPLATE_DATA // len(TEMPLATE_PATTERN)))
            file.truncate(TIB)
    return File(path, shared=False)


def _huge_template(folder: Path) -> File:
    path = folder / "template"
    if not path.exists():
        with path.open("w+b") as file:  # hugetlbfs has no write()
            file.truncate(TIB)
            with mmap.mmap(file.fileno(), TEMPLATE_DATA) as data:
                data[:] = TEMPLATE_PATTERN * (TEMPLATE_DATA // len(TEMPLATE_PATTERN))
    return File(path, shared=False)


def _adopted(folder: Path) -> File:
    path = folder / "adopted"
    path.touch()
    return File(path)


_HUGE = 2 << 20

KINDS = [
    Kind("anonymous private", lambda _: Anonymous(), private_bytes),
    Kind("anonymous private 4K", lambda _: Anonymous(), private_bytes, block_size=4096),
    Kind("anonymous private 2M", lambda _: Anonymous(), private_bytes, block_size=_HUGE),
    # Without root its audit is a mincore of all of it: 14 s for 1 TiB.
    Kind("anonymous shared", lambda _: Anonymous(shared=True), _mapped, size=TIB if os.geteuid() == 0 else TIB >> 8),
    Kind("memfd shared", lambda _: Memfd(), _in_file),
    Kind("memfd shared 2M", lambda _: Memfd(), _in_file, block_size=_HUGE),
    Kind("memfd private", lambda _: Memfd(shared=False), _private_and_file),
    Kind("tmpfs file shared", lambda folder: File(folder / "file"), _in_file, tmpfs=True),
    Kind("tmpfs file private", lambda folder: File(folder / "file", shared=False), _private_and_file, tmpfs=True),
    Kind("disk file owned", lambda folder: File(folder / "file"), _in_file, slack=64 << 10),
    Kind("disk file adopted", _adopted, _in_file, slack=64 << 10),
    # Blocks of 1 KiB, smaller than a page, as mkfs chooses for a file system of this size.
    Kind("ext4 file shared", lambda folder: File(folder / "file"), _in_file, slack=64 << 10, ext4=True),
    Kind("disk file private", lambda folder: File(folder / "file", shared=False), private_bytes),
    Kind("disk file template", _template, private_bytes),
    Kind("tmpfs file template", _template, private_bytes, tmpfs=True),
    Kind("anonymous hugetlb", lambda _: Anonymous(hugetlb="2M"), _hugetlb, block_size=_HUGE, huge=True),
    Kind(
        "anonymous shared hugetlb",
        lambda _: Anonymous(hugetlb="2M", shared=True),
        _hugetlb,
        block_size=_HUGE,
        huge=True,
    ),
    Kind("memfd hugetlb shared", lambda _: Memfd(hugetlb="2M"), _in_file, block_size=_HUGE, huge=True),
    Kind("memfd hugetlb private", lambda _: Memfd(hugetlb="2M", shared=False), _hugetlb, block_size=_HUGE, huge=True),
    Kind("hugetlbfs file shared", lambda f: File(f / "file"), _in_file, block_size=_HUGE, huge=True, hugetlbfs=True),
    Kind(
        "hugetlbfs file private",
        lambda f: File(f / "file", shared=False),
        _hugetlb,
        block_size=_HUGE,
        huge=True,
        hugetlbfs=True,
    ),
    Kind(
        "hugetlbfs file template",
        _huge_template,
        private_huge_bytes,
        block_size=_HUGE,
        huge=True,
        hugetlbfs=True,
    ),
    # It counts as locked memory: ulimit -l is 8 MiB for most users.
    Kind("memfd_secret", lambda _: Secret(), _mapped, size=1 << 30 if os.geteuid() == 0 else 4 << 20),
    Kind("simulated", lambda _: Simulated(), _simulated, block_size=_HUGE, size=1 << 50),
]
"""All of them."""


@dataclass
class Made:
    """A kind on this machine, ready to make regions of."""

    kind: Kind
    backend: Backend
    protection: str = "none"

    @property
    def size(self) -> int:
        """What its regions reserve: guards cost 2 MiB for each GiB."""
        return min(self.kind.size, GUARDED) if self.protection == "guard" else self.kind.size

    @property
    def catches_discarded(self) -> bool:
        """Whether pages that are discarded within a plugged block are caught as well, until they are populated."""
        zero_page = self.kind.used in (private_bytes, _private_and_file) and not self.kind.huge
        return self.protection == "trap" and not zero_page

    def region(self, size: int | None = None, **options: Any) -> Region:
        """A region of the kind; by default of the size that it can reserve."""
        options.setdefault("block_size", self.kind.block_size)
        options.setdefault("protection", self.protection)
        return Region(self.size if size is None else size, backend=self.backend, **options)

    def used(self, region: Region) -> int:
        """What the kernel says that it uses."""
        return self.kind.used(region)


def need_disk(folder: Path) -> None:
    """Skips if the temporary folder is on a tmpfs, as /tmp is on many systems: its files are memory."""
    if accounting.on_tmpfs(folder):
        pytest.skip(f"needs a temporary folder on a disk (TMPDIR=, --basetemp=); {folder} is on a tmpfs")


def need_protection(protection: str) -> None:
    """Skips if this kernel has no such thing."""
    if protection == "trap" and not (probe.trap(calls.kernel) and probe.populate_write(calls.kernel)):
        pytest.skip("needs userfaultfd")
    if protection == "guard" and not probe.guard(calls.kernel):
        pytest.skip("needs a kernel with MADV_GUARD_INSTALL")


def make(kind: Kind, request: pytest.FixtureRequest, strategy: str = "auto", protection: str = "none") -> Made:
    """Gets what the kind needs, or skips with the reason."""
    folder: Path = request.getfixturevalue("tmp_path")
    need_protection(protection)
    if kind.huge:
        request.getfixturevalue("huge_pool")(16)
    if kind.hugetlbfs:
        folder = request.getfixturevalue("hugetlbfs_mount")()
    elif kind.ext4:
        folder = request.getfixturevalue("ext4_mount")()
    elif kind.tmpfs:
        folder = request.getfixturevalue("tmpfs_folder")
    elif kind.id.startswith("disk"):
        need_disk(folder)
    if kind.id == "memfd_secret":
        try:
            Region(1 << 20, block_size=4096, backend=Secret()).close()
        except NotImplementedError as error:
            pytest.skip(f"needs memfd_secret ({error})")
        except OSError as error:
            pytest.skip(f"needs root: to lock the memory of a memfd_secret ({error.strerror})")
        folder = folder / "none"
    backend = kind.make(folder)
    if strategy != "auto":
        backend = attrs.evolve(backend, strategy=strategy)  # type: ignore[misc]  # those with strategies are attrs
    return Made(kind, backend, protection)


def params(
    *,
    strategies: tuple[str, ...] = ("auto",),
    where: Callable[[Kind], bool] = lambda kind: True,
    protected: bool = False,
    bare: bool = True,
) -> Any:
    """Parameters for an indirect `made` fixture: the kinds, each with each strategy that it has.

    Args:
        strategies: The ways to populate.
        where: Which kinds.
        protected: With every protection, too, that the kind can have.
        bare: And without any.
    """
    chosen = []
    for kind in KINDS:
        for strategy in strategies:
            if bare and where(kind) and (strategy == "auto" or kind.id not in ("memfd_secret", "simulated")):
                chosen.append(pytest.param((kind, strategy, "none"), id=f"{kind.id}-{strategy}"))
    for kind in filter(where, KINDS):
        for protection in kind.protections if protected else ():
            chosen.append(pytest.param((kind, "auto", protection), id=f"{kind.id}-{protection}"))
    return chosen


@pytest.fixture
def made(request: pytest.FixtureRequest) -> Made:
    """The kind that the test is parametrised with (`every_kind` and the like)."""
    kind, strategy, protection = request.param
    return make(kind, request, strategy, protection)


every_kind = pytest.mark.parametrize("made", params(strategies=("auto", "futex"), protected=True), indirect=True)
"""Every kind with every way to populate, what an old kernel would do, too, and with every protection."""

every_kind_once = pytest.mark.parametrize("made", params(), indirect=True)
every_discarding = pytest.mark.parametrize(
    "made", params(strategies=("auto", "futex"), where=lambda kind: kind.discards, protected=True), indirect=True
)
every_protected = pytest.mark.parametrize("made", params(protected=True, bare=False), indirect=True)
"""Every kind with every protection that it can have."""
every_viewable_or_protected = pytest.mark.parametrize(
    "made", params(where=lambda kind: kind.has_memory and kind.discards, protected=True), indirect=True
)
every_viewable = pytest.mark.parametrize(
    "made", params(where=lambda kind: kind.has_memory and kind.discards), indirect=True
)


@pytest.fixture
def tmpfs_folder(request: pytest.FixtureRequest) -> Any:
    """A folder on a tmpfs that anybody may use, removed afterwards."""
    import shutil
    import tempfile

    try:
        folder = tempfile.mkdtemp(prefix="sparsemem-test-", dir="/dev/shm")
    except OSError as error:
        pytest.skip(f"needs a tmpfs that this user may write to ({error})")
    yield Path(folder)
    shutil.rmtree(folder)
