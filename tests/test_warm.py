"""The warm pool: memory held ready, moved into place, filled on request, given back when it is needed."""

from __future__ import annotations

import errno
import threading
from typing import Any

import pytest

from sparsemem import (
    Anonymous,
    BackendExhaustedError,
    BlockStateError,
    Memfd,
    PopulateError,
    Region,
    RegionClosedError,
    ReserveError,
    Secret,
    Simulated,
    UnsupportedError,
)
from sparsemem import region as region_module
from sparsemem._sys import calls, probe
from sparsemem.backends import Backend
from sparsemem.backends.base import Limit
from sparsemem.errors import Cause
from sparsemem.headroom import Gauge
from sparsemem.recipes import Step
from tests.support import accounting
from tests.support.children import run_child
from tests.support.injector import Injector

MIB = 1 << 20
BLOCK = 64 << 10

pytestmark = pytest.mark.skipif(not probe.uffd_move(calls.kernel), reason="needs userfaultfd with UFFDIO_MOVE")


@pytest.fixture(params=[4096, BLOCK, 2 * MIB], ids=["4K", "64K", "2M"])
def block(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def test_a_plug_takes_what_is_ready_and_populates_the_rest(block: int) -> None:
    with Region("1G", block_size=block, warm=8 * block) as region:
        assert region.stats().warm_size == 8 * block
        for i in range(6):
            region.plug(3 * i)
        assert region.stats().warm_size == 2 * block
        region.plug_runs([(100 + 3 * i, 1) for i in range(6)])
        assert region.stats().warm_size == 0
        assert region.plugged_blocks == 12
        assert region.audit().ok
        assert region.audit().resident_size == 12 * block
        for first, count in region.plugged_runs():
            with region.view(first, count) as view:
                assert view == bytes(count * block)
                view[:] = b"x" * len(view)
        assert region.refill() == 8 * block
        assert region.refill() == 0
        region.plug(50, 8)
        assert region.stats().warm_size == 0
        with region.view(50, 8) as view:
            assert view == bytes(8 * block)
        assert region.unplug_all() == 20
        assert region.audit().resident_size == 0


def test_a_huge_page_arrives_in_one_piece() -> None:
    with Region("64M", block_size="2M", warm="8M") as region:
        if not accounting.smaps(region._core.warm._pool.address, 8 * MIB)["AnonHugePages"]:  # type: ignore[union-attr]
            pytest.skip("needs transparent huge pages")
        region.plug(3)
        assert accounting.smaps(region.address, region.size)["AnonHugePages"] == 2 * MIB


def test_a_stray_write_does_not_survive_though_nothing_is_reset_first(block: int) -> None:
    with Region("64M", block_size=block, warm=4 * block) as region:
        view = region.view()
        view[5 * block] = 1
        assert view[6 * block + 4095] == 0  # maps the zero page
        region.plug(5)
        region.plug(6)
        assert bytes(view[5 * block : 7 * block]) == bytes(2 * block)
        assert region.audit().ok
        assert region.audit().resident_size == 2 * block
        del view


def test_with_listeners_and_a_budget_too() -> None:
    from sparsemem import Budget
    from tests.test_faults import Told

    told = Told()
    with Region("64M", block_size="2M", warm="8M", budget=Budget("6M")) as region:
        region.add_listener(told)
        region.plug(0, 3)
        assert told.blocks == {0, 1, 2}
        with pytest.raises(BackendExhaustedError):
            region.plug(3)
        assert region.stats().warm_size == 2 * MIB


def test_more_than_is_ready_leaves_the_pool_alone() -> None:
    with Region("64M", block_size="64K", warm="128K") as region:
        region.plug(0, 3)
        assert region.stats().warm_size == 2 * BLOCK
        assert region.audit().ok


def test_what_was_moved_is_given_back_when_the_plug_fails(inject: Injector) -> None:
    with Region("64M", block_size="2M", backend=Anonymous(strategy="populate_write"), warm="4M") as region:
        inject.step(Step.POPULATE_WRITE, errno=errno.ENOMEM, repeat=5)
        with pytest.raises(PopulateError):
            region.plug(0, 5)  # two are moved, the third fails; the pool is empty, so nothing helps
        assert region.plugged_size == 0
        assert region.audit().resident_size == 0
        assert region.stats().warm_size == 0


def test_the_pool_is_given_back_where_it_helps(inject: Injector) -> None:
    """Blocks larger than what is ready are populated; that fails once, the pool goes, and it works."""
    with Region("64M", block_size="4M", backend=Anonymous(strategy="populate_write"), warm="4M") as region:
        pool = region._core.warm
        assert pool is not None
        pool.c.ready = 4096  # less than a chunk: nothing is moved
        inject.step(Step.POPULATE_WRITE, errno=errno.ENOMEM)
        assert region.plug(0) == 1
        assert region.stats().warm_size == 0
        assert accounting.smaps(pool._pool.address, pool.size)["Rss"] == 0
        assert region.audit().ok


def test_the_pool_is_given_back_before_headroom_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    room = [1 << 40]

    def limits(*_: Any) -> list[Limit]:
        ready = region._core.warm.ready if made else 0  # type: ignore[union-attr]
        return [Limit(Cause.MEMORY_CGROUP, room[0] - ready, "a limit", errno.ENOMEM)]

    made = False
    monkeypatch.setattr(region_module, "Gauge", lambda _, mode: Gauge(limits, mode))
    with Region("64M", block_size="2M", warm="8M") as region:
        made = True
        room[0] = 9 * MIB
        region._core.gauge.forget()
        region.plug_runs([(0, 4)])  # 1 MiB is left beside the pool, 8 MiB are asked for
        assert region.stats().warm_size == 0
        assert region.plugged_size == 8 * MIB
        with pytest.raises(BackendExhaustedError):
            region.plug(8, 5)


@pytest.mark.parametrize(
    "backend",
    [Memfd(), Memfd(shared=False), Anonymous(shared=True), Secret(), Simulated()],
    ids=["memfd", "memfd private", "anonymous shared", "secret", "simulated"],
)
def test_where_nothing_can_be_moved_it_is_refused(backend: Backend) -> None:
    before = accounting.open_descriptors()
    with pytest.raises(UnsupportedError, match="a warm pool needs private anonymous memory"):
        Region("256K", block_size="64K", backend=backend, warm="64K")
    assert accounting.open_descriptors() == before


def test_a_kernel_without_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "uffd_move", lambda _: False)
    with pytest.raises(UnsupportedError, match="UFFDIO_MOVE"):
        Region("64M", warm="2M")


