"""Runs, chunk by chunk, through a mapping; and what was begun when it stops.

The loop itself is C and runs without the GIL.  It comes back now and then, so that
Python sees signals, and who asked for it progress, a deadline or a cancel: a plug of
many GiB ends at Ctrl-C.  Not too often, for beside a busy Python thread each return
waits for the GIL, 5 ms and more (chunks issued one by one from Python were 8 times
slower).

Large work is cut into parts for several threads.  The calling thread works on
one of them; the others stay in C until their part is done, one fails, or the
crew is told to stop.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

from attrs import evolve, field, frozen

from sparsemem import workers
from sparsemem._sys import ffi, lib
from sparsemem.backends.base import Mapping
from sparsemem.errors import DeadlineError, ForkedRegionError, OperationCancelledError, Run
from sparsemem.runs import Runs, join, subtract, to_blocks

SLICE_NS = 40_000_000
"""Between two looks at progress, cancel and deadline, of which a cancel is promised within 50 ms."""

SIGNALS_NS = 100_000_000
"""The same where only signals are to be seen: nobody feels a tenth of a second at Ctrl-C."""

POPULATE_CHUNK = 2 << 20
DISCARD_CHUNK = 16 << 20
_FOR_EVER = 1 << 62


class StepFailedError(Exception):
    """A step failed; internal, since only the operation knows what it means.

    Attributes:
        errno: The kernel's.
        offset: Byte offset of what it failed on.
    """

    def __init__(self, errno: int, offset: int) -> None:
        super().__init__(errno, offset)
        self.errno = errno
        self.offset = offset


def require_process(process: int) -> None:
    """Goes on in that process alone: a callback or a signal's handler may have forked.

    The work that its caller was in goes on in the parent, so a child must not do it again, nor undo it.

    Raises:
        ForkedRegionError: This is a child of it.
    """
    if os.getpid() != process:
        raise ForkedRegionError("the operation goes on in the parent process: this one was forked in the middle of it")


@frozen
class Control:
    """How the caller looks on, and how it can stop the work.

    Attributes:
        progress: Called with the bytes done and those in all, about every 40 ms and
            at the end, in the calling thread.  What it raises stops the work.
        cancel: Stops the work when it is set.
        deadline: `time.monotonic()` at which it stops.
        before: Bytes that were done before the work: where several works are one operation.
        total: Bytes of all of them; None where there is but the one.
    """

    progress: Callable[[int, int], object] | None = None
    cancel: threading.Event | None = None
    deadline: float | None = field(default=None)
    before: int = 0
    total: int | None = None

    def check(self, done: int, total: int) -> None:
        """Tells the progress, and stops what is to be stopped.

        Raises:
            OperationCancelledError: It was cancelled.
            DeadlineError: It takes too long.
            ForkedRegionError: The progress has forked, and this is the child.
        """
        if self.progress is not None:
            process = os.getpid()
            self.progress(self.before + done, total if self.total is None else self.total)
            require_process(process)
        self.stop(done, total)

    def stop(self, done: int, total: int) -> None:
        """Stops what is to be stopped; as `check`, but tells nobody.  For what is not the work itself."""
        done, total = self.before + done, total if self.total is None else self.total
        if self.cancel is not None and self.cancel.is_set():
            raise OperationCancelledError(f"cancelled after {done} of {total} bytes")
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise DeadlineError(f"the deadline came after {done} of {total} bytes")

    def within(self, before: int, total: int) -> Control:
        """For one of several works that are told as one."""
        return self if self is UNWATCHED else evolve(self, before=before, total=total)

    def untold(self) -> Control:
        """For what is done in passing: it can be stopped, but is no progress."""
        return self if self.progress is None else evolve(self, progress=None)

    def before_all(self, total: int) -> Callable[[], None] | None:
        """What to call while nothing is done of `total` bytes, and others are waited for; None if nobody looks on."""
        return None if self is UNWATCHED else partial(self.stop, 0, total)


UNWATCHED = Control()


def prepared(mapping: Mapping, operation: str, shift: int) -> Any:
    """A job that lacks only its runs, in units of `1 << shift` bytes."""
    job = ffi.new("sm_job *")
    job.shift = shift
    # A chunk is a multiple of every page size, huge ones included: the
    # reset of one must not split what the one before has populated.
    chunk = DISCARD_CHUNK if operation in ("discard", "thin", "empty", "protect") else POPULATE_CHUNK
    job.chunk = max(chunk, mapping.granule)
    mapping.prepare(job, operation)
    return job


class Work:
    """One pass of an operation over runs; can be stopped and taken up again anywhere.

    Args:
        mapping: What to work on.
        operation: "populate", "repopulate", "recycle", "discard", "thin", "empty", "protect" or an
            advice.
        runs: What to work through, in units of `1 << shift` bytes.
        shift: The unit.
        threads: How many may work on it.
        unit: Bytes; no two threads work on one such piece.
    """

    def __init__(
        self, mapping: Mapping, operation: str, runs: Runs, shift: int, *, threads: int = 1, unit: int = 1
    ) -> None:
        self._mapping = mapping
        self._operation = operation
        self._process = os.getpid()
        self._runs = runs  # the jobs point at them
        self.total = runs.total << shift
        """Bytes to be done."""
        self._completed: list[Run] = []
        self._futures: list[Future[None]] = []
        self.failed: list[Run] = []
        """Byte runs that `run_through` has skipped."""
        job = self._job = prepared(mapping, operation, shift)
        job.runs, job.nruns = runs.array, runs.n
        self._crew: Any = None
        self._parts = [job]
        if threads > 1:
            self._crew = job.crew = ffi.new("sm_crew *")
            self._array = ffi.new("sm_job[]", threads)
            lib.sm_job_split(job, max(job.chunk, unit), self._array, threads)
            self._parts = [self._array + i for i in range(threads)]

    def run(self, control: Control = UNWATCHED) -> None:
        """Works to the end.

        Raises:
            StepFailedError: A step failed; the others have stopped.
            What `Control.check` raises; the work has stopped, too.
        """
        try:
            if control is not UNWATCHED:
                control.check(self.bytes, self.total)
            slice_ns = SIGNALS_NS if control is UNWATCHED else SLICE_NS
            self._lend()
            # The first part is ours, and so are those that no thread would take.
            for part in (self._parts[0], *self._parts[1 + len(self._futures) :]):
                self._advance(part, control, slice_ns)
            while self._futures and wait(self._futures, timeout=slice_ns / 1e9).not_done:
                self._look_up(control)
        finally:
            self._stop()
        for future in self._futures:
            future.result()
        for part in self._parts:
            if part.failed:
                raise StepFailedError(part.failed, part.failed_at)
        if control is not UNWATCHED:
            control.check(self.bytes, self.total)

    def retry(self) -> None:
        """Lets `run` go on where a step failed, once there is a reason to hope for better."""
        self._stop()
        self._futures.clear()
        for part in self._parts:
            part.failed = 0

    def _lend(self) -> None:
        if self._crew is not None:
            self._crew.stop = 0
            for part in self._parts[1:]:
                future = workers.submit(self._finish, part)
                if future is None:
                    break
                self._futures.append(future)

    def _finish(self, part: Any) -> None:
        code = lib.SM_MORE
        with workers.placed(self._mapping.processors):
            while code == lib.SM_MORE and not self._crew.stop:  # MORE: a signal came in between
                code = self._mapping.advance(part, self._operation, _FOR_EVER)

    def _advance(self, part: Any, control: Control, slice_ns: int) -> None:
        code = lib.SM_MORE
        while code == lib.SM_MORE and not (self._crew is not None and self._crew.stop):
            require_process(self._process)
            code = self._mapping.advance(part, self._operation, slice_ns)
            if code == lib.SM_MORE:
                self._look_up(control)

    def _look_up(self, control: Control) -> None:
        if control is not UNWATCHED:
            control.check(self.bytes, self.total)

    def _stop(self) -> None:
        """Nobody works on it any more when this returns, so that what was begun is known."""
        # The threads that are counted as active in a child are the parent's: nobody to wait for.
        if self._crew is not None and os.getpid() == self._process:
            for future in self._futures:
                future.cancel()
            while lib.sm_crew_stop(self._crew, 50):
                pass

    def run_through(self) -> None:
        """Works to the end whatever fails; `failed` tells which ranges did.  For one thread."""
        job = self._job
        while True:
            try:
                self.run()
                return
            except StepFailedError:
                # Noted before it is skipped: an interrupt in between only makes
                # the range fail twice.
                self.failed += subtract(self.begun(), self.done())
                job.failed = 0
                job.at = job.begun

    def complete_unit(self, shift: int) -> None:
        """Works on to the ends of the units of `1 << shift` bytes that are begun.

        Raises:
            StepFailedError: As `run`.
        """
        begun = [(first << shift, count << shift) for first, count in to_blocks(self.begun(), shift)]
        rest = subtract(begun, self.done())
        if rest:
            Work(self._mapping, self._operation, Runs(ffi.new("sm_run[]", rest), len(rest)), 0).run()
            self._completed = rest

    # ---- how far it got ----------------------------------------------------------------

    @property
    def bytes(self) -> int:
        """Bytes done."""
        return sum(int(part.bytes) for part in self._parts)

    @property
    def calls(self) -> int:
        """System calls made."""
        return sum(int(part.calls) for part in self._parts)

    @property
    def collapsed(self) -> int:
        """Bytes that are huge pages now, as a collapse was told."""
        return sum(int(part.collapsed) for part in self._parts)

    @property
    def step_failed(self) -> bool:
        """Whether a step failed; noted in C, so that an interrupt cannot hide it."""
        self._stop()
        return any(part.failed for part in self._parts)

    def begun(self) -> list[Run]:
        """Byte runs that were touched at all: what a rollback has to undo."""
        self._stop()
        return [run for part in self._parts for run in self._between(part, part.begun)]

    def touched(self) -> list[Run]:
        """As `begun`, without what a step failed on that has left it as it was."""
        self._stop()
        return [run for part in self._parts for run in self._between(part, part.at if part.intact else part.begun)]

    def done(self) -> list[Run]:
        """Byte runs that are completely done."""
        self._stop()
        done = [run for part in self._parts for run in self._between(part, part.at)]
        return join([*done, *self._completed]) if self._completed else done

    def _between(self, part: Any, end: Any) -> list[Run]:
        """From where a part starts to a cursor of it."""
        shift, start = part.shift, part.start
        runs = [(run.first << shift, run.count << shift) for run in part.runs[start.run : end.run]]
        if end.done:
            runs.append((part.runs[end.run].first << shift, end.done))
        elif part.tail and end.run == part.nruns:
            runs[-1] = (runs[-1][0], part.tail)
        if start.done and runs:
            runs[0] = (runs[0][0] + start.done, runs[0][1] - start.done)
            if not runs[0][1]:
                del runs[0]
        return runs
