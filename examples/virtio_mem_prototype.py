"""A virtio-mem device and a driver in miniature: a host that asks, a guest that plugs and unplugs, a Region underneath.

The device is the real one, without a queue. It answers as the specification wants: ERROR for blocks that make no sense,
NACK for more than was requested, BUSY when the host has no memory. The "guest" is a few lines that react to a new
requested size as Linux does.
"""

from __future__ import annotations

from sparsemem import Budget, Memfd, Region, format_size
from sparsemem.virtio import Element, VirtioMem
from sparsemem.virtio.wire import MemAnswer, MemOperation, MemRequest, MemResponse

BLOCK = 2 << 20
ADDRESS = 0x1_4000_0000  # where the guest sees it
ROOM = ((0, MemResponse.SIZE),)  # for the answer


class Guest:
    """A driver that follows the requested size, block by block, and uses the memory that it gets."""

    def __init__(self, device: VirtioMem) -> None:
        self.device = device
        self.mine: list[int] = []

    def ask(self, operation: MemOperation, block: int) -> MemAnswer:
        """One request, in bytes there and back."""
        request = MemRequest(operation, ADDRESS + block * BLOCK, 1)
        answer = self.device.handle(0, Element(request.pack(), ROOM))
        return MemResponse.unpack(answer).answer

    def react(self) -> MemAnswer:
        """Plugs or unplugs until the requested size is reached, or the host says no."""
        while len(self.mine) * BLOCK < self.device.requested_size:
            block = next(b for b in range(self.device.region.nblocks) if b not in self.mine)
            answer = self.ask(MemOperation.PLUG, block)
            if answer is not MemAnswer.ACK:
                return answer
            self.mine.append(block)
            with self.device.region.view(block) as memory:
                memory[:8] = block.to_bytes(8, "little")
        while len(self.mine) * BLOCK > self.device.requested_size:
            answer = self.ask(MemOperation.UNPLUG, self.mine.pop())
            assert answer is MemAnswer.ACK
        return MemAnswer.ACK

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
        device = VirtioMem(region, address=ADDRESS)
        guest = Guest(device)
        for requested in ("16M", "40M", "8M", "64M", "32M", 0):
            device.requested_size = requested
            answer = guest.react()
            blocks = "".join("#" if region.is_plugged(b) else "." for b in range(32))
            print(
                f"requested {format_size(device.requested_size):>4}  plugged {format_size(region.plugged_size):>4}  "
                f"{answer.name:<4}  {blocks}"
            )
            assert guest.intact()
            assert answer is (MemAnswer.BUSY if device.requested_size > host.limit else MemAnswer.ACK)
        assert guest.ask(MemOperation.PLUG, 0) is MemAnswer.NACK
        assert guest.ask(MemOperation.UNPLUG, 5) is MemAnswer.ERROR
        assert guest.ask(MemOperation.PLUG, region.nblocks) is MemAnswer.ERROR
        assert region.audit().ok
    print("the guest never lost a byte, and the host has all its memory back")


if __name__ == "__main__":
    main()
