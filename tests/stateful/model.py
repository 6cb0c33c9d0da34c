"""What a region should be, as a dict: the model that the state machine compares with.

A block is made of *cells*, a page each or a few pages, which is as fine as content is followed. A cell holds one byte
value everywhere, or is fresh: zero, or a template's content.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

FRESH = None
Cells = list[int | None]


@dataclass
class Model:
    """Blocks by number; what is in no dict is unplugged and empty."""

    nblocks: int
    cells: int
    plugged: dict[int, Cells] = field(default_factory=dict)
    discarded: set[tuple[int, int]] = field(default_factory=set)
    """Cells of plugged blocks, `(block, cell)`, that have no memory."""
    pending: dict[int, Cells] = field(default_factory=dict)
    """Unplugged blocks whose discard is still to come, with what they held."""
    pending_discarded: set[tuple[int, int]] = field(default_factory=set)
    tainted: set[int] = field(default_factory=set)
    """Whatever they hold is unknown; plugged ones are in `plugged`, too."""

    def plug(self, blocks: Iterable[int]) -> None:
        """Blocks that were unplugged are plugged and fresh."""
        for block in blocks:
            self.plugged[block] = [FRESH] * self.cells
            self._forget_pending(block)

    def unplug(self, blocks: Iterable[int], *, later: bool = False) -> None:
        """Blocks that were plugged are unplugged; their memory goes now or later."""
        for block in blocks:
            cells = self.plugged.pop(block)
            lost = {at for at in self.discarded if at[0] == block}
            self.discarded -= lost
            if later:
                self.pending[block] = cells
                self.pending_discarded |= lost

    def flush(self, blocks: Iterable[int] | None = None) -> None:
        """What was put off is done."""
        for block in list(self.pending if blocks is None else blocks):
            self._forget_pending(block)

    def _forget_pending(self, block: int) -> None:
        self.pending.pop(block, None)
        self.pending_discarded = {at for at in self.pending_discarded if at[0] != block}

    def taint(self, blocks: Iterable[int]) -> None:
        """Their content is unknown."""
        for block in blocks:
            self.tainted.add(block)
            self._forget_pending(block)
            self.discarded = {at for at in self.discarded if at[0] != block}

    def scrub(self) -> None:
        """What is tainted is unplugged and empty."""
        for block in self.tainted:
            self.plugged.pop(block, None)
        self.tainted.clear()

    def clear(self) -> None:
        """As a region that was just made."""
        self.plugged.clear()
        self.discarded.clear()
        self.pending.clear()
        self.pending_discarded.clear()
        self.tainted.clear()

    @property
    def resident_cells(self) -> int:
        """Cells that have memory."""
        kept = len(self.pending) * self.cells - len(self.pending_discarded)
        return len(self.plugged) * self.cells - len(self.discarded) + kept

    @property
    def free(self) -> list[int]:
        """Blocks that can be plugged."""
        return [block for block in range(self.nblocks) if block not in self.plugged and block not in self.tainted]

    @property
    def sound(self) -> list[int]:
        """Plugged blocks whose content is known."""
        return [block for block in sorted(self.plugged) if block not in self.tainted]
