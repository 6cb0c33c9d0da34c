"""What every kind of mapping must do, held against the kernel's own accounting of that very mapping."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import threading

import attrs
import pytest

from sparsemem import (
    Anonymous,
    BackendExhaustedError,
    Cause,
    Memfd,
    PopulateError,
    Region,
    UnsupportedError,
)
from sparsemem._sys import calls, lib
from sparsemem.backends import Backend
from tests.support import accounting
from tests.support.children import run_child
from tests.support.kinds import (
    Made,
    every_discarding,
    every_kind,
    every_viewable,
    every_viewable_or_protected,
    params,
)

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

PLUGGED = 6
PROT_NONE = 0


def write(region: Region, block: int, byte: int) -> None:
    with region.view(block) as view:
        view[:] = bytes([byte]) * len(view)


def holds(region: Region, block: int, byte: int) -> bool:
    with region.view(block) as view:
        return view == bytes([byte]) * len(view)


@pytest.mark.promise("reserve-costs-nothing")
@every_kind
def test_reserving_costs_nothing(made: Made) -> None:
    with made.region() as region:
        assert region.size == made.size
        assert made.used(region) == 0
        assert region.plugged_size == 0


@pytest.mark.promise("plugged-memory-is-there")
@pytest.mark.promise("audit-tells-the-truth")
@every_kind
def test_a_plug_takes_exactly_the_plugged_bytes(made: Made) -> None:
    with made.region() as region:
        assert region.plug(2, PLUGGED) == PLUGGED
        assert 0 <= made.used(region) - PLUGGED * region.block_size <= made.kind.slack
        assert region.plugged_size == PLUGGED * region.block_size
        assert region.audit().ok


@pytest.mark.promise("unplug-gives-back")
@every_discarding
def test_an_unplug_gives_exactly_those_bytes_back(made: Made) -> None:
    with made.region() as region:
        region.plug(0, PLUGGED)
        if made.kind.has_memory:
            for block in range(PLUGGED):
                write(region, block, 1)
        region.unplug(1, 3)
        assert 0 <= made.used(region) - (PLUGGED - 3) * region.block_size <= made.kind.slack
        region.unplug_all()
        assert made.used(region) <= made.kind.slack


@pytest.mark.promise("unplug-gives-back")
@every_viewable_or_protected
def test_neighbours_keep_their_content(made: Made) -> None:
    with made.region() as region:
        region.plug(0, 3)
        for block in range(3):
            write(region, block, block + 1)
        region.unplug(1)
        region.plug(1)
        assert holds(region, 0, 1)
        assert holds(region, 2, 3)


@pytest.mark.promise("plugged-reads-zero")
@pytest.mark.parametrize("strategy", ["auto", "futex"])
@every_viewable
def test_a_block_plugged_again_is_fresh_even_after_a_stray_write(made: Made, strategy: str) -> None:
    made.backend = attrs.evolve(made.backend, strategy=strategy)  # type: ignore[misc]
    with made.region() as region:
        block = region.block_size
        region.plug(0, 2)
        write(region, 1, 7)
        region.unplug(1)
        with region.view() as whole:
            whole[block : block + 5] = b"stray"
        region.plug(1)
        with region.view(1) as view:
            assert bytes(view) == made.kind.fresh(block)


@pytest.mark.promise("plugged-memory-is-there")
@pytest.mark.parametrize("made", params(protected=True), indirect=True)
def test_after_a_plug_every_byte_can_be_written_and_read(made: Made) -> None:
    if not made.kind.has_memory:
        with made.region() as region, pytest.raises(UnsupportedError, match="no memory"):
            region.view()
        return

    def touch_all() -> bool:
        with made.region() as region:
            region.plug(0, 3)
            with region.view(0, 3) as view:
                view[:] = b"\xa5" * len(view)
                return view == b"\xa5" * len(view)

    assert run_child(touch_all).result()


@pytest.mark.promise("plug-all-or-nothing")
@every_viewable
def test_a_protected_range_is_refused_and_rolled_back(made: Made) -> None:
    with made.region() as region:
        region.plug(0)
        write(region, 0, 9)
        before = made.used(region)
        block = region.block_size
        assert libc.mprotect(region.address + 2 * block, block, PROT_NONE) == 0
        with pytest.raises(PopulateError) as caught:
            region.plug(1, 3)
        assert caught.value.rolled_back
        assert not isinstance(caught.value, BackendExhaustedError)
        assert caught.value.cause is Cause.PROTECTION
        assert made.used(region) == before
        assert list(region.plugged_runs()) == [(0, 1)]
        assert holds(region, 0, 9)
        assert libc.mprotect(region.address + 2 * block, block, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        region.plug(1, 3)


def test_a_hole_in_the_mapping_is_reported_and_cleaned_up() -> None:
    """A rollback that meets the hole goes on past it, and the blocks it failed on are tainted."""
    with Region("64M", block_size="64K") as region:
        block = region.block_size
        assert libc.munmap(region.address + 5 * block, block) == 0
        with pytest.raises(PopulateError) as caught:
            region.plug(4, 4)
        assert caught.value.cause is Cause.MAPPING_HOLE
        assert region.plugged_size == 0
        assert not caught.value.rolled_back
        assert list(region.tainted_runs()) == [(4, 2)] or list(region.tainted_runs()) == [(4, 4)]
        # Mend the mapping, and scrub() mends the blocks.
        calls.kernel.reserve_placeholder(region.address + 5 * block, block)
        assert region.scrub() > 0
        assert region.plug(4, 4) == 4


def test_other_mappings_may_change_while_blocks_are_plugged() -> None:
    """Concurrent changes of the layout are tolerated: each page is populated once all the same."""
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            with mmap.mmap(-1, 1 << 20) as other:
                other[0] = 1

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        with Region("1G", block_size="4K") as region:
            for _ in range(5):
                region.plug(0, 4096)
                assert region.audit().resident_size == 4096 * 4096
                region.unplug_all()
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    "backend", [Anonymous(), Anonymous(thp=False), Memfd(), Memfd(shared=False), Anonymous(shared=True)], ids=str
)
def test_the_regions_own_mapping_may_be_cut_and_joined_meanwhile(backend: Backend) -> None:
    """Somebody's MADV_DONTDUMP on a part splits it in two, MADV_DODUMP joins it again: in the middle of the work."""
    dontdump, dodump = 16, 17
    stop, most = threading.Event(), [0]

    with Region("1G", block_size="2M", backend=backend, dump=True) as region:

        def churn() -> None:
            chance = random.Random(1)
            while not stop.is_set():
                at = region.address + chance.randrange(0, 60) * region.block_size + 4096 * chance.randrange(512)
                for advice in (dontdump, dodump):
                    calls.kernel.madvise(at, 4 << 20, advice)
                    if advice == dontdump and not most[0] > 1:
                        most[0] = len(accounting.vmas(region.address, region.size))

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for _ in range(8):
                region.plug(0, 64)
                with region.view(0, 64) as view:
                    view[:] = b"\x5a" * len(view)
                region.unplug_runs([(1, 30), (40, 2)])
                with region.view(31, 9) as view:
                    assert bytes(view) == b"\x5a" * len(view)
                region.plug_runs([(1, 30), (40, 2)])
                with region.view(1, 30) as view:
                    assert not any(view[::4096])
                assert region.audit().ok
                region.unplug_all()
                assert region.audit().resident_size == 0
        finally:
            stop.set()
            thread.join()
    assert most[0] > 1, "it was cut"


