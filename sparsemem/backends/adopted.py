"""Descriptors that were there before: what they are, and whether they will do.

Everything is looked at before anything is changed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from functools import partial
from typing import Protocol

from sparsemem._sys import lib, probe
from sparsemem._sys.calls import Calls
from sparsemem._sys.descriptor import Descriptor
from sparsemem._sys.files import PAGE_SIZE
from sparsemem.backends.allocated import adopt_existing, check_existing_data, discard_existing
from sparsemem.backends.base import Request
from sparsemem.backends.kernel import Adopted, Area, KernelMapping
from sparsemem.errors import ReserveError, UnsupportedError
from sparsemem.recipes import Kind
from sparsemem.runs import index_of
from sparsemem.units import exact_size

_SECRETMEM_MAGIC = 0x5345434D  # include/uapi/linux/magic.h


class Options(Protocol):
    """What a backend says about a file that it adopts."""

    @property
    def shared(self) -> bool: ...
    @property
    def thp(self) -> bool | None: ...
    @property
    def existing(self) -> str: ...
    @property
    def numa_node(self) -> int | None: ...


def kind_of(calls: Calls, fd: int, shared: bool) -> tuple[Kind, int]:
    """The kind of mapping that an existing file gives, and its page size in bytes.

    A private mapping of an existing file is always a template: its content is
    somebody's, and is never punched.

    Raises:
        ReserveError: It is not a file, or not one that can be mapped.
    """
    if not 0 <= index_of(fd, "fd") < 1 << 31:
        raise ValueError(f"fd {fd} is out of range: 0 <= fd < 2**31")
    try:
        mode = calls.fstat(fd).st_mode
        magic, block_size = calls.filesystem(fd)
    except OSError as error:
        raise ReserveError(error.errno, f"descriptor {fd}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise ReserveError(errno.EISDIR if stat.S_ISDIR(mode) else errno.ENODEV, f"descriptor {fd} is {what}")
    if magic == _SECRETMEM_MAGIC:
        raise UnsupportedError(f"descriptor {fd} is a memfd_secret, which cannot be adopted: use Secret()")
    page_size = block_size if magic == lib.HUGETLBFS_MAGIC else PAGE_SIZE
    if not shared:
        return Kind.TEMPLATE, page_size
    if magic == lib.HUGETLBFS_MAGIC:
        return Kind.HUGETLB_SHARED, page_size
    return (Kind.SHMEM_SHARED if magic == lib.TMPFS_MAGIC else Kind.DISK_SHARED), page_size


def adopt_mapping(
    calls: Calls, options: Options, fd: int, request: Request, strategy: str, offset: int = 0
) -> KernelMapping:
    """A mapping of a borrowed descriptor, which is duplicated; `offset` as for `adopt_file`."""
    kind_of(calls, fd, options.shared)  # refuses what is no file, before it is duplicated
    try:
        own = Descriptor(calls.duplicate(fd), calls)
    except OSError as error:
        raise ReserveError(error.errno, f"descriptor {fd}: {error.strerror}") from error
    with own.closed_on_error():
        return KernelMapping(adopt_file(calls, options, own, request, offset), request, strategy)


def adopt_file(calls: Calls, options: Options, fd: Descriptor, request: Request, offset: int = 0) -> Area:
    """An area over an existing file that we hold a descriptor of.

    Args:
        calls: What reaches the kernel.
        options: What the backend says.
        fd: The descriptor; owned by the area from now on.
        request: What the region asks.
        offset: Where in the file block 0 is; 0 but for templates.

    Raises:
        ReserveError: It cannot be written or punched, it is too small and must
            not grow, or it holds data that nobody has taken over.
    """
    kind, page_size = kind_of(calls, fd.fd, options.shared)
    size = calls.fstat(fd.fd).st_size
    adopt: Callable[[], Adopted] | None = None
    discard: Callable[[], None] | None = None
    restore: Callable[[], None] | None = None
    if kind is Kind.TEMPLATE:
        if offset % page_size:
            raise ReserveError(
                errno.EINVAL, f"offset {offset} is not a multiple of the file's page size {exact_size(page_size)}"
            )
        if size < offset + request.size:
            after = f" from offset {exact_size(offset)} on" if offset else ""
            raise ReserveError(
                errno.EINVAL,
                f"the template has {exact_size(max(0, size - offset))}{after} "
                f"and the region {exact_size(request.size)}: "
                "what lies beyond the end of a file cannot be mapped, and a template is never extended",
            )
    else:
        _check_writable(calls, fd.fd, size)
        if options.existing == "trust" and size < request.size:
            raise ReserveError(
                errno.EINVAL,
                f"the file has {exact_size(size)} and the region {exact_size(request.size)}: "
                "with existing='trust' it is somebody else's, and not extended",
            )
        check_existing_data(calls, fd, kind, options.existing, request)

        def adopt() -> Adopted:
            adopted = adopt_existing(calls, fd, kind, options.existing, request)
            fit_size(calls, fd.fd, size, request.size)  # last, for it changes the file
            return adopted

        restore = partial(_shrink_back, calls, fd, size, request.size)

        if options.existing == "discard":
            discard = partial(discard_existing, calls, fd, request)

    flags = lib.MAP_SHARED if options.shared else lib.MAP_PRIVATE
    return Area(
        kind=kind,
        flags=flags,
        page_size=page_size,
        fd=fd,
        offset=offset,
        adopt=adopt,
        discard=discard,
        restore=restore,
        thp=options.thp,
        numa_node=options.numa_node,
    )


def fit_size(calls: Calls, fd: int, size: int, needed: int) -> None:
    """Extends a file that is too short; a longer one stays as it is.

    Raises:
        ReserveError: It is sealed, there is a limit on file sizes, or the file
            system has one.
    """
    if size >= needed:
        return
    try:
        calls.ftruncate(fd, needed)
    except OSError as error:
        hint = {
            errno.EPERM: "; it is sealed against growing (F_SEAL_GROW)",
            errno.EFBIG: "; see ulimit -f and the limit of the file system (16T - 4K on ext4)",
        }.get(error.errno or 0, "")
        raise ReserveError(
            error.errno, f"cannot extend the file to {exact_size(needed)}: {error.strerror}{hint}"
        ) from error


def _shrink_back(calls: Calls, fd: Descriptor, size: int, grown: int) -> None:
    """Undoes `fit_size`, unless somebody else has changed the size since."""
    if size < grown and calls.fstat(fd.fd).st_size == grown:
        calls.ftruncate(fd.fd, size)


def _check_writable(calls: Calls, fd: int, size: int) -> None:
    if calls.open_flags(fd) & os.O_ACCMODE != os.O_RDWR:
        raise ReserveError(errno.EACCES, "the descriptor is not open for reading and writing")
    code = probe.can_punch(calls, fd, size)
    if code == errno.EPERM:
        raise ReserveError(
            code, "the file is sealed against writing (F_SEAL_WRITE or F_SEAL_FUTURE_WRITE): it cannot be punched"
        )
    if code:
        raise ReserveError(code, f"the file cannot be punched, so blocks could not be unplugged: {os.strerror(code)}")
