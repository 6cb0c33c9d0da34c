"""Incremental saves: a chain of them always gives what a full one would, and each holds little more than changed."""

from __future__ import annotations

import gc
import mmap
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem import (
    Anonymous,
    BlockStateError,
    File,
    ForkedRegionError,
    HugePageSplitWarning,
    Memfd,
    Region,
    Secret,
    Simulated,
    SnapshotError,
    SnapshotIOError,
    UnsupportedError,
    snapshot,
)
from sparsemem._sys import calls as calls_module
from sparsemem._sys import probe
from sparsemem.backends import Backend
from tests.support.children import run_child
from tests.support.injector import Injector
from tests.support.kinds import Made, every_viewable
from tests.support.snapshots import PAGE, allocated, contents, fill, write

BLOCK = 64 << 10
COMPRESS = [None, "zstd"]
both = pytest.mark.parametrize("compress", COMPRESS)


@pytest.fixture(autouse=True)
def needs_tracking() -> None:
    if not probe.tracks_writes(calls_module.kernel):
        pytest.skip("needs a kernel that notes writes (Linux 6.7)")


@pytest.fixture
def folder(tmpfs_folder: Path) -> Path:
    return tmpfs_folder


def restored(chain: list[Path], **options: Any) -> dict[int, bytes]:
    """What the last of a chain holds."""
    with Region.restore(chain[-1], base=chain[:-1], **options) as region:
        assert region.audit().ok
        return contents(region)


def check_sound(region: Region) -> None:
    """Without what a file behind a private mapping holds, since a look at a discarded page gives it one."""
    audit = region.audit()
    assert (audit.leaks, audit.gaps, audit.tainted, audit.busy) == ((), (), (), ())


# ---- what is saved ------------------------------------------------------------------------------


@pytest.mark.promise("snapshot-comes-back")
@both
@every_viewable
def test_every_kind_saves_what_changed(made: Made, compress: str | None, folder: Path) -> None:
    with made.region() as region:
        block, page = region.block_size, region.page_size
        region.plug(0, 4)
        fill(region, 0, 4)
        chain = [folder / str(number) for number in range(6)]

        def save(number: int) -> Any:
            told = region.save(chain[number], dirty=True, compress=compress)
            assert restored(chain[: number + 1]) == contents(region)
            return told

        first = save(0)
        assert first.base is None
        nothing = save(1)
        assert nothing.base == first.id
        assert nothing.nrecords == 0
        write(region, block + block // 2, b"changed")
        changed = save(2)
        # Of a huge page the kernel only knows whether any of it was written to.
        most = (2 << 20) if region.huge_runs() or block == 2 << 20 else page
        assert changed.nrecords * changed.chunk <= max(most, changed.chunk)
        region.unplug(2)
        region.plug(2)
        write(region, 2 * block, b"another life")
        region.plug(7)
        save(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HugePageSplitWarning)
            region.discard(3 * block, page)
        save(4)
        region.unplug(0)
        assert save(5).nruns == 2
        check_sound(region)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 15), st.integers(0, BLOCK - 1), st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("plug"), st.integers(0, 15)),
        st.tuples(st.just("unplug"), st.integers(0, 15)),
        st.tuples(st.just("discard"), st.integers(0, 15), st.integers(0, 15), st.integers(1, 16)),
        st.tuples(st.just("populate"), st.integers(0, 15), st.integers(0, 15), st.integers(1, 16)),
        st.tuples(st.just("look"), st.integers(0, 15)),
        st.tuples(st.just("failing save")),
        st.tuples(st.just("new chain")),
        st.tuples(st.just("save"), st.sampled_from(COMPRESS)),
        st.tuples(st.just("save"), st.sampled_from(COMPRESS)),
    ),
    max_size=30,
)

