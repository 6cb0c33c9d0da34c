"""A budget equals what its regions have plugged, at every moment."""

from __future__ import annotations

import errno
import threading

import pytest

from sparsemem import BackendExhaustedError, Budget, Cause, PopulateError, Region, Simulated
from sparsemem.backends import Fault

BLOCK = 64 << 10


def test_regions_share_it() -> None:
    budget = Budget(10 * BLOCK)
    with (
        Region("1M", block_size=BLOCK, budget=budget) as one,
        Region("1M", block_size=BLOCK, budget=budget, plugged=[(0, 2)]) as two,
    ):
        assert budget.used == 2 * BLOCK
        one.plug(0, 6)
        with pytest.raises(BackendExhaustedError, match="128K that are left") as caught:
            two.plug(5, 3)
        assert caught.value.cause is Cause.BUDGET
        assert two.plugged_blocks == 2
        assert budget.used == 8 * BLOCK
        assert two.plug(5, 2) == 2
        assert budget.available == 0
        one.unplug(0, 3)
        assert budget.used == 7 * BLOCK
        budget.limit = 3 * BLOCK
        assert budget.available == 0
        with pytest.raises(BackendExhaustedError):
            one.plug(0)
    assert budget.used == 0


def test_only_new_blocks_count() -> None:
    budget = Budget(4 * BLOCK)
    with Region("1M", block_size=BLOCK, budget=budget) as region:
        region.plug(0, 3)
        assert region.plug(0, 4, exist_ok=True) == 1
        assert budget.used == 4 * BLOCK
        region.unplug(0, 8, missing_ok=True)
        assert budget.used == 0


def test_a_failed_plug_and_a_refused_adoption_cost_nothing() -> None:
    budget = Budget(8 * BLOCK)
    backend = Simulated(faults=[Fault("populate", nth=2, errno=errno.EIO)])
    with Region("1M", block_size=BLOCK, backend=backend, budget=budget) as region:
        with pytest.raises(PopulateError):
            region.plug_runs([(0, 1), (2, 1)])
        assert budget.used == 0
    with pytest.raises(BackendExhaustedError):
        Region("1M", block_size=BLOCK, budget=budget, plugged=[(0, 9)])
    assert budget.used == 0


def test_threads_never_take_more_than_there_is() -> None:
    budget, most = Budget(6 * BLOCK), []

    def work(first: int) -> None:
        for _ in range(300):
            try:
                region.plug(first, 2)
            except BackendExhaustedError:
                continue
            most.append(budget.used)
            region.unplug(first, 2)

    with Region("4M", block_size=BLOCK, backend=Simulated(), budget=budget) as region:
        threads = [threading.Thread(target=work, args=(i * 2,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert budget.used == 0
        assert max(most) <= budget.limit
