"""What all operations are: how one is run, and what it shares with the others of its region."""

from __future__ import annotations

import os
from collections.abc import Callable

from attrs import define, field

from sparsemem import workers
from sparsemem.backends.base import Mapping
from sparsemem.blocks import BlockMap, Claim, runs_of
from sparsemem.deferral import Deferral
from sparsemem.engine import Work, require_process
from sparsemem.errors import Run, UnsupportedError
from sparsemem.headroom import Gauge
from sparsemem.listeners import Listener
from sparsemem.quick import Quick, not_at_once
from sparsemem.runs import EMPTY, Runs
from sparsemem.statistics import Tally
from sparsemem.warm import Warm


@define(eq=False)
class Core:
    """What the operations of one region share."""

    mapping: Mapping
    blocks: BlockMap
    block_size: int
    gauge: Gauge
    tally: Tally
    threads: int | None = None
    listeners: tuple[Listener, ...] = ()
    deferral: Deferral | None = None
    warm: Warm | None = None
    shift: int = field(init=False)
    quick: Quick | None = field(init=False, default=None)
    plug_at_once: Callable[[int, int], int] = field(init=False, default=not_at_once)
    unplug_at_once: Callable[[int, int], int] = field(init=False, default=not_at_once)

    def __attrs_post_init__(self) -> None:
        self.shift = self.block_size.bit_length() - 1
        # What is pending or due is for the long way to look at.
        if self.mapping.direct and self.deferral is None:
            self.quick = Quick(self.mapping, self.blocks, self.gauge, self.shift)
            self.plug_at_once, self.unplug_at_once = self.quick.plug, self.quick.unplug

    def listen(self, listeners: tuple[Listener, ...]) -> None:
        """Sets who listens; only while a claim on everything is held."""
        self.listeners = listeners
        self.blocks.watch(bool(listeners))

    def counts(self) -> dict[str, float]:
        """What was done on both ways."""
        return self.tally.with_those(self.quick.counts if self.quick is not None else {})

    def work(self, operation: str, runs: Runs) -> Work:
        """The work of an operation on blocks, cut into parts for as many threads as it is worth."""
        mapping, size = self.mapping, runs.total << self.shift
        if not mapping.parallel:
            threads = 1
        elif self.threads is None:
            scattered = operation == "discard" and size < runs.n * workers.WORTH_A_FLUSH
            threads = workers.sensible(size, huge=mapping.huge) if mapping.scales and not scattered else 1
        else:
            threads = workers.limited(self.threads, size)
        return Work(mapping, operation, runs, self.shift, threads=threads, unit=self.block_size)

    def block_runs(self, pairs: list[Run]) -> Runs:
        return runs_of(pairs, self.blocks.nblocks)

    def byte_runs(self, pairs: list[Run]) -> Runs:
        return runs_of(pairs, self.mapping.size)


class Operation:
    """One operation; `perform` does it, `undo` puts right what a stop left behind."""

    only_reads = False
    """Whether it leaves the blocks as they are, whatever becomes of it."""

    def __init__(self, core: Core, claim: Claim) -> None:
        self.core = core
        self.claim = claim
        self._process = os.getpid()

    def perform(self) -> int:
        raise NotImplementedError

    def undo(self, error: BaseException | None) -> None:
        """Puts things right; does nothing once the claim is finished, so it can be called again."""
        raise NotImplementedError

    def require_process(self) -> None:
        """Raises ForkedRegionError in a child of the process that it was begun in."""
        require_process(self._process)

    def end(self, error: BaseException | None) -> None:
        """As `undo`, but in a child: what was done so far, and who was told, are the parent's."""
        if os.getpid() == self._process:
            self.undo(error)
        elif self.claim.open:
            self.claim.finish(tainted=EMPTY if self.only_reads else self.claim.runs)


def execute(operation: Operation) -> int:
    """Performs an operation, or undoes what it did."""
    try:
        return operation.perform()
    except BaseException as error:
        operation.end(error)
        raise
    finally:
        # Again, for an interrupt may have come in just before or in the middle
        # of the undo above.  After a finished operation this does nothing.
        operation.end(None)


def require_discard(mapping: Mapping) -> None:
    """Raises UnsupportedError, before anything happens, if memory cannot be given back."""
    if not mapping.can_discard:
        raise UnsupportedError("memfd_secret memory cannot be given back: the region can only grow")
