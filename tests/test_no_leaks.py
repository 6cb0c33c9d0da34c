"""A great many of everything: descriptors, mappings, resident memory and objects stay what they were."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparsemem import Anonymous, Memfd, Region, Simulated
from tests.support import accounting
from tests.support.children import run_child
from tests.support.evidence import Cases

BLOCK = 4096
REGIONS = int(os.environ.get("SPARSEMEM_LEAK_REGIONS", "100000"))
PAIRS = int(os.environ.get("SPARSEMEM_LEAK_PAIRS", "1000000"))

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Figures:
    """What a process has."""

    descriptors: int
    mappings: int
    resident: int
    objects: int

    @classmethod
    def now(cls) -> Figures:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(len(accounting.open_descriptors()), accounting.vma_count(), pages * 4096, len(gc.get_objects()))


def measured(often: Callable[[int], None], number: int) -> tuple[Figures, Figures]:
    """Before, when all caches are warm, and after."""

    def child() -> tuple[Figures, Figures]:
        often(max(2000, number // 50))
        Figures.now()
        before = Figures.now()
        often(number)
        return before, Figures.now()

    before, after = run_child(child, timeout=280).result()
    return before, after


def flat(what: str, before: Figures, after: Figures, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{what}: {before} -> {after}")
    assert after.descriptors == before.descriptors
    assert abs(after.mappings - before.mappings) <= 4, "the interpreter's own arenas come and go"
    assert after.resident - before.resident < 4 << 20
    assert after.objects - before.objects < 100


@pytest.mark.promise("no-leaks")
@pytest.mark.timeout(300)
def test_regions_opened_and_closed(capsys: pytest.CaptureFixture[str], cases: Cases) -> None:
    backends = [Anonymous(), Anonymous(shared=True), Memfd(), Memfd(shared=False), Simulated()]

    def often(number: int) -> None:
        for i in range(number):
            with Region("16M", block_size=BLOCK, backend=backends[i % len(backends)]) as region:
                if i % 8 == 0:
                    region.plug(0, 2)

    before, after = measured(often, REGIONS)
    flat(f"{REGIONS} regions", before, after, capsys)
    cases.add(REGIONS)


@pytest.mark.promise("no-leaks")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", [Anonymous(), Memfd()], ids=str)
def test_pairs_of_plug_and_unplug(backend: Anonymous | Memfd, capsys: pytest.CaptureFixture[str], cases: Cases) -> None:
    """Most go the short way, every hundredth the long one, with a listener, a view and pages given back."""

    class Listener:
        def on_plug(self, first: int, count: int) -> None: ...
        def on_unplug(self, first: int, count: int) -> None: ...

    def often(number: int) -> None:
        with Region("16M", block_size=BLOCK, backend=backend) as region:
            for i in range(number):
                block = i % 4096
                region.plug(block)
                if i % 100 == 0:
                    region.view(block)[0] = 1
                    region.discard(block * BLOCK, BLOCK)
                    listener = Listener()
                    region.add_listener(listener)
                    region.unplug(block)
                    region.plug(block)
                    region.remove_listener(listener)
                region.unplug(block)
            assert region.audit().resident_size == 0

    before, after = measured(often, PAIRS // 2)
    flat(f"{PAIRS // 2} pairs of plug and unplug, {backend}", before, after, capsys)
    cases.add(PAIRS // 2)
