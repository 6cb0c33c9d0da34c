"""The only place that makes system calls or reads /proc and /sys.

`calls` holds the system calls (replaceable for tests), `files` what the kernel
tells in text files, `residency` what it tells about pages, `probe` what this
kernel can do, found by trying.  `ffi` and `lib` are the C shim, whose bitmap,
block map and chunk loop touch no memory but what they are given.
"""

from sparsemem._sys._shim import ffi, lib

__all__ = ["ffi", "lib"]
