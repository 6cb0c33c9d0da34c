"""Snapshots when something fails: the old file stays, nothing half is left or held, and the error says what it was."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from sparsemem import (
    Anonymous,
    BackendExhaustedError,
    BlockStateError,
    Budget,
    File,
    Memfd,
    PopulateError,
    Region,
    RegionClosedError,
    ReserveError,
    SnapshotError,
    SnapshotIOError,
    SparseMemError,
    ViewsAliveError,
    snapshot,
)
from sparsemem.recipes import Step
from tests import test_interrupts
from tests.support import accounting
from tests.support.children import run_child
from tests.support.injector import Injector
from tests.support.snapshots import contents, fill, write
from tests.test_interrupts import interrupted

BLOCK = 64 << 10
COMPRESS = [None, "zstd"]
both = pytest.mark.parametrize("compress", COMPRESS)
OLD = b"what had the name before"

# What the kernel may give, by the manual pages; not EINTR, after which Python calls again.
ERRNOS = {
    "open": "EACCES EMFILE ENFILE ENOENT ENOMEM ENOTDIR EPERM ELOOP ENAMETOOLONG EIO".split(),
    "open_in": "EACCES EDQUOT EMFILE ENFILE ENOENT ENOMEM ENOSPC EPERM EROFS EIO".split(),
    "stat_in": "EACCES ELOOP ENAMETOOLONG ENOMEM ENOTDIR EOVERFLOW EIO".split(),
    "fstat": "EBADF ENOMEM EOVERFLOW EIO".split(),
    "ftruncate": "EFBIG EINVAL EIO EPERM EROFS".split(),
    "pwrite": "EDQUOT EFBIG EINVAL EIO ENOSPC EPERM".split(),
    "fsync": "EDQUOT EINVAL EIO ENOSPC EROFS".split(),
    "link_in": "EACCES EDQUOT EIO EMLINK ENOENT ENOMEM ENOSPC EPERM EROFS EXDEV".split(),
    "rename_in": "EACCES EBUSY EDQUOT EIO EISDIR ENOENT ENOMEM ENOSPC EPERM EROFS EXDEV".split(),
    "pread": "EIO EISDIR EINVAL ENXIO".split(),
}


def number(name: str) -> int:
    return int(getattr(errno, name))


@pytest.fixture
def path(tmpfs_folder: Path) -> Path:
    return tmpfs_folder / "snapshot"


def make_region(**options: Any) -> Region:
    region = Region("2M", block_size=BLOCK, **options)
    region.plug_runs([(1, 2), (9, 1), (20, 12)])
    fill(region, 1)
    write(region, 9 * BLOCK + 5000, b"hello")
    fill(region, 31)
    return region


def descriptors_of(path: Path) -> set[tuple[int, str]]:
    """Open descriptors of the folder and of what is in it, names or not."""
    return {found for found in accounting.open_descriptors().items() if found[1].startswith(str(path.parent))}


def check_unheld(region: Region) -> None:
    counts = region._core.blocks.counts()
    assert (counts.busy, counts.claims, counts.pins) == (0, 0, 0)


# ---- every call of a save -------------------------------------------------------------------------


def every_failure(
    what: Callable[[], Any], inject: Injector, call: str, name: str, **options: Any
) -> list[BaseException]:
    """Has the nth call fail, n = 1 and so on until there is no such call; what was raised, each time."""
    raised: list[BaseException] = []
    while True:
        inject.call(call, errno=number(name), nth=len(raised) + 1, **options)
        try:
            what()
            return raised
        except Exception as error:
            raised.append(error)
        finally:
            inject.clear()


def without_unnamed(inject: Injector) -> None:
    """As on a file system without O_TMPFILE."""
    inject.call(
        "open_in",
        errno=errno.EOPNOTSUPP,
        repeat=1000,
        when=lambda _f, _n, flags, _m: flags & os.O_TMPFILE == os.O_TMPFILE,
    )


@pytest.mark.promise("snapshot-is-whole-or-not-there")
@both
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("call", [call for call in ERRNOS if call != "pread"])
def test_every_call_of_a_save_may_fail(
    call: str, named: bool, compress: str | None, path: Path, inject: Injector
) -> None:
    reached = 0
    with make_region() as region:
        for name in ERRNOS[call]:
            nth = 0
            while True:
                nth += 1
                path.write_bytes(OLD)
                if named:
                    without_unnamed(inject)
                inject.call(call, errno=number(name), nth=nth)
                try:
                    region.save(path, compress=compress)
                    break
                except SnapshotIOError as error:
                    assert error.errno == number(name)
                    assert str(path) in str(error)
                    assert os.strerror(error.errno) in str(error)
                    reached += 1
                finally:
                    inject.clear()
                if call == "fsync" and nth == 2:
                    # Of the folder, when the new file has its name already.
                    assert snapshot.describe(path).nruns == 3
                else:
                    assert path.read_bytes() == OLD
                assert os.listdir(path.parent) == [path.name]
                assert not descriptors_of(path)
                check_unheld(region)
        assert reached >= len(ERRNOS[call]) or (call == "ftruncate" and compress) or (call == "link_in" and named)
        with Region.restore(path) as other:
            assert contents(other) == contents(region)


@pytest.mark.promise("snapshot-is-whole-or-not-there")
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
def test_every_content_that_cannot_be_read_or_written(named: bool, path: Path, inject: Injector) -> None:
    with make_region() as region:
        for what, names in (("READ", ["EFAULT", "EIO", "ENOMEM", "EPERM"]), ("WRITE", ERRNOS["pwrite"])):
            for name in names:
                nth = 0
                while True:
                    nth += 1
                    path.write_bytes(OLD)
                    if named:
                        without_unnamed(inject)
                    inject.copy(what, errno=number(name), nth=nth)
                    try:
                        region.save(path)
                        break
                    except SnapshotIOError as error:
                        assert error.errno == number(name)
                        assert os.strerror(error.errno) in str(error)
                        assert (f"cannot write snapshot {path}" if what == "WRITE" else "cannot read block") in str(
                            error
                        )
                    finally:
                        inject.clear()
                    assert path.read_bytes() == OLD
                    assert os.listdir(path.parent) == [path.name]
                    check_unheld(region)
                assert nth > 2


def test_a_temporary_that_cannot_be_removed_is_no_snapshot_for_long(path: Path, inject: Injector) -> None:
    """What keeps a save from finishing may keep it from tidying up; the error is the first one's."""
    without_unnamed(inject)
    inject.call("rename_in", errno=errno.EIO)
    inject.call("unlink_in", errno=errno.EROFS)
    with make_region() as region, pytest.raises(SnapshotIOError, match="Input/output error"):
        region.save(path)
    (left,) = os.listdir(path.parent)
    assert left.startswith(".snapshot.")
    assert left.endswith(".tmp")


