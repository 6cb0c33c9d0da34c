"""Saving and restoring: what is plugged comes back, with what it holds, on every kind of mapping; nothing else does."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemem import (
    Anonymous,
    BackendExhaustedError,
    BlockStateError,
    Budget,
    DeadlineError,
    File,
    ForkedRegionError,
    ListenerVetoError,
    Memfd,
    OperationCancelledError,
    Region,
    RegionClosedError,
    Secret,
    Simulated,
    SnapshotError,
    SnapshotIOError,
    Tmpfs,
    UnsupportedError,
    snapshot,
)
from sparsemem.backends import Backend
from sparsemem.recipes import Step
from tests.support import accounting
from tests.support.children import run_child
from tests.support.injector import Injector
from tests.support.kinds import KINDS, Made, every_kind_once, make, need_disk, need_protection
from tests.support.snapshots import PAGE, allocated, contents, data_runs, fill, write

BLOCK = 64 << 10
HUGE = 2 << 20
COMPRESS = [None, "zstd"]
both = pytest.mark.parametrize("compress", COMPRESS)


@pytest.fixture
def path(tmpfs_folder: Path) -> Path:
    """Where a snapshot goes, on a tmpfs."""
    return tmpfs_folder / "snapshot"


# ---- there and back -----------------------------------------------------------------------------


@pytest.mark.promise("snapshot-comes-back")
@both
@every_kind_once
def test_every_kind_there_and_back(made: Made, compress: str | None, tmpfs_folder: Path) -> None:
    path = tmpfs_folder / "saved"
    with made.region() as region:
        if not made.kind.has_memory or not made.kind.discards:
            region.plug(0)
            with pytest.raises(UnsupportedError, match=r"no memory|secret memory"):
                region.save(path, compress=compress)
            assert not list(tmpfs_folder.glob("saved*"))
            return
        region.plug_runs([(0, 2), (4, 1)])
        write(region, 0, b"first")
        write(region, region.block_size + 3000, b"second")
        fill(region, 4)
        used, held = made.used(region), contents(region)
        told = region.save(path, compress=compress)
        assert abs(made.used(region) - used) <= made.kind.slack, "a save populates nothing"
        assert region.audit().ok
        assert (told.size, told.block_size, told.nblocks) == (region.size, region.block_size, region.nblocks)
        assert (told.page_size, told.backend) == (region.page_size, str(region.backend))
        assert told == snapshot.describe(path)
        with Region.restore(path) as other:
            assert contents(other) == held
            assert other.audit().ok
            assert (other.size, other.block_size) == (region.size, region.block_size)


@pytest.mark.promise("snapshot-comes-back")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.has_memory], ids=lambda kind: kind.id)
def test_into_every_kind(kind: Any, request: pytest.FixtureRequest, path: Path) -> None:
    made = make(kind, request)
    with Region(kind.size, block_size=kind.block_size) as region:
        region.plug_runs([(0, 2), (4, 1)])
        write(region, 0, b"first")
        fill(region, 4)
        held = contents(region)
        region.save(path)
    if "template" in kind.id:
        with pytest.raises(UnsupportedError, match="a template shows its file"):
            Region.restore(path, backend=made.backend)
        return
    with Region.restore(path, backend=made.backend) as other:
        assert contents(other) == held
        assert other.audit().ok
        assert other.backend is made.backend


@pytest.mark.promise("snapshot-comes-back")
@both
@given(data=st.data())
def test_against_a_model(compress: str | None, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Blocks of a page or several, smaller and larger than the chunks of the file; stores anywhere."""
    path = tmp_path_factory.getbasetemp() / "model"
    block = data.draw(st.sampled_from([PAGE, 4 * PAGE, 512 << 10]), "block size")
    nblocks = data.draw(st.integers(1, 40), "blocks")
    blocks = data.draw(st.sets(st.integers(0, nblocks - 1)), "plugged")
    backend = data.draw(st.sampled_from([Anonymous(), Memfd(), Memfd(shared=False), Anonymous(shared=True)]), "backend")
    model = {number: bytearray(block) for number in blocks}
    with Region(nblocks * block, block_size=block, backend=backend) as region:
        region.plug_runs([(number, 1) for number in blocks])
        for number in data.draw(st.lists(st.sampled_from(sorted(blocks)), max_size=20) if blocks else st.just([])):
            start = data.draw(st.integers(0, block - 1))
            stored = data.draw(st.binary(min_size=1, max_size=100))[: block - start]
            write(region, number * block + start, stored)
            model[number][start : start + len(stored)] = stored
        if blocks and data.draw(st.booleans()):
            number = min(blocks)
            region.discard(number * block, PAGE)
            model[number][:PAGE] = bytes(PAGE)
        region.save(path, compress=compress)
    with Region.restore(path, backend=Memfd()) as other:
        assert contents(other) == model
        assert other.audit().ok
    if compress is None:
        with Region.restore(path, lazy=True) as other:
            assert contents(other) == model


