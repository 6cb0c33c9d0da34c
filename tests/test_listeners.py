"""What listeners are told equals the bitmap, whatever happens."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from sparsemem import BlockStateError, DiscardError, ListenerVetoError, Region, Simulated
from sparsemem.backends import Fault
from tests.support.overtaking import Overtake

pytestmark = pytest.mark.promise("listeners-equal-bitmap")


class Listener:
    """Keeps the blocks that it knows, and a journal; vetoes what it is told to."""

    def __init__(self, name: str, journal: list[tuple[str, str, int, int]] | None = None) -> None:
        self.name = name
        self.journal = [] if journal is None else journal
        self.blocks: set[int] = set()
        self.veto: Callable[[str, int], bool] = lambda event, first: False

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def on_plug(self, first: int, count: int) -> None:
        self.journal.append((self.name, "plug", first, count))
        if self.veto("plug", first):
            raise LookupError("I would rather not")
        assert not self.blocks & set(range(first, first + count)), "told twice"
        self.blocks |= set(range(first, first + count))

    def on_unplug(self, first: int, count: int) -> None:
        self.journal.append((self.name, "unplug", first, count))
        if self.veto("unplug", first):
            raise LookupError("I would rather not")
        assert self.blocks >= set(range(first, first + count)), "told of blocks it never had"
        self.blocks -= set(range(first, first + count))


def plugged(region: Region) -> set[int]:
    return {block for first, count in region.plugged_runs() for block in range(first, first + count)}


@pytest.fixture
def journal() -> list[tuple[str, str, int, int]]:
    return []


@pytest.fixture
def trio(journal: list[tuple[str, str, int, int]]) -> list[Listener]:
    return [Listener(name, journal) for name in "abc"]


def test_plug_goes_in_registration_order_and_unplug_in_reverse(
    trio: list[Listener], journal: list[tuple[str, str, int, int]]
) -> None:
    with Region("1M", block_size="64K") as region:
        for listener in trio:
            region.add_listener(listener)
        region.plug_runs([(4, 1), (0, 2)])
        assert journal == [(name, "plug", *run) for name in "abc" for run in ((0, 2), (4, 1))]
        journal.clear()
        region.unplug_runs([(0, 2), (4, 1)])
        assert journal == [(name, "unplug", *run) for name in "cba" for run in ((0, 2), (4, 1))]


@pytest.mark.parametrize("who", [0, 1, 2])
@pytest.mark.parametrize("run", [0, 4, 8])
def test_a_veto_of_a_plug_undoes_it_for_all_who_were_told(trio: list[Listener], who: int, run: int) -> None:
    with Region("1M", block_size="64K") as region:
        for listener in trio:
            region.add_listener(listener)
        region.plug(12)
        trio[who].veto = lambda event, first: event == "plug" and first == run
        with pytest.raises(ListenerVetoError, match="refused on_plug") as caught:
            region.plug_runs([(0, 1), (4, 1), (8, 1)])
        assert isinstance(caught.value.__cause__, LookupError)
        assert plugged(region) == {12}
        assert all(listener.blocks == {12} for listener in trio)
        assert region.audit().ok
        trio[who].veto = lambda event, first: False
        region.plug_runs([(0, 1), (4, 1), (8, 1)])
        assert all(listener.blocks == {0, 4, 8, 12} for listener in trio)


@pytest.mark.parametrize("who", [0, 1, 2])
def test_a_veto_of_an_unplug_costs_nothing(trio: list[Listener], who: int) -> None:
    with Region("1M", block_size="64K") as region:
        for listener in trio:
            region.add_listener(listener)
        region.plug(0, 4)
        with region.view(0, 4) as view:
            view[:] = b"\7" * len(view)
        trio[who].veto = lambda event, first: event == "unplug"
        with pytest.raises(ListenerVetoError, match="refused on_unplug"):
            region.unplug(1, 2)
        trio[who].veto = lambda event, first: False
        assert plugged(region) == {0, 1, 2, 3}
        assert all(listener.blocks == {0, 1, 2, 3} for listener in trio)
        with region.view(0, 4) as view:
            assert view == b"\7" * len(view), "nothing was discarded"


def test_unplug_is_told_while_the_memory_is_still_there() -> None:
    seen = []

    class Reader:
        def on_plug(self, first: int, count: int) -> None:
            seen.append(("plug", whole[first * region.block_size]))
            whole[first * region.block_size] = 9

        def on_unplug(self, first: int, count: int) -> None:
            seen.append(("unplug", whole[first * region.block_size]))

    with Region("1M", block_size="64K") as region, region.view() as whole:
        reader = Reader()
        region.add_listener(reader)
        region.plug(3)
        region.unplug(3)
        assert seen == [("plug", 0), ("unplug", 9)]
        region.remove_listener(reader)
        del reader


def test_what_stays_plugged_after_a_failed_unplug_is_announced_again() -> None:
    backend = Simulated(faults=[Fault("discard", nth=3, errno=errno.EIO)])
    with Region("1M", block_size="64K", backend=backend) as region:
        listener = Listener("a")
        region.add_listener(listener)
        region.plug_runs([(0, 1), (4, 1), (8, 1)])
        region.unplug(0)
        region.plug(0)
        listener.journal.clear()
        with pytest.raises(DiscardError) as caught:
            region.unplug_runs([(0, 1), (4, 1), (8, 1)])
        assert listener.blocks == plugged(region)
        told_again = [entry for entry in listener.journal if entry[1] == "plug"]
        assert {entry[2] for entry in told_again} == plugged(region)
        assert caught.value.tainted


def test_a_new_listener_hears_what_is_plugged_and_a_leaving_one_that_it_goes() -> None:
    with Region("1M", block_size="64K") as region:
        region.plug_runs([(0, 2), (5, 1)])
        listener = Listener("late")
        region.add_listener(listener)
        assert listener.journal == [("late", "plug", 0, 2), ("late", "plug", 5, 1)]
        with pytest.raises(ValueError, match="registered already"):
            region.add_listener(listener)
        region.remove_listener(listener)
        assert listener.blocks == set()
        with pytest.raises(ValueError, match="not registered"):
            region.remove_listener(listener)
        region.unplug_all()
        assert listener.journal[-1] == ("late", "unplug", 5, 1)


def test_a_listener_that_refuses_the_replay_is_not_registered() -> None:
    with Region("1M", block_size="64K") as region:
        region.plug_runs([(0, 2), (5, 1)])
        listener = Listener("picky")
        listener.veto = lambda event, first: event == "plug" and first == 5
        with pytest.raises(ListenerVetoError):
            region.add_listener(listener)
        assert listener.blocks == set()
        region.plug(9)
        assert listener.blocks == set()


def test_close_tells_that_all_goes_and_may_be_refused() -> None:
    region = Region("1M", block_size="64K")
    listener = Listener("a")
    region.add_listener(listener)
    region.plug(0, 3)
    listener.veto = lambda event, first: event == "unplug"
    with pytest.raises(ListenerVetoError):
        region.close()
    assert not region.closed
    assert region.plugged_blocks == 3
    listener.veto = lambda event, first: False
    region.close()
    assert listener.blocks == set()


@pytest.mark.promise(
    "listeners-equal-bitmap", found="a listener that came while a close waited was not told that all went"
)
def test_who_comes_or_goes_while_a_close_waits_is_told_so_or_not(overtake: Overtake) -> None:
    for come in (True, False):
        region = Region("1M", block_size="64K")
        region.plug(0, 3)
        first, second = Listener("first"), Listener("second")
        region.add_listener(first)
        if come:
            overtake(lambda region=region, second=second: region.add_listener(second))
        else:
            region.add_listener(second)
            overtake(lambda region=region, second=second: region.remove_listener(second))
        region.close()
        for listener in (first, second):
            assert [event for _, event, _, _ in listener.journal] == ["plug", "unplug"]


@pytest.mark.promise("listeners-equal-bitmap", found="of two threads that removed a listener both told it so")
def test_of_two_who_add_or_remove_a_listener_at_once_the_second_is_refused(overtake: Overtake) -> None:
    with Region("1M", block_size="64K") as region:
        region.plug(0, 3)
        listener = Listener("a")
        overtake(lambda: region.add_listener(listener))
        with pytest.raises(ValueError, match="registered already"):
            region.add_listener(listener)
        assert listener.journal == [("a", "plug", 0, 3)]
        overtake(lambda: region.remove_listener(listener))
        with pytest.raises(ValueError, match="not registered"):
            region.remove_listener(listener)
        assert listener.journal == [("a", "plug", 0, 3), ("a", "unplug", 0, 3)]
        assert region.plug(5) == 1


def test_a_callback_on_the_blocks_being_changed_gets_an_error_and_not_a_deadlock() -> None:
    errors: list[BaseException] = []

    class Meddler:
        def on_plug(self, first: int, count: int) -> None:
            for operation in (
                lambda: region.unplug(first),
                lambda: region.plug(first, count),
                lambda: region.view(first),
                region.close,
                lambda: region.add_listener(Listener("x")),
            ):
                try:
                    operation()
                except BlockStateError as error:
                    errors.append(error)
            region.plug(20)  # other blocks are fine: the inner call vetoes nothing

        def on_unplug(self, first: int, count: int) -> None:
            pass

    with Region("4M", block_size="64K") as region:
        meddler = Meddler()
        region.add_listener(meddler)
        with pytest.raises(ListenerVetoError):  # plugging 20 calls the meddler again, who plugs 20 again
            region.plug(0, 2)
        assert len(errors) >= 5
        assert region.plugged_blocks == 0
        assert region.stats().busy_size == 0


def test_a_callback_may_work_on_other_blocks() -> None:
    class Helper:
        def on_plug(self, first: int, count: int) -> None:
            if first == 0:
                region.plug(30)

        def on_unplug(self, first: int, count: int) -> None:
            if first == 0:
                region.unplug(30)

    with Region("4M", block_size="64K") as region:
        helper = Helper()
        region.add_listener(helper)
        region.plug(0)
        assert plugged(region) == {0, 30}
        region.unplug(0)
        assert plugged(region) == set()
