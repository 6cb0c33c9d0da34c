"""memfd_secret: memory that not even the kernel's own mappings show."""

from __future__ import annotations

from attrs import frozen

from sparsemem._sys import calls as _calls
from sparsemem._sys import lib
from sparsemem._sys.descriptor import Descriptor
from sparsemem._sys.files import PAGE_SIZE
from sparsemem.backends.base import Backend, Request
from sparsemem.backends.kernel import Area, KernelMapping
from sparsemem.errors import ReserveError, UnsupportedError
from sparsemem.recipes import Kind

_ABSENT = (38, 22, 1)  # ENOSYS, EINVAL, EPERM: not built in, switched off, filtered


@frozen(kw_only=True)
class Secret(Backend):
    """memfd_secret() memory; plug-only, since nothing can make it give memory back.

    Unplug, shrinking and cancelling are refused.  A plug that fails leaves its
    blocks tainted, zeroed and never plugged.  The whole reservation counts
    against RLIMIT_MEMLOCK of an unprivileged user.
    """

    @property
    def page_size(self) -> int:
        return PAGE_SIZE

    def reserve(self, request: Request) -> KernelMapping:
        calls = _calls.kernel
        try:
            fd = Descriptor(calls.memfd_secret(), calls)
        except OSError as error:
            if error.errno in _ABSENT:
                raise UnsupportedError(f"this kernel has no memfd_secret: {error.strerror}") from error
            raise ReserveError(error.errno, f"cannot make a memfd_secret: {error.strerror}") from error
        with fd.closed_on_error():
            try:
                calls.ftruncate(fd.fd, request.size)
            except OSError as error:
                raise ReserveError(error.errno, f"cannot size a memfd_secret: {error.strerror}") from error
            area = Area(kind=Kind.SECRET, flags=lib.MAP_SHARED, page_size=PAGE_SIZE, fd=fd)
            return KernelMapping(area, request, "auto")