# ---- every call of a restore ------------------------------------------------------------------------


@pytest.mark.promise("snapshot-is-checked-first")
@pytest.mark.parametrize("lazy", [False, True], ids=["copied", "lazy"])
@pytest.mark.parametrize("call", ["open", "fstat", "pread", "reserve", "duplicate", "statvfs"])
def test_every_call_of_a_restore_may_fail(call: str, lazy: bool, path: Path, inject: Injector) -> None:
    with make_region() as region:
        region.save(path)
        held = contents(region)

    def restore() -> None:
        budget = Budget("2M")
        try:
            with Region.restore(path, lazy=lazy, budget=budget) as region:
                assert contents(region) == held
        finally:
            assert budget.used == 0

    for name in ("EIO", "EMFILE", "ENOMEM", "EACCES"):
        for error in every_failure(restore, inject, call, name):
            assert isinstance(error, (SparseMemError, OSError)), error
            assert getattr(error, "errno", None) in (number(name), None)
            del error
            gc.collect()
            assert not descriptors_of(path)


@pytest.mark.parametrize("options", [{}, {"verify": False}, {"lazy": True}], ids=str)
def test_every_content_that_cannot_be_read_to_restore(options: dict[str, Any], path: Path, inject: Injector) -> None:
    with make_region() as region:
        region.save(path)
    nth = 0
    while True:
        nth += 1
        inject.copy("READ", errno=errno.EIO, nth=nth)
        budget = Budget("2M")
        try:
            Region.restore(path, budget=budget, **options).close()
            break
        except SnapshotIOError as error:
            assert str(error).endswith(f"cannot read snapshot {path}: Input/output error")
        finally:
            inject.clear()
        assert budget.used == 0
    assert nth > 2


EXISTING = [
    ("populate_write", Step.PUNCH),
    ("populate_write", Step.POPULATE_WRITE),
    ("touch", Step.TOUCH),
    ("futex", Step.FUTEX),
]


