"""Bad input gets an error that names the value and the rule, before anything has changed."""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemem import (
    Anonymous,
    BlockRangeError,
    BlockStateError,
    Budget,
    Cause,
    File,
    Memfd,
    PopulateError,
    Region,
    RegionClosedError,
    ReserveError,
    SparseMemError,
    UnsupportedError,
)
from sparsemem._sys import calls, lib
from sparsemem.backends import Fault, Simulated, from_text
from tests.support import accounting
from tests.support.children import unprivileged

NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "error", "names"),
    [
        (lambda: Region(0), ValueError, "size 0 is not positive"),
        (lambda: Region(-4096), ValueError, r"-4096.*0 <= size"),
        (lambda: Region(4097, block_size=4096), ValueError, "4097 is not a multiple of the block size 4K"),
        (lambda: Region("3M"), ValueError, "not a multiple of the block size 2M"),
        (lambda: Region(2**63), ValueError, "9223372036854775808.*2\\*\\*63"),
        (lambda: Region(2**64), ValueError, "out of range"),
        (lambda: Region(NAN), TypeError, "nan"),
        (lambda: Region(1.5), TypeError, "1.5"),
        (lambda: Region(None), TypeError, "None"),  # type: ignore[arg-type]
        (lambda: Region(True), TypeError, "True"),
        (lambda: Region("1TB"), ValueError, "'1TB' is ambiguous"),
        (lambda: Region("lots"), ValueError, "'lots' is not a size"),
        (lambda: Region(""), ValueError, "not a size"),
        (lambda: Region("1M", block_size=2048), ValueError, "2048 is less than the page size"),
        (lambda: Region("1M", block_size=4096 * 3), ValueError, "12288 is not a power of two"),
        (lambda: Region("1M", block_size=0), ValueError, "block_size 0"),
        (lambda: Region("1M", block_size="4KB"), ValueError, "ambiguous"),
        (lambda: Region("1M", block_size=NAN), TypeError, "nan"),
        (lambda: Region("2M", backend="memfd"), TypeError, "must be a Backend"),  # type: ignore[arg-type]
        (lambda: Region("2M", headroom="maybe"), ValueError, "'maybe' is none of 'check', 'off'"),
        (lambda: Region("2M", fork="yes"), ValueError, "'yes' is none of 'refuse', 'inherit'"),
        (lambda: Region("2M", name="a/b"), ValueError, "name 'a/b'"),
        (lambda: Region("2M", name=""), ValueError, "name ''"),
        (lambda: Region("2M", plugged=[(1, 1)]), BlockRangeError, r"run \(1, 1\).*0 to 0"),
        (lambda: Region("2M", block_size="64K", backend=Anonymous(thp=True)), ValueError, "thp=True needs blocks"),
        (lambda: Anonymous(strategy="magic"), ValueError, "strategy 'magic' is none of"),
        (lambda: Anonymous(hugetlb="3M"), UnsupportedError, "no huge pages of 3M"),
        (lambda: Anonymous(hugetlb="2MB"), ValueError, "ambiguous"),
        (lambda: File("x", existing="keep"), ValueError, "existing 'keep' is none of"),
        (lambda: File(), ValueError, "needs a path or fd="),
        (lambda: File("x", fd=1), ValueError, "not both"),
        (lambda: File(fd=1, delete=True), ValueError, "no name to remove"),
        (lambda: Region("2M", backend=File("/nonexistent/x")), ReserveError, "/nonexistent/x"),
        (lambda: Region("2M", backend=File("/tmp")), ReserveError, "/tmp"),
        (lambda: Region("2M", backend=File("/tmp", shared=False)), ReserveError, "directory"),
        (lambda: Region("2M", backend=Memfd(fd=9999)), ReserveError, "descriptor 9999"),
        (lambda: Region("2M", backend=Memfd(fd=-1)), ValueError, r"fd -1 is out of range: 0 <= fd < 2\*\*31"),
        (lambda: Region("2M", backend=Memfd(fd=2**31)), ValueError, "fd 2147483648 is out of range"),
        (lambda: Region("2M", backend=File(fd=2**63)), ValueError, "fd 9223372036854775808 is out of range"),
        (lambda: Region("2M", backend=File(fd=True)), TypeError, "fd must be an integer, not True"),
        (lambda: Region("2M", backend=File(fd="x")), TypeError, "fd must be an integer, not 'x'"),  # type: ignore[arg-type]
        (lambda: Budget("1GB"), ValueError, "ambiguous"),
        (lambda: Fault("flush"), ValueError, "'flush'"),
        (lambda: Fault("populate", nth=0), ValueError, "nth=0"),
        (lambda: Simulated(page_size=3000), ValueError, "3000 is not a power of two"),
    ],
)
def test_a_region_that_cannot_be(make: Callable[[], Any], error: type[Exception], names: str) -> None:
    before = accounting.open_descriptors()
    with pytest.raises(error, match=names):
        make()
    assert accounting.open_descriptors() == before


