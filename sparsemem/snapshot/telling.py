"""Errors that say of which file they are, and how far a copy has come."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from attrs import define, evolve, field

from sparsemem.engine import UNWATCHED, Control
from sparsemem.errors import SnapshotError, SnapshotIOError, SparseMemError


@contextlib.contextmanager
def about(path: str, doing: str) -> Iterator[None]:
    """Has errors of the body name the file: a SnapshotError is a sentence that lacks its subject."""
    try:
        yield
    except SnapshotIOError:
        raise
    except SnapshotError as error:
        raise SnapshotError(f"snapshot {path} {error}") from None
    except SparseMemError:
        raise
    except OSError as error:
        code = error.errno or 0
        raise SnapshotIOError(code, f"cannot {doing} snapshot {path}: {error.strerror or os.strerror(code)}") from error


@define(eq=False)
class Meter:
    """How far a copy of several parts has come, for whoever looks on; in bytes.

    What is to be done may change meanwhile: no more is ever told than was announced.
    """

    control: Control
    total: int
    done: int = field(init=False, default=0)

    def tell(self, part: int) -> None:
        """So much of the present part is done; stops what is to be stopped."""
        if self.control is not UNWATCHED:
            self.control.check(min(self.done + part, self.total), self.total)

    def finish(self, part: int) -> None:
        """The present part is done, which was so much."""
        self.done += part
        self.tell(0)

    def end(self) -> None:
        """All is done, however much it was."""
        self.done = self.total
        self.tell(0)

    def part(self) -> Control:
        """For an operation that is a part of it."""
        if self.control.progress is None:
            return self.control
        return evolve(self.control, progress=lambda done, _: self.tell(done))
