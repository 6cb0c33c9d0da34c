"""Several guests under one budget of memory, balanced by a policy of ten lines.

Each guest is a region. Its working set goes up and down; the policy inflates the balloon of those who have too much
and gives what it gained to those who need it.
"""

from __future__ import annotations

import random

from sparsemem import Anonymous, BackendExhaustedError, Budget, Region, format_size

BLOCK = 1 << 20
STEPS = 40


class Guest:
    """A region, and how many of its blocks the guest works with."""

    def __init__(self, name: str, budget: Budget) -> None:
        self.name = name
        self.region = Region("256M", block_size=BLOCK, backend=Anonymous(), budget=budget)
        self.wants = 8
        self.starved = 0

    @property
    def has(self) -> int:
        return self.region.plugged_blocks

    def work(self, chance: random.Random) -> None:
        """Changes its mind about how much it needs, and touches what it has."""
        self.wants = max(4, min(64, self.wants + chance.randint(-12, 14)))
        for first, count in self.region.plugged_runs():
            with self.region.view(first, count) as memory:
                memory[::4096] = b"\1" * (len(memory) // 4096)
        # Pages that the guest has freed are reported, and go back at once; the block stays plugged.
        if self.has > self.wants:
            first, count = list(self.region.plugged_runs())[-1]
            self.region.discard((first + count - 1) * BLOCK, BLOCK // 2)


def balance(guests: list[Guest], budget: Budget) -> None:
    """The policy: take from whoever has more than it wants, then give to whoever wants most."""
    for guest in guests:
        if guest.has > guest.wants:
            guest.region.resize(guest.wants * BLOCK)  # inflate: the highest blocks go first
    for guest in sorted(guests, key=lambda guest: guest.has - guest.wants):
        missing = guest.wants - guest.has
        if missing <= 0:
            continue
        give = min(missing, budget.available // BLOCK)
        guest.region.resize((guest.has + give) * BLOCK)  # deflate: the lowest free blocks
        guest.starved += missing - give


def main() -> None:
    chance = random.Random(2021)
    budget = Budget("96M")
    guests = [Guest(name, budget) for name in ("web", "mail", "build", "db")]
    for step in range(STEPS):
        for guest in guests:
            guest.work(chance)
        balance(guests, budget)
        assert budget.used == sum(guest.region.plugged_size for guest in guests) <= budget.limit
        if step % 8 == 0:
            bars = "  ".join(f"{guest.name} {'#' * (guest.has // 2):<32}" for guest in guests)
            print(f"{step:3}  {bars} {format_size(budget.used):>4}")
    greedy = guests[0]
    try:
        greedy.region.resize("256M")
    except BackendExhaustedError as error:
        print(f"{greedy.name} alone cannot have it all: {error.cause.value}")
    else:
        raise AssertionError("the budget did not hold")
    for guest in guests:
        audit = guest.region.audit()
        assert audit.ok, audit
        print(f"{guest.name:5} {guest.has:3} blocks, went without {guest.starved} over time; audit {audit}")
        guest.region.close()
    assert budget.used == 0


if __name__ == "__main__":
    main()
