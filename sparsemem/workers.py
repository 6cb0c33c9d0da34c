"""The threads that help with large work: one pool, made when it is first needed.

They run C code without the GIL; the pool is only for handing them their part.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

SHARE = 64 << 20
"""Bytes that make another thread worth its while: 2 to 15 ms of work, where handing it over takes 0.1."""

HUGE_SHARE = 256 << 20
"""The same of huge pages: 30 ms of work."""

WORTH_A_FLUSH = 256 << 10
"""Bytes a run from which on several threads discard faster than one.

Each call ends by having all processors that run this process forget the addresses, and
waiting for them: with a second thread there are some (measured in a virtual machine:
4 KiB a run takes twice as long by two threads, 64 KiB as long, 1 MiB 0.9).
"""

MOST = 16
"""As QEMU: populating is bound by memory bandwidth and by locks in the kernel long before that."""

_pool: ThreadPoolExecutor | None = None
_making = threading.Lock()


def submit(function: Callable[[Any], None], argument: Any) -> Future[None] | None:
    """Has a thread call the function; None if none ever will: there is no thread to be had, or the interpreter ends."""
    future: Future[None] = Future()
    call: list[Callable[[], None]] = [partial(function, argument)]
    try:
        _the_pool().submit(_perform, future, call)
    except RuntimeError:
        # The pool queues it before it finds that it can start no thread, and one that there
        # is may have come for it by now: then it is left to that.
        if future.cancel():
            call.clear()  # what is queued may stay so for good, and is to keep nothing alive
            return None
    return future


def _perform(future: Future[None], call: list[Callable[[], None]]) -> None:
    """In a thread of the pool: makes the call, unless the future is cancelled, by which only one of them has it."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        call.pop()()
    except BaseException as error:
        future.set_exception(error)
        del future  # which now refers to this frame
    else:
        future.set_result(None)


def sensible(size: int, *, huge: bool) -> int:
    """How many threads suit `size` bytes of work on this machine: one for each processor.

    For huge pages half of that, so that others are left a processor: clearing them is all there
    is to it, and what a second thread gains depends on who is short of what.  Measured with two
    processors: 10 % on one machine, 75 % on another; on one with 64, 16 threads of QEMU's took a
    thirteenth of the time of one (commit 1e356fc14bea).
    """
    processors = len(os.sched_getaffinity(0))
    if huge:
        return max(1, min(MOST, processors // 2, size // HUGE_SHARE))
    return limited(min(MOST, processors), size)


def limited(threads: int, size: int) -> int:
    """At most so many threads, and no more than `size` bytes are worth."""
    return max(1, min(threads, size // SHARE))


@contextmanager
def placed(processors: frozenset[int]) -> Iterator[None]:
    """Keeps the calling thread on these processors meanwhile, as far as it may be there; empty is anywhere."""
    before = os.sched_getaffinity(0)  # 0 is this thread alone
    there = processors & before
    if not there or there == before:
        yield
        return
    # EINVAL: its cpuset has changed since.  Then it works where it is.
    with suppress(OSError):
        os.sched_setaffinity(0, there)
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, before)


def _the_pool() -> ThreadPoolExecutor:
    global _pool
    with _making:
        if _pool is None:
            _pool = ThreadPoolExecutor(max_workers=max(MOST, os.cpu_count() or 1), thread_name_prefix="sparsemem")
        return _pool


def _after_in_child() -> None:
    global _pool, _making
    _pool, _making = None, threading.Lock()


# The threads stay in the parent.
os.register_at_fork(after_in_child=_after_in_child)
