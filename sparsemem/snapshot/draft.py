"""A file that gets its name when it is whole, in place of what had the name before."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import Any, NoReturn

from sparsemem._sys.calls import Calls
from sparsemem._sys.descriptor import Descriptor
from sparsemem.errors import SnapshotError
from sparsemem.snapshot.telling import about

# What O_TMPFILE gives on a file system without it, and where nobody knows the flag: open(2).
_NO_UNNAMED = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)


class Draft:
    """A new file of mode 0600; `publish` gives it its name, `discard` lets go of it.

    It has no name while it is written (O_TMPFILE), so that it is gone if the process is killed.
    Where the file system has no such thing it has one that begins with a dot.  Only once all of
    it is on the disk it takes the place of what had the name: that is one step, and whoever
    opens the name has one of the two, whole.

    Everything is relative to the folder that was opened first, wherever that is moved to.

    Args:
        calls: What reaches the kernel.
        path: What it will be called.
        follow_symlinks: If there is a symbolic link of that name, write what it points to.

    It has no effect until `open`, and none that stays if `discard` is called, however far it came.

    Raises:
        SnapshotIOError: From all of its methods: the disk is full, for one.
    """

    def __init__(self, calls: Calls, path: str, *, follow_symlinks: bool) -> None:
        self._calls = calls
        self._path = path
        self._follow = follow_symlinks
        self._name = ""
        self._temporary: str | None = None
        self._process = os.getpid()
        self._folder: Descriptor | None = None
        self._file: Descriptor | None = None

    def open(self) -> None:
        """Makes the file.

        Raises:
            SnapshotIOError: The folder cannot be written to, or there is something of that
                name that is no file.
        """
        with self._about():
            folder, self._name = os.path.split(os.path.realpath(self._path) if self._follow else self._path)
            if self._name in ("", ".", ".."):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            self._folder = Descriptor(self._calls.open(folder or ".", flags, 0), self._calls)
            self._check_target()
            self._file = self._create()

    def _about(self) -> contextlib.AbstractContextManager[None]:
        return about(self._path, "write")

    @property
    def fd(self) -> int:
        """Its descriptor."""
        assert self._file is not None
        return self._file.fd

    @property
    def _place(self) -> int:
        assert self._folder is not None
        return self._folder.fd

    @property
    def identity(self) -> tuple[int, int]:
        """Its device and inode."""
        with self._about():
            found = self._calls.fstat(self.fd)
        return found.st_dev, found.st_ino

    def spare(self, files: tuple[tuple[int, int], ...]) -> None:
        """Refuses to take the place of one of these files, given as device and inode.

        Raises:
            SnapshotError: It has the name.
        """
        with self._about(), contextlib.suppress(FileNotFoundError):
            found = self._calls.stat_in(self._place, self._name)
            if (found.st_dev, found.st_ino) in files:
                raise SnapshotError("is one that the new one needs, and must not be replaced by it")

    def _check_target(self) -> None:
        # A look beforehand, to say so before any work; what is put there later is replaced
        # and not followed, since rename(2) follows nothing.
        try:
            mode = self._calls.stat_in(self._place, self._name).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISLNK(mode):
            raise OSError(errno.ELOOP, "it is a symbolic link, which is only followed with follow_symlinks=True")
        if not stat.S_ISREG(mode):
            raise OSError(errno.EEXIST, "there is something of that name that is no file")

    def _create(self) -> Descriptor:
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            return Descriptor(self._calls.open_in(self._place, ".", flags | os.O_TMPFILE, 0o600), self._calls)
        except OSError as error:
            if error.errno not in _NO_UNNAMED:
                raise
        self._temporary = self._new_name()  # first, so that whatever comes in between, it is removed
        flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        return Descriptor(self._calls.open_in(self._place, self._temporary, flags, 0o600), self._calls)

    def _new_name(self) -> str:
        """One that nobody guesses, and that fits where the name itself fits."""
        return f".{self._name[:200]}.{os.urandom(8).hex()}.tmp"

    def write(self, data: Any, offset: int) -> int:
        """Writes all of it; the bytes."""
        view = memoryview(data).cast("B")
        done = 0
        with self._about():
            while done < len(view):
                put = self._calls.pwrite(self.fd, view[done:], offset + done)
                if not put:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                done += put
        return done

    def lengthen(self, size: int) -> None:
        """Makes it so long, by a hole: a file that would be too large is refused before any work."""
        with self._about():
            self._calls.ftruncate(self.fd, size)

    def fail(self, code: int) -> NoReturn:
        """Raises the error of what somebody else could not write to it."""
        with self._about():
            raise OSError(code, os.strerror(code))

    def publish(self) -> None:
        """Gives it its name; on a disk that keeps its word, for good when this returns."""
        calls, folder = self._calls, self._place
        with self._about():
            calls.fsync(self.fd)
            if self._temporary is None:
                # linkat(2) does not replace, so it takes a step in between.
                self._temporary = self._new_name()
                calls.link_in(self.fd, folder, self._temporary)
            calls.rename_in(folder, self._temporary, self._name)
            self._temporary = None
            try:
                calls.fsync(folder)
            except OSError as error:
                # What had the name is gone: nobody could put it back so that that would last.
                code = error.errno or errno.EIO
                raise OSError(code, f"it is whole and has its name, but might lose it: {os.strerror(code)}") from error

    def discard(self) -> None:
        """Lets go of it; a file that has not got its name is gone, unless this is a child of who made it."""
        if self._temporary is not None and self._folder is not None and os.getpid() == self._process:
            with contextlib.suppress(OSError):  # renamed already, for one
                self._calls.unlink_in(self._folder.fd, self._temporary)
        for descriptor in (self._file, self._folder):
            if descriptor is not None:
                descriptor.close()
