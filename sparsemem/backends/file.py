"""Files: on a tmpfs, a hugetlbfs or a disk."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Any

from attrs import field, frozen

from sparsemem._sys import calls as _calls
from sparsemem._sys import lib
from sparsemem._sys.calls import Calls
from sparsemem._sys.descriptor import Descriptor
from sparsemem._sys.files import PAGE_SIZE
from sparsemem.backends.adopted import adopt_file, adopt_mapping, fit_size, kind_of
from sparsemem.backends.allocated import check_existing
from sparsemem.backends.base import Backend, Request
from sparsemem.backends.kernel import Area, KernelMapping, OwnFile
from sparsemem.backends.numa import check_node
from sparsemem.backends.options import optional_switch, switch
from sparsemem.backends.pages import block_size_for
from sparsemem.backends.strategies import check_strategy
from sparsemem.backends.text import options_text
from sparsemem.errors import ReserveError
from sparsemem.recipes import Kind
from sparsemem.units import Size, exact_size, parse_size

_OWNED_PRIVATE = {
    Kind.SHMEM_SHARED: Kind.SHMEM_PRIVATE,
    Kind.HUGETLB_SHARED: Kind.HUGETLB_PRIVATE,
    Kind.DISK_SHARED: Kind.DISK_PRIVATE,
}


def _offset(offset: Size) -> int:
    size = parse_size(offset, "offset")
    if size % PAGE_SIZE:
        raise ValueError(f"offset {size} is not a multiple of the page size {PAGE_SIZE}")
    return size


def _path_text(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.fsdecode(path)


@frozen
class File(Backend):
    """A file by path or by descriptor.

    A missing file is created (mode 0600) and stays; it is *owned*.  An existing
    one that is mapped shared belongs to the region too, and `existing` says
    what happens to data in it.  A private mapping of an existing file is a
    *template*: blocks show its content, and it is never written or punched.

    Args:
        path: Where it is.  Symbolic links at the end of it are refused.
        shared: Map it MAP_SHARED.
        existing: What to do if anything is allocated in the range: "error"
            refuses, "adopt" starts those blocks plugged, "discard" punches them.  "trust"
            is for memory that others use meanwhile, such as a guest's: nothing is looked
            at, populated or extended, and `Region(plugged=)` alone says which blocks are
            plugged.  The others are taken to hold nothing.
        fd: Adopt this descriptor instead of a path; it is duplicated.
        delete: Remove the file when the region closes, if the region made it; one
            that was there before stays.
        thp: Transparent huge pages; see `Anonymous`.
        follow_symlinks: Open what a symbolic link points to.
        strategy: How to populate, by name; see `sparsemem.recipes.STRATEGIES`.
        numa_node: Take all memory from this NUMA node (mbind(2), MPOL_BIND), and
            populate on its processors.  None takes it from wherever there is some.
            Pages that a file has already stay where they are; a shared disk file is refused,
            since its pages are the page cache's.
        offset: Where in the file block 0 is, in bytes, a multiple of its page size; for
            templates only.
    """

    path: str | None = field(default=None, converter=_path_text)
    shared: bool = field(default=True, validator=switch, kw_only=True)
    existing: str = field(default="error", converter=check_existing, kw_only=True)
    fd: int | None = field(default=None, kw_only=True)
    delete: bool = field(default=False, validator=switch, kw_only=True)
    thp: bool | None = field(default=None, validator=optional_switch, kw_only=True)
    follow_symlinks: bool = field(default=False, validator=switch, kw_only=True)
    strategy: str = field(default="auto", converter=check_strategy, kw_only=True)
    numa_node: int | None = field(default=None, validator=check_node, kw_only=True)
    offset: int = field(default=0, converter=_offset, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if self.offset and self.shared:
            raise ValueError(f"offset={self.offset} is for templates: it needs shared=False and a file that exists")
        if (self.path is None) == (self.fd is None):
            raise ValueError("File needs a path or fd=, and not both")
        if self.delete and self.path is None:
            raise ValueError("delete=True needs a path: a descriptor has no name to remove")

    @property
    def page_size(self) -> int:
        """Bytes; that of the file, or where there is none yet of the folder it will be in."""
        calls = _calls.kernel
        if self.fd is not None:
            return kind_of(calls, self.fd, self.shared)[1]
        assert self.path is not None
        for path in (self.path, os.path.dirname(os.path.abspath(self.path))):
            try:
                fd = Descriptor(calls.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, 0), calls)
            except OSError:
                continue
            try:
                magic, block_size = calls.filesystem(fd.fd)
            except OSError as error:
                raise ReserveError(error.errno, f"{path}: {error.strerror}") from error
            finally:
                fd.close()
            return block_size if magic == lib.HUGETLBFS_MAGIC else PAGE_SIZE
        return PAGE_SIZE  # reserve() will say what is wrong with the path

    @property
    def preferred_block_size(self) -> int:
        return block_size_for(self.page_size)

    def reserve(self, request: Request) -> KernelMapping:
        calls = _calls.kernel
        if self.fd is not None:
            return adopt_mapping(calls, self, self.fd, request, self.strategy, self.offset)
        assert self.path is not None
        fd, created = self._open(calls, self.path)
        own: OwnFile | None = None
        try:
            if created:
                own = self._own(calls, fd)
            area = (
                adopt_file(calls, self, fd, request, self.offset)
                if own is None
                else self._owned(calls, fd, own, request)
            )
            return KernelMapping(area, request, self.strategy)
        except BaseException:
            # Ours to remove, but not what somebody has put in its place meanwhile; and if not even
            # that can be told, an empty file is the lesser loss.
            with contextlib.suppress(OSError):
                if created:
                    (self._own(calls, fd) if own is None else own).remove(calls)
            fd.close()
            raise

    def _open(self, calls: Calls, path: str) -> tuple[Descriptor, bool]:
        """The file and whether it was made here, which is what makes it ours to punch."""
        flags = os.O_CLOEXEC | (0 if self.follow_symlinks else os.O_NOFOLLOW)
        try:
            if not self.offset:  # with one it is a template or nothing
                # O_EXCL, so that a file that somebody makes meanwhile is not taken for ours.
                with contextlib.suppress(FileExistsError):
                    return Descriptor(calls.open(path, flags | os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), calls), True
            mode = os.O_RDWR if self.shared else os.O_RDONLY
            # O_NONBLOCK, for opening a FIFO would wait for somebody to write.
            return Descriptor(calls.open(path, flags | mode | os.O_NONBLOCK, 0), calls), False
        except OSError as error:
            hint = "; a symbolic link is only followed with follow_symlinks=True" if error.errno == errno.ELOOP else ""
            raise ReserveError(error.errno, f"{path}: {error.strerror}{hint}") from error

    def _own(self, calls: Calls, fd: Descriptor) -> OwnFile:
        # Absolute now: the working folder may be another one when the region closes.
        assert self.path is not None
        about = calls.fstat(fd.fd)
        return OwnFile(path=os.path.abspath(self.path), device=about.st_dev, inode=about.st_ino, pid=os.getpid())

    def _owned(self, calls: Calls, fd: Descriptor, own: OwnFile, request: Request) -> Area:
        kind, page_size = kind_of(calls, fd.fd, True)
        fit_size(calls, fd.fd, 0, request.size)
        return Area(
            kind=kind if self.shared else _OWNED_PRIVATE[kind],
            flags=lib.MAP_SHARED if self.shared else lib.MAP_PRIVATE,
            page_size=page_size,
            fd=fd,
            thp=self.thp,
            numa_node=self.numa_node,
            created=own,
            unlink=own if self.delete else None,
        )

    def __str__(self) -> str:
        options: dict[str, Any] = {
            "private": not self.shared,
            "existing": None if self.existing == "error" else self.existing,
            "fd": self.fd,
            "delete": self.delete,
            "thp": self.thp,
            "follow_symlinks": self.follow_symlinks,
            "strategy": None if self.strategy == "auto" else self.strategy,
            "numa_node": self.numa_node,
            "offset": exact_size(self.offset) if self.offset else None,
        }
        return options_text("file", options, self.path)
