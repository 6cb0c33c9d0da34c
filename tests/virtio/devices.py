"""A device without memory, for tests of what carries requests: it answers as it is told to."""

from __future__ import annotations

import threading
from collections.abc import Callable

from sparsemem.virtio.device import Device, Element, GuestError


class Echo(Device):
    """Answers with what it was sent, backwards, if there is any room for it; two queues, a third with feature bit 1."""

    device_id = 42
    features = 0b11
    config_size = 8

    def __init__(self) -> None:
        self.config = bytearray(b"01234567")
        self.negotiated: list[int] = []
        self.handled: list[tuple[int, Element]] = []
        self.resets = 0
        self.counter = 0
        self.keep = False
        self.hook: Callable[[Element], None] = lambda element: None
        self.seen = threading.Event()

    def queues(self, features: int) -> int:
        return 3 if features & 2 else 2

    def negotiate(self, features: int) -> None:
        if features & ~self.features:
            raise GuestError("features that were not offered")
        self.negotiated.append(features)

    def read_config(self) -> bytes:
        return bytes(self.config)

    def write_config(self, offset: int, data: bytes) -> None:
        if offset + len(data) > self.config_size:
            raise GuestError("out of the configuration")
        self.config[offset : offset + len(data)] = data

    def handle(self, queue: int, element: Element) -> bytes | None:
        self.handled.append((queue, element))
        self.seen.set()
        self.hook(element)
        if element.data == b"bad":
            raise GuestError("that is bad")
        self.counter += 1
        if self.keep:
            return None
        return element.data[::-1] if element.room else b""

    def reset(self, *, system: bool = False) -> None:
        self.resets += 1

    def save(self) -> dict[str, object]:
        return {"counter": self.counter}

    def load(self, state: dict[str, object]) -> None:
        counter = state.get("counter")
        if not isinstance(counter, int):
            raise ValueError("no counter")
        self.counter = counter