@both
def test_nothing_plugged(compress: str | None, path: Path) -> None:
    with Region("1T") as region:
        told = region.save(path, compress=compress)
    assert (told.nruns, told.nrecords) == (0, 0)
    assert allocated(path) <= 8192
    with Region.restore(path) as region:
        assert (region.size, region.plugged_blocks) == (1 << 40, 0)


def test_a_later_save_takes_the_place_of_an_earlier_one(path: Path) -> None:
    path.write_bytes(b"whatever was there")
    path.chmod(0o644)
    with Region("1M", block_size=BLOCK) as region:
        region.plug(0)
        first = region.save(path)
        write(region, 0, b"later")
        second = region.save(path)
    assert first.id != second.id
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with Region.restore(path) as region:
        assert bytes(region.view(0)[:5]) == b"later"
    assert os.listdir(path.parent) == [path.name]


def test_blocks_in_any_number_and_a_region_that_ends_within_a_chunk(path: Path) -> None:
    with Region(PAGE * 1000, block_size=PAGE) as region:
        region.plug_runs([(number, 1) for number in range(0, 1000, 3)])
        for number in range(0, 1000, 3):
            write(region, number * PAGE, b"block %d" % number)
        held = contents(region)
        region.save(path)
    with Region.restore(path) as region:
        assert contents(region) == held
        assert region.plugged_blocks == 334


def test_far_apart_in_a_large_region(path: Path) -> None:
    with Region("1T", block_size=BLOCK) as region:
        last = region.nblocks - 1
        region.plug_runs([(0, 1), (12345678, 2), (last, 1)])
        for number in (0, 12345679, last):
            write(region, number * BLOCK, b"block %d" % number)
        held = contents(region)
        region.save(path)
    assert allocated(path) <= 64 << 10
    with Region.restore(path, backend=Memfd()) as region:
        assert contents(region) == held


# ---- the file ---------------------------------------------------------------------------------


def test_zeroes_take_no_space_and_there_are_holes_where_they_are(path: Path) -> None:
    with Region("1G", block_size="1M") as region:
        region.plug(0, 200)
        write(region, 10 << 20, b"x")
        write(region, (150 << 20) + 12345, b"y")
        told = region.save(path)
    assert told.nrecords == 2
    assert allocated(path) <= 5 * PAGE, "two pages, the header and the tables"
    at = [told.data_offset + (10 << 20), told.data_offset + (150 << 20) + 3 * PAGE]
    assert [run for run in data_runs(path) if told.data_offset <= run[0] < told.table_offset] == [
        (start, start + PAGE) for start in at
    ]
    assert path.stat().st_size == told.file_size


