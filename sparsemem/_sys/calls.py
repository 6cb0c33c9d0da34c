"""System calls, one method each: the only way by which anything here reaches the kernel.

`Calls` is what the rest of the package sees; `Kernel` is the real thing.  Tests
put a fault injector in its place by setting `kernel` in this module, which is
looked up when a region is made.

All methods raise `OSError` with the kernel's errno.  Addresses and lengths are
bytes.
"""

from __future__ import annotations

import fcntl
import os
from typing import Any, Protocol

from sparsemem._sys._shim import ffi, lib


class Calls(Protocol):
    """What a region needs from an operating system."""

    def reserve(
        self, length: int, align: int, flags: int, fd: int, *, writable: bool, locked: bool, offset: int = 0
    ) -> int: ...
    def reserve_placeholder(self, address: int, length: int) -> None: ...
    def unmap(self, address: int, length: int) -> None: ...
    def madvise(self, address: int, length: int, advice: int) -> None: ...
    def read_memory(self, address: int, length: int) -> bytes: ...
    def write_memory(self, address: int, data: bytes) -> None: ...
    def load16(self, address: int) -> int: ...
    def store16(self, address: int, value: int) -> None: ...
    def protect(self, address: int, length: int, access: int) -> None: ...
    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None: ...
    def memfd_create(self, name: str, flags: int) -> int: ...
    def memfd_secret(self) -> int: ...
    def name_mapping(self, address: int, length: int, name: str) -> None: ...
    def bind(self, address: int, length: int, node: int) -> None: ...
    def filesystem(self, fd: int) -> tuple[int, int]: ...
    def open(self, path: str, flags: int, mode: int) -> int: ...
    def duplicate(self, fd: int) -> int: ...
    def close(self, fd: int) -> None: ...
    def unlink(self, path: str) -> None: ...
    def lstat(self, path: str) -> os.stat_result: ...
    def fstat(self, fd: int) -> os.stat_result: ...
    def ftruncate(self, fd: int, length: int) -> None: ...
    def statvfs(self, fd: int) -> os.statvfs_result: ...
    def lseek(self, fd: int, offset: int, whence: int) -> int: ...
    def pread(self, fd: int, length: int, offset: int) -> bytes: ...
    def pwrite(self, fd: int, data: Any, offset: int) -> int: ...
    def fsync(self, fd: int) -> None: ...
    def open_in(self, folder: int, name: str, flags: int, mode: int) -> int: ...
    def stat_in(self, folder: int, name: str) -> os.stat_result: ...
    def link_in(self, fd: int, folder: int, name: str) -> None: ...
    def rename_in(self, folder: int, old: str, new: str) -> None: ...
    def unlink_in(self, folder: int, name: str) -> None: ...
    def open_flags(self, fd: int) -> int: ...
    def seals(self, fd: int) -> int: ...
    def add_seals(self, fd: int, seals: int) -> None: ...
    def userfaultfd(self, out: Any) -> None: ...
    def register(self, uffd: Any, address: int, length: int) -> int: ...
    def can_vector(self) -> bool: ...
    def advance(self, job: Any, budget_ns: int) -> int: ...
    def save(self, job: Any, budget_ns: int) -> int: ...
    def load(self, job: Any, budget_ns: int) -> int: ...


def check(returned: int) -> int:
    """Raises the OSError of a -errno, else hands the value on."""
    if returned < 0:
        raise OSError(-returned, os.strerror(-returned))
    return returned


