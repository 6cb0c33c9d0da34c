"""What the library must reach, against whom: the table of the issue, as data.

A ratio is of the way's figure to the peer's, in the same round; the median of the
rounds counts.  Where a limit has no peer it is a figure in the measure's unit.
"""

from __future__ import annotations

import enum

from attrs import frozen


class Kind(enum.Enum):
    """What is limited."""

    RATIO = "ratio"
    DIFFERENCE = "difference"
    FIGURE = "figure"


@frozen
class Target:
    """One limit.

    Attributes:
        case: The case's name.
        measure: What of it.
        way: Whose figure.
        peer: Against whom; "" for a figure on its own.
        limit: At most this.
        kind: Whether it is the ratio to the peer, the difference from it, or the figure.
        without_uffd: The limit where this process may have no userfaultfd; None is the same.
    """

    case: str
    measure: str
    way: str
    peer: str
    limit: float
    kind: Kind = Kind.RATIO
    without_uffd: float | None = None


_ONE, _ALL = "sparsemem auto, 1 thread", "sparsemem auto, all threads"
_PLAIN = "C populate_write"
_LOOP = "C loop of madvise"
_LISTED = "sparsemem, list of tuples"
_CALLS = "C, the two bare system calls"
_DEFAULT, _BESIDE = "sparsemem", "sparsemem, beside a busy Python thread"
_LARGEST = "sparsemem, 64T"


def _at_most(case: str, measure: str, way: str, limit: float) -> Target:
    return Target(case, measure, way, "", limit, Kind.FIGURE)


TARGETS: tuple[Target, ...] = (
    # 4 KiB pages, and transparent huge pages against what QEMU does on 4 KiB pages.
    Target("anonymous-4k", "populate", _ONE, _PLAIN, 0.80, without_uffd=1.03),
    Target("anonymous-thp", "populate", _ONE, "QEMU populate_write of 4 KiB pages, 1 thread", 0.14),
    Target("anonymous-thp", "populate", _ALL, "QEMU populate_write of 4 KiB pages, all threads", 0.16),
    Target("anonymous-thp", "populate", _ONE, _PLAIN, 0.45),
    # memfds; the peer is always one thread.
    Target("memfd-2m", "populate", _ONE, _PLAIN, 0.10),
    Target("memfd-2m", "populate", _ALL, _PLAIN, 0.10),
    Target("memfd-4k", "populate", _ONE, _PLAIN, 0.60),
    Target("memfd-4k", "populate", _ALL, _PLAIN, 0.42),
    # The issue does not say which blocks: both.
    Target("memfd-private-4k", "populate", _ONE, _PLAIN, 0.37),
    Target("memfd-private-2m", "populate", _ONE, _PLAIN, 0.37),
    _at_most("memfd-private-4k", "memory used", _ONE, 1.0),
    _at_most("memfd-private-2m", "memory used", _ONE, 1.0),
    # Discards of huge pages against those of 4 KiB pages; a plain memfd has those.
    Target("anonymous-thp", "discard", _ONE, "C populate_write of 4 KiB pages", 0.036),
    Target("memfd-2m", "discard", _ONE, _PLAIN, 0.02),
    # Scattered blocks.
    Target("scattered-4k", "unplug", _LISTED, _LOOP, 0.27),
    Target("scattered-4k", "unplug, gaps plugged", _LISTED, _LOOP, 0.40),
    Target("scattered-4k", "plug", _LISTED, _LOOP, 0.52),
    Target("scattered-4k", "plug, other processors busy", _LISTED, _LOOP, 0.78),
    # One block.
    Target("latency-4k", "median", "sparsemem", _CALLS, 2.0),
    Target("latency-4k", "median", "sparsemem", _CALLS, 3.2e-6, Kind.DIFFERENCE),
    Target("warm-pool", "plug", "sparsemem, from the warm pool", "sparsemem, populating", 0.04),
    # Other threads.  The third limit, 25 ms, has no name of its own there: it is
    # taken to be that of the Python thread where another one is busy.
    _at_most("stalls-thp", "mmap wait", _DEFAULT, 20e-3),
    _at_most("stalls-4k", "mmap wait", _DEFAULT, 20e-3),
    _at_most("stalls-thp", "Python stall", _DEFAULT, 10e-3),
    _at_most("stalls-4k", "Python stall", _DEFAULT, 50e-3),
    _at_most("stalls-thp", "Python stall", _BESIDE, 25e-3),
    _at_most("stalls-4k", "Python stall", _BESIDE, 25e-3),
    # By one thread: two of ours and a busy one on two processors are slower whatever anybody does.
    Target("stalls-thp", "plug", "sparsemem, 1 thread, beside a busy Python thread", "sparsemem, 1 thread", 1.2),
    Target("stalls-4k", "plug", "sparsemem, 1 thread, beside a busy Python thread", "sparsemem, 1 thread", 1.2),
    # The block map.
    _at_most("bitmap-large", "find at the far end", "sparsemem", 8e-3),
    _at_most("bitmap-large", "a run, of all as tuples", "sparsemem", 52e-9),
    _at_most("bitmap-large", "all runs as an array", "sparsemem", 60e-3),
    _at_most("create", "create and close", _LARGEST, 0.5e-3),
    _at_most("create", "bitmap memory touched", _LARGEST, 64 << 10),
)
