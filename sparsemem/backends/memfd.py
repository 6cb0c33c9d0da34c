"""memfd: memory with a descriptor, that other processes can map."""

from __future__ import annotations

from typing import Any

from attrs import field, frozen

from sparsemem._sys import calls as _calls
from sparsemem._sys import lib
from sparsemem._sys.calls import Calls
from sparsemem._sys.descriptor import Descriptor
from sparsemem.backends.adopted import adopt_mapping, fit_size, kind_of
from sparsemem.backends.allocated import check_existing
from sparsemem.backends.base import Backend, Request
from sparsemem.backends.kernel import Area, KernelMapping, page_flags, reserving
from sparsemem.backends.numa import check_node
from sparsemem.backends.options import optional_switch, switch
from sparsemem.backends.pages import block_size_for, huge_text, resolve_page_size
from sparsemem.backends.strategies import check_strategy
from sparsemem.backends.text import options_text
from sparsemem.recipes import Kind
from sparsemem.units import Size


@frozen(kw_only=True)
class Memfd(Backend):
    """memfd_create() memory.

    Args:
        shared: Map it MAP_SHARED, so that the descriptor is the memory.  With
            False the region's pages are private copies and the file stays empty;
            with `fd` it is a *template*: fresh blocks show the file's content.
        hugetlb: Take pages from the huge page pool: True, or a size as "2M".
        thp: Transparent huge pages; see `Anonymous`.
        seal: Seal it against shrinking and growing, so that no peer can make an
            access SIGBUS by truncating it.
        fd: Adopt this memfd instead of making one.  The descriptor is borrowed:
            it is duplicated, and stays open when the region closes.
        existing: As for `File`, for an adopted descriptor.
        strategy: How to populate, by name; see `sparsemem.recipes.STRATEGIES`.
        numa_node: Take all memory from this NUMA node (mbind(2), MPOL_BIND), and
            populate on its processors.  None takes it from wherever there is some.
            Pages that an adopted memfd has already stay where they are.
    """

    shared: bool = field(default=True, validator=switch)
    hugetlb: bool | Size | None = None
    thp: bool | None = field(default=None, validator=optional_switch)
    seal: bool = field(default=True, validator=switch)
    fd: int | None = None
    existing: str = field(default="error", converter=check_existing)
    strategy: str = field(default="auto", converter=check_strategy)
    numa_node: int | None = field(default=None, validator=check_node)
    _page_size: int = field(init=False, repr=False)

    @_page_size.default
    def _find_page_size(self) -> int:
        if self.fd is not None:
            return kind_of(_calls.kernel, self.fd, self.shared)[1]
        return resolve_page_size(self.hugetlb)

    @property
    def page_size(self) -> int:
        return self._page_size

    @property
    def preferred_block_size(self) -> int:
        return block_size_for(self._page_size)

    def reserve(self, request: Request) -> KernelMapping:
        calls = _calls.kernel
        flags = lib.MAP_SHARED if self.shared else lib.MAP_PRIVATE
        if self.fd is not None:
            return adopt_mapping(calls, self, self.fd, request, self.strategy)
        huge = self._page_size if self.hugetlb else 0
        fd = reserving(lambda: self._create(calls, request, huge), "cannot make a memfd")
        kind = (
            (Kind.HUGETLB_SHARED if self.shared else Kind.HUGETLB_PRIVATE)
            if huge
            else (Kind.SHMEM_SHARED if self.shared else Kind.SHMEM_PRIVATE)
        )
        with fd.closed_on_error():
            area = Area(
                kind=kind, flags=flags, page_size=self._page_size, fd=fd, thp=self.thp, numa_node=self.numa_node
            )
            return KernelMapping(area, request, self.strategy)

    def _create(self, calls: Calls, request: Request, huge: int) -> Descriptor:
        flags = lib.MFD_CLOEXEC | (lib.MFD_ALLOW_SEALING if self.seal else 0)
        if huge:
            flags |= lib.MFD_HUGETLB | page_flags(huge)
        fd = Descriptor(calls.memfd_create(request.name, flags), calls)
        with fd.closed_on_error():
            fit_size(calls, fd.fd, 0, request.size)
            if self.seal:
                calls.add_seals(fd.fd, lib.F_SEAL_SHRINK | lib.F_SEAL_GROW | lib.F_SEAL_SEAL)
        return fd

    def __str__(self) -> str:
        options: dict[str, Any] = {
            "private": not self.shared,
            "hugetlb": huge_text(self.hugetlb, self._page_size),
            "thp": self.thp,
            "seal": None if self.seal else False,
            "fd": self.fd,
            "existing": None if self.existing == "error" else self.existing,
            "strategy": None if self.strategy == "auto" else self.strategy,
            "numa_node": self.numa_node,
        }
        return options_text("memfd", options)
