"""`cold` and `pageout`: the blocks stay plugged and keep their content, wherever that is."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsemem import (
    AdviceError,
    Anonymous,
    BlockRangeError,
    BlockStateError,
    File,
    Memfd,
    Region,
    RegionClosedError,
    Secret,
    Simulated,
    UnsupportedError,
)
from sparsemem._sys import lib
from sparsemem.backends import Backend
from sparsemem.recipes import Step
from tests.support import accounting
from tests.support.children import run_child
from tests.support.injector import Injector
from tests.support.kinds import Made, every_kind_once, need_disk
from tests.support.resources import need_root
from tests.test_faults import MADVISE, Told, number
from tests.test_interrupts import interrupted

BLOCK = 64 << 10
ADVICE = ["cold", "pageout"]
STEPS = {"cold": Step.COLD, "pageout": Step.PAGEOUT}
NUMBERS = {"cold": lib.MADV_COLD, "pageout": lib.MADV_PAGEOUT}
MCL_CURRENT, MCL_ONFAULT = 1, 4

every_advice = pytest.mark.parametrize("advice", ADVICE)


def fill(region: Region, first: int, count: int) -> bytes:
    pattern = os.urandom(4096) * (count * region.block_size // 4096)
    with region.view(first, count) as view:
        view[:] = pattern
    return pattern


def content(region: Region, first: int, count: int) -> bytes:
    with region.view(first, count) as view:
        return bytes(view)


@every_advice
@every_kind_once
def test_it_is_no_unplug(advice: str, made: Made) -> None:
    with made.region() as region:
        region.plug(1, 3)
        if made.kind.huge or not made.kind.has_memory or not made.kind.discards:
            with pytest.raises(UnsupportedError, match=f"cannot {advice}: .*(hugetlb|secret|has no pages)"):
                getattr(region, advice)(1)
            return
        told = Told()
        region.add_listener(told)
        pattern = fill(region, 1, 3)
        with region.view(1, 1):  # a view does not hinder it
            assert getattr(region, advice)(1, 2) is None
            getattr(region, advice)(3)
        assert list(region.plugged_runs()) == [(1, 3)]
        assert told.blocks == {1, 2, 3}
        assert region.audit().ok
        assert content(region, 1, 3) == pattern
        stats = region.stats()
        assert (stats.unplugs, stats.failures, stats.busy_size) == (0, 0, 0)
        assert region.unplug_all() == 3


@every_advice
@pytest.mark.parametrize(
    ("first", "count", "error"),
    [
        (0, 1, BlockStateError),
        (1, 4, BlockStateError),
        (4, 1, BlockStateError),
        (0, 0, BlockRangeError),
        (-1, 1, BlockRangeError),
        (15, 2, BlockRangeError),
        (2**64, 1, BlockRangeError),
        (1.0, 1, TypeError),
        (1, "1", TypeError),
    ],
)
def test_blocks_that_will_not_do(advice: str, first: Any, count: Any, error: type[Exception], inject: Injector) -> None:
    with Region("1M", block_size=BLOCK) as region:
        region.plug(1, 3)
        getattr(region, advice)(1)  # the probe has been
        inject.made.clear()
        inject.step(STEPS[advice], errno=errno.EIO)  # is never come to
        with pytest.raises(error):
            getattr(region, advice)(first, count)
        assert "madvise" not in inject.made
        assert list(region.plugged_runs()) == [(1, 3)]
        assert region.stats().busy_size == 0


@every_advice
def test_tainted_blocks_and_closed_regions_are_refused(advice: str, inject: Injector) -> None:
    region = Region("1M", block_size=BLOCK)
    region.plug(1, 3)
    inject.step(Step.DONTNEED, errno=errno.EIO)
    with pytest.raises(OSError, match="cannot discard"):
        region.unplug(2)
    with pytest.raises(BlockStateError, match="block 2 is tainted"):
        getattr(region, advice)(1, 3)
    region.close()
    with pytest.raises(RegionClosedError):
        getattr(region, advice)(1)


@every_advice
@pytest.mark.parametrize("code", MADVISE)
@pytest.mark.parametrize("backend", [Anonymous(), Memfd()], ids=str)
def test_what_the_kernel_refuses(advice: str, code: str, backend: Backend, inject: Injector) -> None:
    with Region("64M", block_size="4M", backend=backend) as region:
        region.plug(0, 4)
        pattern = fill(region, 0, 4)
        inject.step(STEPS[advice], errno=number(code), nth=4, after=4096)
        with pytest.raises(AdviceError, match=f"cannot {advice} block 1") as caught:
            getattr(region, advice)(0, 4)
        assert caught.value.errno == number(code)
        assert list(region.plugged_runs()) == [(0, 4)]
        assert not list(region.tainted_runs())
        stats = region.stats()
        assert (stats.busy_size, stats.failures) == (0, 1)
        assert content(region, 0, 4) == pattern
        getattr(region, advice)(0, 4)
        assert region.audit().ok


@every_advice
@pytest.mark.parametrize("code", ["EINVAL", "ENOSYS", "EPERM"])
def test_a_kernel_without_it(advice: str, code: str, inject: Injector) -> None:
    inject.call("madvise", errno=number(code), when=lambda _a, _l, given: given == NUMBERS[advice])
    with Region("64M") as region:
        region.plug(0)
        for _ in range(2):  # tried once
            with pytest.raises(UnsupportedError, match=f"no MADV_{advice.upper()}"):
                getattr(region, advice)(0)
        other = next(each for each in ADVICE if each != advice)
        getattr(region, other)(0)


@every_advice
def test_a_number_that_means_something_else_is_not_used(advice: str, inject: Injector, monkeypatch: Any) -> None:
    """Vendors' kernels have used numbers of their own: one that throws content away is found out on a page of ours."""
    real = inject.madvise
    meant = {NUMBERS[advice]: lib.MADV_DONTNEED}
    monkeypatch.setattr(inject, "madvise", lambda a, n, advice: real(a, n, meant.get(advice, advice)), raising=False)
    with Region("64M") as region:
        region.plug(0)
        with pytest.raises(UnsupportedError, match=f"no MADV_{advice.upper()}"):
            getattr(region, advice)(0)


