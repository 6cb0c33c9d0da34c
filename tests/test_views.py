"""No use of a view, or of anything made from one, can reach unmapped memory."""

from __future__ import annotations

import gc
import sys
import threading
import weakref

import numpy as np
import pytest

from sparsemem import Memfd, Region, RegionClosedError, Simulated, UnsupportedError, ViewsAliveError
from tests.support import accounting
from tests.support.children import run_child

pytestmark = pytest.mark.promise("views-never-dangle")

BLOCK = 64 << 10


@pytest.fixture
def region() -> Region:
    region = Region("1M", block_size=BLOCK)
    region.plug(0, 8)
    yield region
    gc.collect()
    region.close()


def mapped(address: int) -> bool:
    return any(vma.start <= address < vma.end for vma in accounting.vmas(address, 1))


DERIVED = {
    "the view": lambda view: view,
    "a slice": lambda view: view[10:20],
    "a slice of a slice": lambda view: view[10:2000][5:],
    "a cast": lambda view: view.cast("Q"),
    "np.frombuffer": lambda view: np.frombuffer(view, dtype=np.uint8),
    "np.ndarray": lambda view: np.ndarray((16,), dtype=np.uint64, buffer=view),
    "an array of an array": lambda view: np.frombuffer(view, dtype=np.uint8)[5:].reshape(-1, 1)[::2],
    "a memoryview of it": lambda view: memoryview(view),
}


@pytest.mark.parametrize("how", DERIVED)
def test_whatever_is_made_from_a_view_pins_its_blocks(region: Region, how: str) -> None:
    derived = DERIVED[how](region.view(2, 2))
    gc.collect()
    for operation in (lambda: region.unplug(2), lambda: region.unplug(0, 8), region.close, region.unplug_all):
        with pytest.raises(ViewsAliveError, match="still alive"):
            operation()
    assert region.plugged_blocks == 8
    region.unplug(0, 2)
    region.unplug(4)
    assert region.stats().views == 1
    del derived
    gc.collect()
    assert region.stats().views == 0
    region.unplug(2, 2)


def test_a_view_is_the_memory(region: Region) -> None:
    with region.view(3) as view:
        assert (view.nbytes, view.format, view.readonly) == (BLOCK, "B", False)
        view[:5] = b"hello"
    with region.view() as whole:
        assert whole.nbytes == region.size
        assert bytes(whole[3 * BLOCK : 3 * BLOCK + 5]) == b"hello"
        del whole
    assert region.stats().views == 0


def test_the_whole_view_holds_off_close_but_not_unplug(region: Region) -> None:
    whole = region.view()
    assert region.unplug(0, 8) == 8
    with pytest.raises(ViewsAliveError):
        region.close()
    whole.release()


def test_a_released_view_pins_nothing(region: Region) -> None:
    view = region.view(0)
    view.release()
    region.unplug(0)


def test_a_view_in_a_reference_cycle_may_be_used_until_it_is_really_gone() -> None:
    """`__del__` runs after weak references have fired: an unmapped view would crash here."""
    seen = []

    class Holder:
        def __init__(self, view: memoryview) -> None:
            self.view = view
            self.array = np.ndarray((8,), dtype=np.uint8, buffer=view)
            self.me = self

        def __del__(self) -> None:
            view, array = self.view, self.array
            view[0] = 1
            seen.append((view[0], int(array[1])))

    for _ in range(20):
        region = Region("1M", block_size=BLOCK)
        region.plug(0)
        holder = Holder(region.view(0))
        try:
            raise LookupError
        except LookupError as error:
            with pytest.raises(LookupError), region:
                raise error from None
        assert region.closed
        del holder, region
        gc.collect()
    assert seen == [(1, 0)] * 20


