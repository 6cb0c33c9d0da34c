"""What a virtio device is to whatever carries its queues.

The layers above see nothing else of a device, and a device sees nothing of them:
it is handed `Element`s, one at a time, and returns answers.  So it can be tested,
or driven by another transport, without a queue.
"""

from __future__ import annotations

import abc
from collections.abc import Callable

from attrs import frozen

from sparsemem.errors import SparseMemError


class GuestError(SparseMemError, ValueError):
    """The guest did what no driver may; the device needs a reset and says why."""


@frozen
class Element:
    """One request of the driver.

    Attributes:
        data: What the driver sent: a copy, which the guest cannot change under us.
        room: `(guest-physical address, bytes)` of the buffers that the device may write, in order.
    """

    data: bytes
    room: tuple[tuple[int, int], ...] = ()


class Device(abc.ABC):
    """A device as its transport sees it.

    Not thread-safe towards its transport: one thread at a time calls `negotiate`,
    `read_config`, `write_config`, `handle` and `reset`.  What the host's side calls
    (a resize, say) may come from any thread.

    Attributes:
        device_id: As in the virtio specification.
        features: The device's own feature bits that it offers.
        config_size: Bytes of its configuration space.
        config_changed: Called, from any thread, after the configuration has changed in a
            way that the driver must be told of; set by the transport.
        answer_late: Called as `answer_late(queue, answer)` when a request that `handle`
            kept back is answered; set by the transport.
    """

    device_id: int
    features: int
    config_size: int
    config_changed: Callable[[], None] = staticmethod(lambda: None)
    answer_late: Callable[[int, bytes], None] = staticmethod(lambda queue, answer: None)

    @abc.abstractmethod
    def queues(self, features: int) -> int:
        """How many queues there are with these features negotiated; with all offered it is the most."""

    @abc.abstractmethod
    def negotiate(self, features: int) -> None:
        """Takes the features that the driver has accepted.

        Raises:
            GuestError: They are not among those offered, or the device refuses to work so.
        """

    @abc.abstractmethod
    def read_config(self) -> bytes:
        """The whole configuration space, at this moment."""

    @abc.abstractmethod
    def write_config(self, offset: int, data: bytes) -> None:
        """The driver, or the VMM in its name, writes to the configuration space.

        Raises:
            GuestError: Out of range.
        """

    @abc.abstractmethod
    def handle(self, queue: int, element: Element) -> bytes | None:
        """Does what a request asks for; the answer, or None if it is kept back (see `answer_late`).

        When it returns, everything that the answer tells of is done, the configuration included.

        Raises:
            GuestError: It is no request that a driver may send.
        """

    @abc.abstractmethod
    def reset(self, *, system: bool = False) -> None:
        """A reset of the device, or of the whole system."""

    @abc.abstractmethod
    def save(self) -> dict[str, object]:
        """What a restarted backend, or a migration's target, needs to go on: plain JSON values."""

    @abc.abstractmethod
    def load(self, state: dict[str, object]) -> None:
        """Takes over what `save` gave.

        Raises:
            ValueError: It is not this device's, or does not fit; nothing has changed.
        """