MODELLED: dict[str, Callable[[], tuple[Backend, dict[str, Any]]]] = {
    "anonymous": lambda: (Anonymous(), {}),
    "anonymous shared": lambda: (Anonymous(shared=True), {}),
    "memfd": lambda: (Memfd(), {}),
    "memfd private": lambda: (Memfd(shared=False), {}),
    "futex": lambda: (Memfd(strategy="futex"), {}),
    "userfaultfd": lambda: (Memfd(strategy="uffd_copy"), {}),
    "late discards": lambda: (Memfd(), {"unplug_delay": 1000.0}),
    "late discards that keep": lambda: (Anonymous(), {"unplug_delay": 1000.0, "reuse": "keep"}),
    "warm": lambda: (Anonymous(), {"warm": 4 * BLOCK}),
}


class Modelled:
    """A region, what it should hold, and the chain of its snapshots."""

    def __init__(self, region: Region, folder: Path) -> None:
        self.region, self.folder = region, folder
        self.model: dict[int, bytearray] = {}
        self.chain: list[Path] = []
        self.saved = 0

    def write(self, block: int, start: int, data: bytes) -> None:
        if block in self.model:
            data = data[: BLOCK - start]
            write(self.region, block * BLOCK + start, data)
            self.model[block][start : start + len(data)] = data

    def plug(self, block: int) -> None:
        if block not in self.model:
            self.region.plug(block)
            with self.region.view(block) as view:  # a block whose discard was put off may keep what it had
                self.model[block] = bytearray(view)

    def unplug(self, block: int) -> None:
        if self.model.pop(block, None) is not None:
            self.region.unplug(block)

    def discard(self, block: int, page: int, count: int) -> None:
        if block in self.model:
            count = min(count, 16 - page)
            self.region.discard(block * BLOCK + page * PAGE, count * PAGE)
            self.model[block][page * PAGE : (page + count) * PAGE] = bytes(count * PAGE)

    def populate(self, block: int, page: int, count: int) -> None:
        if block in self.model:
            self.region.populate(block * BLOCK + page * PAGE, min(count, 16 - page) * PAGE)

    def look(self, block: int) -> None:
        if block in self.model:
            with self.region.view(block) as view:
                assert view == self.model[block]

    def failing_save(self) -> None:
        def stop(done: int, total: int) -> None:
            if done == total:
                raise LookupError

        path = self.folder / "failing"
        with pytest.raises(LookupError):
            self.region.save(path, dirty=True, progress=stop)
        assert not path.exists()

    def new_chain(self) -> None:
        self._save(full=True)

    def save(self, compress: str | None) -> None:
        self._save(compress=compress)

    def _save(self, **options: Any) -> None:
        self.saved += 1
        path = self.folder / str(self.saved)
        told = self.region.save(path, dirty=self.chain[-1] if self.chain else True, **options)
        if told.base is None:
            self.chain.clear()
        self.chain.append(path)
        assert restored(self.chain) == self.model
        check_sound(self.region)


