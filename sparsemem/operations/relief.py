"""What is done where memory runs out: what is not needed this moment is given back, and the work goes on."""

from __future__ import annotations

import contextlib

from sparsemem.engine import UNWATCHED, Control, StepFailedError, Work
from sparsemem.errors import BackendExhaustedError
from sparsemem.operations.operation import Core
from sparsemem.operations.unplug import flush_quietly


def relieve(core: Core, control: Control = UNWATCHED) -> bool:
    """Gives back what is not needed this moment, pending blocks and the warm pool; whether there was any."""
    given = flush_quietly(core, control)
    if core.warm is not None:
        with contextlib.suppress(StepFailedError):
            given += core.warm.give_back()
    return given > 0


def spend(core: Core, size: int, control: Control = UNWATCHED) -> None:
    """Counts on `size` bytes of the headroom, relieved if need be.

    Raises:
        BackendExhaustedError: There are not that many.
        What `Control.stop` raises.
    """
    try:
        core.gauge.spend(size)
    except BackendExhaustedError:
        relieved = relieve(core, control)
        control.stop(0, size)  # it may be why there was no relief
        if not relieved:
            raise
        core.gauge.forget()
        core.gauge.spend(size)


def work_off(core: Core, work: Work, control: Control = UNWATCHED) -> None:
    """Works to the end, and goes on after a relief where a step failed.

    Raises:
        StepFailedError: There was none.
        What `Control.check` raises.
    """
    while True:
        try:
            return work.run(control)
        except StepFailedError:
            relieved = relieve(core, control)
            control.stop(work.bytes, work.total)
            if not relieved:
                raise
        work.retry()