@pytest.mark.promise("snapshot-is-checked-first")
@pytest.mark.parametrize(("strategy", "step"), EXISTING, ids=str)
def test_a_plug_that_fails_leaves_a_file_that_was_there_empty(
    strategy: str, step: Step, path: Path, inject: Injector
) -> None:
    """The file itself stays, since it was there; what was put into it does not."""
    with make_region() as region:
        region.save(path)
    target = path.with_name("target")
    target.touch()
    failed = 0
    for nth in range(1, 30):
        for after in (0, 4096):
            budget = Budget("2M")
            inject.step(step, errno=errno.EIO, nth=nth, after=after)
            try:
                Region.restore(path, budget=budget, backend=File(target, strategy=strategy)).close()
                os.truncate(target, 0)
            except SparseMemError as error:
                assert isinstance(error, (PopulateError, BackendExhaustedError, OSError))
                failed += 1
            finally:
                inject.clear()
            assert budget.used == 0
            assert target.stat().st_blocks == 0
    assert failed


@pytest.mark.promise("snapshot-is-checked-first")
def test_corruption_found_late_is_undone(path: Path) -> None:
    with make_region() as region:
        told = region.save(path)
    with path.open("r+b") as file:
        file.seek(told.data_offset + 31 * BLOCK + 500)
        file.write(b"spoilt")
    target = path.with_name("target")
    for existed in (False, True):
        if existed:
            target.touch()
        budget = Budget("2M")
        with pytest.raises(SnapshotError, match="is corrupted"):
            Region.restore(path, verify=False, budget=budget, backend=File(target))
        assert budget.used == 0
        assert target.exists() == existed
    assert target.stat().st_blocks == 0


# ---- real faults --------------------------------------------------------------------------------


@pytest.mark.promise("snapshot-is-whole-or-not-there")
@both
@pytest.mark.parametrize("room", [1, 5, 17, 33, 49], ids=lambda room: f"{room}x64K")
def test_a_disk_that_is_full(compress: str | None, room: int, tmpfs_mount: Callable[..., Path]) -> None:
    folder = tmpfs_mount(size=room * BLOCK)
    path = folder / "snapshot"
    with Region("4M", block_size=BLOCK) as region:
        region.plug(0, 64)
        fill(region, 0, 64)
        path.write_bytes(OLD)
        with pytest.raises(SnapshotIOError, match="No space left on device") as caught:
            region.save(path, compress=compress)
        assert caught.value.errno == errno.ENOSPC
        assert path.read_bytes() == OLD
        assert os.listdir(folder) == [path.name]
        assert os.statvfs(folder).f_bfree == room * BLOCK // 4096 - 1
        check_unheld(region)


@pytest.mark.promise("snapshot-is-whole-or-not-there")
def test_room_for_the_content_and_none_for_the_tables(tmpfs_mount: Callable[..., Path]) -> None:
    """The header comes last: whatever is missing, there is no file."""
    outcomes = set()
    for pages in range(1, 12):
        folder = tmpfs_mount(size=pages * 4096)
        with Region("4M", block_size=BLOCK) as region:
            region.plug(0, 4)
            for block in range(4):
                write(region, block * BLOCK, b"content")
            try:
                region.save(folder / "snapshot")
                Region.restore(folder / "snapshot").close()
                outcomes.add(True)
            except SnapshotIOError as error:
                assert error.errno == errno.ENOSPC
                assert not os.listdir(folder)
                outcomes.add(False)
    assert outcomes == {True, False}


@both
@pytest.mark.parametrize("limit", [0, 4096, 2 << 20, (2 << 20) + 5 * BLOCK])
def test_a_limit_of_file_sizes(compress: str | None, limit: int, path: Path) -> None:
    path.write_bytes(OLD)

    def child() -> int | None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with Region("4M", block_size=BLOCK) as region:
            region.plug(0, 64)
            fill(region, 0, 64)
            try:
                region.save(path, compress=compress)
            except SnapshotIOError as error:
                check_unheld(region)
                assert str(path) in str(error)
                return error.errno
        return None

    assert run_child(child, limits={resource.RLIMIT_FSIZE: limit}).result() == errno.EFBIG
    assert path.read_bytes() == OLD
    assert os.listdir(path.parent) == [path.name]