@pytest.mark.promise("snapshot-comes-back")
@pytest.mark.parametrize("kind", MODELLED)
@settings(max_examples=60)
@given(operations=OPERATIONS)
def test_against_a_model(kind: str, operations: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    backend, options = MODELLED[kind]()
    folder = tmp_path_factory.mktemp("chain")
    with Region(16 * BLOCK, block_size=BLOCK, backend=backend, **options) as region:
        modelled = Modelled(region, folder)
        for name, *arguments in operations:
            getattr(modelled, name.replace(" ", "_"))(*arguments)
        modelled.save(None)


def test_little_is_saved_of_much(folder: Path) -> None:
    with Region("1G", block_size="1M") as region:
        region.plug(0, 256)
        fill(region, 0, 64)
        region.save(folder / "full", dirty=True)
        for number in range(0, 256, 16):
            write(region, (number << 20) + 12345, b"changed")
        told = region.save(folder / "changes", dirty=True)
    assert told.nrecords == 16
    assert allocated(folder / "full") > 64 << 20
    assert allocated(folder / "changes") <= 18 * PAGE


def test_the_first_one_and_one_by_itself_need_no_other(folder: Path) -> None:
    with Region("1M", block_size=BLOCK) as region:
        region.plug(0, 4)
        fill(region, 0)
        region.save(folder / "1", dirty=True)
        write(region, BLOCK, b"x")
        alone = region.save(folder / "alone")
        assert alone.base is None
        assert restored([folder / "alone"]) == contents(region)
        told = region.save(folder / "2", dirty=True)
        assert told.nrecords == 1, "the one by itself took nothing from the chain"
        assert restored([folder / "1", folder / "2"]) == contents(region)


# ---- chains ---------------------------------------------------------------------------------------


@pytest.fixture
def chain(folder: Path) -> list[Path]:
    """Four snapshots of a region, each of which needs those before it."""
    chain = [folder / str(number) for number in range(4)]
    with Region("1M", block_size=BLOCK) as region:
        region.plug(0, 4)
        for number, path in enumerate(chain):
            write(region, number * BLOCK, b"number %d" % number)
            region.save(path, dirty=True)
    return chain


def test_a_chain_in_any_order(chain: list[Path]) -> None:
    with Region.restore(chain[3], base=[chain[1], chain[0], chain[2]]) as region:
        assert [held[:8] for held in contents(region).values()] == [b"number %d" % number for number in range(4)]
    with Region.restore(chain[1], base=chain[0], backend=Memfd()) as region:
        assert [held[:8] for held in contents(region).values()] == [b"number 0", b"number 1", bytes(8), bytes(8)]


@pytest.mark.promise("snapshot-is-checked-first")
def test_a_chain_with_a_link_missing(chain: list[Path]) -> None:
    ids = [snapshot.describe(path).id for path in chain]
    with pytest.raises(
        SnapshotError, match=rf"only what has changed since the one with the id {ids[2]}: .*none is left"
    ):
        Region.restore(chain[3])
    with pytest.raises(SnapshotError, match=f"{chain[2]} has only what has changed since the one with the id {ids[1]}"):
        Region.restore(chain[3], base=[chain[0], chain[2]])
    with pytest.raises(SnapshotError, match=f"{chain[0]} does not need what was given as base=: {chain[1]}"):
        Region.restore(chain[0], base=chain[1])
    with pytest.raises(SnapshotError, match="does not need"):
        Region.restore(chain[2], base=chain)


@pytest.mark.promise("snapshot-is-checked-first")
def test_a_corrupted_link_is_found_before_anything_is_made(chain: list[Path], folder: Path) -> None:
    told = snapshot.describe(chain[1])
    with chain[1].open("r+b") as file:
        file.seek(told.data_offset + BLOCK)
        file.write(b"spoilt")
    with pytest.raises(SnapshotError, match=f"{chain[1]} is corrupted"):
        Region.restore(chain[3], base=chain[:3], backend=File(folder / "memory"))
    assert not (folder / "memory").exists()


def test_a_chain_cannot_be_lazy(chain: list[Path]) -> None:
    with pytest.raises(UnsupportedError, match="maps one file"):
        Region.restore(chain[1], base=chain[0], lazy=True)
    with pytest.raises(SnapshotError, match="give that as base="):
        Region.restore(chain[1], lazy=True)


def test_a_chain_may_begin_anew(folder: Path) -> None:
    with Region("1M", block_size=BLOCK) as region:
        region.plug(0, 2)
        for number in range(3):
            region.save(folder / str(number), dirty=True)
        write(region, 5, b"content")
        again = region.save(folder / "again", dirty=True, full=True)
        assert again.base is None
        region.save(folder / "0", dirty=True)  # a name of the old chain is free now
        assert restored([folder / "again", folder / "0"]) == contents(region)


def test_a_link_that_is_needed_is_not_replaced(folder: Path) -> None:
    with Region("1M", block_size=BLOCK) as region:
        region.plug(0)
        fill(region, 0)
        region.save(folder / "0", dirty=True)
        region.save(folder / "1", dirty=True)
        os.link(folder / "0", folder / "other name")
        held = {name: (folder / name).read_bytes() for name in ("0", "1")}
        for name in ("0", "1", "other name"):
            for full in (False, True):
                with pytest.raises(SnapshotError, match="is one that the new one needs, and must not be replaced"):
                    region.save(folder / name, dirty=True, full=full)
        assert held == {name: (folder / name).read_bytes() for name in ("0", "1")}
        assert sorted(os.listdir(folder)) == ["0", "1", "other name"]


def test_the_last_one_is_another_than_was_believed(folder: Path) -> None:
    with Region("1M", block_size=BLOCK) as region:
        region.plug(0)
        alone = region.save(folder / "alone")
        with pytest.raises(
            SnapshotError, match=rf"since the snapshot with the id {alone.id} is unknown.*there was none"
        ):
            region.save(folder / "x", dirty=folder / "alone")
        first = region.save(folder / "0", dirty=True)
        region.save(folder / "1", dirty=folder / "0")
        with pytest.raises(SnapshotError, match=rf"since the snapshot with the id {first.id} is unknown"):
            region.save(folder / "2", dirty=folder / "0")
        with pytest.raises(SnapshotIOError, match="No such file"):
            region.save(folder / "2", dirty=folder / "nothing")
        write(region, 0, b"x")
        assert region.save(folder / "2", dirty=str(folder / "1")).nrecords == 1
    assert sorted(os.listdir(folder)) == ["0", "1", "2", "alone"]


def test_a_restored_region_begins_a_chain_of_its_own(chain: list[Path], folder: Path) -> None:
    with Region.restore(chain[3], base=chain[:3]) as region:
        told = region.save(folder / "own", dirty=True)
        assert told.base is None
        assert restored([folder / "own"]) == contents(region)


# ---- what keeps working ---------------------------------------------------------------------------


@pytest.mark.promise("snapshot-comes-back")
def test_a_failed_save_loses_no_change(folder: Path, inject: Injector) -> None:
    with Region("1M", block_size=BLOCK) as region:
        region.plug(0, 4)
        region.save(folder / "0", dirty=True)
        write(region, BLOCK, b"changed")
        for what, nth in [("rename_in", 1), ("fsync", 1), ("fsync", 2), ("pwrite", 1), ("fstat", 1)]:
            inject.call(what, errno=5, nth=nth)
            with pytest.raises(SnapshotIOError, match="Input/output error"):
                region.save(folder / "1", dirty=True)
            inject.clear()
        for what in ("READ", "WRITE"):
            inject.copy(what, errno=5)
            with pytest.raises(SnapshotIOError, match="Input/output error"):
                region.save(folder / "1", dirty=True)
            inject.clear()
        assert region.save(folder / "1", dirty=True).nrecords == 1
        assert restored([folder / "0", folder / "1"]) == contents(region)


def test_one_at_a_time(folder: Path) -> None:
    def look(done: int, total: int) -> None:
        with pytest.raises(SnapshotError, match="another save with dirty= of the same region is under way"):
            region.save(folder / "other", dirty=True)
        if done < total:  # not while its own blocks are claimed
            region.save(folder / "alone", progress=None if done else lambda *_: None)

    with Region("1M", block_size=BLOCK) as region:
        region.plug(0)
        region.save(folder / "0", dirty=True, progress=look)
        region.save(folder / "1", dirty=True)
    assert sorted(os.listdir(folder)) == ["0", "1", "alone"]


@pytest.mark.promise("snapshot-comes-back")
def test_writers_at_work_lose_nothing_in_the_end(folder: Path) -> None:
    """What is stored during a save is in that one or in the next."""
    chain = []
    with Region("32M", block_size="1M", backend=Memfd()) as region:
        region.plug(0, 32)
        stop = threading.Event()

        def scribble(start: int) -> None:
            number = 0
            with region.view(0, 32) as view:
                while not stop.is_set():
                    number += 1
                    at = (start + number * 4099 * 4) % (len(view) - 8)
                    view[at : at + 8] = number.to_bytes(8, "little")

        threads = [threading.Thread(target=scribble, args=(start,)) for start in (0, 1 << 20)]
        for thread in threads:
            thread.start()
        try:
            for number in range(6):
                chain.append(folder / str(number))
                region.save(chain[-1], dirty=True)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        chain.append(folder / "last")
        region.save(chain[-1], dirty=True)
        assert restored(chain) == contents(region)


@pytest.mark.promise("snapshot-state-is-per-block")
def test_blocks_come_and_go_during_incremental_saves(folder: Path) -> None:
    chain = []
    with Region("16M", block_size=BLOCK) as region:
        stop = threading.Event()

        def churn(first: int) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                block = first + number % 100
                region.plug(block)
                write(region, block * BLOCK, b"%d" % number)
                if number % 3:
                    region.unplug(block)
                elif number % 100 == 0:
                    region.unplug_runs([(first, 100)], missing_ok=True)

        def safely(first: int) -> None:
            while not stop.is_set():
                try:
                    churn(first)
                except BlockStateError:
                    region.unplug_runs([(first, 100)], missing_ok=True)

        threads = [threading.Thread(target=safely, args=(first,)) for first in (0, 128)]
        for thread in threads:
            thread.start()
        try:
            for number in range(8):
                chain.append(folder / str(number))
                region.save(chain[-1], dirty=True)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        chain.append(folder / "last")
        region.save(chain[-1], dirty=True)
        assert restored(chain) == contents(region)
        assert region.audit().ok


def test_writes_by_the_kernel_into_views_are_noted(folder: Path) -> None:
    """read(2) into a view goes through the page tables, too."""
    (folder / "data").write_bytes(b"from a file")
    with Region("1M", block_size=BLOCK) as region:
        region.plug(0, 2)
        region.save(folder / "0", dirty=True)
        with region.view(1) as view, (folder / "data").open("rb", buffering=0) as file:
            file.readinto(view[100:200])
        region.save(folder / "1", dirty=True)
        assert restored([folder / "0", folder / "1"]) == contents(region)


def test_writes_by_others_are_not_noted_as_the_documentation_says(folder: Path) -> None:
    """If this ever changes, it may promise more."""
    with Region("1M", block_size=BLOCK, backend=Memfd()) as region:
        region.plug(0, 2)
        fill(region, 0, 2)
        region.save(folder / "0", dirty=True)
        os.pwrite(region.fileno(), b"by write", 0)
        with mmap.mmap(region.fileno(), 1 << 20) as other:
            other[BLOCK : BLOCK + 8] = b"by peers"
        assert region.save(folder / "1", dirty=True).nrecords == 0


# ---- where it cannot be -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "options", "why"),
    [
        (Simulated(), {"block_size": "2M"}, "no memory"),
        (Anonymous(), {"fork": "inherit"}, "a parent's writes and not a child's"),
    ],
)
def test_refusals(backend: Backend, options: dict[str, Any], why: str, folder: Path) -> None:
    with Region("4M", backend=backend, **{"block_size": BLOCK, **options}) as region:
        region.plug(0)
        with pytest.raises(UnsupportedError, match=why):
            region.save(folder / "0", dirty=True)
        if backend != Simulated():
            region.save(folder / "0")
        assert region.plugged_blocks == 1
    assert len(os.listdir(folder)) == (backend != Simulated())