OPERATIONS: dict[str, Callable[[Region, Any, Any], Any]] = {
    "plug": lambda region, first, count: region.plug(first, count),
    "unplug": lambda region, first, count: region.unplug(first, count),
    "plug_runs": lambda region, first, count: region.plug_runs([(first, count)]),
    "unplug_runs": lambda region, first, count: region.unplug_runs([(first, count)]),
    "view": lambda region, first, count: region.view(first, count),
    "state": lambda region, first, count: region.state(first, count),
    "is_plugged": lambda region, first, count: region.is_plugged(first, count),
}
NUMBERS = [
    (0, 0, BlockRangeError, "0"),
    (0, -1, BlockRangeError, "-1"),
    (-1, 1, BlockRangeError, "-1"),
    (16, 1, BlockRangeError, "16"),
    (0, 17, BlockRangeError, "16|17"),
    (15, 2, BlockRangeError, "16|15"),
    (0, 2**63, BlockRangeError, "9223372036854775"),
    (2**63, 1, BlockRangeError, "9223372036854775808"),
    (2**64 - 1, 2, BlockRangeError, "1844674407370955"),
    (2**64, 1, BlockRangeError, "18446744073709551616"),
    (1, 2**64 - 1, BlockRangeError, "1844674407370955|18446744073709551615"),
    (NAN, 1, TypeError, "nan|pairs"),
    (0, 1.0, TypeError, "1.0|pairs"),
    ("0", 1, TypeError, "'0'|pairs"),
]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("first", "count", "error", "names"), NUMBERS)
def test_blocks_that_there_are_not(operation: str, first: Any, count: Any, error: type[Exception], names: str) -> None:
    with Region("1M", block_size="64K", backend=Memfd()) as region:
        region.plug(3)
        with pytest.raises(error, match=names) as caught:
            OPERATIONS[operation](region, first, count)
        assert not isinstance(caught.value, SparseMemError) or isinstance(caught.value, ValueError)
        assert list(region.plugged_runs()) == [(3, 1)]
        assert accounting.allocated_bytes(region.fileno()) == 64 << 10


