"""A buddy allocator whose arena is a region: blocks are committed when first used and purged when free for a while."""

from __future__ import annotations

import random

from sparsemem import Region, format_size

MIN_ORDER = 12  # 4 KiB


class Buddy:
    """Power-of-two allocations from a region; addresses are offsets in it.

    The region's blocks are larger than the smallest allocation, so a block is committed with the first allocation in
    it, and may be purged when the last one is gone.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self.top = region.size.bit_length() - 1
        assert region.size == 1 << self.top, "the arena must be a power of two"
        self.free: dict[int, set[int]] = {order: set() for order in range(MIN_ORDER, self.top + 1)}
        self.free[self.top].add(0)
        self.used: dict[int, int] = {}
        self.live = [0] * region.nblocks  # allocations that touch each block

    def _blocks(self, offset: int, order: int) -> range:
        first, count = self.region.blocks(offset, 1 << order, "outward")
        return range(first, first + count)

    def allocate(self, size: int) -> int:
        """Offset of `size` bytes; MemoryError if there is no room or no memory."""
        order = max(MIN_ORDER, (size - 1).bit_length())
        found = next((o for o in range(order, self.top + 1) if self.free[o]), None)
        if found is None:
            raise MemoryError(f"no {format_size(1 << order)} in a row")
        offset = min(self.free[found])  # lowest first keeps the top of the arena empty
        blocks = self._blocks(offset, order)
        # Commit before the books change: if there is no memory, nothing has happened.
        self.region.plug(blocks.start, len(blocks), exist_ok=True)
        self.free[found].remove(offset)
        while found > order:
            found -= 1
            self.free[found].add(offset + (1 << found))
        self.used[offset] = order
        for block in blocks:
            self.live[block] += 1
        return offset

    def release(self, offset: int) -> None:
        """Frees an allocation and joins it with its free buddies."""
        order = self.used.pop(offset)
        for block in self._blocks(offset, order):
            self.live[block] -= 1
        while order < self.top and (buddy := offset ^ 1 << order) in self.free[order]:
            self.free[order].remove(buddy)
            offset = min(offset, buddy)
            order += 1
        self.free[order].add(offset)

    def purge(self) -> int:
        """Gives the memory of blocks without an allocation back; bytes."""
        idle = [(block, 1) for block in range(self.region.nblocks) if not self.live[block]]
        return self.region.unplug_runs(idle, missing_ok=True) * self.region.block_size


def main() -> None:
    chance = random.Random(7)
    with Region("64M", block_size="64K") as region:
        heap = Buddy(region)
        mine: dict[int, tuple[int, int]] = {}
        with region.view() as memory:  # the whole arena; only allocated parts of it are touched
            for round_ in range(6):
                for _ in range(400):
                    if mine and chance.random() < (0.35 if round_ < 4 else 0.7):
                        offset = chance.choice(list(mine))
                        size, byte = mine.pop(offset)
                        assert memory[offset] == memory[offset + size - 1] == byte, "somebody wrote into it"
                        heap.release(offset)
                    else:
                        size, byte = chance.randint(1, 40_000), chance.randrange(256)
                        offset = heap.allocate(size)
                        memory[offset : offset + size] = bytes([byte]) * size
                        mine[offset] = (size, byte)
                before = region.plugged_size
                purged = heap.purge()
                wanted = sum(size for size, _ in mine.values())
                print(
                    f"round {round_}: {len(mine):4} allocations of {format_size(wanted):>6}, "
                    f"committed {format_size(before):>6}, purged {format_size(purged):>6}"
                )
                assert wanted <= region.plugged_size <= before
            for offset in list(mine):
                heap.release(offset)
        assert heap.free[heap.top] == {0}, "all buddies found each other"
        heap.purge()
        assert region.plugged_size == 0
        assert region.audit().ok
    print("everything was joined and given back")


if __name__ == "__main__":
    main()
