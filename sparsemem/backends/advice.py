"""Which advice a mapping can follow: to collapse into huge pages, to be cold, to be paged out."""

from __future__ import annotations

from sparsemem._sys import probe
from sparsemem._sys.calls import Calls
from sparsemem._sys.files import PAGE_SIZE, shared_files, thp_size
from sparsemem.recipes import COLLAPSES, Kind
from sparsemem.units import exact_size


def refusal(calls: Calls, kind: Kind, page_size: int, thp: bool | None, advice: str) -> str:
    """Why such a mapping cannot follow `collapse`, `cold` or `pageout`; "" if it can."""
    if kind is Kind.SECRET:
        return "secret memory has small pages, which stay where they are"
    if page_size > PAGE_SIZE:
        return f"hugetlb pages of {exact_size(page_size)} are huge already, and stay where they are"
    if advice == "collapse":
        return _no_collapse(calls, kind, thp)
    works = probe.cold if advice == "cold" else probe.pageout
    return "" if works(calls) else f"this kernel has no MADV_{advice.upper()} (Linux 5.4)"


def _no_collapse(calls: Calls, kind: Kind, thp: bool | None) -> str:
    if kind not in COLLAPSES:
        return f"the pages of a {kind.value} cannot be made huge"
    huge = thp_size(shared_files())
    if huge is None:
        return "this kernel has no transparent huge pages"
    if not thp:
        return f"its transparent huge pages are off: thp=False, or blocks smaller than {exact_size(huge)}"
    if kind is Kind.ANONYMOUS_PRIVATE:
        works, unless = probe.collapse_private(calls), "PR_SET_THP_DISABLE"
    else:
        works, unless = probe.collapse(calls), "shmem_enabled=deny"
    return "" if works else f"MADV_COLLAPSE does not work here (Linux 6.1; not with {unless})"