@pytest.mark.parametrize(
    ("runs", "error", "names"),
    [
        ([(0, 4), (3, 2)], BlockRangeError, r"run \(3, 2\) overlaps"),
        ([(5, 1), (5, 1)], BlockRangeError, "overlaps"),
        ([(8, 2), (0, 9)], BlockRangeError, "overlaps"),
        ([(0, 1), (2, 0)], BlockRangeError, r"run \(2, 0\).*not positive"),
        ([(0, 1), (2, -1)], BlockRangeError, r"run \(2, -1\)"),
        ([(0, 1, 2)], TypeError, "pairs"),
        ([(0, 1, 2), (3,)], TypeError, "pairs"),
        ([0, 1], TypeError, "pairs"),
        (["ab"], TypeError, "pairs"),
        ([(0, None)], TypeError, "pairs"),
        (7, TypeError, "int"),
        (np.zeros((2, 2), dtype=np.int32), TypeError, "uint64"),
        (np.zeros((2, 3), dtype=np.uint64), TypeError, r"shape \(2, 3\)"),
        (np.zeros((4, 4), dtype=np.uint64)[:, :2], TypeError, "C-contiguous"),
        (np.array([[0, 2], [1, 1]], dtype=np.uint64), BlockRangeError, "overlaps"),
        (array("Q", [0, 1]), TypeError, "shape"),
        (5, TypeError, r"runs must be pairs \(first, count\) of integers, not 5"),
        (None, TypeError, "not None"),
    ],
)
@pytest.mark.parametrize("operation", ["plug_runs", "unplug_runs"])
def test_runs_that_are_none(operation: str, runs: Any, error: type[Exception], names: str) -> None:
    with Region("1M", block_size="64K") as region:
        region.plug(15)
        with pytest.raises(error, match=names):
            getattr(region, operation)(runs)
        assert list(region.plugged_runs()) == [(15, 1)]


@pytest.mark.parametrize("first", ["a", None, 1.5, True])
def test_a_scrub_from_a_block_that_is_none(first: Any) -> None:
    with Region("1M", block_size="64K") as region, pytest.raises(TypeError, match="first block must be an integer"):
        region.scrub(first)


@pytest.mark.promise("unplug-says-what-happened")
@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (lambda r: r.plug(3), BlockStateError, "block 3 is already plugged"),
        (lambda r: r.plug(0, 8), BlockStateError, "block 3"),
        (lambda r: r.unplug(4), BlockStateError, "block 4 is not plugged"),
        (lambda r: r.unplug_runs([(3, 1), (9, 1)]), BlockStateError, "block 9"),
        (lambda r: r.view(2, 2), BlockStateError, "block 2"),
        (lambda r: r.discard(0, 4096), BlockStateError, "block 0 is not plugged"),
        (lambda r: r.populate(0, 4096), BlockStateError, "block 0"),
        (lambda r: r.discard(3 << 16, 100), BlockRangeError, "not whole pages"),
        (lambda r: r.discard((3 << 16) + 1, 4096), BlockRangeError, "not whole pages"),
        (lambda r: r.discard(3 << 16, 0), BlockRangeError, "not positive"),
        (lambda r: r.discard(1 << 20, 4096), BlockRangeError, "not all within"),
        (lambda r: r.resize(100), ValueError, "100 is not a multiple"),
        (lambda r: r.resize("2M"), ValueError, "more than the region's size"),
        (lambda r: r.resize(-1), ValueError, "-1"),
        (lambda r: r.plug_fit(0), BlockRangeError, "count 0"),
        (lambda r: r.plug_fit(1, align=0), BlockRangeError, "align 0"),
        (lambda r: r.plug_fit(1, fit="worst"), ValueError, "'worst' is none of"),
        (lambda r: r.find_unplugged(2**64), BlockRangeError, "out of range"),
        (lambda r: r.find_unplugged(1, fit="worst"), ValueError, "'worst'"),
        (lambda r: r.blocks(1, 4096), BlockRangeError, "not whole blocks"),
        (lambda r: r.blocks(0, 65536, "up"), ValueError, "'up'"),
        (lambda r: r.offset(16), BlockRangeError, "16"),
        (lambda r: r.bitmap.__setitem__(0, 1), TypeError, "read-only"),
    ],
)
def test_operations_that_do_not_fit_the_state(
    call: Callable[[Region], Any], error: type[Exception], names: str
) -> None:
    with Region("1M", block_size="64K", backend=Memfd()) as region:
        region.plug(3)
        with pytest.raises(error, match=names):
            call(region)
        assert list(region.plugged_runs()) == [(3, 1)]
        assert accounting.allocated_bytes(region.fileno()) == 64 << 10


