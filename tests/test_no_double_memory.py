"""Private files cost what is plugged and no more, and a template is never changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from sparsemem import File, Memfd, Region
from sparsemem.backends import Backend
from tests.support import accounting
from tests.support.kinds import private_bytes

MIB = 1 << 20


@pytest.mark.promise("single-memory")
@pytest.mark.parametrize("strategy", ["populate_write", "futex"])
@pytest.mark.parametrize("where", ["memfd", "tmpfs", "disk"])
def test_a_private_file_is_populated_once(where: str, strategy: str, tmp_path: Path, tmpfs_folder: Path) -> None:
    backends: dict[str, Backend] = {
        "memfd": Memfd(shared=False, strategy=strategy),
        "tmpfs": File(tmpfs_folder / "f", shared=False, strategy=strategy),
        "disk": File(tmp_path / "f", shared=False, strategy=strategy),
    }
    with Region("1G", block_size="64K", backend=backends[where]) as region:
        region.plug(0, 256)
        assert private_bytes(region) == 16 * MIB
        assert accounting.allocated_bytes(region.fileno()) == 0
        with region.view(0, 256) as view:
            view[:] = b"\1" * len(view)
        assert private_bytes(region) + accounting.allocated_bytes(region.fileno()) == 16 * MIB
        region.unplug(0, 128)
        assert private_bytes(region) == 8 * MIB
        # populating again what is there costs nothing more
        region.populate(128 * region.block_size, 8 * MIB)
        assert private_bytes(region) + accounting.allocated_bytes(region.fileno()) == 8 * MIB


@pytest.mark.promise("existing-data-is-safe")
@pytest.mark.parametrize("strategy", ["populate_write", "futex"])
@pytest.mark.parametrize("by", ["path", "fd", "memfd"])
def test_a_template_is_never_punched_written_or_extended(by: str, strategy: str, tmp_path: Path) -> None:
    content = os.urandom(MIB)
    if by == "memfd":
        fd = os.memfd_create("template")
        os.write(fd, content)
    else:
        path = tmp_path / "template"
        path.write_bytes(content)
        fd = os.open(path, os.O_RDONLY)

    def state() -> tuple[str, int, int]:
        about = os.fstat(fd)
        return hashlib.sha256(os.pread(fd, 2 * MIB, 0)).hexdigest(), about.st_blocks, about.st_size

    try:
        before = state()
        backend: Backend = (
            File(tmp_path / "template", shared=False, strategy=strategy)
            if by == "path"
            else File(fd=fd, shared=False, strategy=strategy)
            if by == "fd"
            else Memfd(fd=fd, shared=False, strategy=strategy)
        )
        with Region(MIB, block_size="64K", backend=backend) as region:
            assert region.fresh == "file"
            region.plug(0, 8)
            with region.view(0, 8) as view:
                assert view == content[: len(view)]
                view[:] = bytes(len(view))
            region.discard(0, 4096)
            with region.view(0) as view:
                assert view[:4096] == content[:4096]
                assert not any(view[4096:8192])
            region.unplug(0, 8)
            region.plug(0, 8)
            with region.view(0, 8) as view:
                assert view == content[: len(view)], "a block plugged again shows the template"
            region.unplug_all()
            assert private_bytes(region) == 0
        assert state() == before
    finally:
        os.close(fd)
