"""Partly ballooned pages against a plain model, over memory whose blocks come and go."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from sparsemem import Region, Simulated
from sparsemem.virtio import GuestMemory, RegionRange, VirtioBalloon
from sparsemem.virtio.wire import BalloonFeature
from tests.virtio.driving import BalloonDriver

PER_PAGE = 4  # frames of 4 KiB in a host page
PAGE = PER_PAGE * 4096
PER_BLOCK = 4  # host pages in a block
BLOCK = PER_BLOCK * PAGE
NBLOCKS = 6
FRAMES = NBLOCKS * PER_BLOCK * PER_PAGE
EDGE = (NBLOCKS // 2 * PER_BLOCK + 1) * PER_PAGE  # the frame before which the guest's memory has a hole, within a block
ABOVE = 1 << 20  # how many frames the hole has

frames = st.integers(0, FRAMES - 1)
runs = st.builds(lambda first, n: [f % FRAMES for f in range(first, first + n)], frames, st.integers(1, 24))
lists = st.lists(frames, min_size=1, max_size=12) | runs


class BalloonMachine(RuleBasedStateMachine):
    """What is in the balloon, as a set of frames; what is resident, as a set of host pages."""

    def __init__(self) -> None:
        super().__init__()
        self.region = Region(NBLOCKS * BLOCK, block_size=BLOCK, backend=Simulated(page_size=PAGE))
        self.region.plug(0, NBLOCKS)
        self.plugged = set(range(NBLOCKS))
        self.resident = set(range(NBLOCKS * PER_BLOCK))
        self.balloon: set[int] = set()

    @initialize(waits=st.booleans())
    def make(self, waits: bool) -> None:
        low = EDGE * 4096
        memory = GuestMemory(
            [
                RegionRange(0, low, self.region),
                RegionRange(low + ABOVE * 4096, self.region.size - low, self.region, low),
            ]
        )
        self.device = VirtioBalloon(memory)
        self.waits = waits
        self.begin()

    def begin(self) -> None:
        features = self.device.features & ~(0 if self.waits else BalloonFeature.MUST_TELL_HOST)
        self.driver = BalloonDriver(self.device, features)

    def teardown(self) -> None:
        if hasattr(self, "device"):
            self.device.close()
        self.region.close()

    def guest(self, frame: int) -> int:
        return frame if frame < EDGE else ABOVE + frame

    @rule(asked=lists)
    def inflate(self, asked: list[int]) -> None:
        self.driver.inflate(*map(self.guest, asked))
        self.balloon |= set(asked)
        for page in {frame // PER_PAGE for frame in asked}:
            if all(frame in self.balloon for frame in range(page * PER_PAGE, (page + 1) * PER_PAGE)):
                self.resident.discard(page)
        if not self.waits:
            self.balloon.clear()

    @rule(asked=lists)
    def deflate(self, asked: list[int]) -> None:
        self.driver.deflate(*map(self.guest, asked))
        self.balloon -= set(asked)

    @rule(page=st.integers(0, NBLOCKS * PER_BLOCK - 1))
    def use_a_page_again(self, page: int) -> None:
        if page // PER_BLOCK in self.plugged:
            self.region.populate(page * PAGE, PAGE)
            self.resident.add(page)

    @rule(block=st.integers(0, NBLOCKS - 1))
    def unplug(self, block: int) -> None:
        if self.region.unplug(block, missing_ok=True):
            self.forget(block)
            self.plugged.discard(block)
            self.resident -= set(range(block * PER_BLOCK, (block + 1) * PER_BLOCK))

    @rule(block=st.integers(0, NBLOCKS - 1))
    def plug(self, block: int) -> None:
        if self.region.plug(block, exist_ok=True):
            self.forget(block)
            self.plugged.add(block)
            self.resident |= set(range(block * PER_BLOCK, (block + 1) * PER_BLOCK))

    def forget(self, block: int) -> None:
        per = PER_BLOCK * PER_PAGE
        self.balloon -= set(range(block * per, (block + 1) * per))

    @rule()
    def begin_anew(self) -> None:
        self.device.reset()
        self.balloon.clear()
        self.begin()

    @invariant()
    def what_is_resident_agrees(self) -> None:
        audit = self.region.audit()
        assert audit.resident_size == len(self.resident) * PAGE
        assert audit.ok
        assert set(self.pages()) == self.resident
        if hasattr(self, "device"):
            assert self.device.partial_size == len(self.balloon) * 4096

    def pages(self) -> list[int]:
        found = self.region._mapping.resident(0, self.region.size) or iter(())
        return [page for start, n in found for page in range(start // PAGE, (start + n) // PAGE)]


@pytest.mark.promise("device-answers-are-true")
def test_partly_ballooned_pages_are_their_model() -> None:
    run_state_machine_as_test(BalloonMachine, settings=settings(max_examples=100, stateful_step_count=40))
