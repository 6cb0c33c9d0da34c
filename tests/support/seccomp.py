"""System calls that fail as on another kernel: a filter for this process and all that it starts, for good."""

from __future__ import annotations

import ctypes
import struct

Step = tuple[int, int, int, int]

ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2


def load_number() -> Step:
    """Loads the system call's number."""
    return 0x20, 0, 0, 0


def load_argument(index: int) -> Step:
    """Loads the lower half of an argument, counted from 0."""
    return 0x20, 0, 0, 16 + index * 8


def jump_unless(value: int, skip: int) -> Step:
    """Skips so many steps unless what is loaded is the value."""
    return 0x15, 0, skip, value


def fail(errno: int) -> Step:
    """Ends: the call fails."""
    return 0x06, 0, 0, _ERRNO | errno


def allow() -> Step:
    """Ends: the call is made."""
    return 0x06, 0, 0, ALLOW


def install(steps: list[Step]) -> None:
    """Installs the filter in this process.

    Raises:
        OSError: It cannot be.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, program, 0, 0):
        raise OSError(ctypes.get_errno(), "no seccomp filter can be installed here")
