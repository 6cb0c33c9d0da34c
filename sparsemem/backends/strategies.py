"""The ways of populating: which of them a kind of mapping has, and which work here."""

from __future__ import annotations

from collections.abc import Mapping

from sparsemem._sys import probe
from sparsemem._sys.calls import Calls
from sparsemem.errors import UnsupportedError
from sparsemem.recipes import (
    COLLAPSE,
    FASTEST,
    FUTEX,
    RECIPES,
    STRATEGIES,
    TOUCH,
    TRAP,
    UFFD_COPY,
    UFFD_ZEROPAGE,
    Kind,
)

UFFD = (UFFD_COPY, UFFD_ZEROPAGE)
"""Those that need the mapping to be registered with a userfaultfd."""


def check_strategy(strategy: str) -> str:
    """The strategy, or a ValueError that lists them."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is none of {', '.join(map(repr, STRATEGIES))}")
    return strategy


def choose_strategy(kind: Kind, wanted: str, calls: Calls, *, huge: bool, protection: str = "none") -> str:
    """The strategy by name; `auto` is the best that works here.

    Raises:
        UnsupportedError: The kernel or the kind of mapping has no such way.
    """
    possible = RECIPES[kind].ways(huge=huge, protection=protection)
    if protection == TRAP:
        return _choose_trapped(possible, wanted)
    if wanted == "auto":
        return next(way for way in FASTEST[huge] if way in possible and not _missing(way, kind, calls))
    if wanted not in possible:
        pages = "huge" if huge else "small"
        raise UnsupportedError(
            f"strategy {wanted!r} does not work on {kind.value} with {pages} pages: only {', '.join(possible)}"
        )
    missing = _missing(wanted, kind, calls)
    if missing:
        raise UnsupportedError(f"strategy {wanted!r} does not work here: {missing}")
    return wanted


def _choose_trapped(possible: Mapping[str, object], wanted: str) -> str:
    """Of those that fill memory which traps; that they work was tried with the trap (`probe.trap`)."""
    if wanted == "auto":
        return next(way for way in FASTEST[False] if way in possible)
    if wanted not in possible:
        raise UnsupportedError(
            f"strategy {wanted!r} would itself be trapped: with protection='trap' only {', '.join(possible)}"
        )
    return wanted


def _missing(strategy: str, kind: Kind, calls: Calls) -> str:
    """What the kernel lacks for a strategy, or ""."""
    if strategy in (FUTEX, TOUCH):
        return ""
    if not probe.populate_write(calls):
        return "this kernel has no MADV_POPULATE_WRITE (Linux 5.14); strategy='futex' works"
    if strategy == COLLAPSE and not probe.collapse(calls):
        return "MADV_COLLAPSE does not make huge pages of shared memory (Linux 6.1; not with shmem_enabled=deny)"
    if strategy in UFFD:
        fills = probe.uffd_copy if kind is Kind.ANONYMOUS_PRIVATE else probe.uffd_shmem
        return "" if fills(calls) else "no userfaultfd that fills such memory may be had (Linux 5.11 and 5.19)"
    return ""
