"""The virtio devices without a guest: requests as a Linux driver sends them, and shared memory underneath.

The peer does from C what the memory sees of it: a call for each page of a balloon, as QEMU's
device makes them, and for each block that is plugged or unplugged.
"""

from __future__ import annotations

import mmap
import os
import random
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice

from sparsemem._sys import lib
from sparsemem.backends import Memfd
from sparsemem.bench.cases.hyperalloc import PUBLISHED, TOUCHED
from sparsemem.bench.cases.rings import laid_out, serve
from sparsemem.bench.lab import Lab, Watch
from sparsemem.bench.model import RATE, Case, Figures, Measure, Published, Way
from sparsemem.bench.peers import Peers
from sparsemem.errors import SparseMemError
from sparsemem.region import Region
from sparsemem.virtio import Element, RegionRange, VirtioBalloon, VirtioMem
from sparsemem.virtio.queue import Queue
from sparsemem.virtio.wire import FRAME_SIZE, MemAnswer, MemOperation, MemRequest, MemResponse, pack_frames

_BARE = "C, a call for each"
_BLOCK = 2 << 20
_FRAMES_A_REQUEST = 256
_BYTES_A_REQUEST = 128 << 20
_ADDRESS = 1 << 32

INFLATE, PLUG, UNPLUG = "inflate", "plug", "unplug"


def _published(name: str, measure: str) -> tuple[Published, ...]:
    """Their rate of reclaiming touched memory."""
    (rate,) = (of.value for of in PUBLISHED if (of.name, of.measure) == (name, TOUCHED))
    return (Published(measure, name, rate),)