def test_a_block_is_where_its_offset_says(path: Path) -> None:
    with Region("64M", block_size=BLOCK) as region:
        region.plug(7, 2)
        fill(region, 7, 2)
        held = contents(region)
        told = region.save(path)
    with path.open("rb") as file:
        file.seek(told.data_offset + 7 * BLOCK)
        assert file.read(2 * BLOCK) == held[7] + held[8]


def test_compression_makes_it_smaller(path: Path) -> None:
    with Region("64M", block_size="1M") as region:
        region.plug(0, 32)
        for number in range(32):
            with region.view(number) as view:
                view[:] = (b"row %d " % number * (1 << 18))[: 1 << 20]
        held = contents(region)
        told = region.save(path, compress="zstd")
    assert told.compressed
    assert path.stat().st_size < 1 << 20
    with Region.restore(path) as region:
        assert contents(region) == held


@pytest.mark.promise("private-to-its-user")
def test_it_is_private_to_its_user_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        with Region("1M", block_size=BLOCK) as region:
            region.save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_unpopulated_page_stays_so(path: Path) -> None:
    """Pages discarded within plugged blocks are zeroes in the snapshot, and get no memory by being saved."""
    for backend in (Anonymous(), Memfd(), Memfd(shared=False), Anonymous(shared=True)):
        with Region("64M", block_size="1M", backend=backend) as region:
            region.plug(0, 4)
            fill(region, 0, 4)
            region.discard(1 << 20, 1 << 20)
            region.save(path)
            # Which pages of shared anonymous memory are there the kernel tells root alone; others look at all of them.
            told = backend != Anonymous(shared=True) or os.geteuid() == 0
            assert region.audit().discarded_size == (1 << 20 if told else 0), backend
            with Region.restore(path) as other:
                held = contents(other)
            assert held[1] == bytes(1 << 20)
            assert held[0] == contents(region)[0]


def test_huge_pages_that_nobody_can_see_are_looked_at_as_the_documentation_says(
    path: Path, huge_pool: Callable[[int], object], hugetlbfs_mount: Callable[[], Path]
) -> None:
    """If the kernel ever tells of them, it may promise more."""
    huge_pool(16)
    template = hugetlbfs_mount() / "template"
    template.touch()
    os.truncate(template, HUGE * 4)  # holes alone
    for backend in (Anonymous(hugetlb="2M", shared=True), File(template, shared=False)):
        with Region(HUGE * 4, block_size=HUGE, backend=backend) as region:
            region.plug(0, 2)
            region.discard(0, HUGE)
            free = accounting.huge_pool().free
            region.save(path)
            assert accounting.huge_pool().free == free - 1
            assert region.audit().ok
            with Region.restore(path) as other:
                assert contents(other) == contents(region) == {0: bytes(HUGE), 1: bytes(HUGE)}


def test_a_trap_on_huge_pages_that_nobody_can_see_is_an_error_until_they_are_populated(
    path: Path, huge_pool: Callable[[int], object]
) -> None:
    huge_pool(16)
    need_protection("trap")
    with Region(HUGE * 4, block_size=HUGE, backend=Anonymous(hugetlb="2M", shared=True), protection="trap") as region:
        region.plug(0, 2)
        write(region, HUGE, b"content")
        region.discard(0, HUGE)
        with pytest.raises(SnapshotIOError, match="cannot read block 0"):
            region.save(path)
        assert not path.exists()
        region.populate(0, HUGE)
        region.save(path)
        with Region.restore(path) as other:
            assert contents(other) == contents(region)


@pytest.mark.promise("private-to-its-user")
def test_symbolic_links_are_not_followed_unless_asked(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path.name)
    with Region("1M", block_size=BLOCK) as region:
        region.plug(3)
        with pytest.raises(SnapshotIOError, match="symbolic link"):
            region.save(link)
        assert not path.exists()
        region.save(link, follow_symlinks=True)
    assert link.is_symlink()
    assert path.is_file()
    with pytest.raises(SnapshotIOError, match="symbolic link"):
        Region.restore(link)
    with pytest.raises(SnapshotIOError, match="symbolic link"):
        snapshot.describe(link)
    with Region.restore(link, follow_symlinks=True) as region:
        assert region.is_plugged(3)