@pytest.mark.parametrize(("warm", "error"), [("3M", ValueError), (-1, ValueError), ("x", ValueError), (1.5, TypeError)])
def test_bad_sizes_are_refused(warm: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Region("64M", block_size="2M", warm=warm)


@pytest.mark.parametrize(("call", "code"), [("userfaultfd", "EMFILE"), ("register", "EBUSY"), ("reserve", "ENOMEM")])
def test_a_pool_that_cannot_be_made_leaves_nothing(call: str, code: str, inject: Injector) -> None:
    with Region("64M", backend=Anonymous(), warm="2M"):
        pass  # the probes are done
    before = accounting.open_descriptors()
    inject.call(call, errno=getattr(errno, code), nth=2 if call == "reserve" else 1)
    with pytest.raises(ReserveError):
        Region("64M", backend=Anonymous(), warm="2M")
    assert accounting.open_descriptors() == before


def test_a_pool_that_cannot_be_filled_leaves_nothing(inject: Injector) -> None:
    inject.step(Step.POPULATE_WRITE, errno=errno.ENOMEM)
    with pytest.raises(PopulateError) as caught:
        Region("64M", backend=Anonymous(strategy="populate_write"), warm="8M")
    assert caught.value.errno == errno.ENOMEM
    with Region("64M", backend=Anonymous(strategy="populate_write"), warm="8M") as region:
        region.plug(0, 2)
        inject.step(Step.POPULATE_WRITE, errno=errno.ENOMEM, nth=2)
        with pytest.raises(PopulateError):
            region.refill()
        assert region.stats().warm_size == 4 * MIB
        assert region.refill() == 4 * MIB


def test_it_can_be_watched_and_stopped() -> None:
    from sparsemem import OperationCancelledError

    told: list[tuple[int, int]] = []
    cancel = threading.Event()
    with Region("1G", block_size="2M", warm="64M") as region:
        region.plug(0, 32)
        assert region.refill(progress=lambda done, total: told.append((done, total))) == 64 * MIB
        assert told[-1] == (64 * MIB, 64 * MIB)
        region.plug(32, 32)
        cancel.set()
        with pytest.raises(OperationCancelledError):
            region.refill(cancel=cancel)
        assert region.stats().warm_size == 0
    with pytest.raises(RegionClosedError):
        region.refill()


@pytest.mark.parametrize("mode", ["refuse", "inherit"])
def test_a_child_never_takes_from_the_parents(mode: str) -> None:
    with Region("64M", block_size="2M", warm="8M", fork=mode) as region:
        region.plug(0)

        def child() -> tuple[bool, bool]:
            if mode == "refuse":
                with pytest.raises(RegionClosedError):
                    region.plug(1)
                return True, True
            region.plug(1, 2)
            with region.view(1, 2) as view:
                zero = view == bytes(4 * MIB)
            return zero and region.refill() == region.stats().warm_size == 0, region.audit().ok

        assert run_child(child).result() == (True, True)
        assert region.stats().warm_size == 6 * MIB
        region.plug(1, 3)
        assert region.audit().ok


def test_a_child_does_not_wait_for_a_thread_that_it_does_not_have() -> None:
    """Another thread of the parent's held the pool at the fork."""
    with Region("64M", block_size="2M", warm="8M", fork="inherit") as region:
        pool = region._core.warm
        assert pool is not None
        pool.c.held = 1

        def child() -> tuple[int, int, int]:
            return region.plug(0), region.refill(), pool.give_back()

        assert run_child(child, timeout=10).result() == (1, 0, 0)
        pool.c.held = 0


def test_what_its_progress_calls_neither_deadlocks_nor_pulls_it_away() -> None:
    with Region("256M", block_size="2M", warm="64M") as region:
        region.plug(0, 32)

        def meddle(done: int, total: int) -> None:
            with pytest.raises(BlockStateError, match="already at it"):
                region.refill()
            if done == 0:
                region.plug(40)

        assert region.refill(progress=meddle) == 64 * MIB
        assert region.audit().ok


def test_a_close_waits_for_a_refill_in_another_thread() -> None:
    began, go_on = threading.Event(), threading.Event()
    region = Region("256M", block_size="2M", warm="64M")
    region.plug(0, 32)

    def wait(done: int, total: int) -> None:
        began.set()
        assert go_on.wait(20)

    refilling = threading.Thread(target=region.refill, kwargs={"progress": wait})
    refilling.start()
    assert began.wait(20)
    threading.Timer(0.1, go_on.set).start()
    region.close()
    assert go_on.is_set()
    refilling.join()
    assert region.stats().warm_size == 0


@pytest.mark.promise("no-deadlock", found="a plug out of memory and a refill with progress waited for each other")
def test_a_plug_without_memory_does_not_wait_for_who_fills_the_pool(inject: Injector) -> None:
    failed: list[BaseException] = []

    def plug() -> None:
        try:
            region.plug(40)
        except PopulateError as error:
            failed.append(error)

    def progress(done: int, total: int) -> None:
        if done or failed:
            return
        inject.step(Step.POPULATE_WRITE, errno=errno.ENOMEM)
        other = threading.Thread(target=plug, daemon=True)
        other.start()
        other.join(10)
        assert failed, "it waits for the pool, which is ours until it is filled"
        assert region.plug(40) == 1

    with Region("256M", block_size="2M", backend=Anonymous(strategy="populate_write"), warm="8M") as region:
        region.plug(0, 4)
        assert region.refill(progress=progress) == 8 * MIB
        assert region.audit().ok


def test_a_refill_that_waits_for_another_can_be_stopped() -> None:
    from sparsemem import OperationCancelledError

    began, go_on, cancel = threading.Event(), threading.Event(), threading.Event()
    cancel.set()

    def wait(done: int, total: int) -> None:
        began.set()
        assert go_on.wait(20)

    with Region("256M", block_size="2M", warm="8M") as region:
        region.plug(0, 4)
        refilling = threading.Thread(target=region.refill, kwargs={"progress": wait})
        refilling.start()
        assert began.wait(20)
        with pytest.raises(OperationCancelledError, match="0 of 8388608"):
            region.refill(cancel=cancel)
        assert refilling.is_alive()
        go_on.set()
        refilling.join()
        assert region.stats().warm_size == 8 * MIB


def test_a_refill_finds_memory_in_what_is_pending(inject: Injector) -> None:
    backend = Anonymous(strategy="populate_write")
    with Region("64M", block_size="2M", backend=backend, warm="8M", unplug_delay=1000) as region:
        region.plug(0, 4)
        region.unplug(0, 2)
        inject.step(Step.POPULATE_WRITE, errno=errno.ENOMEM, nth=2)
        assert region.refill() == 8 * MIB
        assert region.stats().pending_size == 0
        region.plug(10, 4)
        inject.step(Step.POPULATE_WRITE, errno=errno.ENOMEM, nth=2)
        with pytest.raises(PopulateError):
            region.refill()
        assert region.stats().warm_size == 0


def test_a_refill_that_headroom_refuses_finds_it_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def limits(*_: Any) -> list[Limit]:
        left = 8 * MIB if made and region.stats().pending_size else 1 << 40
        return [Limit(Cause.MEMORY_CGROUP, left, "a limit", errno.ENOMEM)]

    made = False
    monkeypatch.setattr(region_module, "Gauge", lambda _, mode: Gauge(limits, mode))
    with Region("64M", block_size="2M", warm="16M", unplug_delay=1000) as region:
        made = True
        region.plug(0, 6)
        region.unplug(0, 2)
        region._core.gauge.forget()
        assert region.refill() == 12 * MIB, "what is ready was not given back for that"
        assert region.stats().pending_size == 0


def test_threads_share_it(block: int) -> None:
    failures: list[BaseException] = []
    with Region(2048 * block, block_size=block, warm=64 * block) as region:

        def work(start: int) -> None:
            try:
                for turn in range(200):
                    region.plug(start + turn % 256)
                    with region.view(start + turn % 256) as view:
                        assert view[0] == view[-1] == 0
                        view[0] = view[-1] = 7
                    if turn % 3:
                        region.unplug(start + turn % 256)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(512 * i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            region.refill()
        for thread in threads:
            thread.join()
        assert failures == []
        assert region.audit().ok


def test_a_block_that_is_plugged_already_takes_nothing() -> None:
    with Region("64M", block_size="2M", warm="8M") as region:
        region.plug(0)
        with pytest.raises(BlockStateError):
            region.plug(0, 2)
        assert region.stats().warm_size == 6 * MIB
