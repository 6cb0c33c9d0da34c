"""Runs, chunk by chunk, through a mapping; and what was begun when it stops.

The loop itself is C and runs without the GIL.  It comes back about every 20 ms,
so that Python sees signals: a plug of many GiB ends at Ctrl-C.  (Chunks issued
one by one from Python were 8 times slower beside a busy Python thread, since
each return waits for the GIL.)
"""

from __future__ import annotations

from sparsemem._sys import ffi, lib
from sparsemem.backends.base import Mapping
from sparsemem.errors import Run
from sparsemem.runs import Runs

SLICE_NS = 20_000_000
POPULATE_CHUNK = 2 << 20
DISCARD_CHUNK = 16 << 20


class StepFailedError(Exception):
    """A step failed; internal, since only the operation knows what it means.

    Attributes:
        errno: The kernel's.
        offset: Byte offset of the chunk that failed.
        step: The system call.
    """

    def __init__(self, errno: int, offset: int) -> None:
        super().__init__(errno, offset)
        self.errno = errno
        self.offset = offset


class Work:
    """One pass of an operation over runs; can be stopped and taken up again anywhere.

    Args:
        mapping: What to work on.
        operation: "populate", "repopulate" or "discard".
        runs: What to work through, in units of `1 << shift` bytes.
        shift: The unit.
    """

    def __init__(self, mapping: Mapping, operation: str, runs: Runs, shift: int) -> None:
        self._mapping = mapping
        self._operation = operation
        self._runs = runs  # the job points at them
        self.failed: list[Run] = []
        """Byte runs of the chunks that `run_through` has skipped."""
        job = self._job = ffi.new("sm_job *")
        job.runs, job.nruns, job.shift = runs.array, runs.n, shift
        # A chunk is a multiple of every page size, huge ones included: the
        # reset of one must not split what the one before has populated.
        chunk = DISCARD_CHUNK if operation == "discard" else POPULATE_CHUNK
        job.chunk = max(chunk, mapping.granule)
        mapping.prepare(job, operation)

    def run(self) -> None:
        """Works to the end.

        Raises:
            StepFailedError: A step failed; the cursor stands before its chunk.
        """
        job = self._job
        code = lib.SM_MORE
        while code == lib.SM_MORE:
            code = self._mapping.advance(job, self._operation, SLICE_NS)
        if code < 0:
            raise StepFailedError(-code, self.offset)

    def run_through(self) -> None:
        """Works to the end whatever fails; `failed` tells which chunks did."""
        while True:
            try:
                self.run()
                return
            except StepFailedError:
                # Noted before it is skipped: an interrupt in between only makes
                # the chunk fail twice.
                self.failed.append((self.offset, self._job.inflight))
                self._skip()

    def _skip(self) -> None:
        job = self._job
        job.done += max(job.inflight, self._mapping.page_size)
        job.inflight = 0
        if job.done >= job.runs[job.run].count << job.shift:
            job.run += 1
            job.done = 0

    def complete_unit(self, unit: int) -> None:
        """Works on to the next multiple of `unit` bytes, if it stands in the middle of one.

        Raises:
            StepFailedError: As `run`.
        """
        job = self._job
        end = -(-(job.done + job.inflight) // unit) * unit
        if job.run == job.nruns or end == job.done:
            return
        last = job.runs[job.run]
        rest = Runs(ffi.new("sm_run[]", [((last.first << job.shift) + job.done, end - job.done)]), 1)
        Work(self._mapping, self._operation, rest, 0).run()
        job.inflight = 0
        job.done = end
        if end == last.count << job.shift:
            job.run += 1
            job.done = 0

    # ---- how far it got ----------------------------------------------------------------

    @property
    def offset(self) -> int:
        """Byte offset at which the cursor stands; the end of the last run when done."""
        job = self._job
        if job.run == job.nruns:
            return int(sum(self._byte_run(job.nruns - 1))) if job.nruns else 0
        return int((job.runs[job.run].first << job.shift) + job.done)

    @property
    def bytes(self) -> int:
        """Bytes done."""
        return int(self._job.bytes)

    @property
    def calls(self) -> int:
        """System calls made."""
        return int(self._job.calls)

    @property
    def step_failed(self) -> bool:
        """Whether a step failed at the cursor; noted in C, so that an interrupt cannot hide it."""
        return bool(self._job.failed)

    def begun(self) -> list[Run]:
        """Byte runs that were touched at all: what a rollback has to undo."""
        return self._upto(self._job.inflight)

    def done(self) -> list[Run]:
        """Byte runs that are completely done."""
        return self._upto(0)

    def _upto(self, more: int) -> list[Run]:
        job = self._job
        whole = [self._byte_run(i) for i in range(job.run)]
        if job.run < job.nruns and job.done + more:
            whole.append((job.runs[job.run].first << job.shift, job.done + more))
        return whole

    def _byte_run(self, index: int) -> Run:
        run = self._job.runs[index]
        return run.first << self._job.shift, run.count << self._job.shift
