"""Protection of unplugged blocks: a stray access is caught, and all that a region promises holds as before."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem import (
    Anonymous,
    BackendExhaustedError,
    Cause,
    DiscardError,
    File,
    Memfd,
    PopulateError,
    Region,
    ReserveError,
    Secret,
    Simulated,
    UnsupportedError,
)
from sparsemem._sys import calls, lib, probe
from sparsemem.backends import Backend
from sparsemem.recipes import Step
from sparsemem.runs import join, subtract
from tests.support import accounting
from tests.support.children import run_child, unprivileged
from tests.support.filling import unfilled
from tests.support.injector import Injector
from tests.support.kinds import KINDS, Made, every_protected, need_protection
from tests.support.resources import need_root

BLOCK = 64 << 10
MIB = 1 << 20
SIGNAL = {"trap": signal.SIGBUS, "guard": signal.SIGSEGV, "prot_none": signal.SIGSEGV}
PROTECTIONS = list(SIGNAL)
BACKENDS = [Anonymous(), Anonymous(shared=True), Memfd(), Memfd(shared=False)]


@pytest.fixture(params=PROTECTIONS)
def protection(request: pytest.FixtureRequest) -> str:
    need_protection(request.param)
    return str(request.param)


def accessible(region: Region, offset: int) -> bool:
    """Whether a byte can be read and written, as the kernel finds in a system call: without a signal."""
    with region.view() as whole, open_file() as file:
        try:
            os.pwrite(file, whole[offset : offset + 1], 0)
            os.preadv(file, [whole[offset : offset + 1]], 0)
        except OSError as error:
            assert error.strerror == "Bad address"
            return False
        return True


@contextmanager
def open_file() -> Iterator[int]:
    file = os.memfd_create("a byte")
    try:
        yield file
    finally:
        os.close(file)


def accessible_blocks(region: Region) -> list[int]:
    """Those whose first and last byte are; it must be both or none."""
    found = []
    for block in range(region.nblocks):
        ends = {
            accessible(region, block * region.block_size + at)
            for at in (0, region.block_size // 2, region.block_size - 1)
        }
        assert len(ends) == 1, f"a part of block {block} is accessible"
        found += [block] if ends == {True} else []
    return found


def renew_file(made: Made) -> None:
    """As if no child had made the file before; a template stays."""
    if isinstance(made.backend, File) and made.backend.path is not None and "template" not in made.kind.id:
        path = Path(made.backend.path)
        path.unlink(missing_ok=True)
        if "adopted" in made.kind.id:
            path.touch()


# ---- what it is for --------------------------------------------------------------------------


@pytest.mark.promise("strays-are-caught")
@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
@every_protected
def test_a_stray_access_is_caught_and_plugged_blocks_work(made: Made, write: bool) -> None:
    """Of a block that never was plugged, one that was unplugged again, and the very last byte."""

    def child(block: int) -> int:
        renew_file(made)
        region = made.region(8 * made.kind.block_size)
        region.plug(1, 3)
        whole, size = region.view(), region.block_size
        whole[2 * size : 4 * size] = b"x" * (2 * size)
        region.unplug(2)
        assert whole[3 * size] == ord("x")
        at = (block + 1) * size - 1
        if write:
            whole[at] = 1
        return whole[at]

    assert run_child(child, 1).result() == (1 if write else made.kind.fresh(8)[7])
    for block in (0, 2, 7):
        assert run_child(child, block).signal is SIGNAL[made.protection], block


@pytest.mark.promise("strays-are-caught")
@every_protected
def test_a_system_call_on_an_unplugged_block_is_an_error(made: Made) -> None:
    with made.region(8 * made.kind.block_size) as region:
        assert accessible_blocks(region) == []
        region.plug_runs([(1, 2), (5, 1)])
        assert accessible_blocks(region) == [1, 2, 5]
        region.unplug(1)
        assert accessible_blocks(region) == [2, 5]
        region.plug(0, 2)
        assert accessible_blocks(region) == [0, 1, 2, 5]
        region.unplug_all()
        assert accessible_blocks(region) == []
        assert region.audit().ok
        assert region.audit().resident_size == 0
        assert made.used(region) <= made.kind.slack


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_it_needs_no_privilege(backend: Backend, protection: str) -> None:
    need_root("to drop privileges")

    def child(block: int) -> int:
        region = Region("1M", block_size=BLOCK, backend=backend, protection=protection)
        region.plug(0, 4)
        region.unplug(1)
        assert accessible_blocks(region) == [0, 2, 3]
        whole = region.view()
        whole[block * BLOCK] = 1
        return whole[block * BLOCK]

    assert unprivileged(child, 0).result() == 1
    assert unprivileged(child, 1).signal is SIGNAL[protection]
    assert unprivileged(child, 9).signal is SIGNAL[protection]


@pytest.mark.promise("strays-are-caught")
@every_protected
def test_what_a_failed_plug_has_begun_is_protected_again(made: Made, inject: Injector) -> None:
    with made.region(8 * made.kind.block_size) as region:
        mapping = region._mapping
        last = mapping.recipe.populate(  # type: ignore[attr-defined]
            mapping.strategy, huge=mapping.huge, protection=made.protection
        )[-1]
        for nth in (1, 2, 3):
            inject.step(last, errno=12, nth=nth, after=region.page_size)
            with pytest.raises(PopulateError), unfilled(region):
                region.plug_runs([(1, 1), (3, 1), (5, 1)])
            inject.clear()
            assert accessible_blocks(region) == []
            assert region.audit().ok
            assert made.used(region) <= made.kind.slack
        region.plug_runs([(1, 1), (3, 1), (5, 1)])
        assert accessible_blocks(region) == [1, 3, 5]


@pytest.mark.promise("strays-are-caught")
@settings(max_examples=40)
@given(
    protection=st.sampled_from(PROTECTIONS),
    backend=st.sampled_from(BACKENDS),
    steps=st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 15), min_size=1)), max_size=8),
)
def test_exactly_the_plugged_blocks_are_accessible(
    protection: str, backend: Backend, steps: list[tuple[bool, set[int]]]
) -> None:
    need_protection(protection)
    with Region("256K", block_size="16K", backend=backend, protection=protection) as region:
        model: dict[int, int] = {}
        for plug, blocks in steps:
            if plug:
                region.plug_runs([(block, 1) for block in blocks], exist_ok=True)
                for block in blocks - set(model):
                    assert region.view(block) == bytes(16 << 10)
                    region.view(block)[:] = bytes([block + 1]) * (16 << 10)
                    model[block] = block + 1
            else:
                region.unplug_runs([(block, 1) for block in blocks], missing_ok=True)
                for block in blocks & set(model):
                    del model[block]
            assert accessible_blocks(region) == sorted(model)
            assert all(region.view(block) == bytes([byte]) * (16 << 10) for block, byte in model.items())
            assert region.audit().ok
            assert region.audit().resident_size == len(model) * (16 << 10)


# ---- the ways of plugging and unplugging ---------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_large_and_scattered_operations(backend: Backend, protection: str, threads: int) -> None:
    """In several chunks, by several threads, in vectored calls, with gaps that a discard bridges."""
    with Region("256M", block_size="4K", backend=backend, protection=protection, threads=threads) as region:
        region.plug(0, 40960)
        with region.view(0, 40960) as view:
            view[::4096] = b"x" * 40960
        region.unplug_all()
        assert region.audit().resident_size == 0
        scattered = [(i * 3, 1) for i in range(2000)]
        region.plug_runs(scattered)
        assert region.audit().ok
        assert region.audit().resident_size == 2000 * 4096
        region.unplug_runs(scattered[1::2])
        for block in (0, 6, 5994):
            assert accessible(region, block * 4096)
            assert not accessible(region, block * 4096 + 4096)
            assert not accessible(region, (block + 3) * 4096)
        region.unplug_all()
        assert not accessible(region, 0)
        assert region.audit().ok
        assert region.audit().resident_size == 0


@pytest.mark.parametrize("listening", [False, True], ids=["short way", "long way"])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_both_ways_of_a_single_block(backend: Backend, protection: str, listening: bool) -> None:
    class Listener:
        def on_plug(self, first: int, count: int) -> None:
            assert accessible(region, first * BLOCK)

        def on_unplug(self, first: int, count: int) -> None:
            assert accessible(region, first * BLOCK)

    with Region("1M", block_size=BLOCK, backend=backend, protection=protection) as region:
        if listening:
            region.add_listener(Listener())
        for _ in range(3):
            region.plug(3)
            assert accessible_blocks(region) == [3]
            region.unplug(3)
            assert accessible_blocks(region) == []


def test_blocks_that_start_out_plugged_are_accessible_and_no_others(protection: str) -> None:
    with Region("1M", block_size=BLOCK, backend=Memfd(), plugged=[(2, 3)], protection=protection) as mine:
        assert accessible_blocks(mine) == [2, 3, 4]
        with mine.view(2) as view:
            view[:5] = b"hello"
        theirs = Memfd(fd=mine.fileno(), existing="adopt")
        with Region("1M", block_size=BLOCK, backend=theirs, protection=protection) as peer:
            assert accessible_blocks(peer) == [2, 3, 4]
            assert peer.view(2)[:5] == b"hello"


def test_old_data_that_is_discarded_is_not_accessible(tmp_path: Path, protection: str) -> None:
    file = os.memfd_create("old")
    os.pwrite(file, b"old" * BLOCK, 0)
    os.truncate(file, MIB)
    backend = Memfd(fd=file, existing="discard")
    with Region("1M", block_size=BLOCK, backend=backend, protection=protection) as region:
        assert accessible_blocks(region) == []
        region.plug(0)
        assert region.view(0) == bytes(BLOCK)
    os.close(file)


def test_a_warm_pool_serves_protected_blocks(protection: str) -> None:
    if not probe.uffd_move(calls.kernel):
        pytest.skip("needs userfaultfd")
    for block, thp in (("64K", None), ("2M", None if protection != "guard" else False)):
        backend = Anonymous(thp=thp)
        with Region("64M", block_size=block, backend=backend, warm="8M", protection=protection) as region:
            ready = region.stats().warm_size
            region.plug(2, 2)
            assert region.stats().warm_size == ready - 2 * region.block_size
            assert region.audit().ok
            assert region.view(2, 2) == bytes(2 * region.block_size)
            assert not accessible(region, 0)
            region.unplug(2)
            assert not accessible(region, 2 * region.block_size)
            assert region.refill() > 0
            assert region.audit().ok


def test_a_warm_pool_of_huge_pages_does_not_go_with_guards() -> None:
    """Moved to where a guard has left a page table they would be split, and their zeroes lose their memory."""
    need_protection("guard")
    with pytest.raises(UnsupportedError, match="does not go with protection='guard'"):
        Region("64M", block_size="2M", backend=Anonymous(thp=True), warm="8M", protection="guard")


def test_locked_memory_is_protected_all_the_same(protection: str) -> None:
    """mlockall() after the region was made: guards are refused on locked memory, so it is unlocked for that."""

    def child() -> list[int]:
        mlockall = ctypes.CDLL(None, use_errno=True).mlockall
        with Region("1M", block_size=BLOCK, protection=protection) as region:
            region.plug(0, 4)
            if mlockall(1 | 4) != 0:  # MCL_CURRENT | MCL_ONFAULT
                raise OSError(ctypes.get_errno(), "mlockall")
            region.unplug(1)
            region.plug(8)
            return accessible_blocks(region)

    need_root("to lock memory")
    assert run_child(child).result() == [0, 2, 3, 8]


# ---- pages discarded within plugged blocks --------------------------------------------------------


@every_protected
@pytest.mark.filterwarnings("ignore::sparsemem.HugePageSplitWarning")
def test_pages_discarded_in_a_plugged_block(made: Made) -> None:
    """They stay accessible, but where missing pages trap and only memory could make them read zero."""
    with made.region(8 * made.kind.block_size) as region:
        region.plug(2)
        page, at = region.page_size, 2 * region.block_size
        region.view(2)[:] = b"x" * region.block_size
        region.discard(at, page)
        assert accessible(region, at) is not made.catches_discarded
        if not made.catches_discarded:
            assert region.view(2)[:8] == made.kind.fresh(8)
            region.view(2)[0] = 5
        region.populate(at, page)
        assert accessible(region, at)
        assert region.view(2)[1] == made.kind.fresh(2)[1]
        assert region.view(2)[0] == (made.kind.fresh(1)[0] if made.catches_discarded else 5)
        assert region.view(2)[page:] == b"x" * (region.block_size - page)
        assert region.audit().ok


def test_a_page_that_reads_zero_after_a_discard_takes_no_memory() -> None:
    need_protection("trap")
    with Region("1M", block_size=BLOCK, protection="trap") as region:
        region.plug(0)
        region.discard(0, 8192)
        assert region.view(0)[:8192] == bytes(8192)
        assert region.audit().resident_size == BLOCK - 8192
        assert region.audit().discarded_size == 8192


# ---- what does not go together ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protection": "fence"}, "protection 'fence' is none of 'none', 'trap', 'guard', 'prot_none'"),
        ({"protection": "trap", "backend": Anonymous(thp=True)}, "thp=True does not go with protection='trap'"),
        ({"protection": "trap", "unplug_delay": 1}, "unplug_delay does not go with protection='trap'"),
        ({"protection": "guard", "unplug_delay": 1}, "still has its memory would not be protected"),
        ({"protection": "prot_none", "unplug_delay": 1}, "unplug_delay does not go with protection='prot_none'"),
    ],
)
def test_options_that_stand_against_it_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Region("64M", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protection": "trap", "backend": Anonymous(strategy="populate_write")}, "would itself be trapped.*uffd_copy"),
        (
            {"protection": "trap", "backend": Memfd(strategy="fallocate")},
            "strategy 'fallocate' would itself be trapped",
        ),
        ({"protection": "trap", "backend": Simulated()}, "simulated has no protection='trap'"),
        ({"protection": "guard", "backend": Simulated()}, "simulated has no protection='guard'"),
    ],
)
def test_what_cannot_be_is_unsupported_with_the_reason(options: dict[str, object], message: str) -> None:
    need_protection("trap")
    before = accounting.open_descriptors()
    with pytest.raises(UnsupportedError, match=message):
        Region("64M", **options)  # type: ignore[arg-type]
    assert accounting.open_descriptors() == before


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.has_memory], ids=lambda kind: kind.id)
def test_every_kind_has_the_protections_that_it_can_have(kind: object, request: pytest.FixtureRequest) -> None:
    from tests.support.kinds import Kind, make

    assert isinstance(kind, Kind)
    made = make(kind, request)
    reasons = {"trap": "traps no accesses|a template's", "guard": "hugetlb pages of 2M cannot", "prot_none": "never"}
    for protection, reason in reasons.items():
        need_protection(protection)
        if protection in kind.protections:
            made.region(8 * kind.block_size, protection=protection).close()
            continue
        reason = "its blocks are never unplugged" if kind.id == "memfd_secret" else reason
        with pytest.raises(UnsupportedError, match=f"protection='{protection}' does not work on .*{reason}"):
            made.region(8 * kind.block_size, protection=protection)


def test_a_refusal_leaves_no_file(tmp_path: Path) -> None:
    if probe.file_system(str(tmp_path)) == lib.TMPFS_MAGIC:
        pytest.skip("needs a temporary folder on a disk")
    with pytest.raises(UnsupportedError, match="no accesses to files on disks"):
        Region("1M", block_size=BLOCK, backend=File(tmp_path / "file"), protection="trap")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("works", ["trap", "guard"])
def test_a_kernel_without_it_is_told_from_one_with_it(works: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, works, lambda _: False)
    with pytest.raises(UnsupportedError, match=r"userfaultfd that traps|MADV_GUARD_INSTALL that audits can see"):
        Region("1M", block_size=BLOCK, protection=works)


@pytest.mark.parametrize("call", ["userfaultfd", "register"])
@pytest.mark.parametrize("code", ["EPERM", "EMFILE", "ENOMEM", "EBUSY"])
def test_what_the_kernel_refuses_this_time_is_told(call: str, code: str, inject: Injector) -> None:
    import errno

    need_protection("trap")
    with Region("1M", block_size=BLOCK, protection="trap"):  # the probes have worked
        before = accounting.open_descriptors()
        inject.call(call, errno=getattr(errno, code))
        with pytest.raises(ReserveError, match="userfaultfd does not trap") as caught:
            Region("1M", block_size=BLOCK, protection="trap")
        assert caught.value.errno == getattr(errno, code)
        gc.collect()
        assert accounting.open_descriptors() == before


# ---- what it costs ------------------------------------------------------------------------------------


def test_a_trap_is_one_mapping_one_descriptor_and_no_huge_pages() -> None:
    need_protection("trap")
    gc.collect()
    before = list(accounting.open_descriptors().values()).count("anon_inode:[userfaultfd]")
    with Region("1T", block_size="2M", backend=Anonymous(), protection="trap") as region:
        region.plug_runs([(i * 2, 1) for i in range(20)])
        assert len(accounting.vmas(region.address, region.size)) == 1
        assert region.audit().huge_size == 0
        assert "thp=False" in repr(region)
        now = list(accounting.open_descriptors().values()).count("anon_inode:[userfaultfd]")
        assert now == before + 1, "the strategy fills through the same one"
        with pytest.raises(UnsupportedError, match="no huge pages of memory that traps"):
            region.collapse(0)
    del region
    gc.collect()
    assert list(accounting.open_descriptors().values()).count("anon_inode:[userfaultfd]") == before


def page_tables() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmPTE:"))


def test_guards_are_one_mapping_and_two_mebibytes_of_page_tables_a_gibibyte() -> None:
    need_protection("guard")
    before = page_tables()
    with Region("1G", block_size="64K", protection="guard") as region:
        assert 2 * MIB <= page_tables() - before < 3 * MIB
        region.plug_runs([(i * 2, 1) for i in range(20)])
        assert len(accounting.vmas(region.address, region.size)) == 1
        assert region.audit().ok


def test_guards_for_which_there_is_no_memory_are_refused_up_front() -> None:
    need_protection("guard")
    with Region("1G") as region:
        room = region.headroom().available
    size = 1 << (4 * room * (4096 // 8)).bit_length()  # whose page tables are more than twice that
    if size > 1 << 46:
        pytest.skip("needs a machine with less memory: address space for guards that it has no memory for")
    before = page_tables()
    with pytest.raises(ReserveError, match=r"guards on .* take .* of page tables.*protection='trap' takes none"):
        Region(size, protection="guard")
    assert page_tables() - before < MIB


@pytest.mark.parametrize("protection", ["guard", "prot_none"])
@pytest.mark.parametrize("backend", [Anonymous(), Memfd()], ids=str)
def test_huge_pages_stay_huge(backend: Backend, protection: str) -> None:
    need_protection(protection)
    with Region("64M", backend=backend) as region:
        region.plug(0, 4)
        huge = region.audit().huge_size
    with Region("64M", backend=backend, protection=protection) as region:
        for _ in range(2):
            region.plug(0, 4)
            assert region.audit().huge_size == huge
            region.unplug_all()


def test_prot_none_is_a_mapping_for_each_run() -> None:
    with Region("64M", block_size=BLOCK, backend=Memfd(), protection="prot_none") as region:
        assert len(accounting.vmas(region.address, region.size)) == 1
        region.plug_runs([(1, 2), (4, 1), (8, 2)])
        assert len(accounting.vmas(region.address, region.size)) == 7
        region.unplug_all()
        assert len(accounting.vmas(region.address, region.size)) == 1


@pytest.mark.parametrize("after", [0, 4096])
def test_prot_none_gives_access_back_to_all_that_a_failed_unplug_has_left_as_it_was(
    after: int, inject: Injector
) -> None:
    """In a vectored call access to many runs is taken away before the first of them is discarded."""
    runs = [(4 * i + 1, 1) for i in range(12)]
    with Region("4M", block_size=BLOCK, protection="prot_none") as region:
        region.plug(0, 50)
        region.view(0, 50)[:] = b"x" * 50 * BLOCK
        inject.step(Step.FORBID, errno=errno.ENOMEM, nth=6, after=after)
        with pytest.raises(DiscardError) as caught:
            region.unplug_runs(runs)
        error = caught.value
        assert error.tainted == ()
        assert join([*error.discarded, *error.remaining]) == runs
        left = subtract([(0, 50)], error.discarded)
        assert list(region.plugged_runs()) == left
        assert accessible_blocks(region) == [block for first, count in left for block in range(first, first + count)]
        assert all(region.view(*run) == b"x" * run[1] * BLOCK for run in left)
        assert region.unplug_runs(error.remaining) == len(error.remaining)
        assert accessible_blocks(region) == [block for block in range(50) if block % 4 != 1 or block == 49]
        assert region.audit().ok


def test_prot_none_leaves_protected_what_lies_between_blocks_whose_unplug_fails(inject: Injector) -> None:
    """Nothing unplugged is part of what access is given back to: no gap is bridged, nor one inside of a run."""
    for unplug in (
        lambda region: region.unplug_runs([(2, 2), (6, 2)]),
        lambda region: region.unplug(2, 6, missing_ok=True),
        lambda region: region.unplug_all(),
    ):
        with Region("1M", block_size=BLOCK, protection="prot_none") as region:
            region.plug_runs([(0, 4), (6, 4)])
            inject.step(Step.FORBID, errno=errno.ENOMEM)
            with pytest.raises(DiscardError) as caught:
                unplug(region)
            assert (caught.value.discarded, caught.value.tainted) == ((), ())
            assert accessible_blocks(region) == [0, 1, 2, 3, 6, 7, 8, 9]
            assert region.audit().ok


def test_prot_none_taints_what_access_cannot_be_given_back_to() -> None:
    """A sealed block can be protected no more, and all that was to go with it is as unknown as that."""

    def child() -> tuple[Any, Any, list[int], int]:
        region = Region("4M", block_size=BLOCK, protection="prot_none")
        region.plug(0, 50)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(462, ctypes.c_void_p(region.address + 5 * BLOCK), ctypes.c_size_t(BLOCK), 0):
            return None, None, [], ctypes.get_errno()
        try:
            region.unplug_runs([(4 * i + 1, 1) for i in range(12)])
        except DiscardError as error:
            return error.discarded, error.tainted, accessible_blocks(region), 0
        raise AssertionError("a sealed block was protected")

    discarded, tainted, accessible, failed = run_child(child).result()
    if failed:
        pytest.skip("needs a kernel with mseal() (Linux 6.10)")
    assert join([*discarded, *tainted]) == [(1, 1), (5, 1)]
    assert (5, 1) in tainted
    assert [block for block in range(50) if block not in accessible] == [first for first, _ in discarded]


@pytest.mark.promise("strays-are-caught")
@pytest.mark.slow
@pytest.mark.parametrize("way", ["unplug", "unplug_runs"])
def test_prot_none_with_no_mappings_left_changes_nothing(way: str) -> None:
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    if most > 1 << 20:
        pytest.skip("needs a usual vm.max_map_count")

    def child() -> tuple[int, bool]:
        with Region(2 * most * 8192, block_size="4K", backend=Memfd(), protection="prot_none") as region:
            with pytest.raises(PopulateError) as failed:
                region.plug_runs([(i * 2 + 64, 1) for i in range(most)])
            assert failed.value.errno == 12
            assert not isinstance(failed.value, BackendExhaustedError)
            assert failed.value.cause is Cause.MAPPINGS
            region.scrub()
            assert region.plugged_size == 0
            assert region.audit().ok
            region.plug(0, 32)
            region.view(0, 32)[:] = b"x" * 32 * 4096
            taken = 32
            # Until there is no mapping left: one for each block and one for what lies between.
            runs = [(i * 2 + 64, 1) for i in range(most)]
            while len(runs) > 1:
                part, runs = runs[: max(1, len(runs) // 2)], runs[max(1, len(runs) // 2) :]
                try:
                    taken += region.plug_runs(part)
                except PopulateError:
                    runs = part if len(part) > 1 else []
                    region.scrub()
            with pytest.raises(DiscardError) as caught:
                if way == "unplug":
                    region.unplug(10)  # in the middle: two more mappings
                else:
                    region.unplug_runs([(10, 1), (12, 1)])
            assert (caught.value.errno, caught.value.discarded, caught.value.tainted) == (12, (), ())
            assert caught.value.remaining == (((10, 1),) if way == "unplug" else ((10, 1), (12, 1)))
            assert region.view(0, 32) == b"x" * 32 * 4096
            assert region.plugged_blocks == taken
            region.unplug(64, 1)  # joins what is on both sides of it
            region.unplug(10)
            return taken, region.audit().ok

    taken, ok = run_child(child).result()
    assert ok
    assert taken > most // 4


# ---- fork, peers, the end -------------------------------------------------------------------------------


@pytest.mark.promise("strays-are-caught")
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_a_child_that_has_the_region_too_is_protected_as_well(backend: Backend, protection: str) -> None:
    with Region("1M", block_size=BLOCK, backend=backend, protection=protection, fork="inherit") as region:
        region.plug(0, 2)

        def child() -> list[int]:
            region.unplug(0)
            region.plug(4)
            region.view(4)[:] = b"y" * BLOCK
            return accessible_blocks(region)

        assert run_child(child).result() == [1, 4]

        def stray() -> None:
            region.view()[5 * BLOCK] = 1

        assert run_child(stray).signal is SIGNAL[protection]
        # What the child has done to shared memory is done; its protection was its own.
        assert accessible(region, BLOCK)
        assert not accessible(region, 9 * BLOCK)
        assert region.is_plugged(0, 2)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_a_child_without_the_region_leaves_the_parents_protection(backend: Backend, protection: str) -> None:
    with Region("1M", block_size=BLOCK, backend=backend, protection=protection) as region:
        region.plug(0, 2)

        def child() -> int:
            region.close()
            gc.collect()
            return sum("userfaultfd" in path for path in accounting.open_descriptors().values())

        before = sum("userfaultfd" in path for path in accounting.open_descriptors().values())
        assert run_child(child).result() < before or protection != "trap"
        assert accessible_blocks(region) == [0, 1]


def test_a_page_that_a_peer_has_put_there_is_not_missing() -> None:
    """The trap is for what is not there, and the file is one; until the next plug or unplug of the block."""
    need_protection("trap")
    with Region("1M", block_size=BLOCK, backend=Memfd(), protection="trap") as region:
        with mmap.mmap(region.fileno(), MIB) as peer:
            peer[5 * BLOCK] = 7
        assert accessible(region, 5 * BLOCK)
        assert not accessible(region, 5 * BLOCK + 4096)
        assert region.audit().leaks == ((5, 1),)
        region.plug(5)
        assert region.view(5) == bytes(BLOCK)
        region.unplug(5)
        assert not accessible(region, 5 * BLOCK)


def test_views_that_outlive_the_region_stay_readable(protection: str) -> None:
    with pytest.raises(RuntimeError), Region("1M", block_size=BLOCK, protection=protection) as region:
        region.plug(0)
        view = region.view(0)
        view[:] = b"x" * BLOCK
        raise RuntimeError("the body's")
    assert view == b"x" * BLOCK


def test_a_protected_region_needs_a_backend_that_knows_of_it(protection: str) -> None:
    with pytest.raises(UnsupportedError, match="has no protection="):
        Region("64M", backend=Simulated(), protection=protection)


def test_secret_memory_is_refused_before_it_is_made(protection: str) -> None:
    before = accounting.open_descriptors()
    with pytest.raises((UnsupportedError, ReserveError)):
        Region("1M", block_size=4096, backend=Secret(), protection=protection)
    assert accounting.open_descriptors() == before


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_blocks_plugged_without_memory_are_accessible_or_refused(backend: Backend, protection: str) -> None:
    with Region("1M", block_size=BLOCK, backend=backend, protection=protection) as region:
        if protection == "trap":  # what is not there traps: there would be no first access
            with pytest.raises(UnsupportedError, match="the first access would trap"):
                region.plug(2, 3, populate=False)
            assert region.plugged_blocks == 0
            assert accessible_blocks(region) == []
            return
        region.plug(2, 3, populate=False)
        assert region.audit().resident_size == 0
        assert accessible_blocks(region) == [2, 3, 4]
        region.unplug(3)
        assert accessible_blocks(region) == [2, 4]
        # A first access to a private memfd costs its page twice, of which the audit tells as unaccounted.
        assert not region.audit().leaks