@every_viewable
def test_the_audit_finds_a_stray_write_as_a_leak(made: Made) -> None:
    with made.region() as region:
        region.plug(0)
        with region.view() as whole:
            whole[3 * region.block_size] = 1
        audit = region.audit()
        assert audit.leaks == ((3, 1),)
        # One page, or the huge page that a fault may bring in at once.
        assert audit.leaked_size in (region.page_size, region.block_size)
        assert not audit.gaps
        assert not audit.ok


@every_viewable_or_protected
def test_the_audit_finds_memory_discarded_behind_its_back_as_a_gap(made: Made) -> None:
    with made.region() as region:
        region.plug(0, 2)
        offset = region.block_size
        if made.kind.shared_file:
            flags = lib.FALLOC_FL_PUNCH_HOLE | lib.FALLOC_FL_KEEP_SIZE
            calls.kernel.fallocate(region.fileno(), flags, offset, region.page_size)
        else:
            advice = lib.MADV_REMOVE if made.kind.id == "anonymous shared" else lib.MADV_DONTNEED
            if made.kind.id == "anonymous private 2M":
                offset = 0  # a whole huge page: part of one is not given back before it is split
                calls.kernel.madvise(region.address + offset, region.block_size, advice)
            else:
                calls.kernel.madvise(region.address + offset, region.page_size, advice)
        audit = region.audit()
        assert audit.gaps == ((offset // region.block_size, 1),)
        assert audit.gap_size in (region.page_size, region.block_size)
        assert not audit.leaks


@pytest.mark.parametrize("made", params(where=lambda kind: kind.has_file), indirect=True)
def test_the_audit_finds_what_somebody_allocated_through_the_descriptor(made: Made) -> None:
    """As a leak where the kernel can place it, as a total where not; behind a private mapping as double memory."""
    with made.region() as region:
        block = region.block_size
        region.plug(0, 2)
        calls.kernel.fallocate(region.fileno(), lib.FALLOC_FL_KEEP_SIZE, 5 * block, block)
        audit = region.audit()
        placed = sum(n for _, n in audit.leaks) * block
        if made.kind.id == "disk file private":
            # Not seen: an ext4's total has its metadata in it, and the pages of a private mapping are elsewhere.
            assert audit.ok
        else:
            assert not audit.ok
            assert (placed, audit.unaccounted_size) in ((block, 0), (0, block))
        assert not audit.gaps


@pytest.mark.parametrize("private", [False, True])
def test_memory_allocated_in_the_file_but_untouched_is_unaccounted(private: bool) -> None:
    with Region("64M", block_size="64K", backend=Memfd(shared=not private)) as region:
        region.plug(0, 2)
        os.posix_fallocate(region.fileno(), 1 << 20, 128 << 10)
        audit = region.audit()
        # fallocated, untouched shmem shows in the file's total alone
        assert audit.unaccounted_size == 128 << 10
        assert not audit.ok


@pytest.mark.promise("audit-tells-the-truth")
@pytest.mark.filterwarnings("ignore::sparsemem.HugePageSplitWarning")
@every_discarding
def test_pages_discarded_inside_a_block_are_no_gap(made: Made) -> None:
    with made.region() as region:
        page = region.page_size
        region.plug(0, 2)
        if made.kind.has_memory:
            write(region, 0, 5)
        if made.kind.id == "anonymous private 2M":
            page = region.block_size  # part of a transparent huge page frees nothing before it is split
        region.discard(0, page)
        audit = region.audit()
        assert audit.ok
        assert audit.discarded_size == page
        assert 0 <= made.used(region) - (2 * region.block_size - page) <= made.kind.slack
        assert region.is_plugged(0, 2)
        if made.kind.has_memory and not made.catches_discarded:
            with region.view(0) as view:
                assert bytes(view[:16]) == made.kind.fresh(16)
                assert page == region.block_size or view[page] == 5
        region.populate(0, page)
        assert region.audit().discarded_size == 0
        assert region.audit().ok
