"""A number of bytes that several regions share."""

from __future__ import annotations

import errno
from typing import NoReturn

from sparsemem._sys import ffi
from sparsemem.errors import BackendExhaustedError, Cause
from sparsemem.units import Size, exact_size, parse_size


class Budget:
    """An upper limit on what all regions made with `budget=` have plugged together.

    Thread-safe.  What is used follows the regions' plugged blocks exactly: it is
    counted in the very call that changes their state.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: Size) -> None:
        self.c = ffi.new("sm_budget *", (parse_size(limit, "limit"), 0))

    @property
    def limit(self) -> int:
        """Bytes; may be set, also to less than is in use, which only stops further plugs."""
        return int(self.c.limit)

    @limit.setter
    def limit(self, limit: Size) -> None:
        self.c.limit = parse_size(limit, "limit")

    @property
    def used(self) -> int:
        """Bytes plugged, and those that plugs in flight have taken."""
        return int(self.c.used)

    @property
    def available(self) -> int:
        """Bytes that may still be plugged."""
        return max(0, self.limit - self.used)

    def refuse(self, size: int) -> NoReturn:
        """Raises the error of a plug that it does not cover."""
        raise BackendExhaustedError(
            errno.ENOMEM,
            f"{exact_size(size)} is more than the {exact_size(self.available)} that are left "
            f"of the budget of {exact_size(self.limit)}",
            cause=Cause.BUDGET,
        )

    def __repr__(self) -> str:
        return f"Budget({exact_size(self.limit)!r}, used={exact_size(self.used)!r})"
