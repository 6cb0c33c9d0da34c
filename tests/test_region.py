"""The region's operations, against a plain model."""

from __future__ import annotations

import errno
import tempfile
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sparsemem import Anonymous, BlockState, BlockStateError, Memfd, Region, Simulated, ViewsAliveError
from sparsemem.backends import Backend
from tests.support.kinds import need_protection

BLOCK = 16 << 10
BLOCKS = 48


def test_facts() -> None:
    with Region("1G", block_size="2M", backend=Memfd()) as region:
        assert (region.size, region.block_size, region.nblocks, region.page_size) == (1 << 30, 2 << 20, 512, 4096)
        assert region.offset(3) == 6 << 20
        assert region.blocks(4 << 20, 2 << 20) == (2, 1)
        assert region.blocks(1, 4 << 20, "outward") == (0, 3)
        assert region.blocks(1, 4 << 20, "inward") == (1, 1)
        assert region.blocks(1, 5, "inward")[1] == 0
        assert region.fileno() >= 0
        assert region.backend == Memfd()
        assert region.fresh == "zero"


def test_states_and_runs() -> None:
    with Region("1M", block_size="64K", backend=Simulated()) as region:
        region.plug_runs([(6, 2), (0, 3)])
        assert list(region.plugged_runs()) == [(0, 3), (6, 2)]
        assert list(region.unplugged_runs()) == [(3, 3), (8, 8)]
        assert region.state(0, 3) is BlockState.PLUGGED
        assert region.state(3, 3) is BlockState.UNPLUGGED
        assert region.state(2, 2) is BlockState.MIXED
        assert region.is_plugged(7)
        assert not region.is_plugged(2, 2)


def test_strict_by_default_and_lenient_if_asked() -> None:
    with Region("1M", block_size="64K") as region:
        assert region.plug(0, 2) == 2
        with pytest.raises(BlockStateError):
            region.plug(1, 2)
        assert region.plug(1, 2, exist_ok=True) == 1
        assert region.plug(0, 3, exist_ok=True) == 0
        with pytest.raises(BlockStateError):
            region.unplug(2, 2)
        assert region.unplug(2, 2, missing_ok=True) == 1
        assert region.unplug(5, missing_ok=True) == 0
        assert region.plug_runs([]) == 0
        assert region.unplug_all() == 2


def test_exist_ok_keeps_the_content_of_what_was_plugged() -> None:
    with Region("1M", block_size="64K") as region:
        region.plug(1)
        region.view(1)[:4] = b"keep"
        region.plug(0, 4, exist_ok=True)
        assert bytes(region.view(1)[:4]) == b"keep"


def test_resize_takes_the_lowest_and_gives_the_highest() -> None:
    with Region("1M", block_size="64K", backend=Simulated()) as region:
        region.plug_runs([(2, 1), (9, 1)])
        assert region.resize("320K") == 3 * (64 << 10)
        assert list(region.plugged_runs()) == [(0, 4), (9, 1)]
        assert region.resize("128K") == -3 * (64 << 10)
        assert list(region.plugged_runs()) == [(0, 2)]
        assert region.resize("128K") == 0
        assert region.resize(0) == -2 * (64 << 10)
        assert region.resize("1M") == 1 << 20


def test_plug_fit() -> None:
    with Region("1M", block_size="64K", backend=Simulated()) as region:
        region.plug_runs([(1, 1), (6, 2)])
        assert region.plug_fit(2) == 2
        assert region.plug_fit(2, align=4) == 4
        assert region.plug_fit(1, fit="last") == 15
        assert region.plug_fit(1, fit="best") == 0
        assert region.plug_fit(8) is None
        assert list(region.plugged_runs()) == [(0, 8), (15, 1)]


def test_statistics_tell_what_was_done() -> None:
    with Region("1M", block_size="64K") as region:
        region.plug(0, 4)
        region.unplug(0)
        with pytest.raises(BlockStateError):
            region.plug(1)
        stats = region.stats()
        assert (stats.plugs, stats.plugged_bytes) == (1, 4 << 16)
        assert (stats.unplugs, stats.unplugged_bytes) == (1, 1 << 16)
        assert stats.plugged_size == 3 << 16
        assert stats.system_calls >= 2  # a fill in a place that is empty needs no discard first
        assert (stats.rollbacks, stats.tainted_size, stats.busy_size, stats.pending_size) == (0, 0, 0, 0)