@pytest.mark.promise("close-does-not-mask")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs Python 3.11: notes on exceptions")
def test_an_error_in_a_with_body_is_not_masked_by_a_view_that_lives() -> None:
    with pytest.raises(ZeroDivisionError) as caught, Region("1M", block_size=BLOCK) as region:
        region.plug(0)
        address, view = region.address, region.view(0)
        raise ZeroDivisionError
    assert "1 views" in caught.value.__notes__[0]
    assert region.closed
    with pytest.raises(RegionClosedError):
        region.plug(1)
    view[0] = 1
    assert mapped(address)
    del caught
    view.release()
    gc.collect()
    assert not mapped(address)


@pytest.mark.promise("close-does-not-mask")
def test_a_clean_exit_with_a_living_view_is_an_error() -> None:
    region = Region("1M", block_size=BLOCK)
    with pytest.raises(ViewsAliveError), region:
        region.plug(0)
        view = region.view(0)
    assert not region.closed
    view.release()
    region.close()


def test_memory_goes_with_close_if_nothing_uses_it() -> None:
    region = Region("1M", block_size=BLOCK)
    address = region.address
    assert mapped(address)
    region.close()
    assert not mapped(address)


def test_views_outlive_a_region_that_was_never_closed() -> None:
    region = Region("1M", block_size=BLOCK)
    region.plug(0)
    array = np.frombuffer(region.view(0), dtype=np.uint8)
    address = region.address
    with pytest.warns(ResourceWarning, match="unclosed"):
        del region
        gc.collect()
    array[:] = 3
    assert int(array.sum()) == 3 * BLOCK
    del array
    gc.collect()
    assert not mapped(address)


def test_use_after_close_in_a_child_does_not_crash() -> None:
    """`np.ndarray(buffer=view)` holds no export, only a reference: with mmap.mmap this is a crash."""

    def child() -> int:
        region = Region("1M", block_size=BLOCK)
        region.plug(0)
        array = np.ndarray((BLOCK,), dtype=np.uint8, buffer=region.view(0))
        with pytest.raises(ViewsAliveError):
            region.close()
        region._close(force=True)
        array[:] = 7
        return int(array[-1])

    assert run_child(child).result() == 7


def test_close_waits_for_a_plug_in_another_thread() -> None:
    entered, leave = threading.Event(), threading.Event()

    def latency(operation: str, length: int) -> float:
        entered.set()
        leave.wait(10)
        return 0.0

    region = Region("1M", block_size=BLOCK, backend=Simulated(latency=latency))
    plugger = threading.Thread(target=lambda: region.plug(0))
    plugger.start()
    assert entered.wait(10)
    closer = threading.Thread(target=region.close)
    closer.start()
    closer.join(0.2)
    assert closer.is_alive(), "it did not wait"
    assert not region.closed
    leave.set()
    closer.join(10)
    plugger.join(10)
    assert region.closed
    assert region.plugged_blocks == 1


def test_pins_and_plugs_of_many_threads() -> None:
    def work(first: int) -> None:
        for _ in range(200):
            region.plug(first)
            view = region.view(first)
            view[0] = 1
            array = np.frombuffer(view, dtype=np.uint8)
            del view
            array[1] = 2
            del array
            region.unplug(first)

    with Region("1M", block_size=BLOCK, backend=Memfd()) as region:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert region.stats().views == 0
        assert region.audit().ok


def test_a_simulated_region_has_nothing_to_view() -> None:
    with Region("1P", backend=Simulated()) as region:
        region.plug(0)
        with pytest.raises(UnsupportedError, match="no memory"):
            region.view(0)
        with pytest.raises(UnsupportedError):
            _ = region.address
        with pytest.raises(UnsupportedError, match="descriptor"):
            region.fileno()


def test_a_view_keeps_no_reference_to_the_region() -> None:
    region = Region("1M", block_size=BLOCK)
    region.plug(0)
    view, gone = region.view(0), weakref.ref(region)
    with pytest.warns(ResourceWarning):
        del region
        gc.collect()
    assert gone() is None
    view.release()
