"""A driver's side of the devices, without queues: requests as bytes, answers as they are meant."""

from __future__ import annotations

import struct

from sparsemem.virtio import Device, Element, VirtioBalloon, VirtioMem
from sparsemem.virtio.balloon import queue_names
from sparsemem.virtio.wire import (
    BalloonConfig,
    MemAnswer,
    MemConfig,
    MemOperation,
    MemRequest,
    MemResponse,
    MemState,
    pack_command,
)

ROOM = ((0x1000, MemResponse.SIZE),)


class Recorder:
    """Stands in the transport's place: counts the notifications and keeps what is answered late."""

    def __init__(self, device: Device) -> None:
        self.notified = 0
        self.late: list[tuple[int, bytes]] = []
        device.config_changed = self._notify
        device.answer_late = lambda queue, answer: self.late.append((queue, answer))

    def _notify(self) -> None:
        self.notified += 1


class MemDriver(Recorder):
    """Asks a virtio-mem device; blocks are numbers from the start of its region."""

    def __init__(self, device: VirtioMem) -> None:
        super().__init__(device)
        self.device = device

    def ask(self, operation: MemOperation, address: int = 0, count: int = 0) -> MemResponse:
        answer = self.device.handle(0, Element(MemRequest(operation, address, count).pack(), ROOM))
        assert answer is not None
        assert len(answer) == MemResponse.SIZE
        return MemResponse.unpack(answer)

    def at(self, block: int) -> int:
        return self.device.address + block * self.device.block_size

    def plug(self, first: int, count: int = 1) -> MemAnswer:
        return self.ask(MemOperation.PLUG, self.at(first), count).answer

    def unplug(self, first: int, count: int = 1) -> MemAnswer:
        return self.ask(MemOperation.UNPLUG, self.at(first), count).answer

    def unplug_all(self) -> MemAnswer:
        return self.ask(MemOperation.UNPLUG_ALL).answer

    def state(self, first: int, count: int = 1) -> MemState:
        response = self.ask(MemOperation.STATE, self.at(first), count)
        assert response.answer is MemAnswer.ACK
        return response.state

    @property
    def config(self) -> MemConfig:
        return MemConfig.unpack(self.device.read_config())


class BalloonDriver(Recorder):
    """Talks to a balloon; pages are page frame numbers."""

    def __init__(self, device: VirtioBalloon, features: int | None = None) -> None:
        super().__init__(device)
        self.device = device
        self.features = device.features if features is None else features
        device.negotiate(self.features)

    def send(self, queue: str, data: bytes = b"", *room: tuple[int, int]) -> bytes | None:
        return self.device.handle(queue_names(self.features).index(queue), Element(data, room))

    def inflate(self, *frames: int) -> None:
        assert self.send("inflate", struct.pack(f"<{len(frames)}I", *frames)) == b""

    def deflate(self, *frames: int) -> None:
        assert self.send("deflate", struct.pack(f"<{len(frames)}I", *frames)) == b""

    def report(self, *room: tuple[int, int]) -> None:
        assert self.send("reporting", b"", *room) == b""

    def command(self, command: int) -> None:
        assert self.send("free_page", pack_command(command)) == b""

    def hint(self, *room: tuple[int, int]) -> None:
        assert self.send("free_page", b"", *room) == b""

    @property
    def config(self) -> BalloonConfig:
        return BalloonConfig.unpack(self.device.read_config())
