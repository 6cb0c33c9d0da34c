"""Every step of every kind's recipe fails with every errno of its man page: as test_faults, over all kinds of mapping.

The steps that reset before a populate are among them, and the second step of a discard that has two.
"""

from __future__ import annotations

import errno
from contextlib import nullcontext

import pytest

from sparsemem import DiscardError, PopulateError, Region, ReserveError, Secret, UnsupportedError
from sparsemem.recipes import FILLS, Step
from tests.support import accounting
from tests.support.filling import unfilled
from tests.support.injector import Injector
from tests.support.kinds import KINDS, Made
from tests.test_faults import OF_STEP, Told, check_others, number, plugged, ready, tainted

CHOSEN = [kind for kind in KINDS if kind.discards and kind.has_memory and not kind.id.endswith("4K")]
NAMES = [kind.id for kind in CHOSEN]
EACH = [pytest.param(kind.id, how, id=f"{kind.id}-{how}") for kind in CHOSEN for how in ("none", *kind.protections)]
RUNS = [(2, 1), (4, 1), (6, 1)]
GAPS = (3, 5)
HELD = {0, 9}

pytestmark = pytest.mark.slow


def part(made: Made) -> int:
    """The part of a call that is done before it fails: one page."""
    return 2 << 20 if made.kind.huge else 4096


def settled(made: Made, region: Region, before: int, held: set[int] = HELD) -> None:
    assert plugged(region) == held
    assert not tainted(region)
    assert 0 <= made.used(region) - before <= made.kind.slack
    check_others(region)


@pytest.mark.promise("plug-all-or-nothing")
@pytest.mark.parametrize("strategy", ["auto", "populate_write", "fallocate", "uffd_copy", "touch", "futex"])
@pytest.mark.parametrize("name", NAMES)
def test_a_plug(name: str, strategy: str, request: pytest.FixtureRequest, inject: Injector) -> None:
    try:
        made, region, told = ready(name, strategy, request, inject)
    except UnsupportedError as error:
        assert "does not work on" in str(error)
        return
    check_a_plug(made, region, told, inject)


@pytest.mark.parametrize(("name", "protection"), [each for each in EACH if "none" not in each.values])
def test_a_plug_of_protected_blocks(
    name: str, protection: str, request: pytest.FixtureRequest, inject: Injector
) -> None:
    check_a_plug(*ready(name, "auto", request, inject, protection), inject)


def check_a_plug(made: Made, region: Region, told: Told, inject: Injector) -> None:
    with region:
        before, mapping = made.used(region), region._mapping
        recipe = mapping.recipe  # type: ignore[attr-defined]
        for step in dict.fromkeys(recipe.populate(mapping.strategy, huge=mapping.huge, protection=region.protection)):
            for code in OF_STEP[step]:
                for nth, after in ((1, 0), (2, part(made)), (3, 0)):
                    inject.step(step, errno=number(code), nth=nth, after=after)
                    # What is filled in needs no other step: for those to come, nothing may be.
                    with pytest.raises(PopulateError) as caught, nullcontext() if step in FILLS else unfilled(region):
                        region.plug_runs(RUNS)
                    assert (caught.value.errno, caught.value.rolled_back) == (number(code), True), (step, code, nth)
                    assert told.blocks == HELD
                    inject.clear()
                    settled(made, region, before)
                    assert region._core.blocks.budget.used == 2 * region.block_size  # type: ignore[union-attr]
        assert region.plug_runs(RUNS) == 3
        assert region.audit().ok


@pytest.mark.promise("tainted-is-mended")
@pytest.mark.parametrize(("name", "protection"), EACH)
def test_a_rollback(name: str, protection: str, request: pytest.FixtureRequest, inject: Injector) -> None:
    """The third block cannot be populated, and from the nth on no discard works either."""
    made, region, told = ready(name, "auto", request, inject, protection)
    with region:
        before, mapping = made.used(region), region._mapping
        recipe = mapping.recipe  # type: ignore[attr-defined]
        way = recipe.ways(huge=mapping.huge, protection=protection)[mapping.strategy]
        fault = next(step for step in way if step not in recipe.discard)
        for step in recipe.release(protection):
            for nth, left in ((1, {2, 4, 6}), (2, {4, 6}), (3, {6}), (4, set())):
                inject.step(fault, errno=errno.ENOMEM, nth=3, after=part(made))
                inject.step(step, errno=errno.EIO, nth=nth, repeat=100)
                with pytest.raises(PopulateError) as caught:
                    region.plug_runs(RUNS)
                assert caught.value.errno == errno.ENOMEM
                assert caught.value.rolled_back is not bool(left)
                assert tainted(region) == left
                assert plugged(region) == told.blocks == HELD
                inject.clear()
                assert region.scrub() == len(left)
                settled(made, region, before)
                assert region.audit().ok


@pytest.mark.promise("unplug-says-what-happened")
@pytest.mark.parametrize(("name", "protection"), EACH)
def test_an_unplug(name: str, protection: str, request: pytest.FixtureRequest, inject: Injector) -> None:
    """What access could not be taken from is as it was; whatever else fails taints its block."""
    made, region, told = ready(name, "auto", request, inject, protection)
    held = HELD | set(GAPS)
    with region:
        for gap in GAPS:  # plugged, so that each block is a call of its own: no discard bridges them
            region.plug(gap)
        before = made.used(region)
        for step in region._mapping.recipe.release(protection):  # type: ignore[attr-defined]
            intact = step is Step.FORBID
            for code in OF_STEP[step]:
                for nth, after in ((1, 0), (2, part(made)), (3, part(made))):
                    region.plug_runs(RUNS)
                    inject.step(step, errno=number(code), nth=nth, after=after)
                    with pytest.raises(DiscardError) as caught:
                        region.unplug_runs(RUNS)
                    assert caught.value.errno == number(code)
                    assert caught.value.discarded == tuple(RUNS[: nth - 1])
                    assert caught.value.tainted == (() if intact else (RUNS[nth - 1],))
                    assert caught.value.remaining == tuple(RUNS[nth - intact :])
                    assert plugged(region) == told.blocks == held | {first for first, _ in RUNS[nth - 1 :]}
                    inject.clear()
                    assert region.scrub() == (not intact)
                    if intact:
                        with region.view(RUNS[nth - 1][0]) as view:
                            assert bytes(view[:8]) == made.kind.fresh(8)
                    assert region.unplug_runs(RUNS[nth - intact :]) == 3 - nth + intact
                    assert told.blocks == held
                    settled(made, region, before, held)
                    assert region.audit().ok


@pytest.mark.parametrize("call", ["memfd_secret", "ftruncate", "reserve"])
@pytest.mark.parametrize("code", ["EINVAL", "EMFILE", "ENFILE", "ENOMEM", "ENOSYS", "EPERM", "EAGAIN"])
def test_a_secret_that_cannot_be_had(call: str, code: str, inject: Injector) -> None:
    before = accounting.open_descriptors()
    inject.call(call, errno=number(code))
    with pytest.raises((ReserveError, UnsupportedError)):
        Region("4M", block_size=4096, backend=Secret())
    assert accounting.open_descriptors() == before
