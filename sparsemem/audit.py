"""Holds the bitmap against what the kernel says is resident."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import frozen

from sparsemem.backends.base import Mapping
from sparsemem.blocks import BlockMap, Map
from sparsemem.errors import Run
from sparsemem.runs import clip, join, subtract, to_blocks
from sparsemem.units import format_size


@frozen(kw_only=True)
class Audit:
    """What was found; runs are `(first, count)` in blocks, figures in bytes.

    On a region that is used meanwhile, blocks that an operation holds when the
    audit begins or ends are `busy` and nothing else is said of them.

    Attributes:
        leaks: Unplugged blocks that use memory: somebody touched them.
        leaked_size: How much.
        gaps: Plugged blocks that lack memory: somebody discarded it.
        gap_size: How much.
        discarded_size: Pages discarded with `Region.discard` and not touched since.
        resident_size: What plugged blocks really use.
        plugged_size: What is plugged.
        huge_size: How much of that is mapped as huge pages, transparent or hugetlb;
            None where the kernel does not tell (before Linux 6.7).
        unaccounted_size: What the file uses beyond what can be placed, such as
            pages that somebody fallocated and nobody touched, or the file behind
            a private mapping (double memory).
        busy: Blocks that were being changed.
        tainted: Blocks that an earlier failure left in an unknown state.
        pending: Unplugged blocks whose discard is still to come.
        unknown: Blocks of which nobody can tell.
    """

    leaks: tuple[Run, ...]
    leaked_size: int
    gaps: tuple[Run, ...]
    gap_size: int
    discarded_size: int
    resident_size: int
    plugged_size: int
    huge_size: int | None
    unaccounted_size: int
    busy: tuple[Run, ...]
    tainted: tuple[Run, ...]
    pending: tuple[Run, ...]
    unknown: tuple[Run, ...]

    @property
    def ok(self) -> bool:
        """No leak, no gap, nothing tainted or unaccounted for."""
        return not (self.leaks or self.gaps or self.tainted or self.unaccounted_size)

    @property
    def huge_share(self) -> float | None:
        """The share of plugged memory that is huge, 0 to 1; 0 if nothing is plugged, None where nobody can tell."""
        return None if self.huge_size is None else self.huge_size / max(1, self.plugged_size)

    def __str__(self) -> str:
        sizes = {
            "resident": self.resident_size,
            "leaked": self.leaked_size,
            "missing": self.gap_size,
            "discarded": self.discarded_size,
            "unaccounted": self.unaccounted_size,
        }
        runs = {"tainted": self.tainted, "pending": self.pending, "busy": self.busy, "unknown": self.unknown}
        told = [f"{format_size(size)} {name}" for name, size in sizes.items() if size]
        told += [f"{sum(n for _, n in found)} blocks {name}" for name, found in runs.items() if found]
        return f"{'ok' if self.ok else 'NOT ok'}: {', '.join(told) or 'nothing resident'}"


def audit(mapping: Mapping, blocks: BlockMap, block_size: int) -> Audit:
    """Looks at every block; the work grows with what is resident, not with the reservation."""
    shift = block_size.bit_length() - 1
    page = mapping.page_size
    tainted = list(blocks.runs(Map.TAINTED, True))
    busy = list(blocks.runs(Map.BUSY, True))
    plugged = list(blocks.runs(Map.PLUGGED, True))
    found = mapping.resident(0, mapping.size)
    if found is None:
        everything = ((0, blocks.nblocks),)
        return _unknown(everything, tuple(busy), tuple(tainted), blocks.count(Map.PLUGGED, 0, blocks.nblocks) << shift)
    resident = list(found)
    total = mapping.resident_total()
    huge = mapping.huge_pages(0, mapping.size)
    per_block = block_size // page
    discarded = [
        (page_first * page, pages * page)
        for first, count in plugged
        for page_first, pages in blocks.discarded_pages(first * per_block, (first + count) * per_block)
    ]
    # What began or ended while we looked says nothing.
    now_plugged = list(blocks.runs(Map.PLUGGED, True))
    changed = subtract(plugged, now_plugged) + subtract(now_plugged, plugged)
    busy = join(busy + list(blocks.runs(Map.BUSY, True)) + changed)

    pending = list(blocks.runs(Map.PENDING, True))
    aside = [(first << shift, count << shift) for first, count in join(busy + tainted + pending)]
    in_plugged = [(first << shift, count << shift) for first, count in plugged]
    kept = clip(resident, in_plugged)
    leaked = subtract(subtract(resident, in_plugged), aside)
    absent = subtract(subtract(in_plugged, resident), aside)
    missing = subtract(absent, discarded)
    return Audit(
        leaks=tuple(to_blocks(leaked, shift)),
        leaked_size=_size(leaked),
        gaps=tuple(to_blocks(missing, shift)),
        gap_size=_size(missing),
        discarded_size=_size(absent) - _size(missing),
        resident_size=_size(kept),
        plugged_size=_size(in_plugged),
        huge_size=None if huge is None else _size(clip(huge, in_plugged)),
        unaccounted_size=0 if total is None or busy else max(0, total - _size(resident)),
        busy=tuple(busy),
        tainted=tuple(tainted),
        pending=tuple(pending),
        unknown=(),
    )


def _unknown(everything: tuple[Run, ...], busy: tuple[Run, ...], tainted: tuple[Run, ...], plugged_size: int) -> Audit:
    return Audit(
        leaks=(),
        leaked_size=0,
        gaps=(),
        gap_size=0,
        discarded_size=0,
        resident_size=0,
        plugged_size=plugged_size,
        huge_size=None,
        unaccounted_size=0,
        busy=busy,
        tainted=tainted,
        pending=(),
        unknown=everything,
    )


def _size(runs: Iterable[Run]) -> int:
    return sum(length for _, length in runs)
