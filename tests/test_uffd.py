"""Filling through userfaultfd: what it takes, what it leaves alone, and what takes its place."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path
from typing import Any

import pytest

from sparsemem import Anonymous, Memfd, Region, ReserveError, UnsupportedError
from sparsemem._sys import calls, probe
from sparsemem._sys.uffd import shared
from sparsemem.backends import Backend
from tests.support import accounting
from tests.support.children import run_child
from tests.support.injector import Injector

BLOCK = 64 << 10
MIB = 1 << 20

FILLED = [
    pytest.param(Anonymous(), "uffd_copy", id="anonymous"),
    pytest.param(Anonymous(shared=True), "uffd_zeropage", id="anonymous shared"),
    pytest.param(Memfd(), "uffd_zeropage", id="memfd"),
    pytest.param(Memfd(strategy="uffd_copy"), "uffd_copy", id="memfd copy"),
    pytest.param(Memfd(shared=False), "uffd_copy", id="memfd private"),
]

pytestmark = pytest.mark.skipif(
    not (probe.uffd_copy(calls.kernel) and probe.uffd_shmem(calls.kernel)), reason="needs userfaultfd"
)


def count() -> int:
    return sum("userfaultfd" in path for path in accounting.open_descriptors().values())


@pytest.mark.parametrize(("backend", "strategy"), FILLED)
def test_small_pages_are_filled_by_default(backend: Backend, strategy: str) -> None:
    with Region("1G", block_size=BLOCK, backend=backend) as region:
        assert region.stats().strategy == strategy
        region.plug(0, 100)
        assert region.audit().ok
        assert region.audit().resident_size == 100 * BLOCK
        with region.view(0, 100) as view:
            assert view == bytes(100 * BLOCK)


@pytest.mark.parametrize(("backend", "strategy"), FILLED)
def test_populating_again_keeps_what_is_there(backend: Backend, strategy: str) -> None:
    with Region("16M", block_size=BLOCK, backend=backend) as region:
        region.plug(0, 4)
        with region.view(0, 4) as view:
            view[:] = b"x" * len(view)
        region.discard(BLOCK, 8192)
        region.populate(0, 4 * BLOCK)
        with region.view(0, 4) as view:
            assert view == b"x" * BLOCK + bytes(8192) + b"x" * (3 * BLOCK - 8192)
        assert region.audit().resident_size == 4 * BLOCK


@pytest.mark.parametrize(("backend", "strategy"), FILLED)
def test_what_is_there_already_is_not_kept(backend: Backend, strategy: str) -> None:
    """A stray write, and a stray read, which maps a page of zeroes: filling is refused, and all is done anew."""
    with Region("1M", block_size=BLOCK, backend=backend) as region:
        everything = region.view()
        everything[2 * BLOCK + 5000] = 1
        assert everything[4 * BLOCK] == 0
        assert region.plug(1, 3) == 3  # in one call of C
        assert region.plug_runs([(4, 2), (7, 1)]) == 3
        with region.view(1, 5) as view:
            assert view == bytes(5 * BLOCK)
        report = region.audit()
        assert report.ok
        assert report.resident_size == 6 * BLOCK
        del everything, view


def test_what_somebody_wrote_into_the_file_beneath_does_not_stay_there() -> None:
    """UFFDIO_COPY would not look at it: nobody has mapped that page."""
    with Region("1M", block_size=BLOCK, backend=Memfd(shared=False)) as region:
        assert os.pwrite(region.fileno(), b"stray", 3 * BLOCK) == 5
        region.plug(3)
        assert os.fstat(region.fileno()).st_blocks == 0
        with region.view(3) as view:
            assert view == bytes(BLOCK)


def test_huge_pages_are_not() -> None:
    with Region("64M") as region:
        assert region.stats().strategy == "populate_write"


@pytest.mark.parametrize(("backend", "strategy"), FILLED)
def test_an_access_to_an_unplugged_block_is_not_trapped(backend: Backend, strategy: str) -> None:
    """Registered for write protection, of which no use is made: nobody waits for an answer that never comes."""

    def child() -> int:
        region = Region("1M", block_size=BLOCK, backend=backend, fork="inherit")
        view = region.view()
        view[5 * BLOCK] = 1
        return view[5 * BLOCK] + view[6 * BLOCK]

    assert run_child(child, timeout=10).result() == 1


def test_regions_share_one_descriptor_that_goes_with_the_last() -> None:
    gc.collect()
    before = count()
    regions = [Region("1M", block_size=BLOCK) for _ in range(5)]
    assert count() == before + (before == 0)
    for region in regions:
        region.close()
    del regions, region
    gc.collect()
    assert count() == before


@pytest.mark.parametrize("backend", [Anonymous(), Memfd(shared=False)], ids=["anonymous", "memfd private"])
def test_a_child_fills_its_own_memory_and_never_the_parents(backend: Backend) -> None:
    with Region("1M", block_size=BLOCK, backend=backend, fork="inherit") as region:
        region.plug(0)

        def child() -> tuple[int, bool]:
            region.plug(3, 2)
            return region.plugged_size, region.audit().ok

        assert run_child(child).result() == (3 * BLOCK, True)
        assert region.audit().resident_size == BLOCK
        assert region.audit().ok


def test_a_child_has_a_descriptor_of_its_own() -> None:
    with Region("1M", block_size=BLOCK) as region:
        region.plug(0)

        def child() -> tuple[str, int, bool]:
            with Region("1M", block_size=BLOCK) as own:
                own.plug(0, 16)
                return own.stats().strategy, own.audit().resident_size, own.audit().ok

        assert run_child(child).result() == ("uffd_copy", MIB, True)
        assert region.audit().ok


@pytest.mark.parametrize("call", ["userfaultfd", "register"])
@pytest.mark.parametrize("code", ["EPERM", "ENOSYS", "EMFILE", "ENFILE", "ENOMEM", "EINVAL", "EBUSY"])
def test_without_it_auto_is_another_way_and_by_name_it_is_refused(
    call: str, code: str, inject: Injector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "uffd_copy", lambda _: True)  # it has worked before
    number = getattr(errno, code)
    inject.call(call, errno=number, repeat=10)
    with pytest.raises(ReserveError) as caught:
        Region("1M", block_size=BLOCK, backend=Anonymous(strategy="uffd_copy"))
    assert caught.value.errno == number
    with Region("1M", block_size=BLOCK) as region:
        assert region.stats().strategy == "populate_write"
        region.plug(0, 16)
        assert region.audit().ok


def test_where_it_never_worked_it_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "uffd_copy", lambda _: False)
    with pytest.raises(UnsupportedError, match="no userfaultfd"):
        Region("1M", block_size=BLOCK, backend=Anonymous(strategy="uffd_copy"))
    with Region("1M", block_size=BLOCK) as region:
        assert region.stats().strategy == "populate_write"


def test_a_mapping_that_lost_its_registration_is_populated_the_other_way() -> None:
    """As after somebody has unmapped and mapped a part: what the ioctl cannot do, the populate does."""
    with Region("4M", block_size=BLOCK) as region:
        found = shared(calls.kernel)
        import fcntl
        import struct

        unregister = 2 << 30 | 16 << 16 | 0xAA << 8 | 1  # _IOR, linux/userfaultfd.h
        fcntl.ioctl(found.c.fd, unregister, struct.pack("QQ", region.address, region.size))
        assert region.plug(0, 64) == 64
        assert region.audit().ok
        assert region.audit().resident_size == 4 * MIB


@pytest.mark.parametrize("backend", [Anonymous(strategy="touch"), Memfd(strategy="touch")], ids=["anonymous", "memfd"])
def test_touching_populates_and_keeps_content_when_it_populates_again(backend: Backend) -> None:
    with Region("16M", block_size=BLOCK, backend=backend) as region:
        region.plug(0, 64)
        assert region.stats().strategy == "touch"
        assert region.audit().resident_size == 64 * BLOCK
        with region.view(0) as view:
            view[:] = b"y" * BLOCK
        region.discard(4096, 4096)
        region.populate(0, BLOCK)
        with region.view(0) as view:
            assert view == b"y" * 4096 + bytes(4096) + b"y" * (BLOCK - 8192)


def test_a_template_is_neither_filled_nor_touched(tmp_path: Path) -> None:
    from sparsemem import File

    path: Any = tmp_path / "data"
    path.write_bytes(b"z" * BLOCK * 4)
    for strategy in ("uffd_copy", "uffd_zeropage", "touch"):
        with pytest.raises(UnsupportedError, match=f"strategy '{strategy}' does not work on template"):
            Region("256K", block_size=BLOCK, backend=File(path, shared=False, strategy=strategy))
    with Region("256K", block_size=BLOCK, backend=File(path, shared=False)) as region:
        region.plug(1)
        assert region.view(1)[:4] == b"zzzz"