class Model(RuleBasedStateMachine):
    """Drives a region and a dict of what each block holds, and compares after every step."""

    backend: Backend = Memfd()
    protection = "none"

    @initialize()
    def make(self) -> None:
        self.region = Region(BLOCKS * BLOCK, block_size=BLOCK, backend=self.backend, protection=self.protection)
        self.model: dict[int, int] = {}
        self.views: list[tuple[memoryview, range]] = []
        self.counter = 0

    runs = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 12)).map(lambda r: (r[0], min(r[1], BLOCKS - r[0])))
    many = st.lists(runs, min_size=1, max_size=4)

    def _write(self, blocks: Any) -> None:
        for block in blocks:
            self.counter = self.counter % 255 + 1
            self.model[block] = self.counter
            with self.region.view(block) as view:
                assert not any(view[::512]), "a fresh block reads zero"
                view[:] = bytes([self.counter]) * BLOCK

    @rule(run=runs, lenient=st.booleans())
    def plug(self, run: tuple[int, int], lenient: bool) -> None:
        wanted = set(range(run[0], sum(run)))
        if wanted & self.model.keys() and not lenient:
            with pytest.raises(BlockStateError):
                self.region.plug(*run)
            return
        new = sorted(wanted - self.model.keys())
        assert self.region.plug(*run, exist_ok=lenient) == len(new)
        self._write(new)

    @rule(runs=many)
    def plug_runs(self, runs: list[tuple[int, int]]) -> None:
        blocks = [block for first, count in runs for block in range(first, first + count)]
        if len(set(blocks)) < len(blocks) or set(blocks) & self.model.keys():
            with pytest.raises(ValueError, match=r"overlaps|already plugged"):
                self.region.plug_runs(runs)
            return
        assert self.region.plug_runs(runs) == len(blocks)
        self._write(sorted(blocks))

    @rule(run=runs, lenient=st.booleans())
    def unplug(self, run: tuple[int, int], lenient: bool) -> None:
        wanted = set(range(run[0], sum(run)))
        pinned = any(wanted & set(blocks) for _, blocks in self.views)
        if wanted - self.model.keys() and not lenient:
            with pytest.raises(BlockStateError):
                self.region.unplug(*run)
        elif pinned:
            with pytest.raises(ViewsAliveError):
                self.region.unplug(*run, missing_ok=lenient)
        else:
            gone = wanted & self.model.keys()
            assert self.region.unplug(*run, missing_ok=lenient) == len(gone)
            for block in gone:
                del self.model[block]

    @rule(count=st.integers(1, 6), align=st.sampled_from([1, 2, 4]), fit=st.sampled_from(["first", "last", "best"]))
    def plug_fit(self, count: int, align: int, fit: str) -> None:
        expected = self.region.find_unplugged(count, align=align, fit=fit)
        assert self.region.plug_fit(count, align=align, fit=fit) == expected
        if expected is not None:
            assert expected % align == 0
            self._write(range(expected, expected + count))

    @precondition(lambda self: self.protection == "none")
    @rule(run=runs)
    def stray_write(self, run: tuple[int, int]) -> None:
        """Into an unplugged block; the audit sees it, and a plug does not."""
        if run[0] not in self.model:
            with self.region.view() as whole:
                whole[run[0] * BLOCK + 5] = 9
            assert any(first <= run[0] < first + count for first, count in self.region.audit().leaks)
            self.region.plug(run[0])
            self._write([run[0]])

    @precondition(lambda self: self.protection != "none")
    @rule(block=st.integers(0, BLOCKS - 1), page=st.integers(0, BLOCK // 4096 - 1))
    def access(self, block: int, page: int) -> None:
        """In a system call, which is an error if the block is unplugged."""
        at = block * BLOCK + page * 4096
        with self.region.view() as whole, tempfile.TemporaryFile(buffering=0) as file:
            try:
                file.write(whole[at : at + 1])
            except OSError as error:
                assert error.errno == errno.EFAULT
                assert block not in self.model
            else:
                assert block in self.model

    @precondition(lambda self: self.model and len(self.views) < 4)
    @rule(data=st.data())
    def pin(self, data: Any) -> None:
        block = data.draw(st.sampled_from(sorted(self.model)))
        self.views.append((self.region.view(block), range(block, block + 1)))

    @precondition(lambda self: self.views)
    @rule()
    def let_go(self) -> None:
        self.views.pop()[0].release()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "model"):
            return
        plugged = {block for first, count in self.region.plugged_runs() for block in range(first, first + count)}
        assert plugged == self.model.keys()
        assert self.region.plugged_size == len(self.model) * BLOCK
        assert self.region.audit().ok
        for block, byte in self.model.items():
            with self.region.view(block) as view:
                assert view[0] == view[-1] == byte

    def teardown(self) -> None:
        if hasattr(self, "model"):
            for view, _ in self.views:
                view.release()
            self.region.close()


class AnonymousModel(Model):
    backend = Anonymous()


class PrivateModel(Model):
    backend = Memfd(shared=False)


@pytest.mark.parametrize("protection", ["none", "trap", "guard", "prot_none"])
@pytest.mark.promise("any-order-of-operations")
@pytest.mark.parametrize("model", [Model, AnonymousModel, PrivateModel])
def test_a_region_is_its_model(model: type[Model], protection: str) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    need_protection(protection)
    model = type(f"{model.__name__}-{protection}", (model,), {"protection": protection})
    run_state_machine_as_test(model, settings=settings(max_examples=40, stateful_step_count=30, deadline=None))
