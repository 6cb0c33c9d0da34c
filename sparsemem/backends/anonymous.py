"""Anonymous memory: no file, gone with the process."""

from __future__ import annotations

from typing import Any

from attrs import field, frozen

from sparsemem._sys import lib
from sparsemem.backends.base import Backend, Request
from sparsemem.backends.kernel import Area, KernelMapping, page_flags
from sparsemem.backends.numa import check_node
from sparsemem.backends.options import optional_switch, switch
from sparsemem.backends.pages import block_size_for, huge_text, resolve_page_size
from sparsemem.backends.strategies import check_strategy
from sparsemem.backends.text import options_text
from sparsemem.recipes import Kind
from sparsemem.units import Size


@frozen(kw_only=True)
class Anonymous(Backend):
    """MAP_ANONYMOUS memory.

    Args:
        shared: Stay one memory with child processes (MAP_SHARED).
        hugetlb: Take pages from the huge page pool: True for the machine's
            default size, or a size such as "2M" or "1G".
        thp: Transparent huge pages: None is on for blocks of at least a huge
            page and off for smaller ones, True insists, False forbids.
        strategy: How to populate, by name; see `sparsemem.recipes.STRATEGIES`.
        numa_node: Take all memory from this NUMA node (mbind(2), MPOL_BIND), and
            populate on its processors.  None takes it from wherever there is some.
    """

    shared: bool = field(default=False, validator=switch)
    hugetlb: bool | Size | None = None
    thp: bool | None = field(default=None, validator=optional_switch)
    strategy: str = field(default="auto", converter=check_strategy)
    numa_node: int | None = field(default=None, validator=check_node)
    _page_size: int = field(init=False, repr=False)

    @_page_size.default
    def _find_page_size(self) -> int:
        return resolve_page_size(self.hugetlb)

    @property
    def page_size(self) -> int:
        return self._page_size

    @property
    def preferred_block_size(self) -> int:
        return block_size_for(self._page_size)

    def reserve(self, request: Request) -> KernelMapping:
        flags = (lib.MAP_SHARED if self.shared else lib.MAP_PRIVATE) | lib.MAP_ANONYMOUS
        kind = Kind.ANONYMOUS_SHARED if self.shared else Kind.ANONYMOUS_PRIVATE
        if self.hugetlb:
            flags |= lib.MAP_HUGETLB | page_flags(self._page_size)
            kind = Kind.ANONYMOUS_HUGETLB_SHARED if self.shared else Kind.ANONYMOUS_HUGETLB
        area = Area(kind=kind, flags=flags, page_size=self._page_size, thp=self.thp, numa_node=self.numa_node)
        return KernelMapping(area, request, self.strategy)

    def __str__(self) -> str:
        options: dict[str, Any] = {
            "shared": self.shared,
            "hugetlb": huge_text(self.hugetlb, self._page_size),
            "thp": self.thp,
            "strategy": None if self.strategy == "auto" else self.strategy,
            "numa_node": self.numa_node,
        }
        return options_text("anonymous", options)