@every_advice
def test_locked_memory_is_not_advised(advice: str) -> None:
    need_root("to lock memory without a limit")

    def child() -> tuple[int | None, bool]:
        with Region("64M", block_size=BLOCK) as region:
            region.plug(0, 4)
            pattern = fill(region, 0, 4)
            ctypes.CDLL(None).mlockall(MCL_CURRENT | MCL_ONFAULT)
            with pytest.raises(AdviceError, match="locked memory") as caught:
                getattr(region, advice)(0, 4)
            return caught.value.errno, content(region, 0, 4) == pattern

    assert run_child(child).result() == (errno.EINVAL, True)


@every_advice
@pytest.mark.parametrize("backend", [Secret(), Simulated()], ids=str)
def test_where_there_are_no_pages_to_advise(advice: str, backend: Backend) -> None:
    try:
        region = Region("1M", block_size=BLOCK, backend=backend)
    except UnsupportedError as error:
        pytest.skip(f"needs memfd_secret ({error})")
    with region, pytest.raises(UnsupportedError, match=r"no pages|secret"):
        getattr(region, advice)(0)


# ---- where the content is -----------------------------------------------------------------------


@pytest.fixture
def swap(tmp_path: Path) -> Iterator[None]:
    """64 MiB to swap to, in a file."""
    need_root("to switch swap on")
    need_disk(tmp_path)
    file = tmp_path / "swap"
    file.touch(0o600)
    with file.open("r+b") as opened:
        os.posix_fallocate(opened.fileno(), 0, 64 << 20)
    environment = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    for command in ("mkswap", "swapon"):
        try:
            done = subprocess.run([command, file], capture_output=True, text=True, check=False, env=environment)
        except FileNotFoundError as error:
            pytest.skip(f"needs mkswap and swapon ({error})")
        if done.returncode:
            pytest.skip(f"needs a file system that can be swapped to ({done.stderr.strip()})")
    yield
    subprocess.run(["swapoff", file], check=True, env=environment)


@pytest.mark.parametrize("backend", [Anonymous(), Anonymous(thp=False), Memfd(), Memfd(shared=False)], ids=str)
def test_paged_out_blocks_are_plugged_and_come_back(backend: Backend, swap: None) -> None:
    with Region("1G", block_size="2M", backend=backend) as region:
        region.plug(0, 4)
        pattern = fill(region, 0, 4)
        with open("/proc/swaps") as file:
            assert len(file.readlines()) > 1
        region.pageout(1, 2)
        areas = accounting.smaps(region.address, region.size)
        assert areas["Rss"] <= 5 << 20, "about two of four blocks are still in memory"
        assert region.is_plugged(0, 4)
        audit = region.audit()
        assert audit.ok, "what is swapped is there"
        assert audit.resident_size == 8 << 20
        assert content(region, 0, 4) == pattern
        region.pageout(0, 4)
        region.unplug(0, 4)
        assert region.audit().ok
        region.plug(0)
        assert not any(content(region, 0, 1)), "nothing comes back of what was unplugged"


def test_a_files_pages_go_back_to_the_file(tmp_path: Path) -> None:
    need_disk(tmp_path)
    with Region("64M", block_size=BLOCK, backend=File(tmp_path / "file")) as region:
        region.plug(0, 8)
        pattern = fill(region, 0, 8)
        os.fsync(region.fileno())  # what is dirty stays until it is written
        region.pageout(2, 4)
        assert accounting.smaps(region.address, region.size)["Rss"] <= 5 * BLOCK
        assert region.audit().ok
        assert content(region, 0, 8) == pattern


def test_without_swap_anonymous_memory_stays() -> None:
    if len(Path("/proc/swaps").read_text().splitlines()) > 1:
        pytest.skip("needs a machine without swap")
    with Region("64M", block_size=BLOCK) as region:
        region.plug(0, 8)
        region.pageout(0, 8)
        assert accounting.smaps(region.address, region.size)["Rss"] == 8 * BLOCK


# ---- interrupts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("advice", [*ADVICE, "collapse"])
@pytest.mark.parametrize("event", ["line", "opcode"])
def test_an_interrupt_anywhere_leaves_nothing_held(advice: str, event: str) -> None:
    with Region("64M", block_size="2M", backend=Anonymous(strategy="populate_write")) as region:
        region.plug(0, 4)
        pattern = fill(region, 0, 4)
        try:
            getattr(region, advice)(0)  # the probe has been
        except UnsupportedError as error:
            pytest.skip(f"needs MADV_{advice.upper()} ({error})")
        n, came = 0, True
        # Python 3.12 traces opcodes only of code that was traced before.
        assert not interrupted(lambda: getattr(region, advice)(0, 4), 1 << 30, event)
        while came:
            n += 1
            came = interrupted(lambda: getattr(region, advice)(0, 4), n, event)
            counts = region._core.blocks.counts()
            assert (counts.claims, counts.busy, counts.pins) == (0, 0, 0), f"event {n}"
            assert (counts.plugged, counts.tainted) == (4, 0), f"event {n}"
        assert n > 10
        assert content(region, 0, 4) == pattern
        assert region.audit().ok
