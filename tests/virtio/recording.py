"""Traffic of vhost-user, as lines of JSON: what is recorded of real guests, and what the fuzzer begins with.

    {"device": 24, "message": "0100...", "descriptors": 0}       what a frontend sent, whole
    {"device": 24, "queue": 0, "data": "0000...", "room": [10]}  a request that a driver made

`recorded(path)` writes down all that the backends of this process receive meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import frozen

from sparsemem.virtio.device import Element
from sparsemem.virtio.vhost_user import messages, session
from sparsemem.virtio.vhost_user.backend import Backend
from sparsemem.virtio.vhost_user.channel import Message

FOLDER = Path(__file__).parent / "recorded"


@frozen
class SentMessage:
    """A message as its bytes, and how many descriptors came with it."""

    device: int
    data: bytes
    descriptors: int


@frozen
class MadeRequest:
    """A request on a queue: what it said, and how much room it left in each buffer."""

    device: int
    queue: int
    data: bytes
    room: tuple[int, ...]


def load(path: Path) -> list[SentMessage | MadeRequest]:
    """What a file tells of, in order."""
    found: list[SentMessage | MadeRequest] = []
    for line in path.read_text().splitlines():
        told = json.loads(line)
        if "message" in told:
            found.append(SentMessage(told["device"], bytes.fromhex(told["message"]), told["descriptors"]))
        else:
            found.append(MadeRequest(told["device"], told["queue"], bytes.fromhex(told["data"]), tuple(told["room"])))
    return found


def load_all() -> list[SentMessage | MadeRequest]:
    """What all recordings tell of."""
    return [event for path in sorted(FOLDER.glob("*.jsonl")) for event in load(path)]


@contextlib.contextmanager
def recorded(path: Path, most: int = 2000) -> Iterator[None]:
    """Writes down what the backends of this process receive, each different thing once, up to so many."""
    lock = threading.Lock()
    lines: dict[str, None] = {}
    parse, handle = messages.parse_payload, session.Session._handle
    serve = Backend._serve_one
    payloads = threading.local()

    def note(told: dict[str, Any]) -> None:
        with lock:
            if len(lines) < most:
                lines.setdefault(json.dumps(told))

    def noting_payload(request: messages.Request, data: bytes, descriptors: int) -> Any:
        payloads.last = data
        return parse(request, data, descriptors)

    def noting_message(self: session.Session, message: Message) -> None:
        flags = 1 | (8 if message.need_reply else 0)
        data = struct.pack("<III", message.request, flags, len(payloads.last)) + payloads.last
        device = self._backend.device.device_id
        note({"device": device, "message": data.hex(), "descriptors": len(message.descriptors)})
        handle(self, message)

    def noting_request(self: Backend, vring: Any, queue: Any) -> bool:
        device = self.device
        original = device.handle

        def noting(index: int, element: Element) -> bytes | None:
            room = [length for _, length in element.room]
            note({"device": device.device_id, "queue": index, "data": element.data.hex(), "room": room})
            return original(index, element)

        device.handle = noting  # type: ignore[method-assign, assignment]
        try:
            return serve(self, vring, queue)
        finally:
            del device.handle

    messages.parse_payload = noting_payload
    session.Session._handle = noting_message  # type: ignore[method-assign]
    Backend._serve_one = noting_request  # type: ignore[method-assign]
    try:
        yield
    finally:
        messages.parse_payload = parse
        session.Session._handle = handle  # type: ignore[method-assign]
        Backend._serve_one = serve  # type: ignore[method-assign]
        path.write_text("".join(f"{line}\n" for line in lines))