def test_secret_memory(folder: Path) -> None:
    try:
        region = Region("1M", block_size=BLOCK, backend=Secret())
    except (OSError, NotImplementedError) as error:
        pytest.skip(f"needs memfd_secret ({error})")
    with region, pytest.raises(UnsupportedError, match="secret memory"):
        region.save(folder / "0", dirty=True)


def test_a_kernel_that_does_not_tell(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "tracks_writes", lambda calls: False)
    with Region("1M", block_size=BLOCK) as region:
        region.plug(0)
        with pytest.raises(UnsupportedError, match="this kernel does not tell which pages were written to"):
            region.save(folder / "0", dirty=True)
        assert not os.listdir(folder)
        monkeypatch.undo()
        region.save(folder / "0", dirty=True)


def test_a_forked_child_has_no_chain(folder: Path) -> None:
    with Region("1M", block_size=BLOCK, backend=Memfd()) as region:
        region.plug(0)
        region.save(folder / "0", dirty=True)

        def child() -> None:
            region.save(folder / "1", dirty=True)

        with pytest.raises(ForkedRegionError):
            run_child(child).result()
        write(region, 0, b"x")
        assert region.save(folder / "1", dirty=True).nrecords == 1
    assert sorted(os.listdir(folder)) == ["0", "1"]


def test_a_tracked_region_dies_like_any_other(folder: Path) -> None:
    region = Region("1M", block_size=BLOCK)
    region.plug(0)
    region.save(folder / "0", dirty=True)
    region.close()
    del region
    gc.collect()