@both
def test_too_many_open_files(compress: str | None, path: Path) -> None:
    def child() -> set[bool]:
        outcomes = set()
        spare: list[int] = []
        with contextlib.suppress(OSError):
            while True:
                spare.append(os.dup(0))
        for _ in range(8):
            for work in (lambda: region.save(path, compress=compress), lambda: Region.restore(path).close()):
                try:
                    work()
                    outcomes.add(True)
                except (SnapshotIOError, ReserveError) as error:
                    assert error.errno == errno.EMFILE
                    outcomes.add(False)
            os.close(spare.pop())
        return outcomes

    with make_region(fork="inherit", backend=Memfd()) as region:
        region.save(path, compress=compress)
        assert run_child(child, limits={resource.RLIMIT_NOFILE: 64}).result() == {True, False}
    assert os.listdir(path.parent) == [path.name]
    Region.restore(path).close()


@both
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "private"])
def test_memory_that_is_gone_is_an_error_and_no_signal(compress: str | None, shared: bool, path: Path) -> None:
    """Somebody truncates the file underneath: whoever touched it got SIGBUS."""
    path.write_bytes(OLD)
    memory = path.with_name("memory")
    with Region("1M", block_size=BLOCK, backend=File(memory, shared=shared)) as region:
        region.plug(0, 8)
        fill(region, 0, 8)
        os.truncate(memory, 2 * BLOCK)
        with pytest.raises(SnapshotIOError, match=r"cannot read block 2 to save it: (No data|Bad address)"):
            region.save(path, compress=compress)
        assert path.read_bytes() == OLD
        check_unheld(region)
        region.unplug(2, 6)
        region.save(path, compress=compress)
        held = contents(region)
        os.truncate(memory, 1 << 20)
    assert sorted(os.listdir(path.parent)) == ["memory", "snapshot"]
    with Region.restore(path) as other:
        assert contents(other) == held


def test_a_template_that_is_cut_off(path: Path) -> None:
    """A lazily restored region whose file was truncated by somebody who may write to it."""
    with make_region() as region:
        told = region.save(path)
    with Region.restore(path, lazy=True) as region:
        os.truncate(path, told.data_offset + 10 * BLOCK)
        with pytest.raises(SnapshotIOError, match="cannot read block 20 to save it: Bad address"):
            region.save(path.with_name("other"))
    assert os.listdir(path.parent) == [path.name]


# ---- killed -----------------------------------------------------------------------------------------

GENERATIONS = textwrap.dedent(
    """
    import itertools, sys
    from sparsemem import Region

    path, compress, named = sys.argv[1], sys.argv[2] or None, sys.argv[3] == "named"
    if named:
        from sparsemem.snapshot import draft
        draft.os.O_TMPFILE = 0o40000000 | draft.os.O_DIRECTORY  # no kernel knows it
    with Region("8M", block_size="256K") as region:
        region.plug(0, 32)
        for generation in itertools.count(1):
            with region.view(0, 32) as view:
                view[:] = generation.to_bytes(8, "little") * (len(view) // 8)
            region.save(path, compress=compress)
            print(generation, flush=True)
    """
)


