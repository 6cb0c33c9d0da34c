"""Makes system calls fail: the nth one, with any errno, after some of it was really done.

The injector stands where the kernel stands (`sparsemem._sys.calls.kernel`) and hands everything on. Faults in the
steps of populate and discard are injected *inside* the engine's own loop in C, so what is tested is that loop and
not a copy of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from sparsemem._sys import calls as calls_module
from sparsemem._sys import ffi, lib
from sparsemem._sys.calls import Calls, Kernel
from sparsemem.recipes import Step


@dataclass
class CallFault:
    """The nth call of a method fails."""

    name: str
    errno: int
    nth: int
    repeat: int
    when: Callable[..., bool]


class Injector:
    """A `Calls` that fails when it is told to."""

    def __init__(self, real: Calls | None = None) -> None:
        self._real = Kernel() if real is None else real
        self._faults: list[CallFault] = []
        self._step: Any = None
        self._queue: list[Any] = []
        self._copies: Any = ffi.NULL
        self.made: list[str] = []

    def call(
        self, name: str, *, errno: int, nth: int = 1, repeat: int = 1, when: Callable[..., bool] = lambda *_: True
    ) -> None:
        """Makes the nth call of a method from now on fail; `when` sees its arguments."""
        getattr(self._real, name)
        self._faults.append(CallFault(name, errno, nth, repeat, when))

    def step(self, step: Step, *, errno: int, nth: int = 1, repeat: int = 1, after: int = 0) -> None:
        """Makes the nth issue of a step from now on fail, after so many bytes were done.

        Several faults come one after the other: the next one begins when the one before is used up.
        """
        fault = ffi.new("sm_fault *", (getattr(lib, f"SM_STEP_{step.name}"), nth, repeat, after, errno))
        self._queue.append(fault)

    def copy(self, what: str, *, errno: int, nth: int = 1, repeat: int = 1) -> None:
        """Makes the nth read or write ("READ", "WRITE") of a snapshot's chunks from now on fail."""
        self._copies = ffi.new("sm_fault *", (getattr(lib, f"SM_SNAPSHOT_{what}"), nth, repeat, 0, errno))

    def clear(self) -> None:
        """No more faults."""
        self._faults.clear()
        self._queue.clear()
        self._copies = ffi.NULL

    def save(self, job: Any, budget_ns: int) -> int:
        self.made.append("save")
        job.fault = self._copies
        return self._real.save(job, budget_ns)

    def load(self, job: Any, budget_ns: int) -> int:
        self.made.append("load")
        job.fault = self._copies
        return self._real.load(job, budget_ns)

    def advance(self, job: Any, budget_ns: int) -> int:
        while self._queue and not self._queue[0].repeat:
            self._queue.pop(0)
        job.fault = self._queue[0] if self._queue else ffi.NULL
        try:
            return self._real.advance(job, budget_ns)
        finally:
            job.fault = ffi.NULL

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)

        def call(*args: Any, **options: Any) -> Any:
            self.made.append(name)
            for fault in self._faults:
                if fault.name == name and fault.repeat and fault.when(*args):
                    fault.nth -= 1
                    if fault.nth <= 0:
                        fault.repeat -= 1
                        raise OSError(fault.errno, os.strerror(fault.errno))
            return real(*args, **options)

        return call


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Injector:
    """Stands in the kernel's place for regions that the test makes."""
    injector = Injector()
    monkeypatch.setattr(calls_module, "kernel", injector)
    return injector