def test_what_is_no_file_is_neither_written_nor_read(tmpfs_folder: Path) -> None:
    os.mkfifo(tmpfs_folder / "fifo")
    (tmpfs_folder / "folder").mkdir()
    with Region("1M", block_size=BLOCK) as region:
        for name in ("fifo", "folder"):
            with pytest.raises(SnapshotIOError, match="no file"):
                region.save(tmpfs_folder / name)
            with pytest.raises(SnapshotError, match="is no snapshot, for it is no file"):
                Region.restore(tmpfs_folder / name)
        for wrong in (tmpfs_folder / "missing" / "file", f"{tmpfs_folder}/folder/"):
            with pytest.raises(SnapshotIOError, match=f"cannot write snapshot {wrong}"):
                region.save(wrong)
    with pytest.raises(SnapshotIOError, match="No such file") as caught:
        Region.restore(tmpfs_folder / "nothing")
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, ValueError)


def test_relative_names_and_names_as_long_as_may_be(tmpfs_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmpfs_folder)
    for name in ("short", "x" * 255):
        with Region("1M", block_size=BLOCK) as region:
            region.plug(1)
            region.save(name)
        with Region.restore(name) as region:
            assert region.is_plugged(1)


@pytest.mark.promise("snapshot-is-whole-or-not-there")
def test_where_a_file_needs_a_name(path: Path, inject: Injector) -> None:
    """A file system without O_TMPFILE, as NFS: there it has one that begins with a dot, until it is whole."""
    names: list[str] = []
    inject.call("open_in", errno=95, when=lambda _f, _n, flags, _m: flags & os.O_TMPFILE == os.O_TMPFILE)
    with Region("1M", block_size=BLOCK) as region:
        region.plug(0)
        write(region, 0, b"content")
        region.save(path, progress=lambda *_: names.extend(os.listdir(path.parent)))
    assert set(names) == {names[0]}
    assert names[0].startswith(".snapshot.")
    assert os.listdir(path.parent) == ["snapshot"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with Region.restore(path) as region:
        assert bytes(region.view(0)[:7]) == b"content"


# ---- what does not fit ------------------------------------------------------------------------


@pytest.fixture
def saved(path: Path) -> Path:
    """A snapshot of 16 blocks of 64 KiB, of which 2 and 3 are plugged."""
    with Region("1M", block_size=BLOCK) as region:
        region.plug(2, 2)
        fill(region, 2)
        region.save(path)
    return path


@pytest.mark.parametrize("options", [{"size": "2M"}, {"block_size": "128K"}, {"size": 4096, "block_size": 4096}])
def test_another_geometry(saved: Path, options: dict[str, Any]) -> None:
    with pytest.raises(
        SnapshotError, match=r"is of 1M in blocks of 64K: it cannot be restored with (size|block_size)="
    ):
        Region.restore(saved, **options)


def test_the_same_geometry_may_be_said(saved: Path) -> None:
    with Region.restore(saved, size="1M", block_size=BLOCK, name="again", fork="inherit", threads=2) as region:
        assert region.is_plugged(2, 2)
        assert region.name == "again"


def test_pages_that_are_larger_than_the_blocks(saved: Path) -> None:
    with pytest.raises(ValueError, match="block_size 65536 is less than the page size 2097152"):
        Region.restore(saved, backend=Simulated(page_size="2M"))


def test_no_memory_to_restore_into(saved: Path) -> None:
    with pytest.raises(UnsupportedError, match="SimulatedMapping has no memory"):
        Region.restore(saved, backend=Simulated())


def test_options_that_the_snapshot_decides(saved: Path) -> None:
    with pytest.raises(TypeError, match="takes no plugged="):
        Region.restore(saved, plugged=[(0, 1)])
    with pytest.raises(TypeError, match="unexpected keyword"):
        Region.restore(saved, colour="red")


def test_what_holds_data_already(saved: Path, tmpfs_folder: Path) -> None:
    with Region("1M", block_size=BLOCK, backend=File(tmpfs_folder / "file")) as region:
        region.plug(9)
        write(region, 9 * BLOCK, b"mine")
    with pytest.raises(OSError, match="already holds data"):
        Region.restore(saved, backend=File(tmpfs_folder / "file"))
    with pytest.raises(SnapshotError, match="holds data already"):
        Region.restore(saved, backend=File(tmpfs_folder / "file", existing="adopt"))
    with Region.restore(saved, backend=File(tmpfs_folder / "file", existing="discard")) as region:
        assert list(region.plugged_runs()) == [(2, 2)]
        assert region.audit().ok


def test_a_restore_that_finds_no_memory_leaves_nothing(saved: Path, tmpfs_folder: Path) -> None:
    budget = Budget(BLOCK)
    with pytest.raises(BackendExhaustedError):
        Region.restore(saved, budget=budget)
    assert budget.used == 0
    with pytest.raises(BackendExhaustedError):
        Region.restore(saved, budget=budget, backend=File(tmpfs_folder / "file"))
    assert not (tmpfs_folder / "file").exists(), "a file that was made for it is gone"
    with pytest.raises(BackendExhaustedError):
        Region.restore(saved, budget=budget, lazy=True)
    assert budget.used == 0
    with Region.restore(saved, budget=Budget(2 * BLOCK)) as region:
        assert region.plugged_blocks == 2


def test_a_compression_that_there_is_not(path: Path) -> None:
    with Region("1M", block_size=BLOCK) as region, pytest.raises(ValueError, match="compress 'lzma' is none of 'zstd'"):
        region.save(path, compress="lzma")


def test_without_the_package_there_is_no_compression(saved: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Region.restore(saved) as region:
        region.save(path.with_name("packed"), compress="zstd")
        monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
        with pytest.raises(UnsupportedError, match=r"pip install 'sparsemem\[zstd\]'"):
            region.save(path.with_name("other"), compress="zstd")
        region.save(path)
    with pytest.raises(UnsupportedError, match="need the package zstandard"):
        Region.restore(path.with_name("packed"))
    Region.restore(path).close()


def test_tainted_blocks(path: Path, inject: Injector) -> None:
    with Region("1M", block_size=BLOCK) as region:
        region.plug(0, 4)
        inject.step(Step.DONTNEED, errno=5)
        with pytest.raises(OSError, match="cannot discard"):
            region.unplug(2)
        with pytest.raises(BlockStateError, match="cannot save: block 2 is tainted") as caught:
            region.save(path)
        assert caught.value.block == 2
        assert not path.exists()
        assert region.stats().busy_size == 0
        region.scrub()
        region.save(path)


def test_closed_and_forked_regions(path: Path) -> None:
    region = Region("1M", block_size=BLOCK)

    def child() -> None:
        with pytest.raises(ForkedRegionError):
            region.save(path)

    run_child(child).result()
    region.close()
    with pytest.raises(RegionClosedError):
        region.save(path)
    assert not path.exists()


def test_more_than_a_file_system_can_hold(tmp_path: Path) -> None:
    """Found out before anything is copied; packed, it fits."""
    need_disk(tmp_path)
    with Region("64T", block_size="1G") as region:
        try:
            region.save(tmp_path / "large")
        except SnapshotIOError as error:
            assert error.errno == 27  # EFBIG: ext4 ends at 16 TiB
            assert not (tmp_path / "large").exists()
        region.save(tmp_path / "packed", compress="zstd")
    with Region.restore(tmp_path / "packed") as region:
        assert region.size == 64 << 40


# ---- looking on, and stopping -----------------------------------------------------------------


def check_progress(calls: list[tuple[int, int]], least: int) -> None:
    assert len(calls) >= 2
    assert len({total for _, total in calls}) == 1
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[0][0] == 0
    assert calls[-1][0] == calls[-1][1] >= least


@both
@pytest.mark.parametrize("block_size", [PAGE, 1 << 20, 64 << 20])
def test_progress_grows_to_the_end(compress: str | None, block_size: int, path: Path) -> None:
    with Region("256M", block_size=block_size) as region:
        step = max(1, (1 << 20) // block_size)
        region.plug_runs([(number, 1) for number in range(0, region.nblocks, 2 * step)])
        size = region.plugged_size
        for number in range(0, region.nblocks, 2 * step):
            write(region, number * block_size, b"content")
        calls: list[tuple[int, int]] = []
        region.save(path, compress=compress, progress=lambda *told: calls.append(told))
        check_progress(calls, size)
        assert calls[-1] == (size, size)
    for verify in (True, False):
        calls.clear()
        Region.restore(path, verify=verify, progress=lambda *told: calls.append(told)).close()
        check_progress(calls, size)


@pytest.mark.promise("snapshot-is-whole-or-not-there")
@both
@pytest.mark.parametrize("how", ["cancel", "deadline", "raise", "OSError"])
@pytest.mark.parametrize("when", [0, 1, 3])
def test_a_save_that_is_stopped_leaves_nothing(compress: str | None, how: str, when: int, path: Path) -> None:
    path.write_bytes(b"as it was")
    cancel, calls = threading.Event(), 0
    errors = {
        "cancel": OperationCancelledError,
        "deadline": DeadlineError,
        "raise": KeyboardInterrupt,
        "OSError": BrokenPipeError,
    }

    def look(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls > when:
            if how == "cancel":
                cancel.set()
            elif how != "deadline":
                raise errors[how]

    with Region("256M", block_size="1M") as region:
        region.plug(0, 200)
        for number in range(200):
            write(region, number << 20, b"content")
        with pytest.raises(errors[how]):
            region.save(
                path, compress=compress, progress=look, cancel=cancel, deadline=0 if how == "deadline" else None
            )
        counts = region._core.blocks.counts()
        assert (counts.busy, counts.claims) == (0, 0)
        assert path.read_bytes() == b"as it was"
        assert os.listdir(path.parent) == [path.name]
        region.save(path, compress=compress)
        calls = 0
        cancel.clear()
        with pytest.raises(errors[how]):
            Region.restore(path, progress=look, cancel=cancel, deadline=0 if how == "deadline" else None)


def test_arguments_are_checked_before_anything_happens(path: Path) -> None:
    with Region("1M", block_size=BLOCK) as region:
        for wrong in ({"progress": 1}, {"cancel": True}, {"deadline": "soon"}):
            with pytest.raises(TypeError):
                region.save(path, **wrong)  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                Region.restore(path, **wrong)
    assert not path.exists()


# ---- while others work ------------------------------------------------------------------------


@pytest.mark.promise("snapshot-state-is-per-block")
@pytest.mark.parametrize("backend", [Anonymous(), Memfd(), Memfd(shared=False)], ids=str)
def test_views_may_be_alive_and_write(backend: Backend, path: Path) -> None:
    """Content that changes meanwhile may be torn, but the file is sound: what was digested is what was written."""
    stop = threading.Event()
    with Region("64M", block_size="1M", backend=backend) as region:
        region.plug(0, 64)

        def scribble() -> None:
            number = 0
            with region.view(0, 64) as view:
                while not stop.is_set():
                    number += 1
                    view[number * 4099 % len(view)] = number % 256
                    view[: 1 << 20] = bytes([number % 256]) * (1 << 20)

        writer = threading.Thread(target=scribble)
        writer.start()
        try:
            for _ in range(5):
                region.save(path)
                Region.restore(path).close()
        finally:
            stop.set()
            writer.join()


@pytest.mark.promise("snapshot-state-is-per-block")
@both
def test_blocks_come_and_go_meanwhile(compress: str | None, path: Path) -> None:
    """Each block is saved in a state that it had: whole, or not at all."""
    stop = threading.Event()
    with Region("256M", block_size=BLOCK) as region:
        region.plug(0, 1000)

        def churn(offset: int) -> None:
            number = 0
            while not stop.is_set():
                block = offset + number % 500
                number += 1
                region.plug(block)
                with region.view(block) as view:
                    view[:] = b"w" * BLOCK
                region.unplug(block)

        threads = [threading.Thread(target=churn, args=(start,)) for start in (1500, 3000)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(5):
                told = region.save(path, compress=compress)
                with Region.restore(path) as other:
                    assert other.is_plugged(0, 1000)
                    assert other.plugged_blocks <= 1002
                    for block, held in contents(other).items():
                        # A block is claimed while it is plugged, and written to only afterwards.
                        assert set(held) <= ({0, ord("w")} if block >= 1000 else {0})
                assert told.nruns <= 3
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert region.audit().ok


def test_other_blocks_can_be_used_while_a_save_looks_around(path: Path) -> None:
    """From within its own progress, too; but not those that it has in hand."""
    outcomes = []

    def look(done: int, total: int) -> None:
        for block in (2, 200):
            try:
                region.unplug(block)
                region.plug(block)
                outcomes.append((block, True))
            except BlockStateError:
                outcomes.append((block, False))

    with Region("512M", block_size="1M") as region:
        region.plug(0, 256)
        region.save(path, progress=look)
        assert (200, True) in outcomes
        assert region.plugged_blocks == 256


def test_a_save_from_a_listener(path: Path) -> None:
    class Saver:
        def on_plug(self, first: int, count: int) -> None:
            region.save(path)

        def on_unplug(self, first: int, count: int) -> None: ...

    with Region("1M", block_size=BLOCK) as region:
        region.add_listener(Saver())
        region.plug(0)
        assert snapshot.describe(path).nruns == 0, "it is not plugged before all have been told"
        with pytest.raises(ListenerVetoError) as caught:
            region.plug(1)
        assert isinstance(caught.value.__cause__, BlockStateError), "it would wait for itself"
        assert list(region.plugged_runs()) == [(0, 1)]


@pytest.mark.parametrize("backend", [Tmpfs(), Secret()], ids=str)
def test_backends_that_few_can_have(backend: Backend, path: Path) -> None:
    with Region("1M", block_size=BLOCK) as region:
        region.plug(1, 2)
        fill(region, 1, 2)
        held = contents(region)
        region.save(path)
    try:
        with Region.restore(path, backend=backend) as region:
            assert contents(region) == held
    except (UnsupportedError, OSError) as error:
        pytest.skip(f"needs root: for {backend} ({error})")


@both
@pytest.mark.parametrize("protection", ["trap", "guard", "prot_none"])
@pytest.mark.parametrize("backend", [Anonymous(), Memfd()], ids=str)
def test_memory_whose_unplugged_blocks_are_protected(
    backend: Backend, protection: str, compress: str | None, path: Path
) -> None:
    try:
        region = Region("16M", block_size=BLOCK, backend=backend, protection=protection)
    except UnsupportedError as error:
        pytest.skip(f"needs protection={protection} ({error})")
    with region:
        region.plug_runs([(0, 2), (4, 1)])
        fill(region, 0, 2)
        held = contents(region)
        region.discard(4 * BLOCK, PAGE)
        region.save(path, compress=compress)
        with pytest.raises(UnsupportedError, match="does not go with dirty="):
            region.save(path, dirty=True)
        assert region.audit().ok
    with Region.restore(path, backend=backend, protection=protection) as region:
        assert contents(region) == held
        assert region.audit().ok
