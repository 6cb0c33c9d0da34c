"""Whatever bytes a driver sends: an answer or a GuestError, and no byte lost that it did not give away."""

from __future__ import annotations

import contextlib
import os
import random
import struct
from collections.abc import Callable, Iterator

import pytest

from sparsemem import Memfd, Region
from sparsemem.virtio import Element, GuestError, GuestMemory, RegionRange, VirtioBalloon, VirtioMem
from sparsemem.virtio.wire import (
    BalloonConfig,
    GuestStats,
    MemAnswer,
    MemOperation,
    MemRequest,
    MemResponse,
    pack_command,
    pack_frames,
)
from tests.virtio.driving import ROOM

CASES = int(os.environ.get("SPARSEMEM_FUZZ_CASES", "4000"))

PAGE = 4096
BLOCK = 64 << 10
NBLOCKS = 32
ADDRESS = 0x1_0000_0000
ACK, BUSY = MemAnswer.ACK, MemAnswer.BUSY

# Numbers at which arithmetic goes wrong, among those that mean something.
EDGES = [0, 1, 2, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - PAGE, 2**64 - 1]


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A message with some of it changed, cut off, or said twice."""
    changed = bytearray(data)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
        what = rng.randrange(6)
        at = rng.randrange(len(changed) + 1)
        if what == 0 and changed:
            changed[at % len(changed)] ^= 1 << rng.randrange(8)
        elif what == 1:
            changed[at:at] = rng.randbytes(rng.randrange(9))
        elif what == 2:
            del changed[at : at + rng.randrange(9)]
        elif what == 3:
            width = rng.choice("HIQ")
            number = rng.choice(EDGES) & ((1 << 8 * struct.calcsize(width)) - 1)
            changed[at : at + struct.calcsize(width)] = struct.pack(f"<{width}", number)
        elif what == 4:
            changed += changed[: rng.randrange(64)]
        else:
            del changed[rng.randrange(len(changed) + 1) :]
    return bytes(changed)


def room(rng: random.Random, span: int) -> tuple[tuple[int, int], ...]:
    """Buffers, most of them somewhere sensible."""
    if rng.random() < 0.5:
        return ROOM
    return tuple(
        (
            rng.choice((rng.randrange(0, span), rng.choice(EDGES))),
            rng.choice((rng.randrange(0, 9), PAGE, rng.randrange(span), rng.choice(EDGES))),
        )
        for _ in range(rng.randrange(4))
    )


# ---- virtio-mem -----------------------------------------------------------------------------------------------------


class MemUnderFire:
    """A device, and a model that believes its answers."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.device = VirtioMem(region, address=ADDRESS, usable="all")
        self.plugged: dict[int, int] = {}

    def send(self, rng: random.Random) -> None:
        seed = MemRequest(
            rng.choice(list(MemOperation)),
            ADDRESS + rng.randrange(-1, NBLOCKS + 1) * BLOCK + rng.choice((0, 0, 0, 1)),
            rng.randrange(8),
        )
        data, queue = mutated(rng, seed.pack()), rng.choice((0, 0, 0, 0, 1, -1))
        if rng.random() < 0.02:
            self.device.requested_size = rng.randrange(NBLOCKS + 1) * BLOCK
        if rng.random() < 0.02:
            self.device.reset()
        before = list(self.region.plugged_runs())
        try:
            answer = MemResponse.unpack(self.device.handle(queue, Element(data, room(rng, 1 << 20))))
        except GuestError:
            assert list(self.region.plugged_runs()) == before
            return
        request = MemRequest.unpack(data)
        assert answer.answer is not BUSY  # nothing fails here
        if answer.answer is ACK:
            self.believe(request, rng)
        else:
            assert list(self.region.plugged_runs()) == before

    def believe(self, request: MemRequest, rng: random.Random) -> None:
        first = (request.address - ADDRESS) // BLOCK
        if request.operation is MemOperation.UNPLUG_ALL:
            self.plugged.clear()
        elif request.operation is MemOperation.PLUG:
            for block in range(first, first + request.count):
                self.plugged[block] = stamp = rng.randrange(1, 256)
                self.region.view(block)[7:8] = bytes([stamp])
        elif request.operation is MemOperation.UNPLUG:
            for block in range(first, first + request.count):
                del self.plugged[block]

    def check(self) -> None:
        there = [block for first, count in self.region.plugged_runs() for block in range(first, first + count)]
        assert there == sorted(self.plugged)
        for block, stamp in self.plugged.items():
            assert self.region.view(block)[7] == stamp
        assert self.region.audit().ok


@pytest.fixture
def region() -> Iterator[Region]:
    with Region(NBLOCKS * BLOCK, block_size=BLOCK, backend=Memfd()) as region:
        yield region


