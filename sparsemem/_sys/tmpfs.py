"""Files on a tmpfs of their own, which no path leads to.

It has a size of its own, and huge pages whatever the machine's setting.  It takes
privileges, or a user namespace to have them in.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, NoReturn

from sparsemem._sys import lib
from sparsemem._sys.calls import check

if TYPE_CHECKING:
    import socket


def detached_file(size: int, huge: str = "never") -> int:
    """A descriptor of an unnamed file on a tmpfs that is mounted nowhere.

    Args:
        size: Bytes that the tmpfs may have; 0 for no limit.
        huge: Its `huge=` option (tmpfs(5)).

    Raises:
        OSError: It takes CAP_SYS_ADMIN, and Linux 5.2.
    """
    mount = check(lib.sm_detached_tmpfs(str(size).encode(), huge.encode()))
    try:
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=mount)
    finally:
        os.close(mount)


def user_file(size: int, huge: str = "never") -> int:
    """As `detached_file` for those who may not mount: made in a user namespace of their own.

    A child enters it and hands the descriptor over; the file stays when it is gone.

    Raises:
        OSError: User namespaces are switched off, or the child failed otherwise.
    """
    import socket
    import warnings

    ours, theirs = socket.socketpair()
    with ours, theirs:
        with warnings.catch_warnings():
            # 3.12 warns of forks beside threads: this child takes no lock and leaves.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            _hand_over(theirs, size, huge)
        theirs.close()
        try:
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        finally:
            _, status = os.waitpid(child, 0)
    if not fds:
        code = os.waitstatus_to_exitcode(status)
        code = code if code > 0 else errno.EIO
        raise OSError(code, os.strerror(code))
    os.set_inheritable(fds[0], False)  # what arrives through a socket is open to children
    return fds[0]


def _hand_over(to: socket.socket, size: int, huge: str) -> NoReturn:
    """The child's whole life; its exit status is the errno of what went wrong."""
    import socket

    status = errno.EIO
    try:
        user, group = os.geteuid(), os.getegid()
        check(lib.sm_enter_namespaces())
        # Without a mapping of our own ids no file can be made.
        for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{name}", "w", encoding="utf-8") as file:
                file.write(line)
        socket.send_fds(to, [b"f"], [detached_file(size, huge)])
        status = 0
    except OSError as error:
        status = error.errno or errno.EIO
    finally:
        os._exit(status)
