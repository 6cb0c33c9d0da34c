"""A tmpfs of the region's own."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from sparsemem import BackendExhaustedError, Cause, Region, Tmpfs, UnsupportedError
from sparsemem._sys import tmpfs
from sparsemem.backends import from_text
from tests.support import accounting
from tests.support.children import unprivileged
from tests.support.injector import Injector

MIB = 1 << 20


@pytest.fixture(autouse=True)
def available() -> None:
    try:
        os.close(tmpfs.detached_file(0))
    except OSError:
        try:
            os.close(tmpfs.user_file(0))
        except OSError as error:
            pytest.skip(f"needs user namespaces for everybody ({error.strerror})")


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "private"])
def test_it_is_memory_like_any_other(shared: bool) -> None:
    before = accounting.open_descriptors()
    with Region("1T", block_size="64K", backend=Tmpfs(shared=shared)) as region:
        region.plug(0, 10)
        with region.view(0, 10) as view:
            assert view == bytes(10 << 16)
            view[:] = b"x" * len(view)
        assert region.audit().ok
        assert region.audit().resident_size == 10 << 16
        region.unplug(3, 4)
        assert region.audit().ok
        assert accounting.allocated_bytes(region.fileno()) == (6 << 16 if shared else 0)
    if shared:
        assert set(accounting.open_descriptors()) == set(before)


def test_huge_pages_come_by_themselves_whatever_the_machines_setting(shmem_thp_mode: Any) -> None:
    if os.geteuid() == 0:
        shmem_thp_mode("never")
    with Region("64M", block_size="2M", backend=Tmpfs(strategy="populate_write")) as region:
        region.plug(1, 4)
        assert accounting.smaps(region.address, region.size)["ShmemPmdMapped"] == 8 * MIB
    with Region("64M", block_size="2M", backend=Tmpfs(huge="never", strategy="populate_write")) as region:
        region.plug(1, 4)
        assert accounting.smaps(region.address, region.size)["ShmemPmdMapped"] == 0
    with Region("64M", block_size="64K", backend=Tmpfs()) as region:
        region.plug(1)
        assert accounting.allocated_bytes(region.fileno()) == 64 << 10


@pytest.mark.promise("plugged-reads-zero")
@pytest.mark.parametrize("strategy", ["auto", "collapse", "populate_write", "uffd_zeropage", "futex"])
@pytest.mark.parametrize("huge", ["always", "within_size", "never"])
def test_a_block_that_others_had_reads_zero(huge: str, strategy: str) -> None:
    """MADV_COLLAPSE maps what fallocate() has allocated without clearing it: nothing may be allocated that way."""
    with Region("256M", block_size="2M", backend=Tmpfs(huge=huge, strategy=strategy)) as region:
        for _ in range(3):
            region.plug(0, 16)
            with region.view(0, 16) as view:
                assert view == bytes(32 * MIB)
                view[:] = b"secret00" * (4 * MIB)
            assert region.audit().ok
            region.unplug(0, 16)
        region.plug_runs([(i, 1) for i in range(0, 64, 2)])
        for i in range(0, 64, 2):
            with region.view(i) as view:
                assert view == bytes(2 * MIB)
        assert region.audit().ok


@pytest.mark.parametrize("headroom", ["check", "off"])
def test_its_limit_is_its_own(headroom: str) -> None:
    with Region("1G", block_size="64K", backend=Tmpfs(limit="4M"), headroom=headroom) as region:
        region.plug(0, 60)
        with pytest.raises(BackendExhaustedError) as caught:
            region.plug(100, 5)
        assert caught.value.cause is Cause.TMPFS_FULL
        assert region.plugged_blocks == 60
        assert region.plug(100, 4) == 4
        assert region.headroom().available == 0
        assert region.audit().ok


def test_without_privileges_it_is_made_in_a_user_namespace() -> None:
    def child() -> tuple[int, bool]:
        try:
            region = Region("64M", block_size="64K", backend=Tmpfs(limit="2M"))
        except UnsupportedError:
            return -1, False
        with region:
            region.plug(0, 4)
            return region.plugged_blocks, region.audit().ok

    plugged, ok = unprivileged(child).result()
    if plugged < 0:
        pytest.skip("needs user namespaces for everybody (refused)")
    assert (plugged, ok) == (4, True)


def test_where_it_cannot_be_had_the_reasons_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> int:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(tmpfs, "detached_file", refused)
    monkeypatch.setattr(tmpfs, "user_file", refused)
    with pytest.raises(UnsupportedError, match="Operation not permitted; nor in a user namespace"):
        Region("64M", backend=Tmpfs())


def test_a_file_that_cannot_grow_leaves_nothing(inject: Injector) -> None:
    before = accounting.open_descriptors()
    inject.call("ftruncate", errno=errno.EFBIG)
    with pytest.raises(OSError, match="File too large"):
        Region("64M", backend=Tmpfs())
    assert accounting.open_descriptors() == before


@pytest.mark.parametrize(
    "text", ["tmpfs", "tmpfs:limit=4194304", "tmpfs:huge=never,private", "tmpfs:thp=off,strategy=futex"]
)
def test_it_has_a_text_form(text: str) -> None:
    backend = from_text(text)
    assert isinstance(backend, Tmpfs)
    assert str(backend) == text


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"limit": 100}, ValueError),
        ({"limit": "4KB"}, ValueError),
        ({"huge": "yes"}, ValueError),
        ({"shared": 1}, TypeError),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        Tmpfs(**options)
