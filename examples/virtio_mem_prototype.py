"""A virtio-mem device in miniature: a host that asks, a guest driver that plugs and unplugs, a Region underneath.

The device answers as the specification wants: ERROR for blocks that make no sense, NACK for more than was requested,
BUSY when the host has no memory. The "guest" is a few lines that react to a new requested size as Linux does.
"""

from __future__ import annotations

import enum

from sparsemem import BackendExhaustedError, BlockState, Budget, Memfd, Region, format_size

BLOCK = 2 << 20


class Answer(enum.Enum):
    ACK = 0
    NACK = 1
    BUSY = 2
    ERROR = 3


class Device:
    """The host's side: guest memory is the region, and its bitmap is the truth."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.requested_size = 0

    def _valid(self, first: int, count: int) -> bool:
        return count > 0 and 0 <= first and first + count <= self.region.nblocks

    def plug(self, first: int, count: int) -> Answer:
        if not self._valid(first, count):
            return Answer.ERROR
        if self.region.plugged_size + count * BLOCK > self.requested_size:
            return Answer.NACK
        if self.region.state(first, count) is not BlockState.UNPLUGGED:
            return Answer.ERROR
        try:
            self.region.plug(first, count)
        except BackendExhaustedError:
            return Answer.BUSY  # nothing has changed: the guest may simply ask again
        return Answer.ACK

    def unplug(self, first: int, count: int) -> Answer:
        if not self._valid(first, count) or not self.region.is_plugged(first, count):
            return Answer.ERROR
        self.region.unplug(first, count)
        return Answer.ACK


class Guest:
    """A driver that follows the requested size, block by block, and uses the memory that it gets."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.mine: list[int] = []

    def react(self) -> Answer:
        """Plugs or unplugs until the requested size is reached, or the host says no."""
        while len(self.mine) * BLOCK < self.device.requested_size:
            block = next(b for b in range(self.device.region.nblocks) if b not in self.mine)
            answer = self.device.plug(block, 1)
            if answer is not Answer.ACK:
                return answer
            self.mine.append(block)
            with self.device.region.view(block) as memory:
                memory[:8] = block.to_bytes(8, "little")
        while len(self.mine) * BLOCK > self.device.requested_size:
            answer = self.device.unplug(self.mine.pop(), 1)
            assert answer is Answer.ACK
        return Answer.ACK

    def intact(self) -> bool:
        """Whether every block still holds what was written to it."""
        for block in self.mine:
            with self.device.region.view(block) as memory:
                if int.from_bytes(memory[:8], "little") != block:
                    return False
        return True


def main() -> None:
    host = Budget("48M")  # what the host can spare
    with Region("1G", block_size=BLOCK, backend=Memfd(), budget=host) as region:
        device = Device(region)
        guest = Guest(device)
        for requested in (16 << 20, 40 << 20, 8 << 20, 64 << 20, 32 << 20, 0):
            device.requested_size = requested
            answer = guest.react()
            blocks = "".join("#" if region.is_plugged(b) else "." for b in range(32))
            print(
                f"requested {format_size(requested):>4}  plugged {format_size(region.plugged_size):>4}  "
                f"{answer.name:<4}  {blocks}"
            )
            assert guest.intact()
            assert answer is (Answer.BUSY if requested > host.limit else Answer.ACK)
        assert device.plug(0, 1) is Answer.NACK
        assert device.unplug(5, 1) is Answer.ERROR
        assert device.plug(region.nblocks, 1) is Answer.ERROR
        assert region.audit().ok
    print("the guest never lost a byte, and the host has all its memory back")


if __name__ == "__main__":
    main()