def test_a_closed_region_answers_facts_and_refuses_operations() -> None:
    region = Region("1M", block_size="64K", backend=Memfd())
    region.plug(0, 2)
    region.close()
    region.close()
    assert region.closed
    assert (region.size, region.block_size, region.nblocks, region.page_size) == (1 << 20, 1 << 16, 16, 4096)
    assert region.plugged_size == 2 << 16
    assert list(region.plugged_runs()) == [(0, 2)]
    assert "closed" in repr(region)
    for operation in (
        lambda: region.plug(3),
        lambda: region.unplug(0),
        lambda: region.view(0),
        region.view,
        lambda: region.discard(0, 4096),
        region.audit,
        region.headroom,
        region.fileno,
        lambda: region.address,
        region.scrub,
        lambda: region.plug_fit(1),
        region.unplug_all,
        lambda: region.resize(0),
        lambda: region.resize("128K"),
        lambda: region.plug_runs([]),
        lambda: region.unplug_runs([]),
        lambda: region.add_listener(object()),  # type: ignore[arg-type]
        region.__enter__,
    ):
        with pytest.raises(RegionClosedError, match="closed"):
            operation()


def test_a_read_only_descriptor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(ReserveError, match="not open for reading and writing") as caught:
            Region("2M", backend=File(fd=fd))
        assert caught.value.errno == errno.EACCES
        assert path.stat().st_size == 0
    finally:
        os.close(fd)


def test_a_read_only_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    path.chmod(0o444)

    def attempt() -> int | None:
        with pytest.raises(ReserveError, match=r"file|path") as caught:
            Region("2M", backend=File(str(path)))
        return caught.value.errno

    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and str(folder) not in ("/", "/tmp"):
            folder.chmod(0o755)
    assert unprivileged(attempt).result() == errno.EACCES


@pytest.mark.parametrize("seal", ["F_SEAL_WRITE", "F_SEAL_FUTURE_WRITE"])
def test_a_sealed_memfd_that_cannot_be_punched_is_refused(seal: str) -> None:
    fd = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 2 << 20)
        calls.kernel.add_seals(fd, getattr(lib, seal))
        with pytest.raises(ReserveError, match="sealed against writing") as caught:
            Region("2M", backend=Memfd(fd=fd))
        assert caught.value.errno == errno.EPERM
    finally:
        os.close(fd)


def test_a_memfd_sealed_against_growing_is_refused_if_it_is_too_small() -> None:
    fd = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        calls.kernel.add_seals(fd, lib.F_SEAL_GROW)
        with pytest.raises(ReserveError, match="F_SEAL_GROW"):
            Region("2M", backend=Memfd(fd=fd))
    finally:
        os.close(fd)


@pytest.mark.promise("private-to-its-user")
def test_a_symbolic_link_is_only_followed_if_asked(tmp_path: Path) -> None:
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(ReserveError, match="follow_symlinks=True"):
        Region("2M", backend=File(tmp_path / "link"))
    Region("2M", backend=File(tmp_path / "link", follow_symlinks=True)).close()


def test_a_template_that_is_too_small_is_refused_and_not_extended(tmp_path: Path) -> None:
    path = tmp_path / "template"
    path.write_bytes(b"x" * 5000)
    with pytest.raises(ReserveError, match="never extended"):
        Region("2M", backend=File(path, shared=False))
    assert path.stat().st_size == 5000


