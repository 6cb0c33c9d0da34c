"""A driver's side of a split virtqueue: requests laid out in memory of its own, all at once."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from sparsemem.virtio import Device, Element, FileRange, GuestMemory, RegionRange
from sparsemem.virtio.queue import Queue, Rings

_ADDRESS = 1 << 44
_DESCRIPTOR = struct.Struct("<QIHH")
_NEXT, _WRITE = 1, 2
_PAGE = 4096
_RING = 4


@contextmanager
def laid_out(elements: Iterable[Element], ranges: Iterable[RegionRange]) -> Iterator[tuple[GuestMemory, Rings]]:
    """Guest memory with a queue in which all of these requests are waiting.

    Args:
        elements: What they say, and how much room each has for an answer.
        ranges: What else is in guest memory.
    """
    table, heads, buffers = bytearray(), [], bytearray()
    count = 0
    parts = [(element.data, sum(length for _, length in element.room)) for element in elements]
    size = 1 << max(0, sum(1 + bool(room) for _, room in parts) - 1).bit_length()
    available = _DESCRIPTOR.size * size
    used = _up(available + _RING + 2 * size + 2)
    start = _up(used + _RING + 8 * size + 2)
    for data, room in parts:
        heads.append(count)
        at = _ADDRESS + start + len(buffers)
        table += _DESCRIPTOR.pack(at, len(data), _NEXT if room else 0, count + 1)
        buffers += data
        if room:
            table += _DESCRIPTOR.pack(at + len(data), room, _WRITE, 0)
            buffers += bytes(room)
        count += 1 + bool(room)
    fd = os.memfd_create("rings", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, _up(start + len(buffers)))
        os.pwrite(fd, table, 0)
        os.pwrite(fd, struct.pack(f"<HH{len(heads)}H", 0, len(heads), *heads), available)
        os.pwrite(fd, buffers, start)
        with GuestMemory([*ranges, FileRange(_ADDRESS, _up(start + len(buffers)), fd)]) as memory:
            yield memory, Rings(size, _ADDRESS, _ADDRESS + available, _ADDRESS + used)
    finally:
        os.close(fd)


def serve(device: Device, queue: Queue) -> list[bytes]:
    """Has the device answer all that waits, as a backend does; the answers."""
    answers = []
    while (chain := queue.pop()) is not None:
        answer = device.handle(0, chain.element) or b""
        queue.push(chain, answer)
        answers.append(answer)
    return answers


def _up(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
