"""Lazy restores: a private mapping of the file, a template, of which nothing is read before it is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsemem import File, Memfd, Region, SnapshotError, UnsupportedError
from tests.support import accounting
from tests.support.injector import Injector
from tests.support.snapshots import contents, fill, write

BLOCK = 64 << 10


@pytest.fixture
def path(tmpfs_folder: Path) -> Path:
    return tmpfs_folder / "snapshot"


def saved(path: Path) -> dict[int, bytes]:
    """What the blocks hold of a region of 64 MiB that was saved there."""
    with Region("64M", block_size=BLOCK) as region:
        region.plug_runs([(1, 2), (9, 1), (1000, 24)])
        fill(region, 1)
        write(region, 9 * BLOCK + 5000, b"hello")
        fill(region, 1023)
        region.save(path)
        return contents(region)


def private(region: Region) -> int:
    return accounting.smaps(region.address, region.size)["Anonymous"]


def test_nothing_is_read_and_no_memory_is_used(path: Path, inject: Injector) -> None:
    held = saved(path)
    inject.made.clear()
    with Region.restore(path, lazy=True, verify=False) as region:
        assert "load" not in inject.made
        assert accounting.smaps(region.address, region.size)["Rss"] == 0
        assert list(region.plugged_runs()) == [(1, 2), (9, 1), (1000, 24)]
        assert contents(region) == held
        assert private(region) == 0, "a look gives no page of one's own"
        assert region.audit().ok


@pytest.mark.promise("snapshot-comes-back")
def test_writes_stay_private(path: Path) -> None:
    held = saved(path)
    before = path.read_bytes()
    with Region.restore(path, lazy=True) as region, Region.restore(path, lazy=True) as other:
        write(region, 9 * BLOCK, b"mine")
        assert private(region) == 4096
        assert contents(other) == held
        assert contents(region)[9][:4] == b"mine"
        assert region.audit().ok
    assert path.read_bytes() == before


@pytest.mark.promise("snapshot-comes-back")
def test_it_is_a_template(path: Path) -> None:
    """A block that is plugged again shows the file once more; one that the snapshot has not reads zero."""
    held = saved(path)
    with Region.restore(path, lazy=True) as region:
        assert region.fresh == "file"
        assert region.backend == File(path, shared=False, offset="2M")
        write(region, BLOCK, b"mine")
        region.unplug(1)
        region.plug(1)
        region.plug(500)
        assert contents(region) == {**held, 500: bytes(BLOCK)}
        assert region.audit().ok
        with pytest.raises(UnsupportedError, match="block 0 is not at offset 0 of the file, but at 2M"):
            region.fileno()


def test_pages_can_be_had_beforehand(path: Path) -> None:
    held = saved(path)
    with Region.restore(path, lazy=True) as region:
        region.populate(1000 * BLOCK, 24 * BLOCK)
        assert private(region) == 24 * BLOCK
        assert contents(region) == held
        assert region.audit().ok


def test_it_can_be_saved_again_in_full_and_by_changes(path: Path) -> None:
    held = saved(path)
    again, first, second = (path.with_name(name) for name in ("again", "first", "second"))
    with Region.restore(path, lazy=True) as region:
        write(region, 9 * BLOCK, b"mine")
        held[9] = b"mine" + held[9][4:]
        region.save(again)
        region.save(first, dirty=True)
        write(region, 2 * BLOCK, b"more")
        told = region.save(second, dirty=True)
        assert told.base is not None
        assert region.audit().ok
    with Region.restore(again, backend=Memfd()) as region:
        assert contents(region) == held
    held[2] = b"more" + held[2][4:]
    with Region.restore(second, base=first) as region:
        assert contents(region) == held


def test_a_new_file_of_that_name_changes_nothing(path: Path) -> None:
    """A later save takes the name; the region keeps the file that it was restored from."""
    held = saved(path)
    with Region.restore(path, lazy=True) as region:
        with Region("64M", block_size=BLOCK) as other:
            other.plug(0)
            other.save(path)
        assert contents(region) == held
        region.unplug_all()
        region.plug(1)
        assert contents(region) == {1: held[1]}


def test_a_region_can_be_saved_over_the_file_that_it_shows(path: Path) -> None:
    held = saved(path)
    with Region.restore(path, lazy=True) as region:
        write(region, BLOCK, b"mine")
        region.save(path)
    with Region.restore(path) as region:
        assert contents(region) == {**held, 1: b"mine" + held[1][4:]}


def test_large_pages_can_be_mapped(path: Path) -> None:
    """Block 0 is at a multiple of 2 MiB in the file and in memory."""
    with Region("64M", block_size="2M") as region:
        told = region.save(path)
    with Region.restore(path, lazy=True) as region:
        assert region.address % (2 << 20) == told.data_offset % (2 << 20) == 0


def test_what_cannot_be_mapped(path: Path) -> None:
    saved(path)
    with pytest.raises(ValueError, match="it does not go with backend="):
        Region.restore(path, lazy=True, backend=Memfd())
    for protection in ("trap", "guard", "prot_none"):
        with pytest.raises(UnsupportedError, match=f"it does not go with protection='{protection}'"):
            Region.restore(path, lazy=True, protection=protection)
    with Region.restore(path) as region:
        region.save(path, compress="zstd")
    with pytest.raises(UnsupportedError, match="a compressed snapshot cannot be mapped"):
        Region.restore(path, lazy=True)


def test_a_corrupted_one_is_found_unless_it_is_believed(path: Path) -> None:
    saved(path)
    with path.open("r+b") as file:
        file.seek((2 << 20) + 1023 * BLOCK)
        file.write(b"spoilt")
    with pytest.raises(SnapshotError, match="is corrupted"):
        Region.restore(path, lazy=True)
    with Region.restore(path, lazy=True, verify=False) as region:
        assert contents(region)[1023][:6] == b"spoilt"


def test_templates_from_an_offset(tmpfs_folder: Path) -> None:
    """What a lazy restore is made of, and of use by itself."""
    path = tmpfs_folder / "file"
    path.write_bytes(bytes(4096) + b"content".ljust(1 << 20, b"."))
    with Region("1M", block_size=BLOCK, backend=File(path, shared=False, offset=4096)) as region:
        region.plug(0)
        with region.view(0) as view:
            assert view[:7] == b"content"
        assert str(region.backend).endswith("offset=4K")
    with pytest.raises(OSError, match=r"the template has 1M from offset 4K on and the region 2M"):
        Region("2M", block_size=BLOCK, backend=File(path, shared=False, offset=4096))
    with pytest.raises(ValueError, match="is not a multiple of the page size"):
        File(path, shared=False, offset=100)
    with pytest.raises(ValueError, match="offset=4096 is for templates"):
        File(path, offset=4096)