@pytest.mark.promise("snapshot-is-whole-or-not-there")
@pytest.mark.slow
@both
@pytest.mark.parametrize("named", ["unnamed", "named"])
def test_killed_at_any_moment_there_is_a_whole_file(compress: str | None, named: str, tmpfs_folder: Path) -> None:
    import random

    chance = random.Random(7)
    killed = 0
    for attempt in range(25):
        folder = tmpfs_folder / str(attempt)
        folder.mkdir()
        path = folder / "snapshot"
        child = subprocess.Popen(
            [sys.executable, "-c", GENERATIONS, path, compress or "", named], stdout=subprocess.PIPE, text=True
        )
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "1\n"
            time.sleep(chance.uniform(0, 0.1))
        finally:
            child.kill()
            told = child.communicate()[0].split()
        last = int(told[-1]) if told else 1
        with Region.restore(path) as region:
            held = contents(region)
        (generation,) = {bytes(data[at : at + 8]) for data in held.values() for at in range(0, len(data), 4096)}
        number = int.from_bytes(generation, "little")
        assert number in (last, last + 1)
        assert held == {block: generation * (len(held[0]) // 8) for block in range(32)}
        for left in set(os.listdir(folder)) - {path.name}:
            killed += 1
            assert left.startswith(".snapshot.")
            try:
                with Region.restore(folder / left) as region:
                    assert region.plugged_blocks == 32
            except SnapshotError:
                pass
    assert named == "unnamed" or killed, "25 times without a save at work?"


# ---- interrupted --------------------------------------------------------------------------------

SNAPSHOT_MODULES = ("draft", "format", "restoring", "saving", "telling", "tracking", "compression")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupts come in the modules of snapshots, too."""
    files = {sys.modules[f"sparsemem.snapshot.{name}"].__file__ for name in SNAPSHOT_MODULES}
    monkeypatch.setattr(test_interrupts, "FILES", test_interrupts.FILES | files)


@pytest.mark.promise("snapshot-is-whole-or-not-there")
@both
@pytest.mark.parametrize("dirty", [False, True], ids=["full", "dirty"])
def test_a_save_interrupted_at_every_line(compress: str | None, dirty: bool, path: Path, traced: None) -> None:
    with Region("512K", block_size=BLOCK) as region:
        region.plug_runs([(0, 1), (2, 2)])
        first = path.with_name("first")
        if dirty:
            region.save(first, dirty=True)
        kept = [first.name] if dirty else []
        n = 0
        came = True
        while came:
            n += 1
            path.write_bytes(OLD)
            write(region, 2 * BLOCK, b"%d" % n)
            chain = [first] if dirty else []
            came = interrupted(lambda: region.save(path, dirty=dirty, compress=compress), n, "line")
            check_unheld(region)
            assert sorted(os.listdir(path.parent)) == sorted([*kept, path.name]), n
            if path.read_bytes() != OLD:
                with Region.restore(path, base=chain) as other:
                    assert contents(other) == contents(region)
            if dirty:
                # However that was: with what comes next the chain has all of it.
                second, told = path.with_name("second"), snapshot.describe(first).id
                if path.read_bytes() != OLD and region._tracker.base == snapshot.describe(path).id:
                    chain.append(path)
                else:
                    assert region._tracker.base == told
                region.save(second, dirty=True)
                with Region.restore(second, base=chain) as other:
                    assert contents(other) == contents(region), n
                first.unlink()
                second.unlink()
                region.save(first, dirty=True, full=True)
        assert n > 100
        assert region.audit().ok


def test_a_first_dirty_save_interrupted_at_every_line(path: Path, traced: None) -> None:
    n = 0
    came = True
    while came:
        n += 1
        with Region("512K", block_size=BLOCK) as region:
            region.plug_runs([(0, 1), (2, 2)])
            write(region, 0, b"before")
            path.unlink(missing_ok=True)
            came = interrupted(lambda: region.save(path, dirty=True), n, "line")
            write(region, 2 * BLOCK, b"after")
            region.plug(5)
            second = path.with_name("second")
            told = region.save(second, dirty=True)
            with Region.restore(second, base=[path] if told.base else []) as other:
                assert contents(other) == contents(region), n
            check_unheld(region)
            second.unlink()
    assert n > 100


@pytest.mark.parametrize(("compress", "lazy"), [(None, False), (None, True), ("zstd", False)])
def test_a_restore_interrupted_at_every_line(compress: str | None, lazy: bool, path: Path, traced: None) -> None:
    with Region("512K", block_size=BLOCK) as region:
        region.plug_runs([(0, 1), (2, 2)])
        fill(region, 2, 2)
        region.save(path, compress=compress)
        held = contents(region)
    n = 0
    came = True
    while came:
        n += 1
        budget = Budget("512K")
        regions: list[Region] = []
        came = interrupted(
            lambda: regions.append(Region.restore(path, lazy=lazy, budget=budget)),  # noqa: B023 - called at once
            n,
            "line",
        )
        while regions:
            with regions.pop() as region:
                assert contents(region) == held
        gc.collect()  # tracebacks
        assert budget.used == 0, n
        assert not descriptors_of(path), n
    assert n > 100


@pytest.mark.parametrize("existed", [False, True])
def test_a_restore_into_a_file_interrupted_at_every_line(existed: bool, path: Path, traced: None) -> None:
    with Region("512K", block_size=BLOCK) as region:
        region.plug_runs([(0, 1), (2, 2)])
        fill(region, 2, 2)
        region.save(path)
    target = path.with_name("target")
    n = 0
    came = True
    while came:
        n += 1
        if existed:
            target.write_bytes(b"")
        regions: list[Region] = []
        came = interrupted(
            lambda: regions.append(Region.restore(path, backend=File(target))),  # noqa: B023 - called at once
            n,
            "line",
        )
        if came and not regions:
            assert not target.exists() or target.stat().st_blocks == 0, n
        for region in regions:
            region.close()
        target.unlink(missing_ok=True)


# ---- others at work ---------------------------------------------------------------------------------


def in_threads(*work: Callable[[], None]) -> list[BaseException]:
    """All of them at once; what they raised."""
    raised: list[BaseException] = []
    start = threading.Barrier(len(work))

    def run(one: Callable[[], None]) -> None:
        start.wait()
        try:
            one()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@both
def test_several_saves_at_once(compress: str | None, path: Path) -> None:
    """To one name: the last one has it, whole.  To several: all are."""
    with Region("64M", block_size="1M") as region:
        region.plug(0, 48)
        fill(region, 0, 8)
        held = contents(region)
        assert not in_threads(*[lambda: region.save(path, compress=compress)] * 4)  # type: ignore[list-item]
        assert os.listdir(path.parent) == [path.name]
        names = [path.with_name(str(number)) for number in range(4)]
        assert not in_threads(*[lambda name=name: region.save(name, compress=compress) for name in names])  # type: ignore[misc]
        check_unheld(region)
    for name in (path, *names):
        with Region.restore(name) as other:
            assert contents(other) == held
    assert len({snapshot.describe(name).id for name in (path, *names)}) == 5


def test_several_dirty_saves_at_once_are_one_chain(path: Path) -> None:
    with Region("64M", block_size="1M") as region:
        region.plug(0, 48)
        fill(region, 0, 2)
        names = [path.with_name(str(number)) for number in range(4)]
        for error in in_threads(*[lambda name=name: region.save(name, dirty=True) for name in names]):  # type: ignore[misc]
            assert "another save with dirty= of the same region is under way" in str(error)
        write(region, 0, b"later")
        region.save(path, dirty=True)
        chain = [name for name in names if name.exists()]
        with Region.restore(path, base=chain) as other:
            assert contents(other) == contents(region)


def test_a_region_that_is_closed_meanwhile(path: Path) -> None:
    """Closing waits for the piece at hand; then the save finds it closed."""
    for _ in range(5):
        path.write_bytes(OLD)
        region = Region("512M", block_size="1M")
        region.plug(0, 256)
        begun = threading.Event()

        def save(region: Region = region, begun: threading.Event = begun) -> None:
            region.save(path, progress=lambda *_: begun.set())

        def close(region: Region = region, begun: threading.Event = begun) -> None:
            begun.wait()
            region.close()

        raised = in_threads(save, close)
        assert region.closed
        if raised:
            (error,) = raised
            assert isinstance(error, RegionClosedError)
            assert path.read_bytes() == OLD
        else:
            assert snapshot.describe(path).nruns == 1
        assert os.listdir(path.parent) == [path.name]


def test_views_alive_do_not_matter_to_a_save_nor_a_save_to_them(path: Path) -> None:
    with make_region() as region, region.view(1, 2) as view:
        view[:5] = b"still"
        region.save(path)
        view[5:10] = b"alive"
        with pytest.raises(ViewsAliveError):
            region.unplug(1)
        with Region.restore(path) as other, other.view(1) as saved:
            assert saved[:5] == b"still"
            assert saved[5:10] != b"alive"
            assert saved[10:] == view[10:BLOCK]


@pytest.mark.promise("snapshot-state-is-per-block")
@pytest.mark.parametrize("backend", [Anonymous(), Memfd(), Memfd(shared=False)], ids=str)
def test_plugs_and_unplugs_in_other_threads(backend: Any, path: Path) -> None:
    """A block is saved with the content of one life, if it is written to only under a view."""
    stop = threading.Event()
    with Region("64M", block_size=BLOCK, backend=attrs.evolve(backend)) as region:

        def churn(first: int) -> Callable[[], None]:
            def work() -> None:
                life = 0
                while not stop.is_set():
                    life += 1
                    for block in range(first, first + 8):
                        region.plug(block)
                    for block in range(first, first + 8):
                        try:
                            region.unplug(block)
                        except BlockStateError as error:
                            raise AssertionError(block) from error

            return work

        def save() -> None:
            try:
                for number in range(30):
                    region.save(path, compress=COMPRESS[number % 2])
                    with Region.restore(path) as other:
                        assert set(contents(other).values()) <= {bytes(BLOCK)}
            finally:
                stop.set()

        assert not in_threads(save, churn(0), churn(500))
        check_unheld(region)
        assert region.audit().ok
