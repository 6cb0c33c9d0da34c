"""Memory that userfaultfd does not fill, so that the other steps of a plug are needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sparsemem import Region


@contextmanager
def unfilled(region: Region) -> Iterator[None]:
    """Nothing is filled meanwhile, as in a child; but where missing pages trap, nothing else can."""
    shared = getattr(region._mapping, "_uffd", None)
    if shared is None or region.protection == "trap":
        yield
        return
    shared.c.ours[0] = b"\0"
    try:
        yield
    finally:
        shared.c.ours[0] = b"\1"