@pytest.mark.promise("hostile-guest-is-contained")
def test_virtio_mem_under_fire(region: Region) -> None:
    under_fire, rng = MemUnderFire(region), random.Random(1)
    for case in range(CASES):
        under_fire.send(rng)
        if case % 16 == 0:
            under_fire.check()
    under_fire.check()
    answers = {answer for _, answer in under_fire.device.answers}
    assert answers == {MemAnswer.ACK, MemAnswer.NACK, MemAnswer.ERROR}  # it got past the headers


# ---- virtio-balloon -------------------------------------------------------------------------------------------------


class BalloonUnderFire:
    """A balloon over two ranges with a hole between, every page of which says which it is."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.half = region.size // 2
        memory = GuestMemory(
            [RegionRange(0, self.half, region), RegionRange(ADDRESS, region.size - self.half, region, self.half)]
        )
        self.device = VirtioBalloon(memory)
        self.device.negotiate(self.device.features)
        region.plug(0, region.nblocks)
        self.pages = region.size // PAGE
        self.lost: set[int] = set()
        for page in range(self.pages):
            self.stamp(page)

    def stamp(self, page: int) -> None:
        at = page * PAGE
        self.region.view()[at : at + 4] = struct.pack("<I", page + 1)

    def page_of(self, address: int) -> int | None:
        """The page of the region, or None."""
        if address < self.half:
            return address // PAGE
        if ADDRESS <= address < ADDRESS + self.region.size - self.half:
            return (address - ADDRESS + self.half) // PAGE
        return None

    def frame(self, rng: random.Random) -> int:
        page = rng.randrange(self.pages)
        return page if page * PAGE < self.half else ADDRESS // PAGE + page - self.half // PAGE

    def send(self, rng: random.Random) -> None:
        queue = rng.choice((0, 0, 0, 1, 2, 3, 4, 4, 5, -1))
        seeds: dict[int, Callable[[], bytes]] = {
            0: lambda: pack_frames([self.frame(rng) for _ in range(rng.choice((1, 4, 40)))]),
            1: lambda: pack_frames([self.frame(rng) for _ in range(4)]),
            2: lambda: GuestStats(free=1, total=2, swap_in=3).pack(),
            3: lambda: rng.choice((b"", pack_command(rng.choice((0, 1, 2, 3))))),
        }
        data = mutated(rng, seeds.get(queue, lambda: b"")())
        buffers = tuple(
            (self.frame(rng) * PAGE + rng.choice((0, 0, 5)), rng.choice((PAGE, 3 * PAGE, 100)))
            for _ in range(rng.randrange(3))
        )
        if rng.random() < 0.3:
            buffers += room(rng, self.region.size)
        self.nudge(rng)
        try:
            self.device.handle(queue, Element(data, buffers))
        except GuestError:
            return  # and nothing may be lost
        if queue == 0:
            for (frame,) in struct.iter_unpack("<I", data):
                self.give_away(frame * PAGE, PAGE)
        elif queue == 4 and not self.device.read_config()[12:].strip(b"\0"):
            for address, length in buffers:
                self.give_away(address, length)

    def nudge(self, rng: random.Random) -> None:
        """What else a driver and the host do meanwhile."""
        what = rng.random()
        if what < 0.05:
            data = mutated(rng, BalloonConfig(1, 2, 3, rng.choice((0, 0, 1))).pack())
            with contextlib.suppress(GuestError):
                self.device.write_config(rng.choice((0, 4, 12, 15)), data)
        elif what < 0.07:
            self.device.start_hinting()
        elif what < 0.08:
            self.device.reset()
            self.device.negotiate(self.device.features)

    def give_away(self, address: int, length: int) -> None:
        for at in range(-(-address // PAGE) * PAGE, (address + length) // PAGE * PAGE, PAGE):
            page = self.page_of(at)
            assert page is not None, "it took an address that is not the guest's"
            self.lost.add(page)

    def check(self) -> None:
        memory = self.region.view()
        for page in range(self.pages):
            (found,) = struct.unpack_from("<I", memory, page * PAGE)
            assert found == (0 if page in self.lost else page + 1)
        del memory
        for page in self.lost:
            self.stamp(page)
        self.lost.clear()
        assert self.region.plugged_size == self.region.size


@pytest.mark.promise("hostile-guest-is-contained")
def test_virtio_balloon_under_fire(region: Region) -> None:
    under_fire, rng = BalloonUnderFire(region), random.Random(1)
    for case in range(CASES):
        under_fire.send(rng)
        if case % 16 == 0:
            under_fire.check()
    under_fire.check()
    assert under_fire.device.discarded_size > 0
    assert under_fire.device.stats is not None
    under_fire.device.close()