@pytest.mark.promise("existing-data-is-safe")
@pytest.mark.parametrize("where", ["memfd", "disk"])
def test_a_file_that_holds_data_is_refused_adopted_or_discarded(where: str, tmp_path: Path) -> None:
    fd = (
        os.memfd_create("data")
        if where == "memfd"
        else os.open(tmp_path / "data", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    )
    try:
        os.ftruncate(fd, 1 << 20)
        os.pwrite(fd, b"precious", 5 << 16)
        with pytest.raises(ReserveError, match=f"at offset {5 << 16}") as caught:
            Region("1M", block_size="64K", backend=File(fd=fd))
        assert caught.value.errno == errno.EEXIST
        assert os.pread(fd, 8, 5 << 16) == b"precious"
        with Region("1M", block_size="64K", backend=File(fd=fd, existing="adopt")) as region:
            assert list(region.plugged_runs()) == [(5, 1)]
            assert region.view(5)[:8] == b"precious"
        with Region("1M", block_size="64K", backend=File(fd=fd), plugged=[(5, 1)]) as region:
            assert region.view(5)[:8] == b"precious"
        with Region("1M", block_size="64K", backend=File(fd=fd, existing="discard")) as region:
            assert region.plugged_size == 0
        assert os.pread(fd, 8, 5 << 16) == bytes(8)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("floppy", "'floppy' is none of"),
        ("memfd:colour=red", "no option 'colour'"),
        ("memfd:private=maybe", "private is on or off"),
        ("memfd:hugetlb=2MB", "ambiguous"),
        ("memfd:private,private", "given twice"),
        ("memfd:,", "empty"),
        ("memfd:fd=x", "not a number"),
        ("memfd:fd", "fd=True is not a number"),
        ("file:path", "path=name"),
        ("file:/x,path=y", "no option 'path'"),
        ("memfd:path=y", "no option 'path'"),
        ("file", "needs a path"),
        ("simulated:capacity=1TB", "ambiguous"),
    ],
)
def test_text_that_names_no_backend(text: str, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        from_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "anonymous",
        "anonymous:shared",
        "anonymous:thp=off",
        "anonymous:thp,strategy=futex",
        "memfd",
        "memfd:private,seal=off",
        "memfd:existing=adopt",
        "file:/dev/shm/x",
        "file:/dev/shm/x,private,existing=adopt,delete",
        "secret",
        "simulated:capacity=1P",
        "simulated:page_size=64K",
        "file:path=x",
        "file:path=on,private",
        "file:./x=y",
        "file:/a\\,b,private",
        "file:/a\\\\b",
    ],
)
def test_the_text_form_goes_both_ways(text: str) -> None:
    backend = from_text(text)
    assert str(backend) == text
    assert from_text(str(backend)) == backend


@given(st.text(st.characters(exclude_characters="\0"), min_size=1), st.booleans(), st.booleans())
def test_any_path_survives_the_text_form(path: str, shared: bool, delete: bool) -> None:
    backend = File(path, shared=shared, delete=delete)
    assert from_text(str(backend)) == backend


def test_a_path_may_be_bytes() -> None:
    assert File(b"/a\xff").path == os.fsdecode(b"/a\xff")
    assert from_text(str(File(b"/a\xff"))) == File(b"/a\xff")


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Anonymous(shared="no"), "shared must be True or False, not 'no'"),
        (lambda: Anonymous(thp="always"), "thp must be True, False or None, not 'always'"),
        (lambda: Memfd(seal=3), "seal must be True or False, not 3"),
        (lambda: Memfd(shared=None), "shared must be True or False, not None"),
        (lambda: File("x", delete="no"), "delete must be True or False, not 'no'"),
        (lambda: File("x", follow_symlinks=1), "follow_symlinks must be True or False, not 1"),
        (lambda: Region("2M", dump="yes"), "dump must be True or False, not 'yes'"),
    ],
)
def test_what_is_on_or_off_is_a_bool(make: Callable[[], object], names: str) -> None:
    with pytest.raises(TypeError, match=names):
        make()


def test_a_simulated_capacity_is_a_limit_from_the_start() -> None:
    with pytest.raises(ReserveError, match="plugged=128K is more than the capacity of 100K"):
        Region("1M", block_size="64K", backend=Simulated(capacity="100K"), plugged=[(0, 2)])
    with Region("1M", block_size="64K", backend=Simulated(capacity=100_001), headroom="off") as region:
        region.plug(0)
        with pytest.raises(PopulateError) as caught:
            region.plug(1)
        assert caught.value.cause is Cause.CAPACITY
    with Region("64M", block_size="16M", backend=Simulated(page_size="8M")) as region:
        assert region.plug(0, 2) == 2
        assert region.stats().system_calls == 4
