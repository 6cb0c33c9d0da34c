"""A tmpfs of the region's own: huge pages whatever the machine's setting, and a limit if one is wanted."""

from __future__ import annotations

from typing import Any

from attrs import field, frozen

from sparsemem._sys import calls as _calls
from sparsemem._sys import lib, tmpfs
from sparsemem._sys.calls import Calls
from sparsemem._sys.descriptor import Descriptor
from sparsemem._sys.files import PAGE_SIZE
from sparsemem.backends.adopted import fit_size
from sparsemem.backends.base import Backend, Request
from sparsemem.backends.kernel import Area, KernelMapping, reserving
from sparsemem.backends.numa import check_node
from sparsemem.backends.options import optional_switch, switch
from sparsemem.backends.strategies import check_strategy
from sparsemem.backends.text import options_text
from sparsemem.errors import UnsupportedError
from sparsemem.recipes import Kind
from sparsemem.units import Size, parse_size

HUGE = ("always", "within_size", "advise", "never")


def _check_huge(huge: str) -> str:
    if huge not in HUGE:
        raise ValueError(f"huge {huge!r} is none of {', '.join(map(repr, HUGE))}")
    return huge


@frozen(kw_only=True)
class Tmpfs(Backend):
    """An unnamed file on a tmpfs that is mounted nowhere and goes with the region.

    It needs CAP_SYS_ADMIN, or user namespaces to have it in.

    Args:
        limit: Bytes that the tmpfs may have at most; by default as much as there is.
            Running out is ENOSPC then, which hurts nobody else.
        huge: The tmpfs's huge= option (tmpfs(5)), which counts whatever the machine's
            shmem_enabled says.
        shared: As for `Memfd`; so is `thp`.
        thp: Transparent huge pages; see `Anonymous`.
        strategy: How to populate, by name; see `sparsemem.recipes.STRATEGIES`.
        numa_node: As for `Memfd`.
    """

    limit: Size | None = None
    huge: str = field(default="always", converter=_check_huge)
    shared: bool = field(default=True, validator=switch)
    thp: bool | None = field(default=None, validator=optional_switch)
    strategy: str = field(default="auto", converter=check_strategy)
    numa_node: int | None = field(default=None, validator=check_node)
    _limit: int = field(init=False, repr=False)

    @_limit.default
    def _parse_limit(self) -> int:
        if self.limit is None:
            return 0
        size = parse_size(self.limit, "limit")
        if size < PAGE_SIZE:
            raise ValueError(f"limit {size} is less than a page of {PAGE_SIZE} bytes")
        return size

    @property
    def page_size(self) -> int:
        return PAGE_SIZE

    def reserve(self, request: Request) -> KernelMapping:
        calls = _calls.kernel
        fd = reserving(lambda: self._create(calls, request), "cannot make a file on a tmpfs of its own")
        kind = Kind.SHMEM_SHARED if self.shared else Kind.SHMEM_PRIVATE
        flags = lib.MAP_SHARED if self.shared else lib.MAP_PRIVATE
        with fd.closed_on_error():
            area = Area(kind=kind, flags=flags, page_size=PAGE_SIZE, fd=fd, thp=self.thp, numa_node=self.numa_node)
            return KernelMapping(area, request, self.strategy)

    def _create(self, calls: Calls, request: Request) -> Descriptor:
        try:
            number = tmpfs.detached_file(self._limit, self.huge)
        except OSError as refused:
            try:
                number = tmpfs.user_file(self._limit, self.huge)
            except OSError as error:
                raise UnsupportedError(
                    f"a tmpfs of its own cannot be had: {refused.strerror}; nor in a user namespace: {error.strerror}"
                ) from error
        fd = Descriptor(number, calls)
        with fd.closed_on_error():
            fit_size(calls, fd.fd, 0, request.size)
        return fd

    def __str__(self) -> str:
        options: dict[str, Any] = {
            "limit": self._limit or None,
            "huge": None if self.huge == "always" else self.huge,
            "private": not self.shared,
            "thp": self.thp,
            "strategy": None if self.strategy == "auto" else self.strategy,
            "numa_node": self.numa_node,
        }
        return options_text("tmpfs", options)
