"""Which protection of unplugged blocks a mapping can have; what it cannot is refused with the reason.

Each way is tried on memory of our own (`_sys.probe`), never looked up by the kernel's version.
"""

from __future__ import annotations

from sparsemem._sys import probe
from sparsemem._sys.calls import Calls
from sparsemem._sys.files import PAGE_SIZE
from sparsemem.errors import UnsupportedError
from sparsemem.recipes import GUARD, PROT_NONE, PROTECTIONS, RECIPES, TRAP, Kind, Step
from sparsemem.units import exact_size

_NO_HUGE_PAGES = "thp=True does not go with protection='trap': the kernel makes no huge pages of memory that traps"


def check_protection(protection: str) -> str:
    """The protection, or a ValueError that lists them."""
    if protection not in PROTECTIONS:
        raise ValueError(f"protection {protection!r} is none of {', '.join(map(repr, PROTECTIONS))}")
    return protection


def require_protection(
    calls: Calls, kind: Kind, page_size: int, protection: str, *, thp: bool | None, catch: bool
) -> None:
    """Sees to it that such a mapping can have the protection.

    Raises:
        ValueError: Another option stands against it.
        UnsupportedError: The kind of mapping or the kernel has no such thing.
    """
    if protection == TRAP and thp:
        raise ValueError(_NO_HUGE_PAGES)
    missing = refusal(calls, kind, page_size, protection)
    if missing:
        raise UnsupportedError(f"protection={protection!r} does not work on {kind.value}: {missing}")
    if catch and not probe.catch(calls):
        raise UnsupportedError("catch_stray does not work here: no userfaultfd with UFFDIO_POISON (Linux 6.6)")


def refusal(calls: Calls, kind: Kind, page_size: int, protection: str) -> str:
    """Why a kind of mapping cannot have a protection; "" if it can."""
    if protection == "none":
        return ""
    if kind is Kind.SECRET:
        return "its blocks are never unplugged, and what a plug that fails leaves behind has to be zeroed"
    return {TRAP: _no_trap, GUARD: _no_guard, PROT_NONE: _no_prot_none}[protection](calls, kind, page_size)


def _no_trap(calls: Calls, kind: Kind, page_size: int) -> str:
    if kind is Kind.TEMPLATE:
        return "a template's pages are the file's, and filling one in would hide them"
    if not RECIPES[kind].trapped:
        return "the kernel traps no accesses to files on disks; a tmpfs or a memfd would do"
    if not probe.populate_write(calls):
        return "this kernel has no MADV_POPULATE_WRITE (Linux 5.14), which maps pages that are there"
    return "" if probe.trap(calls) else "no userfaultfd that traps may be had (UFFD_FEATURE_SIGBUS, Linux 4.14)"


def _no_guard(calls: Calls, kind: Kind, page_size: int) -> str:
    if page_size > PAGE_SIZE:
        return f"hugetlb pages of {exact_size(page_size)} cannot be guarded; 'trap' and 'prot_none' work on them"
    return "" if probe.guard(calls) else "this kernel has no MADV_GUARD_INSTALL that audits can see (Linux 6.15)"


def _no_prot_none(calls: Calls, kind: Kind, page_size: int) -> str:
    if Step.REMOVE in RECIPES[kind].discard and not probe.removes_forbidden(calls):
        return "this kernel does not discard shared memory that is PROT_NONE"
    return ""
