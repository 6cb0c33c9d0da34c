"""virtio-mem against a plain model, with a backend that fails now and then."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from sparsemem import Memfd, Region
from sparsemem._sys import calls as calls_module
from sparsemem.recipes import Step
from sparsemem.virtio import VirtioMem
from sparsemem.virtio.wire import MemAnswer, MemOperation, MemState
from tests.support.injector import Injector
from tests.virtio.driving import MemDriver

BLOCK = 16 << 10
NBLOCKS = 64
SIZE = NBLOCKS * BLOCK
ADDRESS = 0x1_0000_0000
ACK, NACK, BUSY, ERROR = MemAnswer.ACK, MemAnswer.NACK, MemAnswer.BUSY, MemAnswer.ERROR

blocks = st.integers(-1, NBLOCKS)
counts = st.integers(0, 12)


class MemMachine(RuleBasedStateMachine):
    """Block -> the byte that it is filled with, or None where an unplug that failed may have lost it."""

    def __init__(self) -> None:
        super().__init__()
        self.inject = Injector()
        self._kernel, calls_module.kernel = calls_module.kernel, self.inject
        self.region = Region(SIZE, block_size=BLOCK, backend=Memfd(strategy="populate_write"))
        self.plugged: dict[int, int | None] = {}
        self.stamp = 0

    @initialize(window=st.booleans(), prealloc=st.booleans())
    def make(self, window: bool, prealloc: bool) -> None:
        def quarter(requested: int, region: int) -> int:
            return min(region, requested + SIZE // 4) if requested else 0

        usable: Any = quarter if window else "all"
        self.policy = quarter if window else (lambda requested, region: region)
        self.driver = MemDriver(VirtioMem(self.region, address=ADDRESS, usable=usable, prealloc=prealloc))
        self.prealloc = prealloc
        self.requested = 0
        self.usable = self.policy(0, SIZE)

    def teardown(self) -> None:
        calls_module.kernel = self._kernel
        self.region.close()

    @rule(requested=st.integers(0, NBLOCKS))
    def resize(self, requested: int) -> None:
        self.driver.device.requested_size = requested * BLOCK
        self.requested = requested * BLOCK
        self.usable = max(self.usable, self.policy(self.requested, SIZE))

    @rule(nth=st.integers(1, 4), after=st.integers(0, 3))
    def fail_a_populate(self, nth: int, after: int) -> None:
        self.inject.clear()
        self.inject.step(Step.POPULATE_WRITE, errno=errno.ENOMEM, nth=nth, after=after * 4096)

    @rule(nth=st.integers(1, 4), repeat=st.integers(1, 2), after=st.integers(0, 9))
    def fail_a_discard(self, nth: int, repeat: int, after: int) -> None:
        self.inject.clear()
        self.inject.step(Step.PUNCH, errno=errno.EIO, nth=nth, repeat=repeat, after=after * 4096)

    @rule()
    def fail_no_more(self) -> None:
        self.inject.clear()

    def judge(self, first: int, count: int, *, plug: bool) -> MemAnswer | None:
        """The answer, or None where the backend decides."""
        asked = range(first, first + count)
        if count == 0 or first < 0 or (first + count) * BLOCK > self.usable:
            return ERROR
        if plug and (len(self.plugged) + count) * BLOCK > self.requested:
            return NACK
        if any((block in self.plugged) is plug for block in asked):
            return ERROR
        return None

    @rule(first=blocks, count=counts)
    def plug(self, first: int, count: int) -> None:
        expected, answer = self.judge(first, count, plug=True), self.driver.plug(first, count)
        if expected is not None:
            assert answer is expected
        elif answer is ACK:
            for block in range(first, first + count):
                self.fill(block)
        else:
            assert answer is BUSY

    def fill(self, block: int) -> None:
        view = self.region.view()
        at = block * BLOCK
        assert view[at] == view[at + BLOCK - 1] == 0  # fresh, whatever was there
        self.stamp = self.stamp % 255 + 1
        view[at] = view[at + BLOCK - 1] = self.stamp
        self.plugged[block] = self.stamp

    @rule(first=blocks, count=counts)
    def unplug(self, first: int, count: int) -> None:
        expected, answer = self.judge(first, count, plug=False), self.driver.unplug(first, count)
        if expected is not None:
            assert answer is expected
            return
        self.settle(answer, list(range(first, first + count)))

    @rule()
    def unplug_all(self) -> None:
        answer = self.driver.unplug_all()
        self.settle(answer, list(self.plugged))
        if answer is ACK:
            self.usable = self.policy(self.requested, SIZE)

    def settle(self, answer: MemAnswer, asked: list[int]) -> None:
        assert answer in (ACK, BUSY)
        for block in asked:
            if answer is ACK:
                del self.plugged[block]
            else:
                self.plugged[block] = None

    @rule(first=blocks, count=counts)
    def state(self, first: int, count: int) -> None:
        response = self.driver.ask(MemOperation.STATE, (ADDRESS + first * BLOCK) % 2**64, count)
        if count == 0 or first < 0 or (first + count) * BLOCK > self.usable:
            assert response.answer is ERROR
            return
        n = sum(block in self.plugged for block in range(first, first + count))
        assert response.answer is ACK
        assert response.state is (MemState.PLUGGED if n == count else MemState.MIXED if n else MemState.UNPLUGGED)

    @rule()
    def device_reset(self) -> None:
        self.driver.device.reset()

    @rule()
    def save_and_load(self) -> None:
        state = self.driver.device.save()
        self.driver.device.load(state)

    @invariant()
    def region_device_and_model_agree(self) -> None:
        if not hasattr(self, "driver"):
            return
        config = self.driver.config
        assert config.plugged_size == len(self.plugged) * BLOCK == self.region.plugged_size
        assert (config.requested_size, config.usable_region_size) == (self.requested, self.usable)
        there = [block for first, count in self.region.plugged_runs() for block in range(first, first + count)]
        assert there == sorted(self.plugged)
        view = self.region.view()
        for block, stamp in self.plugged.items():
            at = block * BLOCK
            assert stamp is None or view[at] == view[at + BLOCK - 1] == stamp
        audit = self.region.audit()
        assert not audit.leaks
        assert not audit.gaps


@pytest.mark.promise("device-answers-are-true")
def test_a_device_is_its_model() -> None:
    run_state_machine_as_test(MemMachine, settings=settings(max_examples=100, stateful_step_count=40))