class Kernel:
    """The Linux kernel, through the shim where Python has no call or would hold the GIL."""

    def reserve(
        self, length: int, align: int, flags: int, fd: int, *, writable: bool, locked: bool, offset: int = 0
    ) -> int:
        """Maps `length` bytes at a multiple of `align`, unlocked and unpopulated even under mlockall()."""
        address = ffi.new("uint64_t *")
        check(lib.sm_reserve(length, align, flags, fd, offset, writable, locked, address))
        return int(address[0])

    def reserve_placeholder(self, address: int, length: int) -> None:
        """Maps plain memory at a free address; EEXIST if something is there."""
        check(lib.sm_reserve_placeholder(address, length))

    def unmap(self, address: int, length: int) -> None:
        check(lib.sm_unmap(address, length))

    def madvise(self, address: int, length: int, advice: int) -> None:
        check(lib.sm_madvise(address, length, advice))

    def read_memory(self, address: int, length: int) -> bytes:
        """A copy of our own memory: EFAULT where a load would be SIGBUS."""
        out = ffi.new("char[]", length)
        check(lib.sm_read_memory(address, out, length))
        return bytes(ffi.buffer(out, length))

    def write_memory(self, address: int, data: bytes) -> None:
        """Copies into our own memory: EFAULT where a store would be SIGBUS; some of it may be done then."""
        check(lib.sm_write_memory(address, ffi.from_buffer(data), len(data)))

    def load16(self, address: int) -> int:
        """A number in our own memory that others change: one access, with acquire; EFAULT instead of SIGBUS."""
        return check(lib.sm_shared_load16(address))

    def store16(self, address: int, value: int) -> None:
        """Stores a number that others look at: one access, with release and a full fence; EFAULT as above."""
        check(lib.sm_shared_store16(address, value))

    def protect(self, address: int, length: int, access: int) -> None:
        check(lib.sm_protect(address, length, access))

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        check(lib.sm_fallocate(fd, mode, offset, length))

    def memfd_create(self, name: str, flags: int) -> int:
        return check(lib.sm_memfd_create(name.encode(), flags))

    def memfd_secret(self) -> int:
        return check(lib.sm_memfd_secret(os.O_CLOEXEC))

    def name_mapping(self, address: int, length: int, name: str) -> None:
        check(lib.sm_name_mapping(address, length, name.encode()))

    def bind(self, address: int, length: int, node: int) -> None:
        """Has all pages of the range come from one NUMA node (mbind(2), MPOL_BIND)."""
        check(lib.sm_bind(address, length, node))

    def filesystem(self, fd: int) -> tuple[int, int]:
        """The file system's magic number and its block size (on hugetlbfs: the page size)."""
        block_size = ffi.new("uint64_t *")
        magic = lib.sm_filesystem_type(fd, block_size)
        return check(magic), int(block_size[0])

    def open(self, path: str, flags: int, mode: int) -> int:
        return os.open(path, flags, mode)

    def duplicate(self, fd: int) -> int:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)

    def close(self, fd: int) -> None:
        os.close(fd)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def lstat(self, path: str) -> os.stat_result:
        return os.lstat(path)

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def ftruncate(self, fd: int, length: int) -> None:
        os.ftruncate(fd, length)

    def statvfs(self, fd: int) -> os.statvfs_result:
        return os.statvfs(fd)

    def lseek(self, fd: int, offset: int, whence: int) -> int:
        return os.lseek(fd, offset, whence)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        return os.pread(fd, length, offset)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def open_in(self, folder: int, name: str, flags: int, mode: int) -> int:
        return os.open(name, flags, mode, dir_fd=folder)

    def stat_in(self, folder: int, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)

    def link_in(self, fd: int, folder: int, name: str) -> None:
        """Gives a name to a file that has none (O_TMPFILE), as open(2) says how without a privilege."""
        # With a folder Python calls linkat(AT_SYMLINK_FOLLOW), without one link(), which would not follow.
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder, follow_symlinks=True)

    def rename_in(self, folder: int, old: str, new: str) -> None:
        os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)

    def unlink_in(self, folder: int, name: str) -> None:
        os.unlink(name, dir_fd=folder)

    def open_flags(self, fd: int) -> int:
        return fcntl.fcntl(fd, fcntl.F_GETFL)

    def seals(self, fd: int) -> int:
        return fcntl.fcntl(fd, lib.F_GET_SEALS)

    def add_seals(self, fd: int, seals: int) -> None:
        fcntl.fcntl(fd, lib.F_ADD_SEALS, seals)

    def userfaultfd(self, out: Any) -> None:
        """Opens one, and what it needs, into an `sm_uffd`."""
        check(lib.sm_uffd_open(out))

    def register(self, uffd: Any, address: int, length: int) -> int:
        """Registers a range with it; the mask of what may be done there."""
        return check(lib.sm_uffd_register(uffd, address, length))

    def can_vector(self) -> bool:
        """Whether process_madvise(2) works on ourselves; tried on pages of its own."""
        return bool(lib.sm_can_vector())

    def advance(self, job: Any, budget_ns: int) -> int:
        """Runs the engine's loop for about `budget_ns`; lib.SM_OK, lib.SM_MORE or -errno.

        Not an OSError, since the job's cursor is as much the result as the errno.
        """
        return int(lib.sm_advance(job, budget_ns))

    def save(self, job: Any, budget_ns: int) -> int:
        """Saves chunks (`sm_save`) for about `budget_ns`; lib.SM_OK, lib.SM_MORE or -errno."""
        return int(lib.sm_save_advance(job, budget_ns))

    def load(self, job: Any, budget_ns: int) -> int:
        """Loads chunks (`sm_load`) for about `budget_ns`; lib.SM_OK, lib.SM_MORE or -errno."""
        return int(lib.sm_load_advance(job, budget_ns))


kernel: Calls = Kernel()
