"""Small files that are replaced as a whole: a reader, also after a crash, finds the old content or the new."""

from __future__ import annotations

import contextlib
import os


def read_private(path: str, most: int) -> bytes | None:
    """The content; None if there is no such file.

    Raises:
        OSError: It is a symbolic link, or cannot be read.
        ValueError: It is too long, no ordinary file, or others may write to it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        about = os.fstat(fd)
        if about.st_uid not in (0, os.geteuid()) or about.st_mode & 0o022:
            raise ValueError(f"{path}: others may write to it")
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path}: more than {most} bytes")
    return content


def replace(path: str, content: bytes) -> None:
    """Puts a file with this content (mode 0600) in the place of whatever is there.

    It is on the disk before it has the name, and the name is before this returns.

    Raises:
        OSError: It could not be done; what was there before still is.
    """
    fresh = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(fresh)  # of a crash
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(fresh, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
