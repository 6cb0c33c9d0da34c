"""A budget equals what its regions have plugged, at every moment."""

from __future__ import annotations

import errno
import gc
import threading

import pytest

from sparsemem import (
    Anonymous,
    BackendExhaustedError,
    Budget,
    Cause,
    DiscardError,
    ListenerVetoError,
    PopulateError,
    Region,
)
from sparsemem.backends import Backend, Fault, Simulated
from sparsemem.recipes import Step
from tests.support.injector import Injector

pytestmark = pytest.mark.promise("budget-is-exact")

BLOCK = 64 << 10


class Refuses:
    """A listener that vetoes what it is told to."""

    def __init__(self, plug: bool = False, unplug: bool = False) -> None:
        self.plug, self.unplug = plug, unplug

    def on_plug(self, first: int, count: int) -> None:
        if self.plug:
            raise RuntimeError("no")

    def on_unplug(self, first: int, count: int) -> None:
        if self.unplug:
            raise RuntimeError("no")


def region_of(budget: Budget, backend: Backend | None = None) -> Region:
    return Region("1M", block_size=BLOCK, backend=backend, budget=budget)


def test_regions_share_it() -> None:
    budget = Budget(10 * BLOCK)
    with (
        region_of(budget) as one,
        Region("1M", block_size=BLOCK, budget=budget, plugged=[(0, 2)]) as two,
    ):
        assert budget.used == 2 * BLOCK
        one.plug(0, 6)
        with pytest.raises(BackendExhaustedError, match="192K is more than the 128K that are left") as caught:
            two.plug(5, 3)
        assert caught.value.cause is Cause.BUDGET
        assert two.plugged_blocks == 2
        assert budget.used == 8 * BLOCK
        assert two.plug(5, 2) == 2
        assert budget.available == 0
        one.unplug(0, 3)
        assert budget.used == 7 * BLOCK
    assert budget.used == 0


def test_a_new_limit_counts_from_the_next_plug_on() -> None:
    budget = Budget(4 * BLOCK)
    with region_of(budget) as region:
        region.plug(0, 4)
        budget.limit = 3 * BLOCK
        assert region.plugged_blocks == 4, "nothing is taken away"
        assert budget.available == 0
        region.unplug(3)
        with pytest.raises(BackendExhaustedError):
            region.plug(3)
        budget.limit = "320K"
        assert region.plug(3, 2) == 2
        with pytest.raises(ValueError, match="ambiguous"):
            budget.limit = "1MB"
        assert budget.limit == 5 * BLOCK


def test_only_new_blocks_count() -> None:
    budget = Budget(4 * BLOCK)
    with region_of(budget) as region:
        region.plug(0, 3)
        assert region.plug(0, 4, exist_ok=True) == 1
        assert budget.used == 4 * BLOCK
        region.unplug(0, 8, missing_ok=True)
        assert budget.used == 0


def test_every_way_to_change_the_plugged_size_is_counted() -> None:
    budget = Budget("1M")
    with region_of(budget) as region:
        region.plug_runs([(3, 1), (9, 2)])
        assert region.plug_fit(4) == 4
        region.resize(12 * BLOCK)
        assert budget.used == region.plugged_size == 12 * BLOCK
        region.discard(0, 4096)
        assert budget.used == 12 * BLOCK, "the block stays plugged"
        region.resize(5 * BLOCK)
        region.unplug_runs([(0, 1)])
        assert budget.used == region.plugged_size == 4 * BLOCK
        region.unplug_all()
        assert budget.used == 0


def test_a_failed_or_vetoed_plug_is_refunded_exactly() -> None:
    budget = Budget(8 * BLOCK)
    with region_of(budget, Simulated(faults=[Fault("populate", nth=3, errno=errno.EIO)])) as region:
        region.plug(15)
        with pytest.raises(PopulateError):
            region.plug_runs([(0, 1), (2, 1)])
        assert budget.used == BLOCK
        refuses = Refuses()
        region.add_listener(refuses)
        refuses.plug = True
        with pytest.raises(ListenerVetoError):
            region.plug(0, 4)
        assert budget.used == BLOCK


def test_an_unplug_that_fails_or_is_vetoed_refunds_only_what_it_has_discarded() -> None:
    budget = Budget("1M")
    with region_of(budget, Simulated(faults=[Fault("discard", nth=2, errno=errno.EIO)])) as region:
        region.plug_runs([(0, 2), (4, 3), (8, 1)])
        refuses = Refuses(unplug=True)
        region.add_listener(refuses)
        with pytest.raises(ListenerVetoError):
            region.unplug(0)
        assert budget.used == 6 * BLOCK
        refuses.unplug = False
        with pytest.raises(DiscardError) as caught:
            region.unplug_runs([(0, 2), (4, 3), (8, 1)])
        assert caught.value.discarded == ((0, 2),)
        assert budget.used == region.plugged_size == 4 * BLOCK
        region.scrub()
        assert budget.used == region.plugged_size


def test_an_adoption_that_does_not_fit_leaves_nothing_charged() -> None:
    budget = Budget(8 * BLOCK)
    with pytest.raises(BackendExhaustedError) as caught:
        Region("1M", block_size=BLOCK, budget=budget, plugged=[(0, 9)])
    assert caught.value.cause is Cause.BUDGET
    assert budget.used == 0


def test_an_adoption_that_cannot_be_populated_leaves_nothing_charged(inject: Injector) -> None:
    budget = Budget(8 * BLOCK)
    inject.step(Step.POPULATE_WRITE, errno=errno.ENOMEM)
    with pytest.raises(PopulateError):
        Region("1M", block_size=BLOCK, backend=Anonymous(strategy="populate_write"), budget=budget, plugged=[(0, 4)])
    gc.collect()  # the error's traceback knows the region
    assert budget.used == 0


def test_a_region_that_nobody_closed_gives_its_share_back() -> None:
    budget = Budget(8 * BLOCK)
    region = region_of(budget)
    region.plug(0, 4)
    with pytest.warns(ResourceWarning, match="unclosed"):
        del region
        gc.collect()
    assert budget.used == 0


def test_a_region_closed_after_an_error_gives_back_what_it_had() -> None:
    budget = Budget(8 * BLOCK)
    with pytest.raises(ZeroDivisionError), region_of(budget) as region:
        region.plug(0, 4)
        raise ZeroDivisionError
    assert region.closed
    assert budget.used == 0


def test_threads_never_take_more_than_there_is() -> None:
    budget = Budget(6 * BLOCK)
    seen: list[int] = []
    refused: list[int] = []
    start = threading.Barrier(6)

    def work(first: int) -> None:
        start.wait()
        for _ in range(300):
            try:
                region.plug(first, 2)
            except BackendExhaustedError:
                refused.append(first)
                continue
            seen.append(budget.used)
            region.unplug(first, 2)

    with Region("4M", block_size=BLOCK, backend=Simulated(), budget=budget) as region:
        threads = [threading.Thread(target=work, args=(i * 2,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) + len(refused) == 6 * 300
        assert 0 < max(seen) <= budget.limit
        assert budget.used == 0


def test_it_says_how_much_is_used() -> None:
    budget = Budget("1G")
    with region_of(budget) as region:
        region.plug(0, 3)
        assert repr(budget) == "Budget('1G', used='192K')"