@contextmanager
def _memfd(size: int) -> Iterator[int]:
    fd = os.memfd_create("peer", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def _gib(size: int) -> float:
    return size / (1 << 30)


# ---- virtio-balloon -----------------------------------------------------------------------


def _in_order(size: int) -> list[int]:
    return list(range(size // FRAME_SIZE))


def _at_random(size: int) -> list[int]:
    frames = _in_order(size)
    random.Random(1).shuffle(frames)
    return frames


@contextmanager
def _balloon(order: Callable[[int], list[int]], lab: Lab) -> Iterator[list[Way]]:
    size = lab.scale.size
    frames = order(size)
    inflate = partial(_inflate, size, _requests(frames))
    offsets = array("Q", (frame * FRAME_SIZE for frame in frames))
    yield [
        Way("sparsemem", partial(inflate, thp=False), memory=size),
        Way("sparsemem, huge pages", partial(inflate, thp=None), memory=size),
        Way("sparsemem, through the queue", partial(inflate, thp=False, queued=True), memory=size),
        lab.in_c(_BARE, partial(_punch, size, offsets), memory=size),
    ]


def _requests(frames: list[int]) -> list[Element]:
    left = iter(frames)
    return [Element(pack_frames(some)) for some in iter(lambda: list(islice(left, _FRAMES_A_REQUEST)), [])]


def _inflate(size: int, requests: list[Element], *, thp: bool | None, queued: bool = False) -> Figures:
    with (
        Region(size, block_size=min(size, _BLOCK), backend=Memfd(thp=thp)) as region,
        laid_out(requests if queued else [], [RegionRange(0, size, region)]) as (memory, rings),
    ):
        region.plug(0, region.nblocks)
        device = VirtioBalloon(memory)
        watch = Watch()
        if queued:
            serve(device, Queue(memory, rings, features=0, base=0))
        else:
            for request in requests:
                device.handle(0, request)
        took = watch.lap()
        _expect(device.discarded_size == size, "the balloon has not discarded all of its pages")
        return {INFLATE: _gib(size) / took}


def _punch(size: int, offsets: array[int], peers: Peers) -> Figures:
    with _memfd(size) as fd, peers.mapping(size, mmap.MAP_SHARED, fd, advice=lib.MADV_NOHUGEPAGE) as base:
        peers.advise(base, size, lib.MADV_POPULATE_WRITE)
        watch = Watch()
        peers.punch_each(fd, offsets, FRAME_SIZE)
        return {INFLATE: _gib(size) / watch.lap()}


# ---- virtio-mem ---------------------------------------------------------------------------


@contextmanager
def _mem(lab: Lab) -> Iterator[list[Way]]:
    size = 4 * lab.scale.size
    many = max(1, min(_BYTES_A_REQUEST, size) // _BLOCK)
    yield [
        Way("sparsemem, 128M a request", partial(_plug_and_unplug, size, many), memory=size),
        Way("sparsemem, a block a request", partial(_plug_and_unplug, size, 1), memory=size),
        Way("sparsemem, a block a request, through the queue", partial(_queued, size), memory=size),
        Way("sparsemem, without prealloc", partial(_plug_and_unplug, size, many, prealloc=False)),
        lab.in_c(_BARE, partial(_bare_blocks, size), memory=size),
    ]


def _plug_and_unplug(size: int, many: int, *, prealloc: bool = True) -> Figures:
    with Region(size, block_size=_BLOCK, backend=Memfd()) as region:
        device = VirtioMem(region, address=_ADDRESS, requested_size=size, prealloc=prealloc)
        plugs, unplugs = _all_blocks(MemOperation.PLUG, size, many), _all_blocks(MemOperation.UNPLUG, size, many)
        watch = Watch()
        answers = [device.handle(0, request) for request in plugs]
        plugged = watch.lap()
        answers += [device.handle(0, request) for request in unplugs]
        unplugged = watch.lap()
        _expect_acknowledged(answers)
        return {PLUG: _gib(size) / plugged, UNPLUG: _gib(size) / unplugged}


def _queued(size: int) -> Figures:
    rates = {}
    with Region(size, block_size=_BLOCK, backend=Memfd()) as region:
        device = VirtioMem(region, address=_ADDRESS, requested_size=size)
        for measure, operation in ((PLUG, MemOperation.PLUG), (UNPLUG, MemOperation.UNPLUG)):
            with laid_out(_all_blocks(operation, size, 1), []) as (memory, rings):
                queue = Queue(memory, rings, features=0, base=0)
                watch = Watch()
                answers = serve(device, queue)
                rates[measure] = _gib(size) / watch.lap()
                _expect_acknowledged(answers)
    return rates


def _all_blocks(operation: MemOperation, size: int, many: int) -> list[Element]:
    """Requests for all blocks, so many at a time: lowest first, and highest first to unplug."""
    addresses = range(_ADDRESS, _ADDRESS + size, many * _BLOCK)
    ordered = addresses if operation is MemOperation.PLUG else reversed(addresses)
    return [Element(MemRequest(operation, at, many).pack(), ((0, MemResponse.SIZE),)) for at in ordered]


def _expect_acknowledged(answers: list[bytes]) -> None:
    refused = [answer for answer in answers if MemResponse.unpack(answer).answer is not MemAnswer.ACK]
    _expect(not refused, f"{len(refused)} requests were refused")


def _bare_blocks(size: int, peers: Peers) -> Figures:
    with _memfd(size) as fd, peers.mapping(size, mmap.MAP_SHARED, fd, advice=lib.MADV_NOHUGEPAGE) as base:
        watch = Watch()
        peers.advise(base, size, lib.MADV_POPULATE_WRITE, step=_BLOCK)
        plugged = watch.lap()
        peers.punch(fd, size, step=_BLOCK)
        return {PLUG: _gib(size) / plugged, UNPLUG: _gib(size) / watch.lap()}


def _expect(true: bool, text: str) -> None:
    if not true:
        raise SparseMemError(text)


CASES = (
    Case(
        "virtio-balloon-sequential",
        "a balloon inflated page by page, in order; a higher rate is better",
        (Measure(INFLATE, _BARE, RATE),),
        partial(_balloon, _in_order),
        _published("virtio-balloon", INFLATE),
    ),
    Case(
        "virtio-balloon-random",
        "a balloon inflated page by page, in random order; a higher rate is better",
        (Measure(INFLATE, _BARE, RATE),),
        partial(_balloon, _at_random),
        _published("virtio-balloon", INFLATE),
    ),
    Case(
        "virtio-mem",
        "virtio-mem plugged and unplugged, 2 MiB blocks; a higher rate is better",
        (Measure(PLUG, _BARE, RATE), Measure(UNPLUG, _BARE, RATE)),
        _mem,
        _published("virtio-mem", UNPLUG),
    ),
)
